"""Writing files: whole or not at all, by one process at a time, and refused early."""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from richkd.errors import RichKDError
from richkd.interrupt import not_in_between, work_begins

# by `replacing`, and by zarr
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|.+\.[0-9a-f]{32}\.partial")


def home() -> Path:
    """The user's cache folder: RICHKD_HOME, else ~/.cache/richkd, else a temporary one."""
    given = os.environ.get("RICHKD_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "richkd"
    except RuntimeError:  # as in containers that run as a number
        return Path(tempfile.gettempdir()) / "richkd"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    work_begins()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**12)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes it 0600
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporary(folder: Path) -> None:
    """Delete what a killed process was in the middle of writing; the caller holds the folder."""
    for path in [*filter(is_temporary, folder.rglob("*"))]:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file was to take the place of another."""
    return _TEMPORARY.fullmatch(path.name) is not None


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be made, before anything long is done for it; makes nothing.

    Raises:
        RichKDError: a file is where a folder should be, or a folder may not be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RichKDError(f"cannot write {path}: {folder} is a file; choose another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RichKDError(f"cannot write {path}: no permission in {folder}; choose another --out")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A store or a run folder is this process's to write; a lock dies with its process.

    Raises:
        RichKDError: another process has it.
    """
    work_begins()
    path.parent.mkdir(parents=True, exist_ok=True)
    note = _lock_file(path)
    lock = FileLock(note)
    try:
        with not_in_between():
            lock.acquire(timeout=0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        yield
    except Timeout:
        raise _held_by(path, note) from None
    finally:
        with not_in_between():
            if lock.is_locked:
                note.unlink(missing_ok=True)
                lock.release()


def check_not_held(path: Path) -> None:
    """Refuse a path that another process is writing; makes nothing.

    Raises:
        RichKDError: that is so.
    """
    if _lock_file(path).exists():
        with held(path):
            pass


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _held_by(path: Path, note: Path) -> RichKDError:
    try:
        holder = note.read_text().strip()
    except OSError:
        holder = ""
    return RichKDError(
        f"{path} is being written by {holder or 'another process'}; wait for that, or choose "
        f"another --out"
    )

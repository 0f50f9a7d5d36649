"""Writing files: whole or not at all, by one process at a time, and refused early."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from richkd.core.errors import RichKDError, local_path
from richkd.core.interrupts import uninterrupted, work_begins

try:
    import fcntl
except ImportError:  # Windows, whose locks are others
    fcntl = None  # type: ignore[assignment]

# by `replacing`, and by zarr
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|.+\.[0-9a-f]{32}\.partial")
ABANDONED_S = 3600.0  # where there is no flock: when nobody writes a temporary file any more
FRESH_S = 0.1  # younger ones may be of a process that has yet to take the lock
LEASE_S = 30.0  # where there is no flock: how long a lock lasts that its holder does not renew
_NO_FLOCK = {ENOSYS, ENOLCK, EOPNOTSUPP}
_leases: dict[Path, SoftFileLease] = {}  # held by this process, by what they lock


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
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**12)}.tmp")
    try:
        with _marked_in_use(temporary):
            yield temporary
            temporary.replace(path)  # still in use: another thread looks for abandoned ones
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _marked_in_use(temporary: Path) -> Iterator[None]:
    """A new file that others can tell from one whose process is gone."""
    with temporary.open("wb") as file:
        if fcntl is not None:
            with suppress(OSError):  # there age tells
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    if fcntl is None:
        yield


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """A JSON file, whole or not at all."""
    write(path, to_json(value, indent=2) + "\n")


def to_json(value: object, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_replaceable(path: Path, ours: Callable[[Path], bool]) -> None:
    """Refuse to write over what richkd did not write; errors also as of `check_writable`.

    Args:
        path: of the file to write.
        ours: whether a file that is there was written by richkd.

    Raises:
        RichKDError: a folder or another file is there.
    """
    check_writable(path)
    if path.is_file() and (path.stat().st_size == 0 or ours(path)):
        return
    if path.exists() or path.is_symlink():
        raise RichKDError(
            f"{path} exists and was not written by richkd; choose another --out, or move it away",
            code="foreign-file",
        )


def remove_abandoned(path: Path) -> None:
    """Delete what processes left that were killed while they wrote this file."""
    for left in path.parent.glob(f".{escaped(path.name)}.*.tmp"):
        with suppress(OSError):
            if is_temporary(left) and _abandoned(left):
                left.unlink()


def _abandoned(temporary: Path) -> bool:
    if fcntl is not None:
        try:
            with temporary.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                return False
        else:  # of a process that is gone, or that is about to take the lock
            return _age(temporary) > FRESH_S
    return _age(temporary) > ABANDONED_S


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def escaped(name: str) -> str:
    """A name in a pattern of `glob` that stands for itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


def remove_temporary(folder: Path, *, deep: bool = False) -> None:
    """Delete what a killed process was in the middle of writing; the caller holds the folder.

    Args:
        folder: the one that is held.
        deep: look into the folders in it too, which are held with it.
    """
    for path in [*filter(is_temporary, folder.rglob("*") if deep else folder.glob("*"))]:
        if not path.is_dir():
            path.unlink(missing_ok=True)


def is_temporary(path: PurePath) -> bool:
    """Whether a file was to take the place of another."""
    return _TEMPORARY.fullmatch(path.name) is not None


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be made, before anything long is done for it; makes nothing.

    Raises:
        RichKDError: a file is where a folder should be, a folder may not be written to, or it is
            a URL.
    """
    local_path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RichKDError(
            f"cannot write {path}: {folder} is a file; choose another --out", code="parent-is-file"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RichKDError(
            f"cannot write {path}: no permission in {folder}; choose another --out",
            code="no-permission",
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A store or a run folder is this process's to write; a lock dies with its process.

    Where the file system has no flock (Lustre without it, some FUSE and NFS), the lock is a file
    that its holder renews. That of a process of this machine that is gone is free at once, that of
    another machine when it was not renewed for `LEASE_S`.

    Raises:
        RichKDError: another process has it.
    """
    work_begins()
    path.parent.mkdir(parents=True, exist_ok=True)
    note = _lock_file(path)
    if _flock_is_missing(path):
        with _leased(path, note):
            yield
        return
    lock = FileLock(note)
    try:
        with uninterrupted():
            lock.acquire(timeout=0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        yield
    except Timeout:
        raise _locked_by(path, note) from None
    finally:
        with uninterrupted():
            if lock.is_locked:
                note.unlink(missing_ok=True)
                lock.release()


@contextmanager
def _leased(path: Path, note: Path) -> Iterator[None]:
    lease = SoftFileLease(note, lease_duration=LEASE_S)
    first, patience = _stamp(note), time.monotonic() + 1.5 * LEASE_S
    while True:
        try:
            lease.acquire(timeout=0)
            break
        except Timeout:
            renewed = _stamp(note) != first
            if renewed or time.monotonic() > patience:
                raise _locked_by(path, note) from None
        time.sleep(min(0.2, LEASE_S / 10))
    _leases[path] = lease
    try:
        yield
    finally:
        del _leases[path]
        lease.release()


def check_still_locked(path: Path) -> None:
    """Refuse to go on with what another process took over meanwhile.

    Raises:
        RichKDError: this process was held up for so long that its lock ran out.
    """
    lease = _leases.get(path)
    if lease is not None and lease.compromise is not None:
        raise RichKDError(
            f"{path} was taken over by another process, which could not see this one renew its "
            f"lock; let that one finish",
            code="lock-lost",
        )


def check_unlocked(path: Path) -> None:
    """Refuse a path that another process is writing; makes nothing.

    Raises:
        RichKDError: that is so.
    """
    if _lock_file(path).exists():
        with locked(path):
            pass


def _flock_is_missing(path: Path) -> bool:
    """Whether the file system of a path has no flock, which only trying tells."""
    if fcntl is None:
        return False
    probe = path.with_name(f".{path.name}.{secrets.randbelow(10**12)}.tmp")
    try:
        with probe.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return True
    finally:
        probe.unlink(missing_ok=True)
    return False


def _stamp(note: Path) -> tuple[int, int] | None:
    """What changes when a lock is renewed or taken."""
    try:
        found = note.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _locked_by(path: Path, note: Path) -> RichKDError:
    try:
        holder = note.read_text().strip()
    except (OSError, ValueError):
        holder = ""
    told = dict(line.split("=", 1) for line in holder.splitlines() if "=" in line)
    if "pid" in told:  # of a lease, as filelock notes it
        host = told.get("host", "?").partition("?")[0] or "another machine"
        holder = f"process {told['pid']} on {host}"
    return RichKDError(
        f"{path} is being written by {holder or 'another process'}; wait for that, or choose "
        f"another --out",
        code="locked",
    )

"""Write files atomically, lock them against other processes, and refuse bad paths early."""

from __future__ import annotations

import glob
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
from richkd.core.interrupts import mark_work_started, uninterrupted

try:
    import fcntl
except ImportError:  # Windows, which has other locks
    fcntl = None  # type: ignore[assignment]

# names given by `atomic_write` and by zarr
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|.+\.[0-9a-f]{32}\.partial")
ABANDONED_S = 3600.0  # without flock: age at which a temporary file counts as abandoned
GRACE_S = 0.1  # a process that has just created a temporary file may not have locked it yet
LEASE_S = 30.0  # without flock: time after which a lock expires unless it is renewed
_NO_FLOCK = {ENOSYS, ENOLCK, EOPNOTSUPP}
_leases: dict[Path, SoftFileLease] = {}  # of this process, by the path they lock


def home() -> Path:
    """Return the user's cache folder: RICHKD_HOME, else ~/.cache/richkd, else a temporary one."""
    given = os.environ.get("RICHKD_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "richkd"
    except RuntimeError:  # no such user, as in some containers
        return Path(tempfile.gettempdir()) / "richkd"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds."""
    mark_work_started()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**12)}.tmp")
    try:
        with _marked_in_use(temporary):
            yield temporary
            temporary.replace(path)  # still marked: other threads delete abandoned files
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _marked_in_use(temporary: Path) -> Iterator[None]:
    """Create a file and lock it, so that others can tell it from an abandoned one."""
    with temporary.open("wb") as file:
        if fcntl is not None:
            with suppress(OSError):  # no flock; others go by its age
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    if fcntl is None:
        yield


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write(path, to_json(value, indent=2) + "\n")


def to_json(value: object, indent: int | None = None) -> str:
    """Return strict JSON; numbers that are not finite, which JSON lacks, become null."""
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
    """Return the object in a JSON file, or None if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_replaceable(path: Path, ours: Callable[[Path], bool]) -> None:
    """Check that a file can be written and replaces at most a file that richkd wrote.

    Args:
        path: the file to write.
        ours: tells whether an existing file was written by richkd.

    Raises:
        RichKDError: the path is a folder or a foreign file, or `check_writable` refuses it.
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
    """Delete the temporary files of processes that were killed while writing this file."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if is_temporary(temporary) and _abandoned(temporary):
                temporary.unlink()


def _abandoned(temporary: Path) -> bool:
    if fcntl is not None:
        try:
            with temporary.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                return False
        else:  # its process is gone, or about to take the lock
            return _age(temporary) > GRACE_S
    return _age(temporary) > ABANDONED_S


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def remove_temporary(folder: Path, *, deep: bool = False) -> None:
    """Delete the temporary files in a folder that the caller has locked.

    Args:
        folder: the locked folder.
        deep: delete those in its subfolders too.
    """
    for path in [*filter(is_temporary, folder.rglob("*") if deep else folder.glob("*"))]:
        if not path.is_dir():
            path.unlink(missing_ok=True)


def is_temporary(path: PurePath) -> bool:
    """Return whether a file is a temporary file of an atomic write."""
    return _TEMPORARY.fullmatch(path.name) is not None


def check_writable(path: Path) -> None:
    """Check, without creating anything, that a path can be written.

    Raises:
        RichKDError: a parent is a file or not writable, or the path is a URL.
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
def locked(path: Path, lease_s: float = LEASE_S) -> Iterator[None]:
    """Lock a cache or a run folder for writing; the lock ends with the process.

    On file systems without flock (some Lustre, FUSE and NFS) the lock is a lease: a file that its
    holder keeps renewing. If the holder dies, its lease expires at once for processes on the same
    machine, and after `lease_s` without renewal for others.

    Raises:
        RichKDError: another process holds the lock.
    """
    mark_work_started()
    path.parent.mkdir(parents=True, exist_ok=True)
    note = _lock_file(path)
    if _flock_is_missing(path):
        with _leased(path, note, lease_s):
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
def _leased(path: Path, note: Path, lease_s: float) -> Iterator[None]:
    lease = SoftFileLease(note, lease_duration=lease_s)
    first, patience = _stamp(note), time.monotonic() + 1.5 * lease_s
    while True:
        try:
            lease.acquire(timeout=0)
            break
        except Timeout:
            renewed = _stamp(note) != first
            if renewed or time.monotonic() > patience:
                raise _locked_by(path, note) from None
        time.sleep(min(0.2, lease_s / 10))
    _leases[path] = lease
    try:
        yield
    finally:
        del _leases[path]
        lease.release()


def check_still_locked(path: Path) -> None:
    """Check that this process still holds its lock on a path.

    Raises:
        RichKDError: its lease expired, and another process took over.
    """
    lease = _leases.get(path)
    if lease is not None and lease.compromise is not None:
        raise RichKDError(
            f"{path} was taken over by another process, because this one did not renew its lock "
            f"in time; let the other one finish",
            code="lock-lost",
        )


def check_unlocked(path: Path, lease_s: float = LEASE_S) -> None:
    """Check that no other process is writing to a path.

    Raises:
        RichKDError: another process is.
    """
    if _lock_file(path).exists():
        with locked(path, lease_s):
            pass


def _flock_is_missing(path: Path) -> bool:
    """Return whether the file system of a path lacks flock, by trying it."""
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
    """Return a stamp that changes whenever a lease is taken or renewed."""
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
    entries = dict(line.split("=", 1) for line in holder.splitlines() if "=" in line)
    if "pid" in entries:  # a lease, as filelock writes it
        host = entries.get("host", "?").partition("?")[0] or "another machine"
        holder = f"process {entries['pid']} on {host}"
    return RichKDError(
        f"{path} is being written by {holder or 'another process'}; wait for it to finish, or "
        f"choose another --out",
        code="locked",
    )

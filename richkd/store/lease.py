"""A lock on a cache in object storage: an object that its holder must keep renewing.

The object can only be replaced by a process that knows its current tag (a conditional put). A
process that finds a lock waits for two and a half beats; if the lock was not renewed, its holder is
gone and the process takes it over. A holder that was delayed checks that the lock is still its own
before it writes. obstore has conditional puts but no locks, so all of this is our own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

from richkd.core.errors import RichKDError
from richkd.store.location import ATTEMPTS
from richkd.store.patient import again

LOCK = ".lock"
BEAT_S = 10.0  # between renewals
TAKEN = (AlreadyExistsError, PreconditionError)  # another process changed the lock meanwhile


@dataclass(frozen=True)
class Seen:
    """A lock as it was found."""

    tag: str
    holder: str  # for messages
    token: str  # of its holder; renewals keep it
    gone: bool  # the holder was a process on this system and has ended


class Lease:
    """This process's part in the lock of one cache."""

    def __init__(self, store: Any, name: str, beat: float = BEAT_S) -> None:
        self.token: str | None = None  # while this process's job has the lock
        self.beat = beat
        self._store, self._name = store, name
        # constant, because a request from an earlier lock may arrive late
        self._own = secrets.token_hex(8)
        self._tag: str | None = None  # None: another process of the job renews the lock
        self._lost = False
        self._seen = 0.0  # when the lock was last known to be its own
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock until the block ends.

        Raises:
            RichKDError: another process has it.
        """
        self.token, self._tag, self._lost = self._own, None, False
        self._take()
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self.beat) and not self._lost:
                with suppress(Exception):  # the server is unreachable; the next write reports it
                    self._renew()

        beating = threading.Thread(target=renew, name="store-lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            with suppress(Exception):  # the lock expires anyway
                seen = self.look()
                if seen is not None and seen.token == self.token:
                    obstore.delete(self._store, LOCK)
            self.token = self._tag = None

    def follow(self, token: str) -> None:
        """Write for as long as the job's first process has the lock."""
        self.token, self._tag, self._lost, self._seen = token, None, False, time.monotonic()

    def check(self) -> None:
        """Raise RichKDError if this job no longer has the lock."""
        if self.token is None:
            return
        if time.monotonic() - self._seen > 2 * self.beat:  # this process was delayed, or follows
            self._renew()
        if self._lost:
            raise RichKDError(
                f"{self._name} was taken over by another process, because this one did not "
                f"renew its lock in time; let the other one finish",
                code="lock-lost",
            )

    def look(self) -> Seen | None:
        """Return the current lock, if there is one."""

        def request() -> Seen:
            found = obstore.get(self._store, LOCK)
            return _read(str(found.meta["e_tag"]), bytes(found.bytes()))

        try:
            return again(request)
        except FileNotFoundError:
            return None

    def _renew(self) -> None:
        with self._one_at_a_time:
            if self._tag is None:
                seen = self.look()
                self._lost = seen is None or seen.token != self.token
            else:
                try:
                    self._write({"e_tag": self._tag})
                except (*TAKEN, FileNotFoundError):
                    self._lost = not self._restored()
            self._seen = time.monotonic()

    def _restored(self) -> bool:
        """Recreate a lock that vanished before any other process can have taken it.

        A slow server may carry out a delete late, and so delete this lock instead of the one
        before it.
        """
        if time.monotonic() - self._seen > 2 * self.beat:  # others wait longer than that
            return False
        try:
            self._write("create")
        except TAKEN:
            return False
        return True

    def _write(self, mode: Any) -> None:
        beat = secrets.token_hex(8)
        note = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "token": self.token,
            "system": this_system(),
            "pid": os.getpid(),
            "beat": beat,
        }
        content = json.dumps(note).encode()
        try:
            self._tag = str(obstore.put(self._store, LOCK, content, mode=mode)["e_tag"])
        except (GenericError, *TAKEN):
            # such a request is sent only once, but may have arrived nevertheless
            found = self.look()
            if found is None or found.token != self.token or found.tag == self._tag:
                raise
            self._tag = found.tag
        self._seen = time.monotonic()

    def _take(self) -> None:
        for _ in range(ATTEMPTS):
            with suppress(GenericError):
                with suppress(AlreadyExistsError):
                    return self._write("create")
                break
        seen = self.look()
        if seen is not None and not seen.gone and seen.token != self.token:
            time.sleep(2.5 * self.beat)
            now = self.look()
            if now is not None and now.tag != seen.tag:
                raise self._locked_by(now.holder)
        try:
            return self._write("create" if seen is None else {"e_tag": seen.tag})
        except TAKEN:
            raise self._locked_by("another process") from None

    def _locked_by(self, holder: str) -> RichKDError:
        return RichKDError(
            f"{self._name} is being written by {holder}; wait for it to finish, or choose another "
            f"--out",
            code="locked",
        )


def _read(tag: str, content: bytes) -> Seen:
    """Parse the content of a lock, which may be anything."""
    try:
        note = json.loads(content)
        holder, token, pid = str(note["holder"]), str(note["token"]), int(note["pid"])
        here = note["system"] is not None and note["system"] == this_system()
    except (ValueError, TypeError, KeyError):
        return Seen(tag, "another process", "", gone=False)
    return Seen(tag, holder, token, gone=here and not _runs(pid))


def this_system() -> str | None:
    """Identify the running system and its PID namespace; None if that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

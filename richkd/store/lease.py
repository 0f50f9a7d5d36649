"""A lock on a store in object storage: an object that its holder renews, and loses if it does not.

Only who knows its present tag may replace it (a conditional request of the server). Whoever finds a
lock waits for two beats and a half; one that was not renewed meanwhile is that of a process that is
gone. A holder that was held up itself looks before it goes on whether the lock is its own still.
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
BEAT_S = 10.0  # how often the holder renews it
TAKEN = (AlreadyExistsError, PreconditionError)  # a lock is not as it was thought to be


@dataclass(frozen=True)
class Seen:
    """A lock as it lies there."""

    tag: str
    holder: str  # for people
    token: str  # of its holder, however often that renews it
    gone: bool  # the holder was a process of this very system that is no more


class Lease:
    """This process's part in the lock of one store."""

    def __init__(self, store: Any, name: str) -> None:
        self.token: str | None = None  # while the store is this process's job's to write
        self._store, self._name = store, name
        # one for all times that this has the lock: a request of an earlier time may arrive late
        self._own = secrets.token_hex(8)
        self._tag: str | None = None  # None: another process of the job renews the lock
        self._lost = False
        self._seen = 0.0  # when the lock was last known to be ours
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the lock until the block ends.

        Raises:
            RichKDError: another process has it.
        """
        self.token, self._tag, self._lost = self._own, None, False
        self._take()
        over = threading.Event()

        def renew() -> None:
            while not over.wait(BEAT_S) and not self._lost:
                with suppress(Exception):  # the server is away; writing says so
                    self._renew()

        beating = threading.Thread(target=renew, name="store-lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            with suppress(Exception):  # it ages all the same
                seen = self.look()
                if seen is not None and seen.token == self.token:
                    obstore.delete(self._store, LOCK)
            self.token = self._tag = None

    def follow(self, token: str) -> None:
        """Write as long as the process of this job that has the lock has it."""
        self.token, self._tag, self._lost, self._seen = token, None, False, time.monotonic()

    def check(self) -> None:
        """Refuse to go on where the lock is not this job's any more.

        Raises:
            RichKDError: that is so.
        """
        if self.token is None:
            return
        if time.monotonic() - self._seen > 2 * BEAT_S:  # this process was held up, or follows
            self._renew()
        if self._lost:
            raise RichKDError(
                f"{self._name} was taken over by another process, which could not see this one "
                f"renew its lock; let that one finish",
                code="lock-lost",
            )

    def look(self) -> Seen | None:
        """The lock that is there."""

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
        """Make a lock anew that went away although nobody else can have taken it yet.

        A server that was slow to answer may delete late: what it deletes is then this lock, not
        the one before it.
        """
        if time.monotonic() - self._seen > 2 * BEAT_S:  # others wait for longer than that
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
            "system": _system(),
            "pid": os.getpid(),
            "beat": beat,
        }
        content = json.dumps(note).encode()
        try:
            self._tag = str(obstore.put(self._store, LOCK, content, mode=mode)["e_tag"])
        except (GenericError, *TAKEN):
            # a request that may be sent but once; it may have arrived all the same
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
            time.sleep(2.5 * BEAT_S)
            now = self.look()
            if now is not None and now.tag != seen.tag:
                raise self._locked_by(now.holder)
        try:
            return self._write("create" if seen is None else {"e_tag": seen.tag})
        except TAKEN:
            raise self._locked_by("another process") from None

    def _locked_by(self, holder: str) -> RichKDError:
        return RichKDError(
            f"{self._name} is being written by {holder}; wait for that, or choose another --out",
            code="locked",
        )


def _read(tag: str, content: bytes) -> Seen:
    """A lock's content, which may be anything."""
    try:
        note = json.loads(content)
        holder, token, pid = str(note["holder"]), str(note["token"]), int(note["pid"])
        here = note["system"] is not None and note["system"] == _system()
    except (ValueError, TypeError, KeyError):
        return Seen(tag, "another process", "", gone=False)
    return Seen(tag, holder, token, gone=here and not _runs(pid))


def _system() -> str | None:
    """What tells processes apart that have one number: the running system, and its view of them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

"""A store in object storage: s3://, gs:// or az://BUCKET/PATH.zarr, by obstore.

obstore moves the bytes, tries again by itself where a server or the network fails, and reads
credentials from the environment, under the names that the clouds' own tools use.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url

from richkd.errors import RichKDError
from richkd.store.patient import PatientStore
from richkd.store.place import AT_ONCE, ATTEMPTS, METADATA, Place, first_line

if TYPE_CHECKING:
    from zarr.abc.store import Store

T = TypeVar("T")
LOCK = ".lock"
TAKEN = (AlreadyExistsError, PreconditionError)  # a lock is not as it was thought to be
BEAT_S = 10.0  # how often the holder of a store says that it is there
TIMEOUT_S = 60.0  # of a request
# After errors of the server or the network: again and again, ever more slowly, for so long.
PATIENCE_S = 120.0
HASTE_S = 3.0  # for the first request of all, when nothing is lost yet
# where obstore asks when the environment holds no credentials: the machine's own, in the clouds
_ASKED_FOR_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


class Bucket(Place):
    """A store in object storage, by obstore."""

    durable = True
    at_once = AT_ONCE

    def __init__(self, url: str) -> None:
        self._name = url
        self._tag: dict[str, Any] | None = None  # of the lock as this process last wrote it
        self._lost = False

    @property
    def name(self) -> str:
        """The URL."""
        return self._name

    @cached_property
    def _store(self) -> Any:
        return self._open(PATIENCE_S)

    def _open(self, patience: float) -> Any:
        try:
            return from_url(
                self.name.rstrip("/"),
                client_options={  # http:// only where the endpoint says so
                    "timeout": timedelta(seconds=TIMEOUT_S), "allow_http": True,
                },
                retry_config={
                    "max_retries": 1000, "retry_timeout": timedelta(seconds=patience),
                    "backoff": {"init_backoff": timedelta(seconds=0.1), "base": 2,
                                "max_backoff": timedelta(seconds=10)},
                },
            )  # fmt: skip
        except Exception as error:  # obstore's errors and ValueError
            raise self._cannot("reach", error) from None

    def zarr(self, *, read_only: bool) -> Store:
        """zarr's store over obstore."""
        return PatientStore(self._store, read_only=read_only)

    def read(self, file: str) -> bytes:
        """One request."""
        with self.explained("read"):
            return self._again(lambda: bytes(obstore.get(self._store, file).bytes()))

    def tail(self, file: str, count: int) -> bytes:
        """One request for a range."""
        with self.explained("read"):
            try:
                options: Any = {"range": {"suffix": count}}
                return self._again(
                    lambda: bytes(obstore.get(self._store, file, options=options).bytes())
                )
            except obstore.exceptions.NotSupportedError:  # Azure knows no ranges from the end
                size = obstore.head(self._store, file)["size"]
                start = max(0, size - count)
                return bytes(obstore.get_range(self._store, file, start=start, end=size))

    def _again(self, request: Callable[[], T]) -> T:
        """What a request gives; again where obstore gives up at once: after a body cut short."""
        for _ in range(ATTEMPTS - 1):
            with suppress(GenericError):
                return request()
        return request()

    def write(self, file: str, content: bytes) -> None:
        """One request; a server takes an object whole or not at all."""
        with self.explained("write to"):
            obstore.put(self._store, file, content)

    def delete(self, file: str) -> None:
        """One request."""
        with self.explained("write to"), suppress(FileNotFoundError):
            obstore.delete(self._store, file)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """A request for every thousand files."""
        with self.explained("list"):
            return {
                entry["path"]: entry["size"]
                for entry in self._again(
                    lambda: obstore.list(self._store, prefix=prefix or None).collect()
                )
                if entry["path"] != LOCK
            }

    @property
    def exists(self) -> bool:
        """A server that does not answer is not waited for so long here."""
        try:
            with self.explained("reach"):
                obstore.head(self._open(HASTE_S), METADATA)
        except FileNotFoundError:
            return False
        return True

    def create(self, content: Mapping[str, bytes]) -> None:
        """The manifest goes first and comes first: without it there is no store."""
        self.delete(METADATA)
        others = list(self.sizes())
        with self.explained("write to"):
            for start in range(0, len(others), 1000):  # as many as a request takes
                obstore.delete(self._store, others[start : start + 1000])
        for file, data in content.items():
            self.write(file, data)

    def remove_temporary(self) -> None:
        """There is nothing half-written."""

    def check_writable(self) -> None:
        """By writing a lock and taking it away again."""
        _ = self.exists  # a server that is not there is known sooner so
        with self.held():
            pass

    # The lock is an object that only its maker may replace. Whoever made it writes it anew every
    # few seconds; one that does not change any more is that of a process that is gone.

    @contextmanager
    def held(self) -> Iterator[None]:
        """By a lock that its holder renews."""
        with self.explained("write to"):
            self._take()
        over = threading.Event()

        def renew() -> None:
            while not over.wait(BEAT_S):
                try:
                    self._write_lock({"e_tag": self._tag["e_tag"]} if self._tag else "overwrite")
                except (*TAKEN, FileNotFoundError):
                    self._lost = True
                    return
                except Exception:  # the server is away; writing says so
                    continue

        beating = threading.Thread(target=renew, name="store-lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            if not self._lost:
                with suppress(Exception):  # it ages all the same
                    obstore.delete(self._store, LOCK)

    def check_not_held(self) -> None:
        """Where a lock is there, whether somebody renews it."""
        with suppress(FileNotFoundError):
            self.read(LOCK)
            self.check_writable()

    def check_still_held(self) -> None:
        """Whether the lock is this process's still."""
        if self._lost:
            raise RichKDError(
                f"{self.name} was taken over by another process, which could not see this one "
                f"renew its lock; let that one finish"
            )

    def _write_lock(self, mode: Any) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        note = f"process {os.getpid()} on {socket.gethostname()}, at {now}, {secrets.token_hex(8)}"
        try:
            self._tag = dict(obstore.put(self._store, LOCK, note.encode(), mode=mode))
        except (GenericError, *TAKEN):
            # a request that may be sent but once; it may have arrived all the same
            seen = self._look()
            if seen is None or seen[1] != note:
                raise
            self._tag = {"e_tag": seen[0]}

    def _take(self) -> None:
        for _ in range(ATTEMPTS):
            with suppress(GenericError):
                with suppress(AlreadyExistsError):
                    self._write_lock("create")
                    return
                break
        seen = self._look()
        if seen is not None and not _is_gone(seen[1]):
            time.sleep(2.5 * BEAT_S)
            if (now := self._look()) is not None and now[0] != seen[0]:
                raise RichKDError(
                    f"{self.name} is being written by {now[1].partition(', at')[0]}; wait for "
                    f"that, or choose another --out"
                )
        try:
            self._write_lock("create" if seen is None else {"e_tag": seen[0]})
        except TAKEN:
            raise RichKDError(
                f"{self.name} is being written by another process; wait for that, or choose "
                f"another --out"
            ) from None

    def _look(self) -> tuple[str, str] | None:
        """The lock's tag and what is written in it."""
        try:
            return self._again(lambda: _tag_and_text(obstore.get(self._store, LOCK)))
        except FileNotFoundError:
            return None

    def explain(self, error: BaseException) -> str:
        """Without the many lines that obstore shows of a request."""
        reason = first_line(error)
        if any(address in reason for address in _ASKED_FOR_CREDENTIALS):
            reason = "there are no credentials, neither in the environment nor of this machine"
        return f"{reason}; see to the network, the credentials and the bucket"

    def _cannot(self, do: str, error: BaseException) -> RichKDError:
        return RichKDError(f"cannot {do} {self.name}: {self.explain(error)}")

    @contextmanager
    def explained(self, do: str) -> Iterator[None]:
        """FileNotFoundError where a file is missing; RichKDError for whatever else befalls."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise RichKDError(f"cannot {do} {self.name}: there is no such bucket") from None
            raise FileNotFoundError(first_line(error)) from None
        except (BaseError, OSError) as error:
            raise self._cannot(do, error) from None


def _tag_and_text(found: Any) -> tuple[str, str]:
    return str(found.meta["e_tag"]), bytes(found.bytes()).decode(errors="replace")


def _is_gone(note: str) -> bool:
    """Whether the holder that a lock names was a process of this machine that is no more."""
    words = note.replace(",", "").split()
    try:
        pid, host = int(words[1]), words[3]
    except (IndexError, ValueError):
        return False
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and there
        pass
    return False

"""A cache in object storage: s3://, gs:// or az://BUCKET/PATH.zarr, through obstore.

obstore transfers the bytes, retries when a server or the network fails, and reads credentials from
the environment variables that the clouds' own tools use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from richkd.core.errors import RichKDError, first_line
from richkd.store.lease import BEAT_S, LOCK, Lease
from richkd.store.location import (
    AT_ONCE,
    METADATA,
    PATIENCE_S,
    Location,
)
from richkd.store.patient import PatientStore, again

if TYPE_CHECKING:
    from zarr.abc.store import Store

T = TypeVar("T")
TIMEOUT_S = 60.0  # per request
FIRST_PATIENCE_S = 3.0  # for the very first request, when nothing can be lost yet
# where obstore asks for the machine's own credentials if the environment has none
_ASKED_FOR_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


class Bucket(Location):
    """A cache in object storage.

    Args:
        url: of the cache.
        timeout: seconds per request.
        patience: seconds for which failing requests are retried.
        first_patience: the same for the first request of all.
        beat: seconds between renewals of the lock.
    """

    durable = True
    at_once = AT_ONCE

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT_S,
        patience: float = PATIENCE_S,
        first_patience: float = FIRST_PATIENCE_S,
        beat: float = BEAT_S,
    ) -> None:
        self._name = url
        self._timeout, self._patience, self._beat = timeout, patience, beat
        self._first_patience = first_patience
        self._contacted = False  # whether anything was requested yet

    @property
    def name(self) -> str:
        """The URL."""
        return self._name

    @cached_property
    def _store(self) -> Any:
        return self._open(self._patience)

    def _open(self, patience: float) -> Any:
        try:
            return from_url(
                self.name.rstrip("/"),
                client_options={  # http:// only if the endpoint asks for it
                    "timeout": timedelta(seconds=self._timeout),
                    "allow_http": True,
                },
                retry_config={
                    "max_retries": 1000,
                    "retry_timeout": timedelta(seconds=patience),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "base": 2,
                        "max_backoff": timedelta(seconds=10),
                    },
                },
            )
        except Exception as error:  # obstore's errors and ValueError
            raise self._cannot("reach", error) from None

    def zarr(self, *, read_only: bool) -> Store:
        store = PatientStore(self._store, read_only=read_only)
        store.patience = self._patience
        return store

    def _again(self, request: Callable[[], T]) -> T:
        return again(request, self._patience)

    def read(self, file: str) -> bytes:
        with self.explained("read"):
            return self._again(lambda: bytes(obstore.get(self._store, file).bytes()))

    def tail(self, file: str, count: int) -> bytes:
        with self.explained("read"):
            try:
                options: Any = {"range": {"suffix": count}}
                return self._again(
                    lambda: bytes(obstore.get(self._store, file, options=options).bytes())
                )
            except obstore.exceptions.NotSupportedError:  # Azure has no ranges from the end
                size = obstore.head(self._store, file)["size"]
                start = max(0, size - count)
                return bytes(obstore.get_range(self._store, file, start=start, end=size))

    def write(self, file: str, content: bytes) -> None:
        """Put an object, which is atomic on every server."""
        with self.explained("write to"):
            obstore.put(self._store, file, content)

    def delete(self, file: str) -> None:
        with self.explained("write to"), suppress(FileNotFoundError):
            self._again(lambda: obstore.delete(self._store, file))

    def sizes(self, prefix: str = "") -> dict[str, int]:
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
        """Whether a cache exists; a server that has never responded is given less time."""
        store = self._store if self._contacted else self._open(self._first_patience)
        try:
            with self.explained("reach"):
                obstore.head(store, METADATA)
        except FileNotFoundError:
            return False
        finally:
            self._contacted = True
        return True

    def create(self, content: Mapping[str, bytes]) -> None:
        """Delete an old manifest first and write the new one first: without it there is no cache.

        Only existing files are deleted: a slow server may carry out the first attempt of a request
        late, when the new manifest is already there.
        """
        others = list(self.sizes())
        if METADATA in others:
            others.remove(METADATA)
            self.delete(METADATA)
        with self.explained("write to"):
            for start in range(0, len(others), 1000):  # the most that one request may delete
                some = others[start : start + 1000]
                self._again(partial(obstore.delete, self._store, some))
        for file, data in content.items():
            self.write(file, data)

    def remove_temporary(self) -> None:
        """Do nothing: puts are atomic."""

    def check_writable(self) -> None:
        """Lock and unlock the cache, which takes a write and a delete."""
        _ = self.exists  # fails sooner if there is no server
        with self.locked():
            pass

    @cached_property
    def _lease(self) -> Lease:
        return Lease(self._store, self.name, self._beat)

    @property
    def token(self) -> str | None:
        return self._lease.token

    def follow(self, token: str | None) -> None:
        if token is not None:
            self._lease.follow(token)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock that this process renews until the block ends."""
        with ExitStack() as stack:
            with self.explained("write to"):
                stack.enter_context(self._lease.locked())
            yield

    def check_unlocked(self) -> None:
        """Check that nobody renews the lock, if there is one."""
        with self.explained("read"):
            found = self._lease.look()
        if found is not None:
            self.check_writable()

    def check_still_locked(self) -> None:
        """Check the lock, unless it was checked recently."""
        with self.explained("write to"):
            self._lease.check()

    def explain(self, error: BaseException) -> str:
        """Return the first line of obstore's many, and the remedy."""
        reason = first_line(error)
        if any(address in reason for address in _ASKED_FOR_CREDENTIALS):
            reason = "there are no credentials in the environment, and this machine has none"
        return f"{reason}; check the network, the credentials and the bucket"

    def _cannot(self, do: str, error: BaseException) -> RichKDError:
        return RichKDError(
            f"cannot {do} {self.name}: {self.explain(error)}", code="location-failed"
        )

    @contextmanager
    def explained(self, do: str) -> Iterator[None]:
        """Turn every error but FileNotFoundError of a file into RichKDError."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise RichKDError(
                    f"cannot {do} {self.name}: the bucket does not exist; create it",
                    code="bucket-missing",
                ) from None
            raise FileNotFoundError(first_line(error)) from None
        except (BaseError, OSError) as error:
            raise self._cannot(do, error) from None

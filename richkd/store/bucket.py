"""A store in object storage: s3://, gs:// or az://BUCKET/PATH.zarr, by obstore.

obstore moves the bytes, tries again by itself where a server or the network fails, and reads
credentials from the environment, under the names that the clouds' own tools use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from richkd.core.errors import RichKDError, first_line
from richkd.store.lease import LOCK, Lease
from richkd.store.location import (
    AT_ONCE,
    METADATA,
    PATIENCE_S,
    Location,
)
from richkd.store.patient import PatientStore, again

if TYPE_CHECKING:
    from zarr.abc.store import Store

TIMEOUT_S = 60.0  # of a request
HASTE_S = 3.0  # for the first request of all, when nothing is lost yet
# where obstore asks when the environment holds no credentials: the machine's own, in the clouds
_ASKED_FOR_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


class Bucket(Location):
    """A store in object storage, by obstore."""

    durable = True
    at_once = AT_ONCE

    def __init__(self, url: str) -> None:
        self._name = url
        self._met = False  # whether the server was asked for anything yet

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
                    "timeout": timedelta(seconds=TIMEOUT_S),
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
        """zarr's store over obstore."""
        return PatientStore(self._store, read_only=read_only)

    def read(self, file: str) -> bytes:
        """One request."""
        with self.explained("read"):
            return again(lambda: bytes(obstore.get(self._store, file).bytes()))

    def tail(self, file: str, count: int) -> bytes:
        """One request for a range."""
        with self.explained("read"):
            try:
                options: Any = {"range": {"suffix": count}}
                return again(lambda: bytes(obstore.get(self._store, file, options=options).bytes()))
            except obstore.exceptions.NotSupportedError:  # Azure knows no ranges from the end
                size = obstore.head(self._store, file)["size"]
                start = max(0, size - count)
                return bytes(obstore.get_range(self._store, file, start=start, end=size))

    def write(self, file: str, content: bytes) -> None:
        """One request; a server takes an object whole or not at all."""
        with self.explained("write to"):
            obstore.put(self._store, file, content)

    def delete(self, file: str) -> None:
        """One request."""
        with self.explained("write to"), suppress(FileNotFoundError):
            again(lambda: obstore.delete(self._store, file))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """A request for every thousand files."""
        with self.explained("list"):
            return {
                entry["path"]: entry["size"]
                for entry in again(
                    lambda: obstore.list(self._store, prefix=prefix or None).collect()
                )
                if entry["path"] != LOCK
            }

    @property
    def exists(self) -> bool:
        """A server that never answered yet is not waited for so long."""
        store = self._store if self._met else self._open(HASTE_S)
        try:
            with self.explained("reach"):
                obstore.head(store, METADATA)
        except FileNotFoundError:
            return False
        finally:
            self._met = True
        return True

    def create(self, content: Mapping[str, bytes]) -> None:
        """The manifest goes first and comes first: without it there is no store.

        What is not there is not deleted: a server that was slow to answer may carry out the first
        try of a request late, when the new manifest is there already.
        """
        others = list(self.sizes())
        if METADATA in others:
            others.remove(METADATA)
            self.delete(METADATA)
        with self.explained("write to"):
            for start in range(0, len(others), 1000):  # as many as a request takes
                some = others[start : start + 1000]
                again(partial(obstore.delete, self._store, some))
        for file, data in content.items():
            self.write(file, data)

    def remove_temporary(self) -> None:
        """There is nothing half-written."""

    def check_writable(self) -> None:
        """By writing a lock and taking it away again."""
        _ = self.exists  # a server that is not there is known sooner so
        with self.locked():
            pass

    @cached_property
    def _lease(self) -> Lease:
        return Lease(self._store, self.name)

    @property
    def token(self) -> str | None:
        """The lock's."""
        return self._lease.token

    def follow(self, token: str | None) -> None:
        """By looking at the lock."""
        if token is not None:
            self._lease.follow(token)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """By a lock that its holder renews."""
        with ExitStack() as stack:
            with self.explained("write to"):
                stack.enter_context(self._lease.locked())
            yield

    def check_unlocked(self) -> None:
        """Where a lock is there, whether somebody renews it."""
        with self.explained("read"):
            there = self._lease.look()
        if there is not None:
            self.check_writable()

    def check_still_locked(self) -> None:
        """By looking at the lock, where that was not done lately."""
        with self.explained("write to"):
            self._lease.check()

    def explain(self, error: BaseException) -> str:
        """Without the many lines that obstore shows of a request."""
        reason = first_line(error)
        if any(address in reason for address in _ASKED_FOR_CREDENTIALS):
            reason = "there are no credentials, neither in the environment nor of this machine"
        return f"{reason}; see to the network, the credentials and the bucket"

    def _cannot(self, do: str, error: BaseException) -> RichKDError:
        return RichKDError(
            f"cannot {do} {self.name}: {self.explain(error)}", code="location-failed"
        )

    @contextmanager
    def explained(self, do: str) -> Iterator[None]:
        """FileNotFoundError where a file is missing; RichKDError for whatever else befalls."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise RichKDError(
                    f"cannot {do} {self.name}: there is no such bucket", code="bucket-missing"
                ) from None
            raise FileNotFoundError(first_line(error)) from None
        except (BaseError, OSError) as error:
            raise self._cannot(do, error) from None

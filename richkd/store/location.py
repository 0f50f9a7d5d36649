"""Where a cache is: in a folder, in object storage (bucket.py), or on a hub (hf.py).

A location holds the files of a cache by their relative names (`train/labels/c/0`). Each file is
written atomically. Folders are read directly; files read from elsewhere are kept on this disk
(copy.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from zarr.abc.store import Store

METADATA = "zarr.json"
AT_ONCE = 16  # concurrent transfers from or to another machine
ATTEMPTS = 4  # at reading a file that arrives truncated or damaged
# How long failing requests are retried, with growing delays.
PATIENCE_S = 120.0

T = TypeVar("T")


class Location(ABC):
    """A folder or a URL that holds a cache, or will hold one."""

    durable: bool  # whether written files survive a crash of this machine
    at_once: int  # how many concurrent transfers are worthwhile

    @property
    @abstractmethod
    def name(self) -> str:
        """The path or URL as the user wrote it."""

    @property
    def stem(self) -> str:
        """The cache's own name, without its suffix."""
        return PurePosixPath(self.name.rstrip("/")).stem

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def zarr(self, *, read_only: bool) -> Store:
        """Return the location as a store of zarr's."""

    @abstractmethod
    def read(self, file: str) -> bytes:
        """Return a file's bytes; raise FileNotFoundError if it does not exist."""

    @abstractmethod
    def tail(self, file: str, count: int) -> bytes:
        """Return a file's last bytes; raise FileNotFoundError if it does not exist."""

    @abstractmethod
    def write(self, file: str, content: bytes) -> None:
        """Write a file atomically, replacing the previous one."""

    @abstractmethod
    def delete(self, file: str) -> None:
        """Delete a file if it exists."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below a folder of the cache."""

    @abstractmethod
    def remove_temporary(self) -> None:
        """Delete files that a killed process was writing; the caller has the lock."""

    @abstractmethod
    def create(self, content: Mapping[str, bytes]) -> None:
        """Write the first files of a new cache, the manifest first, replacing another cache."""

    @abstractmethod
    def check_writable(self) -> None:
        """Check early that the location can be written to."""

    @abstractmethod
    def locked(self) -> AbstractContextManager[None]:
        """Keep the cache locked for this process until the block ends.

        Raises:
            RichKDError: another process has the lock.
        """

    @property
    def token(self) -> str | None:
        """The lock's token, for the other processes of the job; None if they need none."""
        return None

    def follow(self, token: str | None) -> None:
        """Write under the lock of the job's first process."""
        del token

    @abstractmethod
    def check_unlocked(self) -> None:
        """Raise RichKDError if another process is writing the cache; write nothing."""

    @abstractmethod
    def explained(self, do: str) -> AbstractContextManager[None]:
        """Turn errors in the block into RichKDError; `do` is "read", "write to", "list" or "reach".

        FileNotFoundError passes through.
        """

    @abstractmethod
    def check_still_locked(self) -> None:
        """Raise RichKDError if another process has taken over the lock."""

    def map(self, function: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
        """Apply a function to each file, in order, concurrently if that is faster."""
        if self.at_once == 1:
            yield from map(function, names)
            return
        with ThreadPoolExecutor(self.at_once) as pool:
            for start in range(0, len(names), self.at_once):  # bounds memory
                yield from pool.map(function, names[start : start + self.at_once])

    @property
    def exists(self) -> bool:
        """Whether a cache, complete or not, exists here."""
        try:
            self.tail(METADATA, 1)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @property
    def vacant(self) -> bool:
        """Whether nothing exists here."""
        return not self.sizes()

    def explain(self, error: BaseException) -> str:
        """Describe a failed write and its remedy."""
        return f"{error}; free some space or repair the disk"

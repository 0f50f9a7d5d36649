"""Where a store lies: in a folder, in object storage (bucket.py), or on a hub (hf.py).

A place holds the store's files by their names relative to it (`train/labels/c/0`); each is written
whole or not at all. Those of a folder are at hand; of the others, what is read is kept on this
disk (copy.py).
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
AT_ONCE = 16  # files under way from or to another machine
ATTEMPTS = 4  # to read what arrives cut short or damaged
# After errors of a server or the network: again and again, ever more slowly, for so long.
PATIENCE_S = 120.0

T = TypeVar("T")


class Location(ABC):
    """A folder or a URL that holds a store, or will hold one."""

    durable: bool  # whether a file that was written is whole after a crash of this machine
    at_once: int  # how many files it pays to ask for together

    @property
    @abstractmethod
    def name(self) -> str:
        """As the user wrote it."""

    @property
    def stem(self) -> str:
        """The store's own name, without its suffix."""
        return PurePosixPath(self.name.rstrip("/")).stem

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def zarr(self, *, read_only: bool) -> Store:
        """The same as zarr sees it."""

    @abstractmethod
    def read(self, file: str) -> bytes:
        """A file's bytes; FileNotFoundError where there is none."""

    @abstractmethod
    def tail(self, file: str, count: int) -> bytes:
        """A file's last bytes; FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, file: str, content: bytes) -> None:
        """Put a file, whole or not at all, in the place of what was there."""

    @abstractmethod
    def delete(self, file: str) -> None:
        """Take a file away, where there is one."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file below a folder of the store with its size in bytes."""

    @abstractmethod
    def remove_temporary(self) -> None:
        """Delete what a killed process was in the middle of writing; the caller holds the store."""

    @abstractmethod
    def create(self, content: Mapping[str, bytes]) -> None:
        """Put a new store's first files, the manifest being the first, in the place of another."""

    @abstractmethod
    def check_writable(self) -> None:
        """Refuse a place that cannot be written to, before anything long is done for it."""

    @abstractmethod
    def locked(self) -> AbstractContextManager[None]:
        """The store is this process's to write.

        Raises:
            RichKDError: another process has it.
        """

    @property
    def token(self) -> str | None:
        """What tells the other processes of a job whose the store is; None where none is needed."""
        return None

    def follow(self, token: str | None) -> None:
        """Write as one of a job whose first process holds the store."""
        del token

    @abstractmethod
    def check_unlocked(self) -> None:
        """Refuse a store that another process is writing; makes nothing."""

    @abstractmethod
    def explained(self, do: str) -> AbstractContextManager[None]:
        """RichKDError for what befalls while something is done to the store, "read" or "write to".

        FileNotFoundError where a file is missing.
        """

    @abstractmethod
    def check_still_locked(self) -> None:
        """Refuse to go on where another process took the store over."""

    def map(self, function: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
        """A function of each file, in order, of several at a time where that is quicker."""
        if self.at_once == 1:
            yield from map(function, names)
            return
        with ThreadPoolExecutor(self.at_once) as pool:
            for start in range(0, len(names), self.at_once):  # no more than these in memory
                yield from pool.map(function, names[start : start + self.at_once])

    @property
    def exists(self) -> bool:
        """Whether a store, complete or not, is there."""
        try:
            self.tail(METADATA, 1)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @property
    def vacant(self) -> bool:
        """Whether nothing is there at all."""
        return not self.sizes()

    def explain(self, error: BaseException) -> str:
        """What befell a write, and what to do about it."""
        return f"{error}; make room or mend the disk"

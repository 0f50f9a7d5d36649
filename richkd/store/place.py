"""Where a store lies: in a folder, in object storage (bucket.py), or on a hub (hf.py).

A place holds the store's files by their names relative to it (`train/labels/c/0`); each is written
whole or not at all. Those of a folder are at hand; of the others, what is read is kept on this
disk (copy.py).
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from richkd import files
from richkd.errors import RichKDError, unknown

if TYPE_CHECKING:
    from zarr.abc.store import Store

METADATA = "zarr.json"
AT_ONCE = 16  # files under way from or to another machine
ATTEMPTS = 4  # to read what arrives cut short or damaged
# After errors of a server or the network: again and again, ever more slowly, for so long.
PATIENCE_S = 120.0
SCHEMES = ("s3", "gs", "az", "hf")

T = TypeVar("T")


class Place(ABC):
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
    def held(self) -> AbstractContextManager[None]:
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
    def check_not_held(self) -> None:
        """Refuse a store that another process is writing; makes nothing."""

    @abstractmethod
    def explained(self, do: str) -> AbstractContextManager[None]:
        """RichKDError for what befalls while something is done to the store, "read" or "write to".

        FileNotFoundError where a file is missing.
        """

    @abstractmethod
    def check_still_held(self) -> None:
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


def open_place(name: str | Path) -> Place:
    """The place that a path or a URL means.

    Raises:
        RichKDError: a URL of another kind, or without the package that reads it.
    """
    scheme, separator, rest = str(name).partition("://")
    if not separator:
        return Folder(Path(name))
    if scheme not in SCHEMES:
        raise unknown("kind of URL:", str(name), [f"{scheme}://" for scheme in SCHEMES])
    parts = rest.rstrip("/").split("/")
    if len(parts) < 2 or {"", ".", ".."} & {*parts} or set("#?%*\\") & {*rest}:
        raise RichKDError(f"{name}: give {scheme}://BUCKET/PATH.zarr, of plain names")
    if scheme == "hf":
        from richkd.store.hf import Hub

        return Hub(str(name))
    if find_spec("obstore") is None:
        raise RichKDError(
            f"{name}: stores in object storage need obstore: pip install 'richkd[cloud]'"
        )
    from richkd.store.bucket import Bucket

    return Bucket(str(name))


def first_line(error: BaseException) -> str:
    """Of what an error says, without what a server adds to it as XML."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].partition("<?xml")[0].strip().rstrip(":")


class Folder(Place):
    """A store on a disk."""

    durable = False
    at_once = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def zarr(self, *, read_only: bool) -> Store:
        """zarr's own store of files."""
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def read(self, file: str) -> bytes:
        """From the disk."""
        return (self.path / file).read_bytes()

    def tail(self, file: str, count: int) -> bytes:
        """Without reading the rest."""
        with (self.path / file).open("rb") as opened:
            end = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, end - count))
            return opened.read(count)

    def write(self, file: str, content: bytes) -> None:
        """Beside it first, then into its place."""
        with files.replacing(self.path / file) as temporary:
            temporary.write_bytes(content)

    def delete(self, file: str) -> None:
        """From the disk."""
        (self.path / file).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """By walking through the folder."""
        return {
            (file := Path(folder, name)).relative_to(self.path).as_posix(): file.stat().st_size
            for folder, _, names in os.walk(self.path / prefix)
            for name in names
        }

    def create(self, content: Mapping[str, bytes]) -> None:
        """Beside it first, so that there is never half of a store."""
        place = self.path.resolve()  # a link stays one
        unborn, gone = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
        for left in (unborn, gone):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for file, data in content.items():
            Folder(unborn).write(file, data)
        if place.exists():
            place.rename(gone)
        unborn.rename(place)
        shutil.rmtree(gone, ignore_errors=True)

    def remove_temporary(self) -> None:
        """By their names."""
        files.remove_temporary(self.path, deep=True)
        place = self.path.resolve()
        for word in ("new", "old"):
            shutil.rmtree(place.with_name(f".{place.name}.{word}"), ignore_errors=True)

    def check_writable(self) -> None:
        """As of every file that richkd writes."""
        files.check_writable(self.path)

    def held(self) -> AbstractContextManager[None]:
        """By a lock that dies with its process."""
        return files.held(self.path)

    def check_not_held(self) -> None:
        """Where a lock is there, whether somebody has it."""
        files.check_not_held(self.path)

    def check_still_held(self) -> None:
        """A lock on a disk is held until its process ends, but not where there is no flock."""
        files.check_still_held(self.path)

    def explained(self, do: str) -> AbstractContextManager[None]:
        """What befalls a disk says itself what it is."""
        return nullcontext()

    @property
    def vacant(self) -> bool:
        """A folder without a file is something."""
        return not self.path.exists()

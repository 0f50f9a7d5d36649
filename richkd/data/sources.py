"""Encoded images where they lie, by index.

A source is passed to data-loader workers, so it consists of arrays and opens files when asked.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, Self, overload

import numpy as np
from numpy.typing import NDArray

Which = slice | NDArray[np.generic]  # a slice, indices or a mask
Encoded = Path | BinaryIO  # a file to open, or an open one


class Source(Protocol):
    """N encoded images in some place."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages: where to find it."""

    def file(self, index: int) -> Encoded:
        """Return an encoded image."""

    def take(self, which: Which) -> Self:
        """Select images."""


class UncheckedSource(Source, Protocol):
    """Images of which some may be broken, and any may change."""

    @property
    def place(self) -> str:
        """Where all of them are, for messages."""

    @property
    def origin(self) -> str:
        """Where all of them are, whatever the current folder is."""

    def key(self, index: int) -> str:
        """Return what identifies an image wherever the dataset is."""

    def state(self) -> str:
        """Return a digest that changes whenever the place may have other images."""


def print_of(file: BinaryIO) -> int:
    """Return 64 bits of a hash of an encoded image.

    Of all of its bytes: many formats have no checksum, nor do all bits depend on those before.
    """
    file.seek(0)
    return int.from_bytes(hashlib.blake2b(file.read(), digest_size=8).digest(), "little")


@dataclass(frozen=True, eq=False)
class Paths(Sequence[str]):
    """Many paths in two arrays.

    Forked data-loader workers share the pages of arrays. Python strings would be copied page by
    page, as their reference counts change.
    """

    text: NDArray[np.uint8]  # UTF-8
    bounds: NDArray[np.int64]  # [N,2]: where each path begins and ends in the text

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """Pack paths, reading them one by one."""
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        limits = np.array(ends, np.int64)
        return cls(np.frombuffer(text, np.uint8), np.stack([limits[:-1], limits[1:]], axis=1))

    def take(self, which: Which) -> Paths:
        """Select paths by a slice, indices or a mask."""
        return Paths(self.text, self.bounds[which])

    def __len__(self) -> int:
        return len(self.bounds)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> str | Paths:
        if isinstance(index, slice):
            return self.take(index)
        begin, end = self.bounds[index]
        return self.text[begin:end].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class FolderFiles:
    """Files below a folder."""

    root: Path
    paths: Paths  # relative to root

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> str:
        """The folder, as the user names it."""
        return str(self.root)

    @property
    def origin(self) -> str:
        """The folder."""
        return str(self.root.resolve())

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.file(index))

    def key(self, index: int) -> str:
        """Return the path relative to the parent of the folder."""
        return f"{self.root.name}/{self.paths[index]}"

    def file(self, index: int) -> Path:
        """Return the path of an image."""
        return self.root / self.paths[index]

    def take(self, which: Which) -> FolderFiles:
        """Select files."""
        return replace(self, paths=self.paths.take(which))

    def state(self) -> str:
        """Return a digest of the paths, sizes and modification times of all files."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                found = os.stat(f"{self.root}/{path}")  # noqa: PTH116
            except OSError:  # a dangling link
                continue
            digest.update(
                f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def marks(self) -> Iterator[bytes]:
        """Yield the path and the size of each file, for a fingerprint."""
        for path in self.paths:
            size = (self.root / path).stat().st_size
            yield f"{path}\0{size}\0".encode(errors="surrogateescape")

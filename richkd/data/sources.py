"""Encoded images where they lie, by index.

A source is passed to data-loader workers, so it consists of arrays and opens files when asked.
"""

from __future__ import annotations

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

    def marks(self) -> Iterator[bytes]:
        """Yield what identifies each image in a fingerprint, without decoding it."""


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

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """Return the path of an image."""
        return self.root / self.paths[index]

    def take(self, which: Which) -> FolderFiles:
        """Select files."""
        return replace(self, paths=self.paths.take(which))

    def marks(self) -> Iterator[bytes]:
        """Yield the path and the size of each file."""
        for path in self.paths:
            size = (self.root / path).stat().st_size
            yield f"{path}\0{size}\0".encode(errors="surrogateescape")

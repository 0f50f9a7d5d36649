"""Kept pixels: photographs that stage one decoded, reduced and stored end to end in a cache.

Stage one decodes every photograph anyway. Reduced to what training needs, their pixels are read in
a fraction of the time that decoding takes. Each chunk of the array holds the pixels of some images
one after the other, uncompressed, so that one read returns an image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.data.datasets import ImageFiles
from richkd.data.decoding import Photograph
from richkd.data.entries import PixelsEntry
from richkd.data.sources import Which

CHUNK_BYTES = 32 * 2**20


def reduced_sizes(sizes: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """Return the sizes [N,2] of images whose shorter side is reduced to `side`.

    The longer side is rounded to whole pixels, halves up. Smaller images keep their size.
    """
    sizes = sizes.astype(np.int64)
    shorter = sizes.min(axis=1, keepdims=True)
    reduced = (2 * sizes * side + shorter) // (2 * shorter)
    return np.where(shorter <= side, sizes, reduced).astype(np.int32)


def reduced_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return the pixels [h·w·3] of an RGB image, reduced to (h, w) by Pillow's Lanczos filter."""
    height, width = size
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def num_bytes(pixel_sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the bytes [N] of the images of these sizes [N,2]."""
    counts: NDArray[np.int64] = 3 * pixel_sizes.astype(np.int64).prod(axis=1)
    return counts


def starts(pixel_sizes: NDArray[np.int32], images: int) -> NDArray[np.int64]:
    """Return where each image starts in its chunk of `images` images: [N]."""
    counts = num_bytes(pixel_sizes)
    ends = counts.cumsum()
    first = np.arange(len(counts)) // images * images
    within: NDArray[np.int64] = ends - counts - (ends - counts)[first]
    return within


def pixels_entry(sizes: Mapping[str, NDArray[np.int64]], side: int, block: int) -> PixelsEntry:
    """Choose how many images a chunk holds: about `CHUNK_BYTES`, and a divisor of `block`.

    Args:
        sizes: of the images of each split, [N,2].
        side: the shorter side of reduced images.
        block: samples per block, a whole number of chunks.
    """
    counts = {split: num_bytes(reduced_sizes(each, side)) for split, each in sizes.items()}
    fit = max(1, int(CHUNK_BYTES / np.concatenate([*counts.values()]).mean()))
    images = next(each for each in range(min(fit, block), 0, -1) if block % each == 0)
    largest = {
        split: int(np.add.reduceat(each, np.arange(0, len(each), images)).max())
        for split, each in counts.items()
    }
    return {"side": side, "images": images, "bytes": largest}


@dataclass(frozen=True)
class Reducer:
    """Reduces opened photographs to the size in which they are kept; data-loader workers call it.

    Args:
        sizes: height and width of each image, as its file's header states: [N,2].
        side: the shorter side of reduced images.
        name: returns the name of an image for messages.
    """

    sizes: NDArray[np.int64]
    side: int
    name: Callable[[int], str]

    @property
    def image_bytes(self) -> int:
        """The bytes of the largest image."""
        return int(num_bytes(reduced_sizes(self.sizes, self.side)).max())

    def __call__(self, index: int, image: Image.Image) -> Tensor:
        """Return the kept pixels [n] of an image.

        Raises:
            RichKDError: the image has another size than before.
        """
        size = self.sizes[index]
        if (image.height, image.width) != tuple(size):
            raise RichKDError(
                f"{self.name(index)} is {image.width}×{image.height} pixels, but was {size[1]}×"
                f"{size[0]} when the dataset was first read; restore the file, or write the cache "
                f"again with richkd precompute --overwrite",
                code="image-changed",
            )
        height, width = reduced_sizes(size[None], self.side)[0].tolist()
        return reduced_pixels(image, (height, width))


class Packer:
    """Packs the kept pixels of a split into chunks, as they arrive.

    Args:
        entry: of the manifest.
        split: its name.
        sizes: of its images, [N,2].
        name: returns the name of an image for messages.
        wanted: the first images of the chunks to pack; others are dropped.
    """

    def __init__(
        self,
        entry: PixelsEntry,
        split: str,
        sizes: NDArray[np.int64],
        name: Callable[[int], str],
        wanted: Collection[int],
    ) -> None:
        self.reduce = Reducer(sizes, entry["side"], name)
        self._images, self._bytes = entry["images"], entry["bytes"][split]
        pixel_sizes = reduced_sizes(sizes, entry["side"])
        self._counts = num_bytes(pixel_sizes)
        self._starts = starts(pixel_sizes, self._images)
        self._wanted = wanted
        self._open: dict[int, Tensor] = {}
        self._full: list[tuple[int, Tensor]] = []

    def add(self, index: Tensor, pixels: Tensor) -> None:
        """Add the next images, given their indices [b] and pixels, end to end [n]."""
        numbers = index.tolist()
        parts = torch.split(pixels, self._counts[numbers].tolist())
        for number, part in zip(numbers, parts, strict=True):
            chunk = number // self._images * self._images
            if chunk not in self._wanted:
                continue
            if chunk not in self._open:
                self._open[chunk] = torch.zeros(self._bytes, dtype=torch.uint8)
            start = int(self._starts[number])
            self._open[chunk][start : start + len(part)] = part
            if number + 1 in (len(self._counts), chunk + self._images):
                self._full.append((chunk, self._open.pop(chunk)))

    def finished(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first image and the bytes of each chunk that has become full."""
        full, self._full = self._full, []
        yield from full


@dataclass(frozen=True, eq=False)
class KeptPixels:
    """The kept pixels of a split, in the chunk files of a cache on this disk.

    An image is read from its chunk's file by one call. Nothing is mapped or held, so the memory of
    data-loader workers stays small, and the system's page cache serves what is read repeatedly.
    """

    folder: Path  # of the chunks
    where: str  # the array, for messages
    images: int  # per chunk
    starts: NDArray[np.int64]  # [N], in the chunk
    pixel_sizes: NDArray[np.int32]  # [N,2]
    sizes: NDArray[np.int32]  # [N,2], of the whole photographs
    numbers: NDArray[np.int64]  # [n], the selected ones

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def place(self) -> str:
        """The array of the cache."""
        return self.where

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return f"image {self.key(index)} of {self.where}"

    def key(self, index: int) -> str:
        """Return the number of an image in its split."""
        return str(self.numbers[index])

    def file(self, index: int) -> Path:
        """Return the file of the image's chunk."""
        return self.folder / str(self.numbers[index] // self.images) / "0"

    def take(self, which: Which) -> KeptPixels:
        """Select images."""
        return replace(self, numbers=self.numbers[which])

    def state(self) -> str:
        """Return the array: the cache's own checksums tell whether it is another one."""
        return self.where

    def photograph(self, index: int) -> Photograph:
        """Read an image.

        Raises:
            RichKDError: it is not there any more.
        """
        number = self.numbers[index]
        (height, width), size = self.pixel_sizes[number].tolist(), self.sizes[number].tolist()
        count = 3 * height * width
        try:
            with self.file(index).open("rb", buffering=0) as file:
                file.seek(int(self.starts[number]))
                content = file.read(count)
        except OSError:
            content = b""
        if len(content or b"") != count:
            raise RichKDError(
                f"{self.file(index)} is missing or truncated; fix the cache with richkd repair",
                code="cache-damaged",
            )
        image = Image.frombuffer("RGB", (width, height), content, "raw", "RGB", 0, 1)
        return Photograph(image, (size[0], size[1]), (height / size[0], width / size[1]))


@dataclass(frozen=True)
class KeptImages(ImageFiles):
    """Photographs that are read from kept pixels, without decoding."""

    source: KeptPixels

    def photograph(self, index: int, most: float = 1.0) -> Photograph:
        """Read an image as it is kept."""
        return self.source.photograph(index)

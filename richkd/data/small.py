"""Small images in files: which of them are not photographs, and how they become an array.

A central crop removes what surrounds the object in a photograph; CIFAR's images as PNG files have
no surroundings, and a random crop of a tenth of 32×32 pixels shows little. So images of one small
size are taken whole, with the views of CIFAR's, and are decoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.config.catalog import SMALL
from richkd.config.settings import LEAST_SIDE, Images
from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.memory import available_memory, spans
from richkd.core.progress import Report, size
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.folders import suggest_image_size
from richkd.data.views import PadCropFlip, ResizedCropFlip

MOST_BYTES = 8 * 2**30  # of an array that was not asked for
STRAYS = 0.1  # share of the images up to which those of another size are worth a mention


class Listed(Protocol):
    """The images of a split, as far as they are known before any is decoded."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width when upright [N,2]."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""


class Files(Listed, Protocol):
    """Images that are decoded one by one."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Read an image as RGB; called by several threads."""


@dataclass(frozen=True)
class Treatment:
    """How images in files are treated."""

    whole: bool  # as an array, with the views of CIFAR's; else as photographs
    image_size: int
    note: str  # for the user


def treatment(settings: Images, splits: Sequence[Listed]) -> Treatment:
    """Choose how images in files are treated.

    They are taken whole if `view_space` says so; by default, if all of them have one size that is
    square, at most `SMALL` pixels a side, and the image size that is asked for, if any.

    Args:
        settings: the view space and the image size, as far as they are given.
        splits: all images, training images first.

    Raises:
        RichKDError: pad-crop-flip is asked for, but the images do not have one square size.
    """
    asked, side = settings.view_space, int(splits[0].sizes[0, 0])
    if asked == PadCropFlip.name:
        if fault := _fault(settings, splits):
            raise RichKDError(
                f"view_space = {asked!r}: {fault}; resize the images to one square size, or use "
                f"--view-space {ResizedCropFlip.name}",
                code="view-space-sizes",
            )
        return _whole(side)
    change = f"--view-space {PadCropFlip.name} takes images of one square size whole"
    if asked == ResizedCropFlip.name or np.median(splits[0].sizes) > SMALL:
        return _photographs(settings, splits, change)
    if fault := _fault(settings, splits):
        return _photographs(settings, splits, f"{fault}; {change}")
    if (wanted := _bytes(splits)) > MOST_BYTES:
        fault = f"an array of all images would take {size(wanted)}"
        return _photographs(settings, splits, f"{fault}; {change}")
    return _whole(side)


def _whole(side: int) -> Treatment:
    return Treatment(
        True,
        side,
        f"all images have {side}×{side} pixels: they are taken whole, views shift and flip them, "
        f"and the cache contains them (--view-space {ResizedCropFlip.name} treats them as "
        f"photographs)",
    )


def _photographs(settings: Images, splits: Sequence[Listed], reason: str) -> Treatment:
    side = settings.image_size or suggest_image_size(splits[0].sizes)
    return Treatment(
        False,
        side,
        f"images are treated as photographs: views are random crops, tests see the central "
        f"{100 * CLEAN_SHARE:g} %, resized to {side}×{side} ({reason})",
    )


def _fault(settings: Images, splits: Sequence[Listed]) -> str:
    """Return why images cannot be taken whole; empty if they can."""
    first = splits[0].sizes[0]
    height, width = map(int, first)
    if any((each.sizes != first).any() for each in splits):
        return _describe_sizes(splits)
    if height != width:
        return f"all images have {width}×{height} pixels, which is not square"
    if height < LEAST_SIDE:
        return f"all images have {width}×{height} pixels, and {LEAST_SIDE} a side are needed"
    if settings.image_size not in (None, height):
        return f"all images have {width}×{height} pixels, but image_size = {settings.image_size}"
    return ""


def _describe_sizes(splits: Sequence[Listed]) -> str:
    """Describe images of several sizes, and name the first that differs if few of them do."""
    kinds, counts = np.unique(
        np.concatenate([each.sizes for each in splits]), axis=0, return_counts=True
    )
    usual, others = kinds[counts.argmax()], int(counts.sum() - counts.max())
    if others > STRAYS * counts.sum():
        return f"images have {len(kinds):,} sizes"
    split, odd = next(
        (each, int(np.flatnonzero(differs)[0]))
        for each in splits
        if (differs := (each.sizes != usual).any(1)).any()
    )
    more = f" (and {others - 1:,} more)" if others > 1 else ""
    return (
        f"{split.name(odd)}{more} has {split.sizes[odd, 1]}×{split.sizes[odd, 0]} pixels, all "
        f"others {usual[1]}×{usual[0]}"
    )


def _bytes(splits: Sequence[Listed]) -> int:
    """Return the bytes of the decoded images of all splits."""
    return 3 * sum(int(each.sizes.prod(1).sum()) for each in splits)


def check_memory(splits: Sequence[Listed], free: int | None = None) -> None:
    """Raise RichKDError if the decoded images of all splits take more than the free memory."""
    wanted, free = _bytes(splits), available_memory() if free is None else free
    if wanted > free:
        raise RichKDError(
            f"the decoded images take {size(wanted)}, and {size(free)} of memory are available; "
            f"use fewer images (--limit), or --view-space {ResizedCropFlip.name}, which reads "
            f"files when they are needed",
            code="images-beyond-memory",
        )


def decode(files: Files, report: Report, what: str = "images") -> Tensor:
    """Decode images of one size, in threads: [N,H,W,3] uint8.

    Args:
        files: the images.
        report: shows the progress.
        what: names the images there.

    Raises:
        RichKDError: an image can no longer be read, or has another size now.
    """
    height, width = map(int, files.sizes[0])
    images = np.empty((len(files), height, width, 3), np.uint8)

    def fill(index: int) -> None:
        pixels = np.asarray(files.open(index))
        if pixels.shape != images.shape[1:]:
            raise RichKDError(
                f"{files.name(index)} has {pixels.shape[1]}×{pixels.shape[0]} pixels, and had "
                f"{width}×{height} a moment ago; run the same command again",
                code="image-changed",
            )
        images[index] = pixels

    with (
        threads(usable_cpus()) as pool,
        report.track(f"decoding the {what}", len(files), "images") as tick,
    ):
        for span in spans(len(files)):
            for _ in pool.map(fill, range(span.start, span.stop)):
                tick(1)
    return torch.from_numpy(images)

"""List the images of one split of an image folder, with the properties of their files.

Which files are images is decided in `walk`, which folder is which split in `layouts`, and what the
classes are called in `class_names`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import decoding
from richkd.data.decoding import SUFFIXES
from richkd.data.scans import Listing, Look, check_images, even_order
from richkd.data.sources import FolderFiles, Paths
from richkd.data.walk import Kind, Tally, Walk

# Read by versions whose caches do not name the folders of the splits.
EARLIER_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
}


@dataclass(frozen=True)
class Found:
    """The files of one split that are images by their names, the classes evenly mixed."""

    folder: Path
    classes: tuple[str, ...]  # names of the class folders
    paths: Paths  # relative to folder
    labels: NDArray[np.int64]  # [N]
    tally: Tally  # what else was found
    real: Mapping[tuple[int, int], str]  # as in `Walk`
    empty: Mapping[str, str]  # classes without images, and what their folders contain instead

    @property
    def fault(self) -> str | None:
        """What is wrong with the folder, and the remedy; None if every class has images."""
        if not self.classes:
            beside = self.tally.counts[Kind.BESIDE]
            images = f"{beside:,} images but " if beside else ""
            return f"{self.folder} contains {images}no class folders; {self.sorting_remedy}"
        if self.empty:
            name, contents = next(iter(self.empty.items()))
            more = f" (nor do {len(self.empty) - 1} more)" if len(self.empty) > 1 else ""
            return (
                f"the class folder {self.folder}/{name} contains no images{more}; add some, or "
                f"remove the folder{contents and f' ({contents})'}"
            )
        return None

    @property
    def sorting_remedy(self) -> str:
        """How to sort the images into class folders."""
        hint = ""
        if (self.folder / "val_annotations.txt").is_file():
            hint = " (val_annotations.txt lists the class of each image)"
        elif any("ILSVRC2012_val_" in path for path in self.tally.paths[Kind.BESIDE]):
            hint = " (for ImageNet, the script valprep.sh does that)"
        return f"move each image into the folder of its class, {self.folder}/CLASS/image.jpg{hint}"


def list_images(
    folder: Path,
    broken: str,
    known: Collection[str] | None = None,
    report: Report | None = None,
    found: Found | None = None,
    remedy: str = "",
    look: Look = decoding.look,
) -> Listing:
    """List the images of a folder of class folders.

    Args:
        folder: has a folder for each class.
        broken: what to do with files that cannot be fully decoded: refuse or skip.
        known: the files that an earlier listing skipped; with these, only headers are read.
        report: shows the progress.
        found: the result of `find_images`, if it is known already.
        remedy: the remedy for a refused file; stage one's by default.
        look: reads the properties of a file.

    Raises:
        RichKDError: there are no classes, a class has no images, or a broken file is refused.
    """
    found = found or find_images(folder)
    if found.fault is not None:
        raise RichKDError(found.fault, code="folder-classes")
    source = FolderFiles(folder, found.paths)
    listing = check_images(source, found.labels, broken, known, report, remedy, look)
    lacking = np.setdiff1d(np.arange(len(found.classes)), listing.labels)
    if len(lacking):
        raise RichKDError(
            f"no image in the class folder {folder / found.classes[lacking[0]]} can be read; add "
            f"intact images, or remove the folder from every split",
            code="class-without-images",
        )
    return listing


def find_images(folder: Path, *, earlier: bool = False) -> Found:
    """Find the classes of a folder, and its image files with their labels.

    Every prefix of the order has about as many images of each class, so that --limit N does not
    select the first classes only.

    Args:
        folder: has a folder for each class.
        earlier: find what earlier versions did: files of fewer formats, and hidden ones.

    Raises:
        RichKDError: a folder cannot be read, or two class folders are the same folder.
    """
    walk = Walk(folder, EARLIER_SUFFIXES if earlier else SUFFIXES, with_hidden=earlier)
    counts = np.zeros(len(walk.classes), np.int64)
    empty: dict[str, str] = {}

    def in_classes() -> Iterator[str]:
        """Yield the paths class by class; lists of all of them would be much larger."""
        for number, name in enumerate(walk.classes):
            own = Tally()
            for path in walk.images(name, own):
                counts[number] += 1
                yield path
            if not counts[number]:
                empty[name] = "; ".join(own.lines())
            walk.tally.merge(own)

    paths = Paths.of(in_classes())
    labels = np.repeat(np.arange(len(counts)), counts)
    order = even_order(labels)
    return Found(
        folder=folder,
        classes=tuple(walk.classes),
        paths=paths.take(order),
        labels=labels[order],
        tally=walk.tally,
        real=walk.real,
        empty=empty,
    )


def suggest_image_size(sizes: NDArray[np.int64]) -> int:
    """Return the largest usual side that three quarters of the images have at least, else 32."""
    shorter = np.quantile(sizes.min(1), 0.25)
    return next((side for side in (224, 160, 128, 96, 64, 48) if shorter >= side), 32)

"""What a dataset of encoded images contains: usable images and labels by split, and classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import folders, layouts
from richkd.data.class_names import ClassNames, choose_names
from richkd.data.layouts import Layout
from richkd.data.scans import Listing, check_images, even_order
from richkd.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The images of a dataset, checked but still encoded."""

    listings: Mapping[str, Listing]  # by split
    classes: tuple[str, ...]  # as the dataset names them
    named: ClassNames  # natural names of the classes
    folders: Mapping[str, str] = field(default_factory=dict)  # the dataset's own names of splits
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table: image and label
    notes: tuple[str, ...] = ()  # how it was read, line by line


def check_validation(settings: Images, found: Mapping[str, object], place: object) -> None:
    """Raise RichKDError if validation images are asked for and there already."""
    if settings.validation and "validation" in found:
        raise RichKDError(
            f"validation = {settings.validation:g}: {place} already has validation images; omit "
            f"--validation, or move them away",
            code="validation-and-folder",
        )


def list_splits(
    settings: Images,
    sources: Mapping[str, Source],
    labels: Mapping[str, NDArray[np.int64]],
    classes: Sequence[str],
    skipped: Collection[str] | None,
    report: Report,
) -> dict[str, Listing]:
    """Return the usable images of each split, the classes evenly mixed.

    Args:
        settings: what to do with broken images.
        sources: the images by split.
        labels: [N] by split.
        classes: all of them.
        skipped: the keys of images that stage one left out; None to decode every image once.
        report: shows the progress.

    Raises:
        RichKDError: an image is broken, or all training images of a class are.
    """
    found = {}
    for split, source in sources.items():
        order = even_order(labels[split])
        mixed = labels[split][order]
        found[split] = check_images(source.take(order), mixed, settings.broken, skipped, report)
        lacking = np.setdiff1d(mixed, found[split].labels)
        if len(lacking):
            raise RichKDError(
                f"{source.place}: no image of the class {classes[lacking[0]]} can be read; restore "
                f"them, or remove the class from every split",
                code="class-without-images",
            )
    return found


def of_folder(
    settings: Images,
    path: Path,
    layout: Layout | None,
    skipped: Collection[str] | None,
    report: Report,
) -> Contents:
    """Return the contents of an image folder.

    Args:
        settings: which images.
        path: the folder.
        layout: the folders of the splits, from a cache; None to find them.
        skipped: the files that stage one left out; None to decode every file once.
        report: shows the progress.

    Raises:
        RichKDError: as `layouts.find_splits` and `folders.list_images`.
    """
    if not path.is_dir():
        raise RichKDError(
            f"imagefolder:{path}: no such folder; check the path", code="dataset-folder-missing"
        )
    found, notes = layouts.find_splits(path, layout)
    check_validation(settings, found, found["validation"].folder if "validation" in found else path)
    classes = found["train"].classes
    named = choose_names(settings.class_names, classes)
    listings = {
        split: folders.list_images(each.folder, settings.broken, skipped, report, each)
        for split, each in found.items()
    }
    earlier = layout is not None and layout.earlier
    return Contents(
        listings=listings,
        classes=classes,
        named=named,
        folders={} if earlier else {split: each.folder.name for split, each in found.items()},
        notes=(*notes, *named.notes),
    )

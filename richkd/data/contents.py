"""What a dataset of encoded images contains: usable images and labels by split, and classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import folders, layouts
from richkd.data.class_names import ClassNames, choose_names
from richkd.data.layouts import Layout
from richkd.data.scans import Listing


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The images of a dataset, checked but still encoded."""

    listings: Mapping[str, Listing]  # by split
    classes: tuple[str, ...]  # as the dataset names them
    named: ClassNames  # natural names of the classes
    folders: Mapping[str, str] = field(default_factory=dict)  # the dataset's own names of splits
    notes: tuple[str, ...] = ()  # how it was read, line by line


def check_validation(settings: Images, found: Mapping[str, object], place: object) -> None:
    """Raise RichKDError if validation images are asked for and there already."""
    if settings.validation and "validation" in found:
        raise RichKDError(
            f"validation = {settings.validation:g}: {place} already has validation images; omit "
            f"--validation, or move them away",
            code="validation-and-folder",
        )


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

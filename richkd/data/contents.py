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
from richkd.data.class_names import ClassNames, choose_names, count_names, read_class_names
from richkd.data.labels import Raw, describe_roles, drop_unlabelled, number_classes
from richkd.data.layouts import Layout
from richkd.data.scans import Listing, check_images, even_order
from richkd.data.sources import UncheckedSource


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


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What a dataset that names its splits and labels is made of: a table, or shards."""

    place: str  # for messages
    splits: Mapping[str, str]  # the dataset's own names, by split
    labels: Mapping[str, Raw]  # by the dataset's own name, as are the sources
    sources: Mapping[str, UncheckedSource]
    classes: Sequence[str] = ()  # in the order of their numbers, if it names them
    columns: Mapping[str, str]
    notes: Sequence[str]
    class_file: Path | None = None  # of names


def of_labelled(
    settings: Images,
    own: Labelled,
    layout: Layout | None,
    skipped: Collection[str] | None,
    report: Report,
) -> Contents:
    """Return the contents of a dataset that names its splits and labels.

    Args:
        settings: which images.
        own: the dataset.
        layout: the splits that a cache was made from, which are taken as they are.
        skipped: the keys of images that stage one left out; None to decode every image once.
        report: shows the progress.

    Raises:
        RichKDError: an image or a label is invalid.
    """
    splits, notes = dict(own.splits), [*own.notes]
    if layout is None:
        splits, dropped = drop_unlabelled(splits, own.labels)
        notes = [describe_roles(splits, own.place), *notes, *dropped]
    check_validation(settings, splits, own.place)
    file = Path(settings.class_names) if settings.class_names else own.class_file
    numbered = [] if own.classes or file is None else _numbered_classes(file, own)
    labels, classes, more = number_classes(
        {split: own.labels[name] for split, name in splits.items()},
        own.classes or numbered,
        own.place,
        lambda split, number: own.sources[splits[split]].name(number),
        str(file) if numbered else "",
    )
    if own.class_file is not None and not settings.class_names:
        named = read_class_names(own.class_file, classes)
        more.append(f"the classes are named by {own.class_file}")
    else:
        named = choose_names(settings.class_names, classes, synonyms=True)
    return Contents(
        listings={
            split: _list_split(settings, own.sources[name], labels[split], classes, skipped, report)
            for split, name in splits.items()
        },
        classes=classes,
        named=named,
        folders=splits,
        columns=own.columns,
        notes=(*notes, *more, *named.notes),
    )


def _numbered_classes(file: Path, own: Labelled) -> list[str]:
    """Return the numbers of the classes that a file of names lists, if labels are such numbers."""
    values = {value for raw in own.labels.values() for value in raw.values}
    if not all(isinstance(value, int) for value in values):
        return []
    return [*map(str, range(count_names(file, [*map(str, sorted(values, key=int))])))]


def _list_split(
    settings: Images,
    source: UncheckedSource,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    skipped: Collection[str] | None,
    report: Report,
) -> Listing:
    """Return the usable images of a split, the classes evenly mixed."""
    order = even_order(labels)
    listing = check_images(source.take(order), labels[order], settings.broken, skipped, report)
    lacking = np.setdiff1d(labels, listing.labels)
    if len(lacking):
        raise RichKDError(
            f"{source.place}: no image of the class {classes[lacking[0]]} can be read; restore "
            f"them, or remove the class from every split",
            code="class-without-images",
        )
    return listing


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

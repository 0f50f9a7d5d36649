"""Splits and classes of datasets that name both: tables, and shards of samples.

Class folders need none of this: they are the classes, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from richkd.core.errors import RichKDError, nearest
from richkd.data.layouts import NAMES, Layout
from richkd.data.walk import listed

Value = int | str
NameOf = Callable[[str, int], str]  # the name of an image, by its split and number


@dataclass(frozen=True)
class Raw:
    """The labels of a split as the dataset has them."""

    values: tuple[Value, ...]  # different ones
    codes: NDArray[np.int64]  # [N], positions in values; -1 for no label

    @classmethod
    def of(cls, values: Sequence[Value | None], codes: NDArray[np.int64]) -> Raw:
        """Make labels of values and positions; None, and -1 as a value, mean no label."""
        kept = [number for number, value in enumerate(values) if value not in (None, -1)]
        place = np.full(len(values) + 1, -1, np.int64)  # its last one is that of no label
        place[kept] = np.arange(len(kept))
        return cls(tuple(values[number] for number in kept), place[codes])  # type: ignore[misc]


def choose_splits(
    known: Collection[str], train: str, place: str, no_train: str, no_test: str
) -> tuple[dict[str, str], list[str]]:
    """Choose the splits to train, validate and test on, and return them with notes for the user.

    As with folders, validation images are tested on if there are no test images.

    Args:
        known: names of the splits.
        train: the name of the training split, if the user gives it.
        place: the dataset, for messages.
        no_train: what to do if there is no split to train on.
        no_test: what to do if there is no split to test on.

    Raises:
        RichKDError: there is no split to train on, or none to test on.
    """
    if train and train not in known:
        raise RichKDError(
            f"{place} has no split {train!r}, {nearest(train, known)}", code="split-missing"
        )
    found = {"train": train} if train else {}
    for split, words in NAMES.items():
        free = [name for name in known if name not in found.values()]
        matches = [name for word in words for name in free if name.lower() == word]
        if matches:
            found.setdefault(split, matches[0])
    if "train" not in found:
        raise RichKDError(
            f"{place} has no split called train, only {listed([*known])}; {no_train}",
            code="split-missing",
        )
    if len(found) == 1:
        raise RichKDError(
            f"{place} has only the split {found['train']} to train on, and none to test on "
            f"(validation or test); {no_test}",
            code="split-missing",
        )
    if "test" not in found:
        found["test"] = found.pop("validation")
    rest = [name for name in known if name not in found.values()]
    return found, [f"of {place}, {listed(rest)} is not used"] if rest else []


def kept_splits(known: Collection[str], layout: Layout, place: str) -> dict[str, str]:
    """Return the splits that a cache was made from.

    Raises:
        RichKDError: one is missing.
    """
    for name in layout.folders.values():
        if name not in known:
            raise RichKDError(
                f"{place} no longer has the split {name}, from which the cache was made; restore "
                f"it, or run richkd precompute again",
                code="dataset-folder-gone",
            )
    return dict(layout.folders)


def describe_roles(found: Mapping[str, str], place: str) -> str:
    """Describe what each split is used for."""
    purposes = {"train": "training", "validation": "validation", "test": "testing"}
    uses = ", ".join(f"{found[one]} for {what}" for one, what in purposes.items() if one in found)
    no_test = found["test"].lower() in NAMES["validation"]
    note = " (there are no separate test images)" if no_test else ""
    return f"using the splits of {place}: {uses}{note}"


def drop_unlabelled(
    splits: Mapping[str, str], labels: Mapping[str, Raw]
) -> tuple[dict[str, str], list[str]]:
    """Drop a split without any label, e.g. of a challenge, if another is left to test on.

    Args:
        splits: the dataset's own names, by split.
        labels: by the dataset's own name.
    """
    kept, notes = dict(splits), []
    for split in ("validation", "test"):
        if "validation" in kept and not labels[kept[split]].values:
            notes.append(f"the split {kept[split]} is not used: its images have no labels")
            del kept[split]
            if split == "test":
                kept["test"] = kept.pop("validation")
    return kept, notes


def number_classes(
    labels: Mapping[str, Raw],
    names: Sequence[str],
    place: str,
    name_of: NameOf,
    named_by: str = "",
) -> tuple[dict[str, NDArray[np.int64]], tuple[str, ...], list[str]]:
    """Return class numbers [N] by split, the classes, and notes for the user.

    Args:
        labels: by split.
        names: of the classes in the order of their numbers; empty if the dataset has none. Then the
            classes are what the training images have, in ascending order.
        place: where the labels are, for messages.
        name_of: names an image.
        named_by: what names the classes, for messages.

    Raises:
        RichKDError: an image has no label or one that is no class, or there is only one class.
    """
    notes = []
    if names:
        numbers: dict[Value, int] = {number: number for number in range(len(names))}
        classes, known = (
            tuple(names),
            f"0..{len(names) - 1}{named_by and f', the names in {named_by}'}",
        )
    else:
        valid = (v for v in labels["train"].values if isinstance(v, str) or v >= 0)
        ordered = sorted(valid, key=lambda value: (isinstance(value, str), value))
        numbers = {value: number for number, value in enumerate(ordered)}
        classes, known = tuple(map(str, ordered)), "one of the training images, from 0"
        order = "alphabetical" if any(isinstance(value, str) for value in ordered) else "numerical"
        notes.append(
            f"{place} does not name its classes: they are its {len(classes):,} different labels in "
            f"{order} order, {listed(classes)}"
        )
    found = {split: _numbered(raw, numbers) for split, raw in labels.items()}
    for split, own in found.items():
        wrong = np.flatnonzero(own < 0)
        if len(wrong):
            raw, first = labels[split], int(wrong[0])
            fault = "no label"
            if raw.codes[first] >= 0:
                label = raw.values[raw.codes[first]]
                fault = f"the label {label!r}, which is not {known}"
            more = f" (nor have {len(wrong) - 1:,} more a valid one)" if len(wrong) > 1 else ""
            raise RichKDError(
                f"{name_of(split, first)} has {fault}{more}; correct it, or remove such images",
                code="labels-invalid",
            )
    if len(classes) < 2:
        raise RichKDError(
            f"the training images of {place} have only the label {listed(classes) or '–'}; at "
            f"least two classes are needed",
            code="folder-one-class",
        )
    empty = np.setdiff1d(np.arange(len(classes)), found["train"])
    if len(empty):
        some = [classes[number] for number in empty[:4]]
        notes.append(f"there are no training images of {listed(some, len(empty))}")
    return found, classes, notes


def _numbered(raw: Raw, numbers: Mapping[Value, int]) -> NDArray[np.int64]:
    """Return the class numbers [N] of labels; -1 for those that are missing or no class."""
    own = np.array([numbers.get(value, -1) for value in raw.values] + [-1], np.int64)
    return own[raw.codes]

"""Find the splits of an image folder: PATH/train/CLASS/*, PATH/val/CLASS/*, PATH/test/CLASS/*.

A validation folder holds validation images if there is a test folder too; otherwise it is the test
split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from richkd.core.errors import RichKDError
from richkd.data.folders import Found, find_images
from richkd.data.walk import Tally, is_hidden, listed

# Names of the folder of each split, in any case; the first that exists is used.
NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_PURPOSES = {"train": "training", "validation": "validation", "test": "testing"}


@dataclass(frozen=True)
class Layout:
    """The folder of each split, by its name in PATH."""

    folders: Mapping[str, str]
    earlier: bool = False  # read as earlier versions did, whose caches do not name these folders
    notes: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table, which has no folders


def earlier_layout(path: Path) -> Layout:
    """Return the layout of a cache that does not name its folders."""
    test = next((name for name in ("val", "test") if (path / name).is_dir()), "val")
    return Layout({"train": "train", "test": test}, earlier=True)


def find_layout(path: Path) -> Layout:
    """Find the folders of the splits; a validation folder without a test folder is the test split.

    Raises:
        RichKDError: there is no training folder or no other one, or names differ only in case.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    except OSError as error:
        raise RichKDError(
            f"cannot read the folder {path} ({error.strerror}); make it readable",
            code="folder-unreadable",
        ) from None
    folders, notes = {}, []
    for split, known in NAMES.items():
        found = [name for word in known for name in names if name.lower() == word]
        exact = [name for name in found if name in known]
        if len(found) > 1 and not exact:
            raise RichKDError(
                f"{path} has several folders that may hold its {split} images ({listed(found)}); "
                f"rename the right one to {known[0]}, or move the others away",
                code="split-ambiguous",
            )
        if found:
            folders[split] = (exact or found)[0]
        if len(found) > 1:
            notes.append(
                f"of {listed(found)} in {path}, only {folders[split]} is used; to use another, "
                f"move {folders[split]} away"
            )
    if "train" not in folders or len(folders) == 1:
        raise RichKDError(
            f"imagefolder:{path} {_remedy(path, names, 'train' in folders)}", code="folder-layout"
        )
    if "test" not in folders:
        folders["test"] = folders.pop("validation")
    return Layout(folders, notes=tuple(notes))


def _remedy(path: Path, names: list[str], has_train: bool) -> str:
    """Describe what is missing from a folder without a layout, and the remedy."""
    classes = [name for name in names if not is_hidden(name)]
    contents = f"it has the folders {listed(classes)}" if classes else "it has no folders"
    needs = (
        f"needs the layout {path}/train/CLASS/image.jpg and {path}/val/CLASS/image.jpg (val may "
        f"also be called valid, validation, dev or test)"
    )
    below = [path / name for name in classes if _has_layout(path / name)]
    if not has_train and below:
        return f"{needs}; {below[0]} has it: use --dataset imagefolder:{below[0]}"
    if _has_layout(path.absolute().parent) and path.name.lower() in sum(NAMES.values(), ()):
        return f"{needs}; give the folder that contains {path} instead"
    if has_train:
        return f"{needs}; {contents}: rename the folder of test images to test"
    return f"{needs}; {contents}: move the class folders into folders train and val"


def _has_layout(path: Path) -> bool:
    try:
        names = {entry.name.lower() for entry in path.iterdir() if entry.is_dir()}
    except OSError:
        return False
    return not names.isdisjoint(NAMES["train"]) and not names.isdisjoint(
        NAMES["validation"] + NAMES["test"]
    )


def find_splits(path: Path, layout: Layout | None) -> tuple[dict[str, Found], list[str]]:
    """Find the images of each split, and return them with notes for the user.

    Args:
        path: the image folder.
        layout: from a cache; None to find it.

    Raises:
        RichKDError: there is no layout, images are not in class folders, there are fewer than two
            classes, or the splits have different classes.
    """
    from_cache = layout is not None
    layout = layout or find_layout(path)
    missing = [name for name in layout.folders.values() if not (path / name).is_dir()]
    if missing:
        raise RichKDError(
            f"the folder {path / missing[0]}, from which the cache was made, is missing; restore "
            f"it, or run richkd precompute again",
            code="dataset-folder-gone",
        )
    found = {
        split: find_images(path / name, earlier=layout.earlier)
        for split, name in layout.folders.items()
    }
    notes = [*layout.notes]
    if not from_cache:
        notes += _drop_unlabelled(found)
        _check_number(found["train"])
    for split in found.values():
        _check_classes(split, found["train"])
    return found, [_describe(found), *notes, *_shared(found), *_rest(found)]


def _drop_unlabelled(found: dict[str, Found]) -> Iterator[str]:
    """Drop a split without class folders, e.g. of a challenge, if another is left to test on."""
    for split in ("validation", "test"):
        if "validation" in found and not _has_classes(found[split], found["train"]):
            unlabelled = found.pop(split)
            if split == "test":
                found["test"] = found.pop("validation")
            yield (
                f"{unlabelled.folder} is not used: it has no class folders, so its images have no "
                f"labels; to use it, {unlabelled.sorting_remedy}"
            )


def _has_classes(split: Found, train: Found) -> bool:
    """Return whether a split has class folders; a single folder of another name is not one."""
    return len(split.classes) > 1 or not {*train.classes}.isdisjoint(split.classes)


def _check_number(train: Found) -> None:
    """Raise RichKDError if there is only one class: every teacher would always be right."""
    if train.fault is None and len(train.classes) == 1:
        below = sorted({path.split("/")[1] for path in train.paths if path.count("/") > 1})
        nested = (
            f"; if the folders in it ({listed(below)}) are the classes, move them up into "
            f"{train.folder}"
            if below
            else ""
        )
        raise RichKDError(
            f"{train.folder} has only one class folder, {train.classes[0]}; at least two classes "
            f"are needed, each in its own folder {train.folder}/CLASS/image.jpg{nested}",
            code="folder-one-class",
        )


def _check_classes(split: Found, train: Found) -> None:
    """Raise RichKDError if a split has a fault, or other classes than the training images."""
    if split.fault is not None:
        raise RichKDError(split.fault, code="folder-classes")
    if split.classes == train.classes:
        return
    if not _has_classes(split, train):
        raise RichKDError(
            f"{split.folder} has only one folder, {split.classes[0]}, which is not a class in "
            f"{train.folder}; {split.sorting_remedy}",
            code="split-classes-differ",
        )
    differences = [
        (one.folder, sorted({*one.classes} - {*other.classes}))
        for one, other in ((train, split), (split, train))
    ]
    raise RichKDError(
        " and ".join(
            f"only {folder} has the class{'es' * (len(names) > 1)} {listed(names)}"
            for folder, names in differences
            if names
        )
        + f"; {train.folder} and {split.folder} need the same class folders: rename or move the "
        f"others",
        code="split-classes-differ",
    )


def _describe(found: Mapping[str, Found]) -> str:
    """Describe what each folder is used for."""
    uses = ", ".join(
        f"{found[split].folder} for {purpose}"
        for split, purpose in _PURPOSES.items()
        if split in found
    )
    no_test = found["test"].folder.name.lower() in NAMES["validation"]
    return f"using {uses}{' (there are no separate test images)' if no_test else ''}"


def _shared(found: Mapping[str, Found]) -> Iterator[str]:
    """Report folders that links put into several splits."""
    splits = [found[split] for split in _PURPOSES if split in found]
    for one, other in combinations(splits, 2):
        both = one.real.keys() & other.real.keys()
        if both:
            first = min(both, key=lambda key: one.real[key])
            more = f" (and {len(both) - 1} more such pairs)" if len(both) > 1 else ""
            yield (
                f"{one.folder / one.real[first]} and {other.folder / other.real[first]} are the "
                f"same folder{more}: results on these images do not carry over to unseen ones"
            )


def _rest(found: Mapping[str, Found]) -> Iterator[str]:
    """Report what else is in the folders."""
    tally = Tally()
    for split in found.values():
        tally.merge(split.tally)
    return tally.lines()

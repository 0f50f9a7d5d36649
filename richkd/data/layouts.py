"""Which folders of PATH are the splits of a data set: PATH/train/CLASS/*, PATH/val/…, PATH/test/…

Images of a validation folder are what choices are made on where there are others to test on; else
they are tested on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from richkd.core.errors import RichKDError
from richkd.data.folders import Found, find_images
from richkd.data.walk import Tally, is_hidden

# What the folder of a split is called, in any case; the first that there is counts.
NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
PURPOSES = {"train": "train on", "validation": "make choices on", "test": "test on"}


@dataclass(frozen=True)
class Layout:
    """The folder of each split, by its name in PATH."""

    folders: Mapping[str, str]
    earlier: bool = False  # read as versions did that wrote no names of folders to stores
    notes: tuple[str, ...] = ()


def earlier_layout(path: Path) -> Layout:
    """The layout of a store that does not name its folders."""
    test = next((name for name in ("val", "test") if (path / name).is_dir()), "val")
    return Layout({"train": "train", "test": test}, earlier=True)


def find_layout(path: Path) -> Layout:
    """The folders of the splits; a validation folder alone is that of test images.

    Raises:
        RichKDError: no training folder or none besides, or names that differ in case only.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    except OSError as error:
        raise RichKDError(
            f"cannot read the folder {path} ({error.strerror})", code="folder-unreadable"
        ) from None
    folders, notes = {}, []
    for split, known in NAMES.items():
        there = [name for word in known for name in names if name.lower() == word]
        exact = [name for word in known for name in names if name == word]
        if len(there) > 1 and not exact:
            raise RichKDError(
                f"{path} has {_listed(there)}, any of which may be its {split} images; rename the "
                f"one that is to be used to {known[0]}, or move the others away",
                code="split-ambiguous",
            )
        if there:
            folders[split] = (exact or there)[0]
        if len(there) > 1:
            notes.append(
                f"{path} has {_listed(there)}: {folders[split]} is used; to use another, move it "
                f"away"
            )
    if "train" not in folders or len(folders) == 1:
        raise RichKDError(
            f"imagefolder:{path} {_remedy(path, names, 'train' in folders)}", code="folder-layout"
        )
    if "test" not in folders:
        folders["test"] = folders.pop("validation")
    return Layout(folders, notes=tuple(notes))


def _remedy(path: Path, names: list[str], trains: bool) -> str:
    """What is missing from a folder without a layout, and what to do."""
    classes = [name for name in names if not is_hidden(name)]
    has = f"it has {_listed(classes)}" if classes else "it has no folders"
    wanted = (
        f"needs the layout {path}/train/CLASS/image.jpg and {path}/val/CLASS/image.jpg (or valid, "
        f"validation, dev, test for val)"
    )
    below = [name for name in classes if _has_layout(path / name)]
    if not trains and below:
        return f"{wanted}; {path / below[0]} has it: --dataset imagefolder:{path / below[0]}"
    if _has_layout(path.absolute().parent) and path.name.lower() in sum(NAMES.values(), ()):
        return f"{wanted}; name the folder that {path} lies in"
    if trains:
        return f"{wanted}; {has}: rename the folder of images to test on to test"
    return f"{wanted}; {has}: move folders of classes into folders train and val"


def _has_layout(path: Path) -> bool:
    try:
        names = {entry.name.lower() for entry in path.iterdir() if entry.is_dir()}
    except OSError:
        return False
    tests = {*NAMES["validation"], *NAMES["test"]}
    return bool(names & {*NAMES["train"]}) and bool(names & tests)


def find_splits(path: Path, layout: Layout | None) -> tuple[dict[str, Found], list[str]]:
    """The images of each split of a data set, and what is to be said of them.

    Args:
        path: of the data set.
        layout: as a store has it; else it is found.

    Raises:
        RichKDError: no layout, images without class folders, fewer than two classes, or other
            classes in one split than in another.
    """
    stored = layout is not None
    layout = layout or find_layout(path)
    gone = [name for name in layout.folders.values() if not (path / name).is_dir()]
    if gone:
        raise RichKDError(
            f"there is no folder {path / gone[0]}, which the store was made from",
            code="dataset-folder-gone",
        )
    found = {
        split: find_images(path / name, earlier=layout.earlier)
        for split, name in layout.folders.items()
    }
    notes = [*layout.notes]
    if not stored:
        notes += _without_labels(found)
        _check_number(found["train"])
    for split in found.values():
        _check_classes(split, found["train"])
    return found, [_use(found), *notes, *_shared(found), *_rest(found)]


def _without_labels(found: dict[str, Found]) -> Iterator[str]:
    """Drop images without class folders, as of a challenge, where others are left to test on."""
    for split in ("validation", "test"):
        if "validation" in found and not _sorted(found[split], found["train"]):
            unlabelled = found.pop(split)
            if split == "test":
                found["test"] = found.pop("validation")
            yield (
                f"{unlabelled.folder} is not used: it has no folders of classes, so its images "
                f"have no labels; to use it, {unlabelled.sort}"
            )


def _sorted(split: Found, train: Found) -> bool:
    """Whether a split has folders of classes; one folder of another name is none of them."""
    return len(split.classes) > 1 or {*split.classes} & {*train.classes} != set()


def _check_number(train: Found) -> None:
    """Refuse training images of one class: a teacher of it is always right."""
    if train.fault is None and len(train.classes) == 1:
        only = train.classes[0]
        below = sorted({path.split("/")[1] for path in train.paths if path.count("/") > 1})
        deeper = (
            f": the folders in it ({_listed(below)}) are not told apart, and should lie in "
            f"{train.folder} itself"
            if below
            else ""
        )
        raise RichKDError(
            f"{train.folder} has one folder, {only}{deeper}; at least two classes are needed, each "
            f"in a folder of its own, {train.folder}/CLASS/image.jpg",
            code="folder-one-class",
        )


def _check_classes(split: Found, train: Found) -> None:
    """Refuse a split that cannot be read, or that has other classes than the training images."""
    if split.fault is not None:
        raise RichKDError(split.fault, code="folder-classes")
    if split.classes == train.classes:
        return
    if not _sorted(split, train):
        raise RichKDError(
            f"{split.folder} has one folder, {split.classes[0]}, which is no class of "
            f"{train.folder}; {split.sort}",
            code="split-classes-differ",
        )
    ways = [(train, split), (split, train)]
    differences = [(one.folder, sorted({*one.classes} - {*other.classes})) for one, other in ways]
    said = " and ".join(
        f"{names[0]!r} is a class of {folder} only"
        + (f" (as are {len(names) - 1} more)" if len(names) > 1 else "")
        for folder, names in differences
        if names
    )
    raise RichKDError(
        f"{said}; {train.folder} and {split.folder} need the same folders of classes: rename or "
        f"move those",
        code="split-classes-differ",
    )


def _use(found: Mapping[str, Found]) -> str:
    """What each folder is used for."""
    uses = ", ".join(
        f"{found[split].folder} to {purpose}"
        for split, purpose in PURPOSES.items()
        if split in found
    )
    tested = found["test"].folder.name.lower()
    return f"images: {uses}" + (
        " (there are no other test images)" if tested in NAMES["validation"] else ""
    )


def _shared(found: Mapping[str, Found]) -> Iterator[str]:
    """Folders that are in several splits, by links."""
    splits = [found[split] for split in PURPOSES if split in found]
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            both = one.real.keys() & other.real.keys()
            if both:
                first = min(both, key=lambda key: one.real[key])
                more = f", as are {len(both) - 1} more" if len(both) > 1 else ""
                yield (
                    f"{one.folder / one.real[first]} and {other.folder / other.real[first]} are "
                    f"one and the same folder{more}: what is measured on these images says nothing "
                    f"of others"
                )


def _rest(found: Mapping[str, Found]) -> Iterator[str]:
    """What else lies in the folders."""
    tally = Tally()
    for split in found.values():
        tally.merge(split.tally)
    return tally.lines()


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = [*names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

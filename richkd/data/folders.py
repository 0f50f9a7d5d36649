"""Folders of people's own images: which files are images, and what their folders are called.

Layout: PATH/train/CLASS/* and PATH/val/CLASS/* (or test), as torchvision's ImageFolder reads it.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from richkd.cpus import threads, usable_cpus
from richkd.errors import RichKDError, nearest
from richkd.files import home, replacing
from richkd.progress import Report

# As torchvision has them, and those of GIF.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
LOOKED_AT = 4096  # files that wait for a thread at once
_SYNSET = re.compile(r"n\d{8}")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NUMBERED = re.compile(r"\d+[._-]+(?=\D)")  # as in 001.Black_footed_Albatross


@dataclass(frozen=True, eq=False)
class Paths(Sequence[str]):
    """Many paths in two arrays.

    A forked data-loader worker shares their pages; strings are objects, and counting the references
    to them would copy every page that they lie on.
    """

    text: NDArray[np.uint8]  # in UTF-8
    bounds: NDArray[np.int64]  # [N,2]: where in the text a path begins and ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """The same paths, taken in one by one."""
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        limits = np.array(ends, np.int64)
        return cls(np.frombuffer(text, np.uint8), np.stack([limits[:-1], limits[1:]], axis=1))

    def take(self, which: slice | NDArray[np.generic]) -> Paths:
        """Some of them, by a slice, their numbers or a mask."""
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
class Listing:
    """The image files of one split, the classes evenly spread."""

    folder: Path
    classes: tuple[str, ...]  # names of folders
    paths: Paths  # relative to folder
    labels: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int64]  # [N,2], height and width
    skipped: tuple[str, ...]  # files that are no whole images, relative to what folder is in
    ignored: tuple[str, ...]  # likewise: files that are not called images


def list_images(
    folder: Path,
    broken: str,
    known: Collection[str] | None = None,
    report: Report | None = None,
) -> Listing:
    """Read a folder of class folders.

    Args:
        folder: with a folder a class.
        broken: what to do with files that cannot be decoded to their end: refuse or skip.
        known: the broken files, as an earlier listing skipped them: none is decoded then.
        report: where progress goes.

    Raises:
        RichKDError: no class, a class without images, or a broken file that is to be refused.
    """
    classes, paths, labels, ignored = _find(folder)
    look = _remembered(folder, paths, known is None, report or Report(quiet=True))
    left_out = {*(known or ())}
    faults = {number: reason for number, reason in look.faults.items()
              if (known is None or not look.sizes[number].any())
              and f"{folder.name}/{paths[number]}" not in left_out}  # fmt: skip
    if faults and (broken == "refuse" or known is not None):
        first, reason = next(iter(faults.items()))
        more = f", nor {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RichKDError(
            f"{folder / paths[first]} is no image that can be read ({reason}){more}; remove "
            f"such files, or leave them out with --broken skip"
        )
    whole = np.ones(len(paths), bool)
    whole[[*faults]] = False
    if left_out:
        whole &= [f"{folder.name}/{path}" not in left_out for path in paths]
    lacking = sorted({*range(len(classes))} - {*labels[whole].tolist()})
    if lacking:
        raise RichKDError(f"{folder / classes[lacking[0]]}: no image in it can be read")
    return Listing(
        folder=folder,
        classes=classes,
        paths=paths.take(whole),
        labels=labels[whole],
        sizes=look.sizes[whole],
        skipped=tuple(f"{folder.name}/{paths[number]}" for number in faults),
        ignored=tuple(ignored),
    )


def _find(folder: Path) -> tuple[tuple[str, ...], Paths, NDArray[np.int64], list[str]]:
    """The classes, every file called an image with its label, and the files that are not.

    The order is one in which every prefix holds the classes evenly, so that --limit N does not take
    the first classes only.
    """
    from torchvision.datasets.folder import find_classes, make_dataset

    ignored: list[str] = []
    above = str(folder / "_")[:-1]

    def is_image(file: str) -> bool:
        called = os.path.splitext(file)[1].lower() in SUFFIXES  # noqa: PTH122
        if not called and not os.path.basename(file).startswith("."):  # noqa: PTH119
            ignored.append(f"{folder.name}/{file.removeprefix(above)}")
        return called

    def in_classes(numbers: dict[str, int]) -> Iterator[str]:
        """The paths, class by class: the lists of all at once would be much larger."""
        for name, number in numbers.items():
            samples = make_dataset(str(folder), {name: number}, is_valid_file=is_image)
            counts[number] = len(samples)
            yield from (file.removeprefix(above) for file, _ in samples)

    try:
        classes, numbers = find_classes(str(folder))
        counts = np.zeros(len(classes), np.int64)
        paths = Paths.of(in_classes(numbers))
    except FileNotFoundError as error:
        raise RichKDError(f"{folder}: {error}") from None
    labels = np.repeat(np.arange(len(classes)), counts)
    place = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # in its class
    order = np.lexsort((labels, place))
    return tuple(classes), paths.take(order), labels[order], ignored


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What the files of a folder say of themselves."""

    sizes: NDArray[np.int64]  # [N,2], height and width; 0 where even that cannot be read
    faults: Mapping[int, str]  # why files are no whole images
    decoded: bool  # else only their headers were read


def _remembered(folder: Path, paths: Paths, decode: bool, report: Report) -> _Look:
    """A look at all files: an earlier one from the user's cache folder if no file has changed."""
    folder_id = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    note = home() / "listings" / f"{folder_id[:32]}.npz"
    state = _state(folder, paths)
    look = _recall(note, state, len(paths))
    if look is None or decode > look.decoded:
        look = _look(folder, paths, decode, report)
        with suppress(OSError), replacing(note) as temporary, temporary.open("wb") as file:
            np.savez(
                file, state=state, sizes=look.sizes, decoded=look.decoded,
                broken=np.array([*look.faults], np.int64),
                reasons=np.array([*look.faults.values()], str),
            )  # fmt: skip
    return look


def _state(folder: Path, paths: Paths) -> str:
    """A digest of the paths, lengths and times of all files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(f"{folder}/{path}")  # noqa: PTH116
        except OSError:  # a link to nowhere
            continue
        digest.update(
            f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _recall(note: Path, state: str, count: int) -> _Look | None:
    """What was written for this state; None if that is nothing, or not what is written here."""
    try:
        with note.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if kept["state"] != state:
                return None
            sizes, broken, reasons = kept["sizes"], kept["broken"], kept["reasons"]
            faults = dict(zip(broken.tolist(), reasons.tolist(), strict=True))
            decoded = bool(kept["decoded"])
    except Exception:  # no file, another's, damaged: numpy and zipfile raise errors of many kinds
        return None
    as_written = (
        sizes.shape == (count, 2)
        and sizes.dtype == np.int64
        and not (sizes < 0).any()
        and {*np.flatnonzero(~sizes.any(1))} <= {*faults}
        and all(number in range(count) for number in faults)
    )
    return _Look(sizes=sizes, faults=faults, decoded=decoded) if as_written else None


def _look(folder: Path, paths: Paths, decode: bool, report: Report) -> _Look:
    sizes = np.zeros((len(paths), 2), np.int64)
    faults: dict[int, str] = {}

    def look(number: int) -> str | None:
        """Why a file is no image; `decode` reads it to its end."""
        path = folder / paths[number]
        try:
            with Image.open(path) as image:
                sizes[number] = image.height, image.width
                if decode:
                    image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(error).replace(str(path), "it")
        return None

    with (
        threads(usable_cpus()) as pool,
        report.track(f"looking at {folder}", len(paths), "files") as tick,
    ):
        for start in range(0, len(paths), LOOKED_AT):
            span = range(start, min(start + LOOKED_AT, len(paths)))
            for number, fault in zip(span, pool.map(look, span), strict=True):
                if fault is not None:
                    faults[number] = fault
                tick(1)
    return _Look(sizes=sizes, faults=faults, decoded=decode)


# --- class names ---------------------------------------------------------------------------------


def class_words(folder: str) -> str:
    """A folder's name as words: no underscores, no numbers in front, camel case apart.

    WordNet ids (n02123045) are looked up among timm's ImageNet classes; the first lemma is taken.
    """
    if _SYNSET.fullmatch(folder):
        return _lemmas().get(folder, folder)
    words = _CAMEL.sub(" ", _NUMBERED.sub("", folder).replace("_", " ").replace("-", " "))
    return " ".join(words.split()) or folder


@cache
def _lemmas() -> dict[str, str]:
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    return {
        synset: known.label_name_to_description(synset).split(",")[0]
        for synset in known.label_names()  # type: ignore[no-untyped-call]
    }


def read_class_names(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Names from a text file: a line a class in the order of the folders, or FOLDER: NAME lines.

    Raises:
        RichKDError: no such file, a folder that there is not, or too few or too many names.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RichKDError(f"cannot read --class-names {file}: {error}") from None
    lines = [line for line in lines if line]
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    if len(named) < len(lines):
        if len(lines) != len(folders):
            raise RichKDError(
                f"{file} has {len(lines)} names for {len(folders)} classes; write a name a line in "
                f"the order of the folders, or lines of FOLDER: NAME"
            )
        return tuple(lines)
    named = {folder.strip(): name.strip() for folder, name in named.items()}
    strange = sorted(named.keys() - {*folders})
    if strange:
        raise RichKDError(
            f"{file} names {strange[0]!r}, which is no folder of a class; "
            f"{nearest(strange[0], folders)}"
        )
    return tuple(named.get(folder) or class_words(folder) for folder in folders)


def suggest_image_size(sizes: NDArray[np.int64]) -> int:
    """The largest usual side that three quarters of the images have at least; 32 at the least."""
    shorter = sizes.min(1)
    for side in (224, 160, 128, 96, 64, 48):
        if np.quantile(shorter, 0.25) >= side:
            return side
    return 32

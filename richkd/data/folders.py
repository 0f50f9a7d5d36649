"""Folders of people's own images, a folder a class: their files, and what these say of themselves.

Which files are images is `walk`'s to say, which folder is which split `layouts`'s, and what classes
are called `class_names`'s.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.files import atomic_write, home
from richkd.core.progress import Report
from richkd.data import decoding
from richkd.data.decoding import SUFFIXES, Values
from richkd.data.walk import Kind, Tally, Walk

# Those that were read before stores said which folders they are of.
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
_READING = 2  # another number whenever files are looked at otherwise
LOOKED_AT = 4096  # files that wait for a thread at once


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
class Found:
    """The files of one split that are called images, the classes evenly spread."""

    folder: Path
    classes: tuple[str, ...]  # names of folders
    paths: Paths  # relative to folder
    labels: NDArray[np.int64]  # [N]
    tally: Tally  # of what else is there
    real: Mapping[tuple[int, int], str]  # as of `Walk`
    empty: Mapping[str, str]  # classes without images, and what is there instead

    @property
    def fault(self) -> str | None:
        """What is wrong with the folder, and the remedy; None where each class has images."""
        beside = self.tally.counts[Kind.BESIDE]
        if not self.classes:
            has = (
                f"holds {beside:,} images and no folders of classes"
                if beside
                else ("holds no folders of classes")
            )
            return f"{self.folder} {has}; {self.sort}"
        if self.empty:
            name, instead = next(iter(self.empty.items()))
            more = f", nor in {len(self.empty) - 1} more" if len(self.empty) > 1 else ""
            return (
                f"{self.folder}/{name}: there is no image in it{more}; add images of the class, or "
                f"remove the folder{instead and f' ({instead})'}"
            )
        return None

    @property
    def sort(self) -> str:
        """How images are sorted into classes."""
        hint = ""
        if (self.folder / "val_annotations.txt").is_file():
            hint = "; val_annotations.txt says the class of each"
        elif any("ILSVRC2012_val_" in path for path in self.tally.paths[Kind.BESIDE]):
            hint = "; a script called valprep.sh does that for ImageNet"
        return f"put each image into the folder of its class, {self.folder}/CLASS/image.jpg{hint}"


@dataclass(frozen=True)
class Listing:
    """The image files of one split, the classes evenly spread."""

    folder: Path
    classes: tuple[str, ...]  # names of folders
    paths: Paths  # relative to folder
    labels: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int64]  # [N,2], height and width, upright
    traits: NDArray[np.uint8]  # [N], bits as of data/decoding.py
    values: Values  # of those that are deeper than 8 bits
    skipped: tuple[str, ...]  # files that are no whole images, relative to what folder is in


def list_images(
    folder: Path,
    broken: str,
    known: Collection[str] | None = None,
    report: Report | None = None,
    found: Found | None = None,
    remedy: str = "",
) -> Listing:
    """Read a folder of class folders.

    Args:
        folder: with a folder a class.
        broken: what to do with files that cannot be decoded to their end: refuse or skip.
        known: the broken files, as an earlier listing skipped them: none is decoded then.
        report: where progress goes.
        found: what is in it, where that is known already.
        remedy: what to do about broken files that are refused, if not what stage one says.

    Raises:
        RichKDError: no class, a class without images, or a broken file that is to be refused.
    """
    found = found or find_images(folder)
    if found.fault is not None:
        raise RichKDError(found.fault, code="folder-classes")
    classes, paths, labels = found.classes, found.paths, found.labels
    look = _remembered(folder, paths, known is None, report or Report(quiet=True))
    left_out = {*(known or ())}
    faults = {
        number: reason
        for number, reason in look.faults.items()
        if (known is None or not look.sizes[number].any())
        and f"{folder.name}/{paths[number]}" not in left_out
    }
    if faults and (broken == "refuse" or known is not None):
        first, reason = next(iter(faults.items()))
        more = f", nor {len(faults) - 1} more" if len(faults) > 1 else ""
        remedy = remedy or (
            "remove such files, or leave them out with --broken skip"
            if known is None
            else "restore it, or make the store again with richkd precompute --broken skip"
        )
        raise RichKDError(
            f"{folder / paths[first]} is no image that can be read ({reason}){more}; {remedy}",
            code="image-damaged",
        )
    whole = np.ones(len(paths), bool)
    whole[[*faults]] = False
    if left_out:
        whole &= [f"{folder.name}/{path}" not in left_out for path in paths]
    lacking = sorted({*range(len(classes))} - {*labels[whole].tolist()})
    if lacking:
        raise RichKDError(
            f"{folder / classes[lacking[0]]}: no image in it can be read",
            code="class-without-images",
        )
    return Listing(
        folder=folder,
        classes=classes,
        paths=paths.take(whole),
        labels=labels[whole],
        sizes=look.sizes[whole],
        traits=look.traits[whole],
        values=replace(
            look.values,
            kind=look.values.kind[whole],
            low=look.values.low[whole],
            high=look.values.high[whole],
        ),
        skipped=tuple(f"{folder.name}/{paths[number]}" for number in faults),
    )


def find_images(folder: Path, *, earlier: bool = False) -> Found:
    """The classes of a folder, and every file called an image with its label.

    The order is one in which every prefix holds the classes evenly, so that --limit N does not take
    the first classes only.

    Args:
        folder: with a folder a class.
        earlier: read what earlier versions read: files of fewer formats, and hidden ones.

    Raises:
        RichKDError: a folder in it cannot be read, or two class folders are one.
    """
    walk = Walk(folder, EARLIER_SUFFIXES if earlier else SUFFIXES, with_hidden=earlier)
    counts = np.zeros(len(walk.classes), np.int64)
    empty: dict[str, str] = {}

    def in_classes() -> Iterator[str]:
        """The paths, class by class: the lists of all at once would be much larger."""
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
    place = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # in its class
    order = np.lexsort((labels, place))
    return Found(
        folder=folder,
        classes=tuple(walk.classes),
        paths=paths.take(order),
        labels=labels[order],
        tally=walk.tally,
        real=walk.real,
        empty=empty,
    )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What the files of a folder say of themselves."""

    sizes: NDArray[np.int64]  # [N,2], height and width; 0 where even that cannot be read
    traits: NDArray[np.uint8]  # [N]
    values: Values
    faults: Mapping[int, str]  # why files are no whole images
    decoded: bool  # else only their headers were read


def _remembered(folder: Path, paths: Paths, decode: bool, report: Report) -> _Look:
    """A look at all files: an earlier one from the user's cache folder if no file has changed."""
    folder_id = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    note = home() / "listings" / f"{folder_id[:32]}.npz"
    state = f"{_READING} {' '.join(decoding.readable())} {_state(folder, paths)}"
    look = _recall(note, state, len(paths))
    if look is None or decode > look.decoded:
        look = _look(folder, paths, decode, report)
        with suppress(OSError), atomic_write(note) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                state=state,
                sizes=look.sizes,
                decoded=look.decoded,
                traits=look.traits,
                kinds=np.array(look.values.kinds, str),
                kind=look.values.kind,
                low=look.values.low,
                high=look.values.high,
                broken=np.array([*look.faults], np.int64),
                reasons=np.array([*look.faults.values()], str),
            )
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
            traits = kept["traits"]
            values = Values(kept["kinds"].tolist(), kept["kind"], kept["low"], kept["high"])
    except Exception:  # no file, another's, damaged: numpy and zipfile raise errors of many kinds
        return None
    as_written = (
        sizes.shape == (count, 2)
        and sizes.dtype == np.int64
        and not (sizes < 0).any()
        and traits.shape == values.kind.shape == values.low.shape == values.high.shape == (count,)
        and traits.dtype == values.kind.dtype == np.uint8
        and values.low.dtype == values.high.dtype == np.float64
        and int(values.kind.max(initial=0)) <= len(values.kinds)
        and {*np.flatnonzero(~sizes.any(1))} <= {*faults}
        and all(number in range(count) for number in faults)
    )
    if not as_written:
        return None
    return _Look(sizes=sizes, traits=traits, values=values, faults=faults, decoded=decoded)


def _look(folder: Path, paths: Paths, decode: bool, report: Report) -> _Look:
    count = len(paths)
    sizes, traits = np.zeros((count, 2), np.int64), np.zeros(count, np.uint8)
    kind, low, high = np.zeros(count, np.uint8), np.full(count, np.nan), np.full(count, np.nan)
    kinds: list[str] = []
    faults: dict[int, str] = {}

    def look(number: int) -> decoding.Found:
        return decoding.look(folder / paths[number], decode)

    with (
        threads(usable_cpus()) as pool,
        report.track(f"looking at {folder}", count, "files") as tick,
    ):
        for start in range(0, count, LOOKED_AT):
            span = range(start, min(start + LOOKED_AT, count))
            for number, found in zip(span, pool.map(look, span), strict=True):
                sizes[number], traits[number] = found.size, found.traits
                low[number], high[number] = found.low, found.high
                if found.fault:
                    faults[number] = found.fault
                elif found.kind:
                    if found.kind not in kinds:
                        kinds.append(found.kind)
                    kind[number] = 1 + kinds.index(found.kind)
                tick(1)
    values = Values(kinds, kind, low, high)
    return _Look(sizes=sizes, traits=traits, values=values, faults=faults, decoded=decode)


def suggest_image_size(sizes: NDArray[np.int64]) -> int:
    """The largest usual side that three quarters of the images have at least; 32 at the least."""
    shorter = sizes.min(1)
    for side in (224, 160, 128, 96, 64, 48):
        if np.quantile(shorter, 0.25) >= side:
            return side
    return 32

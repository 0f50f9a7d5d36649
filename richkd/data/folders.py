"""List the images of one split of an image folder, with the properties of their files.

Which files are images is decided in `walk`, which folder is which split in `layouts`, and what the
classes are called in `class_names`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.files import atomic_write, home
from richkd.core.progress import Report
from richkd.data import decoding
from richkd.data.decoding import SUFFIXES, Values
from richkd.data.sources import Paths
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
Look = Callable[[Path, bool], decoding.Found]  # as `decoding.look`
_SCAN_VERSION = 2  # increase it whenever a scan finds something else in the same file
_QUEUED = 4096  # files that wait for a thread at once
_REMEDY_NEW = "remove such files, or leave them out with --broken skip"
_REMEDY_CACHED = (
    "restore the file, or write the cache again with richkd precompute --broken skip --overwrite"
)


@dataclass(frozen=True)
class _Labelled:
    """Files of one split, in an order that mixes the classes evenly."""

    folder: Path
    classes: tuple[str, ...]  # names of the class folders
    paths: Paths  # relative to folder
    labels: NDArray[np.int64]  # [N]


@dataclass(frozen=True)
class Found(_Labelled):
    """The files of one split that are images by their names."""

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


@dataclass(frozen=True)
class Listing(_Labelled):
    """The usable images of one split."""

    sizes: NDArray[np.int64]  # [N,2], height and width when upright
    traits: NDArray[np.uint8]  # [N], flags defined in data/decoding.py
    values: Values  # of files deeper than 8 bits
    skipped: tuple[str, ...]  # unusable files, relative to the parent of folder


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
    paths, labels = found.paths, found.labels
    scan = _cached_scan(folder, paths, known is None, report or Report(quiet=True), look)
    left_out = {*(known or ())}
    faults = {
        number: reason
        for number, reason in scan.faults.items()
        if (known is None or not scan.sizes[number].any())
        and f"{folder.name}/{paths[number]}" not in left_out
    }
    if faults and (broken == "refuse" or known is not None):
        remedy = remedy or (_REMEDY_NEW if known is None else _REMEDY_CACHED)
        raise _damaged(
            {folder / paths[number]: reason for number, reason in faults.items()}, remedy
        )
    intact = np.ones(len(paths), bool)
    intact[[*faults]] = False
    if left_out:
        intact &= [f"{folder.name}/{path}" not in left_out for path in paths]
    lacking = np.setdiff1d(np.arange(len(found.classes)), labels[intact])
    if len(lacking):
        raise RichKDError(
            f"no image in the class folder {folder / found.classes[lacking[0]]} can be read; add "
            f"intact images, or remove the folder from every split",
            code="class-without-images",
        )
    return Listing(
        folder=folder,
        classes=found.classes,
        paths=paths.take(intact),
        labels=labels[intact],
        sizes=scan.sizes[intact],
        traits=scan.traits[intact],
        values=scan.values.take(intact),
        skipped=tuple(f"{folder.name}/{paths[number]}" for number in faults),
    )


def _damaged(faults: Mapping[Path, str], remedy: str) -> RichKDError:
    path, reason = next(iter(faults.items()))
    more = f", nor {len(faults) - 1} more" if len(faults) > 1 else ""
    return RichKDError(
        f"cannot use {path} as an image ({reason}){more}; {remedy}", code="image-damaged"
    )


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
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # in its class
    order = np.lexsort((labels, rank))
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
class _Scan:
    """The properties of the files of a folder."""

    sizes: NDArray[np.int64]  # [N,2], height and width; 0 if not even these can be read
    traits: NDArray[np.uint8]  # [N]
    values: Values
    faults: Mapping[int, str]  # reasons why files cannot be used
    decoded: bool  # if not, only headers were read


def _cached_scan(folder: Path, paths: Paths, decode: bool, report: Report, look: Look) -> _Scan:
    """Scan all files, or reuse the scan in the user's home folder if no file has changed."""
    folder_id = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    note = home() / "listings" / f"{folder_id[:32]}.npz"
    state = f"{_SCAN_VERSION} {' '.join(decoding.readable())} {_state(folder, paths)}"
    scan = _load_scan(note, state, len(paths))
    if scan is None or decode > scan.decoded:
        scan = _scan(folder, paths, decode, report, look)
        with suppress(OSError), atomic_write(note) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                state=state,
                sizes=scan.sizes,
                decoded=scan.decoded,
                traits=scan.traits,
                kinds=np.array(scan.values.kinds, str),
                kind=scan.values.kind,
                low=scan.values.low,
                high=scan.values.high,
                broken=np.array([*scan.faults], np.int64),
                reasons=np.array([*scan.faults.values()], str),
            )
    return scan


def _state(folder: Path, paths: Paths) -> str:
    """Return a digest of the paths, sizes and modification times of all files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(f"{folder}/{path}")  # noqa: PTH116
        except OSError:  # a dangling link
            continue
        digest.update(
            f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _load_scan(note: Path, state: str, count: int) -> _Scan | None:
    """Load the scan of this state; return None if it is missing, foreign or damaged."""
    try:
        with note.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if saved["state"] != state:
                return None
            faults = dict(zip(saved["broken"].tolist(), saved["reasons"].tolist(), strict=True))
            sizes, traits, decoded = saved["sizes"], saved["traits"], bool(saved["decoded"])
            values = Values(saved["kinds"].tolist(), saved["kind"], saved["low"], saved["high"])
    except Exception:  # numpy and zipfile raise errors of many kinds
        return None
    valid = (
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
    if not valid:
        return None
    return _Scan(sizes=sizes, traits=traits, values=values, faults=faults, decoded=decoded)


def _scan(folder: Path, paths: Paths, decode: bool, report: Report, look: Look) -> _Scan:
    count = len(paths)
    sizes, traits = np.zeros((count, 2), np.int64), np.zeros(count, np.uint8)
    kind, low, high = np.zeros(count, np.uint8), np.full(count, np.nan), np.full(count, np.nan)
    kinds: list[str] = []
    faults: dict[int, str] = {}

    with (
        threads(usable_cpus()) as pool,
        report.track(f"checking the images in {folder}", count, "files") as tick,
    ):
        for start in range(0, count, _QUEUED):
            span = range(start, min(start + _QUEUED, count))
            files = (folder / paths[number] for number in span)
            for number, found in zip(span, pool.map(look, files, repeat(decode)), strict=True):
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
    return _Scan(sizes=sizes, traits=traits, values=values, faults=faults, decoded=decode)


def suggest_image_size(sizes: NDArray[np.int64]) -> int:
    """Return the largest usual side that three quarters of the images have at least, else 32."""
    shorter = np.quantile(sizes.min(1), 0.25)
    return next((side for side in (224, 160, 128, 96, 64, 48) if shorter >= side), 32)

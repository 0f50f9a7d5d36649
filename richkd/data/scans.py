"""Look at all images of a split once: which of them can be used, and the properties of each.

What was found is kept in the user's home folder until an image changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.files import atomic_write, home
from richkd.core.progress import Report
from richkd.data import decoding
from richkd.data.decoding import Values
from richkd.data.sources import Encoded, Source, UncheckedSource, print_of

Look = Callable[[Encoded, bool], decoding.Found]  # as `decoding.look`
_SCAN_VERSION = 2  # increase it whenever a scan finds something else in the same file
_QUEUED = 4096  # files that wait for a thread at once
_REMEDY_NEW = "remove such images, or leave them out with --broken skip"
_REMEDY_CACHED = (
    "restore the file, or write the cache again with richkd precompute --broken skip --overwrite"
)


@dataclass(frozen=True)
class Listing:
    """The usable images of one split, in an order that mixes the classes evenly."""

    source: Source
    labels: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int64]  # [N,2], height and width when upright
    traits: NDArray[np.uint8]  # [N], flags defined in data/decoding.py
    values: Values  # of images deeper than 8 bits
    prints: NDArray[np.uint64]  # [N], as in `Scan`
    skipped: tuple[str, ...]  # keys of unusable images

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return self.source.name(index)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The properties of the images of a source."""

    sizes: NDArray[np.int64]  # [N,2], height and width; 0 if not even these can be read
    traits: NDArray[np.uint8]  # [N]
    values: Values
    prints: NDArray[np.uint64]  # [N], of `print_of`; 0 for files, which have names and sizes
    faults: Mapping[int, str]  # reasons why images cannot be used
    decoded: bool  # if not, only headers were read


def even_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an order of which every prefix has about as many images of each class."""
    order = labels.argsort(kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)  # in its class
    rank[order] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return np.lexsort((labels, rank))


def check_images(
    source: UncheckedSource,
    labels: NDArray[np.int64],
    broken: str,
    known: Collection[str] | None = None,
    report: Report | None = None,
    remedy: str = "",
    look: Look = decoding.look,
) -> Listing:
    """Return the images that can be used.

    Args:
        source: the images.
        labels: of the images.
        broken: what to do with images that cannot be fully decoded: refuse or skip.
        known: the keys of those that an earlier check skipped; with these, only headers are read.
        report: shows the progress.
        remedy: the remedy for a refused image; stage one's by default.
        look: reads the properties of an image.

    Raises:
        RichKDError: a broken image is refused.
    """
    scan = scan_images(source, known is None, report or Report(quiet=True), look)
    left_out = {*(known or ())}
    faults = {
        number: reason
        for number, reason in scan.faults.items()
        if (known is None or not scan.sizes[number].any()) and source.key(number) not in left_out
    }
    if faults and (broken == "refuse" or known is not None):
        number, reason = next(iter(faults.items()))
        more = f", nor {len(faults) - 1} more" if len(faults) > 1 else ""
        remedy = remedy or (_REMEDY_NEW if known is None else _REMEDY_CACHED)
        raise RichKDError(
            f"cannot use {source.name(number)} as an image ({reason}){more}; {remedy}",
            code="image-damaged",
        )
    intact = np.ones(len(source), bool)
    intact[[*faults]] = False
    if left_out:
        intact &= [source.key(number) not in left_out for number in range(len(source))]
    return Listing(
        source=source.take(intact),
        labels=labels[intact],
        sizes=scan.sizes[intact],
        traits=scan.traits[intact],
        values=scan.values.take(intact),
        prints=scan.prints[intact],
        skipped=tuple(source.key(number) for number in faults),
    )


def scan_images(source: UncheckedSource, decode: bool, report: Report, look: Look) -> Scan:
    """Look at all images, or return what was found earlier if none has changed."""
    origin = hashlib.sha256(source.origin.encode(errors="surrogateescape")).hexdigest()
    note = home() / "listings" / f"{origin[:32]}.npz"
    state = f"{_SCAN_VERSION} {' '.join(decoding.readable())} {source.state()}"
    scan = _load(note, state, len(source))
    if scan is None or decode > scan.decoded:
        scan = _look_at_all(source, decode, report, look)
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
                prints=scan.prints,
                broken=np.array([*scan.faults], np.int64),
                reasons=np.array([*scan.faults.values()], str),
            )
    return scan


def _load(note: Path, state: str, count: int) -> Scan | None:
    """Load the scan of this state; return None if it is missing, foreign or damaged."""
    try:
        with note.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if saved["state"] != state:
                return None
            faults = dict(zip(saved["broken"].tolist(), saved["reasons"].tolist(), strict=True))
            sizes, traits, decoded = saved["sizes"], saved["traits"], bool(saved["decoded"])
            values = Values(saved["kinds"].tolist(), saved["kind"], saved["low"], saved["high"])
            # files have none, and earlier versions knew files only
            prints = saved["prints"] if "prints" in saved else np.zeros(count, np.uint64)
    except Exception:  # numpy and zipfile raise errors of many kinds
        return None
    valid = (
        sizes.shape == (count, 2)
        and sizes.dtype == np.int64
        and not (sizes < 0).any()
        and traits.shape == values.kind.shape == values.low.shape == values.high.shape == (count,)
        and traits.dtype == values.kind.dtype == np.uint8
        and values.low.dtype == values.high.dtype == np.float64
        and prints.shape == (count,)
        and prints.dtype == np.uint64
        and int(values.kind.max(initial=0)) <= len(values.kinds)
        and {*np.flatnonzero(~sizes.any(1))} <= {*faults}
        and all(number in range(count) for number in faults)
    )
    if not valid:
        return None
    return Scan(
        sizes=sizes, traits=traits, values=values, prints=prints, faults=faults, decoded=decoded
    )


def _look_at_all(source: UncheckedSource, decode: bool, report: Report, look: Look) -> Scan:
    count = len(source)
    sizes, traits = np.zeros((count, 2), np.int64), np.zeros(count, np.uint8)
    kind, low, high = np.zeros(count, np.uint8), np.full(count, np.nan), np.full(count, np.nan)
    prints = np.zeros(count, np.uint64)
    kinds: list[str] = []
    faults: dict[int, str] = {}

    def look_at(number: int) -> decoding.Found:
        try:
            file = source.file(number)
        except OSError as error:
            return decoding.Found(fault=error.strerror or str(error))
        found = look(file, decode)
        if not isinstance(file, Path):
            prints[number] = print_of(file)
        return found

    with (
        threads(usable_cpus()) as pool,
        report.track(f"checking the images in {source.place}", count, "images") as tick,
    ):
        for start in range(0, count, _QUEUED):
            span = range(start, min(start + _QUEUED, count))
            for number, found in zip(span, pool.map(look_at, span), strict=True):
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
    return Scan(
        sizes=sizes, traits=traits, values=values, prints=prints, faults=faults, decoded=decode
    )

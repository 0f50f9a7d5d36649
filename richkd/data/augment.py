"""Richer views: the components of `--augment`, what is drawn for each, and the columns it fills.

Distributions are those of torchvision's transforms with their defaults: ColorJitter (with SimCLR's
strengths, arXiv 2002.05709), TrivialAugmentWide (arXiv 2103.10158), RandAugment (arXiv 1909.13719),
RandomErasing (arXiv 1708.04896), MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899). That a
student sees the very view that the teacher saw, mixing included, is FKD's idea (arXiv 2112.01528)
and ml-dr's (arXiv 2303.08983).

A row has everything that a replay needs, so that nothing is drawn then. Lengths are shares of the
view's side, because networks of other input sizes replay the same row. cache/README.md documents
the columns. Does not import torch, as manifests are read without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from richkd.core.choices import CROP, MIXING
from richkd.core.errors import RichKDError

GEOMETRY = {
    "pad-crop-flip": ("view_id",),
    "resized-crop-flip": ("top", "left", "height", "width", "flip"),
}
# in the order of their numbers, which is that of torchvision's tables
OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
SIGNED = np.arange(len(OPS)) <= OPS.index("Sharpness")  # the identity has no magnitude
BINS, RAND_BIN, RAND_OPS = 31, 9, 2  # torchvision's defaults
ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation and hue
JITTER = (0.4, 0.4, 0.4, 0.1)
ERASE_SHARE, ERASE_AREA, ERASE_ASPECT, ERASE_ATTEMPTS = 0.5, (0.02, 0.33), (0.3, 3.3), 10
MIXUP, CUTMIX = 1, 2
MOST_SAMPLES = 2**24  # up to here, float32 holds every id

# what a replay takes, which is more than what is drawn
_LIMITS = {
    "op": (0, len(OPS) - 1),
    "jitter_order": (0, len(ORDERS) - 1),
    **dict.fromkeys(("brightness", "contrast", "saturation"), (0, 2)),
    "hue": (-0.5, 0.5),
}
_WHOLE = ("op", "jitter_order", "partner")
_HIGHEST = np.array([0, 1, 1, 32, 32, 180, 1, 1, 1, 1, 8, 1, 0, 0])  # magnitudes, by op
_LOWEST = np.where(SIGNED, -_HIGHEST, 0)

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """The samples that rows are drawn for: n of N, and the side of their views in pixels."""

    ids: NDArray[np.int64]  # [n]
    total: int
    side: int


@dataclass(frozen=True)
class Component:
    """What one component adds to a row: `draw` turns numbers in [0, 1) into its columns."""

    columns: tuple[str, ...]
    numbers: int
    draw: Callable[[Numbers, Samples], Numbers]  # [n,numbers] -> [n,columns]


def _jitter(u: Numbers, samples: Samples) -> Numbers:
    order = np.floor(u[:, :1] * len(ORDERS))
    strength, centre = np.array(JITTER), np.array([1, 1, 1, 0])
    return np.concatenate([order, centre + strength * (2 * u[:, 1:] - 1)], axis=1)


def magnitudes(kind: str, side: int) -> Numbers:
    """Return the magnitudes [14,31] of `trivial` or `rand`, without signs; 0 where there is none.

    Those of translations are shares of the side. TrivialAugment's are up to 32 pixels, whatever the
    size of the image, so their share depends on the side of the student's.
    """
    shear, shift, degrees, factor, bits = {
        "trivial": (0.99, 32 / side, 135, 0.99, 6),
        "rand": (0.3, 150 / 331, 30, 0.9, 4),
    }[kind]
    ramp = np.linspace(0, 1, BINS)
    tops = [0, shear, shear, shift, shift, degrees, *[factor] * 4]
    table = np.zeros((len(OPS), BINS))
    table[: len(tops)] = np.array(tops)[:, None] * ramp
    table[OPS.index("Posterize")] = np.rint(8 - np.arange(BINS) / ((BINS - 1) / bits))
    table[OPS.index("Solarize")] = 1 - ramp
    return table


def _op(u: Numbers, samples: Samples, kind: str) -> Numbers:
    """Draw an op and its magnitude from three numbers."""
    op = np.floor(u[:, 0] * len(OPS)).astype(np.int64)
    level = np.floor(u[:, 1] * BINS).astype(np.int64) if kind == "trivial" else RAND_BIN
    sign = np.where((u[:, 2] <= 0.5) & SIGNED[op], -1.0, 1.0)
    return np.stack([op, sign * magnitudes(kind, samples.side)[op, level] + 0.0], axis=1)


def _trivial(u: Numbers, samples: Samples) -> Numbers:
    return _op(u, samples, "trivial")


def _rand(u: Numbers, samples: Samples) -> Numbers:
    return np.concatenate([_op(part, samples, "rand") for part in np.split(u, RAND_OPS, 1)], 1)


def _erase(u: Numbers, samples: Samples) -> Numbers:
    side = samples.side
    area, aspect, down, right = np.split(u[:, 1:], 4, axis=1)  # each [n,attempts]
    area = side**2 * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area)
    low, high = np.log(ERASE_ASPECT)
    aspect = np.exp(low + (high - low) * aspect)
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < side) & (width < side)
    top, left = np.floor(down * (side - height + 1)), np.floor(right * (side - width + 1))
    boxes = np.stack([top, left, height, width], axis=2)  # [n,attempts,4]
    first = np.take_along_axis(boxes, fits.argmax(1)[:, None, None], axis=1)[:, 0]
    erased = (u[:, 0] < ERASE_SHARE) & fits.any(1)
    return np.where(erased[:, None], first, 0) / side


def _mixing(modes: tuple[int, ...]) -> Callable[[Numbers, Samples], Numbers]:
    def draw(u: Numbers, samples: Samples) -> Numbers:
        side, own = samples.side, u[:, 1]
        partner = np.floor(u[:, 0] * (samples.total - 1))
        partner += partner >= samples.ids
        mode = np.array(modes)[np.floor(u[:, 4] * len(modes)).astype(np.int64)]
        y, x = np.floor(u[:, 2] * side), np.floor(u[:, 3] * side)
        half = np.floor(0.5 * np.sqrt(1 - own) * side)
        top, left = np.maximum(y - half, 0), np.maximum(x - half, 0)
        height, width = np.minimum(y + half, side) - top, np.minimum(x + half, side) - left
        cut = mode == CUTMIX
        own = np.where(cut, 1 - height * width / side**2, own)
        box = np.where(cut, np.stack([top, left, height, width]) / side, 0)
        return np.stack([partner, mode, own, *box], axis=1)

    return draw


BOX = ("top", "left", "height", "width")
MIX_COLUMNS = ("partner", "mix_mode", "share", *(f"mix_{part}" for part in BOX))
JITTER_COLUMNS = ("jitter_order", "brightness", "contrast", "saturation", "hue")
COMPONENTS = {  # in the order in which they are applied
    "jitter": Component(
        ("jitter_order", "brightness", "contrast", "saturation", "hue"), 5, _jitter
    ),
    "trivial": Component(("op", "magnitude"), 3, _trivial),
    "rand": Component(("op_1", "magnitude_1", "op_2", "magnitude_2"), 3 * RAND_OPS, _rand),
    "erase": Component(tuple(f"erase_{part}" for part in BOX), 1 + 4 * ERASE_ATTEMPTS, _erase),
    "mixup": Component(MIX_COLUMNS, 5, _mixing((MIXUP,))),
    "cutmix": Component(MIX_COLUMNS, 5, _mixing((CUTMIX,))),
    "mix": Component(MIX_COLUMNS, 5, _mixing((MIXUP, CUTMIX))),
}


@dataclass(frozen=True)
class Augment:
    """The components of a cache's views besides the crop, and where they are in a row."""

    space: str  # of the crop and flip, whose columns come first
    text: str  # as `read_augment` returns it, e.g. rand+erase+mix

    @classmethod
    def of(cls, space: str, text: str) -> Self | None:
        """Return what a setting means in a view space; None for crops alone."""
        return None if text == CROP else cls(space, text)

    @classmethod
    def recorded(cls, views: Mapping[str, Any]) -> Self | None:
        """Return what the `views` of a manifest say."""
        return cls.of(views["space"], views.get("augment", CROP))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the components, in the order in which they are applied."""
        return tuple(self.text.split("+"))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of a row."""
        return (
            *GEOMETRY[self.space],
            *(c for part in self.parts for c in COMPONENTS[part].columns),
        )

    @cached_property
    def at(self) -> dict[str, int]:
        """The position of each column."""
        return {name: number for number, name in enumerate(self.columns)}

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.columns)

    @property
    def geometry(self) -> int:
        """The number of leading columns, for the crop and flip."""
        return len(GEOMETRY[self.space])

    @property
    def mixes(self) -> bool:
        """Whether a view is mixed with one of another sample."""
        return self.parts[-1] in MIXING

    @property
    def unmixed(self) -> int:
        """The number of leading columns that concern one sample alone."""
        return self.width - len(MIX_COLUMNS) * self.mixes

    def streams(self, *words: int) -> dict[str, np.random.Philox]:
        """Return a stream of random numbers for each component, given the words of their seed.

        So what one component draws does not depend on which others there are.
        """
        return {
            part: np.random.Philox(np.random.SeedSequence([*words, number]))
            for number, part in enumerate(COMPONENTS, 1)
            if part in self.parts
        }

    def fill(
        self,
        views: NDArray[np.float32],
        samples: Samples,
        streams: Mapping[str, np.random.Philox],
    ) -> None:
        """Fill in the columns [n,k] of all components, from the next numbers of their streams."""
        for part, stream in streams.items():
            component = COMPONENTS[part]
            first = self.at[component.columns[0]]
            drawn = component.draw(uniform(stream, len(views), component.numbers), samples)
            views[:, first : first + len(component.columns)] = drawn


def param_faults(
    augment: Augment,
    params: NDArray[np.float32],
    total: int,
    samples: NDArray[np.int64] | None = None,
) -> Iterator[str]:
    """Yield what is wrong with rows [N,k] or [V,N,k] of untrusted parameters that no replay takes.

    Args:
        augment: what the rows consist of.
        params: the rows.
        total: the number of all samples.
        samples: those that the rows are of, [N]; None for all.
    """

    def column(name: str) -> NDArray[np.float32]:
        return params[..., augment.at[name]]

    limits = {"partner": (0, total - 1), "share": (0, 1), **_LIMITS}
    for name in augment.columns[augment.geometry :]:
        kind = name.rstrip("_12")
        if kind in limits:
            (low, high), values = limits[kind], column(name)
            if not ((values >= low) & (values <= high)).all():
                yield f"some of {name} are not in {low:g}..{high:g}"
            if kind in _WHOLE and (values != np.floor(values)).any():
                yield f"some of {name} are not whole numbers"
        elif kind == "magnitude":
            ops = np.nan_to_num(column(name.replace(kind, "op"))).clip(0, len(OPS) - 1).astype(int)
            values = column(name)
            if not ((values >= _LOWEST[ops]) & (values <= _HIGHEST[ops])).all():
                yield f"some of {name} are out of range for their op"
    for part in ("erase", "mix"):
        if f"{part}_top" not in augment.at:
            continue
        first = augment.at[f"{part}_top"]
        box = params[..., first : first + 4]
        ends = box[..., :2] + box[..., 2:]
        if not ((box >= 0).all() and (ends <= 1 + 1e-6).all()):
            yield f"some boxes of {part} are out of range"
    if augment.mixes:
        own = np.arange(params.shape[-2]) if samples is None else samples
        if (column("partner") == own).any():
            yield "some images are mixed with themselves"
        if not np.isin(column("mix_mode"), (MIXUP, CUTMIX)).all():
            yield f"some of mix_mode are not {MIXUP} or {CUTMIX}"


def uniform(stream: np.random.Philox, count: int, width: int) -> Numbers:
    """Return the next numbers [count,width] of a stream, in [0, 1)."""
    raw = stream.random_raw(count * width)
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, width)


def check_samples(augment: Augment | None, num_samples: int) -> None:
    """Raise RichKDError if so many samples cannot be mixed."""
    if augment is None or not augment.mixes or 2 <= num_samples <= MOST_SAMPLES:
        return
    raise RichKDError(
        f"augment = {augment.text!r}: mixing needs 2 to {MOST_SAMPLES:,} training images, and "
        f"there are {num_samples:,}; leave {augment.parts[-1]} out",
        code="augment-samples",
    )

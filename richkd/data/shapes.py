"""Captioned drawings: a dataset that needs no download, for the demo and the tests.

A drawing shows one figure, e.g. a striped triangle, somewhere on a coloured background among
clutter, and some figures are faint or partly covered. As with photographs on the web, its caption
names the class and, in many wordings, some of the colour, size, position and background. So a small
CNN can learn the classes from labels and a small CLIP from captions, and neither is perfect.

Drawings can have any size from 8 pixels up. The same seed gives the same random numbers, labels and
captions everywhere; a pixel may differ by one level between processors, whose sines round
differently. Mirroring or rotating a drawing never changes its class, but may contradict the left
and right of its caption. Every drawing has exactly one figure, without perspective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TEXTURES: Final = ("solid", "striped", "dotted", "hollow")
FORMS: Final = ("circle", "triangle", "square", "star")
CLASS_NAMES: Final[tuple[str, ...]] = tuple(f"{t} {f}" for t in TEXTURES for f in FORMS)
"""Class names by label; "a photo of a {}" reads well with each of them."""

_COLOURS: Final = {
    "red": (208, 40, 44),
    "orange": (240, 140, 36),
    "yellow": (244, 214, 58),
    "green": (52, 152, 68),
    "cyan": (64, 196, 208),
    "blue": (44, 84, 200),
    "purple": (128, 58, 168),
    "pink": (240, 138, 180),
    "brown": (126, 80, 46),
    "black": (30, 30, 34),
    "gray": (132, 132, 136),
    "white": (242, 242, 238),
}
_NAMES: Final = tuple(_COLOURS)
_PALETTE: Final[Floats] = np.array(list(_COLOURS.values()), np.float32) / np.float32(255)

# Beginnings of captions; most of them are common in zero-shot prompts.
_OPENINGS: Final = (
    "a photo of a",
    "a photo of a",
    "a picture of a",
    "a picture of a",
    "a blurry photo of a",
    "a close-up photo of a",
    "a cropped photo of a",
    "a bright photo of a",
    "a low resolution photo of a",
    "a high quality photo of a",
    "a natural photo of a",
    "a sketch of a",
    "a drawing of a",
    "an image of a",
    "a detailed image of a",
    "a realistic image of a",
    "there is a",
    "a",
    "a",
    "one",
)
_PLACES: Final = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the center", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)

_BATCH: Final = 64  # drawings made at a time, which limits the memory
_CLUTTER: Final = 4  # maximum number of pieces of clutter
_HEAD: Final = 40  # random numbers for the figure, the background and the caption
_PIECE: Final = 8  # random numbers for a piece of clutter or the covering piece
_ROW: Final = _HEAD + _PIECE * (_CLUTTER + 1)


@dataclass(frozen=True)
class Drawing:
    """Drawings with labels and captions.

    Attributes:
        images: uint8 [n, size, size, 3], RGB.
        labels: int64 [n], indices into `CLASS_NAMES`.
        captions: n sentences, each of which contains its class name.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    captions: tuple[str, ...]


def draw(count: int, *, seed: int, size: int = 32) -> Drawing:
    """Draw `count` captioned images; image i depends only on `seed`, i and `size`.

    So the first images are the same for every `count`, and another seed gives other images (use
    different seeds for training and testing). All classes are equally likely.

    Args:
        count: number of images, may be 0.
        seed: any non-negative integer.
        size: height and width in pixels, at least 8.

    Raises:
        ValueError: `count` or `seed` is negative, or `size` is below 8.
    """
    if count < 0 or seed < 0 or size < 8:
        raise ValueError(
            f"expected count >= 0, seed >= 0 and size >= 8, got {count}, {seed} and {size}"
        )
    # Unlike NumPy's distributions, the raw stream of Philox is the same in all versions. The noise
    # has its own key, because the length of its rows depends on the size.
    plan = np.random.Philox(np.random.SeedSequence(seed))
    noise = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,)))
    words = -(-size * size * 3 // 8)  # eight bytes of noise per raw number

    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    captions: list[str] = []
    for start in range(0, count, _BATCH):
        n = min(_BATCH, count - start)
        raw = plan.random_raw(n * _ROW).reshape(n, _ROW)
        grain = noise.random_raw(n * words).astype("<u8").view(np.uint8).reshape(n, -1)
        scene = _Scene(((raw >> np.uint64(11)) * 2.0**-53).astype(np.float32))
        images[start : start + n] = _render(scene, grain[:, : size * size * 3], size)
        labels[start : start + n] = scene.label
        captions += scene.captions()
    return Drawing(images, labels, tuple(captions))


class _Scene:
    """The content of a batch of drawings, derived from rows of uniform random numbers.

    Lengths are in 32nds of the canvas, the origin is its centre, and y grows downwards.
    """

    def __init__(self, u: Floats) -> None:
        column: Iterator[Floats] = iter(u[:, :_HEAD].T)  # uses each number once

        def pick(choices: int) -> Ints:
            # A float32 below 1, multiplied by `choices`, may round up to `choices`.
            return np.minimum((next(column) * choices).astype(np.int64), np.int64(choices - 1))

        def between(low: float, high: float) -> Floats:
            return np.float32(low) + np.float32(high - low) * next(column)

        self.label = pick(len(CLASS_NAMES))
        self.texture, self.form = np.divmod(self.label, len(FORMS))
        self.radius = between(8, 13)
        reach = 15.5 - self.radius  # a figure may touch the edge but not cross it
        self.x, self.y = between(-1, 1) * reach, between(-1, 1) * reach
        self.angle = between(-0.3, 0.3)

        # Three different colours, by steps around the palette that cannot meet.
        colours = len(_NAMES)
        self.figure = pick(colours)
        step = 1 + pick(colours - 1)
        self.ground = (self.figure + step) % colours
        other = 1 + pick(colours - 2)
        self.accent = (self.figure + other + (other >= step)) % colours
        jitter = np.stack([between(-0.06, 0.06) for _ in range(9)], 1).reshape(-1, 3, 3)
        # Grounds are dark: figures both darker and lighter would take many labels to learn.
        shade = between(0.2, 0.5)
        figure, ground, accent = (
            _PALETTE[index] + jitter[:, i]
            for i, index in enumerate((self.figure, self.ground, self.accent))
        )
        ground = ground * shade[:, None]
        # One in five is faint: both of its colours are close to the ground.
        self.faint = between(0, 1) < 0.2
        contrast = np.where(self.faint, between(0.35, 0.6), np.float32(1))[:, None]
        # Patterns use a second colour, or let the ground show through.
        self.bare = between(0, 1) < 0.5
        accent = np.where(self.bare[:, None], ground, accent)
        self.ground_rgb: Floats = ground
        self.figure_rgb: Floats = ground + contrast * (figure - ground)
        self.accent_rgb: Floats = ground + contrast * (accent - ground)
        self.dark = shade < 0.35

        self.pattern_angle = between(0, 2 * np.pi)
        self.pattern_phase = between(0, 1)
        self.pitch = between(3.4, 5.0)
        self.grain = between(0.02, 0.1)
        self.slope = between(-0.01, 0.01), between(-0.01, 0.01)
        self.wording = np.stack([next(column) for _ in range(6)], 1)
        pieces = u[:, _HEAD:].reshape(len(u), _CLUTTER + 1, _PIECE)
        self.clutter, self.cover = pieces[:, :_CLUTTER], pieces[:, _CLUTTER]

    def captions(self) -> list[str]:
        """Return one sentence per drawing, with its class and some of the other properties."""
        rows = zip(
            self.label.tolist(),
            self.figure.tolist(),
            self.ground.tolist(),
            self.accent.tolist(),
            self.radius.tolist(),
            np.digitize(self.x, (-2.0, 2.0)).tolist(),
            np.digitize(self.y, (-2.0, 2.0)).tolist(),
            self.dark.tolist(),
            self.bare.tolist(),
            self.faint.tolist(),
            self.wording.tolist(),
            strict=True,
        )
        return [_caption(_Content(*row)) for row in rows]


class _Content(NamedTuple):
    """What a caption may mention, and six uniform random numbers that select it."""

    label: int
    figure: int
    ground: int
    accent: int
    radius: float
    column: int
    row: int
    dark: bool
    bare: bool
    faint: bool
    wording: list[float]


def _caption(content: _Content) -> str:
    opening, sized, coloured, grounded, placed, patterned = content.wording
    words = [_OPENINGS[min(int(opening * len(_OPENINGS)), len(_OPENINGS) - 1)]]
    if sized < 0.15 and not 9.5 < content.radius < 11.5:
        words.append("small" if content.radius <= 9.5 else "large")
    if content.faint and sized > 0.7:
        words.append("faint")
    if coloured < 0.2:
        words.append(_NAMES[content.figure])
    words.append(CLASS_NAMES[content.label])
    if not content.bare and patterned < 0.12:
        texture = TEXTURES[content.label // len(FORMS)]
        mark = {"striped": "stripes", "dotted": "dots"}.get(texture)
        if mark:
            words.append(f"with {_NAMES[content.accent]} {mark}")
    if grounded < 0.12:
        ground = _NAMES[content.ground]
        tone = "dark " if content.dark and grounded < 0.06 and ground != "black" else ""
        noun = "background" if grounded < 0.08 else "ground"
        words.append(f"on a {tone}{ground} {noun}")
    if placed < 0.1:
        words.append(_PLACES[content.row][content.column])
    return " ".join(words).replace(" a orange", " an orange")


def _render(scene: _Scene, grain: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Paint a batch from back to front: ground, clutter, figure, cover, noise."""
    scale = np.float32(32 / size)  # one pixel, also the width of a soft edge
    axis = (np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)) * scale
    x, y = axis[None, None, :], axis[None, :, None]

    canvas = np.empty((len(scene.label), 3, size, size), np.float32)
    slope = _broadcast(scene.slope[0]) * x + _broadcast(scene.slope[1]) * y
    canvas[...] = scene.ground_rgb[:, :, None, None] + slope[:, None]
    for i in range(_CLUTTER):
        _paint_piece(canvas, scene.clutter[:, i], x, y, scale, share=0.4, reach=16.0)

    outline = _outline(scene, x, y)
    inside = _coverage(outline, scale)
    accent = _texture(scene, x, y, outline, scale)
    hollow = _broadcast(scene.texture == TEXTURES.index("hollow"))
    # A hollow figure shows what is behind it.
    inside = np.where(hollow, inside * (1 - accent), inside)
    accent = np.where(hollow, np.float32(0), accent)
    figure, second = scene.figure_rgb[:, :, None, None], scene.accent_rgb[:, :, None, None]
    canvas += inside[:, None] * (figure + accent[:, None] * (second - figure) - canvas)

    _paint_piece(canvas, scene.cover, x, y, scale, share=0.35, reach=8.0)
    canvas = canvas.transpose(0, 2, 3, 1)
    speckle = grain.reshape(canvas.shape).astype(np.float32) * np.float32(1 / 255)
    canvas = canvas + (speckle - np.float32(0.5)) * (2 * scene.grain[:, None, None, None])
    painted: npt.NDArray[np.uint8] = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return painted


def _broadcast(values: npt.NDArray[np.generic]) -> Floats:
    """Reshape one value per drawing to [n, 1, 1], to broadcast over its pixels."""
    reshaped: Floats = values[:, None, None]  # type: ignore[assignment]
    return reshaped


def _coverage(distance: Floats, edge: np.float32) -> Floats:
    """Return how much of a pixel is covered, by its signed distance to an edge (< 0 inside)."""
    covered: Floats = np.clip(0.5 - distance / edge, 0, 1)
    return covered


def _rotated(x: Floats, y: Floats, angle: Floats) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle), np.sin(angle)
    return _broadcast(cos) * x + _broadcast(sin) * y, _broadcast(cos) * y - _broadcast(sin) * x


def _outline(scene: _Scene, x: Floats, y: Floats) -> Floats:
    """Return the approximate signed distance [n, size, size] to the outline of the figure.

    All forms cover about the same area, so that the area does not reveal the form.
    """
    x, y = _rotated(x - _broadcast(scene.x), y - _broadcast(scene.y), scene.angle)
    radius = _broadcast(scene.radius)
    distance = np.empty(np.broadcast_shapes(x.shape, radius.shape), np.float32)
    for form, name in enumerate(FORMS):
        mask = scene.form == form
        distance[mask] = OUTLINES[name](x[mask], y[mask], radius[mask])
    return distance


def _circle(x: Floats, y: Floats, radius: Floats) -> Floats:
    distance: Floats = np.hypot(x, y) - radius * np.float32(0.9)
    return distance


def _square(x: Floats, y: Floats, radius: Floats) -> Floats:
    distance: Floats = np.maximum(np.abs(x), np.abs(y)) - radius * np.float32(0.8)
    return distance


def _triangle(x: Floats, y: Floats, radius: Floats) -> Floats:
    slant = np.abs(x) * np.float32(np.sqrt(3) / 2) - y / 2  # two sides at once
    distance: Floats = np.maximum(slant, y) - radius * np.float32(0.62)
    return distance


def _star(x: Floats, y: Floats, radius: Floats) -> Floats:
    # Fold the plane into half a point; there the outline is one line from tip to notch.
    tenth = np.float32(np.pi / 5)
    bearing = np.abs(np.mod(np.arctan2(x, y) + tenth + np.float32(np.pi), 2 * tenth) - tenth)
    rho = np.hypot(x, y)
    tip, notch = radius * np.float32(1.2), radius * np.float32(0.5)
    along, across = rho * np.cos(bearing) - tip, rho * np.sin(bearing)
    run, rise = notch * np.cos(tenth) - tip, notch * np.sin(tenth)
    distance: Floats = (along * rise - across * run) / np.hypot(run, rise)
    return distance


OUTLINES: Final = {"circle": _circle, "triangle": _triangle, "square": _square, "star": _star}


def _texture(scene: _Scene, x: Floats, y: Floats, outline: Floats, edge: np.float32) -> Floats:
    """Return how much of each pixel [n, size, size] has the second colour, if inside the figure."""
    accent = np.zeros(outline.shape, np.float32)
    u, v = _rotated(x - _broadcast(scene.x), y - _broadcast(scene.y), scene.pattern_angle)
    pitch, phase = _broadcast(scene.pitch), _broadcast(scene.pattern_phase)

    def line_distance(t: Floats, step: Floats, shift: Floats) -> Floats:
        """Return the distance to the nearest of parallel lines that are `step` apart."""
        near: Floats = np.abs(np.mod(t / step + shift, 1) - np.float32(0.5)) * step
        return near

    mask = scene.texture == TEXTURES.index("striped")
    lines = line_distance(u[mask], pitch[mask], phase[mask])
    accent[mask] = _coverage(lines - pitch[mask] / 4, edge)

    mask = scene.texture == TEXTURES.index("dotted")
    step, shift = pitch[mask] * np.float32(1.15), phase[mask]
    dots = np.hypot(line_distance(u[mask], step, shift), line_distance(v[mask], step, shift))
    accent[mask] = _coverage(dots - step * np.float32(0.31), edge)

    mask = scene.texture == TEXTURES.index("hollow")
    accent[mask] = _coverage(outline[mask] + np.float32(2.2), edge)
    return accent


def _paint_piece(
    canvas: Floats,
    u: Floats,
    x: Floats,
    y: Floats,
    edge: np.float32,
    *,
    share: float,
    reach: float,
) -> None:
    """Paint a line or a blob onto a random `share` of the drawings."""
    on = u[:, 0] < share
    u = u[on]
    at_x, at_y = (u[:, 1] * 2 - 1) * np.float32(reach), (u[:, 2] * 2 - 1) * np.float32(reach)
    across, along = _rotated(
        x - _broadcast(at_x), y - _broadcast(at_y), u[:, 3] * np.float32(2 * np.pi)
    )
    is_line = u[:, 4] < 0.5
    half_width = np.where(is_line, 0.6 + u[:, 5], 1 + 1.5 * u[:, 5]).astype(np.float32)
    half_length = np.where(is_line, 5 + 9 * u[:, 6], half_width).astype(np.float32)
    distance = np.maximum(
        np.abs(across) - _broadcast(half_width), np.abs(along) - _broadcast(half_length)
    )
    colour = _PALETTE[np.minimum((u[:, 7] * len(_NAMES)).astype(np.int64), len(_NAMES) - 1)]
    canvas[on] += _coverage(distance, edge)[:, None] * (colour[:, :, None, None] - canvas[on])

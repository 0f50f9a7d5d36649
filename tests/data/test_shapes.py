"""The drawings: the same for the same seed, balanced, captioned, and of classes that differ."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from richkd.data import shapes
from richkd.data.shapes import CLASS_NAMES, FORMS, TEXTURES, draw


@pytest.fixture(scope="module")
def many() -> shapes.Drawing:
    return draw(4000, seed=5)


def test_a_smaller_drawing_begins_a_larger_one(many: shapes.Drawing) -> None:
    few = draw(300, seed=5)  # more than one batch, the last one short
    np.testing.assert_array_equal(few.images, many.images[:300])
    np.testing.assert_array_equal(few.labels, many.labels[:300])
    assert few.captions == many.captions[:300]


def test_another_seed_draws_others(many: shapes.Drawing) -> None:
    other = draw(300, seed=6)
    assert not (other.images == many.images[:300]).all(axis=(1, 2, 3)).any()
    assert (other.labels != many.labels[:300]).mean() > 0.8


@pytest.mark.parametrize(("count", "size"), [(0, 32), (3, 8), (2, 33), (2, 64)])
def test_shapes_and_types(count: int, size: int) -> None:
    drawing = draw(count, seed=0, size=size)
    assert drawing.images.shape == (count, size, size, 3)
    assert drawing.images.dtype == np.uint8
    assert drawing.labels.shape == (count,)
    assert drawing.labels.dtype == np.int64
    assert len(drawing.captions) == count


def test_the_size_changes_the_resolution_only() -> None:
    small, large = draw(64, seed=1, size=32), draw(64, seed=1, size=128)
    assert small.captions == large.captions
    shrunk = large.images.reshape(64, 32, 4, 32, 4, 3).mean((2, 4))
    # What differs is the noise, which differs from pixel to pixel, and the soft edges.
    assert np.abs(shrunk - small.images).mean() < 15
    assert np.abs(shrunk - np.roll(small.images, 1, axis=0)).mean() > 50


@pytest.mark.parametrize(
    "bad", [{"count": -1, "seed": 0}, {"count": 1, "seed": -1}, {"count": 1, "seed": 0, "size": 7}]
)
def test_bad_numbers_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected count"):
        draw(**bad)


def test_classes_are_balanced(many: shapes.Drawing) -> None:
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == len(TEXTURES) * len(FORMS)
    counts = np.bincount(many.labels, minlength=len(CLASS_NAMES))
    expected = len(many.labels) / len(CLASS_NAMES)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_captions_name_the_class_and_say_more(many: shapes.Drawing) -> None:
    for label, caption in zip(many.labels, many.captions, strict=True):
        named = [name for name in CLASS_NAMES if name in caption]
        assert named == [CLASS_NAMES[label]]
        assert "  " not in caption
    for word in ("red", "small", "large", "faint", "background", "upper", "lower", "photo"):
        share = np.mean([word in caption.split() for caption in many.captions])
        assert 0 < share < 0.8, word
    assert len(set(many.captions)) > len(many.captions) / 4
    for index in range(len(CLASS_NAMES)):
        assert f"a photo of a {CLASS_NAMES[index]}" in many.captions


def test_captions_tell_the_truth_about_places(many: shapes.Drawing) -> None:
    scene_x = {"left": -1, "right": 1}
    plain = draw(4000, seed=5)
    found = 0
    for image, caption in zip(plain.images, plain.captions, strict=True):
        side = [word for word in scene_x if f"on the {word}" in caption]
        if not side or "faint" in caption:
            continue
        # The ground fills the corners; the figure is what differs from it.
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
        away = np.abs(image.astype(float) - np.median(corners, axis=0)).sum(2)
        balance = (away * np.linspace(-1, 1, 32)).sum() / away.sum()
        found += 1 if balance * scene_x[side[0]] > 0 else -1
    assert found > 20


def test_images_of_the_classes_differ() -> None:
    """The classes can be told apart by what they were drawn with, in the absence of clutter."""
    drawing = draw(2000, seed=9, size=32)
    pixels = drawing.images.astype(np.float32).mean(3)
    edges = np.abs(np.diff(pixels, axis=1)).mean((1, 2)) + np.abs(np.diff(pixels, axis=2)).mean(
        (1, 2)
    )
    texture = drawing.labels // len(FORMS)
    by_texture = {name: edges[texture == i].mean() for i, name in enumerate(TEXTURES)}
    assert by_texture["dotted"] > by_texture["solid"] * 1.1
    assert by_texture["striped"] > by_texture["solid"] * 1.1
    # All forms cover about the same area, so the difference from the ground does not tell.
    form = drawing.labels % len(FORMS)
    solid = texture == TEXTURES.index("solid")
    spread = [pixels[solid & (form == i)].std(axis=(1, 2)).mean() for i in range(len(FORMS))]
    assert max(spread) < 1.25 * min(spread)


@pytest.mark.parametrize("form", FORMS)
def test_outlines_are_of_their_form_and_not_chiral(form: str) -> None:
    axis = np.linspace(-2, 2, 401, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = shapes.OUTLINES[form](x, y, np.float32(1))
    np.testing.assert_allclose(distance, distance[:, ::-1], atol=1e-5)  # a mirror changes nothing
    inside = distance < 0
    area = inside.mean() * 16
    assert 1.6 < area < 2.8
    assert inside[200, 200]
    assert not inside[[0, -1]].any()
    # How much of the smallest disc around it a form fills is what tells the four apart.
    filled = area / (np.pi * np.hypot(x, y)[inside].max() ** 2)
    expected = {"circle": 1.0, "square": 0.64, "triangle": 0.41, "star": 0.39}[form]
    assert filled == pytest.approx(expected, abs=0.04)


def test_drawing_does_not_import_torch() -> None:
    code = (
        "import sys; from richkd.data.shapes import draw; draw(1, seed=0); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

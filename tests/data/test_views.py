"""Views: the gather against torchvision's operations, and how views are drawn."""

import hashlib
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import refuses
from torchvision.transforms.v2 import functional

import richkd
from richkd.core.memory import ROWS_AT_ONCE
from richkd.data.views import NUM_VIEW_IDS, PadCropFlip, ResizedCropFlip, resized_crop


def test_every_view_equals_pad_crop_flip(rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (3, 32, 32, 3), np.uint8))
    for dy in range(9):
        for dx in range(9):
            for flip in range(2):
                view = (dy * 9 + dx) * 2 + flip
                expected = functional.pad(images.permute(0, 3, 1, 2), [4, 4, 4, 4])
                expected = functional.crop(expected, dy, dx, 32, 32)
                if flip:
                    expected = functional.horizontal_flip(expected)
                got = richkd.apply_views(images, torch.full((3,), view))
                assert torch.equal(got, expected.permute(0, 2, 3, 1)), view
                assert got.dtype == torch.uint8


def test_view_80_is_clean_and_views_differ_a_sample(rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (4, 20, 24, 3), np.uint8))
    assert torch.equal(richkd.apply_views(images, torch.full((4,), 80)), images)
    mixed = richkd.apply_views(images, np.array([0, 80, 81, 161], np.uint16))
    for row, view in enumerate([0, 80, 81, 161]):
        alone = richkd.apply_views(images[row : row + 1], torch.tensor([view]))
        assert torch.equal(mixed[row : row + 1], alone)


def test_views_never_repeat_and_depend_on_seed_sample_and_view_only() -> None:
    space = PadCropFlip()
    views = space.draw(7, 100, NUM_VIEW_IDS)
    assert views.shape == (162, 100) and views.dtype == np.uint16
    assert (np.sort(views, axis=0) == np.arange(162)[:, None]).all()
    assert (space.draw(7, 40, 5) == views[:5, :40]).all()
    assert (space.draw(8, 100, 5) != views[:5]).mean() > 0.9
    # samples draw independently: no two share their order
    assert len({tuple(column) for column in views.T}) == 100


def test_views_are_uniform() -> None:
    views = PadCropFlip().draw(0, 20_000, 1)[0]
    counts = np.bincount(views, minlength=162)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 250  # 161 degrees of freedom: beyond six standard deviations


def test_more_views_than_there_are() -> None:
    with refuses("too-many-views", 163, "--views 162"):
        PadCropFlip().draw(0, 2, 163)


def test_resized_crops_lie_inside_and_have_the_asked_areas_and_aspects() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(40, 500, (500, 2))
    sizes[0] = (40, 900)  # so wide that no attempt may fit
    space = ResizedCropFlip(sizes, 32)
    views = space.draw(1, 500, 4)
    top, left, height, width, flip = views.transpose(2, 0, 1).astype(np.float64)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()
    share = (height * width / sizes.prod(1))[:, 1:]
    assert 0.06 < share.min() and share.max() <= 1
    aspect = (width / height)[:, 1:]
    assert 0.7 < aspect.min() and aspect.max() < 1.4
    assert set(np.unique(flip)) == {0.0, 1.0} and 0.4 < flip.mean() < 0.6
    assert (ResizedCropFlip(sizes[:50], 32).draw(1, 50, 2) == views[:2, :50]).all()


def one_view(seed: int, view: int, sample: int, size: tuple[int, int]) -> list[float]:
    """A view of one photograph as torchvision's loop finds it, from the numbers of its row."""
    stream = np.random.Philox(np.random.SeedSequence([seed, view]))
    raw = stream.random_raw((sample + 1) * 41)[-41:]
    areas, aspects, downs, rights = ((raw[:40] >> np.uint64(11)) / 2**53).reshape(4, 10)
    height, width = size
    flip = float((raw[40] >> np.uint64(11)) / 2**53 < 0.5)
    for area, aspect, down, right in zip(areas, aspects, downs, rights, strict=True):
        wanted = height * width * (0.08 + 0.92 * area)
        ratio = np.exp(np.log(3 / 4) + np.log(16 / 9) * aspect)
        tall, wide = round(np.sqrt(wanted / ratio)), round(np.sqrt(wanted * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
            return [top, left, tall, wide, flip]
    tall, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return [(height - tall) // 2, (width - wide) // 2, tall, wide, flip]


def test_resized_crops_drawn_in_spans_are_those_of_one_stream(rng: np.random.Generator) -> None:
    count = 2 * ROWS_AT_ONCE + 9  # three spans
    sizes = rng.integers(1, 700, (count, 2))
    sizes[:9] = [(40, 900), (900, 40), (1, 1), (1, 9), (9, 1), (2, 3), (300, 20), (3, 800), (5, 5)]
    seed = int(rng.integers(2**32))
    views = ResizedCropFlip(sizes, 32).draw(seed, count, 2)
    bounds = (ROWS_AT_ONCE, 2 * ROWS_AT_ONCE)
    for i in [*range(90), *(i for bound in bounds for i in range(bound - 5, bound + 5)), count - 1]:
        wanted = [one_view(seed, v, i, tuple(sizes[i])) for v in range(2)]
        assert np.array_equal(views[:, i], wanted), i


def test_caches_keep_their_views() -> None:
    """The views of existing caches: the digest is of those that richkd 0.1.0 drew."""
    number = np.arange(3000)
    sizes = np.stack([20 + number * 37 % 601, 20 + number * 91 % 733], axis=1)
    sizes[:3] = [(40, 900), (900, 30), (1, 1)]
    drawn = hashlib.sha256(ResizedCropFlip(sizes, 32).draw(11, 3000, 3).tobytes()).hexdigest()
    assert drawn == "b4d04b179cd14abe41af7b989629c3eb8a4761d9eebdc6c87c95aa1e1242eaa3"


def test_drawing_views_takes_little_more_than_the_views() -> None:
    space = ResizedCropFlip(np.full((100_000, 2), 300), 32)
    tracemalloc.start()
    try:
        views = space.draw(0, 100_000, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # of a span: 41 numbers, and 8 arrays of 10 attempts or similar, 8 bytes each
    assert peak - views.nbytes < 4096 * 8 * 160 < 100_000 * 8 * 41


def test_resized_crop_is_torchvisions(rng: np.random.Generator) -> None:
    image = torch.from_numpy(rng.integers(0, 256, (3, 50, 70), np.uint8))
    got = resized_crop(image, np.array([5, 7, 30, 40, 1], np.float32), 16)
    expected = functional.resize(image[:, 5:35, 7:47], [16, 16], antialias=True).flip(-1)
    assert torch.equal(got, expected.permute(1, 2, 0))
    clean = ResizedCropFlip(np.array([[48, 80]]), 16).clean(1)[0]
    assert clean.tolist() == [3, 19, 42, 42, 0]


@pytest.mark.parametrize("spans", [0, 1, 2])
def test_threads_draw_the_views_of_one_stream(rng: np.random.Generator, spans: int) -> None:
    seed, count = int(rng.integers(2**32)), spans * ROWS_AT_ONCE + int(rng.integers(1, 900))
    keys = np.random.Philox(seed).random_raw(count * 162).reshape(count, 162)
    right = np.argsort(keys, axis=1, kind="stable").T
    assert (PadCropFlip().draw(seed, count, 162) == right).all()
    assert (PadCropFlip().draw(seed, count, 3) == right[:3]).all()

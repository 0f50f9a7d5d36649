"""Image files through the loaders: every view against PIL and torchvision alone; one decode."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from richkd.data.datasets import ImageFiles, files_split
from richkd.data.decoding import Decoding, Photograph
from richkd.data.folders import list_images
from richkd.data.inputs import FileInputs
from richkd.data.views import ResizedCropFlip, views_tensor
from richkd.teachers.clip import load_clip

CPU = torch.device("cpu")
VIEWS, SIDE = 3, 24


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> ImageFiles:
    """37 photographs in odd sizes and modes."""
    for number, mode in zip(range(37), ["RGB", "L", "CMYK", "P", "RGBA"] * 8, strict=False):
        folder = tmp_path / "photos" / f"c{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), np.uint8)
        suffix = "png" if mode in ("P", "RGBA") else "jpg"
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.{suffix}")
    images = files_split(list_images(tmp_path / "photos", "refuse"), SIDE, Decoding()).images
    assert isinstance(images, ImageFiles)
    return images


@pytest.fixture
def views(files: ImageFiles, rng: np.random.Generator) -> Tensor:
    space = ResizedCropFlip(files.sizes, SIDE)
    return views_tensor(space.draw(int(rng.integers(2**32)), len(files), VIEWS))


def alone(files: ImageFiles, index: int, view: Tensor) -> Tensor:
    """A view by PIL and torchvision: the whole image in RGB, cropped, resized, mirrored."""
    image = Image.open(files.name(index)).convert("RGB")
    pixels = functional.pil_to_tensor(image)
    top, left, height, width, flip = view.int().tolist()
    crop = functional.crop(pixels, top, left, height, width)
    crop = functional.resize(crop, [SIDE, SIDE], antialias=True)
    return (functional.horizontal_flip(crop) if flip else crop).permute(1, 2, 0)


both = pytest.mark.parametrize("workers", [0, 2])


@both
def test_one_decode_gives_every_view_and_clips_pixels(
    files: ImageFiles, views: Tensor, workers: int, clip_dir: Path
) -> None:
    transform = load_clip(str(clip_dir), CPU).transform
    spans = [range(5, 16), range(20, 21), range(30, 37), range(0, 3)]
    batches = [*FileInputs(files, CPU, workers=workers).decode_once(spans, views, 4, transform)]
    ids = [index.tolist() for index, _, _ in batches]
    assert [*chain(*ids)] == [*chain(*spans)]
    assert [len(each) for each in ids] == [4, 4, 3, 1, 4, 3, 3]
    for index, crops, pixels in batches:
        assert crops.shape == (len(index), VIEWS, SIDE, SIDE, 3) and crops.dtype == torch.uint8
        assert pixels is not None and pixels.dtype == torch.float32
        for i, own, seen in zip(index.tolist(), crops, pixels, strict=True):
            expected = torch.stack([alone(files, i, view) for view in views[:, i]])
            assert torch.equal(own, expected)
            assert torch.equal(seen, transform(files.open(i)))


@both
def test_batches_of_an_epoch_are_the_same_views(
    files: ImageFiles, views: Tensor, workers: int
) -> None:
    order = torch.randperm(len(files))
    loader = FileInputs(files, CPU, workers=workers)
    together = [*loader.batches(order, views[1], 8)]
    assert torch.equal(torch.cat([index for index, _ in together]), order)
    for i, image in zip(order.tolist(), torch.cat([batch for _, batch in together]), strict=True):
        assert torch.equal(image, alone(files, i, views[1, i]))
    once = loader.decode_once([range(len(files))], views, 8, None)
    _, crops, pixels = zip(*once, strict=True)
    assert torch.equal(torch.cat(crops)[order, 1], torch.cat([batch for _, batch in together]))
    assert {*pixels} == {None}


def test_every_image_is_decoded_once(files: ImageFiles, views: Tensor) -> None:
    opened: list[int] = []

    class Recorded(ImageFiles):
        def photograph(self, index: int, most: float = 1.0) -> Photograph:
            opened.append(index)
            return super().photograph(index, most)

    loader = FileInputs(Recorded(**vars(files)), CPU, workers=0)
    spans = [range(9), range(20, 37)]
    clean = torch.zeros(1, 3, 4, 4)
    for _ in loader.decode_once(spans, views, 5, lambda image: clean[0]):
        pass
    assert opened == [*range(9), *range(20, 37)]
    opened.clear()
    no_views = views[:0]  # CLIP's pixels alone
    for _, crops, _ in loader.decode_once(spans, no_views, 5, lambda _: clean[0]):
        assert crops.shape[1:] == (0, SIDE, SIDE, 3)
    assert opened == [*range(9), *range(20, 37)]


def test_one_set_of_workers_for_all_spans(files: ImageFiles, views: Tensor) -> None:
    spans = [range(start, start + 6) for start in range(0, 36, 6)]

    asked = {os.getpid()}  # which calls the transform for the size of its result
    for _, _, pixels in FileInputs(files, CPU, workers=2).decode_once(
        spans, views, 3, lambda _: torch.tensor(os.getpid())
    ):
        assert pixels is not None
        asked |= {*pixels.tolist()}
    assert len(asked) == 3


def test_batches_shrink_where_they_would_take_too_much(files: ImageFiles, views: Tensor) -> None:
    loader = FileInputs(files, CPU, workers=0)
    pixels = torch.zeros(3, 10, 10)
    image = VIEWS * SIDE * SIDE * 3 + 4 * 3 * 10 * 10
    sizes = {}
    for images in (0, 1, 5, 99):
        memory = 17 * image * images + 100
        batches = loader.decode_once([range(35)], views, 7, lambda _: pixels, memory)
        sizes[images] = {len(index) for index, *_ in batches}
    assert sizes == {0: {1}, 1: {1}, 5: {5}, 99: {7}}


def test_threads_are_as_before_after_decoding(files: ImageFiles, views: Tensor) -> None:
    before = torch.get_num_threads()
    inside = []
    try:
        torch.set_num_threads(2)
        for _ in FileInputs(files, CPU).decode_once(
            [range(2)],
            views,
            2,
            lambda _: torch.tensor(inside.append(torch.get_num_threads()) or 0),
        ):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {*inside[1:]} == {1}  # the first call is for the size of the result

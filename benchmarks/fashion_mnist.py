"""Make the cache for the Fashion-MNIST tables: 500 labels, and a CLIP trained on other images.

A resnet20 learns from the first 500 images. A small CLIP learns from captions of images 20,000 to
50,000, of which 15 % name a wrong class. The cache holds all 162 views of the 500 images, which
include those of every smaller cache and of a teacher in the loop.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from richkd.config import recipes
from richkd.config.settings import Images, Precompute, resolve
from richkd.core.progress import Report
from richkd.data.datasets import load_dataset
from richkd.precompute import precompute
from richkd.teachers.tiny_clip import train_tiny_clip

CAPTIONS = (
    "a photo of a {}",
    "a picture of a {}",
    "a close-up photo of a {}",
    "a blurry photo of a {}",
    "a grey {}",
    "one {} on a black ground",
    "a {} to wear",
    "a small picture of a {}",
)
WRONG = 0.15


def train_clip(out: Path, *, first: int = 20_000, last: int = 50_000, epochs: int = 2) -> None:
    """Train a small CLIP on captions of images first..last−1, which students never see."""
    dataset = load_dataset(Images(dataset="fashion-mnist"))
    rng = np.random.default_rng(0)
    labels = dataset.train.labels[first:last].numpy().copy()
    wrong = rng.random(len(labels)) < WRONG
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    captions = [
        CAPTIONS[rng.integers(len(CAPTIONS))].replace("{}", dataset.class_names[label])
        for label in labels
    ]
    images = dataset.train.images
    assert isinstance(images, torch.Tensor)
    train_tiny_clip(images[first:last], captions, out, epochs=epochs)


def main() -> None:
    """Write clip/, teachers/ and all-views.zarr to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # where precompute makes teachers/
    if not Path("clip").is_dir():
        train_clip(Path("clip"))
    content = recipes.load("fashion-mnist")
    settings = resolve(
        Precompute,
        content.table("precompute"),
        {"clip": "clip", "views": 162, "out": "all-views.zarr"},
    )
    precompute(settings, teacher_recipe=content.table("train-teacher"), report=Report())


if __name__ == "__main__":
    main()

"""The main job on real images: Fashion-MNIST, few labels, a CLIP that saw other images.

A teacher learns from the first 500 images, a small CLIP from captions of images 20,000 to 50,000
(15 % of the captions name a wrong class), and students by CE, KD and RichKD from the store of both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import richkd
from richkd.data.datasets import load_dataset
from richkd.recipe import Images
from richkd.teachers.tiny_clip import train_tiny_clip

CAPTIONS = (
    "a photo of a {}", "a picture of a {}", "a close-up photo of a {}", "a blurry photo of a {}",
    "a grey {}", "one {} on a black ground", "a {} to wear", "a small picture of a {}",
)  # fmt: skip


def clip_of_other_images(out: Path) -> None:
    dataset = load_dataset(Images(dataset="fashion-mnist"))
    rng = np.random.default_rng(0)
    labels = dataset.train.labels[20_000:50_000].numpy().copy()
    wrong = rng.random(len(labels)) < 0.15
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    captions = [CAPTIONS[rng.integers(len(CAPTIONS))].replace("{}", dataset.class_names[label])
                for label in labels]  # fmt: skip
    images = dataset.train.images
    assert isinstance(images, torch.Tensor)
    train_tiny_clip(images[20_000:50_000], captions, out, epochs=2)


@pytest.mark.slow
@pytest.mark.real_data
def test_teacher_clip_store_and_students(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    clip_of_other_images(tmp_path / "clip")
    took = {"CLIP": time.perf_counter() - start}
    done = run("precompute", "--recipe", "fashion-mnist", "--clip", tmp_path / "clip", "--json")
    took["stage one, its teacher included"] = time.perf_counter() - start - sum(took.values())
    assert done.code == 0, done.err
    summary = done.json
    assert summary["manifest"]["views"]["count"] == 8

    cache = richkd.open_cache("cache/fashion-mnist.zarr")
    labels = cache.read("test/labels").numpy()
    assert len(labels) == 10_000
    for kind, array in (("cnn", "teacher_logits"), ("clip", "clip_similarity"),
                        ("fused", "fused_logits")):  # fmt: skip
        recount = (cache.read(f"test/{array}").numpy().argmax(1) == labels).mean()
        assert summary["accuracy"][kind] == pytest.approx(recount, abs=1e-6)
    accuracy = dict(summary["accuracy"])
    for method in ("ce", "kd", "richkd-l", "richkd"):
        done = run("distill", "--recipe", "fashion-mnist", "--cache", "cache/fashion-mnist.zarr",
                   "--method", method, "--json")  # fmt: skip
        assert done.code == 0, done.err
        accuracy[method] = done.json["top1_last"]
        took[method] = done.json["seconds"]
    seconds = time.perf_counter() - start
    print(json.dumps({"accuracy": accuracy, "seconds": took, "all": seconds}, indent=2))
    assert all(value > 0.5 for value in accuracy.values())
    assert seconds <= 600

"""A cache as a PyTorch dataset: each sample has the rows that were computed on its view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import zarr
from helpers import refuses
from torch.utils.data import DataLoader

import richkd


def test_rows_belong_to_the_view_that_is_shown(store: Path, rng: np.random.Generator) -> None:
    raw = zarr.open_group(store, mode="r")
    view = int(rng.integers(3))
    samples = richkd.torch_dataset(store, view)
    index = rng.permutation(len(samples))[:7].tolist()
    batch = next(iter(DataLoader(samples, batch_size=7, sampler=index)))
    assert batch["index"].tolist() == index
    mean, std = (np.array(raw.attrs[name], np.float32) for name in ("mean", "std"))
    for place, number in enumerate(index):
        view_id = int(raw["train/view_ids"][view, number])
        top, left, flip = view_id // 18, view_id // 2 % 9, view_id % 2
        padded = np.pad(raw["train/images"][number], ((4, 4), (4, 4), (0, 0)))
        seen = padded[top : top + 32, left : left + 32][:, :: -1 if flip else 1]
        expected = ((seen / 255 - mean) / std).transpose(2, 0, 1)
        assert np.abs(batch["image"][place].numpy() - expected).max() < 1e-4
        assert batch["label"][place] == raw["train/labels"][number]
        for name in ("teacher_logits", "teacher_features", "fused_logits"):
            stored = raw[f"train/{name}"][view, number].astype(np.float32)
            assert (batch[name][place].numpy() == stored).all()
        stored = raw["train/clip_features"][number].astype(np.float32)
        assert (batch["clip_features"][place].numpy() == stored).all()
    one = samples[index[0]]
    assert torch.equal(one["image"], batch["image"][0]) and one["image"].dtype == torch.float32


def test_another_view_shares_the_images(store: Path) -> None:
    samples = richkd.torch_dataset(richkd.open_cache(store), 0, arrays=["fused_logits"])
    assert set(samples[0]) == {"image", "label", "index", "fused_logits"}
    other = samples.at_view(1)
    assert other.images is samples.images
    assert not torch.equal(other[3]["fused_logits"], samples[3]["fused_logits"])


def test_test_samples_are_clean(store: Path) -> None:
    raw = zarr.open_group(store, mode="r")
    samples = richkd.torch_dataset(store, split="test", arrays=())
    assert len(samples) == 40
    mean, std = (np.array(raw.attrs[name]) for name in ("mean", "std"))
    pixels = samples[5]["image"].permute(1, 2, 0).double().numpy() * std + mean
    assert np.abs(255 * pixels - raw["test/images"][5]).max() < 1e-3


def test_what_cannot_be_is_refused(store: Path, tmp_path: Path) -> None:
    with refuses("view-out-of-range", "0..2"):
        richkd.torch_dataset(store)
    with refuses("view-out-of-range", "view = 0", "test"):
        richkd.torch_dataset(store, 0, split="test")
    with refuses("unknown-name", "'val'"):
        richkd.torch_dataset(store, 0, split="val")
    with refuses("unknown-name", "'logits'"):
        richkd.torch_dataset(store, 0, arrays=["logits"])
    with refuses("view-out-of-range", "3"):
        richkd.torch_dataset(store, 3)[0]
    with refuses("cache-missing", tmp_path / "none.zarr"):
        richkd.torch_dataset(tmp_path / "none.zarr", 0)

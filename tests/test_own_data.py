"""Both stages on tables of Hugging Face and on WebDataset shards, against the same folder."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
import torch
from helpers import Refusal, refuses, tree, write_teacher
from optional import require
from own_data import Samples, drawn, table
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import richkd
from richkd.training.images import load_dataset_of

require("datasets", "webdataset")
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def tables_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def data(rng: np.random.Generator) -> dict[str, Samples]:
    return drawn(rng)


@pytest.fixture
def stage_one(tmp_path: Path, run: Run) -> Callable[..., Path]:
    weights = write_teacher(tmp_path / "teacher.safetensors", "resnet8", 2)

    def stage_one(dataset: str, given: str = "") -> Path:
        out = tmp_path / f"{dataset.partition(':')[0]}.zarr"
        flags = f"--teacher resnet8 --clip none --views 2 --image-size 32 {given}".split()
        own = ("--dataset", dataset, "--out", out, "--teacher-weights", weights)
        done = run("precompute", *own, *flags)
        assert done.code == 0, done.err
        return out

    return stage_one


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "wds"])
def test_both_stages(
    form: str,
    data: dict[str, Samples],
    stage_one: Callable[..., Path],
    run: Run,
    fails: Callable[..., Refusal],
    tmp_path: Path,
) -> None:
    write = own_data.write_parquet if form == "hf" else own_data.write_shards
    place = write(tmp_path / "own", data)
    out, folder = stage_one(place), stage_one(own_data.write_folder(tmp_path / "folder", data))
    cache, other = richkd.open_cache(out), richkd.open_cache(folder)
    for name in ("train/teacher_logits", "train/view_params", "test/teacher_logits", "test/labels"):
        assert torch.equal(cache.read(name), other.read(name)), name
    entry = cache.manifest["dataset"]
    assert entry["name"] == place and not entry["embedded"]
    wanted = {"image": "image", "label": "label"} if form == "hf" else {"label": "cls"}
    assert entry["columns"] == wanted

    # the rows of clean images, independently: Pillow, the manifest's input, the bare network
    network = richkd.create_model("resnet8", 2).eval()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    mean, std = (torch.tensor(cache.manifest[key])[:, None, None] for key in ("mean", "std"))
    for row, (image, _) in enumerate([data["val"][0], data["val"][3]]):
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        side = round(0.875 * min(pixels.shape[:2]))
        top, left = ((edge - side) // 2 for edge in pixels.shape[:2])
        crop = Image.fromarray(pixels[top : top + side, left : left + side])
        square = pil_to_tensor(crop.resize((32, 32), Image.Resampling.BILINEAR)).float() / 255
        with torch.no_grad():
            logits = network(((square - mean) / std)[None])[0]
        stored = cache.read("test/teacher_logits")[row].float()
        torch.testing.assert_close(stored, logits, atol=0.05, rtol=0.05)  # another resize

    assert run("verify", out).code == 0
    before = tree(out)
    chunk = out / "train/teacher_logits/c/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert fails("verify", out).code == "cache-verify-failed"
    assert run("repair", out).code == 0
    assert tree(out) == before
    trained = tmp_path / "run"
    student = ["--student", "resnet8", "--method", "kd", "--epochs", "1"]
    done = run("distill", "--cache", out, "--out", trained, *student)
    assert done.code == 0, done.err
    assert run("evaluate", trained).code == 0
    planned = run("plan", "--dataset", place, *["--teacher", "resnet8", "--clip", "none"])
    assert planned.code == 0, planned.err

    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "own", moved)
    again = ("distill", "--cache", out, "--out", tmp_path / "b", *student)
    assert fails(*again).code in ("dataset-folder-missing", "table-unreadable")
    assert run(*again, "--dataset", f"{form}:{moved}").code == 0
    assert load_dataset_of(cache, f"{form}:{moved}").fingerprint == entry["fingerprint"]
    # as another kind, with the same content
    shards = own_data.write_shards(tmp_path / "s", data)
    assert load_dataset_of(cache, shards).fingerprint == entry["fingerprint"]
    changed = {**data, "train": data["train"][:-1]}
    with refuses("images-differ", "fingerprint"):
        load_dataset_of(cache, own_data.write_shards(tmp_path / "c", changed))


def test_a_saved_table_and_what_was_left_out(
    data: dict[str, Samples], stage_one: Callable[..., Path], tmp_path: Path
) -> None:
    data["train"][2] = (b"broken", 0)
    names = {own_data.SPLITS[split]: table(some) for split, some in data.items()}
    place = own_data.write_saved(tmp_path / "own", names)
    cache = richkd.open_cache(stage_one(place, "--broken skip"))
    assert cache.manifest["dataset"]["skipped"] == ["train/2"]
    assert cache.manifest["dataset"]["folders"] == {"train": "train", "test": "validation"}
    dataset = load_dataset_of(cache)
    assert dataset.fingerprint == cache.manifest["dataset"]["fingerprint"]
    assert len(dataset.train) == 11 and dataset.skipped == ("train/2",)


def test_small_images_are_embedded(
    rng: np.random.Generator, tmp_path: Path, stage_one: Callable[..., Path], run: Run
) -> None:
    data = drawn(rng, ["PNG"], side=32)
    cache = richkd.open_cache(stage_one(own_data.write_parquet(tmp_path / "own", data)))
    assert cache.manifest["dataset"]["embedded"]
    shutil.rmtree(tmp_path / "own")  # is not needed any more
    wanted = [np.asarray(Image.open(io.BytesIO(image))) for image, _ in data["val"]]
    mixed = np.stack([wanted[label * 3 + rank] for rank in range(3) for label in range(2)])
    assert (cache.read("test/images").numpy() == mixed).all()
    assert run("verify", cache.location).code == 0

"""Pretrained teachers by name, from a cache of the hub in its published layout: no network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import FOLDERS, published, refuses, stage_one_of, tree, write_photos
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import functional as pil

import richkd
from richkd.config.settings import Images, Precompute
from richkd.core.progress import Report
from richkd.data.datasets import load_dataset
from richkd.models.hub_access import planning
from richkd.models.weights import save_tensors, state_sha256
from richkd.teachers.find import check_weights_name
from richkd.teachers.pretrained import configuration, load_named
from richkd.tools.plan import plan
from richkd.tools.verify import raise_faults, repair_store, verify_store

Fails = Callable[..., Any]
SIDE = 32


def close(a: Tensor, b: Tensor) -> None:
    """Equal to f16 rounding, of the sums in the network too."""
    torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


# one of 0.5, bilinear; a transformer; ImageNet's constants; another family; and 0 and 1, squashed
NAMES = (
    "hf-hub:me/nfnet",
    "timm/test_resnet.r160_in1k",
    "test_vit.r160_in1k",
    "test_efficientnet.r160_in1k",
    "timm/test_convnext.r160_in1k",
)
ZERO_ONE: dict[str, Any] = {
    "architecture": "test_nfnet",
    "input_size": [3, 96, 96],
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_a_plain_timm_pipeline(
    hub: Path, tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    published(hub, name, **(ZERO_ONE if name == NAMES[0] else {}))
    folder = write_photos(tmp_path / "photos", FOLDERS, rng, train=2, test=2)
    cache = stage_one_of(
        tmp_path / "s.zarr", f"imagefolder:{folder}", name, teacher_head="rows", dtype="float16"
    )
    source = name if name.startswith("hf-hub:") else f"hf-hub:timm/{name.removeprefix('timm/')}"
    model = timm.create_model(source, pretrained=True).eval()
    entry = cache.manifest["teacher"]
    own = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    size = own["input_size"][1]
    assert entry["input"]["size"] == size > SIDE == cache.manifest["image_size"]
    assert entry["input"]["mean"] == [*own["mean"]] and entry["input"]["std"] == [*own["std"]]
    assert entry["sha256"] == state_sha256(model) and entry["name"] == name
    rows = [FOLDERS[each] for each in sorted(FOLDERS)]
    assert entry.get("outputs") == rows

    dataset = load_dataset(Images(dataset=f"imagefolder:{folder}", image_size=SIDE))
    test, train = (
        [Image.open(split.images.name(i)).convert("RGB") for i in range(len(split))]
        for split in (dataset.test, dataset.train)
    )
    transform: Any = create_transform(**own)
    pixels = [transform(image) for image in test]
    with torch.no_grad():
        logits, features = richkd.forward(model, torch.stack(pixels))
    close(cache.read("test/teacher_logits"), logits[:, rows])
    close(cache.read("test/teacher_features"), features)

    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ("mean", "std"))
    resample = Image.Resampling[own["interpolation"].upper()]
    for v in range(cache.num_views):
        slab, pixels = cache.slab(v), []
        for image, view in zip(train, slab.views.int().tolist(), strict=True):
            top, left, height, width, flip = view
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((size, size), resample)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
            pixels.append((pil.to_tensor(crop) - mean) / std)
        with torch.no_grad():
            logits, features = richkd.forward(model, torch.stack(pixels))
        close(slab.teacher_logits, logits[:, rows])
        close(slab.teacher_features, features)


def test_a_complete_cache_needs_no_weights_and_a_damaged_one_finds_them(
    hub: Path, tmp_path: Path
) -> None:
    name = "hf-hub:me/sixteen"
    published(hub, name, "test_resnet", num_classes=16, input_size=[3, 32, 32])
    settings = {"limit": 24, "dtype": "float32"}
    out = tmp_path / "s.zarr"
    cache = stage_one_of(out, "shapes", name, **settings)
    assert "head" not in cache.manifest["teacher"]
    assert "teacher_head" not in cache.manifest["recipe"]
    whole = tree(out)
    raise_faults(out, verify_store(out, name, Report(quiet=True)))
    (out / "train/teacher_logits/c/0/0/0").unlink()
    repair_store(out, Report(quiet=True))
    assert tree(out) == whole
    shutil.rmtree(hub)
    configuration.cache_clear()
    stage_one_of(out, "shapes", name, **settings)
    assert tree(out) == whole
    with refuses(
        "teacher-cannot-be-loaded", name, hub / "models--me--sixteen", "--teacher-weights"
    ):
        verify_store(out, name, Report(quiet=True))


@pytest.mark.slow
def test_a_plan_downloads_nothing(hub: Path) -> None:
    settings = Precompute(
        dataset="shapes",
        limit=32,
        teacher="timm/test_resnet.r160_in1k",
        teacher_head="probe",
        clip="none",
        views=1,
        device="cpu",
    )
    found = plan(settings, Report(quiet=True), enough=0.01, most=16)
    assert found["pace"]["teacher_size"] == 160 and "random weights" in found["about"]
    assert found["passes"]["cnn"] == 2 * 32 + found["num_test"]
    assert "probe/weights" in found["arrays"] and not hub.exists()


def test_what_a_plan_lacks_is_to_be_got_first(hub: Path) -> None:
    command = "for a plan; get it first, e.g. by hf download me/some config.json --revision v2"
    with refuses("teacher-cannot-be-loaded", command):
        configuration("hf-hub:me/some@v2", planning)


def test_a_cache_is_verified_with_the_weights_that_it_was_written_with(
    tmp_path: Path, fails: Fails
) -> None:
    name = "test_resnet.r160_in1k"
    for given, recorded, file in (
        (name, f"timm/{name}", ""),
        (f"timm/{name}", name, ""),
        ("hf-hub:me/one", "hf-hub:me/one", ""),
    ):
        check_weights_name(given, recorded, file)
    for given, recorded, file, remedy in (
        (name, name, "w.pth", "w.pth"),
        (name, "hf-hub:me/one", "", "--teacher hf-hub:me/one"),
        ("resnet8", "resnet8", "", "file"),
    ):
        with refuses("weights-missing", given, recorded, remedy):
            check_weights_name(given, recorded, file)
    out, files = tmp_path / "s.zarr", [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for file in files:
        save_tensors(file, richkd.create_model("resnet8", 16).state_dict())
    stage_one_of(out, "shapes", "resnet8", limit=24, views=1, teacher_weights=str(files[0]))
    line = fails("verify", out, "--teacher", files[1])
    assert line.code == "cache-verify-failed"
    assert "damaged" not in line and "weights that it was written with" in line


def test_what_cannot_be_loaded_is_refused_at_once(
    hub: Path, tmp_path: Path, fails: Fails, rng: np.random.Generator
) -> None:
    folder = write_photos(tmp_path / "photos", FOLDERS, rng, train=1, test=1)
    published(hub, "hf-hub:me/eight", "test_resnet", num_classes=8, input_size=[3, 32, 32])
    published(hub, "hf-hub:me/wide", "test_resnet", num_classes=8, input_size=[3, 32, 48])
    shutil.copytree(hub / "models--me--eight", hub / "models--me--half")
    next((hub / "models--me--half").rglob("model.safetensors")).unlink()
    next((hub / "models--me--wide").rglob("model.safetensors")).unlink()
    eight = hub / "models--me--eight/snapshots"
    common = f"precompute --dataset imagefolder:{folder} --image-size 32 --clip none --device cpu"
    for given, code, *values in (
        ("resnet50.a9_in1k", "teacher-input-unsupported", "a9_in1k", "a1_in1k"),
        ("timm/resnet49.a1_in1k", "unknown-model", "resnet49"),
        ("hf-hub:me", "teacher-name-malformed", "hf-hub:OWNER/NAME"),
        (
            "hf-hub:me/none",
            "teacher-cannot-be-loaded",
            hub / "models--me--none",
            "HF_HUB_OFFLINE",
            "--teacher timm/NETWORK --teacher-weights FILE",
        ),
        ("hf-hub:me/half", "teacher-cannot-be-loaded", hub / "models--me--half", "HF_HUB_OFFLINE"),
        ("hf-hub:me/wide", "teacher-input-unsupported", "32×48"),
        ("hf-hub:me/eight --teacher-size 64", "teacher-input-known", "--teacher-size"),
        ("hf-hub:me/eight --teacher-weights w.pth", "teacher-named-twice", "hf-hub:me/eight"),
        # that the classes do not fit is known before the weights are looked for
        ("timm/resnet50.a1_in1k", "teacher-outputs-differ", "1,000", "8 classes", "rows", "probe"),
        ("vit_small_patch14_dinov2.lvd142m", "teacher-outputs-differ", "0 outputs", "probe"),
        (
            "timm/resnet50.a1_in1k --teacher-head probe",
            "teacher-cannot-be-loaded",
            hub / "models--timm--resnet50.a1_in1k",
        ),
        (
            "legacy_seresnet18.in1k --teacher-head rows",
            "teacher-cannot-be-loaded",
            tmp_path / "torch/checkpoints/seresnet18-4bb0ce65.pth",
        ),
    ):
        out = tmp_path / "s.zarr"
        line = fails(*common.split(), "--out", out, "--teacher", *given.split())
        assert line.code == code, line
        assert all(str(value) in line for value in values), line
        assert not out.exists()
    assert eight.exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_of_code_is_not_run(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    published(hub, "hf-hub:me/bomb", "test_resnet", num_classes=10)
    weights = next(hub.rglob("model.safetensors"))
    weights.unlink()
    torch.save({"fc.weight": Bomb(tmp_path / "crater")}, weights.with_name("pytorch_model.bin"))
    with refuses("teacher-cannot-be-loaded", "hf-hub:me/bomb", "could run code"):
        load_named("hf-hub:me/bomb")
    assert not (tmp_path / "crater").exists()
    assert not variable or os.environ[variable] == "1"
    config = next(hub.rglob("config.json"))
    config.write_text(json.dumps({"architecture": "no_such_network"}))
    configuration.cache_clear()
    with refuses("teacher-cannot-be-loaded", "hf-hub:me/bomb"):
        load_named("hf-hub:me/bomb")

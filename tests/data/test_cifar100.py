"""The main job's two commands on an archive in CIFAR-100's layout, everything else by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_cifar100, write_clip, write_teacher

import richkd


@pytest.mark.slow
def test_precompute_and_distill_with_defaults(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "data", monkeypatch, train=24, test=12)
    teacher = write_teacher(tmp_path / "teacher.safetensors", "resnet32x4", 100)
    clip = write_clip(tmp_path / "clip")
    done = run("precompute", "--dataset", "cifar100", "--teacher-weights", teacher, "--clip", clip)
    assert done.code == 0, done.err
    cache = richkd.open_cache("cache/cifar100.zarr")
    manifest = cache.manifest
    assert (manifest["teacher"]["name"], manifest["alpha"], cache.num_views) == (
        "resnet32x4",
        0.7,
        32,
    )
    assert len(manifest["prompts"]) == 12 and manifest["scale"] == "native"
    assert cache.num_classes == 100 and manifest["class_names"][3] == "class 03"

    done = run("distill", "--cache", "cache/cifar100.zarr")
    assert done.code == 0, done.err
    folder = tmp_path / "runs/cifar100-resnet8x4-richkd-s0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 240
    assert lines[-1]["train_accuracy"] > 0.9  # 24 images can be learnt by heart
    assert set(lines[0]["terms"]) == {"ce", "logit", "feature"}
    assert json.loads((folder / "summary.json").read_text())["parameters"] == 1_233_540

"""Exported students run without richkd and compute the student's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
import torch
from helpers import Refusal, refuses
from safetensors.torch import load_file

import richkd
from richkd.config.settings import Distill
from richkd.distill import distill
from richkd.tools.export import export

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


def train(store: Path, out: Path, student: str) -> Path:
    distill(
        Distill(
            cache=str(store),
            student=student,
            method="kd",
            epochs=2,
            batch_size=16,
            device="cpu",
            out=str(out),
        )
    )
    return out


def expected(folder: Path, store: Path, student: str, pixels: torch.Tensor, weights: str) -> Any:
    manifest = richkd.open_cache(store).manifest
    model = richkd.create_model(student, 16)
    model.load_state_dict(load_file(folder / f"{weights}.safetensors"))
    mean, std = (torch.tensor(manifest[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model.eval()((pixels - mean) / std).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["resnet8", "ShuffleV2", "mobilenetv3_small_050"])
def test_onnx_gives_the_logits(
    run: Run, store: Path, tmp_path: Path, rng: np.random.Generator, student: str
) -> None:
    folder = train(store, tmp_path / "run", student)
    done = run("export", folder, "--json")
    assert done.code == 0, done.err
    session = optional.load("onnxruntime").InferenceSession(folder / "student.onnx")
    for batch in (1, 7):
        pixels = rng.random((batch, 3, 32, 32), np.float32)
        found = session.run(None, {"pixels": pixels})[0]
        wanted = expected(folder, store, student, torch.from_numpy(pixels), "last")
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert names == richkd.open_cache(store).manifest["class_names"]


def test_an_exported_program_gives_the_logits(
    run: Run, store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = train(store, tmp_path / "run", "resnet8")
    done = run(
        "export", folder, "--format", "torch", "--weights", "best", "--out", tmp_path / "s.pt2"
    )
    assert done.code == 0, done.err
    program = torch.export.load(tmp_path / "s.pt2")
    for batch in (1, 7):
        pixels = torch.from_numpy(rng.random((batch, 3, 32, 32), np.float32))
        with torch.no_grad():
            found = program.module()(pixels).numpy()
        wanted = expected(folder, store, "resnet8", pixels, "best")
        mean, std = (torch.tensor(richkd.open_cache(store).manifest[k]) for k in ("mean", "std"))
        with torch.no_grad():
            student = richkd.load_student(folder, "best")
            normalized = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
            np.testing.assert_array_equal(student(normalized).numpy(), wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_logits_that_differ_leave_no_file(store: Path, tmp_path: Path) -> None:
    folder = train(store, tmp_path / "run", "resnet8")
    with refuses("export-differs", folder / "student.pt2", "--format onnx"):
        export(str(folder), "torch", tolerance=-1.0)
    assert not (folder / "student.pt2").exists()


def test_mistakes(fails: Fails, store: Path, tmp_path: Path) -> None:
    assert fails("export", tmp_path).code == "run-missing"
    with refuses("run-missing", tmp_path):
        richkd.load_student(tmp_path)
    folder = train(store, tmp_path / "run", "resnet8")
    refusal = fails("export", folder, "--format", "tflite")
    assert refusal.code == "unknown-name" and "'tflite'" in refusal and "onnx, torch" in refusal
    refusal = fails("export", folder, "--weights", "first")
    assert refusal.code == "unknown-name" and "'first'" in refusal
    (folder / "summary.json").unlink()
    refusal = fails("export", folder)
    assert refusal.code == "run-incomplete" and str(folder) in refusal

"""Teachers from the checkpoints of common trainers, and the choice between a file's weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Refusal, changed, refuses, tree
from torch import Tensor

import richkd
from richkd.config.settings import Precompute
from richkd.core.progress import Report
from richkd.data.framing import NetworkInput
from richkd.models.weights import save_tensors
from richkd.precompute import precompute
from richkd.store.manifest import read_manifest
from richkd.store.reader import open_cache
from richkd.teachers.cnn import load_teacher

State = dict[str, Tensor]
Run = Callable[..., Any]
Fails = Callable[..., Refusal]
CPU = torch.device("cpu")
CLASSES = 16  # of shapes
INPUT = NetworkInput(size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def weights(seed: int) -> State:
    torch.manual_seed(seed)
    model = richkd.create_model("resnet8", CLASSES)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return model.state_dict()


@pytest.fixture(scope="module")
def good() -> State:
    return weights(1)


@pytest.fixture(scope="module")
def raw() -> State:
    """Other weights, from before averaging or of another network."""
    return weights(2)


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    momenta = {number: {"momentum_buffer": value} for number, value in enumerate(state.values())}
    return {"state": momenta, "param_groups": [{"lr": 0.1, "params": [*momenta]}]}


def timm(state: State, **other: Any) -> dict[str, Any]:
    args = argparse.Namespace(model="resnet8", lr=0.1, output=Path("out"))
    return {"epoch": 9, "arch": "resnet8", "state_dict": state, "args": args, **other}


# name: the file's content, with weights that must not be taken beside it where there are any
TWELVE: dict[str, Callable[[State, State], Any]] = {
    "bare": lambda good, _: good,
    "model": lambda good, raw: {"model": good, "optimizer": optimizer(raw), "epoch": 9},
    "state_dict": lambda good, raw: timm(good, optimizer=optimizer(raw)),
    "net": lambda good, _: {"net": under("module.", good), "acc": 93.1, "epoch": 9},
    "model_state_dict": lambda good, raw: {
        "model_state_dict": good,
        "optimizer_state_dict": optimizer(raw),
    },
    "module": lambda good, _: {"module": good, "ds_config": {"fp16": {"enabled": True}}},
    "student": lambda good, _: {"student": under("module.backbone.", good), "iteration": 99},
    "state_dict_ema": lambda good, raw: timm(raw, state_dict_ema=good),
    "model_ema": lambda good, raw: {"model": raw, "model_ema": under("module.", good)},
    "module._orig_mod.": lambda good, _: under("module._orig_mod.", good),
    "Lightning": lambda good, _: {
        "state_dict": under("model.net.", good),
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"best": {"best_model_score": torch.tensor(0.9)}},
    },
    "NumPy": lambda good, _: {
        "params": {key: value.numpy() for key, value in good.items() if "tracked" not in key}
    },
}


@pytest.mark.parametrize("name", TWELVE)
def test_twelve_wrappings_give_the_same_rows(
    tmp_path: Path, good: State, raw: State, name: str
) -> None:
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    model = richkd.create_model("resnet8", CLASSES).eval()
    model.load_state_dict(good)
    with torch.no_grad():
        logits = model((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.2)
    path = tmp_path / "w.pth"
    torch.save(TWELVE[name](good, raw), path)
    found, features = load_teacher("resnet8", path, CLASSES, INPUT, CPU).rows(images)
    plain = tmp_path / "plain.safetensors"
    save_tensors(plain, good)
    ours = load_teacher("resnet8", plain, CLASSES, INPUT, CPU).rows(images)
    assert torch.equal(found, ours[0]) and torch.equal(features, ours[1])
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


# --- a choice of weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        ("", "ema"),
        ("state_dict", "raw"),
        ("state_dict_ema", "ema"),
        ("teacher", "teacher"),
        ("teacher.module", "teacher"),
    ],
)
def test_a_key_chooses(tmp_path: Path, key: str, taken: str) -> None:
    states = {"raw": weights(1), "ema": weights(2), "teacher": weights(3)}
    path, lines = tmp_path / "w.pth", []
    torch.save(
        {
            "state_dict": states["raw"],
            "state_dict_ema": states["ema"],
            "teacher": under("module.", states["teacher"]),
        },
        path,
    )

    class Lines(Report):
        def log(self, text: str) -> None:
            lines.append(text)

    teacher = load_teacher("resnet8", path, CLASSES, INPUT, CPU, key=key, report=Lines(quiet=True))
    assert all(torch.equal(v, states[taken][k]) for k, v in teacher.model.state_dict().items())
    (line,) = lines
    assert (key or "state_dict_ema").partition(".")[0] in line and "--teacher-weights-key" in line


def test_prefixes_are_keys_too(tmp_path: Path, good: State, raw: State) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {**under("student.", raw), **under("teacher.net.", good)}}, path)
    with refuses("weights-ambiguous", "student.*", "teacher.net.*", "--teacher-weights-key"):
        load_teacher("resnet8", path, CLASSES, INPUT, CPU)
    for key in ("state_dict.teacher", "state_dict.teacher.net"):
        teacher = load_teacher("resnet8", path, CLASSES, INPUT, CPU, key=key)
        assert all(torch.equal(v, good[k]) for k, v in teacher.model.state_dict().items())


def test_a_key_that_is_not_there(tmp_path: Path, good: State, raw: State) -> None:
    path = tmp_path / "w.pth"
    for content, values in (
        ({"state_dict": raw, "state_dict_ema": good}, ["state_dict, state_dict_ema"]),
        (good, ["leave --teacher-weights-key out"]),
        (under("module.", good), ["choose from module"]),
        ({"model": good, "optimizer": {"a": torch.ones(1)}}, ["choose from model"]),
    ):
        torch.save(content, path)
        for key in ("ema", "state", "epoch"):
            with refuses("weights-key-unknown", path, repr(key), *values):
                load_teacher("resnet8", path, CLASSES, INPUT, CPU, key=key)


@pytest.mark.slow
def test_a_key_of_another_network(tmp_path: Path, good: State) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": good, "other": {"a.weight": torch.ones(2)}}, path)
    with refuses("weights-other-architecture", "in other", "'a.weight'"):
        load_teacher("resnet8", path, CLASSES, INPUT, CPU, key="other")


def test_a_key_needs_a_file(fails: Fails, tmp_path: Path) -> None:
    words = f"precompute --dataset shapes --teacher-weights-key net --out {tmp_path}/s.zarr"
    refusal = fails(*words.split())
    assert refusal.code == "teacher-weights-key-not-needed" and "net" in refusal


@pytest.mark.slow
def test_a_cache_keeps_to_the_weights_that_were_chosen(
    run: Run,
    fails: Fails,
    good: State,
    raw: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, plain = tmp_path / "both.pth", tmp_path / "plain.pth"
    torch.save(timm(raw, state_dict_ema=good), both)
    torch.save(raw, plain)

    def settings(weights: Path, name: str, key: str = "") -> Precompute:
        return Precompute(
            dataset="shapes",
            limit=24,
            teacher="resnet8",
            teacher_weights=str(weights),
            teacher_weights_key=key,
            clip="none",
            views=2,
            device="cpu",
            out=str(tmp_path / name),
        )

    cache = precompute(settings(both, "key.zarr", "state_dict")).path
    assert read_manifest(cache)["teacher"]["weights_key"] == "state_dict"
    assert read_manifest(cache)["recipe"]["teacher_weights_key"] == "state_dict"
    without = precompute(settings(plain, "plain.zarr")).path
    assert "weights_key" not in read_manifest(without)["teacher"]
    assert "teacher_weights_key" not in read_manifest(without)["recipe"]
    for name in ("train/teacher_logits", "test/teacher_features"):
        assert torch.equal(open_cache(cache).read(name), open_cache(without).read(name))
    for key in ("", "state_dict_ema"):
        with refuses("cache-settings-differ", "teacher_weights_key"):
            precompute(settings(both, "key.zarr", key))

    before = tree(cache)
    assert run("verify", cache, "--teacher", both).code == 0
    chunk = next(cache.glob("train/teacher_logits/c/0/0/*"))
    chunk.write_bytes(chunk.read_bytes()[:-9])
    repaired = run("repair", cache)
    assert repaired.code == 0, repaired.err
    assert changed(before, tree(cache)) == []

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("richkd.precompute.StageOne.write", stop)
        with pytest.raises(Stopped):
            precompute(settings(both, "part.zarr", "state_dict"))
    for key in ("", "state_dict_ema"):
        with refuses("cache-settings-differ", "teacher.weights_key"):
            precompute(settings(both, "part.zarr", key))
    resumed = precompute(settings(both, "part.zarr", "state_dict"))
    assert torch.equal(
        resumed.read("train/teacher_logits"), open_cache(cache).read("train/teacher_logits")
    )

    words = f"precompute --dataset shapes --limit 24 --teacher resnet8 --teacher-weights {both}"
    refusal = fails(
        *words.split(), *f"--clip none --teacher-weights-key net --out {tmp_path}/n.zarr".split()
    )
    assert refusal.code == "weights-key-unknown" and "state_dict, state_dict_ema" in refusal
    assert not (tmp_path / "n.zarr").exists()

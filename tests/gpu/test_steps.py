"""On a GPU: steps as CUDA graphs, compiled and side by side train as eager steps do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_distill import metrics, train, weights

from richkd.losses import METHODS
from richkd.models import create_model
from richkd.training.run_folder import RunFolder
from richkd.training.source import Placement, Source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
Make = Callable[..., Path]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def distance(a: Path, b: Path) -> float:
    """‖w_a − w_b‖ / ‖w_b‖ of the last weights."""
    one, other = ({n: v.double() for n, v in weights(run).items()} for run in (a, b))
    gap = sum((one[name] - other[name]).square().sum() for name in other)
    return float((gap / sum(value.square().sum() for value in other.values())).sqrt())


def on_gpu(store: Path, out: Path, step: str, **settings: Any) -> dict[str, Any]:
    given = {"device": "cuda", "precision": "float32", "epochs": 3, "step": step}
    return train(store, out, **{**given, **settings})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_graphs_train_as_eager_steps(store: Path, tmp_path: Path, method: str) -> None:
    """The same draws, too: CRD's negatives, and the warm-up of DKD by epochs."""
    done = {
        step: on_gpu(store, tmp_path / step, step, method=method) for step in ("eager", "captured")
    }
    assert done["captured"]["step"] == "captured" and done["eager"]["step"] == "eager"
    assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)
    assert distance(tmp_path / "captured", tmp_path / "eager") < 1e-2  # two eager runs, as far


@pytest.mark.parametrize("method", ["kd", "richkd", "dkd"])
def test_compiled_steps_train_as_eager_ones(store: Path, tmp_path: Path, method: str) -> None:
    for step in ("eager", "compiled"):
        done = on_gpu(store, tmp_path / step, step, method=method)
        assert done["step"] == step
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)
    assert distance(tmp_path / "compiled", tmp_path / "eager") < 1e-2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lamb"])
def test_graphs_hold_the_steps_of_optimizers(store: Path, tmp_path: Path, optimizer: str) -> None:
    """With the warm-up's learning rates and averaged weights; LAMB computes on the host as well."""
    settings = {"method": "kd", "optimizer": optimizer, "lr": 1e-3, "warmup": 1.5, "ema": 0.8}
    done = {step: on_gpu(store, tmp_path / step, step, **settings) for step in ("eager", "auto")}
    assert done["auto"]["step"] == ("eager" if optimizer == "lamb" else "captured")
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)
    assert distance(tmp_path / "auto", tmp_path / "eager") < 1e-2


@pytest.mark.parametrize("step", ["eager", "captured"])
def test_a_last_batch_of_another_size(make_store: Make, tmp_path: Path, step: str) -> None:
    store = make_store(limit=45)  # 16 + 16 + 13
    on_gpu(store, tmp_path / step, step, method="kd")
    train(store, tmp_path / "cpu", method="kd", epochs=3)
    assert losses(tmp_path / step) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_rows_that_stay_on_the_host(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(store, tmp_path / "eager", "eager", method="richkd")
    monkeypatch.setattr(
        Source, "_place", lambda self, slab, fixed: Placement(on_disk=False, on_host=True)
    )
    done = on_gpu(store, tmp_path / "host", "captured", method="richkd")
    assert done["step"] == "captured"
    assert distance(tmp_path / "host", tmp_path / "eager") < 1e-3


def test_rows_by_their_largest_logits(make_store: Make, tmp_path: Path) -> None:
    store = make_store(keep="top-4", views=2)
    for step in ("eager", "captured"):
        on_gpu(store, tmp_path / step, step, method="kd")
    assert distance(tmp_path / "captured", tmp_path / "eager") < 1e-3


def test_photographs(tmp_path: Path, make_store: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 8)):
        for number in range(count):
            folder = tmp_path / "photos" / split / f"class {number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (40, 56, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    from helpers import write_teacher

    store = make_store(
        dataset=f"imagefolder:{tmp_path / 'photos'}",
        image_size=32,
        limit=None,
        clip="none",
        teacher_weights=str(write_teacher(tmp_path / "t.safetensors", "resnet8", 2)),
        teacher_size=32,
        teacher_mean=(0.5,) * 3,
        teacher_std=(0.25,) * 3,
    )
    for step in ("eager", "captured"):
        on_gpu(store, tmp_path / step, step, method="kd", batch_size=8)
    assert distance(tmp_path / "captured", tmp_path / "eager") < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_side_by_side_gives_what_each_gives_alone(
    store: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
) -> None:
    """Also where networks draw random numbers."""

    def dropping(*arguments: Any, **settings: Any) -> torch.nn.Module:
        model = create_model(*arguments, **settings)
        features: Any = model.forward_features
        model.forward_features = lambda images: torch.nn.functional.dropout(  # type: ignore[assignment]
            features(images), dropout, model.training
        )
        return model

    monkeypatch.setattr("richkd.training.source.create_model", dropping)
    common = [
        "--students",
        "resnet8",
        "--methods",
        "kd,richkd,crd",
        "--seeds",
        2,
        "--epochs",
        3,
        "--batch-size",
        16,
        "--device",
        "cuda",
        "--lr",
        0.02,
        "--precision",
        "float32",
    ]
    for out, number in (("apart", 1), ("together", 6)):
        done = run(
            "sweep",
            "--cache",
            store,
            "--out",
            tmp_path / out,
            "--concurrent",
            number,
            *common,
            "--json",
        )
        assert done.code == 0, done.err
        assert len(done.json["runs"]) == 6
        assert {each["step"] for each in done.json["runs"]} == {"captured"}
    for folder in (tmp_path / "apart").iterdir():
        assert distance(tmp_path / "together" / folder.name, folder) < 2e-3, folder.name


def test_interrupted_and_resumed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutOff(BaseException):
        pass

    on_gpu(store, tmp_path / "whole", "auto", method="richkd", epochs=4)
    saved = RunFolder.save_epoch

    def cut(self: Any, progress: Any, *arguments: Any) -> None:
        saved(self, progress, *arguments)
        if progress.epoch == 2:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", cut)
        with pytest.raises(CutOff):
            on_gpu(store, tmp_path / "cut", "auto", method="richkd", epochs=4)
    done = on_gpu(store, tmp_path / "cut", "auto", method="richkd", epochs=4)
    assert done["step"] == "captured"
    assert distance(tmp_path / "cut", tmp_path / "whole") < 2e-3


def test_a_network_that_cannot_be_captured_trains_eagerly(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """It waits for the device in the middle of its forward pass."""
    from richkd.core.progress import Report

    plain = create_model

    def waits(*arguments: Any, **settings: Any) -> torch.nn.Module:
        model = plain(*arguments, **settings)
        forward = model.forward_features

        def features(images: torch.Tensor) -> torch.Tensor:
            maps: torch.Tensor = forward(images)  # type: ignore[operator]
            return maps if float(maps.detach().sum()) > -1e30 else -maps

        model.forward_features = features  # type: ignore[assignment]
        return model

    monkeypatch.setattr("richkd.training.source.create_model", waits)
    from richkd.config.settings import Distill
    from richkd.distill import distill

    settings = {"student": "resnet8", "epochs": 2, "batch_size": 16, "device": "cuda", "lr": 0.02}
    for step in ("captured", "compiled"):
        done = distill(
            Distill(cache=str(store), out=str(tmp_path / step), step=step, method="kd", **settings),
            report=Report(),
        )
        assert done["step"] == "eager"
        said = capfd.readouterr().err
        assert f"the step cannot be {step} (" in said and "continuing with eager" in said


def test_too_little_memory_for_graphs(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from richkd.config.settings import Distill
    from richkd.core.progress import Report
    from richkd.distill import distill
    from richkd.training.runners import Captured

    def full(self: Any, size: int) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(Captured, "_step", full)
    done = distill(
        Distill(
            cache=str(store),
            out=str(tmp_path / "a"),
            method="kd",
            student="resnet8",
            epochs=2,
            batch_size=16,
            device="cuda",
            lr=0.02,
        ),
        report=Report(),
    )
    assert done["step"] == "eager" and "out of memory" in capfd.readouterr().err.lower()


def test_nothing_waits_for_the_device_in_an_epoch(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises where a call inside of the steps synchronises."""
    from richkd.training.loop import Trainer

    plain = Trainer.step

    def watched(self: Any, *arguments: Any) -> None:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            plain(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", watched)
    for method in METHODS:
        on_gpu(store, tmp_path / method, "eager", method=method, epochs=1)


def test_what_is_said_of_the_steps(store: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run(
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        "--batch-size",
        16,
        "--out",
        tmp_path / "a",
        "--device",
        "cuda",
    )
    assert done.code == 0 and "the step is captured" in done.err
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["step"] == "captured"

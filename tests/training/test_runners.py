"""How steps are run on a CPU: as the reference, compiled, and what becomes of those that fail."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import Refusal, assert_same_run, tree
from safetensors import safe_open
from test_distill import metrics, new_trainer, same, train, weights

from richkd.config.settings import Distill
from richkd.core.choices import Step
from richkd.core.progress import Report
from richkd.models import create_model
from richkd.training import runners
from richkd.training.loop import epoch_order, learning_rate
from richkd.training.run_folder import RunFolder
from richkd.training.source import Source
from richkd.training.student import StudentRun

Fails = Callable[..., Refusal]
Make = Callable[..., Path]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def summary(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def test_steps_in_f32_on_a_cpu_are_the_reference(store: Path, tmp_path: Path) -> None:
    assert train(store, tmp_path / "auto", method="richkd")["step"] == "eager"
    train(store, tmp_path / "eager", method="richkd", step="eager")
    assert same(weights(tmp_path / "auto"), weights(tmp_path / "eager"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "richkd", "dkd"])
def test_compiled_steps_train_as_eager_ones(
    make_store: Make, tmp_path: Path, fresh_compiler: None, method: str
) -> None:
    """With the same negatives, and a last batch of another size."""
    store = make_store(limit=45)
    for step in ("eager", "compiled"):
        done = train(store, tmp_path / step, method=method, step=step, epochs=3)
        assert done["step"] == step
    losses = [[line["loss"] for line in metrics(tmp_path / step)] for step in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    a, b = (weights(tmp_path / step) for step in ("eager", "compiled"))
    assert not same(a, b)  # it was another program
    gap = sum((a[name].double() - b[name].double()).square().sum() for name in a)
    assert gap.sqrt() < 1e-2 * sum(each.double().square().sum() for each in a.values()).sqrt()


@pytest.mark.parametrize("method", ["kd", "richkd", "vid"])
def test_timing_a_step_leaves_no_trace(store: Path, method: str) -> None:
    """Weights, running statistics, banks and momenta stand where they stood."""
    trainer, source = new_trainer(store, method=method)
    order = epoch_order(0, 1, 48)
    for _ in trainer.steps(1, source):
        pass
    before = trainer.snapshot()
    assert runners.Eager(trainer, source).seconds(order, source) > 0
    assert same(before, trainer.state())
    trainer.step(*trainer.noise(order, source))
    assert not same(before, trainer.state())
    trainer.restore(before)
    assert same(before, trainer.state())


def test_bfloat16_steps_are_compiled_where_that_pays(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    trainer, source = new_trainer(store, method="kd", precision="bfloat16")
    trainer.log = said.append
    order = epoch_order(0, 1, 48)
    monkeypatch.setattr(runners.Compiled, "prepare", lambda *_: None)
    for pays_s, name in ((1e9, "eager"), (0.0, "compiled")):
        assert runners.make_runner(trainer, "auto", order, source, 100, pays_s).name == name
        assert runners.make_runner(trainer, "eager", order, source, 100, pays_s).name == "eager"
    assert "eager steps left" in said[0]
    trainer, source = new_trainer(store, method="kd")
    assert runners.make_runner(trainer, "auto", order, source, 10**9).name == "eager"


def test_a_network_that_cannot_be_compiled(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, fresh_compiler: None
) -> None:
    """It branches on what it computes; the run goes on, and says why it is not compiled."""

    def branching(*arguments: Any, **settings: Any) -> torch.nn.Module:
        model = create_model(*arguments, **settings)
        features: Any = model.forward_features
        model.forward_features = lambda images: (  # type: ignore[assignment]
            maps if float((maps := features(images)).detach().sum()) > -1e30 else -maps
        )
        return model

    train(store, tmp_path / "plain", method="kd")
    monkeypatch.setattr("richkd.training.source.create_model", branching)
    done = run(
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        2,
        "--batch-size",
        16,
        "--lr",
        0.02,
        "--out",
        tmp_path / "a",
        "--step",
        "compiled",
        "--device",
        "cpu",
    )
    assert done.code == 0 and summary(tmp_path / "a")["step"] == "eager"
    assert "a: the step cannot be compiled (" in done.err and "); continuing with eager" in done.err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "plain"))


@pytest.mark.slow
def test_no_compiler(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, fresh_compiler: None
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
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
        "--lr",
        0.02,
        "--out",
        tmp_path / "a",
        "--step",
        "compiled",
        "--device",
        "cpu",
    )
    assert done.code == 0 and summary(tmp_path / "a")["step"] == "eager", done.err
    assert "the step cannot be compiled" in done.err and "Traceback" not in done.err


def test_what_cannot_be_asked_for(store: Path, tmp_path: Path, fails: Fails) -> None:
    common = ["--cache", store, "--student", "resnet8", "--device", "cpu", "--out", tmp_path / "a"]
    line = fails("distill", *common, "--step", "captured")
    assert line.code == "step-unsupported"
    assert all(value in line for value in ("'captured'", "cpu", "--step"))
    assert not (tmp_path / "a").exists()
    line = fails("distill", *common, "--step", "graphs")
    assert line.code == "unknown-name" and all(step in line for step in get_args(Step))
    line = fails(
        "train-teacher",
        "--dataset",
        "shapes",
        "--limit",
        40,
        "--model",
        "resnet8",
        "--step",
        "captured",
        "--device",
        "cpu",
        "--out",
        tmp_path / "t.safetensors",
    )
    assert line.code == "step-unsupported"


def test_a_resumed_run_keeps_its_runner(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` took is in the checkpoint; a timing of another day does not change it."""

    class CutOff(BaseException):
        pass

    saved = RunFolder.save_epoch

    def cut(self: Any, *arguments: Any) -> None:
        saved(self, *arguments)
        raise CutOff

    monkeypatch.setattr(runners.Compiled, "prepare", lambda *_: None)
    monkeypatch.setattr(runners.Eager, "seconds", lambda *_: 1e9)
    settings = {"method": "kd", "precision": "bfloat16"}
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunFolder, "save_epoch", cut)
        train(store, tmp_path / "a", **settings)
    with safe_open(tmp_path / "a" / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "cpu:compiled"
    monkeypatch.setattr(runners.Eager, "seconds", lambda *_: 0.0)
    assert train(store, tmp_path / "a", **settings)["step"] == "compiled"
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunFolder, "save_epoch", cut)
        train(store, tmp_path / "b", **settings)
    monkeypatch.setattr(runners.Eager, "seconds", lambda *_: 1e9)
    assert train(store, tmp_path / "b", **settings)["step"] == "eager"


@pytest.mark.parametrize("ran_by", ["cuda:compiled", "cuda:captured", ""])
def test_a_run_resumed_on_another_device_chooses_anew(store: Path, ran_by: str) -> None:
    trainer, _ = new_trainer(store, method="kd")
    trainer.resume(trainer.state(), Path("unused"), ran_by)
    assert trainer.wanted == "auto"
    trainer.resume(trainer.state(), Path("unused"), "cpu:compiled")
    assert trainer.wanted == "compiled"


def test_a_step_that_fails_on_the_way_leaves_no_trace(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has moved running statistics when the backward pass fails."""
    trainer, source = new_trainer(store, method="kd")
    order, before = epoch_order(0, 1, 48), trainer.snapshot()

    def fails(*_: Any) -> None:
        raise RuntimeError("no backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", fails)
    with pytest.raises(RuntimeError, match="no backward pass"):
        runners.Eager(trainer, source).seconds(order, source)
    assert same(before, trainer.state())


def test_runs_that_are_over_are_freed(store: Path, tmp_path: Path) -> None:
    """Without a collection of cycles: a GPU's memory would not wait for one."""
    settings = Distill(
        cache=str(store),
        student="resnet8",
        method="kd",
        epochs=1,
        batch_size=16,
        lr=0.02,
        device="cpu",
        out=str(tmp_path / "a"),
    )
    source = Source(settings, Report(quiet=True))
    gc.collect()
    gc.disable()
    try:
        with StudentRun(source, settings) as run:
            for rows, waited in source.epochs(run.rows.values(), 1, 1):
                run.train_epoch(rows, waited)
            seen = weakref.ref(run.trainer)
        del run
        assert seen() is None
    finally:
        gc.enable()


def test_another_runner_is_no_other_run(store: Path, tmp_path: Path) -> None:
    done = train(store, tmp_path / "a", method="kd")
    assert train(store, tmp_path / "a", method="kd", step="compiled") == done


def test_checkpoints_beside_the_next_epoch(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose tensors are copied: the same files, and errors are the run's."""
    from richkd.training import checkpoint

    train(store, tmp_path / "at once", method="richkd", epochs=4)
    original = checkpoint.Saving.__init__
    monkeypatch.setattr(checkpoint.Saving, "__init__", lambda self, threaded: original(self, True))
    train(store, tmp_path / "beside", method="richkd", epochs=4)
    assert same(weights(tmp_path / "at once"), weights(tmp_path / "beside"))
    assert tree(tmp_path / "at once").keys() == tree(tmp_path / "beside").keys()
    assert len(metrics(tmp_path / "beside")) == 4
    saved, count = RunFolder.save_epoch, 0

    def full(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        saved(self, *arguments)

    monkeypatch.setattr(RunFolder, "save_epoch", full)
    with pytest.raises(OSError, match="No space left"):
        train(store, tmp_path / "full", method="richkd", epochs=4)
    monkeypatch.setattr(RunFolder, "save_epoch", saved)
    assert len(metrics(tmp_path / "full")) == 2
    train(store, tmp_path / "full", method="richkd", epochs=4)
    assert_same_run(tmp_path / "beside", tmp_path / "full")


@pytest.mark.parametrize(
    ("epochs", "schedule"),
    [
        *((epochs, {}) for epochs in (1, 7, 10, 240)),
        *((epochs, {"schedule": "cosine"}) for epochs in (1, 7, 10, 240)),
        *((epochs, {"milestones": (3, 4, 9)}) for epochs in (10, 240)),
    ],
)
def test_learning_rates_are_those_of_timm(epochs: int, schedule: dict[str, Any]) -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.multistep_lr import MultiStepLRScheduler

    settings = Distill(cache="none", lr=0.07, epochs=epochs, **schedule)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.07)
    given: Any = schedule.get("milestones") or [
        max(1, round(epochs * share)) for share in (0.625, 0.75, 0.875)
    ]
    scheduler: Any = (
        CosineLRScheduler(optimizer, t_initial=epochs)
        if "schedule" in schedule
        else MultiStepLRScheduler(optimizer, [each + 1 for each in given], 0.1)
    )
    for epoch in range(1, epochs + 1):
        scheduler.step(epoch - 1)
        assert learning_rate(settings, epoch) == optimizer.param_groups[0]["lr"]


@pytest.mark.slow
def test_many_students_may_be_compiled(
    store: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    """PyTorch's compiler gives up after eight programs of a function, unless it is told."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    alive = []  # programs of what is gone make room
    for method in ("ce", "kd", "dkd", "dist", "rkd", "sp", "pkt", "vid", "mlkd", "kd-ls"):
        trainer, source = new_trainer(store, method=method, step="compiled")
        order = epoch_order(0, 1, 48)
        runner = runners.Compiled(trainer, source)
        runner.prepare(order, source)
        assert next(runner.steps(order, source)) == 16
        alive.append(runner)

"""Optimizers, warm-up, averaged weights and smoothed labels: as plain loops, and resumed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from helpers import Refusal, assert_same_run, refuses, slow
from safetensors.torch import load, load_file, save
from test_distill import interrupted, new_trainer, same, train, weights
from torch import Tensor, nn

from richkd.config import catalog
from richkd.config.settings import Distill, TrainTeacher
from richkd.core.progress import Report
from richkd.core.seeds import derive_seed
from richkd.data.views import gather_views
from richkd.losses import Batch, Task, method_class
from richkd.models import create_model
from richkd.training import runners
from richkd.training.loop import Trainer, epoch_order
from richkd.training.optimizers import load_state, make_optimizer, optimizer_names, state_of
from richkd.training.source import Source
from richkd.training.student import with_defaults

Fails = Callable[..., Refusal]
CPU = torch.device("cpu")


def spared(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights decay, biases and the parameters of norms do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.02},
    ]


PLAIN: dict[str, tuple[dict[str, Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "sgd": (
        {},
        lambda model: torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=0.02),
    ),
    "nesterov": (
        {"nesterov": True, "momentum": 0.8},
        lambda model: torch.optim.SGD(
            model.parameters(), 0.01, 0.8, weight_decay=0.02, nesterov=True
        ),
    ),
    "adamw": (
        {"optimizer": "adamw", "optimizer_options": {"betas": [0.8, 0.95]}},
        lambda model: torch.optim.AdamW(spared(model), 0.01, (0.8, 0.95)),
    ),
    "lamb": ({"optimizer": "lamb"}, lambda model: timm.optim.Lamb(spared(model), 0.01)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_those_of_a_plain_loop(store: Path, name: str) -> None:
    """Bit for bit, with warm-up over one and a half epochs and smoothed labels.

    The average of the weights equals its definition in float64.
    """
    own, make = PLAIN[name]
    given: dict[str, Any] = {"student": "resnet8", "batch_size": 20, "lr": 0.01, "device": "cpu"}
    given |= {"weight_decay": 0.02, "epochs": 4, "schedule": "cosine", "method": "ce"}
    given |= {"warmup": 1.5, "label_smoothing": 0.1, "ema": 0.9, "out": "unused"}
    settings = Distill(cache=str(store), **{**given, **own})
    source = Source(settings, Report(quiet=True))
    settings = with_defaults(settings, source.cache)
    trainer, rows, _ = source.trainer(settings)
    torch.manual_seed(derive_seed(0, 0, 2))
    model = create_model("resnet8", source.cache.num_classes)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make(model)
    average = {name: value.double() for name, value in model.state_dict().items()}
    images, labels = (source.cache.read(f"train/{array}") for array in ("images", "labels"))
    for epoch, (shared, _) in enumerate(source.epochs((), 1, 2), 1):
        of_epoch = source.own(shared, rows, 0, epoch)
        trainer.train_epoch(epoch, of_epoch)
        torch.manual_seed(derive_seed(0, epoch, 1))
        model.train()
        for number, index in enumerate(epoch_order(0, epoch, 48).split(20)):
            full = 0.01 if epoch == 1 else 0.01 * (1 + 2**-0.5) / 2
            for group in optimizer.param_groups:
                group["lr"] = full * min(1.0, (3 * (epoch - 1) + number + 1) / 4.5)
            x = source.data.normalize(gather_views(images, index, of_epoch.views[index]))
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[index], label_smoothing=0.1).backward()
            optimizer.step()
            for key, value in model.state_dict().items():
                average[key] = 0.9 * average[key] + 0.1 * value.double()
    assert same(trainer.model.state_dict(), model.state_dict())
    for key, value in trainer.result.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), average[key], rtol=1e-5, atol=1e-7), key
        else:
            assert value == model.state_dict()[key]
    assert not same(trainer.result.state_dict(), trainer.model.state_dict())


def test_the_label_term_is_smoothed_and_weighted(rng: Any) -> None:
    labels = torch.from_numpy(rng.integers(0, 5, 8))
    logits = torch.from_numpy(rng.normal(size=(8, 5)))
    kind, options = method_class("kd", {"ce_weight": 0.3})
    task = Task(labels=labels, student_dim=1, teacher_dim=1, clip_dim=0, alpha=1.0)
    batch = Batch(logits.float(), torch.zeros(8, 1), labels, torch.arange(8))
    plain = kind(options, task).label_term(batch)
    assert plain == 0.3 * F.cross_entropy(logits.float(), labels)
    smoothed = kind(options, Task(**{**vars(task), "label_smoothing": 0.2})).label_term(batch)
    target = 0.8 * F.one_hot(labels, 5).double() + 0.2 / 5
    wanted = -0.3 * (target * logits.log_softmax(1)).sum(1).mean()
    assert smoothed.item() == pytest.approx(wanted.item(), rel=1e-6)


FAMILIES: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True, "method": "vid"},  # with parameters of its own
    "adamw": {"optimizer": "adamw", "method": "kd"},
    "lamb": {"optimizer": "lamb", "method": "kd"},
}


@pytest.mark.parametrize("family", ["adamw", *slow("sgd", "lamb")])
def test_resumed_runs_end_in_the_same_bits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    settings = {"warmup": 1.5, "ema": 0.8, "label_smoothing": 0.1, "lr": None, "epochs": 3}
    settings |= FAMILIES[family]
    whole = train(store, tmp_path / "whole", **settings)
    interrupted(store, tmp_path / "cut", monkeypatch, **settings)
    train(store, tmp_path / "cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    best = [load_file(tmp_path / run / "best.safetensors") for run in ("whole", "cut")]
    assert same(*best)
    recipe = tomllib.loads((tmp_path / "cut" / "recipe.toml").read_text())
    assert recipe["ema"] == 0.8 and recipe["lr"] == (0.05 if family == "sgd" else 0.001)
    # what is saved is what was tested
    source = Source(Distill(cache=str(store), device="cpu"), Report(quiet=True))
    model = create_model("resnet8", source.cache.num_classes)
    model.load_state_dict(weights(tmp_path / "whole"))
    stub: Any = SimpleNamespace(result=model, data=source.data, device=CPU, parallel=None)
    assert Trainer.evaluate(stub, source.data.test)[0] == whole["top1_last"]


def test_runs_of_earlier_versions_resume_with_the_defaults(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their recipes name none of these settings; another value of one is another run."""
    interrupted(store, tmp_path / "a", monkeypatch, method="kd")
    recipe = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    names = {"optimizer", "optimizer_options", "nesterov", "warmup", "ema", "label_smoothing"}
    assert not names & recipe.keys()
    with refuses("run-settings-differ", "ema was None and is now 0.9"):
        train(store, tmp_path / "a", method="kd", ema=0.9)
    train(store, tmp_path / "a", method="kd", warmup=0, ema=0, optimizer="sgd")
    train(store, tmp_path / "b", method="kd")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def network() -> nn.Module:
    """A network with parameters of several shapes, from a fixed seed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 1)
    )


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_is_saved_and_loaded(name: str) -> None:
    """Two steps, a file, and two more steps are four steps, bit for bit."""
    settings = Distill(cache="none", optimizer=name, lr=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()

    def parts() -> tuple[nn.Module, torch.optim.Optimizer, list[Tensor]]:
        model = network()
        made, rate = make_optimizer(model, nn.Module(), settings, CPU)
        assert rate is None
        return model, made, list(model.parameters())

    model, optimizer, parameters = parts()
    steps(model, optimizer, range(2))
    state, half = load(save(state_of(optimizer, parameters))), load(save(model.state_dict()))
    steps(model, optimizer, range(2, 4))
    other, again, theirs = parts()
    other.load_state_dict(half)
    load_state(again, theirs, state)
    steps(other, again, range(2, 4))
    assert same(model.state_dict(), other.state_dict())
    assert same(state_of(optimizer, parameters), state_of(again, theirs))
    load_state(again, theirs, {})  # as before the first step
    assert not state_of(again, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adan"])
def test_timing_a_step_leaves_no_trace(store: Path, name: str) -> None:
    given = {"method": "vid", "optimizer": name, "ema": 0.5, "warmup": 1}
    (trainer, source), (other, _) = (new_trainer(store, **given) for _ in range(2))
    order = epoch_order(0, 1, 48)
    for _ in trainer.steps(1, source):
        assert runners.Eager(trainer, source).seconds(order, source) > 0
    for _ in other.steps(1, source):
        pass
    assert same(trainer.state(), other.state())
    assert trainer.lr == other.lr == 0.02


def test_the_learning_rate_rises_step_by_step(store: Path) -> None:
    trainer, source = new_trainer(store, method="ce", warmup=1.5, schedule="cosine", epochs=4)
    rates = []
    for epoch in (1, 2, 3):
        for _ in trainer.steps(epoch, source):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
    full = [0.02] * 3 + [0.02 * (1 + 2**-0.5) / 2] * 3 + [0.01] * 3
    factors = [min(1, number / 4.5) for number in range(1, 10)]
    assert rates == pytest.approx(
        [rate * factor for rate, factor in zip(full, factors, strict=True)]
    )


def test_optimizers_that_no_graph_can_hold_run_eagerly(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    trainer, source = new_trainer(store, method="kd", optimizer="lamb")
    trainer.log = said.append
    monkeypatch.setattr(runners, "cuda", lambda _: True)
    for wanted in ("captured", "auto"):
        made = runners.make_runner(trainer, wanted, epoch_order(0, 1, 48), source, 1)
        assert type(made) is runners.Eager
    assert len(said) == 2 and all("CUDA graphs" in line and "lamb" in line for line in said)


@pytest.mark.parametrize(
    ("flags", "code", "values"),
    [
        ("--optimizer adamv", "unknown-name", ["'adamv'", "adamw"]),
        ("--optimizer fusedlamb", "unknown-name", ["'fusedlamb'"]),
        ("--optimizer kron", "unknown-name", ["'kron'"]),
        ("--optimizer lion", "learning-rate-not-given", ["lion", "--lr"]),
        ("--optimizer adamw --optimizer-set beta=0.9", "unknown-option", ["'beta'", "betas"]),
        ("--optimizer adamw --optimizer-set lr=0.9", "unknown-option", ["'lr'"]),
        ("--optimizer adamw --optimizer-set eps=-1", "option-out-of-range", ["eps = -1"]),
        ("--optimizer adamw --momentum 0.8", "value-out-of-range", ["0.8", "betas"]),
        ("--optimizer adamw --nesterov", "value-out-of-range", ["nesterov", "adamw"]),
        ("--nesterov --momentum 0", "value-out-of-range", ["momentum = 0.0", "nesterov"]),
        ("--optimizer-set dampening", "value-malformed", ["--optimizer-set"]),
        ("--ema 1", "value-out-of-range", ["ema = 1.0", "[0, 1)"]),
        ("--label-smoothing 1", "value-out-of-range", ["label_smoothing = 1.0"]),
        ("--warmup -1", "value-out-of-range", ["warmup = -1.0"]),
        ("--warmup nan", "value-out-of-range", ["warmup = nan"]),
        ("--warmup 2 --epochs 2", "value-out-of-range", ["warmup = 2.0", "epochs = 2"]),
    ],
)
def test_what_cannot_be_asked_for(
    store: Path, tmp_path: Path, fails: Fails, flags: str, code: str, values: list[str]
) -> None:
    line = fails(*f"distill --cache {store} --out {tmp_path / 'a'} {flags}".split())
    assert line.code == code and all(value in line for value in values), line
    assert not (tmp_path / "a").exists()


def test_default_learning_rates() -> None:
    assert catalog.learning_rate("MobileNetV2") == 0.01
    assert catalog.learning_rate("resnet8", "sgdp") == 0.05
    teacher = TrainTeacher(dataset="shapes", model="MobileNetV2", optimizer="nadamw")
    assert teacher.for_size(32).lr == 0.001

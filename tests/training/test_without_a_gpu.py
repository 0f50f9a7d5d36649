"""A step with fake CUDA tensors: a tensor on another device, or a wait for the device, raises.

PyTorch computes shapes and devices only. The backward pass wants a GPU and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from richkd.config.settings import Distill
from richkd.data.inputs import ArrayInputs, Normalize
from richkd.losses import METHODS, Task, method_class
from richkd.losses.method import TARGET, Method
from richkd.models import create_model
from richkd.store.topk import keep_top
from richkd.training import loop
from richkd.training.data import Data, EpochRows, EvalSet
from richkd.training.loop import Trainer, predict
from richkd.training.optimizers import state_of
from richkd.training.runners import Captured

GPU = torch.device("cuda", 0)
N, C, B = 96, 10, 16


@pytest.fixture(autouse=True)
def no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: None)
    monkeypatch.setattr(loop, "default_generator", lambda _: torch.Generator())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # they are there


def captured(
    method: str,
    student: str = "resnet8",
    compact: bool = False,
    training: Mapping[str, Any] = MappingProxyType({}),
    **blend: Any,
) -> Captured:
    """What a GPU would capture, with fake tensors."""
    labels = torch.arange(N) % C
    model = create_model(student, C)
    width: Any = model.num_features
    kind, options = method_class(method, {})
    task = Task(
        labels=labels,
        student_dim=width,
        teacher_dim=24,
        clip_dim=32,
        alpha=0.5,
        teachers=("cnn", "clip", "vit"),
        others={"vit": 12},
        **blend,
    )
    objective = kind(options, task)
    with FakeTensorMode():
        fake(model)
        fake(objective)
        return on_gpu(model, objective, kind.row_names(options, task), compact, training)


def fake(module: nn.Module) -> None:
    """Put tensors of a GPU that is not there for those of a module; to be called in the mode."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=GPU))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=GPU)


def on_gpu(
    model: nn.Module,
    objective: Method,
    reads: tuple[str, ...],
    compact: bool,
    training: Mapping[str, Any],
) -> Captured:
    """The trainer of a student, and what captures its steps; to be called in the mode."""
    labels = torch.arange(N) % C
    images = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    inputs = ArrayInputs(images, GPU)
    views = torch.zeros(N, dtype=torch.int64)
    data = Data(
        train=inputs,
        train_labels=labels.to(GPU),
        test=EvalSet(images=inputs, labels=labels.to(GPU), views=views, ids=torch.arange(N)),
        normalize=Normalize((0.5,) * 3, (0.25,) * 3, GPU),
        num_classes=C,
    )
    settings = Distill(cache="none", batch_size=B, lr=0.1, precision="float32", **training)
    trainer = Trainer(model, objective, data, settings, GPU)
    logits = torch.randn(N, C, dtype=torch.float16)
    rows: dict[str, Any] = {
        TARGET: keep_top(logits, 4, 3.0) if compact else logits,
        "teacher_features": torch.randn(N, 24, dtype=torch.float16),
        "clip_features": torch.randn(N, 32, dtype=torch.float16),
        "vit/features": torch.randn(N, 12, dtype=torch.float16),
        **{f"{name}/logits": logits for name in ("cnn", "clip", "vit")},
    }
    source = EpochRows(views, {name: rows[name] for name in reads}).to(GPU)
    made: Captured = object.__new__(Captured)
    made.trainer, made.device, made.batch = trainer, GPU, None
    made.order = torch.arange(N, device=GPU)
    made.position = torch.zeros((), dtype=torch.int64, device=GPU)
    made.views, made.samples, made.rows = source.views.to(GPU), None, dict(source.rows)
    return made


WEIGHTS = {"weights": {"cnn": 0.5, "clip": 0.2, "vit": 0.3}}


@pytest.mark.parametrize(
    ("method", "blend"), [*((name, {}) for name in sorted(METHODS)), ("richkd", WEIGHTS)]
)
def test_a_step_stays_on_the_gpu(method: str, blend: dict[str, Any]) -> None:
    graph = captured(method, **blend)
    with graph.order.fake_mode:  # type: ignore[attr-defined]
        graph._step(B)
        trainer = graph.trainer
        assert trainer.sums is not None and trainer.sums.device == GPU
        assert all(tensor.device == GPU for tensor in trainer.state().values())
        assert graph.position.device == GPU


@pytest.mark.parametrize(
    "student",
    [
        "resnet8x4",
        "wrn_16_1",
        "vgg8",
        "MobileNetV2",
        "ShuffleV1",
        "ShuffleV2",
        "timm/mobilenetv3_small_050",
    ],
)
def test_students_stay_on_the_gpu(student: str) -> None:
    graph = captured("kd", student)
    with graph.order.fake_mode:  # type: ignore[attr-defined]
        graph._step(B)
        trainer = graph.trainer
        batches = trainer.data.test.images.batches(torch.arange(N), trainer.data.test.views, 40)
        logits = predict(trainer.model, batches, trainer.data.normalize)
        assert logits.shape == (N, C) and logits.device == GPU


def test_rows_by_their_largest_logits_stay_on_the_gpu() -> None:
    graph = captured("kd", compact=True)
    with graph.order.fake_mode:  # type: ignore[attr-defined]
        graph._step(B)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lamb"])
def test_optimizers_and_averages_stay_on_the_gpu(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a graph would read and write: the state, at one address, and the learning rate."""
    twin = create_model("resnet8", C)

    def copied(_: nn.Module) -> nn.Module:  # fake tensors cannot be
        fake(twin)
        return twin

    monkeypatch.setattr(loop, "copy", SimpleNamespace(deepcopy=copied))
    graph = captured("vid", training={"optimizer": optimizer, "ema": 0.9, "warmup": 1})
    trainer: Any = graph.trainer
    assert trainer.capturable == (optimizer != "lamb")

    def backward(_: torch.Tensor) -> None:
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def kernel(*lists: Any, lr: torch.Tensor, **_: Any) -> None:  # which fake tensors do not have
        assert lr is trainer.rate and lr.device == GPU
        assert all(tensor.device == GPU for tensors in lists for tensor in tensors)
        calls.append(lists)

    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, kernel)
    with graph.order.fake_mode:  # type: ignore[attr-defined]
        before = trainer.state()
        of_optimizer = state_of(trainer.optimizer, trainer.parameters)
        graph._step(B)
        trainer._set_rate(0.05)
        if trainer.capturable:
            assert trainer.state().keys() == before.keys()
            now = state_of(trainer.optimizer, trainer.parameters)
            assert all(now[name] is tensor for name, tensor in of_optimizer.items())
            assert all(tensor.device == GPU for tensor in before.values())
            assert sum(len(lists[0]) for lists in calls) == len(trainer.parameters)
        saved = trainer.snapshot()
        graph._step(B)
        trainer.restore(saved)


@pytest.mark.parametrize("fault", ["waits", "other device"])
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from richkd.losses.kd import KD

    label_term = KD.label_term

    def faulty(self: KD, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = label_term(self, batch)
        if fault == "waits":
            return loss if float(loss) < 1e9 else 0 * loss
        return loss + torch.zeros(1).expand(1, 1)[0]

    monkeypatch.setattr(KD, "label_term", faulty)
    raised = {"waits": DataDependentOutputException, "other device": RuntimeError}[fault]
    graph = captured("kd")
    with graph.order.fake_mode, pytest.raises(raised):  # type: ignore[attr-defined]
        graph._step(B)

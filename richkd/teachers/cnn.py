"""The CNN teacher: weights from a file, or trained here with cross-entropy."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from richkd.data.datasets import Dataset
from richkd.data.framing import NetworkInput
from richkd.data.inputs import Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.errors import RichKDError
from richkd.files import check_writable
from richkd.losses import Widths, method_class
from richkd.models import check_fit, check_trainable, create_model, forward
from richkd.models.weights import file_sha256, load_into, read_weights, save_tensors
from richkd.progress import Report, percent
from richkd.recipe import TrainTeacher
from richkd.training.device import choose_device
from richkd.training.loop import Data, EpochRows, EvalSet, Trainer, derive_seed

Outputs = tuple[int, ...]  # the teacher's output of each class, where its order is another


@dataclass(frozen=True)
class CNNTeacher:
    """A trained network in evaluation mode; images go in as bytes, framed as it takes them."""

    name: str
    model: nn.Module
    sha256: str
    num_features: int
    input: NetworkInput
    device: torch.device
    outputs: Outputs | None = None  # None: the data set's order

    @cached_property
    def normalize(self) -> Normalize:
        """Bytes to what the network takes."""
        return Normalize(self.input.mean, self.input.std, self.device)

    @torch.inference_mode()
    def rows(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B,S,S,3] uint8 -> logits [B,C], of the data set's classes, and features [B,F], f32."""
        logits, features = forward(self.model, self.normalize(images))
        return (logits if self._columns is None else logits[:, self._columns]), features

    @cached_property
    def _columns(self) -> Tensor | None:
        return None if self.outputs is None else torch.tensor(self.outputs, device=self.device)


def load_teacher(
    name: str,
    weights: Path | None,
    num_classes: int,
    network_input: NetworkInput,
    device: torch.device,
    *,
    outputs: Outputs | None = None,
    report: Report | None = None,
) -> CNNTeacher:
    """A teacher from a file of weights; of random ones without.

    Args:
        name: of the network.
        weights: its file.
        num_classes: C.
        network_input: what it takes.
        device: where it runs.
        outputs: which of its outputs is which class, where they have another order.
        report: where it is told what was unwrapped in the file, or left out.

    Raises:
        RichKDError: no such model or file, or weights of another architecture or classes.
    """
    size = network_input.size
    model = create_model(name, num_classes, image_size=size)
    num_features = check_fit(model, name, size, num_classes)
    if weights is not None:
        said = load_into(model, read_weights(weights), name, weights)
        if said and report is not None:
            report.say(said)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sha256 = file_sha256(weights) if weights else ""
    return CNNTeacher(name, model.eval(), sha256, num_features, network_input, device, outputs)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file of weights unasked, or to write where it cannot be."""
    check_writable(path)
    if path.exists() and not overwrite:
        raise RichKDError(
            f"{path} exists; pass it as --teacher-weights, choose another --out, or replace it "
            f"with --overwrite"
        )


def train_teacher(
    settings: TrainTeacher, dataset: Dataset, report: Report, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a network with cross-entropy on augmented views and save its last weights.

    Returns:
        A summary: path, model, last test accuracy, epochs, seconds.

    Raises:
        RichKDError: anything the user can mend, found before training starts.
    """
    settings = settings.for_size(dataset.image_size)
    check_trainable(settings.model)
    out = Path(settings.out)
    check_output(out, overwrite)
    device = choose_device(settings.device)
    num_classes, num_samples = len(dataset.class_names), len(dataset.train)
    torch.manual_seed(derive_seed(settings.seed, 0, 2))
    model = create_model(settings.model, num_classes, image_size=dataset.image_size)
    check_fit(model, settings.model, dataset.image_size, num_classes)
    method_type, options = method_class("ce", {})
    labels = dataset.train.labels.to(device)
    method = method_type(options, Widths(labels=labels, student=0, teacher=0, clip=0, alpha=1.0))
    data = Data(
        train=make_inputs(dataset.train.images, device),
        train_labels=labels,
        test=EvalSet.of(dataset.test, device),
        choice=EvalSet.of(dataset.validation, device) if dataset.validation else None,
        normalize=Normalize(dataset.mean, dataset.std, device),
        num_classes=num_classes,
    )
    trainer = Trainer(model, method, data, settings, device)
    space = dataset.train.view_space
    report.say(
        f"training teacher {settings.model}: {settings.epochs} epochs of {num_samples:,} images, "
        f"batch {settings.batch_size}, lr {settings.lr}, seed {settings.seed}, on {device}"
    )
    started = time.perf_counter()
    record = None
    with report.track("teacher", settings.epochs * num_samples, "images") as tick:
        for epoch in range(1, settings.epochs + 1):
            views = views_tensor(space.fresh(settings.seed, epoch, num_samples))
            record = trainer.train_epoch(epoch, EpochRows(views, {}), tick)
            if not abs(record.loss) < float("inf"):
                raise RichKDError(
                    f"the teacher diverged in epoch {epoch}; lower --lr (it is {settings.lr})"
                )
    assert record is not None and record.test_accuracy is not None
    folders = {"class_folders": json.dumps(dataset.class_folders)} if dataset.class_folders else {}
    save_tensors(out, trainer.model.state_dict(), {
        "model": settings.model, "dataset": dataset.name, "fingerprint": dataset.fingerprint,
        "epochs": str(settings.epochs), "seed": str(settings.seed),
        "test_accuracy": repr(record.test_accuracy),
        "class_names": json.dumps(dataset.class_names), **folders, **dataset.network_input.note,
    })  # fmt: skip
    validation = record.validation_accuracy
    said = "" if validation is None else f"validation {percent(validation)} %, "
    report.say(
        f"teacher {settings.model}: train {percent(record.train_accuracy)} %, {said}test "
        f"{percent(record.test_accuracy)} %, saved to {out}"
    )
    return {
        "weights": str(out),
        "model": settings.model,
        "dataset": dataset.name,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "top1_validation": validation,
        "top1_last": record.test_accuracy,
        "top5_last": record.test_top5,
        "seconds": time.perf_counter() - started,
    }

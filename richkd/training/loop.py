"""The training loop: one slab an epoch, no host-device synchronisation inside it.

Everything random in epoch e follows from (seed, e), so a run that was cut off after any epoch goes
on to the very same weights, and two students with one seed see the same samples in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from richkd.data.datasets import Split
from richkd.data.inputs import Batches, Inputs, Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.errors import RichKDError
from richkd.losses.method import Batch, Method
from richkd.models import forward
from richkd.recipe import Training
from richkd.store.topk import Rows
from richkd.training.device import half_precision

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

EVAL_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Images of a split that a network is evaluated on, and their labels, on the device."""

    images: Inputs  # of the whole split
    labels: Tensor  # [M], likewise
    views: Tensor  # the clean views, likewise
    ids: Tensor  # of the samples that count, ascending

    @classmethod
    def of(cls, split: Split, device: torch.device) -> EvalSet:
        """All samples of a split."""
        return cls(
            images=make_inputs(split.images, device),
            labels=split.labels.to(device),
            views=views_tensor(split.view_space.clean(len(split))),
            ids=torch.arange(len(split), device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything that runs may share: images and labels of all splits, on the device."""

    train: Inputs
    train_labels: Tensor  # [N]
    test: EvalSet
    choice: EvalSet | None = None  # images that choices are made on, apart from those of `test`
    normalize: Normalize
    num_classes: int


@dataclass(frozen=True)
class EpochRows:
    """What one epoch trains on: a view of every sample and the cached rows of those views."""

    views: Tensor  # [N] or [N,5]
    rows: Mapping[str, Rows]  # name -> [N,…]
    on_host: bool = False  # the rows stay there, and every batch of them goes to the device

    def to(self, device: torch.device) -> EpochRows:
        """The same on a device, for several runs; the views stay where samples are gathered."""
        if self.on_host:
            return self
        rows = {name: row.to(device, non_blocking=True) for name, row in self.rows.items()}
        return EpochRows(self.views, rows)

    def pinned(self) -> EpochRows:
        """The same in memory that a GPU copies from by itself."""
        rows = {name: row.pin_memory() for name, row in self.rows.items()}
        return EpochRows(self.views.pin_memory(), rows)

    def batch(self, index: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """The rows [B,…] f32 of the samples `index` on the device, the same `ids` on the host."""
        if not self.on_host:
            return {name: row[index].float() for name, row in self.rows.items()}
        batch = {name: row[ids].float() for name, row in self.rows.items()}
        if index.is_cuda:
            batch = {name: row.pin_memory() for name, row in batch.items()}
        return {name: row.to(index.device, non_blocking=True) for name, row in batch.items()}


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The metrics of one epoch; accuracies are None where the epoch was not evaluated on them."""

    epoch: int  # from 1
    lr: float
    loss: float
    terms: dict[str, float]
    train_accuracy: float
    validation_accuracy: float | None  # on the images that choices are made on
    test_accuracy: float | None
    test_top5: float | None
    seconds: float
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return asdict(self)

    @property
    def score(self) -> float | None:
        """What epochs are chosen by; None where the epoch was not evaluated."""
        return score_of(self.as_dict())


def score_of(record: Mapping[str, Any]) -> float | None:
    """Validation accuracy, else test accuracy, of a line of metrics.jsonl."""
    validation: float | None = record.get("validation_accuracy")
    test: float | None = record["test_accuracy"]
    return test if validation is None else validation


class Trainer:
    """A student, its method and their optimizer."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: Data,
        settings: Training,
        device: torch.device,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method = method.to(device)
        self.data = data
        self.settings = settings
        self.device = device
        self.parameters = [*model.parameters(), *method.parameters()]
        assert settings.lr is not None  # it depends on the network, and was found before
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.scheduler = make_scheduler(self.optimizer, settings)
        self.half = half_precision(settings.precision, device)

    def train_epoch(
        self, epoch: int, source: EpochRows, tick: Callable[[int], None] = lambda _: None
    ) -> EpochRecord:
        """Epoch number `epoch`, from 1; evaluates the student where the settings say so.

        Where there are images to make choices on, those of the test split wait for the last epoch.
        """
        start = time.perf_counter()
        order = epoch_order(self.settings.seed, epoch, len(self.data.train_labels))
        order = drop_lone_last(order, self.settings.batch_size)
        torch.manual_seed(derive_seed(self.settings.seed, epoch, 1))
        self.scheduler.step(epoch - 1)
        self.model.train()
        self.method.train()
        source = source.to(self.device)
        totals: Tensor | None = None
        terms: dict[str, Tensor] = {}
        batches = self.data.train.batches(order, source.views, self.settings.batch_size)
        chunks = torch.split(order, self.settings.batch_size)
        for (index, images), ids in zip(batches, chunks, strict=True):
            correct, terms = self.step(index, images, source.batch(index, ids), epoch)
            step = torch.stack([correct, *(term * len(index) for term in terms.values())])
            totals = step if totals is None else totals + step
            tick(len(index))
        assert totals is not None
        correct_count, *sums = (totals / len(order)).tolist()
        seconds = time.perf_counter() - start
        choice, last = self.data.choice, epoch == self.settings.epochs
        due = epoch % self.settings.eval_every == 0 or last
        validation, _ = self.evaluate(choice) if choice and due else (None, None)
        tested = last if choice else due
        top1, top5 = self.evaluate(self.data.test) if tested else (None, None)
        return EpochRecord(
            epoch=epoch,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=sum(sums),
            terms=dict(zip(terms, sums, strict=True)),
            train_accuracy=correct_count,
            validation_accuracy=validation,
            test_accuracy=top1,
            test_top5=top5,
            seconds=seconds,
            images_per_second=len(order) / seconds,
        )

    def step(
        self, index: Tensor, images: Tensor, rows: Mapping[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: images [B,H,W,3] uint8 of the samples `index` [B] and their cached rows.

        Returns:
            How many were classified correctly, and the loss terms; all stay on the device.
        """
        labels = self.data.train_labels[index]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits, features = forward(self.model, self.data.normalize(images))
        logits, features = logits.float(), features.float()
        terms = self.method(Batch(logits, features, labels, index, rows, epoch))
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.method.update()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
        return correct, {name: term.detach() for name, term in terms.items()}

    def evaluate(self, on: EvalSet) -> tuple[float, float]:
        """Top-1 and top-5 accuracy in 0..1, computed in f32."""
        self.model.eval()
        batches = on.images.batches(on.ids, on.views, EVAL_BATCH)
        logits = predict(self.model, batches, self.data.normalize)
        labels = on.labels[on.ids]
        return accuracy(logits, labels, 1), accuracy(logits, labels, 5)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that going on needs: weights, banks, momenta."""
        tensors = {f"student.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for number, parameter in enumerate(self.parameters):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum
        return tensors

    def resume(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Go on from a checkpoint of a folder; RichKDError where it is of another network."""
        try:
            self.load_state(tensors)
        except (RuntimeError, KeyError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise RichKDError(
                f"the checkpoint in {folder} does not fit this network ({reason}); begin anew with "
                f"--overwrite"
            ) from None

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; raises RuntimeError or KeyError where it does not fit."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                    if name.startswith(prefix)}  # fmt: skip

        self.model.load_state_dict(part("student."))
        self.method.load_state_dict(part("method."))
        for number, momentum in part("momentum.").items():
            parameter = self.parameters[int(number)]
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                momentum
            )


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches, normalize: Normalize) -> Tensor:
    """Logits [N,C] of a model in eval mode, in f32 and on the device."""
    return torch.cat([model(normalize(images)) for _, images in batches])


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Top-k accuracy in 0..1 of logits [N,C] (k at most C)."""
    from torchmetrics.functional.classification import multiclass_accuracy

    value: Tensor = multiclass_accuracy(
        logits.float(), labels, num_classes=logits.shape[1], top_k=min(k, logits.shape[1]),
        average="micro", validate_args=False,
    )  # fmt: skip
    return float(value)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Training) -> Scheduler:
    """timm's schedule: ÷10 after the milestones, or a cosine to 0.

    Milestones are 62.5, 75 and 87.5 % of the epochs where none were given.
    """
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.multistep_lr import MultiStepLRScheduler

    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=settings.epochs)
    milestones = settings.milestones or [
        max(1, round(settings.epochs * share)) for share in (0.625, 0.75, 0.875)
    ]
    # timm divides one epoch before a step; the literature trains the step's epoch at the old rate
    steps = [epoch + 1 for epoch in milestones]
    return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=0.1)


def derive_seed(*numbers: int) -> int:
    """An independent seed for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """The order [N] of the samples in an epoch: the same for every student and method."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 0))
    return torch.randperm(num_samples, generator=generator)


def drop_lone_last(order: Tensor, batch_size: int) -> Tensor:
    """Without a last batch of one sample, over which batch norm has no variance."""
    lone = len(order) % batch_size == 1 and len(order) > 1 and batch_size > 1
    return order[:-1] if lone else order


def timed(slabs: Iterator[EpochRows]) -> Iterator[tuple[EpochRows, float]]:
    """Each slab with the seconds that were spent waiting for it."""
    start = time.perf_counter()
    for slab in slabs:
        yield slab, time.perf_counter() - start
        start = time.perf_counter()


def all_rows(rows: Callable[[int], EpochRows], first: int, last: int) -> Iterator[EpochRows]:
    """`rows(epoch)` for epochs first..last, each read by a thread while the one before trains."""
    from concurrent.futures import ThreadPoolExecutor

    if first > last:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="slab") as pool:
        coming = pool.submit(rows, first)
        for epoch in range(first, last + 1):
            current = coming.result()
            if epoch < last:
                coming = pool.submit(rows, epoch + 1)
            yield current

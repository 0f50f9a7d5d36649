"""The training loop: one slab per epoch, without host-device synchronisation inside an epoch.

`Trainer.step` is the step; runners.py runs the steps, one by one or as CUDA graphs. Everything
random in epoch e follows from (seed, e), so a run that was interrupted after any epoch resumes to
the same weights, and two students with one seed see the same samples in the same order.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from richkd.config.settings import Training
from richkd.core.accuracy import correct
from richkd.core.errors import RichKDError, first_line
from richkd.core.seeds import derive_seed
from richkd.data.inputs import Batches, Normalize
from richkd.data.reuse import choose_lag, spread
from richkd.losses.method import Batch, Method, mixing
from richkd.models import forward
from richkd.training.data import Data, EpochRows, EvalSet, StepBatch, timed
from richkd.training.device import cuda, default_generator, half_precision
from richkd.training.initial import Initial
from richkd.training.optimizers import check_optimizer, load_state, make_optimizer, state_of
from richkd.training.parallel import Parallel, batch_sizes
from richkd.training.runners import Objective, Runner, check_step, make_runner

EVAL_BATCH = 256
EVAL_PIXELS = 2**21  # of a batch on a GPU; with less, launching kernels takes longest


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The metrics of one epoch; accuracies that were not evaluated are None."""

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
        """Return the line of metrics.jsonl."""
        return asdict(self)

    @property
    def score(self) -> float | None:
        """The accuracy that epochs are chosen by; None if the epoch was not evaluated."""
        return score_of(self.as_dict())


def score_of(record: Mapping[str, Any]) -> float | None:
    """Return the validation accuracy of a line of metrics.jsonl, else its test accuracy."""
    validation: float | None = record.get("validation_accuracy")
    test: float | None = record["test_accuracy"]
    return test if validation is None else validation


class Trainer:
    """Trains a student with a method."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: Data,
        settings: Training,
        device: torch.device,
        log: Callable[[str], None] = lambda _: None,
        parallel: Parallel | None = None,
    ) -> None:
        """Create the optimizer; the runner of the steps is chosen when the first epoch starts.

        Args:
            model: the student; it is moved to the device.
            method: the training objective; likewise.
            data: images and labels, on the device.
            settings: how to train.
            device: where to train.
            log: called with a message about how the steps run.
            parallel: the other processes that train this student; None if there are none.

        Raises:
            RichKDError: the device cannot run the steps that the settings ask for.
        """
        check_step(settings.step, device)
        check_optimizer(settings)
        self.parallel = parallel
        model = model if parallel is None else parallel.network(model, log)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method = method.to(device)
        self.data = data
        self.settings = settings
        self.device = device
        self.log = log
        self.half = half_precision(settings.precision, device)
        self.parameters = [*model.parameters(), *method.parameters()]
        self.optimizer, self.rate = make_optimizer(self.model, self.method, settings, device)
        self.average = Average(self.model, settings.ema) if settings.ema else None
        self.objective: Objective = make_objective(
            self.model, self.method, data.normalize, self.half, parallel
        )
        self.wanted: str = settings.step if parallel is None else "eager"
        self.runner: Runner | None = None
        self.ran = "eager"  # the runner of the steps so far, here or before an interruption
        # of a GPU: trainers whose steps take turns draw what each would draw alone
        self.generator = default_generator(device).clone_state() if cuda(device) else None
        self.epoch = torch.zeros((), dtype=epoch_dtype(device), device=device)
        self.sums: Tensor | None = None  # over an epoch: correct predictions, and each loss term
        self.terms: tuple[str, ...] = ()  # names of the loss terms
        self._begun: tuple[int, int, float] | None = None  # epoch, samples, start
        self.waited = 0.0  # seconds for images
        self._warming = 0, 0.0, 0.0  # steps before this epoch and of the warm-up; the epoch's rate

    @property
    def result(self) -> nn.Module:
        """The network that is tested and saved: the average of the weights, if there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def prefix(self) -> str:
        """The prefix of the names of its tensors in `state`."""
        return "student." if self.average is None else "average."

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs may hold the steps: the optimizer computes on the device alone."""
        return self.rate is not None

    def start_from(self, initial: Initial) -> None:
        """Replace the student's random weights, before the first step.

        Raises:
            RichKDError: the weights do not fit.
        """
        normalize = self.data.normalize
        initial.load(self.model, (normalize.mean, normalize.std), self.log)
        if self.average is not None:
            self.average.model.load_state_dict(self.model.state_dict())

    def train_epoch(
        self, epoch: int, source: EpochRows, tick: Callable[[int], None] = lambda _: None
    ) -> EpochRecord:
        """Train epoch number `epoch`, from 1, and evaluate if the settings ask for it.

        If there are images to make choices on, the test images wait for the last epoch.
        """
        for count in self.steps(epoch, source):
            tick(count)
        return self.end_epoch()

    def steps(self, epoch: int, source: EpochRows) -> Iterator[int]:
        """Run the steps of an epoch; yield the size of each batch once its step is launched."""
        order = self.order(epoch, source)
        total = source.whole or len(order)
        count = -(-total // self.settings.batch_size)
        self._set_rate(learning_rate(self.settings, epoch))
        self.epoch.fill_(epoch)
        self.model.train()
        self.method.train()
        source = source.to(self.device)
        if self.runner is None:
            if self.parallel is not None:
                self.objective = self.parallel.wrap(self.model, self.method, self.objective)
            epochs_to_go = self.settings.epochs + 1 - epoch
            self.runner = make_runner(self, self.wanted, order, source, epochs_to_go * count)
            self.ran = self.runner.name
        start = time.perf_counter()
        self._seed(derive_seed(self.settings.seed, epoch, 1))
        if self.parallel is not None:
            self.parallel.seed(self.settings.seed, epoch)
        if self.sums is not None:
            self.sums.zero_()
        self._begun = epoch, total, start
        self._warming = (epoch - 1) * count, self.settings.warmup * count, self.lr
        sizes = batch_sizes(total, self.settings.batch_size)
        for _, size in zip(self.runner.steps(order, source), sizes, strict=True):
            yield size  # of the whole batch

    def order(self, epoch: int, source: EpochRows) -> Tensor:
        """Return the entries of an epoch in the order of training, on the CPU."""
        if source.order is not None:  # of this process
            return source.order
        shape = self.data.train.shape
        return training_order(self.settings, epoch, len(source), source.each, shape)

    def end_epoch(self) -> EpochRecord:
        """Wait for the steps of the epoch that was started, and evaluate."""
        assert self._begun is not None and self.runner is not None and self.sums is not None
        epoch, count, start = self._begun
        self.runner.join()
        if self.parallel is not None:
            self.parallel.average_statistics(dict.fromkeys((self.model, self.result)))
        correct_count, *sums = (self.sums / count).tolist()
        seconds = time.perf_counter() - start
        choice, last = self.data.choice, epoch == self.settings.epochs
        due = epoch % self.settings.eval_every == 0 or last
        validation, _ = self.evaluate(choice) if choice and due else (None, None)
        tested = last if choice else due
        top1, top5 = self.evaluate(self.data.test) if tested else (None, None)
        return EpochRecord(
            epoch=epoch,
            lr=self.lr,
            loss=sum(sums),
            terms=dict(zip(self.terms, sums, strict=True)),
            train_accuracy=correct_count,
            validation_accuracy=validation,
            test_accuracy=top1,
            test_top5=top5,
            seconds=seconds,
            images_per_second=count / seconds,
        )

    def warm_up(self, number: int) -> None:
        """Set the learning rate of a step of this epoch, from 0, if it is one of the warm-up.

        Of the N steps of the warm-up, step n has n/N of the rate of its epoch.
        """
        before, whole, rate = self._warming
        if before + number < whole:
            self._set_rate(rate * min(1.0, (before + number + 1) / whole))

    def batches(self, order: Tensor, source: EpochRows) -> Iterator[StepBatch]:
        """Yield what `step` takes for each batch of an epoch.

        Args:
            order: its entries, on the CPU.
            source: their views and rows.
        """
        if self.parallel is None or source.whole is None:
            yield from self._batches(order, source, self.settings.batch_size)
        else:
            sizes = self.parallel.slices.own_sizes(source.whole)
            batches = self._batches(order, source, sizes)
            yield from self.parallel.steps(batches, source.whole)

    def _batches(
        self, order: Tensor, source: EpochRows, size: int | list[int]
    ) -> Iterator[StepBatch]:
        samples = source.samples
        batches = timed(self.data.train.batches(order, source.views, size, samples))
        on_device = None if samples is None else samples.to(self.device)
        for ((entries, images), waited), ids in zip(batches, torch.split(order, size), strict=True):
            self.waited += waited
            index = entries if on_device is None else on_device[entries]
            yield index, images, source.batch(entries, ids)

    def noise(self, order: Tensor, source: EpochRows) -> StepBatch:
        """Return a batch whose images are noise, so that no image has to be decoded."""
        ids = order[: self.settings.batch_size]
        index = (ids if source.samples is None else source.samples[ids]).to(self.device)
        shape = len(ids), *self.data.train.shape
        images = torch.randint(0, 256, shape, device=self.device).to(torch.uint8)
        return index, images, source.batch(ids.to(self.device), ids)

    def step(self, index: Tensor, images: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run one step and add its metrics to `sums`; nothing waits for the device.

        Args:
            index: sample ids [B].
            images: [B,H,W,3] uint8.
            rows: the cached rows of these samples.
        """
        labels = self.data.train_labels[index]
        logits, labels, terms = self.objective(images, labels, index, rows, self.epoch)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.method.update()
        if self.average is not None:
            self.average.update()
        with torch.no_grad():
            right = correct(logits, labels, 1)
            counted = torch.stack([right, *(term * len(labels) for term in terms.values())])
            if self.sums is None:
                self.sums, self.terms = torch.zeros_like(counted), tuple(terms)
            self.sums += counted

    @contextmanager
    def on_gpu(self) -> Iterator[None]:
        """Use this trainer's generator and let cuDNN measure, on a GPU; do nothing on a CPU.

        TF32 is only for networks whose precision is not f32.
        """
        if self.generator is None:
            yield
            return
        default = default_generator(self.device)
        others = default.graphsafe_get_state()
        default.graphsafe_set_state(self.generator)
        try:
            with cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.half):
                yield
        finally:
            default.graphsafe_set_state(others)

    def _seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        if self.generator is not None:
            self.generator.manual_seed(seed)

    def _set_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps; in place if they read it from the device."""
        self.lr = rate
        if self.rate is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        else:
            self.rate.fill_(rate)

    def evaluate(self, on: EvalSet) -> tuple[float, float]:
        """Return top-1 and top-5 accuracy in 0..1, computed in f32."""
        model = self.result.eval()
        height, width, _ = on.images.shape
        size = max(EVAL_BATCH, EVAL_PIXELS // (height * width)) if cuda(self.device) else EVAL_BATCH
        ids = on.ids if self.parallel is None else self.parallel.share(on.ids)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        if len(ids):
            batches = on.images.batches(ids, on.views, size)
            with cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                logits = predict(model, batches, self.data.normalize)
            counts = torch.stack([correct(logits, on.labels[ids], k) for k in (1, 5)])
        if self.parallel is not None:
            counts = self.parallel.total(counts)
        top1, top5 = (counts / len(on.ids)).tolist()
        return top1, top5

    def snapshot(self) -> dict[str, Tensor]:
        """Copy everything that steps change."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Undo all steps since a snapshot, in place."""
        for name, tensor in self._networks().items():
            tensor.copy_(saved[name])
        load_state(self.optimizer, self.parameters, saved)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that resuming needs: weights, banks, what the optimizer keeps."""
        return {**self._networks(), **state_of(self.optimizer, self.parameters)}

    def _networks(self) -> dict[str, Tensor]:
        return {
            f"{prefix}{name}": value
            for prefix, module in self._modules()
            for name, value in module.state_dict().items()
        }

    def _modules(self) -> list[tuple[str, nn.Module]]:
        average = [] if self.average is None else [("average.", self.average.model)]
        return [("student.", self.model), ("method.", self.method), *average]

    @property
    def ran_by(self) -> str:
        """The kind of device and the runner of the steps; "" for the reference in f32."""
        reference = self.ran == "eager" and (not self.half or self.parallel is not None)
        return "" if reference else f"{self.device.type}:{self.ran}"

    def release(self) -> None:
        """Drop the runner and the log, which refer to this trainer in turn."""
        self.runner, self.log = None, lambda _: None

    def resume(self, tensors: Mapping[str, Tensor], folder: Path, ran_by: str = "") -> None:
        """Resume from a checkpoint.

        Args:
            tensors: the tensors of `state`.
            folder: of the checkpoint, for the error.
            ran_by: the runner so far, which `auto` keeps on a device of the same kind.

        Raises:
            RichKDError: the checkpoint is of another network.
        """
        kind, _, runner = ran_by.partition(":")
        self.ran = runner or self.ran
        if self.wanted == "auto" and kind == self.device.type:
            self.wanted = runner
        try:
            self.load_state(tensors)
        except (RuntimeError, KeyError, IndexError) as error:
            reason = first_line(error)
            raise RichKDError(
                f"the checkpoint in {folder} does not fit this network ({reason}); start over with "
                f"--overwrite",
                code="checkpoint-unreadable",
            ) from None

    def share(self) -> None:
        """Replace the state of the other processes by that of rank 0, if there are any."""
        if self.parallel is not None:
            tensors = self.parallel.of_first(self.state())
            if not self.parallel.ranks.first:
                self.load_state(tensors)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned; raise RuntimeError or KeyError if it does not fit."""

        for prefix, module in self._modules():
            module.load_state_dict(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
            )
        load_state(self.optimizer, self.parameters, tensors)


class Average:
    """A moving average of a network's weights and running statistics.

    After step t it is a(t) = decay · a(t−1) + (1 − decay) · w(t), from the initial weights a(0); as
    in timm's ModelEmaV3, but for its first step, which copies.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy the network."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        mine, theirs = self.model.state_dict().values(), model.state_dict().values()
        pairs = list(zip(mine, theirs, strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.share = 1 - decay

    @torch.no_grad()
    def update(self) -> None:
        """Follow a step; nothing waits for the device."""
        mine, theirs = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(mine, theirs, self.share)
        for counter, now in self.counters:
            counter.copy_(now)


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches, normalize: Normalize) -> Tensor:
    """Return logits [N,C] of a model in eval mode, in f32 and on the device."""
    return torch.cat([model(normalize(images)) for _, images in batches])


def make_objective(
    model: nn.Module,
    method: Method,
    normalize: Normalize,
    half: bool,
    parallel: Parallel | None = None,
) -> Objective:
    """Return forward pass and losses as one function, which may be compiled.

    It takes images [B,H,W,3] uint8, labels [B], index [B], rows and the epoch, and returns logits
    [B,C] f32 and labels [B], of the whole batch if it is shared, and the loss terms, f32.
    """
    run = forward if parallel is None else parallel.forward

    def objective(
        images: Tensor, labels: Tensor, index: Tensor, rows: Mapping[str, Tensor], epoch: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits, features = run(model, normalize(images))
        batch = Batch(logits.float(), features.float(), labels, index, rows, epoch, *mixing(rows))
        if parallel is not None:
            batch = parallel.gather(batch)
        return batch.logits, batch.labels, method(batch)

    return objective


def epoch_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the epoch's number, in which methods compute their schedules."""
    return torch.float32 if device.type == "mps" else torch.float64


def learning_rate(settings: Training, epoch: int) -> float:
    """Return the rate of an epoch, from 1: ÷10 after each milestone, or a cosine from `lr` to 0.

    The default milestones are at 62.5, 75 and 87.5 % of the epochs.
    """
    assert settings.lr is not None  # resolved before, since it depends on the network
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / settings.epochs))
    milestones = settings.milestones or [
        max(1, round(settings.epochs * share)) for share in (0.625, 0.75, 0.875)
    ]
    return settings.lr * 0.1 ** sum(milestone < epoch for milestone in milestones)


def describe_training(settings: Training, num_samples: int) -> str:
    """Return the learning rate, and what else differs from plain SGD, for a log line."""
    left = settings.ema ** (settings.epochs * -(-num_samples // settings.batch_size))
    parts = {
        f"lr {settings.lr}": True,
        f"{settings.optimizer} with weight decay {settings.weight_decay}": settings.optimizer
        != "sgd",
        "Nesterov's momentum": settings.nesterov,
        f"warm-up over {settings.warmup:g} epochs": settings.warmup,
        f"weights averaged with decay {settings.ema:g}": settings.ema,
        f"in which {100 * left:.0f} % of the initial ones are left (lower --ema)": left >= 0.01,
        f"label smoothing {settings.label_smoothing:g}": settings.label_smoothing,
    }
    return ", ".join(text for text, applies in parts.items() if applies)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the images of an epoch, the same for every student and method."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 0))
    return torch.randperm(count, generator=generator)


def training_order(
    settings: Training, epoch: int, count: int, each: int, shape: tuple[int, int, int]
) -> Tensor:
    """Return the entries of an epoch in the order of training.

    Args:
        settings: of the run.
        epoch: from 1.
        count: E, the entries of the epoch.
        each: M, the views of each sample among them.
        shape: of a crop.
    """
    order = epoch_order(settings.seed, epoch, count // each)
    if each > 1:
        lag = choose_lag(len(order), each, settings.batch_size, math.prod(shape))
        order = spread(order, each, lag)
    return drop_lone_last(order, settings.batch_size)


def drop_lone_last(order: Tensor, batch_size: int) -> Tensor:
    """Drop a last batch of one sample, over which batch norm has no variance."""
    lone = len(order) % batch_size == 1 and len(order) > 1 and batch_size > 1
    return order[:-1] if lone else order

"""Runners of the steps of an epoch: one by one, compiled, or as CUDA graphs.

All runners train by `Trainer.step` and draw the same random numbers:

- eager: as PyTorch runs them; the reference;
- captured: the kernels of an eager step as a CUDA graph, so that a step is a single launch;
- compiled: forward pass, losses and gradients by torch.compile, on a GPU also as a CUDA graph.

`auto` chooses what pays on the device for the number of steps that are left.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from richkd.config.settings import Training
from richkd.core.errors import RichKDError, first_line
from richkd.core.progress import duration
from richkd.data.inputs import ArrayInputs
from richkd.training.data import Data, EpochRows, StepBatch
from richkd.training.device import cuda, wait_for

WARM_UP = 3  # steps before a capture, in which libraries allocate and choose their kernels
# Compiling a network of the zoo takes half a minute and saves a fifth of a step or more
# (docs/performance.md): from five minutes of steps on, it saves twice the time that it takes.
COMPILING_PAYS_S = 300.0
MANY = 1000  # programs that the compiler keeps for students and methods, instead of eight

Objective = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]


class Trainer(Protocol):
    """The interface of a trainer (loop.py) to its runner."""

    device: torch.device
    data: Data
    settings: Training
    objective: Objective
    half: bool
    log: Callable[[str], None]

    @property
    def capturable(self) -> bool: ...
    def warm_up(self, number: int) -> None: ...
    def step(self, index: Tensor, images: Tensor, rows: Mapping[str, Tensor]) -> None: ...
    def batches(self, order: Tensor, source: EpochRows) -> Iterator[StepBatch]: ...
    def noise(self, order: Tensor, source: EpochRows) -> StepBatch: ...
    def snapshot(self) -> dict[str, Tensor]: ...
    def restore(self, saved: Mapping[str, Tensor]) -> None: ...
    def on_gpu(self) -> AbstractContextManager[None]: ...


class Eager:
    """Runs one step after the other."""

    name = "eager"

    def __init__(self, trainer: Trainer, source: EpochRows) -> None:
        """Create a runner; nothing runs yet.

        Args:
            trainer: the trainer of the steps.
            source: an epoch's views and rows, at the same address in every epoch.
        """
        self.trainer = trainer

    def prepare(self, order: Tensor, source: EpochRows) -> None:
        """Prepare the steps, which may take long; the training is left unchanged.

        Args:
            order: sample ids [N] of an epoch, on the CPU.
            source: its views and rows.
        """

    def seconds(self, order: Tensor, source: EpochRows) -> float:
        """Time a step on noise, in seconds; the training is left unchanged."""
        saved = self.trainer.snapshot()
        batch = self.trainer.noise(order, source)
        taken = 0.0
        try:
            for _ in range(2):
                start = time.perf_counter()
                with self.trainer.on_gpu():
                    self.trainer.step(*batch)
                wait_for(self.trainer.device)
                taken = time.perf_counter() - start
        finally:
            self.trainer.restore(saved)
        return taken

    def steps(self, order: Tensor, source: EpochRows) -> Iterator[int]:
        """Train on all samples once; yield the size of each batch when its step is launched.

        Args:
            order: entries of the epoch, on the CPU.
            source: their views and rows.
        """
        for number, batch in enumerate(self.trainer.batches(order, source)):
            self.trainer.warm_up(number)
            with self.trainer.on_gpu():
                self.trainer.step(*batch)
            yield len(batch[0])

    def join(self) -> None:
        """Make the current stream wait for the steps."""


class Compiled(Eager):
    """Runs eager steps with a compiled objective; batches of another size are not compiled."""

    name = "compiled"

    def prepare(self, order: Tensor, source: EpochRows) -> None:
        compile_objective(self.trainer)
        self.seconds(order, source)


class Captured:
    """Replays CUDA graphs of the step, one for each batch size, on a stream of their own.

    If rows are on the device, and images that a gather takes views of, a graph gathers its batch
    itself, at a position that it advances. Otherwise each batch is copied to where the graph reads.
    """

    name = "captured"

    def __init__(self, trainer: Trainer, source: EpochRows) -> None:
        self.trainer = trainer
        self.device = trainer.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.gathers = trainer.data.train.gathers and not source.on_host
        self.order = torch.zeros(len(source), dtype=torch.int64, device=self.device)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self.views = source.views.to(self.device, copy=True)
        self.samples = None if source.samples is None else source.samples.to(self.device)
        self.rows = dict(source.rows)
        self.batch: StepBatch | None = None  # that batches are copied into

    def prepare(self, order: Tensor, source: EpochRows) -> None:
        """Capture a graph for each batch size in the order."""
        size = self.trainer.settings.batch_size
        sizes = {min(size, len(order)), len(order) % size} - {0}
        saved = self.trainer.snapshot()
        try:
            self._load(order, source)
            if not self.gathers:
                self.batch = self.trainer.noise(order, source)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with self.trainer.on_gpu():
                for size in sorted(sizes, reverse=True):
                    self._capture(size)
        finally:
            torch.cuda.synchronize(self.device)
            self.trainer.restore(saved)

    def _capture(self, size: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self.position.zero_()
                self._step(size)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # errors by thread, because another thread pins the memory of the next slab meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            self._step(size)
        self.graphs[size] = graph

    def _step(self, size: int) -> None:
        """Run the step that is captured: everything it reads and writes keeps its address."""
        inputs = self.trainer.data.train
        if self.batch is not None:
            index, images, rows = self.batch
            held = {name: row[:size] for name, row in rows.items()}
            self.trainer.step(index[:size], images[:size], held)
        elif isinstance(inputs, ArrayInputs):
            entries = self.order[self.position + torch.arange(size, device=self.device)]
            held = {name: row[entries].float() for name, row in self.rows.items()}
            index = entries if self.samples is None else self.samples[entries]
            self.trainer.step(index, inputs.at(index, self.views[entries]), held)
            self.position += size

    def _load(self, order: Tensor, source: EpochRows) -> None:
        """Copy what an epoch needs to the addresses that the graphs read."""
        self.order[: len(order)].copy_(order)
        self.position.zero_()
        if self.gathers:
            self.views.copy_(source.views)
            if self.samples is not None and source.samples is not None:
                self.samples.copy_(source.samples)
            for name, row in self.rows.items():
                if source.rows[name] is not row:
                    row.copy_(source.rows[name])  # type: ignore[arg-type]  # of one kind

    def seconds(self, order: Tensor, source: EpochRows) -> float:
        """Time a step, in seconds; the training is left unchanged."""
        saved = self.trainer.snapshot()
        self._load(order, source)
        torch.cuda.synchronize(self.device)
        start, size, replays = time.perf_counter(), max(self.graphs), 10
        with torch.cuda.stream(self.stream):
            for _ in range(replays):
                self.position.zero_()
                self.graphs[size].replay()
        self.stream.synchronize()
        taken = time.perf_counter() - start
        self.trainer.restore(saved)
        return taken / replays

    def steps(self, order: Tensor, source: EpochRows) -> Iterator[int]:
        self._load(order, source)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        batches = None if self.gathers else self.trainer.batches(order, source)
        for number, part in enumerate(torch.split(order, self.trainer.settings.batch_size)):
            with torch.cuda.stream(self.stream):
                self.trainer.warm_up(number)  # sets the rate that the graph reads
                if batches is not None:
                    self._copy(next(batches))
                self.graphs[len(part)].replay()
            yield len(part)

    def _copy(self, batch: StepBatch) -> None:
        assert self.batch is not None
        (index, images, rows), size = self.batch, len(batch[0])
        index[:size].copy_(batch[0])
        images[:size].copy_(batch[1])
        for name, row in batch[2].items():
            rows[name][:size].copy_(row)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class CompiledGraphs(Captured):
    """Replays CUDA graphs of compiled steps."""

    name = "compiled"

    def prepare(self, order: Tensor, source: EpochRows) -> None:
        compile_objective(self.trainer)
        super().prepare(order, source)


Runner = Eager | Captured


def compile_objective(trainer: Trainer) -> None:
    """Compile forward pass and losses of full batches, with the random numbers of eager steps.

    The compiler runs on the first batch.
    """
    # its messages about the machine are of no use here
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    eager, size = trainer.objective, trainer.settings.batch_size
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    def objective(images: Tensor, *rest: Any) -> Any:
        if len(images) != size:
            return eager(images, *rest)
        # one program for each student and method of a sweep, which all seeds share
        many = dynamo.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY)
        with many, inductor.patch(fallback_random=True):
            return compiled(images, *rest)

    trainer.objective = objective


def check_step(wanted: str, device: torch.device) -> None:
    """Check that the device has a runner; raise RichKDError if not."""
    if wanted == "captured" and not cuda(device):
        raise RichKDError(
            f"step = 'captured' needs a CUDA device, but the device is {device}; remove --step, or "
            f"choose eager or compiled",
            code="step-unsupported",
        )


def make_runner(
    trainer: Trainer,
    wanted: str,
    order: Tensor,
    source: EpochRows,
    steps_to_go: int,
    compiling_pays_s: float = COMPILING_PAYS_S,
) -> Runner:
    """Make the wanted runner and prepare it; if that fails, log why and use an eager one.

    Args:
        trainer: of the steps; it is left unchanged.
        wanted: auto, eager, captured or compiled.
        order: sample ids [N] of the first epoch, on the CPU.
        source: its views and rows, on the device.
        steps_to_go: how many steps are left.
        compiling_pays_s: with `auto`, compile if these take as many seconds.
    """
    gpu = cuda(trainer.device)
    if wanted == "eager" or (wanted == "auto" and not gpu and not trainer.half):
        return Eager(trainer, source)  # `auto` in f32 on a CPU is the reference, bit for bit
    first: Runner = Eager(trainer, source)
    graphs = gpu and trainer.capturable
    if gpu and not graphs:
        trainer.log(
            f"no CUDA graphs for the steps of {trainer.settings.optimizer}, which computes on the "
            f"host as well; sgd, adam and adamw are faster"
        )
    if graphs and wanted != "compiled":
        first = _prepared(Captured(trainer, source), first, order, source)
    if wanted == "captured":
        return first
    if wanted == "auto":
        to_go = steps_to_go * first.seconds(order, source)
        if to_go < compiling_pays_s:
            return first
        trainer.log(f"{duration(to_go)} of {first.name} steps left: compiling pays")
    trainer.log("compiling the step, which may take a minute")
    compiled = (CompiledGraphs if graphs else Compiled)(trainer, source)
    return _prepared(compiled, first, order, source)


def _prepared(runner: Runner, otherwise: Runner, order: Tensor, source: EpochRows) -> Runner:
    """Prepare a runner; return the other one if that fails."""
    trainer = runner.trainer
    objective, start = trainer.objective, time.perf_counter()
    try:
        with warnings.catch_warnings(action="ignore"):  # of the compiler
            runner.prepare(order, source)
    except Exception as error:  # a network, a method or the compiler may raise anything
        trainer.objective = objective
        trainer.log(
            f"the step cannot be {runner.name} ({first_line(error)}); "
            f"continuing with {otherwise.name}"
        )
        if cuda(trainer.device):
            torch.cuda.empty_cache()
        return otherwise
    trainer.log(f"the step is {runner.name} (took {duration(time.perf_counter() - start)})")
    return runner

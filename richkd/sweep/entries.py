"""The runs of a grid, and the state of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from richkd.config.settings import Distill, to_table
from richkd.core.errors import RichKDError, machine_fault
from richkd.training.precision import StepTimes
from richkd.training.run_folder import configuration

# Errors that end one run and leave the others intact: divergence, too little memory, …
FAILURES = (RichKDError, RuntimeError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What training a student costs, estimated from two steps on noise."""

    parameters: int
    features: int
    epoch_s: float  # with its share of the tests
    memory: int  # bytes: weights, gradients, momenta, activations, the method's banks
    precisions: StepTimes | None = None  # on a CPU with bfloat16, if no precision was chosen


@dataclass(kw_only=True)
class Entry:
    """A run of the grid and its state."""

    settings: Distill
    done: int = 0  # epochs
    images: int = 0  # of the epoch in progress
    scores: dict[int, float] = field(default_factory=dict)  # epoch -> top-1 in 0..1
    scored_on: str = "test"  # the images of the scores: test, held-out test or validation
    state: str = "waiting"  # waiting, training, done, failed, stopped
    reason: str = ""
    cost: Estimate | None = None  # of runs that are not complete
    epoch_s: float | None = None  # as measured; the estimate counts before that
    summary: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The name of the run in messages."""
        return Path(self.settings.out).name

    @property
    def configuration(self) -> str:
        """A key that runs share if they differ in their seed only."""
        return repr(sorted(configuration(to_table(self.settings)).items()))

    @property
    def progress(self) -> str:
        """Epochs done, of how many."""
        return f"{self.done}/{self.settings.epochs}"

    @property
    def accuracy(self) -> float | None:
        """Top-1 in 0..1 after the last evaluated epoch, on the images that choices are made on."""
        return self.scores[max(self.scores)] if self.scores else None

    @property
    def best(self) -> float | None:
        """Top-1 in 0..1 after the best epoch, on the same images."""
        return max(self.scores.values(), default=None)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left with the device to itself; None if the cost of an epoch is not known."""
        if self.state in ("done", "failed", "stopped"):
            return 0.0
        epoch_s = self.epoch_s or (self.cost.epoch_s if self.cost else None)
        return None if epoch_s is None else (self.settings.epochs - self.done) * epoch_s

    @property
    def memory(self) -> int:
        """Bytes that training takes beyond what all runs share; 0 if that was not measured."""
        return self.cost.memory if self.cost else 0

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as complete."""
        self.state, self.summary = "done", summary
        self.done = self.settings.epochs

    def fail(self, reason: str) -> None:
        """Mark the run as failed; the others continue."""
        self.state, self.reason = "failed", reason


def describe_failure(error: Exception, settings: Distill, remedy: str) -> str:
    """Describe why a run failed, in one line.

    Args:
        error: what training raised.
        settings: the run's settings.
        remedy: what else helps if memory ran out.
    """
    reason = " ".join(str(error).split())
    if not isinstance(error, RichKDError) and (fault := machine_fault(error)) is not None:
        if fault.startswith("out of memory"):
            return (
                f"out of memory with batches of {settings.batch_size}; lower --batch-size or "
                f"{remedy}"
            )
        return fault
    return reason or type(error).__name__

"""The runs of a grid, and what has become of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from richkd.config.settings import Distill, to_table
from richkd.core.errors import RichKDError, machine_fault
from richkd.training.precision import StepTimes
from richkd.training.run_folder import configuration

# What may befall one run and leave the others whole: divergence, too little memory, …
FAILURES = (RichKDError, RuntimeError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What training a student takes, by two steps on noise."""

    parameters: int
    features: int
    epoch_s: float  # with its share of the tests
    memory: int  # bytes: weights, gradients, momenta, activations, the method's banks
    precisions: StepTimes | None = None  # on a CPU that has bfloat16, where the choice is open


@dataclass(kw_only=True)
class Entry:
    """A run of the grid, and what has become of it."""

    settings: Distill
    done: int = 0  # epochs
    images: int = 0  # of the epoch under way
    scores: dict[int, float] = field(default_factory=dict)  # epoch -> top-1 in 0..1
    scored_on: str = "test"  # the images of these: test, held-out test or validation
    state: str = "waiting"  # waiting, training, done, failed, stopped
    reason: str = ""
    cost: Estimate | None = None  # of those that are not done
    epoch_s: float | None = None  # as measured; before that, the estimate counts
    summary: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The run in a few words."""
        return Path(self.settings.out).name

    @property
    def configuration(self) -> str:
        """A key that runs share which differ in their seed only."""
        return repr(sorted(configuration(to_table(self.settings)).items()))

    @property
    def progress(self) -> str:
        """Epochs done, of how many."""
        return f"{self.done}/{self.settings.epochs}"

    @property
    def accuracy(self) -> float | None:
        """Top-1 of the last evaluated epoch in 0..1: on validation images where there are any."""
        return self.scores[max(self.scores)] if self.scores else None

    @property
    def best(self) -> float | None:
        """Top-1 of the best epoch, likewise."""
        return max(self.scores.values(), default=None)

    @property
    def seconds_left(self) -> float | None:
        """With the device to itself; None while nothing is known of that."""
        if self.state in ("done", "failed", "stopped"):
            return 0.0
        epoch_s = self.epoch_s or (self.cost.epoch_s if self.cost else None)
        return None if epoch_s is None else (self.settings.epochs - self.done) * epoch_s

    @property
    def memory(self) -> int:
        """Bytes while it trains, beside what all runs share; 0 where that was not measured."""
        return self.cost.memory if self.cost else 0

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete."""
        self.state, self.summary = "done", summary
        self.done = self.settings.epochs

    def fail(self, reason: str) -> None:
        """The run cannot go on; others can."""
        self.state, self.reason = "failed", reason


def describe_failure(error: Exception, settings: Distill, also: str) -> str:
    """What became of a run, in one line; `also` helps against too little memory."""
    reason = " ".join(str(error).split())
    if not isinstance(error, RichKDError) and (fault := machine_fault(error)) is not None:
        if fault.startswith("out of memory"):
            return (
                f"out of memory with batches of {settings.batch_size}; lower --batch-size or {also}"
            )
        return fault
    return reason or type(error).__name__

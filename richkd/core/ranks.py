"""The processes of one job, as torchrun starts them: which this is, and what the first tells all.

They speak by gloo, which every machine has; no tensor of a network goes over it. A process that no
launcher started is alone: rank 0 of 1, and nothing here costs it anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from richkd.core.errors import RichKDError, first_line

PATIENCE = timedelta(days=7)  # the first may train a teacher while the others wait
WAKE_S = 0.02  # while waiting, for signals; inside gloo they have to wait
T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that speaks for its job."""
    return _world() == 1 or os.environ.get("RANK") == "0"


def _world() -> int:
    """How many processes the launcher says that there are."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdecimal() and "RANK" in os.environ else 1


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job."""

    rank: int
    world: int
    first_here: bool = True  # of those on this machine

    @property
    def first(self) -> bool:
        """Whether this one decides, and reports."""
        return self.rank == 0

    @property
    def task(self) -> str:
        """For progress: of many, what is shown is the first one's share."""
        return "" if self.world == 1 else f", rank 0 of {self.world}"

    def own(self, work: Sequence[T]) -> Sequence[T]:
        """This process's share of some work: no two have the same, all have much the same."""
        return work[self.rank :: self.world]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, for all of them.

        Raises:
            RichKDError: whatever the first one raises; in the others, that it did.
        """
        if self.world == 1:
            return compute()
        told: list[tuple[bool, T | None]] = [(False, None)]
        try:
            if self.first:
                told = [(True, compute())]
        finally:
            self.wait()
            with _others_gone():
                dist.broadcast_object_list(told, src=0)
        good, value = told[0]
        if not good:
            raise RichKDError(
                f"rank {self.rank} stops: rank 0 could not go on, and says why",
                code="rank-zero-failed",
            )
        return value  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            with _others_gone():
                here = dist.barrier(async_op=True)
                while not here.is_completed():
                    time.sleep(WAKE_S)
                here.wait()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The job that the environment describes, this process being one of it.

    Raises:
        RichKDError: the other processes cannot be met.
    """
    if _world() == 1:
        yield Ranks(0, 1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RichKDError(
            f"cannot meet the other processes of this job ({first_line(error)}); start "
            f"it by torchrun --nproc-per-node N -m richkd …",
            code="ranks-cannot-meet",
        ) from None
    here = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
    except Exception:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not where a signal came: it would wait for the others


@contextmanager
def _others_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise RichKDError(
            "another process of this job is gone, and has said why if it could; start the job "
            "again, it goes on where it stopped",
            code="rank-lost",
        ) from None

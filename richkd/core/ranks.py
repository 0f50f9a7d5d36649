"""The processes of one job, as torchrun starts them.

Objects go through gloo, which every machine has; tensors on GPUs through NCCL, for those who train
a network together. A process started without a launcher is rank 0 of 1, at no cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from richkd.core.errors import RichKDError, first_line
from richkd.core.launcher import meet, number, processes, processes_here

PATIENCE = timedelta(days=7)  # rank 0 may train a teacher while the others wait
# NCCL does not see that a process ended; steps, which it is for, never take this long
GPU_PATIENCE = timedelta(minutes=30)
WAKE_S = 0.02  # between polls, so that signals are handled; gloo would block them
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in its job."""

    rank: int
    world: int
    local: int = 0  # its rank among those on this machine
    here: int = 1  # how many are on this machine
    group: dist.ProcessGroup | None = None  # for objects and for waiting; None for the default one

    @property
    def first_here(self) -> bool:
        """Whether this process is the first one on its machine."""
        return self.local == 0

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which decides and reports."""
        return self.rank == 0

    @property
    def task(self) -> str:
        """A suffix for the name of a task: with several processes, progress is rank 0's share."""
        return "" if self.world == 1 else f", rank 0 of {self.world}"

    def own(self, work: Sequence[T]) -> Sequence[T]:
        """Return this process's share of some work; the shares are disjoint and of similar size."""
        return work[self.rank :: self.world]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute a value in rank 0 and return it in all processes.

        Raises:
            RichKDError: what rank 0 raises; in the others, that rank 0 failed.
        """
        if self.world == 1:
            return compute()
        sent: list[tuple[bool, T | None]] = [(False, None)]
        try:
            if self.first:
                sent = [(True, compute())]
        finally:
            self.wait()
            with _others_gone():
                dist.broadcast_object_list(sent, src=0, group=self.group)
        succeeded, value = sent[0]
        if not succeeded:
            raise RichKDError(
                f"rank {self.rank} stops because rank 0 failed; see its message",
                code="rank-zero-failed",
            )
        return value  # type: ignore[return-value]

    def share(self, parts: Sequence[Tensor]) -> None:
        """Fill in the tensors of which the other processes computed their share, as in `own`.

        Args:
            parts: tensors on the CPU, of the same shapes in all processes.
        """
        self.wait()  # without blocking signals, until all are computed
        if self.world > 1:
            with _others_gone():
                for number, part in enumerate(parts):
                    dist.broadcast(part, src=number % self.world, group=self.group)

    def after_first(self, compute: Callable[[], T]) -> T:
        """Compute a value in rank 0, then in the other processes; return each its own.

        A mistake that all of them would find is thus raised by rank 0 alone; raises as
        `from_first`. On other machines, one goes first too, and may leave files to those beside it.
        """
        values: list[T] = []
        self.from_first(lambda: values.append(compute()))
        if self.first_here and not values:
            values.append(compute())
        self.wait()
        return values[0] if values else compute()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            with _others_gone():
                barrier = dist.barrier(group=self.group, async_op=True)
                while not barrier.is_completed():
                    time.sleep(WAKE_S)
                barrier.wait()


ALONE = Ranks(0, 1)


@contextmanager
def joined(*, on_gpus: bool = False) -> Iterator[Ranks]:
    """Join the job that the environment describes.

    Args:
        on_gpus: whether the processes exchange tensors on GPUs, each on its own.

    Raises:
        RichKDError: the other processes cannot be reached, or one of them ended.
    """
    if processes() == 1:
        yield ALONE
        return
    local = number("LOCAL_RANK", 0)
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        group: Any = None
        if on_gpus and torch.cuda.is_available() and dist.is_nccl_available():
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=GPU_PATIENCE)
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RichKDError(
            f"cannot reach the other processes of this job ({first_line(error)}); start "
            f"it with torchrun --nproc-per-node N -m richkd …",
            code="ranks-cannot-meet",
        ) from None
    meet()
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local, processes_here(), group)
    except Exception as error:
        dist.destroy_process_group()
        if of_others(error):
            raise _lost() from None
        raise
    dist.destroy_process_group()  # not after a signal: it would wait for the others


def of_others(error: Exception) -> bool:
    """Return whether an error says that another process cannot be reached any more."""
    if isinstance(error, RichKDError):
        return False  # whatever letters are in a path that it names
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _lost() -> RichKDError:
    return RichKDError(
        "another process of this job ended; see its message, and start the job again to resume",
        code="rank-lost",
    )


@contextmanager
def _others_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise _lost() from None

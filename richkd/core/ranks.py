"""The processes of one job, as torchrun starts them.

They communicate through gloo, which every machine has, and never send tensors of networks. A
process started without a launcher is rank 0 of 1, at no cost.
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
from torch import Tensor

from richkd.core.errors import RichKDError, first_line

PATIENCE = timedelta(days=7)  # rank 0 may train a teacher while the others wait
WAKE_S = 0.02  # between polls, so that signals are handled; gloo would block them
T = TypeVar("T")


def is_first() -> bool:
    """Return whether this is the process of its job that prints and decides."""
    return _world() == 1 or os.environ.get("RANK") == "0"


def _world() -> int:
    """Return the number of processes of the job, from the launcher's environment variables."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in its job."""

    rank: int
    world: int
    first_here: bool = True  # the first one on this machine

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
                dist.broadcast_object_list(sent, src=0)
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
                    dist.broadcast(part, src=number % self.world)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            with _others_gone():
                barrier = dist.barrier(async_op=True)
                while not barrier.is_completed():
                    time.sleep(WAKE_S)
                barrier.wait()


ALONE = Ranks(0, 1)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job that the environment describes.

    Raises:
        RichKDError: the other processes cannot be reached.
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
            f"cannot reach the other processes of this job ({first_line(error)}); start "
            f"it with torchrun --nproc-per-node N -m richkd …",
            code="ranks-cannot-meet",
        ) from None
    here = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
    except Exception:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after a signal: it would wait for the others


@contextmanager
def _others_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise RichKDError(
            "another process of this job ended; see its message, and start the job again to resume",
            code="rank-lost",
        ) from None

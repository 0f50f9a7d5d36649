"""Checkpoints of a training, and how they are written while it continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.models.weights import read_note, read_safetensors, save_tensors
from richkd.training.device import wait_for


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by validation accuracy, or by test accuracy without validation images.

    Epoch 0 before the first evaluation.
    """

    epoch: int = 0
    accuracy: float = -1.0


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    epoch: int = 0
    best: Best = Best()
    seconds: float = 0.0  # of training, summed over interruptions
    step: str = ""  # the device and the runner of its steps, as Trainer.ran_by
    ranks: tuple[int, ...] = ()  # numbers of processes that trained epochs, ascending

    @classmethod
    def of_note(cls, path: Path, note: Mapping[str, str]) -> Progress:
        """Read the metadata of a checkpoint; raise RichKDError if the file is not one."""
        try:
            best = Best(int(note["best_epoch"]), float(note["best"]))
            seconds = float(note.get("seconds", 0.0))
            ranks = tuple(map(int, note.get("ranks", "1").split(",")))
            return cls(int(note["epoch"]), best, seconds, note.get("step", ""), ranks)
        except (KeyError, ValueError):
            raise RichKDError(
                f"{path} is not a checkpoint; start over with --overwrite",
                code="checkpoint-unreadable",
            ) from None

    @property
    def note(self) -> dict[str, str]:
        """The metadata of a checkpoint."""
        step = {"step": self.step} if self.step else {}
        if max(self.ranks, default=1) > 1:
            step["ranks"] = ",".join(map(str, self.ranks))
        return {
            "epoch": str(self.epoch),
            "best_epoch": str(self.best.epoch),
            "best": repr(self.best.accuracy),
            "seconds": repr(self.seconds),
            **step,
        }


class Checkpoints:
    """The last checkpoint of a training and the previous one, in case the last is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def files(self) -> list[Path]:
        """The files that exist, the last checkpoint first."""
        names = ("checkpoint.safetensors", "previous.safetensors")
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def save(self, progress: Progress, state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint and keep the previous one."""
        last = self.folder / "checkpoint.safetensors"
        if last.is_file():
            last.replace(self.folder / "previous.safetensors")
        save_tensors(last, state, progress.note)

    def progress(self) -> Progress:
        """Read the progress of the newest intact checkpoint, without its tensors.

        Raises:
            RichKDError: all are damaged.
        """
        for path in self.files:
            with suppress(RichKDError):
                return Progress.of_note(path, read_note(path))
        if self.files:
            raise self._unreadable
        return Progress()

    def load(self, log: Callable[[str], None]) -> tuple[Progress, dict[str, Tensor]]:
        """Load the newest intact checkpoint.

        Args:
            log: called with a message if the last checkpoint is damaged.

        Raises:
            RichKDError: all are damaged.
        """
        for path in self.files:
            try:
                tensors, note = read_safetensors(path)
                return Progress.of_note(path, note), tensors
            except RichKDError as error:
                log(f"{str(error).partition('; ')[0]}; trying the previous checkpoint")
        raise self._unreadable

    def remove(self) -> None:
        """Delete all checkpoints, because the training is complete or starts over."""
        for path in self.files:
            path.unlink()

    @property
    def _unreadable(self) -> RichKDError:
        return RichKDError(
            f"no checkpoint in {self.folder} can be read; start over with --overwrite",
            code="checkpoint-unreadable",
        )


class Saving:
    """Writes the files of each epoch, in order; on a GPU, while the next epoch trains."""

    def __init__(self, threaded: bool) -> None:
        """Write in a thread if `threaded`, else within `submit`."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if threaded else None
        self._written: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def tensors(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors that can be written while training continues: copies, on a GPU.

        Waits until the previous epoch is written, because its copies are reused; raises as
        `wait`.
        """
        if self._pool is None:
            return state
        self.wait()
        for name, tensor in state.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda
                )
            self._copies[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in state.values()}:
            wait_for(device)
        return self._copies

    def submit(self, write: Callable[[], None]) -> None:
        """Write, once everything submitted before is written; raise as `wait`."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._written = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until everything is written; raise what writing raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait without raising, because something else has ended the training."""
        if self._pool is not None:
            self._pool.shutdown()

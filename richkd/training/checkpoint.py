"""The folders of trainings: settings and checkpoints, and of a student's run all that it gives.

    recipe.toml             every setting, resolved
    metrics.jsonl           a line an epoch
    last.safetensors        the student after the last epoch
    best.safetensors        the student after its best epoch
    checkpoint.safetensors  everything that resuming needs; gone once the run is complete
    previous.safetensors    the same, an epoch earlier, should the other be damaged
    summary.json            written last: the run is complete where it is there

Every file but metrics.jsonl is written whole or not at all; of that, resuming keeps the epochs
that the checkpoint has seen. A teacher's training has recipe.toml and the checkpoints only, in a
folder beside the weights that is gone once these are written.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
import torch
from torch import Tensor

from richkd.config.settings import recorded_holdout
from richkd.core.errors import RichKDError
from richkd.core.files import (
    atomic_write,
    check_still_locked,
    check_unlocked,
    check_writable,
    is_temporary,
    locked,
    read_json,
    remove_temporary,
    to_json,
    write,
    write_json,
)
from richkd.core.ownership import remove_about_run
from richkd.models.weights import read_note, read_safetensors, save_tensors
from richkd.training.device import wait_for

# Settings that may be others when a training is resumed.
PLACES = frozenset({"device", "step", "data_root", "dataset", "cache", "out"})
_OF_THE_SCHEDULE = {"epochs", "schedule", "milestones"}


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by validation accuracy where there is one, else by test accuracy.

    Epoch 0 before any.
    """

    epoch: int = 0
    accuracy: float = -1.0


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    epoch: int = 0
    best: Best = Best()
    seconds: float = 0.0  # that its epochs took, in all parts of it
    step: str = ""  # the device and the runner of its steps, as Trainer.ran_by

    @classmethod
    def of_note(cls, path: Path, note: Mapping[str, str]) -> Progress:
        """By the metadata of a checkpoint; RichKDError where the file is none."""
        try:
            best = Best(int(note["best_epoch"]), float(note["best"]))
            seconds = float(note.get("seconds", 0.0))
            return cls(int(note["epoch"]), best, seconds, note.get("step", ""))
        except (KeyError, ValueError):
            raise RichKDError(
                f"{path} is no checkpoint; begin anew with --overwrite",
                code="checkpoint-unreadable",
            ) from None

    @property
    def note(self) -> dict[str, str]:
        """For the metadata."""
        step = {"step": self.step} if self.step else {}
        return {
            "epoch": str(self.epoch),
            "best_epoch": str(self.best.epoch),
            "best": repr(self.best.accuracy),
            "seconds": repr(self.seconds),
            **step,
        }


class Checkpoints:
    """The last checkpoint of a training and the one before, which is read where that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def files(self) -> list[Path]:
        """Those that there are, the last one first."""
        names = ("checkpoint.safetensors", "previous.safetensors")
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def save(self, progress: Progress, state: Mapping[str, Tensor]) -> None:
        """Write one, and keep the one before."""
        last = self.folder / "checkpoint.safetensors"
        if last.is_file():
            last.replace(self.folder / "previous.safetensors")
        save_tensors(last, state, progress.note)

    def progress(self) -> Progress:
        """How far the newest one that can be read is, without its tensors.

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
        """The newest one that can be read.

        Args:
            log: is told of a last checkpoint that is damaged.

        Raises:
            RichKDError: all are damaged.
        """
        for path in self.files:
            try:
                tensors, note = read_safetensors(path)
                return Progress.of_note(path, note), tensors
            except RichKDError as error:
                log(f"{error}; looking for the one before")
        raise self._unreadable

    def remove(self) -> None:
        """The training is complete."""
        for path in self.files:
            path.unlink()

    @property
    def _unreadable(self) -> RichKDError:
        return RichKDError(
            f"no checkpoint in {self.folder} can be read; begin anew with --overwrite",
            code="checkpoint-unreadable",
        )


class Saving:
    """Writes what an epoch leaves, on a GPU while the next one trains: one after the other."""

    def __init__(self, beside: bool) -> None:
        """`beside`: in a thread; else at once."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if beside else None
        self._written: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def tensors(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What may be written while training goes on: of a GPU, copies on the host.

        The copies of the epoch before are written first, for these take their place; errors are
        those of `wait`.
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
        """Wait for what was submitted before, then write; errors as of `wait`."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._written = self._pool.submit(write)

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait likewise, without an error: something else has ended the training."""
        if self._pool is not None:
            self._pool.shutdown()


class TrainingFolder:
    """Settings and checkpoints of one training."""

    KEY: ClassVar[str]  # of what the training learns from, in recipe.toml
    WHAT: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path)

    def check(self, recipe: Mapping[str, Any], identity: str, *, overwrite: bool) -> None:
        """Refuse, before anything long, what `begin` would refuse; touches nothing.

        Args:
            recipe: the resolved settings.
            identity: what the training learns from; another one is another training.
            overwrite: replace what is there.

        Raises:
            RichKDError: the folder holds something else, or a training of other settings.
        """
        if overwrite or not self.complete:
            check_writable(self.path)
        if self._vacant:
            return
        if not self._ours:
            raise RichKDError(
                f"{self.path} exists and is no {self.WHAT}; choose another --out, or move it away",
                code="foreign-file",
            )
        if not overwrite:
            self.check_same(recipe, identity)

    def begin(self, recipe: Mapping[str, Any], identity: str, *, overwrite: bool) -> bool:
        """Make the folder, or find the training in it to be this one; whether to resume it.

        Files of others in the folder stay. Arguments and errors are those of `check`.
        """
        self.check(recipe, identity, overwrite=overwrite)
        remove_temporary(self.path)
        if not self._vacant and not overwrite:
            if self.checkpoints.files:
                return True
            self._clear()  # interrupted in its first epoch: there is nothing to resume
            return False
        if overwrite:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write(self._recorded, tomli_w.dumps({self.KEY: identity, **recipe}))
        return False

    def _clear(self) -> None:
        """Delete what richkd wrote, but for the settings, which are replaced."""
        self.checkpoints.remove()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return False

    @property
    def _recorded(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def _vacant(self) -> bool:
        return not self.path.exists() or (
            self.path.is_dir() and all(map(is_temporary, self.path.iterdir()))
        )

    @property
    def _ours(self) -> bool:
        """Whether richkd made the folder; where its settings are damaged, other files tell."""
        if not self._recorded.is_file():
            return False
        try:
            return self.KEY in tomllib.loads(self._recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            others = ("metrics.jsonl", "summary.json")
            return bool(self.checkpoints.files) or any((self.path / n).is_file() for n in others)

    def check_same(self, recipe: Mapping[str, Any], identity: str) -> None:
        """Refuse a folder whose training has other settings, or learns from something else."""
        wanted, was = {self.KEY: identity, **recipe}, self._read_recipe()
        if was.get(self.KEY) != identity:
            raise self._other_identity(str(was.get(self.KEY)), identity)
        was = self._completed(was)
        for name in sorted((was.keys() | wanted.keys()) - PLACES):
            if was.get(name) != wanted.get(name):
                why = (
                    "the learning rates follow from the number of epochs, so a training cannot be "
                    "extended: "
                    if name in _OF_THE_SCHEDULE
                    else "give the same settings, "
                )
                raise RichKDError(
                    f"{self.path} holds a {self.WHAT} of other settings: {name} was "
                    f"{was.get(name)!r} and is now {wanted.get(name)!r}; {why}{self._remedy}",
                    code="run-settings-differ",
                )

    def _completed(self, was: dict[str, Any]) -> dict[str, Any]:
        """Recorded settings, with those that earlier versions did not record."""
        return was

    def _other_identity(self, was: str, now: str) -> RichKDError:
        return RichKDError(
            f"the {self.WHAT} in {self.path} learns from other images, or from these read or seen "
            f"otherwise ({was}; now {now}); {self._remedy}",
            code="teacher-images-differ",
        )

    @property
    def _remedy(self) -> str:
        return "choose another --out, or begin anew (--overwrite, or remove the folder)"

    def _read_recipe(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RichKDError(
                f"cannot read {self._recorded}: {error}; begin anew with --overwrite",
                code="checkpoint-unreadable",
            ) from None


class TeacherFolder(TrainingFolder):
    """A teacher's training while it lasts, beside the file of weights that it will be."""

    KEY = "richkd-train-teacher"
    WHAT = "training of a teacher"

    def __init__(self, weights: Path) -> None:
        super().__init__(weights.with_suffix(".training"))

    def remove(self) -> None:
        """The weights are written, or the training begins anew; files of others stay."""
        if not self._ours:
            return
        remove_temporary(self.path)
        self.checkpoints.remove()
        self._recorded.unlink()
        with suppress(OSError):  # other files are in it
            self.path.rmdir()

    def tidy(self, weights: Path) -> None:
        """Delete what a process left that was killed when the weights were there already."""
        with suppress(RichKDError):  # that process is still at it
            check_unlocked(weights)  # takes away the lock of one that is gone
            if self.path.exists():
                with locked(weights):
                    self.remove()


class RunFolder(TrainingFolder):
    """The files of one student's run."""

    KEY = "richkd-distill"
    WHAT = "run"

    def _clear(self) -> None:
        names = ("summary.json", "metrics.jsonl", "last.safetensors", "best.safetensors")
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        super()._clear()
        remove_about_run(self.path)

    def begin(self, recipe: Mapping[str, Any], identity: str, *, overwrite: bool) -> bool:
        """As of every training; RichKDError also where the run is complete."""
        self.check(recipe, identity, overwrite=overwrite)
        if self.complete and not overwrite:  # by another process, since that was looked at
            raise RichKDError(
                f"{self.path} is complete already; begin it anew with --overwrite",
                code="run-complete",
            )
        return super().begin(recipe, identity, overwrite=overwrite)

    @property
    def complete(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None where the run is not complete.

        Raises:
            RichKDError: the file is damaged.
        """
        if not self.complete:
            return None
        summary = read_json(self.path / "summary.json")
        if summary is None:
            raise RichKDError(
                f"{self.path / 'summary.json'} is damaged; remove it, and the same command trains "
                f"the run again",
                code="summary-damaged",
            )
        return summary

    def tidy(self) -> None:
        """Delete what a process left that was killed when the run was complete already."""
        with suppress(RichKDError):  # that process is still at it
            check_unlocked(self.path)  # takes away the lock of one that is gone
            if self.checkpoints.files or any(map(is_temporary, self.path.iterdir())):
                with locked(self.path):
                    remove_temporary(self.path)
                    self.checkpoints.remove()

    def _completed(self, was: dict[str, Any]) -> dict[str, Any]:
        return {"holdout": recorded_holdout(was), **was}

    def _other_identity(self, was: str, now: str) -> RichKDError:
        return RichKDError(
            f"the run in {self.path} was trained on another store, or on this one before it was "
            f"made anew ({was}; now {now}); {self._remedy}",
            code="run-cache-differs",
        )

    @property
    def of_earlier_version(self) -> bool:
        """Whether the run in it was begun before every recipe named what was held out."""
        return self._recorded.is_file() and "holdout" not in self._read_recipe()

    def metrics(self) -> list[dict[str, Any]]:
        """A record an epoch; of a run that was interrupted, also those after its checkpoint."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # cut off in the middle of it
                break
        return records

    def epochs_done(self) -> int:
        """How many epochs a resumed run need not train; 0 where there is no checkpoint.

        Raises:
            RichKDError: all checkpoints are damaged.
        """
        return self.checkpoints.progress().epoch

    def save_epoch(
        self,
        progress: Progress,
        record: Mapping[str, Any],
        state: Mapping[str, Tensor],
        student: Mapping[str, Tensor],
    ) -> None:
        """Metrics, best weights if this epoch is it, and the checkpoint, in this order."""
        check_still_locked(self.path)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
        if progress.best.epoch == progress.epoch:
            save_tensors(self.path / "best.safetensors", student)
        self.checkpoints.save(progress, state)

    def load(self, log: Callable[[str], None]) -> tuple[Progress, dict[str, Tensor]]:
        """As of `Checkpoints`; trims the metrics to the epochs that it has seen."""
        progress, tensors = self.checkpoints.load(log)
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: progress.epoch]
        write(metrics, "".join(lines))
        return progress, tensors

    def best_weights(self) -> dict[str, Tensor]:
        """The student after its best epoch; RichKDError where the file is damaged."""
        return read_safetensors(self.path / "best.safetensors")[0]

    def finish(self, student: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """The last weights and the summary; the checkpoint has done its duty."""
        check_still_locked(self.path)
        save_tensors(self.path / "last.safetensors", student)
        write_json(self.path / "summary.json", summary)
        self.checkpoints.remove()

    def contents(self) -> dict[str, bytes]:
        """The files of a run that is complete, by their names."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.path.iterdir())
            if path.is_file() and not is_temporary(path)
        }

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Write what `contents` gave elsewhere; the summary last, as `finish` does.

        The run that was trained elsewhere is the one that was cut off here, if there is one.
        """
        for name in sorted(files, key="summary.json".__eq__):
            with atomic_write(self.path / name) as temporary:
                temporary.write_bytes(files[name])
        self.checkpoints.remove()

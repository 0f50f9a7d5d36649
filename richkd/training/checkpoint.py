"""A run folder: settings, metrics, weights, and the checkpoint that `--resume` goes on from.

    recipe.toml             every setting, resolved
    metrics.jsonl           a line an epoch
    last.safetensors        the student after the last epoch
    best.safetensors        the student after its best epoch
    checkpoint.safetensors  everything that going on needs; gone once the run is complete
    previous.safetensors    the same, an epoch earlier, should the other be damaged
    summary.json            written last: the run is complete where it is there

Every file but metrics.jsonl is written whole or not at all; of that, resuming keeps the epochs
that the checkpoint has seen.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from richkd.errors import RichKDError
from richkd.files import check_writable, is_temporary, remove_temporary, replacing, write
from richkd.models.weights import read_note, read_safetensors, save_tensors
from richkd.recipe import recorded_holdout

_NOT_TRAINING = {"device", "data_root", "dataset", "cache", "out"}


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by validation accuracy where there is one, else by test accuracy.

    Epoch 0 before any.
    """

    epoch: int = 0
    accuracy: float = -1.0


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(
        self, recipe: Mapping[str, Any], identity: str, *, resume: bool, overwrite: bool
    ) -> None:
        """Refuse, before anything long, what `begin` would refuse; touches nothing.

        Args:
            recipe: the resolved settings.
            identity: what the run trains on; another one is another run.
            resume: go on with a run that was cut off.
            overwrite: replace a run that is there.

        Raises:
            RichKDError: the folder holds something else, another run, or one that is complete.
        """
        check_writable(self.path)
        if self._vacant:
            return
        if not self._recorded.is_file():
            raise RichKDError(f"{self.path} exists and is no run; choose another --out")
        if overwrite:
            return
        if not resume:
            remedy = "" if self.complete else "go on with it by --resume, "
            raise RichKDError(
                f"{self.path} exists; {remedy}replace it by --overwrite, or choose another --out"
            )
        self.check_same(recipe, identity)
        if self.complete:
            raise RichKDError(f"{self.path} is complete already; begin it anew with --overwrite")

    def begin(
        self, recipe: Mapping[str, Any], identity: str, *, resume: bool, overwrite: bool
    ) -> bool:
        """Make the folder, or find the run in it to be this one; whether to go on with it.

        Arguments and errors are those of `check`.
        """
        self.check(recipe, identity, resume=resume, overwrite=overwrite)
        remove_temporary(self.path)
        if not self._vacant:
            if resume and not overwrite:
                if self._checkpoints:
                    return True
                # cut off in its first epoch: nothing to go on with
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
                return False
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write(self._recorded, tomli_w.dumps({"richkd-distill": identity, **recipe}))
        return False

    @property
    def _checkpoints(self) -> list[Path]:
        """Those that there are, the last one first."""
        names = ("checkpoint.safetensors", "previous.safetensors")
        return [self.path / name for name in names if (self.path / name).is_file()]

    @property
    def _recorded(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def _vacant(self) -> bool:
        return not self.path.exists() or (
            self.path.is_dir() and all(map(is_temporary, self.path.iterdir()))
        )

    @property
    def complete(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None where the run is not complete."""
        if not self.complete:
            return None
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary

    def check_same(self, recipe: Mapping[str, Any], identity: str) -> None:
        """Refuse a folder whose run has other settings, or trained on something else."""
        wanted = {"richkd-distill": identity, **recipe}
        was = self._read_recipe()
        if was.get("richkd-distill") != identity:
            raise RichKDError(
                f"the run in {self.path} was trained on another store, or on this one before it "
                f"was made anew ({was.get('richkd-distill')}; now {identity}); choose another --out"
            )
        was = {"holdout": recorded_holdout(was), **was}
        for name in sorted((was.keys() | wanted.keys()) - _NOT_TRAINING):
            if was.get(name) != wanted.get(name):
                raise RichKDError(
                    f"cannot resume {self.path}: {name} was {was.get(name)!r} and is now "
                    f"{wanted.get(name)!r}; resume with the same settings, or choose another --out"
                )

    @property
    def of_earlier_version(self) -> bool:
        """Whether the run in it was begun before every recipe named what was held out."""
        return self._recorded.is_file() and "holdout" not in self._read_recipe()

    def _read_recipe(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RichKDError(
                f"cannot read {self._recorded}: {error}; begin anew with --overwrite"
            ) from None

    def metrics(self) -> list[dict[str, Any]]:
        """A record an epoch; of a run that was cut off, also those after its checkpoint."""
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
        for path in self._checkpoints:
            with suppress(RichKDError):
                return _epoch_and_best(path, read_note(path))[0]
        if self._checkpoints:
            raise self._nothing_to_go_on_with
        return 0

    def save_epoch(
        self,
        epoch: int,
        record: Mapping[str, Any],
        best: Best,
        state: Mapping[str, Tensor],
        student: Mapping[str, Tensor],
    ) -> None:
        """Metrics, best weights if this epoch is it, and the checkpoint, in this order."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if best.epoch == epoch:
            save_tensors(self.path / "best.safetensors", student)
        note = {"epoch": str(epoch), "best_epoch": str(best.epoch), "best": repr(best.accuracy)}
        last = self.path / "checkpoint.safetensors"
        if last.is_file():
            last.replace(self.path / "previous.safetensors")
        save_tensors(last, state, note)

    def load(self, say: Callable[[str], None]) -> tuple[int, Best, dict[str, Tensor]]:
        """Epochs done, the best of them, and the tensors; trims the metrics to those epochs.

        Args:
            say: is told of a last checkpoint that is damaged; the one before is read then.

        Raises:
            RichKDError: both are.
        """
        for path in self._checkpoints:
            try:
                tensors, note = read_safetensors(path)
                epoch, best = _epoch_and_best(path, note)
                break
            except RichKDError as error:
                say(f"{error}; looking for the one before")
        else:
            raise self._nothing_to_go_on_with
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:epoch]
        write(metrics, "".join(lines))
        return epoch, best, tensors

    def best_weights(self) -> dict[str, Tensor]:
        """The student after its best epoch; RichKDError where the file is damaged."""
        return read_safetensors(self.path / "best.safetensors")[0]

    def finish(self, student: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """The last weights and the summary; the checkpoint has done its duty."""
        save_tensors(self.path / "last.safetensors", student)
        write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        for path in self._checkpoints:
            path.unlink()

    def contents(self) -> dict[str, bytes]:
        """The files of a run that is complete, by their names."""
        return {path.name: path.read_bytes() for path in sorted(self.path.iterdir())
                if path.is_file() and not is_temporary(path)}  # fmt: skip

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Write what `contents` gave elsewhere; the summary last, as `finish` does.

        The run that was trained elsewhere is the one that was cut off here, if there is one.
        """
        for name in sorted(files, key="summary.json".__eq__):
            with replacing(self.path / name) as temporary:
                temporary.write_bytes(files[name])
        for path in self._checkpoints:
            path.unlink()

    @property
    def _nothing_to_go_on_with(self) -> RichKDError:
        return RichKDError(f"no checkpoint in {self.path} can be read; begin anew with --overwrite")


def _epoch_and_best(path: Path, note: Mapping[str, str]) -> tuple[int, Best]:
    try:
        return int(note["epoch"]), Best(int(note["best_epoch"]), float(note["best"]))
    except (KeyError, ValueError):
        raise RichKDError(f"{path} is no checkpoint; begin anew with --overwrite") from None

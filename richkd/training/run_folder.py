"""The folder of a training: what is in it, and the only code that writes and reads it.

    recipe.toml             every setting, resolved, and what the training learns from
    metrics.jsonl           one line per epoch
    last.safetensors        the student after the last epoch
    best.safetensors        the student after its best epoch
    checkpoint.safetensors  everything that resuming needs; removed once the run is complete
    previous.safetensors    the checkpoint of the epoch before, in case the other is damaged
    summary.json            written last: a run that has it is complete

Every file except metrics.jsonl is replaced atomically; resuming keeps the lines of metrics.jsonl
that the checkpoint has seen. The training of a teacher has recipe.toml and the checkpoints only, in
a folder beside its weights that is removed once these are written. Nothing in a folder is executed.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
from torch import Tensor, nn

from richkd.config.settings import Distill, recorded_holdout, shown_weights
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
from richkd.models import create_model
from richkd.models.weights import load_into, read_safetensors, save_tensors
from richkd.store.reader import open_cache
from richkd.training.checkpoint import Checkpoints, Progress
from richkd.training.identity import Identity, RunIdentity, TeacherIdentity

RECIPE, METRICS, SUMMARY = "recipe.toml", "metrics.jsonl", "summary.json"
WEIGHTS = ("last", "best")
# Settings that may change when a training is resumed.
PLACES = frozenset({"device", "step", "data_root", "dataset", "cache", "out"})
# Weights are compared by their SHA-256, so their file may be elsewhere.
_COMPARED_OTHERWISE = PLACES | {"student_weights"}
OTHER_WEIGHTS = ("initial-weights-differ", "started from other weights")
_OF_THE_SCHEDULE = {"epochs", "schedule", "milestones"}
SUMMARY_KEYS = {
    "student",
    "method",
    "seed",
    "top1_last",
    "top1_best",
    "epoch_best",
    "teacher",
    "num_classes",
    "image_size",
    "class_names",
    "mean",
    "std",
    "parameters",
    "seconds",
}


def weights_file(folder: Path, weights: str) -> Path:
    """Return the file of a student's last or best weights."""
    return folder / f"{weights}.safetensors"


def configuration(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings that runs of one configuration share: all but seed and paths.

    The share of the test images that was held out is always among them.
    """
    own = {name: value for name, value in settings.items() if name not in PLACES | {"seed"}}
    return {**own, "holdout": recorded_holdout(settings)}


class TrainingFolder:
    """The folder of one training: its settings and checkpoints."""

    KEY: ClassVar[str]  # under which recipe.toml has the identity
    WHAT: ClassVar[str]
    IDENTITY: ClassVar[type[Identity]]
    DIFFERS: ClassVar[tuple[str, str]]  # of another identity: the error's code and its words

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path)

    def check_place(self, *, overwrite: bool) -> None:
        """Check that a training may be written here; touches nothing.

        Args:
            overwrite: replace a training that is complete.

        Raises:
            RichKDError: the folder cannot be written, or holds something else.
        """
        if overwrite or not self.complete:
            check_writable(self.path)
        if not self._vacant and not self._ours:
            raise RichKDError(
                f"{self.path} exists and is not a {self.WHAT}; choose another --out, or move it "
                f"away",
                code="foreign-file",
            )

    def check(self, recipe: Mapping[str, Any], identity: Identity, *, overwrite: bool) -> None:
        """Check what `begin` would refuse, before anything that takes long; touches nothing.

        Args:
            recipe: the resolved settings.
            identity: what the training learns from.
            overwrite: replace the training in the folder.

        Raises:
            RichKDError: the folder holds something else, or a training of other settings.
        """
        self.check_place(overwrite=overwrite)
        if not overwrite and not self._vacant:
            self.check_same(recipe, identity)

    def check_same(self, recipe: Mapping[str, Any], identity: Identity) -> None:
        """Check that the training in the folder has these settings and learns from the same."""
        was = self._read_recipe()
        recorded = self._identity(was.pop(self.KEY, None))
        difference = recorded.difference(identity)
        if difference:
            code, words = self.DIFFERS if recorded.source != identity.source else OTHER_WEIGHTS
            raise RichKDError(
                f"the {self.WHAT} in {self.path} {words}: {difference}; {self._remedy}", code=code
            )
        was = self._completed(was)
        for name in sorted((was.keys() | recipe.keys()) - _COMPARED_OTHERWISE):
            if was.get(name) != recipe.get(name):
                why = (
                    "the learning rates follow from the number of epochs, so a training cannot be "
                    "extended: "
                    if name in _OF_THE_SCHEDULE
                    else "give the same settings, "
                )
                raise RichKDError(
                    f"{self.path} holds a {self.WHAT} of other settings: {name} was "
                    f"{was.get(name)!r} and is now {recipe.get(name)!r}; {why}{self._remedy}",
                    code="run-settings-differ",
                )

    def initial(self) -> str | None:
        """Return which weights the training in the folder started from, if it needs them no more.

        Raises:
            RichKDError: its settings are damaged.
        """
        started = self.started()
        return None if started is None else started[1].initial

    def started(self) -> tuple[dict[str, Any], Identity] | None:
        """Return settings and identity of a training that needs its initial weights no more.

        Raises:
            RichKDError: they are damaged.
        """
        if not self._ours or not (self.complete or self.checkpoints.files):
            return None
        recipe = self._read_recipe()
        return recipe, self._identity(recipe.pop(self.KEY, None))

    def begin(self, recipe: Mapping[str, Any], identity: Identity, *, overwrite: bool) -> bool:
        """Create the folder, or check that the training in it is this one; other files are kept.

        Args:
            recipe: as of `check`, like the errors.
            identity: likewise.
            overwrite: likewise.

        Returns:
            Whether there is a checkpoint to resume from.
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
        write(self._recorded, tomli_w.dumps({self.KEY: identity.table, **recipe}))
        return False

    def _clear(self) -> None:
        """Delete what richkd wrote, except for the settings, which are replaced."""
        self.checkpoints.remove()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return False

    @property
    def _recorded(self) -> Path:
        return self.path / RECIPE

    @property
    def _vacant(self) -> bool:
        return not self.path.exists() or (
            self.path.is_dir() and all(map(is_temporary, self.path.iterdir()))
        )

    @property
    def _ours(self) -> bool:
        """Whether richkd created the folder; if its settings are damaged, other files tell."""
        if not self._recorded.is_file():
            return False
        try:
            return self.KEY in self._parse_recipe()
        except (OSError, ValueError):
            others = (METRICS, SUMMARY)
            return bool(self.checkpoints.files) or any((self.path / n).is_file() for n in others)

    @property
    def _remedy(self) -> str:
        return "choose another --out, or start over (--overwrite, or remove the folder)"

    def _completed(self, was: dict[str, Any]) -> dict[str, Any]:
        """Return recorded settings with those that earlier versions did not record."""
        return was

    def _identity(self, recorded: object) -> Identity:
        try:
            return self.IDENTITY.read(recorded)
        except ValueError as error:
            raise self._unreadable(error) from None

    def _read_recipe(self) -> dict[str, Any]:
        try:
            return self._parse_recipe()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def _parse_recipe(self) -> dict[str, Any]:
        """Parse recipe.toml; raises OSError or ValueError."""
        return tomllib.loads(self._recorded.read_text(encoding="utf-8"))

    def _unreadable(self, error: Exception) -> RichKDError:
        return RichKDError(
            f"cannot read {self._recorded}: {error}; start over with --overwrite",
            code="checkpoint-unreadable",
        )


class TeacherFolder(TrainingFolder):
    """A teacher in training, beside the file that its weights will be written to."""

    KEY = "richkd-train-teacher"
    WHAT = "training of a teacher"
    IDENTITY = TeacherIdentity
    DIFFERS = ("teacher-images-differ", "learns from other images, or sees them differently")

    def __init__(self, weights: Path) -> None:
        super().__init__(weights.with_suffix(".training"))

    def remove(self) -> None:
        """Delete the training, because its weights are written or it starts over."""
        if not self._ours:
            return
        remove_temporary(self.path)
        self.checkpoints.remove()
        self._recorded.unlink()
        with suppress(OSError):  # other files are in it
            self.path.rmdir()

    def tidy(self, weights: Path) -> None:
        """Delete the leftovers of a process that was killed after it had written the weights."""
        with suppress(RichKDError):  # that process is still running
            check_unlocked(weights)  # removes the lock of a process that is gone
            if self.path.exists():
                with locked(weights):
                    self.remove()


class RunFolder(TrainingFolder):
    """The folder of one student's run, for those who train it."""

    KEY = "richkd-distill"
    WHAT = "run"
    IDENTITY = RunIdentity
    DIFFERS = (
        "run-cache-differs",
        "was trained on another cache, or on this one before it was made again",
    )

    def _clear(self) -> None:
        for name in (SUMMARY, METRICS):
            (self.path / name).unlink(missing_ok=True)
        for weights in WEIGHTS:
            weights_file(self.path, weights).unlink(missing_ok=True)
        super()._clear()
        remove_about_run(self.path)

    def begin(self, recipe: Mapping[str, Any], identity: Identity, *, overwrite: bool) -> bool:
        self.check(recipe, identity, overwrite=overwrite)
        if self.complete and not overwrite:  # by another process, since it was checked
            raise RichKDError(
                f"{self.path} is already complete; start over with --overwrite",
                code="run-complete",
            )
        return super().begin(recipe, identity, overwrite=overwrite)

    @property
    def complete(self) -> bool:
        """Whether the run has finished."""
        return (self.path / SUMMARY).is_file()

    def summary(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None if the run is not complete.

        Raises:
            RichKDError: the file is damaged.
        """
        if not self.complete:
            return None
        summary = read_json(self.path / SUMMARY)
        if summary is None:
            raise RichKDError(
                f"{self.path / SUMMARY} is damaged; remove it, and the same command trains the run "
                f"again",
                code="summary-damaged",
            )
        return summary

    def tidy(self) -> None:
        """Delete the leftovers of a process that was killed after the run was complete."""
        with suppress(RichKDError):  # that process is still running
            check_unlocked(self.path)  # removes the lock of a process that is gone
            if self.checkpoints.files or any(map(is_temporary, self.path.iterdir())):
                with locked(self.path):
                    remove_temporary(self.path)
                    self.checkpoints.remove()

    def _completed(self, was: dict[str, Any]) -> dict[str, Any]:
        return {"holdout": recorded_holdout(was), **was}

    @property
    def of_earlier_version(self) -> bool:
        """Whether the run was started before every recipe recorded what was held out."""
        return self._recorded.is_file() and "holdout" not in self._read_recipe()

    def metrics(self) -> list[dict[str, Any]]:
        """Return a record for each epoch, even those after the checkpoint of an interrupted run."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # interrupted in the middle of the line
                break
        return records

    def epochs_done(self) -> int:
        """Return how many epochs a resumed run need not train; 0 without a checkpoint.

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
        """Write the metrics, the weights if they are the best, then the checkpoint."""
        check_still_locked(self.path)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
        if progress.best.epoch == progress.epoch:
            save_tensors(weights_file(self.path, "best"), student)
        self.checkpoints.save(progress, state)

    def load(self, log: Callable[[str], None]) -> tuple[Progress, dict[str, Tensor]]:
        """Load the checkpoint, and trim the metrics to the epochs that it has seen.

        Args and errors are as in `Checkpoints.load`.
        """
        progress, tensors = self.checkpoints.load(log)
        metrics = self.path / METRICS
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: progress.epoch]
        write(metrics, "".join(lines))
        return progress, tensors

    def best_weights(self) -> dict[str, Tensor]:
        """Load the student after its best epoch; raise RichKDError if the file is damaged."""
        return read_safetensors(weights_file(self.path, "best"))[0]

    def finish(self, student: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """Write the last weights and the summary, and remove the checkpoints."""
        check_still_locked(self.path)
        save_tensors(weights_file(self.path, "last"), student)
        write_json(self.path / SUMMARY, summary)
        self.checkpoints.remove()

    def contents(self) -> dict[str, bytes]:
        """Read the files of a complete run, by their names."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.path.iterdir())
            if path.is_file() and not is_temporary(path)
        }

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Write the `contents` of the same run from another disk; the summary last, as `finish`."""
        for name in sorted(files, key=SUMMARY.__eq__):
            with atomic_write(self.path / name) as temporary:
                temporary.write_bytes(files[name])
        self.checkpoints.remove()

    def read(self) -> Run | None:
        """Read the run; None if the recipe in the folder is of something else.

        Raises:
            RichKDError: a file is damaged.
        """
        try:
            settings = self._parse_recipe()
            if self.KEY not in settings:
                return None
            identity = RunIdentity.read(settings.pop(self.KEY))
            summary = None
            if self.complete:
                summary = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
                missing = SUMMARY_KEYS - summary.keys()
                if missing:
                    raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
                summary["run"] = str(self.path)  # it may have been moved
        except (OSError, ValueError, AttributeError) as error:
            raise RichKDError(
                f"the run in {self.path} is damaged ({error}); remove it, or train it again",
                code="run-damaged",
            ) from None
        return Run(
            path=self.path,
            identity=identity,
            settings=settings,
            metrics=self.metrics(),
            summary=summary,
        )


# --- trained runs, as reports read them ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds."""

    path: Path
    identity: RunIdentity
    settings: Mapping[str, Any]  # resolved
    metrics: list[dict[str, Any]]  # one record per epoch
    summary: Mapping[str, Any] | None  # None: not complete

    @property
    def key(self) -> str:
        """A key that two runs share if their students cost the same."""
        return repr((self.settings["student"], self.settings.get("student_options")))

    @property
    def configuration(self) -> dict[str, Any]:
        """What the runs of one configuration share; see `configuration`."""
        return configuration(self.settings)

    @property
    def complete(self) -> Mapping[str, Any]:
        """The summary of a run that is known to have one."""
        assert self.summary is not None
        return self.summary

    def command(self, seeds: list[int]) -> str:
        """Return the command that repeats this run with each of some seeds."""
        words = ["richkd", "distill", "--cache", str(self.settings["cache"])]
        defaults = {field.name: field.default for field in fields(Distill)}
        tables = {"options", "student_options", "optimizer_options"}
        skipped = {"cache", "seed", "out", "device", "data_root", *tables}
        for name, value in self.settings.items():
            if name in skipped or value == defaults.get(name):
                continue
            if value is True:
                words.append(f"--{name.replace('_', '-')}")
                continue
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            text = shown_weights(value) if name == "weights" else text
            words += [f"--{name.replace('_', '-')}", text]
        options = self.settings.get("options", {}).get(self.settings["method"], {})
        own, optimizers = (
            self.settings.get(f"{of}_options", {}) for of in ("student", "optimizer")
        )
        for flag, given in (
            ("--set", options),
            ("--student-set", own),
            ("--optimizer-set", optimizers),
        ):
            for name, value in given.items():
                text = str(value).lower() if isinstance(value, bool) else str(value)
                words += [flag, f"{name}={text}"]
        line = shlex.join(words)
        if len(seeds) == 1:
            return f"{line} --seed {seeds[0]}"
        return f"for seed in {' '.join(map(str, seeds))}; do {line} --seed $seed; done"


def load_runs(folders: list[Path], cache: str | None) -> list[Run]:
    """Load the runs in some folders, at any depth, in the order of their paths.

    Args:
        folders: where to look.
        cache: take only runs that were trained on this cache; None: they must share one.

    Raises:
        RichKDError: no such folder, no run, a damaged run, or runs of several caches.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise RichKDError(
                f"there is no folder {folder}; richkd sweep creates runs, in runs/ by default",
                code="runs-missing",
            )
        for recipe in sorted(folder.rglob(RECIPE)):
            run = load_run(recipe.parent)
            if run is not None:
                runs.append(run)
    where = ", ".join(map(str, folders))
    if not runs:
        raise RichKDError(
            f"no runs in {where}; richkd sweep or richkd distill creates some", code="runs-missing"
        )
    if cache is not None:
        wanted = RunIdentity.of(open_cache(cache))
        runs = [run for run in runs if run.identity.of_cache == wanted]
        if not runs:
            raise RichKDError(
                f"no run in {where} was trained on {cache}; check --cache", code="runs-missing"
            )
    caches = Counter(run.identity.of_cache for run in runs)
    if len(caches) > 1:
        named = {run.identity.of_cache: run.settings["cache"] for run in reversed(runs)}
        counts = ", ".join(f"{count} on {named[i]}" for i, count in caches.most_common())
        raise RichKDError(
            f"the runs in {where} were trained on different caches ({counts}) and cannot be "
            f"compared; name one with --cache, or give another folder",
            code="runs-of-several-caches",
        )
    return runs


def load_run(path: Path) -> Run | None:
    """Load the run in a folder; None if the recipe in it is of something else.

    Raises:
        RichKDError: a file in it is damaged.
    """
    return RunFolder(path).read()


def complete_run(folder: Path) -> Run:
    """Load a run that has finished.

    Raises:
        RichKDError: the folder holds no run, or one that is not complete.
    """
    run = load_run(folder) if (folder / RECIPE).is_file() else None
    if run is None:
        raise RichKDError(
            f"{folder} is not a run folder; richkd distill creates one", code="run-missing"
        )
    if run.summary is None:
        raise RichKDError(
            f"{folder} is not complete; run the same richkd distill command again to resume it",
            code="run-incomplete",
        )
    return run


def load_student(run: Run | str | Path, weights: str = "last") -> nn.Module:
    """Load the trained student of a run, in evaluation mode, on the CPU.

    It takes images [B,3,H,W] normalised by `mean` and `std` of the run's `summary.json`, and
    returns logits [B,C].

    Args:
        run: the run folder.
        weights: of the last epoch (`last`) or of the best one (`best`).

    Raises:
        RichKDError: there is no complete run, `weights` is neither of the two, or the file is
            damaged.
    """
    if weights not in WEIGHTS:
        raise RichKDError(
            f"unknown weights {weights!r}; choose from best, last", code="unknown-name"
        )
    run = run if isinstance(run, Run) else complete_run(Path(run))
    summary = run.complete
    model = create_model(
        summary["student"],
        summary["num_classes"],
        image_size=summary["image_size"],
        **run.settings.get("student_options", {}),
    )
    file = weights_file(run.path, weights)
    load_into(model, read_safetensors(file)[0], summary["student"], file)
    return model.eval()

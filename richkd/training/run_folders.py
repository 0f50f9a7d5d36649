"""Trained runs as reports read them. What lies in their folders is data: nothing is executed."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from richkd.config.settings import Distill
from richkd.core.errors import RichKDError
from richkd.models import create_model
from richkd.models.weights import load_into, read_safetensors
from richkd.store.reader import open_cache
from richkd.training.checkpoint import RunFolder
from richkd.training.student import identity

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


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    path: Path
    identity: str  # of the store that it trained on
    settings: Mapping[str, Any]  # resolved
    metrics: list[dict[str, Any]]  # a record an epoch
    summary: Mapping[str, Any] | None  # None: not complete

    @property
    def key(self) -> str:
        """What two runs share whose students cost the same."""
        return repr((self.settings["student"], self.settings.get("student_options")))

    @property
    def complete(self) -> Mapping[str, Any]:
        """The summary of a run that is known to have one."""
        assert self.summary is not None
        return self.summary

    def command(self, seeds: list[int]) -> str:
        """What repeats this run with each of some seeds."""
        words = ["richkd", "distill", "--cache", str(self.settings["cache"])]
        defaults = {field.name: field.default for field in fields(Distill)}
        skipped = {"cache", "seed", "out", "options", "student_options", "device", "data_root"}
        for name, value in self.settings.items():
            if name in skipped or value == defaults.get(name):
                continue
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        options = self.settings.get("options", {}).get(self.settings["method"], {})
        own = self.settings.get("student_options", {})
        for flag, given in (("--set", options), ("--student-set", own)):
            for name, value in given.items():
                text = str(value).lower() if isinstance(value, bool) else str(value)
                words += [flag, f"{name}={text}"]
        line = shlex.join(words)
        if len(seeds) == 1:
            return f"{line} --seed {seeds[0]}"
        return f"for seed in {' '.join(map(str, seeds))}; do {line} --seed $seed; done"


def load_runs(folders: list[Path], cache: str | None) -> list[Run]:
    """The runs in some folders, at any depth, in the order of their paths.

    Args:
        folders: to look into.
        cache: only runs that were trained on this store; any one store where None.

    Raises:
        RichKDError: no such folder, no run, a damaged run, or runs of several stores.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise RichKDError(
                f"no folder {folder}; richkd sweep makes runs, in runs/ by default",
                code="runs-missing",
            )
        for recipe in sorted(folder.rglob("recipe.toml")):
            run = load_run(recipe.parent)
            if run is not None:
                runs.append(run)
    where = ", ".join(map(str, folders))
    if not runs:
        raise RichKDError(
            f"no runs in {where}; richkd sweep or richkd distill makes some", code="runs-missing"
        )
    if cache is not None:
        wanted = identity(open_cache(cache))
        runs = [run for run in runs if run.identity == wanted]
        if not runs:
            raise RichKDError(f"no run in {where} was trained on {cache}", code="runs-missing")
    stores = Counter(run.identity for run in runs)
    if len(stores) > 1:
        named = {run.identity: run.settings["cache"] for run in reversed(runs)}
        counts = ", ".join(f"{count} of {named[i]}" for i, count in stores.most_common())
        raise RichKDError(
            f"the runs in {where} were trained on different stores ({counts}) and cannot be "
            f"compared; say which one with --cache, or name another folder",
            code="runs-of-several-caches",
        )
    return runs


def load_run(path: Path) -> Run | None:
    """A run folder; None where the recipe in it is of something else.

    Raises:
        RichKDError: a file in it is damaged.
    """
    folder = RunFolder(path)
    try:
        settings = tomllib.loads((path / "recipe.toml").read_text(encoding="utf-8"))
        identity = settings.pop("richkd-distill", None)
        if not isinstance(identity, str):
            return None
        summary = None
        if folder.complete:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            missing = SUMMARY_KEYS - summary.keys()
            if missing:
                raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
            summary["run"] = str(path)  # it may have been moved
    except (OSError, ValueError, AttributeError) as error:
        raise RichKDError(
            f"the run in {path} is damaged ({error}); remove it, or train it again",
            code="run-damaged",
        ) from None
    return Run(
        path=path, identity=identity, settings=settings, metrics=folder.metrics(), summary=summary
    )


def complete_run(folder: Path) -> Run:
    """A run that went to its end.

    Raises:
        RichKDError: no run folder, or not complete.
    """
    run = load_run(folder) if (folder / "recipe.toml").is_file() else None
    if run is None:
        raise RichKDError(
            f"{folder} is no run folder; richkd distill makes one", code="run-missing"
        )
    if run.summary is None:
        raise RichKDError(
            f"{folder} is not complete; the same richkd distill command resumes it",
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
    if weights not in ("last", "best"):
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
    file = run.path / f"{weights}.safetensors"
    load_into(model, read_safetensors(file)[0], summary["student"], file)
    return model.eval()

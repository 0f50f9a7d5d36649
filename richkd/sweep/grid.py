"""The grid of a sweep: its runs, and the state in which it finds them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from richkd.config.recipes import Recipe
from richkd.config.settings import Distill, Sweep, resolve
from richkd.core.errors import RichKDError
from richkd.core.progress import percent
from richkd.losses.method import METHODS, TARGET
from richkd.store.reader import TeacherCache
from richkd.sweep.entries import Entry
from richkd.training.loop import score_of
from richkd.training.run_folder import RunFolder
from richkd.training.source import method_of
from richkd.training.student import (
    check_every_teacher,
    check_reads,
    check_version,
    choice_images,
    record,
    with_defaults,
)
from richkd.training.targets import choice_samples


def first_settings(sweep: Sweep, recipe: Recipe | None, flags: Mapping[str, Any]) -> Distill:
    """Return the settings of the grid's first run, for those that all runs share."""
    own = {"student": sweep.students[0], "method": sweep.methods[0]}
    return resolve(Distill, recipe.table("distill") if recipe else {}, {**flags, **own})


def make_grid(
    sweep: Sweep, recipe: Recipe | None, flags: Mapping[str, Any], cache: TeacherCache
) -> list[Distill]:
    """Return the runs: students × methods × α × seeds, with α only if the method blends.

    Raises:
        RichKDError: unknown methods (the error names all of them), or a setting out of range.
    """
    unknown = [name for name in sweep.methods if name not in METHODS]
    if unknown:
        raise RichKDError(
            f"unknown methods: {', '.join(map(repr, unknown))}; choose from {', '.join(METHODS)}",
            code="unknown-name",
        )
    base = recipe.table("distill") if recipe else {}
    given = [flags.get(name) or base.get(name) for name in ("alpha", "weights")]
    choosing = bool(sweep.halving) or "auto" in (*sweep.alpha, *given)
    grid: dict[str, Distill] = {}
    for student in sweep.students:
        for method in sweep.methods:
            for alpha in sweep.alpha or (None,):
                for seed in range(sweep.seeds):
                    own = {"student": student, "method": method, "seed": seed, "alpha": alpha}
                    settings = resolve(Distill, base, {**flags, **own})
                    if not blends(settings):
                        settings = replace(settings, alpha=None, weights=None, balance="")
                    # all runs are tested on the same images
                    settings = settings.with_holdout("validation" in cache.splits, choosing)
                    settings = replace(settings, out="")
                    check_every_teacher(cache, settings, sweep.out)
                    settings = with_defaults(settings, cache, sweep.out)
                    grid[settings.out] = settings
    return list(grid.values())


def blends(settings: Distill) -> bool:
    """Return whether α matters, i.e. the method trains on a blend of the teachers."""
    method, options = method_of(settings)
    reads = method.reads(options)
    target = settings.target or method.target
    if "clip_features" in reads and getattr(options, "feature_alpha", None) is None:
        return True
    return TARGET in reads and target == "fused"


def check_grid(grid: Sequence[Distill], cache: TeacherCache) -> list[Entry]:
    """Find which runs are complete, and check that the others can be trained; touches nothing.

    Raises:
        RichKDError: the cache lacks what a method reads, a folder holds another run, …
    """
    entries = []
    for settings in grid:
        check_reads(cache, settings)
        folder = RunFolder(Path(settings.out))
        check_version(folder, settings)
        folder.check(*record(settings, cache, folder), overwrite=False)
        if settings.holdout:
            choice_samples(cache, settings.holdout)  # raises if the share leaves no image
        done = settings.epochs if folder.complete else folder.epochs_done()
        entry = Entry(
            settings=settings,
            done=done,
            scores=scores_until(done, folder),
            scored_on=choice_images(cache, settings),
        )
        summary = folder.summary()
        if summary is not None:
            entry.finish(summary)
        entries.append(entry)
    return entries


def scores_until(epoch: int, folder: RunFolder) -> dict[int, float]:
    """Return the scores of a run's evaluated epochs, up to an epoch."""
    scores = {record["epoch"]: score_of(record) for record in folder.metrics()[:epoch]}
    return {number: score for number, score in scores.items() if score is not None}


def rungs(halving: int, epochs: int, eval_every: int) -> list[int]:
    """Return the epochs after which the worse runs are stopped, and the last: …, E/η², E/η, E.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with η = `halving`.
    """
    if not halving:
        return [epochs]
    stops: list[int] = []
    stop = epochs // halving
    while stop >= eval_every:
        stops.insert(0, stop - stop % eval_every)
        stop //= halving
    return [*stops, epochs]


def stop_hopeless(entries: Sequence[Entry], epoch: int, halving: int) -> None:
    """Stop all but the better 1/η of each student's configurations, by mean score at an epoch.

    The score is the accuracy on images that no final result is reported on: validation images, or
    test images that were held out. Students are not compared with each other: a small student is
    not hopeless because it is small.
    """
    students: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        if entry.state != "failed":
            of_student = students.setdefault(entry.settings.student, {})
            of_student.setdefault(entry.configuration, []).append(entry)
    for configurations in students.values():
        accuracies = {
            name: statistics.fmean(entry.scores[epoch] for entry in runs)
            for name, runs in configurations.items()
            if all(epoch in entry.scores for entry in runs)
        }
        ranked = sorted(accuracies, key=accuracies.__getitem__, reverse=True)
        for name in ranked[-(-len(ranked) // halving) :]:
            for entry in configurations[name]:
                if entry.state == "waiting":
                    entry.state = "stopped"
                    entry.reason = f"{percent(accuracies[name])} % at epoch {epoch}"

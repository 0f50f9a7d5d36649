"""Many students from one store: the grid, what it will cost, and the runs, several at a time.

Runs that train together go through the epochs in step, so that they share the images and every
slab. Each gives the numbers that it gives alone: everything random in an epoch follows from the
run's own seed, and nothing of one run enters another.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.board import Board
from richkd.distill import (
    Source,
    StudentRun,
    build_student,
    check_reads,
    identity,
    method_of,
    with_defaults,
)
from richkd.errors import RichKDError
from richkd.losses.method import METHODS, TARGET
from richkd.models import check_names, forward
from richkd.progress import Advance, Report, duration, percent, size
from richkd.recipe import AUTO_HOLDOUT, Distill, Recipe, Sweep, resolve, to_table
from richkd.results import Standing, leaderboard, leaderboard_table
from richkd.store.reader import TeacherCache
from richkd.training.checkpoint import RunFolder
from richkd.training.device import free_memory, half_precision, wait_for

# What may befall one run and leave the others whole: divergence, too little memory, …
FAILURES = (RichKDError, RuntimeError, MemoryError)
MOST_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What training a student takes, by two steps on noise."""

    parameters: int
    features: int
    epoch_s: float  # with its share of the tests
    memory: int  # bytes: weights, gradients, momenta, activations, the method's banks


@dataclass(kw_only=True)
class Entry:
    """A run of the grid, and what has become of it."""

    settings: Distill
    done: int = 0  # epochs
    images: int = 0  # of the epoch under way
    tested: dict[int, float] = field(default_factory=dict)  # epoch -> top-1 in 0..1
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
    def progress(self) -> str:
        """Epochs done, of how many."""
        return f"{self.done}/{self.settings.epochs}"

    @property
    def accuracy(self) -> float | None:
        """Top-1 of the last tested epoch, in 0..1."""
        return self.tested[max(self.tested)] if self.tested else None

    @property
    def best(self) -> float | None:
        """Top-1 of the best tested epoch."""
        return max(self.tested.values(), default=None)

    @property
    def seconds_left(self) -> float:
        """With the device to itself."""
        if self.state in ("done", "failed", "stopped"):
            return 0.0
        estimate = self.cost.epoch_s if self.cost else 0.0
        return (self.settings.epochs - self.done) * (self.epoch_s or estimate)

    @property
    def memory(self) -> int:
        """Bytes while it trains, beside what all runs share; 0 where that was not measured."""
        return self.cost.memory if self.cost else 0

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete."""
        self.state, self.summary = "done", summary
        self.done = self.settings.epochs


def run_sweep(
    sweep: Sweep,
    recipe: Recipe | None,
    flags: Mapping[str, Any],
    *,
    dry_run: bool = False,
    report: Report,
) -> dict[str, Any]:
    """Train every student of the grid that is not trained yet.

    Args:
        sweep: students, methods, seeds, α.
        recipe: of its `[distill]` table come the settings that all runs have.
        flags: what overrides them.
        dry_run: show the grid and its cost, and train nothing.
        report: where the grid and the progress go.

    Returns:
        `runs` (the summaries of those that are complete), their `leaderboard`, and which runs are
        `waiting`, `failed` or `stopped`.

    Raises:
        RichKDError: anything the user can mend, before the first run; a run that fails on the way
            is in `failed`, and the others go on.
    """
    check_names(sweep.students)
    source = Source(first_settings(sweep, recipe, flags), report)
    entries = check_grid(make_grid(sweep, recipe, flags, source.cache), source)
    estimate([entry for entry in entries if entry.state == "waiting"], source)
    at_once = choose_concurrent(sweep, entries, source)
    show_plan(entries, at_once, sweep.out, source, report)
    if dry_run:
        return outcome(entries)

    settings = entries[0].settings
    with Board(entries, report) as board:
        for last in rungs(sweep.halving, settings.epochs, settings.eval_every):
            final = last == settings.epochs  # those that only lack their summary are due as well
            to_train = [e for e in entries if e.state == "waiting" and (final or e.done < last)]
            for start in range(0, len(to_train), at_once):
                train_together(source, to_train[start : start + at_once], last, board)
            if last < settings.epochs:
                stop_hopeless(entries, last, sweep.halving)
    leaderboard_table(report, f"{sweep.out}/", standings(entries))
    return outcome(entries)


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """The leaderboard of the runs that are complete."""
    return leaderboard([(to_table(e.settings), e.summary) for e in entries if e.summary])


def outcome(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a sweep returns."""
    summaries = [entry.summary for entry in entries if entry.summary is not None]
    return {
        "runs": summaries,
        "leaderboard": [asdict(standing) for standing in standings(entries)],
        **{state: [{"run": entry.settings.out, "reason": entry.reason}
                   for entry in entries if entry.state == state]
           for state in ("waiting", "failed", "stopped")},
    }  # fmt: skip


# --- the grid ------------------------------------------------------------------------------------


def first_settings(sweep: Sweep, recipe: Recipe | None, flags: Mapping[str, Any]) -> Distill:
    """The settings of the grid's first run; what all runs share is in any of them."""
    own = {"student": sweep.students[0], "method": sweep.methods[0]}
    return resolve(Distill, recipe.table("distill") if recipe else {}, {**flags, **own})


def make_grid(
    sweep: Sweep, recipe: Recipe | None, flags: Mapping[str, Any], cache: TeacherCache
) -> list[Distill]:
    """Students × methods × α × seeds; α only where the method blends.

    Raises:
        RichKDError: methods that do not exist (all of them are named), or a setting out of range.
    """
    unknown = [name for name in sweep.methods if name not in METHODS]
    if unknown:
        raise RichKDError(
            f"unknown methods: {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}"
        )
    base = recipe.table("distill") if recipe else {}
    if "auto" in sweep.alpha:  # all are tested on the same images
        base = {"holdout": AUTO_HOLDOUT, **base}
    grid: dict[str, Distill] = {}
    for student in sweep.students:
        for method in sweep.methods:
            for alpha in sweep.alpha or (None,):
                for seed in range(sweep.seeds):
                    own = {"student": student, "method": method, "seed": seed, "alpha": alpha}
                    settings = resolve(Distill, base, {**flags, **own})
                    if not blends(settings):
                        settings = replace(settings, alpha=None)
                    settings = with_defaults(replace(settings, out=""), cache, sweep.out)
                    grid[settings.out] = settings
    return list(grid.values())


def blends(settings: Distill) -> bool:
    """Whether the method trains on a blend of the teachers, so that α matters."""
    method, options = method_of(settings)
    reads = method.reads(options)
    target = settings.target or method.target
    return "clip_features" in reads or (TARGET in reads and target == "fused")


def check_grid(grid: Sequence[Distill], source: Source) -> list[Entry]:
    """Find what is done already, and refuse what cannot be trained; nothing is touched.

    Raises:
        RichKDError: a method asks for what the store lacks, a folder holds another run, …
    """
    entries = []
    for settings in grid:
        method, options = method_of(settings)
        check_reads(source.cache, method.reads(options), settings)
        folder = RunFolder(Path(settings.out))
        recorded = to_table(settings), identity(source.cache)
        if folder.complete:
            folder.check_same(*recorded)
        else:
            folder.check(*recorded, resume=True, overwrite=False)
        done = settings.epochs if folder.complete else folder.epochs_done()
        tested = {r["epoch"]: r["test_accuracy"] for r in folder.metrics()[:done]
                  if r["test_accuracy"] is not None}  # fmt: skip
        entry = Entry(settings=settings, done=done, tested=tested)
        if folder.complete:
            entry.finish(json.loads((folder.path / "summary.json").read_text(encoding="utf-8")))
        entries.append(entry)
    return entries


# --- what it costs -------------------------------------------------------------------------------


def estimate(entries: Sequence[Entry], source: Source) -> None:
    """Time and memory of every run that is not complete, from two steps of its student on noise.

    Raises:
        RichKDError: a student does not fit the images.
    """
    students: dict[str, Estimate] = {}
    for entry in entries:
        name = entry.settings.student
        if name not in students:
            students[name] = try_student(entry.settings, source)
        banks = method_memory(entry.settings, students[name], source)
        entry.cost = replace(students[name], memory=students[name].memory + banks)


def try_student(settings: Distill, source: Source) -> Estimate:
    """Two training steps on noise and a test; the second step is timed, what it saves counted."""
    cache, device = source.cache, source.device
    model, width = build_student(settings, cache)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(settings.batch_size, cache.num_samples)
    side = cache.manifest["image_size"]
    images = torch.randn(batch, 3, side, side, device=device)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = half_precision(settings.precision, device)
    seconds = {}
    for stage in ("train", "train", "test"):
        model.train(stage == "train")
        if stage == "train":
            saved.clear()  # of one step: the next one's tensors may lie elsewhere
        wait_for(device)
        start = time.perf_counter()
        with (
            torch.set_grad_enabled(stage == "train"),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            logits, _ = forward(model, images)
        if stage == "train":
            logits.float().logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
        wait_for(device)
        seconds[stage] = (time.perf_counter() - start) / batch
    num_test = cache.manifest["dataset"]["num_test"]
    epoch_s = (
        seconds["train"] * cache.num_samples + seconds["test"] * num_test / settings.eval_every
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Estimate(
        parameters=weights,
        features=width,
        epoch_s=epoch_s,
        memory=3 * 4 * weights + sum(saved.values()),
    )


def method_memory(settings: Distill, student: Estimate, source: Source) -> int:
    """Bytes of a method's memory banks and the like."""
    kind, options = method_of(settings)
    with torch.device("meta"):
        method = kind(options, source.widths(student.features, alpha=0.5))
    return sum(buffer.nbytes for buffer in method.buffers())


def choose_concurrent(sweep: Sweep, entries: Sequence[Entry], source: Source) -> int:
    """How many train at once: as asked, or as many as half of the free memory holds."""
    if sweep.concurrent != "auto":
        return int(sweep.concurrent)
    most = max(1, *(entry.memory for entry in entries))
    return max(1, min(MOST_AT_ONCE, int(free_memory(source.device) / 2 / most)))


def show_plan(
    entries: Sequence[Entry], at_once: int, out: str, source: Source, report: Report
) -> None:
    """The grid, a row a configuration, with what is left to do."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        settings = entry.settings
        alpha = "" if settings.alpha is None else f"{settings.alpha}"
        rows.setdefault((settings.student, settings.method, alpha), []).append(entry)
    alphas = any(alpha for _, _, alpha in rows)
    cells = []
    for (student, method, alpha), runs in rows.items():
        to_do = [entry for entry in runs if entry.state == "waiting"]
        left = duration(sum(entry.seconds_left for entry in to_do)) if to_do else "–"
        memory = size(to_do[0].memory) if to_do else "–"
        counts = (f"{len(runs)}", f"{len(to_do)}" if to_do else "–")
        cells.append((student, method, *([alpha] if alphas else []), *counts, left, memory))
    header = ("student", "method", *(["α"] if alphas else []), "runs", "to do", "about", "memory")
    report.table(f"{source.cache.place} → {out}/", header, cells, left=2)
    settings = entries[0].settings
    waiting = sum(entry.state == "waiting" for entry in entries)
    report.say(
        f"{len(entries)} runs of {settings.epochs} epochs, {waiting} to do, {at_once} at once: "
        f"about {duration(sum(entry.seconds_left for entry in entries))} on {source.device}"
    )


# --- training ------------------------------------------------------------------------------------


def train_together(source: Source, entries: Sequence[Entry], last: int, board: Board) -> None:
    """Train runs up to epoch `last`, each in a folder that is this process's meanwhile."""
    runs: list[tuple[Entry, StudentRun]] = []
    try:
        for entry in entries:
            with watching(entry, board):
                runs.append((entry, StudentRun(source, entry.settings, resume=True)))
        train_in_step(source, runs, last, board)
    finally:
        for _, run in runs:
            run.close()


def train_in_step(
    source: Source, runs: list[tuple[Entry, StudentRun]], last: int, board: Board
) -> None:
    """Epoch by epoch, so that all share a slab. A failure is a run's own, and ends it here."""
    for entry, run in runs:
        entry.state, entry.done = "training", run.done
    names = {name for _, run in runs for name in run.rows.values()}
    first = 1 + min((run.done for _, run in runs), default=last)
    for epoch, (rows, waited) in enumerate(source.epochs(names, first, last), first):
        shared = rows.to(source.device)
        for entry, run in runs:
            if run.done >= epoch:  # it came further the last time
                continue
            with watching(entry, board) as tick:
                record = run.train_epoch(shared, waited / len(runs), tick)
                entry.done, entry.images, entry.epoch_s = epoch, 0, run.epoch_s
                if record.test_accuracy is not None:
                    entry.tested[epoch] = record.test_accuracy
            if entry.state == "failed":
                run.close()
        runs[:] = [(entry, run) for entry, run in runs if entry.state != "failed"]
        if not runs:
            break
    for entry, run in runs:
        entry.state = "waiting"
        if run.done == entry.settings.epochs:
            with watching(entry, board):
                entry.finish(run.finish())
                board.say(f"{entry.label}: {percent(entry.accuracy)} %, {board.summary()}")
            run.close()


@contextmanager
def watching(entry: Entry, board: Board) -> Iterator[Advance]:
    """Some work of one run; when it fails, the entry says so and the others go on."""
    try:
        yield lambda images: board.tick(entry, images)
    except FAILURES as error:
        entry.state, entry.reason = "failed", describe_failure(error, entry.settings)
        board.say(f"{entry.label} failed: {entry.reason}")


def describe_failure(error: Exception, settings: Distill) -> str:
    """What became of a run, in one line."""
    reason = " ".join(str(error).split())
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in reason
    if memory and not isinstance(error, RichKDError):
        return (f"out of memory with batches of {settings.batch_size}; lower --batch-size or "
                f"--concurrent")  # fmt: skip
    return reason or type(error).__name__


def rungs(halving: int, epochs: int, eval_every: int) -> list[int]:
    """The epochs after which hopeless runs are stopped, and the last: …, E/η², E/η, E.

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
    """Keep the better 1/η of each student's configurations, by mean test accuracy at an epoch.

    Students are not compared with each other: a small one is not hopeless for being small.
    """
    students: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        if entry.state != "failed":
            configuration = entry.label.rpartition("-s")[0]
            of_student = students.setdefault(entry.settings.student, {})
            of_student.setdefault(configuration, []).append(entry)
    for configurations in students.values():
        accuracies = {
            name: statistics.fmean(entry.tested[epoch] for entry in runs)
            for name, runs in configurations.items()
            if all(epoch in entry.tested for entry in runs)
        }
        ranked = sorted(accuracies, key=accuracies.__getitem__, reverse=True)
        for name in ranked[-(-len(ranked) // halving) :]:
            for entry in configurations[name]:
                if entry.state == "waiting":
                    entry.state = "stopped"
                    entry.reason = f"{percent(accuracies[name])} % at epoch {epoch}"

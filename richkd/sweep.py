"""Many students from one store: the grid, what it will cost, and the runs, several at a time.

An engine trains the runs: this process, or a Ray cluster (ray_engine.py). In this process, runs
that train together go through the epochs in step, so that they share the images and every slab.
Each gives the numbers that it gives alone: everything random in an epoch follows from the run's
own seed, and nothing of one run enters another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from richkd.board import Board
from richkd.distill import (
    Source,
    StudentRun,
    build_student,
    check_reads,
    check_version,
    choice_images,
    identity,
    method_of,
    say_few_views,
    with_defaults,
)
from richkd.errors import RichKDError, machine_fault
from richkd.losses.method import METHODS, TARGET
from richkd.models import check_names, check_trainable, forward
from richkd.progress import Advance, Report, duration, percent, size
from richkd.recipe import Distill, Recipe, Sweep, resolve, to_table
from richkd.results import Standing, leaderboard, leaderboard_table
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import split_sizes
from richkd.targets import choice_samples
from richkd.training.checkpoint import RunFolder
from richkd.training.device import cuda, free_memory, half_precision, wait_for
from richkd.training.loop import EpochRows, Trainer, score_of
from richkd.training.precision import StepTimes, advice, is_open, time_precisions

# What may befall one run and leave the others whole: divergence, too little memory, …
FAILURES = (RichKDError, RuntimeError, MemoryError)
MOST_AT_ONCE = 8
TRIED = 50  # steps of each run that the number of runs at once is chosen by
WORTH_TRYING_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What training a student takes, by two steps on noise."""

    parameters: int
    features: int
    epoch_s: float  # with its share of the tests
    memory: int  # bytes: weights, gradients, momenta, activations, the method's banks
    precisions: StepTimes | None = None  # on a CPU that has bfloat16, where the choice is open


@dataclass(kw_only=True)
class Entry:
    """A run of the grid, and what has become of it."""

    settings: Distill
    done: int = 0  # epochs
    images: int = 0  # of the epoch under way
    scores: dict[int, float] = field(default_factory=dict)  # epoch -> top-1 in 0..1
    scored_on: str = "test"  # the images of these: test, held-out test or validation
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
        """Top-1 of the last evaluated epoch in 0..1: on validation images where there are any."""
        return self.scores[max(self.scores)] if self.scores else None

    @property
    def best(self) -> float | None:
        """Top-1 of the best epoch, likewise."""
        return max(self.scores.values(), default=None)

    @property
    def seconds_left(self) -> float | None:
        """With the device to itself; None while nothing is known of that."""
        if self.state in ("done", "failed", "stopped"):
            return 0.0
        epoch_s = self.epoch_s or (self.cost.epoch_s if self.cost else None)
        return None if epoch_s is None else (self.settings.epochs - self.done) * epoch_s

    @property
    def memory(self) -> int:
        """Bytes while it trains, beside what all runs share; 0 where that was not measured."""
        return self.cost.memory if self.cost else 0

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete."""
        self.state, self.summary = "done", summary
        self.done = self.settings.epochs

    def fail(self, reason: str) -> None:
        """The run cannot go on; others can."""
        self.state, self.reason = "failed", reason


class Engine(Protocol):
    """What trains the runs of a sweep."""

    lanes: int  # runs that train side by side without slowing each other

    def describe(self, entries: Sequence[Entry]) -> str:
        """How many runs it trains at once, and where; what is known of how long that takes."""

    def train(self, entries: Sequence[Entry], last: int, board: Board) -> None:
        """Train runs up to epoch `last`, each in its folder; a failure is a run's own."""


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
    for student in sweep.students:
        check_trainable(student)
    first = first_settings(sweep, recipe, flags)
    cache = open_cache(first.cache)
    entries = check_grid(make_grid(sweep, recipe, flags, cache), cache)
    with open_engine(sweep, entries, cache, report) as engine:
        show_plan(entries, f"{cache.place} → {sweep.out}/", engine, report)
        say_few_views([entry.settings for entry in entries], cache, report)
        if dry_run:
            return outcome(entries)
        for entry in entries:
            if entry.state == "done":
                RunFolder(Path(entry.settings.out)).tidy()
        with Board(entries, report, engine.lanes) as board:
            for last in rungs(sweep.halving, first.epochs, first.eval_every):
                final = last == first.epochs  # those that only lack their summary are due as well
                to_train = [e for e in entries if e.state == "waiting" and (final or e.done < last)]
                engine.train(to_train, last, board)
                if not final:
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
        **{
            state: [
                {"run": entry.settings.out, "reason": entry.reason}
                for entry in entries
                if entry.state == state
            ]
            for state in ("waiting", "failed", "stopped")
        },
    }


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
    given_alpha = flags.get("alpha") or base.get("alpha")
    choosing = bool(sweep.halving) or "auto" in (*sweep.alpha, given_alpha)
    grid: dict[str, Distill] = {}
    for student in sweep.students:
        for method in sweep.methods:
            for alpha in sweep.alpha or (None,):
                for seed in range(sweep.seeds):
                    own = {"student": student, "method": method, "seed": seed, "alpha": alpha}
                    settings = resolve(Distill, base, {**flags, **own})
                    if not blends(settings):
                        settings = replace(settings, alpha=None)
                    # all are tested on the same images
                    settings = settings.with_holdout("validation" in cache.splits, choosing)
                    settings = with_defaults(replace(settings, out=""), cache, sweep.out)
                    grid[settings.out] = settings
    return list(grid.values())


def blends(settings: Distill) -> bool:
    """Whether the method trains on a blend of the teachers, so that α matters."""
    method, options = method_of(settings)
    reads = method.reads(options)
    target = settings.target or method.target
    if "clip_features" in reads and getattr(options, "feature_alpha", None) is None:
        return True
    return TARGET in reads and target == "fused"


def check_grid(grid: Sequence[Distill], cache: TeacherCache) -> list[Entry]:
    """Find what is done already, and refuse what cannot be trained; nothing is touched.

    Raises:
        RichKDError: a method asks for what the store lacks, a folder holds another run, …
    """
    entries = []
    for settings in grid:
        check_reads(cache, settings)
        folder = RunFolder(Path(settings.out))
        check_version(folder, settings)
        recorded = to_table(settings), identity(cache)
        folder.check(*recorded, overwrite=False)
        if settings.holdout:
            choice_samples(cache, settings.holdout)  # refuses a share that leaves no image
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
    """What the evaluated epochs of a run are chosen by, up to an epoch."""
    scores = {record["epoch"]: score_of(record) for record in folder.metrics()[:epoch]}
    return {number: score for number, score in scores.items() if score is not None}


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
    sizes = split_sizes(cache.manifest)
    evaluated = sizes.get("validation", sizes["test"] * (settings.holdout or 1.0))
    epoch_s = (
        seconds["train"] * cache.num_samples + seconds["test"] * evaluated / settings.eval_every
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    steps = settings.epochs * cache.num_samples // batch
    choice = is_open(settings, device, steps)
    return Estimate(
        precisions=time_precisions(model, images) if choice else None,
        parameters=weights,
        features=width,
        epoch_s=epoch_s,
        memory=3 * 4 * weights + sum(saved.values()),
    )


def method_memory(settings: Distill, student: Estimate, source: Source) -> int:
    """Bytes of a method's memory banks and the like."""
    kind, options = method_of(settings)
    widths = source.widths(student.features, alpha=0.5)  # which may read the images
    with torch.device("meta"):
        method = kind(options, widths)
    return sum(buffer.nbytes for buffer in method.buffers())


def choose_concurrent(sweep: Sweep, entries: Sequence[Entry], source: Source) -> int:
    """How many train at once: as asked, or as many as half of the free memory holds.

    On a GPU, no more than make it faster, by trying.
    """
    if sweep.concurrent != "auto":
        return int(sweep.concurrent)
    widest = max(1, *(entry.memory for entry in entries))
    most = max(1, min(MOST_AT_ONCE, int(free_memory(source.device) / 2 / widest)))
    waiting = [entry for entry in entries if entry.state == "waiting"][:most]
    if not cuda(source.device) or len(waiting) < 2 or total_left(waiting) < WORTH_TRYING_S:
        return most
    report, source.report = source.report, Report(quiet=True)
    try:
        return try_together(waiting, source)
    except FAILURES:  # a run's own, which will be told when its turn comes
        return 1
    finally:
        source.report = report


def try_together(entries: Sequence[Entry], source: Source) -> int:
    """The least number of runs side by side that is nearly the fastest, by some steps of each.

    What these steps take alone becomes their cost, which two eager steps overestimate.
    """
    made = [source.trainer(entry.settings) for entry in entries]
    names = {name for _, rows, _ in made for name in rows.values()}
    shared, _ = next(source.epochs(names, 1, 1))

    def seconds(runs: Sequence[tuple[Trainer, dict[str, str], Any]]) -> float:
        """Seconds of a round of steps, one of each run."""
        steps = [trainer.steps(1, source.own(shared, rows, 0, 1)) for trainer, rows, _ in runs]
        for each in steps:  # which captures them, the first time
            next(each)
        wait_for(source.device)
        start, rounds = time.perf_counter(), 0
        while rounds < TRIED and None not in {next(each, None) for each in steps}:
            rounds += 1
        wait_for(source.device)
        return (time.perf_counter() - start) / max(rounds, 1)

    alone = [seconds([run]) for run in made]
    for entry, each in zip(entries, alone, strict=True):
        if entry.cost is not None:
            count = source.cache.num_samples / entry.settings.batch_size
            entry.cost = replace(entry.cost, epoch_s=each * count)
    counts = sorted({1, 2, 4, len(made)} - {*range(len(made) + 1, 5)})
    gains = {count: sum(alone[:count]) / seconds(made[:count]) for count in counts}
    for trainer, _, _ in made:
        trainer.release()
    return next((n for n in counts if gains[n] >= 0.95 * max(gains.values())), 1)


def show_plan(entries: Sequence[Entry], title: str, engine: Engine, report: Report) -> None:
    """The grid, a row a configuration, with what is left to do and what of its cost is known."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        settings = entry.settings
        alpha = "" if settings.alpha is None else f"{settings.alpha}"
        row = (settings.student, f"{settings.lr:g}", settings.method, alpha)
        rows.setdefault(row, []).append(entry)
    alphas = any(alpha for *_, alpha in rows)
    costs = any(entry.cost for entry in entries)
    cells = []
    for (student, lr, method, alpha), runs in rows.items():
        to_do = [entry for entry in runs if entry.state == "waiting"]
        left = duration(total_left(to_do)) if to_do else "–"
        memory = size(to_do[0].memory) if to_do else "–"
        counts = (f"{len(runs)}", f"{len(to_do)}" if to_do else "–")
        known = (left, memory) if costs else ()
        cells.append((student, lr, method, *([alpha] if alphas else []), *counts, *known))
    header = [
        "student",
        "lr",
        "method",
        *(["α"] if alphas else []),
        "runs",
        "to do",
        *(["about", "memory"] if costs else []),
    ]
    report.table(title, header, cells, left=2)
    waiting = sum(entry.state == "waiting" for entry in entries)
    report.say(
        f"{len(entries)} runs of {entries[0].settings.epochs} epochs, {waiting} to do, "
        f"{engine.describe(entries)}"
    )
    precisions = {entry.settings.student: entry.cost.precisions for entry in entries if entry.cost}
    if line := advice({name: each for name, each in precisions.items() if each is not None}):
        report.say(line)


def total_left(entries: Sequence[Entry]) -> float:
    """Seconds that the runs take one after the other, as far as is known."""
    return sum(entry.seconds_left or 0.0 for entry in entries)


# --- training ------------------------------------------------------------------------------------


@contextmanager
def open_engine(
    sweep: Sweep, entries: Sequence[Entry], cache: TeacherCache, report: Report
) -> Iterator[Engine]:
    """The engine that the settings name, ready to train.

    Raises:
        RichKDError: it cannot train the runs: a student does not fit the images, Ray is not
            installed, the cluster has no room, …
    """
    if sweep.engine == "local":
        yield LocalEngine(sweep, entries, Source(entries[0].settings, report, cache))
        return
    if find_spec("ray") is None:
        raise RichKDError("--engine ray needs Ray; pip install 'richkd[ray]'")
    from richkd.ray_engine import open_ray

    with open_ray(sweep, entries, cache) as engine:
        yield engine


class LocalEngine:
    """This process, on one device, with one copy of images and slabs for all runs."""

    lanes = 1

    def __init__(self, sweep: Sweep, entries: Sequence[Entry], source: Source) -> None:
        self.source = source
        estimate([entry for entry in entries if entry.state == "waiting"], source)
        self.at_once = choose_concurrent(sweep, entries, source)

    def describe(self, entries: Sequence[Entry]) -> str:
        """How many at once and how long, by two steps of each student."""
        left = duration(total_left(entries))
        return f"{self.at_once} at once: about {left} on {self.source.device}"

    def train(self, entries: Sequence[Entry], last: int, board: Board) -> None:
        """So many at a time, each group up to the epoch."""
        for start in range(0, len(entries), self.at_once):
            train_together(self.source, entries[start : start + self.at_once], last, board)


def train_together(source: Source, entries: Sequence[Entry], last: int, board: Board) -> None:
    """Train runs up to epoch `last`, each in a folder that is this process's meanwhile."""
    runs: list[tuple[Entry, StudentRun]] = []
    try:
        for entry in entries:
            with watching(entry, board):
                runs.append((entry, StudentRun(source, entry.settings)))
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
        due = [(entry, run) for entry, run in runs if run.done < epoch]  # others came further
        # small students leave most of a GPU idle, and none of a CPU
        groups = [due] if cuda(source.device) else [[each] for each in due]
        for group in groups:
            train_side_by_side(group, rows, waited / len(runs), board)
        for entry, run in due:
            if entry.state == "failed":
                run.close()
        runs[:] = [(entry, run) for entry, run in runs if entry.state != "failed"]
        if not runs:
            break
    for entry, run in runs:
        entry.state = "waiting"
        with watching(entry, board):
            run.wait()
            if run.done == entry.settings.epochs:
                entry.finish(run.finish())
                board.say_over(entry)
        run.close()


def train_side_by_side(
    runs: Sequence[tuple[Entry, StudentRun]], rows: EpochRows, waited: float, board: Board
) -> None:
    """One epoch of each run, whose steps take turns; on a GPU they overlap."""
    start = time.perf_counter()
    going = []
    for entry, run in runs:
        with watching(entry, board):
            going.append((entry, run, run.steps(rows)))
    while going:
        left = []
        for entry, run, steps in going:
            with watching(entry, board) as tick:
                if (count := next(steps, None)) is not None:
                    tick(count)
                    left.append((entry, run, steps))
        going = left
    for entry, run in runs:
        if entry.state != "failed":
            with watching(entry, board):
                record = run.end_epoch(waited, start, len(runs))
                entry.done, entry.images, entry.epoch_s = run.done, 0, run.epoch_s
                if record.score is not None:
                    entry.scores[run.done] = record.score


@contextmanager
def watching(entry: Entry, board: Board) -> Iterator[Advance]:
    """Some work of one run; when it fails, the entry says so and the others go on."""
    try:
        yield lambda images: board.tick(entry, images)
    except FAILURES as error:
        entry.fail(describe_failure(error, entry.settings, "--concurrent"))
        board.say_over(entry)


def describe_failure(error: Exception, settings: Distill, also: str) -> str:
    """What became of a run, in one line; `also` helps against too little memory."""
    reason = " ".join(str(error).split())
    if not isinstance(error, RichKDError) and (fault := machine_fault(error)) is not None:
        if fault.startswith("out of memory"):
            return (
                f"out of memory with batches of {settings.batch_size}; lower --batch-size or {also}"
            )
        return fault
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
    """Keep the better 1/η of each student's configurations, by their mean score at an epoch.

    The score is the accuracy on images that no survivor is reported on: validation images, or test
    images that were held out.
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

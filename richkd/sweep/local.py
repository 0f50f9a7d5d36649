"""The engine that trains runs in this process, which share one copy of images and slabs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from richkd.config.settings import Sweep
from richkd.core.progress import Advance, Report, duration
from richkd.sweep.board import Board
from richkd.sweep.cost import estimate, total_left
from richkd.sweep.entries import FAILURES, Entry, describe_failure
from richkd.training.data import EpochRows
from richkd.training.device import cuda, free_memory, wait_for
from richkd.training.loop import Trainer
from richkd.training.source import Source
from richkd.training.student import StudentRun

MOST_AT_ONCE = 8
TRIAL_STEPS = 50  # of each run, to choose how many train at once
WORTH_TRYING_S = 60.0  # seconds of training; below that, a trial does not pay


def choose_concurrent(
    sweep: Sweep, entries: Sequence[Entry], source: Source, worth_trying_s: float = WORTH_TRYING_S
) -> int:
    """Choose how many runs train at once: as asked, or as many as half of the free memory holds.

    On a GPU, a trial finds how many make it faster, if the runs take `worth_trying_s` or more.
    """
    if sweep.concurrent != "auto":
        return int(sweep.concurrent)
    widest = max(1, *(entry.memory for entry in entries))
    most = max(1, min(MOST_AT_ONCE, int(free_memory(source.device) / 2 / widest)))
    waiting = [entry for entry in entries if entry.state == "waiting"][:most]
    if not cuda(source.device) or len(waiting) < 2 or total_left(waiting) < worth_trying_s:
        return most
    report, source.report = source.report, Report(quiet=True)
    try:
        return try_together(waiting, source)
    except FAILURES:  # of one run, which reports it when its turn comes
        return 1
    finally:
        source.report = report


def try_together(entries: Sequence[Entry], source: Source) -> int:
    """Find the smallest number of runs side by side that is nearly the fastest, by a few steps.

    The time of the steps alone replaces the runs' cost, which two eager steps overestimate.
    """
    made = [source.trainer(entry.settings) for entry in entries]
    names = {name for _, rows, _ in made for name in rows.values()}
    shared, _ = next(source.epochs(names, 1, 1))

    def seconds(runs: Sequence[tuple[Trainer, dict[str, str], Any]]) -> float:
        """Time a round of steps, one of each run."""
        steps = [trainer.steps(1, source.own(shared, rows, 0, 1)) for trainer, rows, _ in runs]
        for each in steps:  # the first time, this captures them
            next(each)
        wait_for(source.device)
        start, rounds = time.perf_counter(), 0
        while rounds < TRIAL_STEPS and None not in {next(each, None) for each in steps}:
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


class LocalEngine:
    """Trains runs in this process, on one device, from one copy of images and slabs."""

    lanes = 1

    def __init__(self, sweep: Sweep, entries: Sequence[Entry], source: Source) -> None:
        self.source = source
        estimate([entry for entry in entries if entry.state == "waiting"], source)
        self.at_once = choose_concurrent(sweep, entries, source)

    def describe(self, entries: Sequence[Entry]) -> str:
        left = duration(total_left(entries))
        return f"{self.at_once} at once: about {left} on {self.source.device}"

    def train(self, entries: Sequence[Entry], last: int, board: Board) -> None:
        for start in range(0, len(entries), self.at_once):
            train_together(self.source, entries[start : start + self.at_once], last, board)


def train_together(source: Source, entries: Sequence[Entry], last: int, board: Board) -> None:
    """Train runs together up to epoch `last`, each in its folder, which is locked meanwhile."""
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
    """Train epoch by epoch, so that all runs share a slab; one that fails leaves the others."""
    for entry, run in runs:
        entry.state, entry.done = "training", run.done
    names = {name for _, run in runs for name in run.rows.values()}
    first = 1 + min((run.done for _, run in runs), default=last)
    for epoch, (rows, waited) in enumerate(source.epochs(names, first, last), first):
        due = [(entry, run) for entry, run in runs if run.done < epoch]  # the others are further
        # small students leave most of a GPU idle, but nothing of a CPU
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
                board.log_line(entry)
        run.close()


def train_side_by_side(
    runs: Sequence[tuple[Entry, StudentRun]], rows: EpochRows, waited: float, board: Board
) -> None:
    """Train one epoch of each run; their steps take turns, and overlap on a GPU."""
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
    """Do some work of one run; if it fails, mark its entry and let the others continue."""
    try:
        yield lambda images: board.tick(entry, images)
    except FAILURES as error:
        entry.fail(describe_failure(error, entry.settings, "--concurrent"))
        board.log_line(entry)

"""A sweep: show the grid and its cost, and train its runs, several at a time.

An engine trains the runs: this process (local.py), or a Ray cluster (ray_engine.py). In this
process, runs that train together share the images and the slab of each epoch. Each run gives
exactly the results it would give alone: everything random in an epoch follows from the run's own
seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from richkd.analysis.results import Standing, leaderboard, leaderboard_table
from richkd.config.recipes import Recipe
from richkd.config.settings import Sweep, to_table
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.models import check_names, check_trainable
from richkd.store.reader import TeacherCache, open_cache
from richkd.sweep.board import Board, Engine, show_plan
from richkd.sweep.entries import Entry
from richkd.sweep.grid import check_grid, first_settings, make_grid, rungs, stop_hopeless
from richkd.sweep.local import LocalEngine
from richkd.training.run_folder import RunFolder
from richkd.training.source import Source
from richkd.training.student import log_few_views


def run_sweep(
    sweep: Sweep,
    recipe: Recipe | None,
    flags: Mapping[str, Any],
    *,
    dry_run: bool = False,
    report: Report,
) -> dict[str, Any]:
    """Train every run of the grid that is not complete.

    Args:
        sweep: students, methods, seeds, α.
        recipe: its `[distill]` table has the settings that all runs share.
        flags: values that override them.
        dry_run: show the grid and its cost, and train nothing.
        report: receives the grid and the progress.

    Returns:
        `runs` (the summaries of the complete runs), their `leaderboard`, and which runs are
        `waiting`, `failed` or `stopped`.

    Raises:
        RichKDError: anything the user can fix, before the first run. A run that fails later is in
            `failed`, and the others continue.
    """
    check_names(sweep.students)
    first = first_settings(sweep, recipe, flags)
    for student in sweep.students:
        check_trainable(student, first.student_weights)
    cache = open_cache(first.cache)
    entries = check_grid(make_grid(sweep, recipe, flags, cache), cache)
    with open_engine(sweep, entries, cache, report) as engine:
        show_plan(entries, f"{cache.location} → {sweep.out}/", engine, report)
        log_few_views([entry.settings for entry in entries], cache, report)
        if dry_run:
            return outcome(entries)
        for entry in entries:
            if entry.state == "done":
                RunFolder(Path(entry.settings.out)).tidy()
        with Board(entries, report, engine.lanes) as board:
            for last in rungs(sweep.halving, first.epochs, first.eval_every):
                final = last == first.epochs  # a run that lacks only its summary is due as well
                to_train = [e for e in entries if e.state == "waiting" and (final or e.done < last)]
                engine.train(to_train, last, board)
                if not final:
                    stop_hopeless(entries, last, sweep.halving)
    leaderboard_table(report, f"{sweep.out}/", standings(entries))
    return outcome(entries)


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """Return the leaderboard of the complete runs."""
    return leaderboard([(to_table(e.settings), e.summary) for e in entries if e.summary])


def outcome(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the result of a sweep."""
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


@contextmanager
def open_engine(
    sweep: Sweep, entries: Sequence[Entry], cache: TeacherCache, report: Report
) -> Iterator[Engine]:
    """Open the engine that the settings name.

    Raises:
        RichKDError: it cannot train the runs, e.g. because a student does not fit the images, Ray
            is not installed, or the cluster has no room.
    """
    if sweep.engine == "local":
        yield LocalEngine(sweep, entries, Source(entries[0].settings, report, cache))
        return
    if find_spec("ray") is None:
        raise RichKDError("--engine ray needs Ray; pip install 'richkd[ray]'", code="extra-missing")
    from richkd.sweep.ray_engine import open_ray

    with open_ray(sweep, entries, cache) as engine:
        yield engine

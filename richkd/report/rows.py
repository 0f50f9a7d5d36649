"""The rows of a leaderboard: each configuration with its runs, its cost and its evaluation."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from richkd.analysis.results import Standing, leaderboard, mean_and_std
from richkd.analysis.students import read_evaluation
from richkd.core.files import atomic_write
from richkd.core.progress import Report
from richkd.report.cost import Cost, student_cost
from richkd.training.run_folder import Run


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `richkd evaluate` measured for the runs of a configuration: mean and deviation."""

    images: tuple[int, float]  # how many test images, and the share held out
    ece: tuple[float, float]
    source: str | None  # of the corruptions; None without
    corrupted: tuple[float, float] | None  # top-1 under corruptions


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the leaderboard."""

    standing: Standing
    runs: list[Run]  # by seed
    cost: Cost
    evaluated: Evaluated | None


def read_rows(runs: Sequence[Run], report: Report) -> tuple[list[Row], str]:
    """Return the leaderboard of the complete runs, and a note about its evaluations."""
    complete = [run for run in runs if run.summary is not None]
    by_path = {str(run.path): run for run in complete}
    standings = leaderboard([(run.settings, run.complete) for run in complete])
    evaluated, note = comparable([read_evaluated(standing) for standing in standings])
    costs: dict[str, Cost] = {}
    rows = []
    with report.track("report", len(standings), "rows") as tick:
        for standing, found in zip(standings, evaluated, strict=True):
            own = [by_path[str(summary["run"])] for summary in standing.runs.values()]
            if own[0].key not in costs:
                costs[own[0].key] = student_cost(own[0])
            cost = costs[own[0].key]
            rows.append(Row(standing=standing, runs=own, cost=cost, evaluated=found))
            tick(1)
    return rows, note


def read_evaluated(standing: Standing) -> Evaluated | None:
    """Return the evaluation of a configuration whose runs were evaluated on the same images."""
    found = [read_evaluation(Path(str(summary["run"]))) for summary in standing.runs.values()]
    scores = [one[0] for one in found if one is not None]
    images = {(one["samples"], one["held_out"]) for one in scores}
    if len(scores) < len(found) or len(images) > 1:
        return None
    robustness = [one[1] for one in found if one is not None and one[1] is not None]
    sources = {one["source"] for one in robustness}
    corrupted = len(robustness) == len(found) and len(sources) == 1
    return Evaluated(
        images=min(images),
        ece=mean_and_std([one["ece"] for one in scores]),
        source=min(sources) if corrupted else None,
        corrupted=mean_and_std([1 - one["mean_error"] for one in robustness])
        if corrupted
        else None,
    )


def comparable(evaluated: Sequence[Evaluated | None]) -> tuple[list[Evaluated | None], str]:
    """Keep evaluations on the images and corruptions of the first row that has them.

    Returns:
        The evaluations, None where there is none to compare, and a note on what they measure.
    """
    known = [one for one in evaluated if one is not None]
    if not known:
        return [None] * len(evaluated), ""
    images = known[0].images
    source = next((one.source for one in known if one.images == images and one.source), None)
    kept = [one if one is not None and one.images == images else None for one in evaluated]
    kept = [
        one if one is None or one.source == source else replace(one, source=None, corrupted=None)
        for one in kept
    ]
    note = f"ECE (expected calibration error) is on {images[0]:,} test images"
    if source is not None:
        note += f", corrupted is top-1 on these under 15 corruptions, {source}"
    lacking = sum(one is None for one in kept)
    left_out = f"; {lacking} rows were evaluated differently or not at all" if lacking else ""
    return kept, f"{note}; both by richkd evaluate{left_out}."


def as_record(row: Row) -> dict[str, Any]:
    """Return a row for JSON and CSV: accuracies in 0..1, None instead of NaN."""
    standing, difference, evaluated = row.standing, row.standing.minus_kd, row.evaluated
    has_interval = difference is not None and difference.n > 1
    several = len(standing.runs) > 1
    return {
        "student": standing.student,
        "method": standing.method,
        "settings": dict(standing.settings),
        "n": len(standing.runs),
        "seeds": list(standing.runs),
        "top1_last_mean": standing.last[0],
        "top1_last_std": standing.last[1] if several else None,
        "top1_best_mean": standing.best[0],
        "top1_best_std": standing.best[1] if several else None,
        "best_chosen_on": row.runs[0].complete.get("best_chosen_on", "test"),
        "holdout": standing.holdout,
        "minus_kd_mean": difference.mean if difference else None,
        "minus_kd_low": difference.low if difference and has_interval else None,
        "minus_kd_high": difference.high if difference and has_interval else None,
        "ece_mean": evaluated.ece[0] if evaluated else None,
        "top1_corrupted_mean": evaluated.corrupted[0]
        if evaluated and evaluated.corrupted
        else None,
        "parameters": row.cost.parameters,
        "multiply_adds": row.cost.multiply_adds,
        "latency_ms": row.cost.latency_ms,
    }


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the leaderboard with a header; settings and seeds are JSON within their cells."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(records[0] if records else ["student"])
        for record in records:
            writer.writerow(
                json.dumps(value) if isinstance(value, dict | list) else value
                for value in record.values()
            )

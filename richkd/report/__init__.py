"""A folder of runs as one page that opens anywhere, with CSV and JSON beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from richkd.analysis.results import Standing, leaderboard
from richkd.core.files import atomic_write, check_replaceable, write, write_json
from richkd.core.ownership import Ours, has_keys, is_leaderboard, is_page
from richkd.core.progress import Report
from richkd.report.cost import Cost, student_cost
from richkd.report.evaluation import Evaluated, evaluated
from richkd.report.sweep import render
from richkd.report.tensorboard import write_tensorboard
from richkd.training.run_folders import load_runs

FILES: dict[str, Ours] = {
    "report.html": is_page,
    "leaderboard.csv": is_leaderboard,
    "report.json": has_keys("store", "leaderboard", "incomplete"),
}


def write_report(
    folders: list[Path],
    report: Report,
    *,
    out: Path | None = None,
    cache: str | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Write report.html, leaderboard.csv and report.json.

    Args:
        folders: with run folders in them, at any depth.
        report: where progress goes.
        out: folder for the three files; default the first of `folders`.
        cache: only runs that were trained on this store.
        tensorboard: write its event files too, to `out`/tensorboard.

    Returns:
        What is in report.json, and the paths of the files.

    Raises:
        RichKDError: no runs, or runs of several stores.
    """
    runs = load_runs(folders, cache)
    out = out or folders[0]
    check_files(out)
    complete = [(run.settings, run.summary) for run in runs if run.summary is not None]
    standings = leaderboard(complete)
    costs: dict[str, Cost] = {}
    with report.track("report", len(runs), "runs") as tick:
        for run in runs:
            if run.key not in costs:
                costs[run.key] = student_cost(run)
            tick(1)
    by_path = {str(run.path): run for run in runs}
    cost_of = [costs[by_path[path_of(standing)].key] for standing in standings]
    extra, about = evaluated(standings)
    rows = [leaderboard_row(*each) for each in zip(standings, cost_of, extra, strict=True)]
    result = {
        "store": runs[0].settings["cache"],
        "leaderboard": rows,
        "evaluation": about,
        "teachers": complete[0][1]["teacher"] if complete else None,
        "incomplete": [
            {
                "run": str(run.path),
                "epochs_done": len(run.metrics),
                "epochs": run.settings["epochs"],
            }
            for run in runs
            if run.summary is None
        ],
    }
    files = {name: out / name for name in FILES}
    out.mkdir(parents=True, exist_ok=True)
    write(files["report.html"], render(runs, standings, cost_of, extra, result))
    write_csv(files["leaderboard.csv"], rows)
    if tensorboard:
        files["tensorboard"] = out / "tensorboard"
        write_tensorboard(runs, files["tensorboard"])
    write_json(files["report.json"], result)
    return {**result, "files": {name: str(path) for name, path in files.items()}}


def check_files(out: Path) -> None:
    """Refuse a folder in which others have files of the report's names."""
    for name, ours in FILES.items():
        check_replaceable(out / name, ours)


def path_of(standing: Standing) -> str:
    """The folder of a configuration's first run."""
    return str(next(iter(standing.runs.values()))["run"])


def leaderboard_row(standing: Standing, cost: Cost, extra: Evaluated | None) -> dict[str, Any]:
    """A row as a script wants it: accuracies in 0..1, no NaN."""
    difference = standing.minus_kd
    finite = difference is not None and difference.n > 1
    spread = len(standing.runs) > 1
    return {
        "student": standing.student,
        "method": standing.method,
        "settings": dict(standing.settings),
        "n": len(standing.runs),
        "seeds": list(standing.runs),
        "top1_last_mean": standing.last[0],
        "top1_last_std": standing.last[1] if spread else None,
        "top1_best_mean": standing.best[0],
        "top1_best_std": standing.best[1] if spread else None,
        "best_chosen_on": next(iter(standing.runs.values())).get("best_chosen_on", "test"),
        "holdout": standing.holdout,
        "minus_kd_mean": difference.mean if difference else None,
        "minus_kd_low": difference.low if difference and finite else None,
        "minus_kd_high": difference.high if difference and finite else None,
        "ece_mean": extra.ece[0] if extra else None,
        "top1_corrupted_mean": extra.corrupted[0] if extra and extra.corrupted else None,
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "latency_ms": cost.latency_ms,
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The leaderboard with a header; settings and seeds as JSON within their cell."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0] if rows else ["student"])
        for row in rows:
            writer.writerow(
                json.dumps(value) if isinstance(value, dict | list) else value
                for value in row.values()
            )

"""The page of a report: leaderboard, cost, learning curves, and how to repeat each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from richkd.analysis.results import about_best, mean_std, minus_kd, shown
from richkd.core.progress import duration, percent
from richkd.core.teacher_names import FULL_NAMES
from richkd.report import plots
from richkd.report.page import as_json, fill
from richkd.report.rows import Row
from richkd.training.device import hardware

COLUMNS = {
    "student": "student",
    "method": "method",
    "settings": "settings",
    "last": "last",
    "best": "best",
    "minus_kd": "− KD [95 %]",
    "n": "n",
    "ece": "ECE",
    "corrupted": "corrupted",
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "latency": "latency",
}
LEFT = ("student", "method", "settings")  # aligned
OPTIONAL = ("settings", "ece", "corrupted")  # left out if no row has any


def render(rows: Sequence[Row], num_runs: int, result: Mapping[str, Any]) -> str:
    """Return the page for the leaderboard's rows and the content of report.json."""
    looks = plots.looks_of(row.standing.method for row in rows)
    parts = {
        images: list(members)
        for images, members in groupby(rows, key=lambda row: row.standing.images)
    }
    texts, curves = [], []
    cost_plots: dict[str, Any] = {}
    for images, members in parts.items():  # rows that were tested on the same images
        heading = images if len(parts) > 1 else ""
        suffix = f"-{len(cost_plots)}" if heading else ""
        texts += [table_row(row) for row in members]
        texts[-len(members)]["images"] = heading
        for name in plots.COSTS:
            cost_plots[f"pareto-{name}{suffix}"] = plots.pareto(members, name, looks, heading)
        for student in dict.fromkeys(row.standing.student for row in members):
            curves.append(plots.learning_curves(members, student, looks, heading))
    return fill(
        "sweep",
        title=result["store"],
        store=result["store"],
        teachers=teachers(result["teachers"] or {}),
        rows=texts,
        columns={
            name: head
            for name, head in COLUMNS.items()
            if name not in OPTIONAL or any(text[name] for text in texts)
        },
        left=LEFT,
        about_best=about_best(run.complete for row in rows for run in row.runs),
        details=[detail(row) for row in rows],
        incomplete=result["incomplete"],
        evaluation=result["evaluation"],
        key={method: (colour, plots.SYMBOLS[symbol]) for method, (colour, symbol) in looks.items()},
        plots={
            "Accuracy against cost": as_json(cost_plots),
            "Difference to KD": as_json(
                {"differences": plots.differences([row.standing for row in rows], looks)}
            ),
            "Learning curves": as_json({f"curve-{i}": curve for i, curve in enumerate(curves)}),
        },
        runs=num_runs,
        cpu=hardware(torch.device("cpu")),
    )


def teachers(accuracies: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Return the names and accuracies of the cache's teachers."""
    return [
        (FULL_NAMES[kind], percent(value))
        for kind, value in accuracies.items()
        if value is not None and kind in FULL_NAMES
    ]


def table_row(row: Row) -> dict[str, str]:
    """Return the cells of a row as text."""
    standing, cost, evaluated = row.standing, row.cost, row.evaluated
    return {
        "images": "",  # a heading above the row
        "student": standing.student,
        "method": standing.method,
        "settings": ", ".join(f"{k} {shown(v)}" for k, v in standing.settings.items()),
        "n": str(len(standing.runs)),
        "last": mean_std(standing.last),
        "best": mean_std(standing.best),
        "minus_kd": minus_kd(standing.minus_kd),
        "ece": mean_std(evaluated.ece) if evaluated else "",
        "corrupted": mean_std(evaluated.corrupted) if evaluated and evaluated.corrupted else "",
        "parameters": f"{cost.parameters / 1e6:.2f} M",
        "multiply_adds": f"{cost.multiply_adds / 1e6:,.1f} M",
        "latency": f"{cost.latency_ms:.1f} ms",
    }


def detail(row: Row) -> dict[str, Any]:
    """Return a row's settings, the accuracy of its target, and the command that repeats it."""
    first = row.runs[0]
    target = first.complete.get("target")
    return {
        "label": row.standing.label,
        "command": first.command(list(row.standing.runs)),
        "settings": {key: value for key, value in first.settings.items() if key != "seed"},
        "target": f"{target['kind']}, {percent(target['top1'])} %" if target else "none",
        "hardware": first.complete.get("hardware", ""),
        "time": duration(sum(run.complete.get("seconds", 0.0) for run in row.runs)),
        "runs": [
            (seed, percent(run["top1_last"]), percent(run["top1_best"]), run["epoch_best"])
            for seed, run in row.standing.runs.items()
        ],
    }

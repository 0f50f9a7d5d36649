"""The page of a sweep: leaderboard, costs, curves, and how to repeat each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from richkd.analysis.results import Standing, about_best, by_images, mean_std, minus_kd
from richkd.core.progress import duration, percent
from richkd.report import plots
from richkd.report.cost import Cost
from richkd.report.evaluation import Evaluated
from richkd.report.page import as_json, fill
from richkd.training.device import hardware
from richkd.training.run_folder import Run


def render(
    runs: Sequence[Run],
    standings: Sequence[Standing],
    costs: Sequence[Cost],
    extra: Sequence[Evaluated | None],
    result: Mapping[str, Any],
) -> str:
    """The whole page."""
    parts, looks = by_images(standings), plots.look_of(standings)
    cost_plots: dict[str, Any] = {}
    curves = []
    for images, members in parts.items():
        suffix = "" if len(parts) == 1 else f"-{len(cost_plots)}"
        title = "" if len(parts) == 1 else images
        own = [costs[standings.index(standing)] for standing in members]
        cost_plots |= {
            f"pareto-{name}{suffix}": plots.pareto(members, own, name, looks, title)
            for name in plots.COSTS
        }
        students = dict.fromkeys(standing.student for standing in members)
        curves += [
            plots.learning_curves(members, runs, student, looks, title) for student in students
        ]
    rows = [table_row(*each) for each in zip(standings, costs, extra, strict=True)]
    if len(parts) > 1:  # a heading above the first row of each
        for images, members in parts.items():
            rows[standings.index(members[0])]["images"] = images
    return fill(
        "sweep",
        title=result["store"],
        store=result["store"],
        teachers=teachers(result["teachers"]),
        rows=rows,
        about_best=about_best(run for standing in standings for run in standing.runs.values()),
        details=[detail(standing, runs) for standing in standings],
        incomplete=result["incomplete"],
        evaluation=result["evaluation"],
        key=plots.key(standings),
        plots={
            "Accuracy against cost": as_json(cost_plots),
            "Difference to KD": as_json({"differences": plots.differences(standings)}),
            "Learning curves": as_json({f"curve-{i}": curve for i, curve in enumerate(curves)}),
        },
        runs=len(runs),
        cpu=hardware(torch.device("cpu")),
    )


def teachers(accuracies: Mapping[str, float | None] | None) -> list[tuple[str, str]]:
    """Names and accuracies of those that the store knows."""
    names = {"cnn": "CNN teacher", "clip": "CLIP zero-shot", "fused": "fused, as stored"}
    return [
        (names[kind], percent(value))
        for kind, value in (accuracies or {}).items()
        if value is not None and kind in names
    ]


def table_row(standing: Standing, cost: Cost, extra: Evaluated | None) -> dict[str, str]:
    """A row of the leaderboard, as text."""
    return {
        "images": "",
        "student": standing.student,
        "method": standing.method,
        "settings": ", ".join(f"{key} {value}" for key, value in standing.settings.items()),
        "n": str(len(standing.runs)),
        "last": mean_std(standing.last),
        "best": mean_std(standing.best),
        "minus_kd": minus_kd(standing.minus_kd),
        "ece": mean_std(extra.ece) if extra else "",
        "corrupted": mean_std(extra.corrupted) if extra and extra.corrupted else "",
        "parameters": f"{cost.parameters / 1e6:.2f} M",
        "multiply_adds": f"{cost.multiply_adds / 1e6:,.1f} M",
        "latency": f"{cost.latency_ms:.1f} ms",
    }


def detail(standing: Standing, runs: Sequence[Run]) -> dict[str, Any]:
    """What a configuration's settings were, how its target did, and how to repeat it."""
    paths = {str(summary["run"]) for summary in standing.runs.values()}
    own = [run for run in runs if str(run.path) in paths]
    summary = own[0].summary or {}
    target = summary.get("target")
    return {
        "label": standing.label,
        "command": own[0].command(list(standing.runs)),
        "settings": {key: value for key, value in own[0].settings.items() if key != "seed"},
        "target": f"{target['kind']}, {percent(target['top1'])} %" if target else "none",
        "hardware": summary.get("hardware", ""),
        "time": duration(sum((run.summary or {}).get("seconds", 0.0) for run in own)),
        "runs": [
            (seed, percent(run["top1_last"]), percent(run["top1_best"]), run["epoch_best"])
            for seed, run in standing.runs.items()
        ],
    }

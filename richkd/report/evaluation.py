"""What an evaluation of students looks like: tables in a terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from richkd.analysis.students import evaluate, read_evaluation
from richkd.files import check_writable, write
from richkd.progress import Report, percent
from richkd.report import lens_plots
from richkd.report.analysis import CELL_HEADS, SCORES, cell_row, score_row
from richkd.report.page import as_json, fill
from richkd.results import Difference, Standing, mean_and_std, minus_kd

WORST = 10  # classes in a terminal
CORRUPTION_HEAD = ("under corruptions", "mean top-1, %", "mCE", "relative mCE")
SHIFT_HEAD = ("on shifted images", *SCORES)
DIFFERENCE_HEAD = ("− the first, paired by image", "top-1, points [95 %]")
CONFUSION_HEAD = ("class", "taken for", "times", "of its images, %")
CLASS_HEAD = ("class", "images", "recall, %", "precision, %")


def write_evaluation(
    folders: Sequence[str], report: Report, *, out: str | None, **settings: Any
) -> dict[str, Any]:
    """Evaluate runs and write evaluation.html; settings and errors of `evaluate`.

    Returns:
        The evaluation, and the path of the page.
    """
    page = Path(out or folders[0]) / "evaluation.html"
    check_writable(page)
    result = evaluate(folders, report=report, **settings)
    write(page, render(result))
    return {**result, "files": {"html": str(page)}}


@dataclass(frozen=True)
class Evaluated:
    """What evaluations found of a configuration's runs: means and standard deviations."""

    ece: tuple[float, float]
    corrupted: tuple[float, float] | None  # top-1 under corruptions


def evaluated(standing: Standing) -> Evaluated | None:
    """Calibration and robustness of a row of the leaderboard, where all of its runs have them."""
    found = [read_evaluation(Path(str(run["run"]))) for run in standing.runs.values()]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or len({scores["samples"] for scores, _ in known}) > 1:
        return None
    robust = [robustness for _, robustness in known if robustness is not None]
    alike = len(robust) == len(known) and len({one["source"] for one in robust}) == 1
    return Evaluated(
        ece=mean_and_std([scores["ece"] for scores, _ in known]),
        corrupted=mean_and_std([1 - one["mean_error"] for one in robust]) if alike else None,
    )


def labels(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each run: by student, method and seed where that tells them apart."""
    short = [f"{part['student']} by {part['method']}, seed {part['seed']}" for part in parts]
    if len(set(short)) == len(short):
        return short
    return [part["run"] for part in parts]


def difference_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Every run but the first against it."""
    rows: list[tuple[str, ...]] = []
    for name, part in zip(labels(parts), parts, strict=True):
        if part["minus_first"] is not None:
            infinite = {"low": float("-inf"), "high": float("inf")}
            known = {key: value for key, value in part["minus_first"].items() if value is not None}
            rows.append((name, minus_kd(Difference(**{**infinite, **known}))))
    return rows


def corruption_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Robustness under corruptions; errors relative to the first run's."""
    return [
        (name, percent(1 - own["mean_error"]), f"{own['mce']:.3f}",
         "–" if own["relative_mce"] is None else f"{own['relative_mce']:.3f}")
        for name, part in zip(labels(parts), parts, strict=True)
        for own in [part["corruptions"]]
    ]  # fmt: skip


def class_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Classes, the worst recall first."""
    return [(row["class"], f"{row['count']:,}", percent(row["recall"]), percent(row["precision"]))
            for row in sorted(part["classes"], key=lambda row: row["recall"])]  # fmt: skip


def confusion_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The most frequent mistakes."""
    return [(row["class"], row["taken_for"], f"{row['count']:,}", percent(row["share"]))
            for row in part["confusions"]]  # fmt: skip


def show(result: Mapping[str, Any], report: Report) -> None:
    """The evaluation as tables on standard output."""
    parts = result["runs"]
    names = labels(parts)
    report.table(f"{result['dataset']}: {parts[0]['samples']:,} test images", ("student", *SCORES),
                 [score_row(*pair) for pair in zip(names, parts, strict=True)])  # fmt: skip
    report.table(
        f"Share of images, %; confident: a top probability of {parts[0]['threshold']:g} or more",
        ("student", *(head.replace(", ", "\n") for head in CELL_HEADS)),
        [cell_row(*pair) for pair in zip(names, parts, strict=True)],
    )
    if len(parts) > 1:
        report.table("", DIFFERENCE_HEAD, difference_rows(parts))
    if "corruptions" in parts[0]:
        report.table("", CORRUPTION_HEAD, corruption_rows(parts))
    if "shift" in parts[0]:
        rows = [score_row(name, part["shift"]) for name, part in zip(names, parts, strict=True)]
        report.table("", SHIFT_HEAD, rows)
    if len(parts) == 1:
        report.table("Worst classes", CLASS_HEAD, class_rows(parts[0])[:WORST])
        report.table("Most frequent mistakes", CONFUSION_HEAD, confusion_rows(parts[0]), left=2)


def render(result: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = result["runs"]
    names = labels(parts)
    figures = {
        "confidence": lens_plots.confidence_bars(dict(zip(names, parts, strict=True))),
        "reliability": lens_plots.reliability_diagram(
            {name: part["reliability"] for name, part in zip(names, parts, strict=True)}
        ),
    }
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
        "scores": (
            ("student", *SCORES),
            [score_row(*pair) for pair in zip(names, parts, strict=True)],
        )
    }
    if len(parts) > 1:
        tables["differences"] = (DIFFERENCE_HEAD, difference_rows(parts))
    if "corruptions" in parts[0]:
        tables["corruptions"] = (CORRUPTION_HEAD, corruption_rows(parts))
        figures["corruptions"] = lens_plots.corruption_dots(
            {name: part["corruptions"]["top1"] for name, part in zip(names, parts, strict=True)}
        )
    if "shift" in parts[0]:
        tables["shift"] = (
            SHIFT_HEAD,
            [score_row(name, part["shift"]) for name, part in zip(names, parts, strict=True)],
        )
    return fill(
        "evaluation",
        title=f"students on {result['dataset']}",
        dataset=result["dataset"],
        parts=parts,
        cells=lens_plots.CELL_NAMES,
        cell_colours=lens_plots.CELL_COLOURS,
        key=lens_plots.key(names),
        tables=tables,
        details=[
            {"name": name, "run": part["run"],
             "classes": (CLASS_HEAD, class_rows(part)),
             "confusions": (CONFUSION_HEAD, confusion_rows(part))}
            for name, part in zip(names, parts, strict=True)
        ],
        figures={name: as_json({name: figure}) for name, figure in figures.items()},
    )  # fmt: skip

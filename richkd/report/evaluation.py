"""The output of `richkd evaluate`: tables in a terminal, and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from richkd.analysis.results import Difference, minus_kd
from richkd.analysis.students import evaluate
from richkd.core.errors import local_path
from richkd.core.files import check_replaceable, write, write_json
from richkd.core.ownership import ABOUT_RUN
from richkd.core.progress import Report, percent
from richkd.report import lens_plots
from richkd.report.analysis import CELL_HEADS, SCORES, cell_row, score_row
from richkd.report.page import as_json, fill

WORST = 10  # classes in a terminal
CORRUPTION_HEAD = ("under corruptions", "top-1, %", "− the first [95 %]", "mCE", "relative")
SHIFT_HEAD = ("on other images", "clean, %", "top-1, %", "− the first [95 %]", "NLL", "ECE, %")
DIFFERENCE_HEAD = ("− the first, paired by image", "top-1, points [95 %]")
CONFUSION_HEAD = ("class", "taken for", "times", "of its images, %")
CLASS_HEAD = ("class", "images", "recall, %", "precision, %")


def write_evaluation(
    folders: Sequence[str], report: Report, *, out: str | None, **settings: Any
) -> dict[str, Any]:
    """Evaluate runs and write evaluation.html and comparison.json.

    Settings and errors are as in `evaluate`; `out` is a folder, by default the first run's.

    Returns:
        The evaluation, and the paths of the files.
    """
    folder = local_path(folders[0] if out is None else out)
    files = {"html": folder / "evaluation.html", "json": folder / "comparison.json"}
    for path in files.values():
        check_replaceable(path, ABOUT_RUN[path.name])
    result = evaluate(folders, report=report, **settings)
    write(files["html"], render(result))
    write_json(files["json"], result)
    return {**result, "files": {kind: str(path) for kind, path in files.items()}}


def labels(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each run: student, method and seed, or else the run folder."""
    short = [f"{part['student']} by {part['method']}, seed {part['seed']}" for part in parts]
    if len(set(short)) == len(short):
        return short
    return [part["run"] for part in parts]


def difference(part: Mapping[str, Any], name: str) -> str:
    """Format the difference between a run's accuracy and the first run's, paired by image."""
    found = part["comparison"].get(name)
    if found is None:
        return ""
    unbounded = {"low": -math.inf, "high": math.inf}
    known = {key: value for key, value in found.items() if value is not None}
    return minus_kd(Difference(**(unbounded | known)))


def difference_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the difference of every other run to the first."""
    rows: list[tuple[str, ...]] = [
        (name, difference(part, "top1")) for name, part in zip(labels(parts), parts, strict=True)
    ]
    return rows[1:]


def corruption_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the accuracies under corruptions, and errors relative to the first run's."""
    return [
        (
            name,
            percent(1 - part["corruptions"]["mean_error"]),
            difference(part, "corrupted_top1"),
            *(
                "–" if part["comparison"][key] is None else f"{part['comparison'][key]:.3f}"
                for key in ("mce", "relative_mce")
            ),
        )
        for name, part in zip(labels(parts), parts, strict=True)
    ]


def shift_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the scores on shifted images, and the accuracy on clean ones of the same classes."""
    return [
        (
            name,
            percent(own["clean_top1"]),
            percent(own["top1"]),
            difference(part, "shifted_top1"),
            f"{own['nll']:.3f}",
            percent(own["ece"]),
        )
        for name, part in zip(labels(parts), parts, strict=True)
        for own in [part["shift"]]
    ]


def class_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the classes, with the lowest recall first."""
    return [
        (row["class"], f"{row['count']:,}", percent(row["recall"]), percent(row["precision"]))
        for row in sorted(part["classes"], key=lambda row: row["recall"])
    ]


def confusion_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the most frequent mistakes."""
    return [
        (row["class"], row["taken_for"], f"{row['count']:,}", percent(row["share"]))
        for row in part["confusions"]
    ]


def show(result: Mapping[str, Any], report: Report) -> None:
    """Print the evaluation."""
    parts = result["runs"]
    names = labels(parts)
    report.table(
        f"{result['dataset']}: {parts[0]['samples']:,} test images",
        ("student", *SCORES),
        [score_row(*pair) for pair in zip(names, parts, strict=True)],
    )
    report.table(
        f"Share of images, %; confident: a top probability of {parts[0]['threshold']:g} or more",
        ("student", *(head.replace(", ", "\n") for head in CELL_HEADS)),
        [cell_row(*pair) for pair in zip(names, parts, strict=True)],
    )
    if len(parts) > 1:
        report.table("", DIFFERENCE_HEAD, difference_rows(parts))
    if "corruptions" in parts[0]:
        report.table("", CORRUPTION_HEAD, corruption_rows(parts))
        report.log(f"corruptions: {parts[0]['corruptions']['source']}")
    if "shift" in parts[0]:
        report.table("", SHIFT_HEAD, shift_rows(parts))
    if len(parts) == 1:
        report.table("Worst classes", CLASS_HEAD, class_rows(parts[0])[:WORST])
        report.table("Most frequent mistakes", CONFUSION_HEAD, confusion_rows(parts[0]), left=2)


def render(result: Mapping[str, Any]) -> str:
    """Return the whole page."""
    by_name = dict(zip(labels(result["runs"]), result["runs"], strict=True))
    parts = [*by_name.values()]
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
        "scores": (("student", *SCORES), [score_row(*pair) for pair in by_name.items()])
    }
    bins = {name: part["reliability"] for name, part in by_name.items()}
    figures = {
        "confidence": lens_plots.confidence_bars(by_name),
        "reliability": lens_plots.reliability_diagram(bins),
    }
    if len(parts) > 1:
        tables["differences"] = (DIFFERENCE_HEAD, difference_rows(parts))
    if "corruptions" in parts[0]:
        tables["corruptions"] = (CORRUPTION_HEAD, corruption_rows(parts))
        top1 = {name: part["corruptions"]["top1"] for name, part in by_name.items()}
        figures["corruptions"] = lens_plots.corruption_dots(top1)
    if "shift" in parts[0]:
        tables["shift"] = (SHIFT_HEAD, shift_rows(parts))
    return fill(
        "evaluation",
        title=f"students on {result['dataset']}",
        dataset=result["dataset"],
        parts=parts,
        cells=lens_plots.CELL_NAMES,
        cell_colours=lens_plots.CELL_COLOURS,
        key=lens_plots.key([*by_name]),
        tables=tables,
        details=[
            {
                "name": name,
                "run": part["run"],
                "classes": (CLASS_HEAD, class_rows(part)),
                "confusions": (CONFUSION_HEAD, confusion_rows(part)),
            }
            for name, part in by_name.items()
        ],
        figures={name: as_json({name: figure}) for name, figure in figures.items()},
    )

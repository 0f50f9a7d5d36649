"""What an evaluation of students looks like: tables in a terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from richkd.analysis.results import Difference, Standing, mean_and_std, minus_kd
from richkd.analysis.students import evaluate, read_evaluation
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
    """Evaluate runs and write evaluation.html and comparison.json; the rest is `evaluate`'s.

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


@dataclass(frozen=True)
class Evaluated:
    """What evaluations found of a configuration's runs: means and standard deviations."""

    ece: tuple[float, float]
    corrupted: tuple[float, float] | None  # top-1 under corruptions


def evaluated(standings: Sequence[Standing]) -> tuple[list[Evaluated | None], str]:
    """Calibration and robustness of the leaderboard's rows, and on what they were measured.

    Figures compare on the same images only: rows stand beside the first row that has them if all
    of their runs were evaluated as its were.
    """
    images: tuple[int, float] | None = None
    source: str | None = None
    rows: list[Evaluated | None] = []
    for standing in standings:
        found = [read_evaluation(Path(str(run["run"]))) for run in standing.runs.values()]
        known = [one for one in found if one is not None]
        seen = {(scores["samples"], scores["held_out"]) for scores, _ in known}
        images = images or (min(seen) if len(known) == len(found) and len(seen) == 1 else None)
        if len(known) < len(found) or seen != {images}:
            rows.append(None)
            continue
        robust = [robustness for _, robustness in known if robustness is not None]
        sources = {one["source"] for one in robust}
        complete = len(robust) == len(known) and len(sources) == 1
        source = source or (min(sources) if complete else None)
        rows.append(
            Evaluated(
                ece=mean_and_std([scores["ece"] for scores, _ in known]),
                corrupted=mean_and_std([1 - one["mean_error"] for one in robust])
                if complete and sources == {source}
                else None,
            )
        )
    if images is None:
        return rows, ""
    about = f"ECE (expected calibration error) is on {images[0]:,} test images"
    if source is not None:
        about += f", corrupted is top-1 on these under 15 corruptions, {source}"
    lacking = sum(row is None for row in rows)
    left_out = f"; {lacking} rows were not evaluated, or otherwise" if lacking else ""
    return rows, f"{about}; both by richkd evaluate{left_out}."


def labels(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each run: by student, method and seed where that tells them apart."""
    short = [f"{part['student']} by {part['method']}, seed {part['seed']}" for part in parts]
    if len(set(short)) == len(short):
        return short
    return [part["run"] for part in parts]


def difference(part: Mapping[str, Any], name: str) -> str:
    """How a run's accuracy differs from the first's, paired by image, with its interval."""
    found = part["comparison"].get(name)
    if found is None:
        return ""
    infinite = {"low": float("-inf"), "high": float("inf")}
    known = {key: value for key, value in found.items() if value is not None}
    return minus_kd(Difference(**{**infinite, **known}))


def difference_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Every run but the first against it."""
    return [
        (name, difference(part, "top1"))
        for name, part in list(zip(labels(parts), parts, strict=True))[1:]
    ]


def corruption_rows(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Robustness under corruptions; errors relative to the first run's."""
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
    """Scores on other images, beside those on the clean images of the same classes."""
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
    """Classes, the worst recall first."""
    return [
        (row["class"], f"{row['count']:,}", percent(row["recall"]), percent(row["precision"]))
        for row in sorted(part["classes"], key=lambda row: row["recall"])
    ]


def confusion_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The most frequent mistakes."""
    return [
        (row["class"], row["taken_for"], f"{row['count']:,}", percent(row["share"]))
        for row in part["confusions"]
    ]


def show(result: Mapping[str, Any], report: Report) -> None:
    """The evaluation as tables on standard output."""
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
        tables["shift"] = (SHIFT_HEAD, shift_rows(parts))
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
            {
                "name": name,
                "run": part["run"],
                "classes": (CLASS_HEAD, class_rows(part)),
                "confusions": (CONFUSION_HEAD, confusion_rows(part)),
            }
            for name, part in zip(names, parts, strict=True)
        ],
        figures={name: as_json({name: figure}) for name, figure in figures.items()},
    )

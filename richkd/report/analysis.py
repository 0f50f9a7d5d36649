"""The output of `richkd analyze`: tables in a terminal, and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from richkd.analysis.metrics import CELLS
from richkd.analysis.teachers import analyze, images_as_png
from richkd.core.errors import local_path
from richkd.core.files import check_replaceable, write, write_json
from richkd.core.ownership import has_keys, is_page
from richkd.core.progress import Report, percent
from richkd.core.teacher_names import name_of
from richkd.report import lens_plots
from richkd.report.page import as_json, fill
from richkd.store.folder import Folder
from richkd.store.locations import open_location
from richkd.store.reader import TeacherCache, open_cache

SCORES = ("top-1, %", "top-5, %", "NLL", "Brier", "ECE, %")
CELL_HEADS = tuple(lens_plots.CELL_NAMES[cell] for cell in CELLS)
CONSISTENCY_HEAD = ("rank correlation of classes", "with CNN features", "with the text")
DISAGREEMENT_HEAD = ("samples, %", "how many", "blend right")
CHANGE_HEAD = ("class accuracy, %", "CNN", "CLIP", "fused", "fused − CNN")
BEST_HEAD = ("best setting of", "by top-1", "top-1, %", "by NLL", "NLL")
PROMPT_HEAD = ("prompt alone, top-1 in %", "CLIP", "fused")
KNOWS_HEAD = ("images, %", "right", "alone right", "right, blend of the others wrong")
ADDS_HEAD = ("blend without", "top-1, %", "points added [95 %]", "NLL", "NLL added [95 %]")
WITHOUT_CLIP = (
    "The cache was made without CLIP, so there is no disagreement, no gain or loss by class, and "
    "no effect of α, scale and prompts to show."
)

WITHOUT_FEATURES = (
    "The cache does not keep CLIP's features, so there is no effect of the prompts to show."
)


def write_analysis(
    cache: str, report: Report, *, threshold: float, split: str, out: str | None
) -> dict[str, Any]:
    """Analyze a cache and write NAME-analysis.html and .json.

    Arguments and errors are as in `analyze`; `out` is a folder, beside the cache by default.

    Returns:
        The analysis, and the paths of the two files.
    """
    location = open_location(cache)
    beside = location.path.parent if isinstance(location, Folder) else Path()
    folder = beside if out is None else local_path(out)
    files = {kind: folder / f"{location.stem}-analysis.{kind}" for kind in ("html", "json")}
    check_replaceable(files["html"], is_page)
    check_replaceable(files["json"], has_keys("store", "teachers", "threshold"))
    opened = open_cache(cache)
    result = analyze(opened, threshold=threshold, split=split, report=report)
    write(files["html"], render(opened, result))
    write_json(files["json"], result)
    return {**result, "files": {name: str(path) for name, path in files.items()}}


def score_row(name: str, scores: Mapping[str, float]) -> tuple[str, ...]:
    """Return a model's scores as text."""
    return (
        name,
        percent(scores["top1"]),
        percent(scores["top5"]),
        f"{scores['nll']:.3f}",
        f"{scores['brier']:.3f}",
        percent(scores["ece"]),
    )


def cell_row(name: str, scores: Mapping[str, float]) -> tuple[str, ...]:
    """Return a model's confidence table as text."""
    return (name, *(percent(scores[cell]) for cell in CELLS))


def effects_of_fusion(teachers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return how each blend changes the shares of confident predictions, in words."""
    lines = []
    for kind in ("fused", "native", "raw"):
        if kind in teachers:
            right, wrong = (
                _change(teachers["cnn"][cell], teachers[kind][cell])
                for cell in ("confident_correct", "confident_wrong")
            )
            name = name_of(kind)
            lines.append(f"{name}: confident and correct {right}, confidently wrong {wrong}")
    return lines


def _change(before: float, after: float) -> str:
    points = f"{100 * (after - before):+.2f} points"
    relative = f" ({100 * (after / before - 1):+.1f} % of it)" if before else ""
    return (points + relative).replace("-", "−")


def disagreement_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cases of disagreement with their shares and the accuracy of the blend."""
    return [
        (row["case"], percent(row["share"]), percent(row["fused_top1"]))
        for row in result["disagreement"]
    ]


def consistency_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rank correlations of each teacher."""
    return [
        (
            name_of(kind),
            *(
                "–" if row.get(name) is None else f"{row[name]:.3f}"
                for name in ("features", "text")
            ),
        )
        for kind, row in result["consistency"].items()
    ]


def changed_classes(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the classes from the largest gain to the largest loss."""
    return [*result["class_changes"]["gain"], *result["class_changes"]["lose"][::-1]]


def change_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the classes that gain and lose most."""
    return [
        (
            row["class"],
            percent(row["cnn"]),
            percent(row["clip"]),
            percent(row["fused"]),
            f"{100 * (row['fused'] - row['cnn']):+.2f}".replace("-", "−"),
        )
        for row in changed_classes(result)
    ]


def best_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the best α and scale; chosen on the same samples, so an upper bound."""
    blend = result["blend"]
    rows = [
        _best_row(f"α, {name} scale", list(group), lambda row: f"{row['alpha']:g}")
        for name, group in groupby(blend["alpha"], key=lambda row: row["scale"])
    ]
    title = f"scale, α {result['alpha']:g}"
    return [*rows, _best_row(title, blend["scale"], lambda row: f"{row['scale']:.3g}")]


def _best_row(
    title: str, rows: Sequence[Mapping[str, Any]], setting: Callable[[Mapping[str, Any]], str]
) -> tuple[str, ...]:
    accurate = max(rows, key=lambda row: row["top1"])
    likely = min(rows, key=lambda row: row["nll"])
    return (
        title,
        setting(accurate),
        percent(accurate["top1"]),
        setting(likely),
        f"{likely['nll']:.3f}",
    )


def prompt_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the accuracies of CLIP and of the blend with each prompt alone."""
    return [
        (row["prompt"], percent(row["clip_top1"]), percent(row["fused_top1"]))
        for row in result["blend"]["prompt"] or ()
    ]


def knows_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return how often each of several teachers is right, and where the others are wrong."""
    return [
        (name_of(row["teacher"]), *(percent(row[key]) for key in ("top1", "alone", "beats_others")))
        for row in part["teachers"]
    ]


def matrix_table(part: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the shares where the row is right and the column wrong."""
    matrix = part["right_where_wrong"]
    header = ("right, but wrong is", *(name_of(name) for name in matrix))
    rows = [
        (name_of(k), *("" if k == other else percent(share) for other, share in row.items()))
        for k, row in matrix.items()
    ]
    return header, rows


def adds_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the scores of the blend of all, and of those without one teacher."""
    whole = part["blend"]
    rows = [
        (
            name_of(row["teacher"]),
            percent(row["without"]["top1"]),
            _interval(row["adds"]["top1"], 100, 2),
            f"{row['without']['nll']:.3f}",
            _interval(row["adds"]["nll"], 1, 3),
        )
        for row in part["teachers"]
    ]
    return [("–", percent(whole["top1"]), "", f"{whole['nll']:.3f}", ""), *rows]


def blend_weights(part: Mapping[str, Any]) -> str:
    """Return the weights of the teachers in the blend of all, in words."""
    weights = part["weights"]
    if len(set(weights.values())) == 1:
        return "equal weights"
    return ", ".join(f"{name_of(name)} {weight:.3g}" for name, weight in weights.items())


def _interval(difference: Mapping[str, Any], factor: float, digits: int) -> str:
    mean, *bounds = (difference[key] for key in ("mean", "low", "high"))
    text = f"{factor * mean:+.{digits}f}"
    if None not in bounds:
        text += " [{}]".format(", ".join(f"{factor * value:+.{digits}f}" for value in bounds))
    return text.replace("-", "−")


def show_scores(result: Mapping[str, Any], report: Report) -> None:
    """Print the scores of the teachers and the effects of fusion."""
    teachers = result["teachers"]
    title = (
        f"{result['store']}: {result['samples']:,} {result['split']} images, "
        f"α {result['alpha']:g}, scale {result['scale']}"
    )
    rows = [score_row(name_of(kind), row) for kind, row in teachers.items()]
    report.table(title, ("teacher", *SCORES), rows)
    report.table(
        f"Share of images, %; confident: a top probability of {result['threshold']:g} or more",
        ("teacher", *(head.replace(", ", "\n") for head in CELL_HEADS)),
        [cell_row(name_of(kind), row) for kind, row in teachers.items()],
    )
    for line in effects_of_fusion(teachers):
        report.log(line)


def show(result: Mapping[str, Any], report: Report) -> None:
    """Print the whole analysis."""
    show_scores(result, report)
    report.table("", CONSISTENCY_HEAD, consistency_rows(result))
    if part := result.get("complementarity"):
        report.table("What each teacher knows", KNOWS_HEAD, knows_rows(part))
        report.table("Images where one is right and another wrong, %", *matrix_table(part))
        title = f"What each teacher adds to the blend of all ({blend_weights(part)})"
        report.table(title, ADDS_HEAD, adds_rows(part))
    if result["disagreement"] is None:
        report.log(WITHOUT_CLIP)
        return
    report.table("", DISAGREEMENT_HEAD, disagreement_rows(result))
    report.table("", CHANGE_HEAD, change_rows(result))
    report.table("", BEST_HEAD, best_rows(result))
    if result["blend"]["prompt"] is None:
        report.log(WITHOUT_FEATURES)
    else:
        report.table("", PROMPT_HEAD, prompt_rows(result))


def render(cache: TeacherCache, result: Mapping[str, Any]) -> str:
    """Return the whole page."""
    teachers = {name_of(kind): row for kind, row in result["teachers"].items()}
    bins = {name_of(kind): bins for kind, bins in result["reliability"].items()}
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
        "scores": (("teacher", *SCORES), [score_row(*pair) for pair in teachers.items()]),
        "consistency": (CONSISTENCY_HEAD, consistency_rows(result)),
    }
    figures = {
        "confidence": {"confidence": lens_plots.confidence_bars(teachers)},
        "reliability": {"reliability": lens_plots.reliability_diagram(bins)},
    }
    weights = ""
    if part := result.get("complementarity"):
        weights = blend_weights(part)
        tables["knows"] = (KNOWS_HEAD, knows_rows(part))
        tables["right-where-wrong"] = matrix_table(part)
        tables["adds"] = (ADDS_HEAD, adds_rows(part))
        figures["adds"] = {"adds": lens_plots.additions(part["teachers"])}
    has_clip = result["disagreement"] is not None
    if has_clip:
        tables["disagreement"] = (DISAGREEMENT_HEAD, disagreement_rows(result))
        tables["best"] = (BEST_HEAD, best_rows(result))
        if rows := prompt_rows(result):
            tables["prompts"] = (PROMPT_HEAD, rows)
        figures["blend"] = blend_figures(result)
        if changes := changed_classes(result):
            figures["changes"] = {"class-changes": lens_plots.class_changes(changes)}
    return fill(
        "analysis",
        title=f"Teachers of {Path(result['store']).name}",
        result=result,
        name_of=name_of,
        percent=percent,
        cells=lens_plots.CELL_NAMES,
        cell_colours=lens_plots.CELL_COLOURS,
        without_clip=None if has_clip else WITHOUT_CLIP,
        without_features=WITHOUT_FEATURES,
        fusion=effects_of_fusion(result["teachers"]),
        tables=tables,
        blend_weights=weights,
        changed=examples(cache, result) if has_clip else {},
        figures={name: as_json(group) for name, group in figures.items()},
    )


def blend_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plots of α, scale and prompts."""
    blend = result["blend"]
    stored = [(result["alpha"], "stored")]
    counted = [
        {"kind": name, "prompts": row["prompts"], "top1": row[key]}
        for name, key in ((name_of("clip"), "clip_top1"), (name_of("fused"), "fused_top1"))
        for row in blend["num_prompts"] or ()
    ]
    figures = {
        "alpha-top1": lens_plots.lines(
            lens_plots.series(blend["alpha"], "scale", "alpha", "top1", 100),
            "α (0: CLIP alone, 1: CNN teacher alone)",
            "top-1, %",
            marks=stored,
        ),
        "alpha-nll": lens_plots.lines(
            lens_plots.series(blend["alpha"], "scale", "alpha", "nll"),
            "α",
            "NLL, nats",
            marks=stored,
        ),
        "scale": lens_plots.lines(
            {"top-1": [(row["scale"], 100 * row["top1"]) for row in blend["scale"]]},
            f"scale of CLIP's cosines at α {result['alpha']:g}",
            "top-1, %",
            log=True,
            marks=[(result["blend_scale"], "stored")],
        ),
    }
    if counted:
        figures["num-prompts"] = lens_plots.lines(
            lens_plots.series(counted, "kind", "prompts", "top1", 100),
            "prompts (means over subsets)",
            "top-1, %",
        )
    return figures


def examples(
    cache: TeacherCache, result: Mapping[str, Any]
) -> dict[str, list[tuple[str, list[str]]]]:
    """Return classes with images of the samples that fusion turned right, or wrong."""
    changes = result["class_changes"]
    samples = [sample for rows in changes.values() for row in rows for sample in row["samples"]]
    found = images_as_png(cache, result["split"], samples)
    if not found:  # the cache has no images
        return {}
    titles = {"gain": "now right", "lose": "now wrong"}
    return {
        titles[kind]: [
            (row["class"], [found[sample] for sample in row["samples"]])
            for row in rows
            if row["samples"]
        ]
        for kind, rows in changes.items()
    }

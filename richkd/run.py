"""A recipe from end to end: CNN teacher, stage one, stage two or a sweep, report.

What is done is not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from richkd.config.recipes import Figure, Recipe
from richkd.config.settings import (
    Distill,
    Precompute,
    Sweep,
    resolve,
)
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.distill import distill
from richkd.losses import method_class, method_options
from richkd.models import check_trainable, create_model
from richkd.models.weights import file_sha256
from richkd.precompute import precompute
from richkd.report import FILES, check_files, write_report
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.reader import TeacherCache, open_cache
from richkd.sweep.run import run_sweep
from richkd.teachers.request import check_same_settings, settings_differ
from richkd.training.student import with_defaults

# Flags that name one run where the recipe has a grid.
ONE_RUN = ("student", "method", "target", "seed", "options")


def run_recipe(recipe: Recipe, flags: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Make the store unless it is there, train what is not trained yet, and write the report.

    A recipe with a `[sweep]` trains its grid, unless flags name one run of their own.

    Args:
        recipe: settings of each stage.
        flags: what overrides them, by the names of the settings; `cache` is the store, `out` the
            run folder (of a sweep, the folder of the run folders) and `seed` the student's.
        report: where progress goes.

    Returns:
        The run's summary or the sweep's outcome, with the recipe's published figures and the
        report's `page`.

    Raises:
        RichKDError: anything the user can mend; a store or run of other settings among it.
    """
    one = recipe.table("precompute")
    stage_one = resolve(
        Precompute,
        one,
        {
            **_flags_of(Precompute, flags, without={"out", "seed"}),
            "out": flags.get("cache"),
        },
    )
    if not flags.get("cache") and "out" not in one:
        out = Path(stage_one.out)  # the default, which is no URL
        teacher = stage_one.teacher.replace("/", "-")  # timm/resnet34
        validation = f"val{stage_one.validation:g}" if stage_one.validation else ""
        parts = filter(None, [out.stem, teacher, validation])
        named = out.with_name("-".join(parts) + out.suffix)
        stage_one = replace(stage_one, out=str(named))
    two = recipe.table("distill")
    stage_two = resolve(
        Distill,
        two,
        {
            **_flags_of(Distill, flags, without={"dataset"}),
            "cache": stage_one.out,
        },
    )
    check_names(stage_two)
    folder = Path("runs") / recipe.name
    if stage_one.validation:
        folder = folder.with_name(f"{folder.name}-val{stage_one.validation:g}")

    grid = None
    if "sweep" in recipe.tables and not any(flags.get(name) is not None for name in ONE_RUN):
        grid = resolve(
            Sweep,
            {"out": str(folder), **recipe.table("sweep")},
            {
                "out": flags.get("out"),
            },
        )
        folder = Path(grid.out)
    elif flags.get("out") or "out" in two:
        folder = Path(stage_two.out)
    check_files(folder)

    cache = make_store(stage_one, recipe, report)
    if grid is not None:
        shared = {**_flags_of(Distill, flags, without={"dataset", "out"}), "cache": stage_one.out}
        result = run_sweep(grid, recipe, shared, report=report)
    else:
        stage_two = with_defaults(stage_two, cache)
        if not flags.get("out") and "out" not in two:
            name = f"{stage_two.student}-{stage_two.method}-s{stage_two.seed}"
            stage_two = replace(stage_two, out=str(folder / name.replace("/", "-")))
        result = distill(stage_two, report=report)
    page = write_page(folder, cache, report)
    for line in published_lines(recipe.published):
        report.log(line)
    figures = {name: asdict(figure) for name, figure in recipe.published.items()}
    return {**result, "recipe": recipe.name, "published": figures, "page": page}


def published_lines(published: Mapping[str, Figure]) -> Iterator[str]:
    """The figures of others in a line a kind of epoch, with what of ours each compares with."""
    kinds = {
        "last": "after the last epoch (compare with top-1 last)",
        "best": "of the best epoch on the test images (compare with best)",
        "unknown": "of an epoch that is not known",
    }
    for epoch, kind in kinds.items():
        figures = [
            f"{name} {figure.top1:.2f}"
            for name, figure in published.items()
            if figure.epoch == epoch
        ]
        if figures:
            yield f"published by others, top-1 in %, {kind}: {', '.join(figures)}"


def check_names(settings: Distill) -> None:
    """Refuse a student or method that does not exist before stage one takes its time."""
    method_class(settings.method, method_options(settings.options, settings.method))
    if settings.student:
        check_trainable(settings.student)
        with torch.device("meta"):
            create_model(settings.student, 2, **settings.student_options)


def make_store(settings: Precompute, recipe: Recipe, report: Report) -> TeacherCache:
    """The store of these settings: one that is complete, or what stage one makes of it.

    Raises:
        RichKDError: a complete store of other settings or teacher weights is in its place.
    """
    out = open_location(settings.out)
    if not out.exists or not read_manifest(out.name)["complete"]:
        return precompute(settings, teacher_recipe=recipe.table("train-teacher"), report=report)
    cache = open_cache(out.name)
    remedy = "choose another store with --cache"
    check_same_settings(cache.manifest, settings, out, remedy)
    if settings.dataset != cache.manifest["dataset"]["name"]:
        was = cache.manifest["dataset"]["name"]
        raise settings_differ(out, "dataset", was, settings.dataset, remedy)
    weights = settings.teacher_weights
    if weights and file_sha256(Path(weights)) != cache.manifest["teacher"]["sha256"]:
        raise RichKDError(
            f"{out} was made with other teacher weights than {weights}; {remedy}",
            code="cache-teacher-differs",
        )
    report.log(f"{out} is complete already")
    return cache


def write_page(folder: Path, cache: TeacherCache, report: Report) -> str:
    """The report on a folder of runs, written anew where a run is younger than it."""
    page = folder / "report.html"
    files = [folder / name for name in FILES]
    whole = all(file.is_file() for file in files)
    written = min(file.stat().st_mtime for file in files) if whole else 0.0
    if any(run.stat().st_mtime > written for run in folder.rglob("summary.json")):
        write_report([folder], report, cache=cache.location.name)
    else:
        report.log(f"{page} is there already")
    return str(page)


def _flags_of(settings: type, flags: Mapping[str, Any], without: Set[str]) -> dict[str, Any]:
    names = {field.name for field in fields(settings)} - without
    return {name: value for name, value in flags.items() if name in names}

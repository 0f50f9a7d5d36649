"""A recipe from end to end: CNN teacher, stage one, stage two or a sweep, and the report.

Complete steps are not repeated.
"""

from __future__ import annotations

import re
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
from richkd.precompute import add_further, precompute
from richkd.report import FILES, check_files, write_report
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.reader import TeacherCache, open_cache
from richkd.sweep.run import run_sweep
from richkd.teachers.addition import check_further
from richkd.teachers.request import check_same_settings, settings_differ
from richkd.training.initial import Initial
from richkd.training.run_folder import SUMMARY
from richkd.training.student import check_kept, with_defaults

# Flags that name one run of a recipe that has a grid.
ONE_RUN = ("student", "method", "target", "seed", "options")


def run_recipe(recipe: Recipe, flags: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Make the cache and train the students that do not exist yet, and write the report.

    A recipe with a `[sweep]` trains its grid, unless the flags name one run.

    Args:
        recipe: the settings of each stage.
        flags: values that override them, by the names of the settings; `cache` is the cache, `out`
            the run folder (of a sweep, the folder of the run folders) and `seed` the student's.
        report: receives progress.

    Returns:
        The run's summary or the sweep's outcome, with the recipe's published figures and the
        report's `page`.

    Raises:
        RichKDError: anything the user can fix, e.g. a cache or run of other settings.
    """
    stage_one = cache_settings(recipe, flags)
    stage_two = run_settings(recipe, flags, stage_one.out)
    check_names(stage_two)
    folder = Path("runs") / recipe.name
    if stage_one.validation:
        folder = folder.with_name(f"{folder.name}-val{stage_one.validation:g}")

    grid = None
    if "sweep" in recipe.tables and not any(flags.get(name) is not None for name in ONE_RUN):
        table = {"out": str(folder), **recipe.table("sweep")}
        grid = resolve(Sweep, table, {"out": flags.get("out")})
        folder = Path(grid.out)
    elif stage_two.out:
        folder = Path(stage_two.out)
    check_files(folder)
    for method in grid.methods if grid else [stage_two.method]:
        check_kept(replace(stage_two, method=method), stage_one.rows, stage_one.out)

    cache = make_cache(stage_one, recipe, report)
    if grid is not None:
        shared = {**_flags_of(Distill, flags, without={"dataset", "out"}), "cache": stage_one.out}
        result = run_sweep(grid, recipe, shared, report=report)
    else:
        settings = with_defaults(stage_two, cache)
        if not stage_two.out:
            settings = replace(settings, out=str(folder / run_name(settings)))
        result = distill(settings, report=report)
    page = write_page(folder, cache, report)
    for line in published_lines(recipe.published):
        report.log(line)
    figures = {name: asdict(figure) for name, figure in recipe.published.items()}
    return {**result, "recipe": recipe.name, "published": figures, "page": page}


def cache_settings(recipe: Recipe, flags: Mapping[str, Any]) -> Precompute:
    """Resolve the settings of stage one, with a name for the cache if none is given."""
    table = recipe.table("precompute")
    own = _flags_of(Precompute, flags, without={"out", "seed"})
    settings = resolve(Precompute, table, {**own, "out": flags.get("cache")})
    if flags.get("cache") or "out" in table:
        return settings
    out = Path(settings.out)  # the default, which is not a URL
    teacher = re.sub("[/:]", "-", settings.teacher)  # timm/resnet34, hf-hub:OWNER/NAME
    validation = f"val{settings.validation:g}" if settings.validation else ""
    parts = filter(None, [out.stem, teacher, validation])
    return replace(settings, out=str(out.with_name("-".join(parts) + out.suffix)))


def run_settings(recipe: Recipe, flags: Mapping[str, Any], cache: str) -> Distill:
    """Resolve the settings of one run from a cache."""
    own = _flags_of(Distill, flags, without={"dataset"})
    return resolve(Distill, recipe.table("distill"), {**own, "cache": cache})


def run_name(settings: Distill) -> str:
    """Return the name of a run's folder among the runs of its recipe."""
    return f"{settings.student}-{settings.method}-s{settings.seed}".replace("/", "-")


def published_lines(published: Mapping[str, Figure]) -> Iterator[str]:
    """Yield a line of published figures for each kind of epoch, with what to compare them to."""
    kinds = {
        "last": "after the last epoch (compare with top-1 last)",
        "best": "of the best epoch on the test images (compare with best)",
        "unknown": "of an unknown epoch",
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
    """Check that student and method exist, before stage one starts."""
    method_class(settings.method, method_options(settings.options, settings.method))
    if settings.student:
        check_trainable(settings.student, settings.student_weights)
        if settings.student_weights:
            initial = Initial(
                weights=settings.student_weights,
                name=settings.student,
                num_classes=2,
                image_size=32,
            )
            initial.check()
        with torch.device("meta"):
            create_model(settings.student, 2, **settings.student_options)


def make_cache(
    settings: Precompute, recipe: Recipe, report: Report, *, overwrite: bool = False
) -> TeacherCache:
    """Open the cache of these settings, or run stage one if it is not complete.

    Raises:
        RichKDError: the cache is complete, but has other settings or teacher weights.
    """
    out = open_location(settings.out)
    check_further(settings)
    if overwrite or not out.exists or not read_manifest(out.name)["complete"]:
        return precompute(
            settings,
            teacher_recipe=recipe.table("train-teacher"),
            overwrite=overwrite,
            report=report,
        )
    cache = open_cache(out.name)
    remedy = "choose another cache with --cache"
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
    report.log(f"{out} is already complete")
    return add_further(settings, cache, report)


def write_page(folder: Path, cache: TeacherCache, report: Report) -> str:
    """Write the report on a folder of runs, unless it is newer than all of them."""
    page = folder / "report.html"
    files = [folder / name for name in FILES]
    complete = all(file.is_file() for file in files)
    written = min(file.stat().st_mtime for file in files) if complete else 0.0
    if any(run.stat().st_mtime > written for run in folder.rglob(SUMMARY)):
        write_report([folder], report, cache=cache.location.name)
    else:
        report.log(f"{page} is up to date")
    return str(page)


def _flags_of(settings: type, flags: Mapping[str, Any], without: Set[str]) -> dict[str, Any]:
    names = {field.name for field in fields(settings)} - without
    return {name: value for name, value in flags.items() if name in names}

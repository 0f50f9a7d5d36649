"""The demo: the recipe of that name in a folder of its own, with the analysis of its teachers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from richkd.analysis.results import results_table
from richkd.config import recipes
from richkd.config.recipes import Recipe
from richkd.core.errors import RichKDError, local_path
from richkd.core.files import check_replaceable, check_writable
from richkd.core.ownership import is_page
from richkd.core.progress import Report, duration
from richkd.distill import distill
from richkd.models.weights import read_note
from richkd.report import check_files, write_report
from richkd.report.analysis import show_scores, write_analysis
from richkd.run import cache_settings, make_cache, run_name, run_settings
from richkd.store.locations import open_location
from richkd.store.target import check_target
from richkd.teachers.cnn import check_output, remove_trained
from richkd.training.run_folder import RunFolder


def run_demo(out: str, seed: int, report: Report, *, overwrite: bool = False) -> dict[str, Any]:
    """Run stage one on `shapes`, train a student with each method, and write both pages.

    If interrupted, the same call resumes it.

    Returns:
        The summaries of the students, and the paths of the cache and the two pages.

    Raises:
        RichKDError: `out` holds something else, or a demo of another seed.
    """
    started = time.perf_counter()
    folder = local_path(out)
    recipe = in_folder(recipes.load(str(recipes.packaged() / "demo.toml")), folder, seed)
    settings = cache_settings(recipe, {})
    runs = {
        method: run_settings(recipe, {"method": method, "seed": seed}, settings.out)
        for method in recipe.table("sweep")["methods"]
    }
    runs = {method: replace(run, out=str(folder / run_name(run))) for method, run in runs.items()}
    teacher = Path(recipe.table("train-teacher")["out"])
    check_folder(folder, Path(settings.out), teacher, seed, overwrite=overwrite)
    if overwrite:
        for run in runs.values():
            RunFolder(Path(run.out)).check_place(overwrite=True)
        remove_trained(teacher)
    report.log(f"richkd demo: {settings.limit:,} labelled drawings; everything goes to {folder}")
    report.log("\nStage one: the CNN teacher and CLIP see every image once")
    cache = make_cache(settings, recipe, report, overwrite=overwrite)
    summaries = []
    for method, run in runs.items():
        report.log(f"\nStage two: a student trained with {method}, from the cache alone")
        summaries.append(distill(run, overwrite=overwrite, report=report))
    report.log("\nHow the students did, and what the fusion did")
    analysis = write_analysis(cache.location.name, report, threshold=0.8, split="test", out=None)
    page = write_report([Path(run.out) for run in runs.values()], report, out=folder)
    results_table(report, "Students of the demo", summaries)
    show_scores(analysis, report)
    seconds = time.perf_counter() - started
    pages = {"analysis": analysis["files"]["html"], "report": page["files"]["report.html"]}
    report.log(f"{duration(seconds)} in all. One seed is an example, not a comparison.")
    report.log(f"the teachers' page: {pages['analysis']}\nthe students' page: {pages['report']}")
    report.log(
        f"\nTry next:\n"
        f"  richkd distill --cache {cache.location} --student resnet14 --alpha 0.5 --epochs 30\n"
        f"  richkd run shapes\n"
        f"  richkd precompute --dataset imagefolder:PATH"
    )
    return {"seconds": seconds, "cache": cache.location.name, "students": summaries, "pages": pages}


def in_folder(recipe: Recipe, folder: Path, seed: int) -> Recipe:
    """Return the recipe with its files in a folder, and its teacher trained with a seed."""
    own = {
        name: {**recipe.table(name), "out": str(folder / Path(recipe.table(name)["out"]).name)}
        for name in ("train-teacher", "precompute")
    }
    own["train-teacher"]["seed"] = seed
    return replace(recipe, tables={**recipe.tables, **own})


def check_folder(folder: Path, cache: Path, teacher: Path, seed: int, *, overwrite: bool) -> None:
    """Check that the demo may use a folder, before anything that takes long; touches nothing.

    Raises:
        RichKDError: the folder holds something else, or a demo of another seed.
    """
    check_writable(cache)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = (cache.name, teacher.name, teacher.with_suffix(".training").name)
    if found and not found & {*known, *(f".{name}.lock" for name in known)}:
        raise RichKDError(
            f"{folder} exists and holds no demo; choose another --out", code="demo-foreign-folder"
        )
    check_files(folder)
    check_replaceable(folder / f"{cache.stem}-analysis.html", is_page)
    check_output(teacher, overwrite)
    if overwrite:
        check_target(open_location(cache), overwrite)
    elif teacher.is_file() and (was := read_note(teacher).get("seed")) != str(seed):
        raise RichKDError(
            f"{folder} holds a demo of other settings: seed was {was} and is now {seed}; choose "
            f"another --out, or start over with --overwrite",
            code="demo-settings-differ",
        )

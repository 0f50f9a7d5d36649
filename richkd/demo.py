"""The whole story on drawn images: two teachers, one store, three students, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from richkd.analysis.results import results_table
from richkd.config.settings import Distill, Precompute
from richkd.core.errors import RichKDError, local_path
from richkd.core.files import check_replaceable, check_writable
from richkd.core.ownership import is_page
from richkd.core.progress import Report, duration
from richkd.distill import distill
from richkd.models.weights import read_note
from richkd.precompute import precompute
from richkd.report import check_files, write_report
from richkd.report.analysis import show_scores, write_analysis
from richkd.store.locations import open_location
from richkd.store.target import check_target
from richkd.teachers.cnn import check_output, remove_trained
from richkd.training.checkpoint import RunFolder

LABELLED = 1000
TEACHER_EPOCHS = 24
STUDENT_EPOCHS = 30
METHODS = ("ce", "kd", "richkd")
STORE, TEACHER = "shapes.zarr", "teacher.safetensors"


def run_demo(out: str, seed: int, report: Report, *, overwrite: bool = False) -> dict[str, Any]:
    """Stage one on `shapes`, a student by each method, the analysis and the report page.

    What was done before an interruption is not done again.

    Returns:
        The students' summaries, and the paths of the store and the two pages.

    Raises:
        RichKDError: `out` holds something else, or a demo of another seed.
    """
    started = time.perf_counter()
    folder = local_path(out)
    check_folder(folder, seed, overwrite=overwrite)
    report.log(f"richkd demo: {LABELLED:,} labelled drawings; everything goes to {folder}")
    report.log("\nStage one: CNN teacher and CLIP look at every image once")
    cache = precompute(
        Precompute(dataset="shapes", limit=LABELLED, views=STUDENT_EPOCHS, out=str(folder / STORE)),
        teacher_recipe={
            "epochs": TEACHER_EPOCHS,
            "schedule": "cosine",
            "eval_every": TEACHER_EPOCHS,
            "seed": seed,
            "out": str(folder / TEACHER),
        },
        overwrite=overwrite,
        report=report,
    )
    summaries = []
    for method in METHODS:
        report.log(f"\nStage two: a student by {method}, from the store alone")
        settings = Distill(
            cache=cache.location.name,
            method=method,
            epochs=STUDENT_EPOCHS,
            schedule="cosine",
            seed=seed,
            eval_every=STUDENT_EPOCHS // 3,
            out=str(folder / f"resnet8-{method}-s{seed}"),
        )
        summaries.append(distill(settings, overwrite=overwrite, report=report))
    report.log("\nWhat students made of it, and what fusion did")
    analysis = write_analysis(cache.location.name, report, threshold=0.8, split="test", out=None)
    runs = [Path(summary["run"]) for summary in summaries]  # others of before may be beside them
    page = write_report(runs, report, out=folder)
    results_table(report, "Students of the demo", summaries)
    show_scores(analysis, report)
    seconds = time.perf_counter() - started
    pages = {"analysis": analysis["files"]["html"], "report": page["files"]["report.html"]}
    report.log(f"{duration(seconds)} in all. One seed shows the way, not who wins.")
    report.log(f"the teachers' page: {pages['analysis']}\nthe students' page: {pages['report']}")
    report.log(
        f"\nTry next:\n"
        f"  richkd distill --cache {cache.location} --student resnet14 --alpha 0.5 --epochs 30\n"
        f"  richkd run shapes\n"
        f"  richkd precompute --dataset imagefolder:PATH"
    )
    return {"seconds": seconds, "cache": cache.location.name, "students": summaries, "pages": pages}


def check_folder(folder: Path, seed: int, *, overwrite: bool) -> None:
    """Refuse, before anything long, a folder in which the demo has no place.

    Beginning anew takes the teacher of before away; the store and the runs are replaced when it is
    their turn.

    Raises:
        RichKDError: something else is in the folder, or a demo of another seed.
    """
    check_writable(folder / STORE)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = (STORE, TEACHER, Path(TEACHER).with_suffix(".training").name)
    if there and not there & {*known, *(f".{name}.lock" for name in known)}:
        raise RichKDError(
            f"{folder} exists and holds no demo; choose another --out", code="demo-foreign-folder"
        )
    check_files(folder)
    check_replaceable(folder / "shapes-analysis.html", is_page)
    teacher = folder / TEACHER
    check_output(teacher, overwrite)
    if overwrite:
        check_target(open_location(folder / STORE), overwrite)
        for method in METHODS:
            RunFolder(folder / f"resnet8-{method}-s{seed}").check({}, "", overwrite=True)
        remove_trained(teacher)
    elif teacher.is_file() and (was := read_note(teacher).get("seed")) != str(seed):
        raise RichKDError(
            f"{folder} holds a demo of other settings: seed was {was} and is now {seed}; choose "
            f"another --out, or begin anew with --overwrite",
            code="demo-settings-differ",
        )

"""The whole story on drawn images: two teachers, one store, three students, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from richkd.distill import distill
from richkd.errors import RichKDError
from richkd.precompute import precompute
from richkd.progress import Report, duration
from richkd.recipe import Distill, Precompute
from richkd.report import write_report
from richkd.report.analysis import show_scores, write_analysis
from richkd.results import results_table

LABELLED = 1000
TEACHER_EPOCHS = 24
STUDENT_EPOCHS = 30
METHODS = ("ce", "kd", "richkd")


def run_demo(out: str, seed: int, report: Report, *, overwrite: bool = False) -> dict[str, Any]:
    """Stage one on `shapes`, a student by each method, the analysis and the report page.

    Returns:
        The students' summaries, and the paths of the store and the two pages.

    Raises:
        RichKDError: `out` holds something already.
    """
    started = time.perf_counter()
    folder = Path(out)
    if folder.exists() and not overwrite:
        raise RichKDError(f"{folder} exists; choose another --out, or begin anew with --overwrite")
    report.say(f"richkd demo: {LABELLED:,} labelled drawings; everything goes to {folder}")
    report.say("\nStage one: CNN teacher and CLIP look at every image once")
    cache = precompute(
        Precompute(
            dataset="shapes", limit=LABELLED, views=STUDENT_EPOCHS, out=str(folder / "shapes.zarr")
        ),
        teacher_recipe={
            "epochs": TEACHER_EPOCHS,
            "schedule": "cosine",
            "eval_every": TEACHER_EPOCHS,
            "seed": seed,
            "out": str(folder / "teacher.safetensors"),
        },
        overwrite=overwrite,
        report=report,
    )
    summaries = []
    for method in METHODS:
        report.say(f"\nStage two: a student by {method}, from the store alone")
        settings = Distill(
            cache=cache.place.name,
            method=method,
            epochs=STUDENT_EPOCHS,
            schedule="cosine",
            seed=seed,
            eval_every=STUDENT_EPOCHS // 3,
            out=str(folder / f"resnet8-{method}-s{seed}"),
        )
        summaries.append(distill(settings, overwrite=overwrite, report=report))
    report.say("\nWhat students made of it, and what fusion did")
    analysis = write_analysis(cache.place.name, report, threshold=0.8, split="test", out=None)
    page = write_report([folder], report)
    results_table(report, "Students of the demo", summaries)
    show_scores(analysis, report)
    seconds = time.perf_counter() - started
    pages = {"analysis": analysis["files"]["html"], "report": page["files"]["report.html"]}
    report.say(f"{duration(seconds)} in all. One seed shows the way, not who wins.")
    report.say(f"the teachers' page: {pages['analysis']}\nthe students' page: {pages['report']}")
    report.say(
        f"\nTry next:\n"
        f"  richkd distill --cache {cache.place} --student resnet14 --alpha 0.5 --epochs 30\n"
        f"  richkd run shapes\n"
        f"  richkd precompute --dataset imagefolder:PATH"
    )
    return {"seconds": seconds, "cache": cache.place.name, "students": summaries, "pages": pages}

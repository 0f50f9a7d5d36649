"""The demo, from nothing, as a user runs it."""

import json
import time
from pathlib import Path

import pytest
from forked import Forks
from helpers import refuses

from richkd.config import recipes
from richkd.config.settings import Distill, Precompute
from richkd.core.progress import Report
from richkd.demo import in_folder, run_demo
from richkd.run import cache_settings, run_settings


def test_the_recipe_is_put_in_a_folder_with_a_seed(tmp_path: Path) -> None:
    recipe = in_folder(recipes.load("demo"), tmp_path, 3)
    out = str(tmp_path / "shapes.zarr")
    assert cache_settings(recipe, {}) == Precompute(dataset="shapes", limit=1000, views=30, out=out)
    assert recipe.table("train-teacher") == {
        "epochs": 24,
        "schedule": "cosine",
        "eval_every": 24,
        "seed": 3,
        "out": str(tmp_path / "teacher.safetensors"),
    }
    assert run_settings(recipe, {"method": "kd", "seed": 3}, out) == Distill(
        cache=out,
        student="resnet8",
        method="kd",
        epochs=30,
        schedule="cosine",
        seed=3,
        eval_every=10,
    )


def test_a_file_of_the_recipes_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("not a recipe")
    Path("x").mkdir()
    Path("x/mine.txt").write_text("mine")
    with refuses("demo-foreign-folder", "x"):
        run_demo("x", 0, Report(quiet=True))


@pytest.mark.slow
def test_demo_from_nothing(forks: Forks, tmp_path: Path) -> None:
    env = {"RICHKD_HOME": str(tmp_path / "home"), "COLUMNS": "80"}
    start = time.perf_counter()
    done = forks.run("demo", cwd=tmp_path, env=env)
    print(done.err, done.out, f"{time.perf_counter() - start:.0f} s")
    assert done.code == 0
    for row in (
        "CNN teacher",
        "CLIP zero-shot",
        "fused teacher",
        "resnet8 by ce",
        "resnet8 by kd",
        "resnet8 by richkd",
    ):
        assert row in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    accuracies = {}
    for path in (tmp_path / "runs" / "demo").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        accuracies[summary["method"]] = summary["top1_last"]
        teachers = summary["teacher"]
    assert set(accuracies) == {"ce", "kd", "richkd"}
    # sixteen classes: all have learnt something, and none of it is perfect
    assert all(0.2 < value < 0.95 for value in (*accuracies.values(), *teachers.values()))

    again = forks.run("demo", cwd=tmp_path, env=env)
    assert again.code == 0, again.err
    assert again.err.count("is already complete") == 4

"""The main job on real images: Fashion-MNIST, few labels, and a CLIP trained on other images.

A teacher learns from the first 500 images, a small CLIP from captions of images 20,000 to 50,000
(15 % of the captions name a wrong class), and students by CE, KD and RichKD from their cache.
"""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import richkd
from richkd.config import recipes
from richkd.config.settings import Distill, Precompute, resolve
from richkd.distill import distill
from richkd.precompute import precompute

pytestmark = [pytest.mark.slow, pytest.mark.real_data]

ROOT = Path(__file__).parents[2]
train_clip = runpy.run_path(str(ROOT / "benchmarks" / "fashion_mnist.py"))["train_clip"]


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The cache, made with the defaults of the recipe, and the time it took."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    start = time.perf_counter()
    train_clip(folder / "clip")
    took = {"CLIP": time.perf_counter() - start}
    content = recipes.load("fashion-mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the teacher's weights go
        precompute(
            resolve(Precompute, content.table("precompute"), {"clip": "clip"}),
            teacher_recipe=content.table("train-teacher"),
        )
    took["stage one, its teacher included"] = time.perf_counter() - start - took["CLIP"]
    return folder / "cache" / "fashion-mnist.zarr", took


METHODS = ("ce", "kd", "richkd-l", "richkd")


@pytest.fixture(scope="module")
def students(
    stage_one: tuple[Path, dict[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Summaries of students by each method, with the settings of the recipe."""
    folder = tmp_path_factory.mktemp("students")
    table = recipes.load("fashion-mnist").table("distill")
    return {
        method: distill(
            resolve(
                Distill,
                table,
                {"cache": str(stage_one[0]), "method": method, "out": str(folder / method)},
            )
        )
        for method in METHODS
    }


def test_teacher_clip_store_and_students(
    run: Callable[..., Any],
    stage_one: tuple[Path, dict[str, float]],
    students: dict[str, dict[str, Any]],
) -> None:
    store, took = stage_one
    took = dict(took)
    inspected = run("inspect", store, "--json").json
    wanted = recipes.load("fashion-mnist").table("precompute")["views"]
    assert inspected["manifest"]["views"]["count"] == wanted

    cache = richkd.open_cache(store)
    labels = cache.read("test/labels").numpy()
    assert len(labels) == 10_000
    for kind, array in (
        ("cnn", "teacher_logits"),
        ("clip", "clip_similarity"),
        ("fused", "fused_logits"),
    ):
        recount = (cache.read(f"test/{array}").numpy().argmax(1) == labels).mean()
        assert inspected["accuracy"][kind] == pytest.approx(recount, abs=1e-6)
    accuracy = dict(inspected["accuracy"])
    for method, summary in students.items():
        accuracy[method] = summary["top1_last"]
        took[method] = summary["seconds"]
    seconds = sum(took.values())
    print(json.dumps({"accuracy": accuracy, "seconds": took, "all": seconds}, indent=2))
    assert all(value > 0.5 for value in accuracy.values())


def test_a_sweep_and_its_report(
    run: Callable[..., Any], stage_one: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    start = time.perf_counter()
    students = ["resnet8", "resnet14", "wrn_16_1", "mobilenetv3_small_050"]
    done = run(
        "sweep",
        "--recipe",
        "fashion-mnist",
        "--cache",
        stage_one[0],
        "--students",
        ",".join(students),
        "--methods",
        "ce,kd,richkd-l",
        "--seeds",
        2,
        "--epochs",
        8,
        "--eval-every",
        8,
        "--out",
        tmp_path / "runs",
        "--json",
    )
    assert done.code == 0, done.err
    assert len(done.json["runs"]) == 24
    report = run("report", tmp_path / "runs", "--json")
    assert report.code == 0, report.err
    rows = {(row["student"], row["method"]): row for row in report.json["leaderboard"]}
    assert rows.keys() == {(s, m) for s in students for m in ("ce", "kd", "richkd-l")}
    for (student, method), row in rows.items():
        assert row["n"] == 2 and (row["minus_kd_mean"] is None) == (method == "kd"), student
    assert rows["resnet8", "kd"]["top1_last_mean"] > 0.3  # after 8 epochs of 500 images
    seconds = time.perf_counter() - start
    print(
        f"{seconds:.0f} s: "
        + json.dumps({f"{s} {m}": round(row["top1_last_mean"], 4) for (s, m), row in rows.items()})
    )


def test_the_teachers_under_the_lens(
    run: Callable[..., Any], stage_one: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """10,000 images, 12 prompts and more, at most a minute; CLIP saw other images."""
    start = time.perf_counter()
    done = run("analyze", stage_one[0], "--out", tmp_path, "--json")
    seconds = time.perf_counter() - start
    assert done.code == 0, done.err
    result = done.json
    assert result["samples"] == 10_000 and len(result["blend"]["prompt"]) >= 12
    teachers = result["teachers"]
    print(f"{seconds:.0f} s: " + json.dumps(teachers, indent=2))
    assert {"cnn", "clip", "fused", "raw"} == teachers.keys()
    assert teachers["fused"]["top1"] > teachers["cnn"]["top1"]


def test_the_students_under_corruptions(
    run: Callable[..., Any], students: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """15 corruptions, five severities, 1,000 images, two students: at most five minutes."""
    folders = [students[method]["run"] for method in ("kd", "richkd-l")]
    start = time.perf_counter()
    done = run("evaluate", *folders, "--corruptions", "--limit", 1000, "--out", tmp_path, "--json")
    seconds = time.perf_counter() - start
    assert done.code == 0, done.err
    found = {part["method"]: part for part in done.json["runs"]}
    print(
        f"{seconds:.0f} s: "
        + json.dumps(
            {
                method: {
                    "top1": part["top1"],
                    "ece": part["ece"],
                    "comparison": part["comparison"],
                    "mean_error": part["corruptions"]["mean_error"],
                }
                for method, part in found.items()
            },
            indent=2,
        )
    )
    for part in found.values():
        each = part["corruptions"]["top1"]
        assert len(each) == 15 and all(len(accuracies) == 5 for accuracies in each.values())
        assert 1 - part["corruptions"]["mean_error"] < part["top1"]  # they do harm

"""`richkd report`: its statistics against scipy's, the page in a browser, and refusals."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
import scipy.stats
import torch
from chromium import open_page
from helpers import Refusal

from richkd.analysis.results import leaderboard, paired_difference
from richkd.models import create_model
from richkd.report.cost import student_cost
from richkd.report.rows import Evaluated, comparable
from richkd.training.run_folder import Run as RunFolderRead
from richkd.training.run_folder import load_run

Run = Callable[..., Any]
INTERRUPTED = "a-run-of-resnet8"  # comes first
Fails = Callable[..., Refusal]
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students by three methods with two seeds, and an interrupted run before them."""
    from richkd.config.settings import Sweep
    from richkd.core.progress import Report
    from richkd.sweep.run import run_sweep

    folder = tmp_path_factory.mktemp("report") / "runs"
    flags = {"cache": str(store), "epochs": 3, "batch_size": 16, "lr": 0.02, "device": "cpu"}
    grid = Sweep(
        students=("resnet8", "wrn_16_1"), methods=("ce", "kd", "richkd"), seeds=2, out=str(folder)
    )
    run_sweep(grid, None, flags, report=Report(quiet=True))
    shutil.copytree(folder / "shapes-resnet8-kd-s0", folder / INTERRUPTED)
    (folder / INTERRUPTED / "summary.json").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (500, "dark")])  # Chromium's least
def test_the_page_in_a_browser(
    run: Run, runs: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    done = run("report", runs, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    page = tmp_path / "report.html"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom, console = open_page(page, tmp_path, f"--window-size={width},2000", *dark)
    assert console == ""
    table = dom[dom.index('<table id="leaderboard">') : dom.index("</table>")]
    cells = [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.S)
    ]
    rows = [row for row in cells if row]
    assert {tuple(row[:2]) for row in rows} == {
        (student, method)
        for student in ("resnet8", "wrn_16_1")
        for method in ("ce", "kd", "richkd")
    }
    expected = done.json["leaderboard"]
    for row, record in zip(rows, expected, strict=True):
        mean, std = (100 * record[f"top1_last_{part}"] for part in ("mean", "std"))
        assert row[2] == f"{mean:.2f} ± {std:.2f}" and row[5] == "2"
    # every plot was drawn: three costs, the differences, and the curves of each student
    assert len(re.findall(r'class="main-svg"[^>]*>', dom)) >= 6
    for name in (
        "pareto-parameters",
        "pareto-multiply_adds",
        "pareto-latency_ms",
        "differences",
        "curve-0",
        "curve-1",
    ):
        tag = re.search(rf'<div[^>]* id="{name}"[^>]*>', dom)
        assert tag and "js-plotly-plot" in tag[0], name
        drawn = re.compile(r'class="main-svg"[^>]* width="(\d+)').search(dom, tag.end())
        columns = 1 if width < 700 or name == "differences" else 2  # at least
        assert drawn and int(drawn[1]) <= width / columns, name
    assert f"{INTERRUPTED} (3 of 3 epochs)" in dom
    assert "src=" not in page.read_text().split("</head>")[0].split("<script>")[0]


def test_the_statistics_are_those_of_scipy(rng: np.random.Generator) -> None:
    a, b = rng.uniform(0, 1, 5), rng.uniform(0, 1, 5)
    teacher = {"cnn": 0.5}

    def runs(method: str, accuracies: Any, seeds: range, **more: Any) -> list[Any]:
        return [
            (
                {"student": "s", "method": method, "epochs": 9, "out": f"o{seed}", **more},
                {
                    "seed": seed,
                    "top1_last": float(value),
                    "top1_best": float(value) + 0.1,
                    "teacher": teacher,
                    "run": f"{method}{seed}",
                },
            )
            for seed, value in zip(seeds, accuracies, strict=True)
        ]

    given = [
        *runs("kd", a, range(5)),
        *runs("crd", b, range(5)),
        *runs("kd", a, range(5), target="fused"),
        *runs("ce", b[:1], range(7, 8)),
    ]
    rows = {(row.method, *row.settings.values()): row for row in leaderboard(given)}
    assert rows.keys() == {("kd",), ("kd", "fused"), ("crd",), ("ce",)}
    crd = rows["crd",]
    assert crd.last == pytest.approx((b.mean(), b.std(ddof=1)))
    assert crd.best == pytest.approx((b.mean() + 0.1, b.std(ddof=1)))
    test = scipy.stats.ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert crd.minus_kd is not None
    found = (crd.minus_kd.mean, crd.minus_kd.low, crd.minus_kd.high)
    assert found == pytest.approx(((b - a).mean(), interval.low, interval.high))
    assert rows["kd",].minus_kd is None and rows["ce",].minus_kd is None  # no seed in common
    assert math.isnan(rows["ce",].last[1])
    order = [row.last[0] for row in leaderboard(given)]
    assert order == sorted(order, reverse=True)
    one = paired_difference([0.25])
    assert one is not None and one.mean == 0.25 and math.isinf(one.high)


def test_csv_and_json_say_the_same(run: Run, runs: Path, tmp_path: Path) -> None:
    done = run("report", runs, "--out", tmp_path)
    assert done.code == 0 and done.out.strip() == str(tmp_path / "report.html")
    saved = json.loads((tmp_path / "report.json").read_text())
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(saved["leaderboard"]) == 6
    for line, row in zip(lines, saved["leaderboard"], strict=True):
        assert line["student"] == row["student"] and json.loads(line["seeds"]) == row["seeds"]
        assert float(line["top1_last_mean"]) == row["top1_last_mean"]
        assert line["minus_kd_mean"] == (
            "" if row["minus_kd_mean"] is None else str(row["minus_kd_mean"])
        )
    assert saved["incomplete"] == [{"run": str(runs / INTERRUPTED), "epochs_done": 3, "epochs": 3}]
    assert saved["teachers"].keys() == {"cnn", "clip", "fused"}
    parameters = {row["student"]: row["parameters"] for row in saved["leaderboard"]}
    for student, found in parameters.items():
        summary = json.loads((runs / f"shapes-{student}-kd-s0" / "summary.json").read_text())
        assert found == summary["parameters"], student


def test_the_command_repeats_the_run(run: Run, runs: Path, tmp_path: Path) -> None:
    path = runs / "shapes-resnet8-richkd-s1"
    read = load_run(path)
    assert read is not None
    words = shlex.split(read.command([1]))
    assert words[0] == "richkd" and words[-2:] == ["--seed", "1"]
    done = run(*words[1:], "--out", tmp_path / "again", *CPU)
    assert done.code == 0, done.err
    same = (path / "last.safetensors").read_bytes()
    assert (tmp_path / "again" / "last.safetensors").read_bytes() == same
    loop = read.command([0, 1])
    assert loop.startswith("for seed in 0 1; do richkd distill") and loop.endswith("$seed; done")
    odd = RunFolderRead(
        path=path,
        identity=read.identity,
        metrics=[],
        summary=None,
        settings={
            "cache": "my caches/$(x).zarr",
            "student": "resnet8",
            "method": "dkd",
            "prompts": [0, 3],
            "options": {"dkd": {"beta": 2.0}, "kd": {"temperature": 9}},
            "student_options": {"patch_size": 4},
            "seed": 3,
            "alpha": 0.5,
        },
    )
    assert shlex.split(odd.command([3])) == [
        "richkd",
        "distill",
        "--cache",
        "my caches/$(x).zarr",
        "--student",
        "resnet8",
        "--method",
        "dkd",
        "--prompts",
        "0,3",
        "--alpha",
        "0.5",
        "--set",
        "beta=2.0",
        "--student-set",
        "patch_size=4",
        "--seed",
        "3",
    ]


def test_evaluations_compare_on_the_same_images_only() -> None:
    def found(images: tuple[int, float], source: str | None = None) -> Evaluated:
        corrupted = (0.5, 0.1) if source else None
        return Evaluated(images=images, ece=(0.1, 0.0), source=source, corrupted=corrupted)

    ours, others = (100, 0.0), (50, 0.2)
    given = [None, found(ours), found(others, "y"), found(ours, "x"), found(ours, "y")]
    kept, note = comparable(given)
    assert kept == [None, found(ours), None, found(ours, "x"), found(ours)]
    assert all(value in note for value in ("100", "x", "2 rows"))
    assert comparable([None]) == ([None], "")


def test_costs_are_counted(runs: Path) -> None:
    read = load_run(runs / "shapes-resnet8-ce-s0")
    assert read is not None
    cost = student_cost(read)
    model = create_model("resnet8", 16)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    adds = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal adds
        if isinstance(module, torch.nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            adds += output.numel() * kernel * module.in_channels // module.groups
        else:
            adds += module.in_features * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert cost.multiply_adds == adds and cost.latency_ms > 0


def test_tensorboard_files_hold_the_metrics(run: Run, runs: Path, tmp_path: Path) -> None:
    accumulator = optional.load("tensorboard.backend.event_processing.event_accumulator")
    assert run("report", runs, "--out", tmp_path, "--tensorboard").code == 0
    events = accumulator.EventAccumulator(
        str(tmp_path / "tensorboard" / "shapes-resnet8-richkd-s0")
    ).Reload()
    read = load_run(runs / "shapes-resnet8-richkd-s0")
    assert read is not None
    for tag, key in (("accuracy/test", "test_accuracy"), ("loss/total", "loss"), ("lr", "lr")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(r["epoch"], pytest.approx(r[key])) for r in read.metrics]
    assert {"loss/ce", "loss/logit", "loss/feature"} <= set(events.Tags()["scalars"])


def test_names_are_text_on_the_page(run: Run, runs: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = tmp_path / "runs"
    shutil.copytree(runs / "shapes-resnet8-kd-s0", folder / "a")
    recipe = (folder / "a" / "recipe.toml").read_text()
    (folder / "a" / "recipe.toml").write_text(re.sub(r'cache = ".*"', f'cache = "{evil}"', recipe))
    assert run("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert evil not in page and html.escape(evil) in page


# --- refusals ------------------------------------------------------------------------------------


def test_refusals(fails: Fails, runs: Path, make_store: Any, tmp_path: Path, run: Run) -> None:
    def refused(code: str, *words: object, says: tuple[object, ...]) -> None:
        line = fails("report", *words)
        assert line.code == code, line
        assert all(str(value) in line for value in says), line

    refused("runs-missing", "nowhere", says=("nowhere", "richkd sweep"))
    (tmp_path / "empty").mkdir()
    refused("runs-missing", tmp_path / "empty", says=(tmp_path / "empty",))

    folder = tmp_path / "mixed"
    shutil.copytree(runs / "shapes-resnet8-ce-s0", folder / "mine")
    other = make_store(limit=40, out=str(tmp_path / "other.zarr"))
    words = ["--cache", other, "--student", "resnet8", "--method", "kd", "--epochs", 1, *CPU]
    assert run("distill", *words, "--out", folder / "other").code == 0
    refused("runs-of-several-caches", folder, says=(folder, other, "--cache"))
    done = run("report", folder, "--cache", other, "--json")
    assert [row["method"] for row in done.json["leaderboard"]] == ["kd"]
    third = make_store(limit=32, out=str(tmp_path / "third.zarr"))
    refused("runs-missing", folder, "--cache", third, says=(folder, third))

    (folder / "mine" / "summary.json").write_text("{}")
    refused("run-damaged", folder, says=(folder / "mine", "summary.json", "top1_last"))
    (folder / "mine" / "summary.json").write_text("{")
    refused("run-damaged", folder, says=(folder / "mine",))


def test_incomplete_runs_alone_make_a_page(run: Run, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / INTERRUPTED, tmp_path / "runs" / "cut")
    done = run("report", tmp_path / "runs", "--json")
    assert done.code == 0 and done.json["leaderboard"] == []
    page = (tmp_path / "runs" / "report.html").read_text()
    assert 'id="leaderboard"' not in page and "runs/cut (3 of 3 epochs)" in page

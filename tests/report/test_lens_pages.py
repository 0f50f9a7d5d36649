"""The pages of `richkd analyze` and `richkd evaluate` in a browser, and evaluations in reports."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import open_page

from richkd.analysis import teachers
from richkd.config.settings import Sweep
from richkd.core.progress import Report
from richkd.store.reader import open_cache
from richkd.sweep.run import run_sweep

Run = Callable[..., Any]
CPU = ("--device", "cpu")
VIEWS = [(1280, "light"), (500, "dark")]  # Chromium has no narrower windows


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens") / "runs"
    flags = {"cache": str(store), "epochs": 2, "batch_size": 16, "lr": 0.02, "device": "cpu"}
    grid = Sweep(students=("resnet8",), methods=("kd", "richkd"), seeds=2, out=str(folder))
    run_sweep(grid, None, flags, report=Report(quiet=True))
    return folder


def opened(page: Path, tmp_path: Path, width: int, scheme: str) -> str:
    """The page's elements in a window of a width, after scripts that log nothing."""
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom, console = open_page(page, tmp_path, f"--window-size={width},4000", *dark)
    assert console == ""
    return dom


def assert_drawn(dom: str, names: set[str], width: int) -> None:
    """Assert that exactly these plots were drawn and fit the window."""
    tags = [tag for tag in re.finditer(r"<div[^>]*>", dom) if "js-plotly-plot" in tag[0]]
    by_name = {re.findall(r' id="([^"]+)"', tag[0])[0]: tag for tag in tags}
    assert by_name.keys() == names
    for name, tag in by_name.items():
        size = re.compile(r'class="main-svg"[^>]* width="(\d+)').search(dom, tag.end())
        assert size and int(size[1]) <= width, name


def cells(dom: str, table: str) -> list[list[str]]:
    part = dom[dom.index(f'<table id="{table}">') :]
    rows = re.findall(r"<tr>.*?</tr>", part[: part.index("</table>")], re.S)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", r)]
        for r in rows[1:]
    ]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_analysis_in_a_browser(
    run: Run,
    store: Path,
    tmp_path: Path,
    width: int,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an added teacher in the narrow window."""
    narrow = width == VIEWS[1][0]
    if narrow:
        every = teachers.every_logits(open_cache(store), "test")
        added = {**every, "vit": every["cnn"].roll(1, dims=0)}
        monkeypatch.setattr(teachers, "every_logits", lambda *_: added)
    done = run("analyze", store, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    page = Path(done.json["files"]["html"])
    dom = opened(page, tmp_path, width, scheme)
    assert_drawn(
        dom,
        {
            "confidence",
            "reliability",
            "alpha-top1",
            "alpha-nll",
            "scale",
            "num-prompts",
            "class-changes",
            *["adds"] * narrow,
        },
        width,
    )
    shown = {row[0]: row[1:] for row in cells(dom, "scores")}
    assert shown["CNN teacher"][0] == f"{100 * done.json['teachers']['cnn']['top1']:.2f}"
    assert len(cells(dom, "prompts")) == len(done.json["blend"]["prompt"])
    changes = done.json["class_changes"]
    samples = [sample for kind in changes.values() for row in kind for sample in row["samples"]]
    assert len(re.findall(r'<img src="data:image/png', dom)) == len(samples)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_evaluation_in_a_browser(
    run: Run, runs: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    paths = sorted(path.parent for path in runs.rglob("summary.json"))
    done = run("evaluate", *paths, "--corruptions", "--limit", 5, *CPU, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    dom = opened(Path(done.json["files"]["html"]), tmp_path, width, scheme)
    assert_drawn(dom, {"confidence", "reliability", "corruptions"}, width)
    assert len(cells(dom, "scores")) == len(cells(dom, "corruptions")) == 4
    assert len(cells(dom, "differences")) == 3
    assert len(cells(dom, "classes-1")) == len(done.json["runs"][0]["classes"])


@pytest.mark.slow
def test_the_report_shows_what_was_evaluated(run: Run, runs: Path, tmp_path: Path) -> None:
    """As means over seeds, for rows whose runs were all evaluated."""
    ignore = shutil.ignore_patterns("evaluation.*")
    folder = Path(shutil.copytree(runs, tmp_path / "runs", ignore=ignore))
    assert "ECE" not in page_of(run, folder)
    kd = sorted(path.parent for path in folder.rglob("summary.json") if "-kd-" in str(path))
    assert len(kd) == 2
    assert run("evaluate", kd[0], *CPU).code == 0
    assert "ECE" not in page_of(run, folder)  # of one seed only
    for path in kd:
        assert run("evaluate", path, *CPU).code == 0
    errors = [json.loads((path / "evaluation.json").read_text())["ece"] for path in kd]
    page = page_of(run, folder)
    assert f"{100 * np.mean(errors):.2f} ± {100 * np.std(errors, ddof=1):.2f}" in page
    assert "<th>corrupted</th>" not in page
    rows = {
        row["method"]: row
        for row in json.loads((folder / "report.json").read_text())["leaderboard"]
    }
    assert rows["kd"]["ece_mean"] == pytest.approx(np.mean(errors))
    assert rows["richkd"]["ece_mean"] is None


def page_of(run: Run, folder: Path) -> str:
    assert run("report", folder).code == 0
    return (folder / "report.html").read_text().split("</head>")[1]

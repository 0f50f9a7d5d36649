"""Tables in the documentation and figures in the code equal the results in benchmarks/results."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from richkd.analysis.results import paired_difference
from richkd.losses import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = {
    "methods": "methods",
    "students": "students",
    "views": "views",
    "several_teachers": "several-teachers",
    "precision": "precision-fashion-mnist-x86_64-2-cores-cpu-2026-11-27",
}


MEASURED_AGAIN = {"photographs": "photographs*", "crops_per_decode": "crops-per-decode*"}


def runs_of(script: str) -> Any:
    return json.loads((RESULTS / f"{SCRIPTS[script]}.json").read_text())["runs"]


def all_runs() -> Iterator[tuple[str, Any]]:
    """Yield the published results by script, some of them from several sizes or machines."""
    for script in SCRIPTS:
        yield script, runs_of(script)
    for script, pattern in MEASURED_AGAIN.items():
        for path in RESULTS.glob(f"{pattern}.json"):
            yield script, json.loads(path.read_text())["runs"]


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def measured() -> dict[tuple[str, str], set[str]]:
    """The cells of every row that a script makes of its published results."""
    found: dict[tuple[str, str], set[str]] = {}
    for script, runs in all_runs():
        table = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["table"]
        for line in table(runs).splitlines():
            name, *rest = cells(line)
            found.setdefault((script, name), set()).update(rest)
    return found


def test_tables_in_the_documentation_are_the_results() -> None:
    rows = measured()
    quoted = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text().splitlines():
            if not (line.startswith("|") and "±" in line):
                continue
            quoted += 1
            figures = {*cells(line)[1:]} - {""}
            same = [row for row, known in rows.items() if figures <= known]
            assert len(same) == 1, f"{page.name}: {line}: {same}"
    assert quoted


def test_what_few_views_cost_is_what_was_measured() -> None:
    """The figures that `distill` logs, in losses, are those of the published measurement."""
    top1 = {(run["method"], run["views"], run["seed"]): run["top1"] for run in runs_of("views")}
    seeds = {seed for _, _, seed in top1}
    assert len(seeds) >= 5
    for name in ("kd", "pkt"):
        few = METHODS[name][0].few_views
        assert few.measured_with == name
        behind = {}
        for count in (8, 16, 32, 64, 162):
            pairs = [top1[name, str(count), s] - top1[name, "online", s] for s in seeds]
            difference = paired_difference(pairs)
            assert difference is not None and difference.n == len(seeds)
            if difference.high < 0:
                behind[count] = round(-100 * difference.mean, 2)
        assert few.points == behind and few.enough == 16


def test_the_table_of_the_rehearsal_is_the_result() -> None:
    page, file = (ROOT / "docs/scale-out.md").read_text(), RESULTS / "imagenet-rehearsal.json"
    table = runpy.run_path(str(ROOT / "benchmarks/imagenet_rehearsal.py"))["table"]
    header, *rows = table(
        json.loads(file.read_text())["runs"] if file.exists() else []
    ).splitlines()
    assert (header in page) is file.exists()
    assert not file.exists() or all(row in page for row in rows)

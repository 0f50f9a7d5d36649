"""Whole commands on what people bring: each script of tests/cases stands for a kind of it.

A script sets up its files, runs richkd as its users do, prints what it found, and exits 1 where
something is read wrongly in silence or ends in a traceback. They wait for their own processes most
of the time, so two run at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("*.py"))
BIN = Path(sys.executable).parent
Done = subprocess.CompletedProcess[str]


def run_case(case: Path) -> Done:
    """Run a script with this environment's richkd."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", case],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future[Done]]]:
    """The scripts whose tests were asked for, under way."""
    asked = {
        item.callspec.params["case"] for item in request.session.items if item.path == request.path
    }  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(run_case, case) for case in CASES if case in asked}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_what_people_bring(case: Path, cases: dict[Path, Future[Done]]) -> None:
    if case.stem == "small_shm" and os.geteuid():
        pytest.skip("needs root, to mount a small /dev/shm")
    done = cases[case].result()
    assert done.returncode == 0, done.stdout + done.stderr

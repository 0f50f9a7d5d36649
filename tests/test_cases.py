"""Whole commands on what people bring: each script of tests/cases stands for a kind of it.

A script sets up its files, runs richkd as its users do, prints what it found, and exits 1 where
something is read wrongly in silence or ends in a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("*.py"))
BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_what_people_bring(case: Path) -> None:
    if case.stem == "small_shm" and os.geteuid():
        pytest.skip("needs root, to mount a small /dev/shm")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", case], env=environment, check=False,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

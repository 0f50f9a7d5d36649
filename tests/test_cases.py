"""Whole commands on the files that users have: each script of tests/cases is a kind of them.

A script writes its files, runs richkd as its users do, prints what it found, and exits with 1 if
something was read wrongly in silence or ended in a traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from forked import Forks

CASES = sorted((Path(__file__).parent / "cases").glob("*.py"))
BIN = Path(sys.executable).parent
# They look at what only a process of its own has: mounts, encodings, children.
REAL = {"plain_terminal", "signal_to_all", "small_shm", "worker_killed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.root if case.stem == "small_shm" else (), id=case.stem)
        for case in CASES
    ],
)
def test_case(case: Path, forks: Forks) -> None:
    real = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = forks.run_python(case, env=real if case.stem in REAL else forks.shim)
    assert done.code == 0, done.out + done.err

"""A process that holds a lock, for the tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forks, Process

HOLD = """
import fcntl, pathlib, sys, time
from richkd.core import files
path, error, lease_s = sys.argv[1:]
if int(error):
    def missing(*_):
        raise OSError(int(error), "no locks here")
    fcntl.flock = missing
with files.locked(pathlib.Path(path), float(lease_s)):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(forks: Forks) -> Iterator[Callable[..., Process]]:
    """Lock a path in another process; an errno is what flock fails with there."""
    processes: list[Process] = []

    def start(path: Path, error: int = 0, lease_s: float = 2.0) -> Process:
        process = forks.start_python(HOLD, path, error, lease_s)
        processes.append(process)
        while process.poll() is None and not process.output_so_far()[0]:
            time.sleep(0.01)
        assert process.returncode is None, process.err
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()

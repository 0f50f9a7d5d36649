"""A file system of a few MiB that fills up: a clear error, and it resumes once there is room."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import at_call
from helpers import assert_same_run, tree

from richkd.models.weights import save_tensors
from richkd.store import schema

Run = Callable[..., Any]
Fails = Callable[..., Any]
pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.root]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill a file system."""
    ballast = (folder / "ballast").open("wb", buffering=0)  # a buffer would be written on closing
    with ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(b"\0" * 65536)


def test_stage_one_on_a_disk_that_fills_up(
    run: Run,
    fails: Fails,
    small: Path,
    shapes_teacher: Path,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schema, "choose_block", lambda *_: 32)
    words = [
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        96,
        "--views",
        4,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--device",
        "cpu",
    ]
    with at_call("richkd.store.writer:StoreWriter.write", 11, lambda: fill(small), before=True):
        line = fails(*words, "--out", small / "s.zarr")
    assert line.code == "write-failed" and "No space left" in line and "same command" in line
    assert "No space left" in fails(*words, "--out", small / "s.zarr")  # still no room
    (small / "ballast").unlink()
    done = run(*words, "--out", small / "s.zarr")
    assert done.code == 0 and re.search(r"resuming: \d+ of 17 blocks", done.err), done.err
    assert run(*words, "--out", tmp_path / "whole.zarr").code == 0
    was, now = tree(tmp_path / "whole.zarr"), tree(small / "s.zarr")
    assert was.keys() == now.keys()
    assert [name for name in was if was[name] != now[name]] == ["zarr.json"]


def test_stage_two_on_a_disk_that_fills_up(
    run: Run,
    fails: Fails,
    small: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--epochs",
        4,
        "--batch-size",
        16,
        "--device",
        "cpu",
    ]

    def save(path: Path, tensors: Any, note: Any = None) -> None:
        if note and note["epoch"] == "3":
            fill(small)
        save_tensors(path, tensors, note)

    with monkeypatch.context() as patch:
        patch.setattr("richkd.training.checkpoint.save_tensors", save)
        line = fails(*words, "--out", small / "run")
    assert "No space left" in line or "os error 28" in line
    (small / "ballast").unlink()
    done = run(*words, "--out", small / "run")
    assert done.code == 0 and "epoch 2 of 4" in done.err, done.err
    assert run(*words, "--out", tmp_path / "whole").code == 0
    assert_same_run(tmp_path / "whole", small / "run")


def test_stage_one_does_not_start_without_room(
    fails: Fails, small: Path, shapes_teacher: Path, clip_dir: Path
) -> None:
    line = fails(
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        3000,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--device",
        "cpu",
        "--out",
        small / "s.zarr",
    )
    assert line.code == "disk-too-small" and str(small) in line and "--views" in line
    assert not list(small.iterdir())


def test_a_sweep_on_a_disk_that_is_full(run: Run, small: Path, store: Path) -> None:
    words = [
        "sweep",
        "--cache",
        store,
        "--students",
        "resnet8",
        "--methods",
        "ce,kd",
        "--seeds",
        1,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--out",
        small,
    ]
    fill(small)
    done = run(*words)
    assert done.code == 2 and "Traceback" not in done.err
    assert "No space left" in done.err
    (small / "ballast").unlink()
    shutil.rmtree(small / "shapes-resnet8-ce-s0", ignore_errors=True)
    assert run(*words).code == 0

"""Locks on file systems without flock: files that their holders renew."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Process
from helpers import refuses

from richkd.core.files import LEASE_S, check_still_locked, check_unlocked, locked

Run = Callable[..., Any]
Fails = Callable[..., Any]
pytestmark = pytest.mark.fault
DISTILL = ["distill", "--student", "resnet8", "--method", "kd", "--epochs", 1, "--device", "cpu"]


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The error of a file system without flock."""
    number: int = getattr(errno, request.param)

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    return number


def test_a_lock_without_flock_leaves_nothing_behind(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.zarr"
    with locked(path):
        assert [file.name for file in path.parent.iterdir()] == [".s.zarr.lock"]
        check_still_locked(path)
    assert not list(path.parent.iterdir())
    check_unlocked(path)
    assert not list(path.parent.iterdir())


def test_a_lock_of_a_process_that_is_gone_is_free(
    missing: int, tmp_path: Path, hold: Callable[..., Process]
) -> None:
    path = tmp_path / "s.zarr"
    process = hold(path, missing)
    with refuses("locked", path, f"process {process.pid} "):
        check_unlocked(path, lease_s=2)
    with refuses("locked", path, f"process {process.pid} "), locked(path, lease_s=2):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / ".s.zarr.lock").exists()
    start = time.monotonic()
    with locked(path, lease_s=2):
        pass
    assert time.monotonic() - start < 2  # the lease did not have to run out
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", _no_flock)
    path, note = tmp_path / "s.zarr", tmp_path / ".s.zarr.lock"
    with locked(path, lease_s=1):
        text = note.read_text()
    here = f"host={socket.gethostname()}"
    assert here in text
    note.write_text(text.replace(here, "host=elsewhere"))
    start = time.monotonic()
    with locked(path, lease_s=1):
        assert time.monotonic() - start >= 1
        assert "host=elsewhere" not in note.read_text()


def test_a_process_that_lost_its_lock_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", _no_flock)
    path, note = tmp_path / "s.zarr", tmp_path / ".s.zarr.lock"
    with locked(path, lease_s=0.3):
        check_still_locked(path)
        taken = note.read_text().replace("token=", "token=0")
        note.unlink()
        note.write_text(taken)
        patience = time.monotonic() + 30
        with refuses("lock-lost", path):
            while time.monotonic() < patience:
                check_still_locked(path)
                time.sleep(0.02)
    assert note.read_text() == taken  # which is not ours


def test_commands_without_flock(run: Run, missing: int, store: Path, tmp_path: Path) -> None:
    words = (*DISTILL, "--cache", store, "--batch-size", 16, "--out", tmp_path / "run")
    for _ in range(2):
        done = run(*words)
        assert done.code == 0, done.err
    assert not list(tmp_path.rglob(".*"))


def test_other_errors_of_a_disk_are_reported(
    fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    line = fails(*DISTILL, "--cache", store, "--out", tmp_path / "run")
    assert "Input/output error" in line


@pytest.mark.slow
def test_one_teacher_is_trained_by_one_process(
    fails: Fails, tmp_path: Path, hold: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", _no_flock)
    path = tmp_path / "t.safetensors"
    process = hold(path, errno.ENOLCK, LEASE_S)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[train-teacher]\nout = "{path}"\nepochs = 1\n')
    data = ("--dataset", "shapes", "--limit", 16, "--device", "cpu", "--recipe", recipe)
    for words in (
        ("train-teacher", *data, "--model", "resnet8"),
        (
            "precompute",
            *data,
            "--teacher",
            "resnet8",
            "--clip",
            "none",
            "--out",
            tmp_path / "s.zarr",
        ),
    ):
        line = fails(*words)
        assert line.code == "locked" and f"{path} " in line and f" {process.pid} " in line
    assert {file.name for file in tmp_path.iterdir()} == {".t.safetensors.lock", "r.toml"}


def _no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_threads_that_write_one_file_leave_each_other_alone(tmp_path: Path) -> None:
    """No thread takes the temporary file of another for one that a dead process left."""
    from concurrent.futures import ThreadPoolExecutor

    from richkd.core.files import atomic_write

    def write(number: int) -> None:
        for _ in range(200):
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_bytes(bytes([number]) * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(set((tmp_path / "a").read_bytes())) == 1

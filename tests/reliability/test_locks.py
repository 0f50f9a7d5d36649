"""Locks where the file system has no flock: files that their holders renew."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from richkd.core import files
from richkd.core.errors import RichKDError
from richkd.core.files import check_still_locked, check_unlocked, locked

Run = Callable[..., Any]
HOLD = """
import errno, fcntl, pathlib, sys, time
def missing(*_):
    raise OSError(int(sys.argv[2]), "no locks here")
fcntl.flock = missing
from richkd.core import files
files.LEASE_S = 2.0
with files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The error of a file system without flock."""
    number: int = getattr(errno, request.param)

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(files, "LEASE_S", 2.0)
    return number


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(path: Path, number: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(number)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_without_flock_leaves_nothing_behind(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.zarr"
    with locked(path):
        assert [file.name for file in path.parent.iterdir()] == [".s.zarr.lock"]
        check_still_locked(path)
    assert not list(path.parent.iterdir())
    check_unlocked(path)
    assert not list(path.parent.iterdir())


@pytest.mark.fault
def test_a_lock_of_a_process_that_is_gone_is_free(
    missing: int, tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "s.zarr"
    process = hold(path, missing)
    for look in (check_unlocked, lambda path: locked(path).__enter__()):
        with pytest.raises(RichKDError, match=f"written by process {process.pid} on "):
            look(path)
    process.kill()
    process.wait()
    assert (tmp_path / ".s.zarr.lock").exists()
    start = time.monotonic()
    with locked(path):
        pass
    assert time.monotonic() - start < files.LEASE_S  # it had not to run out
    assert not list(tmp_path.iterdir())


@pytest.mark.fault
def test_a_lock_of_another_machine_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", _no_flock)
    monkeypatch.setattr(files, "LEASE_S", 1.0)
    path, note = tmp_path / "s.zarr", tmp_path / ".s.zarr.lock"
    with locked(path):
        text = note.read_text()
    here = f"host={socket.gethostname()}"
    assert here in text
    note.write_text(text.replace(here, "host=elsewhere"))
    start = time.monotonic()
    with locked(path):
        assert time.monotonic() - start >= files.LEASE_S
        assert "host=elsewhere" not in note.read_text()


@pytest.mark.fault
def test_who_was_held_up_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", _no_flock)
    monkeypatch.setattr(files, "LEASE_S", 0.3)
    path, note = tmp_path / "s.zarr", tmp_path / ".s.zarr.lock"
    with locked(path):
        check_still_locked(path)
        taken = note.read_text().replace("token=", "token=0")
        note.unlink()
        note.write_text(taken)
        patience = time.monotonic() + 30
        with pytest.raises(RichKDError, match="taken over by another process"):
            while time.monotonic() < patience:
                check_still_locked(path)
                time.sleep(0.02)
    assert note.read_text() == taken  # it is another's


@pytest.mark.fault
def test_commands_without_flock(run: Run, missing: int, store: Path, tmp_path: Path) -> None:
    words = (
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    )
    for _ in range(2):
        done = run(*words)
        assert done.code == 0, done.err
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.fault
def test_other_errors_of_a_disk_are_told(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    done = run(
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    )
    assert done.code == 2 and "Input/output error" in done.err


@pytest.mark.fault
def test_one_teacher_is_trained_by_one_process(
    fails: Callable[..., str],
    tmp_path: Path,
    hold: Callable[..., subprocess.Popen[str]],
    missing: int,
) -> None:
    path = tmp_path / "t.safetensors"
    process = hold(path, missing)
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
        assert f"{path} is being written by process {process.pid}" in fails(*words)
    assert {file.name for file in tmp_path.iterdir()} == {".t.safetensors.lock", "r.toml"}


def _no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_threads_that_write_one_file_leave_each_other_alone(tmp_path: Path) -> None:
    """None takes another's temporary file for one whose process is gone."""
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

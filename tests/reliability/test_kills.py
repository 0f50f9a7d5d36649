"""Interrupted anywhere and by any means, both stages and sweeps resume to the same results."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from forked import Forks, Kill, Process, interrupted
from helpers import assert_same_run, changed, refusal, tree
from safetensors import safe_open

from richkd.core.files import locked
from richkd.store import schema
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.writer import written

Run = Callable[..., Any]
Fails = Callable[..., Any]
pytestmark = pytest.mark.fault

STAGE_ONE = ["precompute", "--dataset", "shapes", "--teacher", "resnet8", "--device", "cpu"]
STAGE_TWO = ["distill", "--student", "resnet8", "--batch-size", "16", "--device", "cpu"]
SWEEP = ["sweep", "--students", "resnet8", "--batch-size", "16", "--seeds", 1, "--device", "cpu"]
WRITE = "richkd.store.writer:StoreWriter.write"
SAVE_EPOCH = "richkd.training.run_folder:RunFolder.save_epoch"
FEW = {"richkd.data.datasets:SHAPES_TEST": 40}
FINISH = "richkd.training.run_folder:RunFolder.finish"


@pytest.fixture
def stage_one(shapes_teacher: Path, clip_dir: Path) -> list[Any]:
    return [*STAGE_ONE, "--teacher-weights", shapes_teacher, "--clip", clip_dir]


@pytest.fixture
def small(stage_one: list[Any]) -> list[Any]:
    """A stage one that takes a moment."""
    return [*stage_one, "--limit", 64, "--views", 2]


@pytest.fixture
def blocks_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of the test split and six of two views of 64 samples."""
    monkeypatch.setattr(schema, "choose_block", lambda *_: 32)


def blocks_written(cache: Path) -> list[bool]:
    return list(map(bool, written(open_location(cache), read_manifest(cache))))


def arrays(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every chunk and of the arrays' metadata; the manifest names its path."""
    return {name: content for name, content in tree(cache).items() if name != "zarr.json"}


def hidden(folder: Path) -> list[Path]:
    """Return the locks and temporary files in a folder."""
    return list(folder.glob(".*"))


# --- at every block and every epoch --------------------------------------------------------------


# An interruption before the second block is handed over, and one as soon as the first one is.
POINTS = pytest.mark.parametrize(("count", "before"), [(2, True), (1, False)])


@POINTS
@pytest.mark.usefixtures("blocks_of_32")
def test_stage_one_interrupted_at_every_block(
    run: Run, small: list[Any], tmp_path: Path, count: int, before: bool
) -> None:
    whole, path = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    assert run(*small, "--out", whole).code == 0
    blocks = len(blocks_written(whole))
    assert blocks == 8
    for number in range(1, blocks):
        with interrupted(WRITE, count, before=before):
            assert run(*small, "--out", path).code == 130
        assert sum(blocks_written(path)) == number
        assert not hidden(tmp_path)
    assert run(*small, "--out", path).code == 0
    assert changed(arrays(whole), arrays(path)) == []


@POINTS
def test_stage_two_interrupted_at_every_epoch(
    run: Run, store: Path, tmp_path: Path, count: int, before: bool
) -> None:
    words = [*STAGE_TWO, "--cache", store, "--epochs", 4]
    assert run(*words, "--out", tmp_path / "whole").code == 0
    path = tmp_path / "cut"
    for epoch in range(1, 4):
        with interrupted(SAVE_EPOCH, count, before=before):
            assert run(*words, "--out", path).code == 130
        assert len((path / "metrics.jsonl").read_text().splitlines()) == epoch
    with interrupted(FINISH, before=True):
        assert run(*words, "--out", path).code == 130
    assert run(*words, "--out", path).code == 0
    assert_same_run(tmp_path / "whole", path)
    assert not hidden(path)


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
def test_stage_one_killed_at_a_block(
    forks: Forks, run: Run, stage_one: list[Any], tmp_path: Path, block: int
) -> None:
    words = [*stage_one, "--limit", 64, "--views", 4, "--out"]
    path = tmp_path / "cut.zarr"
    killed = forks.run(*words, path, kill=Kill(WRITE, block), values=FEW)
    assert killed.code == -signal.SIGKILL, killed.err
    assert sum(blocks_written(path)) in (block - 1, block)  # it may have been written in time
    assert run(*words, path).code == 0
    assert run(*words, tmp_path / "whole.zarr").code == 0
    assert changed(arrays(tmp_path / "whole.zarr"), arrays(path)) == []


@pytest.mark.parametrize("point", [Kill(SAVE_EPOCH, 2), Kill(FINISH, before=True)])
def test_stage_two_killed_at_an_epoch(
    forks: Forks, run: Run, store: Path, tmp_path: Path, point: Kill
) -> None:
    words = [*STAGE_TWO, "--cache", store, "--epochs", 3, "--out"]
    killed = forks.run(*words, tmp_path / "cut", kill=point)
    assert killed.code == -signal.SIGKILL, killed.err
    assert forks.run(*words, tmp_path / "cut").code == 0
    assert forks.run(*words, tmp_path / "whole").code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert not hidden(tmp_path / "cut")


def test_a_sweep_killed_within_its_second_run(forks: Forks, store: Path, tmp_path: Path) -> None:
    words = [*SWEEP, "--methods", "ce,kd", "--epochs", 2, "--cache", store, "--concurrent", 1]
    killed = forks.run(*words, "--out", tmp_path / "cut", kill=Kill(SAVE_EPOCH, 3))
    assert killed.code == -signal.SIGKILL, killed.err
    for folder in ("cut", "whole"):
        assert forks.run(*words, "--out", tmp_path / folder).code == 0
    for method in ("ce", "kd"):
        name = f"shapes-resnet8-{method}-s0"
        assert_same_run(tmp_path / "whole" / name, tmp_path / "cut" / name)


# --- killed and signalled at any moment ----------------------------------------------------------


@pytest.fixture
def moments() -> random.Random:
    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")
    return random.Random(seed)


def wait_for(process: Process, started: Callable[[], object]) -> None:
    while process.poll() is None and not started():
        time.sleep(0.002)


def newest(folder: Path, pattern: str) -> Callable[[], bool]:
    """Return what tells whether a file was written since now."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}

    def written_since() -> bool:
        for path in folder.glob(pattern):
            try:
                if path.stat().st_mtime_ns != before.get(path):
                    return True
            except FileNotFoundError:
                continue
        return False

    return written_since


def kill_again_and_again(
    start: Callable[[Path], Process],
    kills: int,
    path: Callable[[int], Path],
    progress: str,
    seconds: Callable[[], float],
) -> list[Path]:
    """Kill a command so often, each time after it made progress; resume it, and then another one.

    Args:
        start: starts the command that writes to a path.
        kills: how many.
        path: the n-th path to write to.
        progress: a pattern of the files that show progress.
        seconds: how long after the first progress to kill.

    Returns:
        What was written, all of it complete.
    """
    paths = [path(0)]
    while kills:
        process = start(paths[-1])
        wait_for(process, newest(paths[-1], progress))
        time.sleep(seconds())
        process.kill()
        if process.wait() == 0:
            paths.append(path(len(paths)))
            continue
        assert process.returncode == -signal.SIGKILL, process.err
        kills -= 1
    assert start(paths[-1]).wait() == 0
    print(f"{len(paths)} were begun")
    return paths


@pytest.mark.slow
def test_stage_one_killed_twenty_times(
    forks: Forks, stage_one: list[Any], tmp_path: Path, moments: random.Random
) -> None:
    words = [*stage_one, "--limit", 128, "--views", 162, "--out"]
    assert forks.run(*words, tmp_path / "whole.zarr").code == 0
    right = arrays(tmp_path / "whole.zarr")
    for path in kill_again_and_again(
        lambda path: forks.start(*words, path),
        20,
        lambda number: tmp_path / f"cut-{number}.zarr",
        "complete/c/*",
        lambda: moments.uniform(0, 1.5),
    ):
        assert changed(right, arrays(path)) == []


@pytest.mark.slow
def test_stage_two_killed_ten_times(
    forks: Forks, make_store: Callable[..., Path], tmp_path: Path, moments: random.Random
) -> None:
    cache = make_store(limit=128, out=str(tmp_path / "s.zarr"))
    words = [*STAGE_TWO, "--cache", cache, "--epochs", 60, "--out"]
    assert forks.run(*words, tmp_path / "whole").code == 0
    for path in kill_again_and_again(
        lambda path: forks.start(*words, path),
        10,
        lambda number: tmp_path / f"cut-{number}",
        "metrics.jsonl",
        lambda: moments.uniform(0, 2.0),
    ):
        assert_same_run(tmp_path / "whole", path)
        assert not hidden(path)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_stage_one_finish_its_block(
    forks: Forks, stage_one: list[Any], tmp_path: Path, by: signal.Signals
) -> None:
    path = tmp_path / "s.zarr"
    process = forks.start(*stage_one, "--limit", 128, "--views", 162, "--out", path)
    wait_for(process, (path / "complete/c/3").exists)
    process.send_signal(by)
    assert process.wait() == 128 + by and "Traceback" not in process.err
    flags = blocks_written(path)
    last = process.err.strip().splitlines()[-1]
    assert f"{sum(flags)} of {len(flags)} blocks" in last and "same command" in last
    assert 3 <= sum(flags) < len(flags)
    assert all(flags[: sum(flags)])  # no block is written whose predecessors are not
    assert not hidden(tmp_path)


def test_a_signal_ends_stage_two_with_the_last_epoch_kept(
    forks: Forks, store: Path, tmp_path: Path
) -> None:
    words = [*STAGE_TWO, "--cache", store, "--epochs", 20, "--out"]
    process = forks.start(*words, tmp_path / "run")
    wait_for(process, (tmp_path / "run" / "previous.safetensors").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and "Traceback" not in process.err
    assert "same command" in process.err.strip().splitlines()[-1]
    assert not hidden(tmp_path)
    for folder in ("run", "whole"):
        assert forks.run(*words, tmp_path / folder).code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# --- crashes of the machine: what was written last is torn or lost -------------------------------


@pytest.mark.usefixtures("blocks_of_32")
def test_blocks_that_a_crash_tore_are_computed_again(
    run: Run, small: list[Any], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    assert run(*small, "--out", whole).code == 0
    with interrupted(WRITE, 8, before=True):
        assert run(*small, "--out", cut).code == 130
    flags = sorted((cut / "complete" / "c").iterdir(), key=lambda path: int(path.name))
    assert len(flags) == 7  # 2 of the test split, 3 of the first training block, 2 of the second
    torn = cut / "train" / "teacher_logits" / "c" / "0" / "0" / "0"
    torn.write_bytes(torn.read_bytes()[:-40])
    (cut / "test" / "clip_features" / "c" / "1" / "0").unlink()
    flags[4].write_bytes(b"")
    for unfinished in ("zarr.json", "train/labels/c/0"):  # as zarr and richkd name them
        path = cut / unfinished
        path.with_suffix(f".{uuid4().hex}.partial").write_bytes(b"half")
        path.with_name(f".{path.name}.4321.tmp").write_bytes(b"half")
    done = run(*small, "--out", cut)
    assert done.code == 0 and "4 of 8 blocks" in done.err, done.err
    assert changed(arrays(whole), arrays(cut)) == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run: Run, fails: Fails, store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    words = [*STAGE_TWO, "--cache", store, "--epochs", 4]
    assert run(*words, "--out", tmp_path / "whole").code == 0
    path = tmp_path / "run"
    with interrupted(SAVE_EPOCH, 3):
        assert run(*words, "--out", path).code == 130
    last = path / "checkpoint.safetensors"
    with safe_open(last, "pt") as file:
        assert (file.metadata() or {})["epoch"] == "3"
    content = bytearray(last.read_bytes())
    # a bit of a tensor: the header does not show it
    content[int(rng.integers(len(content) // 2, len(content)))] ^= 4
    last.write_bytes(content)
    (path / ".best.safetensors.4321.tmp").write_bytes(b"half")
    done = run(*words, "--out", path)
    assert done.code == 0
    assert str(last) in done.err and "epoch 2 of 4" in done.err
    assert_same_run(tmp_path / "whole", path)
    assert not hidden(path)

    both = tmp_path / "both"
    with interrupted(SAVE_EPOCH, 3):
        assert run(*words, "--out", both).code == 130
    for name in ("checkpoint", "previous"):
        (both / f"{name}.safetensors").write_bytes(b"torn")
    before = tree(both)
    line = fails(*words, "--out", both)
    assert line.code == "checkpoint-unreadable" and "--overwrite" in line
    assert changed(before, tree(both)) == []


# --- two at once ---------------------------------------------------------------------------------


def test_the_second_writer_is_told_who_the_first_is(
    run: Run,
    fails: Fails,
    store: Path,
    small: list[Any],
    tmp_path: Path,
    hold: Callable[..., Process],
) -> None:
    commands = {
        tmp_path / "s.zarr": [*small, "--views", 1],
        tmp_path / "run": [*STAGE_TWO, "--cache", store, "--epochs", 1],
    }
    for path, words in commands.items():
        process = hold(path)
        line = fails(*words, "--out", path)
        assert line.code == "locked" and f"{path} " in line and f" {process.pid} " in line
        assert not path.exists()
        process.kill()  # its lock dies with it
        process.wait()
        assert path.with_name(f".{path.name}.lock").exists()
        done = run(*words, "--out", path)
        assert done.code == 0, done.err
        assert not hidden(tmp_path)


def test_a_sweep_leaves_the_runs_of_another_alone(
    run: Run, store: Path, tmp_path: Path, hold: Callable[..., Process]
) -> None:
    process = hold(tmp_path / "shapes-resnet8-kd-s0")
    words = [*SWEEP, "--methods", "ce,kd", "--epochs", 1, "--cache", store, "--out", tmp_path]
    done = run(*words, "--json")
    assert done.code == 2 and len(done.json["runs"]) == 1
    assert f"process {process.pid}" in done.json["failed"][0]["reason"]


@pytest.mark.slow
def test_two_processes_at_once_on_one_cache(
    forks: Forks, stage_one: list[Any], tmp_path: Path
) -> None:
    words = [*stage_one, "--limit", 128, "--views", 162, "--out"]
    processes = [forks.start(*words, tmp_path / "s.zarr") for _ in range(2)]
    outcomes = sorted((process.outcome() for process in processes), key=lambda done: done.code)
    assert [done.code for done in outcomes] == [0, 2], outcomes
    assert refusal(outcomes[1].err).code == "locked"
    assert forks.run(*words, tmp_path / "alone.zarr").code == 0
    assert changed(arrays(tmp_path / "alone.zarr"), arrays(tmp_path / "s.zarr")) == []


def test_locks_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.zarr"
    with locked(path):
        assert [file.name for file in path.parent.iterdir()] == [".s.zarr.lock"]
    assert not list(path.parent.iterdir())

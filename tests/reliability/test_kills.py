"""Cut off anywhere, by any means, both stages and sweeps go on to what they would have been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from helpers import assert_same_run, changed, tree
from safetensors import safe_open

from richkd.core.files import locked
from richkd.store import schema
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.writer import StoreWriter, written

Run = Callable[..., Any]
Fails = Callable[..., str]

STAGE_ONE = [
    "precompute",
    "--dataset",
    "shapes",
    "--limit",
    "128",
    "--views",
    "162",
    "--teacher",
    "resnet8",
    "--device",
    "cpu",
]
STAGE_TWO = [
    "distill",
    "--student",
    "resnet8",
    "--epochs",
    "60",
    "--batch-size",
    "16",
    "--device",
    "cpu",
    "--lr",
    "0.02",
]


@pytest.fixture
def moments() -> random.Random:
    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")
    return random.Random(seed)


def start(words: list[Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "richkd", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(words: list[Any]) -> float:
    """Run to the end; the seconds that it worked, which is after its imports."""
    began = time.perf_counter()
    process = start(words)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return time.perf_counter() - began


def interrupted(
    words: list[Any], started: Callable[[], object], seconds: float, by: int = signal.SIGKILL
) -> tuple[int, str]:
    """Start, wait until the work has begun and so much longer, and send a signal."""
    process = start(words)
    while process.poll() is None and not started():
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(by)
    _, err = process.communicate()
    return process.returncode, err


def newest(folder: Path, pattern: str) -> Callable[[], bool]:
    """Whether something was written since now."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}

    def written() -> bool:
        for path in folder.glob(pattern):
            try:
                if path.stat().st_mtime_ns != before.get(path):
                    return True
            except FileNotFoundError:
                continue
        return False

    return written


def arrays(store: Path) -> dict[str, bytes]:
    """The bytes of every chunk and of the arrays' metadata; the manifest names its own path."""
    return {name: content for name, content in tree(store).items() if name != "zarr.json"}


@pytest.fixture
def stage_one(shapes_teacher: Path, clip_dir: Path) -> list[Any]:
    return [*STAGE_ONE, "--teacher-weights", shapes_teacher, "--clip", clip_dir]


@pytest.mark.slow
@pytest.mark.fault
def test_stage_one_killed_twenty_times(
    stage_one: list[Any], tmp_path: Path, moments: random.Random
) -> None:
    whole = tmp_path / "whole.zarr"
    finish([*stage_one, "--out", whole])
    right = arrays(whole)
    kills, stores, done = 0, 0, []
    while kills < 20:
        path = tmp_path / f"cut-{stores}.zarr"
        while kills < 20:
            began = newest(path, "complete/c/*")
            code, err = interrupted([*stage_one, "--out", path], began, moments.uniform(0, 1.5))
            if code == 0 or "is complete already" in err:
                break
            assert code == -signal.SIGKILL, err
            kills += 1
            flags = len(list(path.glob("complete/c/*")))
            done.append(flags)
        if not read_manifest(path)["complete"]:
            finish([*stage_one, "--out", path])
        assert changed(right, arrays(path)) == []
        stores += 1
    print(f"{kills} kills on {stores} stores, with these numbers of blocks written: {done}")


@pytest.mark.slow
@pytest.mark.fault
def test_stage_two_killed_ten_times(
    make_store: Callable[..., Path], tmp_path: Path, moments: random.Random
) -> None:
    store = make_store(limit=128, out=str(tmp_path / "s.zarr"))
    words = [*STAGE_TWO, "--cache", store]
    finish([*words, "--out", tmp_path / "whole"])
    kills, runs, done = 0, 0, []
    while kills < 10:
        path = tmp_path / f"cut-{runs}"
        while kills < 10:
            began = newest(path, "metrics.jsonl")
            code, err = interrupted([*words, "--out", path], began, moments.uniform(0, 2.0))
            if code == 0 or "is complete already" in err:
                break
            assert code == -signal.SIGKILL, err
            kills += 1
            done.append(len((path / "metrics.jsonl").read_text().splitlines()))
        if not (path / "summary.json").exists():
            finish([*words, "--out", path])
        assert_same_run(tmp_path / "whole", path)
        assert not list(path.glob(".*"))
        runs += 1
    print(f"{kills} kills in {runs} runs, after these epochs: {done}")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_stage_one_finish_its_block(
    stage_one: list[Any], tmp_path: Path, by: signal.Signals
) -> None:
    path = tmp_path / "s.zarr"
    code, err = interrupted([*stage_one, "--out", path], newest(path, "complete/c/3"), 0.0, by)
    assert code == 128 + by and "Traceback" not in err
    said = err.strip().splitlines()[-1]
    flags = np.asarray(written(open_location(path), read_manifest(path)))
    assert said == (
        f"richkd: stopped with {flags.sum()} of {len(flags)} blocks written; the same command "
        f"resumes it"
    )
    assert 3 <= flags.sum() < len(flags)
    assert flags[: flags.sum()].all()  # no block is written whose predecessors are not
    assert not list(tmp_path.glob(".*"))  # no lock, nothing temporary


@pytest.mark.slow
@pytest.mark.fault
def test_a_signal_ends_stage_two_with_the_last_epoch_kept(store: Path, tmp_path: Path) -> None:
    words = [*STAGE_TWO, "--cache", store, "--out", tmp_path / "run"]
    code, err = interrupted(
        words, lambda: (tmp_path / "run" / "previous.safetensors").exists(), 0.0, signal.SIGTERM
    )
    assert code == 143 and "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("interrupted; the same command goes on")
    assert not list(tmp_path.glob(".*"))
    finish(words)
    finish([*STAGE_TWO, "--cache", store, "--out", tmp_path / "whole"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# --- crashes of the machine: what was written last is torn or lost ------------------------------


@pytest.mark.fault
def test_blocks_that_a_crash_tore_are_computed_again(
    run: Run, stage_one: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "choose_block", lambda *_: 32)
    words = [*stage_one, "--views", 2, "--limit", 64]
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    assert run(*words, "--out", whole).code == 0
    original = StoreWriter.write

    def write(self: StoreWriter, block: schema.Block, rows: Any) -> None:
        if block == schema.Block("train", 1, 32, 64):
            raise KeyboardInterrupt
        original(self, block, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", write)
        assert run(*words, "--out", cut).code == 130
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
    done = run(*words, "--out", cut)
    assert done.code == 0 and "resuming: 4 of 8 blocks" in done.err, done.err
    assert changed(arrays(whole), arrays(cut)) == []


@pytest.mark.fault
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run: Run, fails: Fails, store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    words = [*STAGE_TWO, "--cache", store, "--epochs", 4]
    assert run(*words, "--out", tmp_path / "whole").code == 0
    from richkd.training.checkpoint import Progress
    from richkd.training.run_folder import RunFolder

    path = tmp_path / "run"
    original = RunFolder.save_epoch

    def save(self: RunFolder, progress: Progress, *rest: Any) -> None:
        original(self, progress, *rest)
        if progress.epoch == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", save)
        assert run(*words, "--out", path).code == 130
    last = path / "checkpoint.safetensors"
    with safe_open(last, "pt") as file:
        assert (file.metadata() or {})["epoch"] == "3"
    content = bytearray(last.read_bytes())
    # of a tensor: no header says so
    content[int(rng.integers(len(content) // 2, len(content)))] ^= 4
    last.write_bytes(content)
    (path / ".best.safetensors.4321.tmp").write_bytes(b"half")
    done = run(*words, "--out", path)
    assert done.code == 0
    assert f"{last} is damaged" in done.err and "resuming after epoch 2 of" in done.err
    assert_same_run(tmp_path / "whole", path)
    assert not list(path.glob(".*"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", save)
        assert run(*words, "--out", tmp_path / "both").code == 130
    for name in ("checkpoint", "previous"):
        (tmp_path / "both" / f"{name}.safetensors").write_bytes(b"torn")
    before = tree(tmp_path / "both")
    line = fails(*words, "--out", tmp_path / "both")
    assert "no checkpoint in" in line and "--overwrite" in line
    assert changed(before, tree(tmp_path / "both")) == []


# --- two at once ---------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Another process that holds a path."""
    processes: list[subprocess.Popen[str]] = []

    def hold(path: Path) -> subprocess.Popen[str]:
        code = (
            "import sys, pathlib, time\nfrom richkd.core.files import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
            "    time.sleep(600)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.fault
def test_the_second_writer_is_told_who_the_first_is(
    run: Run,
    fails: Fails,
    store: Path,
    stage_one: list[Any],
    tmp_path: Path,
    holder: Callable[[Path], subprocess.Popen[str]],
) -> None:
    commands = {
        tmp_path / "s.zarr": [*stage_one, "--limit", 16, "--views", 1],
        tmp_path / "run": [*STAGE_TWO, "--cache", store, "--epochs", 1],
    }
    for path, words in commands.items():
        process = holder(path)
        line = fails(*words, "--out", path)
        assert f"{path} is being written by process {process.pid} on " in line
        assert not path.exists()
        process.kill()  # its lock dies with it
        process.wait()
        assert path.with_name(f".{path.name}.lock").exists()
        done = run(*words, "--out", path)
        assert done.code == 0, done.err
        assert not list(tmp_path.glob(".*"))


@pytest.mark.fault
def test_a_sweep_leaves_the_runs_of_another_alone(
    run: Run, store: Path, tmp_path: Path, holder: Callable[[Path], subprocess.Popen[str]]
) -> None:
    process = holder(tmp_path / "shapes-resnet8-kd-s0")
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
        1,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    done = run(*words, "--json")
    assert done.code == 2 and len(done.json["runs"]) == 1
    assert f"process {process.pid}" in done.json["failed"][0]["reason"]


@pytest.mark.slow
@pytest.mark.fault
def test_two_processes_at_once_on_one_store(stage_one: list[Any], tmp_path: Path) -> None:
    words = [*stage_one, "--out", tmp_path / "s.zarr"]
    processes = [start(words) for _ in range(2)]
    said = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 2], said
    loser = next(err for err, process in zip(said, processes, strict=True) if process.returncode)
    assert "is being written by process" in loser.strip().splitlines()[-1]
    finish([*stage_one, "--out", tmp_path / "alone.zarr"])
    assert changed(arrays(tmp_path / "alone.zarr"), arrays(tmp_path / "s.zarr")) == []


def test_locks_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.zarr"
    with locked(path):
        assert [file.name for file in path.parent.iterdir()] == [".s.zarr.lock"]
    assert not list(path.parent.iterdir())

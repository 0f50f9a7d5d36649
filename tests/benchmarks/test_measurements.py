"""The scripts of benchmarks/ at a small size: they train what the commands train, and resume."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from test_distill import train

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
CPU = ("--device", "cpu")


def script(name: str, *words: Any) -> str:
    command = [sys.executable, ROOT / "benchmarks" / name, *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_fewer_views_are_those_of_a_smaller_cache(make_store: Make, tmp_path: Path) -> None:
    store, few = make_store(views=162), make_store(views=8)
    words = (
        store,
        "--out",
        tmp_path / "v",
        "--epochs",
        9,
        "--seeds",
        1,
        "--methods",
        "ce,kd",
        "--views",
        "8,162,online",
        *CPU,
    )
    out = script("views.py", *words)
    runs = json.loads((tmp_path / "v" / "views.json").read_text())["runs"]
    top1 = {(run["method"], run["views"]): run["top1"] for run in runs}
    assert len(top1) == 6 and "| kd | 1 |" in out

    def trained(own: Path, method: str) -> float:
        settings = {"epochs": 9, "batch_size": 64, "lr": 0.05, "precision": "float32"}
        accuracy: float = train(
            own, tmp_path / f"{own.parent.name}-{method}", method=method, **settings
        )["top1_last"]
        return accuracy

    assert trained(few, "kd") == top1["kd", "8"]
    assert trained(store, "kd") == top1["kd", "162"]
    assert trained(few, "ce") == top1["ce", "online"]  # which is plain training
    table = (tmp_path / "v" / "views.md").read_text()
    assert script("views.py", *words).endswith(table + "\n")


@pytest.mark.slow
def test_the_table_of_methods(make_store: Make, tmp_path: Path) -> None:
    store, few = make_store(limit=120), ("--epochs", 1, "--seeds", 1, *CPU)
    words = (store, "--out", tmp_path / "m", *few)
    out = script("methods.py", *words)
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 16 and any(line.startswith("| KD | 1 |") for line in rows)
    runs = json.loads((tmp_path / "m" / "methods.json").read_text())["runs"]
    assert {run["tested"] for run in runs} == {32}
    again = script("methods.py", *words)
    assert again.splitlines()[-len(rows) :] == out.splitlines()[-len(rows) :]


@pytest.mark.slow
def test_epochs_of_photographs(tmp_path: Path) -> None:
    """Every way of training, for a round after one that warms up."""
    size = ("--images", 48, "--long-side", 120, "--side", 32, "--batch-size", 8)
    out = script("photographs.py", tmp_path, *size, "--rounds", 1, "--workers", 0)
    runs = json.loads((tmp_path / "photographs.json").read_text())["runs"]
    names = [run["training"] for run in runs]
    assert names[0] == "plain training" and "4 views" in names and "kept pixels" in names
    assert all(run["seconds"] > run["image_wait_s"] > 0 for run in runs)
    assert all(f"| {name} | 1 |" in out for name in names)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_cost_of_several_views_of_a_decode(tmp_path: Path) -> None:
    """The order without reuse is that of `distill`; every case is trained."""
    size = ("--images", 32, "--tested", 20, "--batch-size", 8, "--views", 4, "--epochs", 4)
    few = ("--teacher-images", 20, "--teacher-epochs", 1, "--seeds", 1)
    out = script("crops_per_decode.py", tmp_path, *size, *few)
    cases = ("1", "2 spread", "4 spread", "4 together")
    assert all(f"| kd, {case} | 1 |" in out for case in cases)
    runs = json.loads((tmp_path / "crops-per-decode.json").read_text())["runs"]
    assert [run["case"] for run in runs] == [*cases]


@pytest.mark.slow
def test_start_up_times_every_command(tmp_path: Path) -> None:
    out = script("start_up.py", "--rounds", 1, "--json", tmp_path / "s.json")
    commands = json.loads((tmp_path / "s.json").read_text())["commands"]
    assert [*commands] == ["--help", "inspect", "verify", "report", "distill"]
    for name, found in commands.items():
        (row,) = (line for line in out.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith(f"| {found['command'][0]:.2f} | {found['ratio']:.2f} |")


@pytest.mark.slow
def test_steps_are_compared_by_seed(store: Path, tmp_path: Path) -> None:
    words = (
        store,
        "--out",
        tmp_path / "p",
        "--epochs",
        1,
        "--seeds",
        2,
        *CPU,
        "--modes",
        "eager/float32,eager/bfloat16",
    )
    out = script("precision.py", *words)
    runs = json.loads((tmp_path / "p" / "precision.json").read_text())["runs"]
    assert {mode: [run["seed"] for run in each] for mode, each in runs.items()} == {
        "eager/float32": [0, 1],
        "eager/bfloat16": [0, 1],
    }
    assert len([line for line in out.splitlines() if line.startswith("| eager/")]) == 2
    assert script("precision.py", *words).splitlines()[-4:] == out.splitlines()[-4:]


@pytest.mark.slow
def test_the_rehearsal_of_imagenet(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rehearsal = import_module("imagenet_rehearsal")
    ran = {}

    def timed(ranks: int, words: str) -> dict[str, Any]:
        """Run a command as torchrun would, in forks."""
        job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        started = [
            forks.start(*words.split(), env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        ends = [process.outcome() for process in started]
        assert [end.code for end in ends] == [0] * ranks, ends
        ran[words.split(maxsplit=1)[0]] = ranks
        return {"step": words, "seconds": 0.1, "peak_bytes": 1}

    monkeypatch.setattr(rehearsal, "timed", timed)
    rehearsal.main(f"{tmp_path / 'r'} --classes 24 --per-class 6 --ranks 2".split())
    found = json.loads((tmp_path / "r/imagenet-rehearsal.json").read_text())
    steps = ["train-teacher", "precompute", "verify", "inspect", "distill", "evaluate"]
    assert [*ran] == steps and ran["precompute"] == ran["distill"] == 2
    assert found["checks"]["class_names"][:3] == ["tench", "goldfish", "great white shark"]
    assert found["checks"]["texts"] == 24 * 12 and found["checks"]["num_test"] == 48
    assert len(found["runs"]) == 1 + len(steps)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])

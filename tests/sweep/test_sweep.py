"""Sweeps: the numbers of runs alone, cut off and gone on, failures apart, one copy of the data."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks, Outcome, Process
from helpers import Refusal, assert_same_run, refusal, tree
from rich.console import Console

from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.distill import distill
from richkd.sweep import grid, local
from richkd.sweep.board import Board
from richkd.sweep.entries import Entry, Estimate
from richkd.sweep.grid import rungs, stop_hopeless
from richkd.sweep.local import choose_concurrent
from richkd.training.loop import Trainer

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
COMMON = ["--epochs", 2, "--batch-size", 16, "--device", "cpu", "--lr", 0.02]
GRID = ["--students", "resnet8,wrn_16_1", "--methods", "ce,kd,richkd", "--seeds", 2]


@pytest.fixture
def sweep(run: Run, store: Path, tmp_path: Path) -> Callable[..., Any]:
    def sweep(*arguments: object, out: str = "runs") -> Any:
        common = ["--cache", store, "--out", tmp_path / out, *COMMON, "--json"]
        return run("sweep", *common, *arguments)

    return sweep


def test_three_at_once_give_the_numbers_of_each_alone(
    sweep: Callable[..., Any], store: Path, tmp_path: Path
) -> None:
    done = sweep(
        "--students", "resnet8", "--methods", "kd,crd,richkd", "--seeds", 1, "--concurrent", 3
    )
    assert done.code == 0, done.err
    for method in ("kd", "crd", "richkd"):
        alone = tmp_path / "alone" / method
        distill(
            Distill(
                cache=str(store),
                student="resnet8",
                method=method,
                out=str(alone),
                epochs=2,
                batch_size=16,
                device="cpu",
                lr=0.02,
            )
        )
        assert_same_run(alone, tmp_path / "runs" / f"shapes-resnet8-{method}-s0")


@pytest.mark.slow
def test_the_grid_and_its_leaderboard(sweep: Callable[..., Any], tmp_path: Path) -> None:
    done = sweep(*GRID, "--alpha", "0.3,0.9")
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    of_student = ["ce", "kd", "richkd-a0.3", "richkd-a0.9"]  # α only where the method blends
    assert names == {
        f"shapes-{student}-{method}-s{seed}"
        for student in ("resnet8", "wrn_16_1")
        for method in of_student
        for seed in (0, 1)
    }
    rows = done.json["leaderboard"]
    assert len(rows) == 8 and len(done.json["runs"]) == 16
    means = [row["last"][0] for row in rows]
    assert means == sorted(means, reverse=True)
    for row in rows:
        named = f"-a{row['settings']['alpha']}" if row["settings"] else ""
        top1 = [
            json.loads(
                (
                    tmp_path
                    / "runs"
                    / f"shapes-{row['student']}-{row['method']}{named}-s{s}"
                    / "summary.json"
                ).read_text()
            )["top1_last"]
            for s in (0, 1)
        ]
        assert row["last"] == pytest.approx([sum(top1) / 2, abs(top1[0] - top1[1]) / math.sqrt(2)])
        assert (row["minus_kd"] is None) == (row["method"] == "kd")

    before = tree(tmp_path / "runs")
    again = sweep(*GRID, "--alpha", "0.3,0.9")
    assert again.code == 0 and again.json["leaderboard"] == rows
    assert tree(tmp_path / "runs") == before  # nothing was repeated


@pytest.mark.slow
def test_four_students_three_methods_two_seeds(sweep: Callable[..., Any]) -> None:
    start = time.perf_counter()
    done = sweep(
        "--students",
        "resnet8,resnet14,wrn_16_1,ShuffleV2",
        "--methods",
        "ce,kd,richkd",
        "--seeds",
        2,
        "--epochs",
        5,
    )
    assert done.code == 0, done.err
    assert len(done.json["runs"]) == 24 and len(done.json["leaderboard"]) == 12
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")


def test_a_dry_run_shows_the_grid_and_touches_nothing(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run("sweep", "--cache", store, "--out", tmp_path / "runs", *COMMON, *GRID, "--dry-run")
    assert done.code == 0 and not (tmp_path / "runs").exists()
    assert "12 runs of 2 epochs, 12 to do" in done.err
    assert sum("wrn_16_1" in line for line in done.out.splitlines()) == 3
    assert max(map(len, done.out.splitlines())) <= 80


def test_alpha_is_no_axis_where_only_features_blend_and_by_a_weight_of_their_own() -> None:
    for method, own, blends in (
        ("richkd-f", {}, True),
        ("richkd-f", {"feature_alpha": 0.5}, False),
        ("richkd", {"feature_alpha": 0.5}, True),
        ("kd", {}, False),
        ("crd-kd", {}, False),
    ):
        settings = Distill(cache="c.zarr", method=method, options={method: own})
        assert grid.blends(settings) == blends, (method, own)


def test_the_grid_shows_the_learning_rate_of_each_student(
    run: Run, store: Path, tmp_path: Path
) -> None:
    grid = ["--students", "resnet8,ShuffleV2", "--methods", "ce", "--seeds", 1, "--dry-run"]
    for given, rates in (([], ("0.05", "0.01")), (["--lr", 0.3], ("0.3", "0.3"))):
        done = run("sweep", "--cache", store, "--out", tmp_path / "runs", *grid, *given)
        assert done.code == 0, done.err
        rows = {
            line.split()[0]: line.split()[1]
            for line in done.out.splitlines()
            if line.split() and line.split()[0] in ("resnet8", "ShuffleV2")
        }
        assert rows == {"resnet8": rates[0], "ShuffleV2": rates[1]}


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_whole(
    sweep: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, end = Trainer.steps, Trainer.end_epoch

    def limited(self: Trainer, epoch: int, *arguments: Any) -> Any:
        yield from steps(self, epoch, *arguments)
        if epoch == 2 and "shapes-wrn_16_1-kd-s1" in self.settings.out:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def diverging(self: Trainer) -> Any:
        record = end(self)
        if "shapes-resnet8-ce-s0" in self.settings.out:  # type: ignore[attr-defined]
            record = type(record)(**{**record.as_dict(), "loss": math.nan})
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "steps", limited)
        patch.setattr(Trainer, "end_epoch", diverging)
        done = sweep(*GRID)
    assert done.code == 2
    failed = {Path(entry["run"]).name: entry["reason"] for entry in done.json["failed"]}
    assert failed.keys() == {"shapes-wrn_16_1-kd-s1", "shapes-resnet8-ce-s0"}
    assert {"--batch-size", "--concurrent"} <= {*failed["shapes-wrn_16_1-kd-s1"].split()}
    assert "--lr" in failed["shapes-resnet8-ce-s0"]
    assert refusal(done.err).code == "sweep-runs-failed" and "Traceback" not in done.err
    assert len(done.json["runs"]) == 10

    again = sweep(*GRID)
    assert again.code == 0 and len(again.json["runs"]) == 12
    whole = sweep(*GRID, out="whole")
    assert whole.code == 0
    for path in (tmp_path / "whole").iterdir():
        assert_same_run(path, tmp_path / "runs" / path.name)


@pytest.mark.slow
def test_killed_at_random_and_restarted_is_the_same_sweep(
    forks: Forks, store: Path, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)

    def start(out: str) -> Process:
        words = ["sweep", "--cache", store, "--out", tmp_path / out, *COMMON, *GRID, "--json"]
        return forks.start(*words, "--epochs", 3)

    began = time.perf_counter()
    whole = start("whole").outcome()
    took = time.perf_counter() - began
    assert whole.code == 0, whole.err
    kills = 0
    while kills < 5:
        process = start("cut")
        try:
            process.wait(moments.uniform(0.3 * took, 0.8 * took))
            shutil.rmtree(tmp_path / "cut")  # it came to its end: begin another
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        finished = {
            path.parent: path.stat().st_mtime_ns
            for path in (tmp_path / "cut").glob("*/summary.json")
        }
    cut = start("cut").outcome()
    assert cut.code == 0, cut.err
    for folder, when in finished.items():
        assert (folder / "summary.json").stat().st_mtime_ns == when  # not trained again
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.parent.name for path in (tmp_path / "cut").glob("*/summary.json")}
    assert len(names) == 12
    for name in names:
        assert_same_run(tmp_path / "whole" / name, tmp_path / "cut" / name)

    def table(done: Outcome) -> list[Any]:
        rows = done.json["leaderboard"]
        return [(r["student"], r["method"], r["last"], r["best"], r["minus_kd"]) for r in rows]

    assert table(cut) == table(whole)


# --- stopping early ------------------------------------------------------------------------------


def test_rungs_are_those_of_successive_halving() -> None:
    assert rungs(0, 240, 1) == [240]
    assert rungs(3, 27, 1) == [1, 3, 9, 27]
    assert rungs(3, 240, 1) == [2, 8, 26, 80, 240]
    assert rungs(2, 40, 10) == [10, 20, 40]  # only where it is tested
    assert rungs(4, 10, 4) == [10]


def entry(
    student: str, method: str, seed: int, accuracy: float, out: str = "", **more: Any
) -> Entry:
    settings = Distill(
        cache="c.zarr",
        student=student,
        method=method,
        seed=seed,
        epochs=9,
        out=out or f"runs/c-{student}-{method}-s{seed}",
    )
    cost = Estimate(parameters=1, features=1, epoch_s=1.0, memory=1)
    return Entry(settings=settings, scores={3: accuracy}, done=3, cost=cost, **more)


def test_the_hopeless_are_the_worse_of_one_student_by_their_mean() -> None:
    entries = [
        entry("a", "ce", 0, 0.9, out="named"),  # the settings tell, not the folder's name
        entry("a", "ce", 1, 0.1, out="at will"),
        entry("a", "kd", 0, 0.6),
        entry("a", "kd", 1, 0.6),
        entry("a", "dkd", 0, 0.4),
        entry("a", "dkd", 1, 0.3),
        entry("b", "ce", 0, 0.2),
        entry("b", "kd", 0, 0.1),
        entry("b", "dkd", 0, 0.05, state="failed"),
    ]
    stop_hopeless(entries, 3, 2)
    states = [each.state for each in entries]
    # of a: ceil(3/2) = 2 stay, dkd goes; of b: one of two stays
    assert states == ["waiting"] * 4 + ["stopped"] * 2 + ["waiting", "stopped", "failed"]
    assert entries[4].reason == "35.00 % at epoch 3"


def test_halving_stops_and_goes_on_the_same(sweep: Callable[..., Any], tmp_path: Path) -> None:
    words = [
        "--students",
        "resnet8",
        "--methods",
        "ce,kd,richkd-l,dkd",
        "--seeds",
        1,
        "--halving",
        2,
        "--epochs",
        4,
    ]
    done = sweep(*words)
    assert done.code == 0, done.err
    assert len(done.json["runs"]) == 1 and len(done.json["stopped"]) == 3
    stopped = {Path(each["run"]): each["reason"] for each in done.json["stopped"]}
    epochs = sorted(len((path / "metrics.jsonl").read_text().splitlines()) for path in stopped)
    assert epochs == [1, 1, 2]  # rungs 1, 2 and 4 keep two of four, one of two
    before = tree(tmp_path / "runs")
    again = sweep(*words)
    assert again.json["stopped"] == done.json["stopped"]
    assert tree(tmp_path / "runs") == before


# --- what people see -----------------------------------------------------------------------------


class Terminal(Report):
    """A report whose console is a terminal of 80 columns and 12 lines."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(force_terminal=True, width=80, height=12, record=True)

    @property
    def console(self) -> Console:
        return self._console


def test_the_dashboard_fits_a_small_terminal() -> None:
    students = ("resnet8", "mobilenetv3_small_050")
    entries = [entry(name, "richkd", seed, 0.5) for name in students for seed in range(10)]
    entries[15].state = "training"
    entries[0].finish({})
    entries[1].state, entries[1].reason = "failed", "diverged"
    report = Terminal()
    with report.console.capture() as captured:
        report.console.print(Board(entries, report).render())
    text = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())  # without colours
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= 80
    assert "mobilenetv3_small_050-richkd-s5" in text and "3/9" in text and "failed" in text
    assert "1 of 20 runs done, 1 failed" in text and "14 more rows" in text


def test_without_a_terminal_a_sweep_says_lines(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("richkd.sweep.board.LINE_EVERY_S", 0.0)
    done = run(
        "sweep",
        "--cache",
        store,
        "--out",
        tmp_path / "runs",
        *COMMON,
        "--students",
        "resnet8",
        "--methods",
        "ce,kd",
        "--seeds",
        1,
    )
    assert done.code == 0
    assert "shapes-resnet8-kd-s0 at 1/2" in done.err and "2 of 2 runs done" in done.err
    assert "\x1b" not in done.err and re.search(r"resnet8 +kd ", done.out)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "value"),
    [
        ("--students resnet9,resnet8,foo", "unknown-model", "'resnet9'"),
        ("--students resnet9,resnet8,foo", "unknown-model", "'foo'"),
        ("--students resnet8 --methods kd,kdd,xx", "unknown-name", "'kdd', 'xx'"),
        ("--students ,", "sweep-empty", "--students"),
        ("--methods kd", "sweep-empty", "--students"),
        ("--students resnet8 --methods ,", "sweep-empty", "--methods"),
        ("--students resnet8 --seeds 0", "value-out-of-range", "seeds = 0"),
        ("--students resnet8 --concurrent many", "unknown-name", "'many'"),
        ("--students resnet8 --concurrent 0", "value-out-of-range", "concurrent = 0"),
        ("--students resnet8 --halving 1", "value-out-of-range", "halving = 1"),
        ("--students resnet8 --alpha 0.5,x", "value-malformed", "alpha = 'x'"),
        ("--students resnet8 --alpha 1.5", "value-out-of-range", "= 1.5"),
        ("--students resnet8,crossvit_9_240", "model-does-not-fit", "crossvit_9_240"),
        ("--students resnet8 --cache none.zarr", "cache-missing", "none.zarr"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    fails: Fails, store: Path, tmp_path: Path, words: str, code: str, value: str
) -> None:
    line = fails(
        "sweep", "--cache", store, "--out", tmp_path / "runs", *COMMON, *shlex.split(words)
    )
    assert line.code == code and value in line
    assert not (tmp_path / "runs").exists()


def test_runs_of_another_store_or_other_settings_are_left_alone(
    fails: Fails, sweep: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--students", "resnet8", "--methods", "ce", "--seeds", 1]
    assert sweep(*words).code == 0
    before = tree(tmp_path / "runs")
    other = make_store(limit=40)
    line = fails("sweep", "--cache", other, "--out", tmp_path / "runs", *COMMON, *words)
    assert line.code == "run-cache-differs" and "limit" not in line
    assert "shapes-resnet8-ce-s0" in line and "dataset was" in line and "--out" in line
    line = fails(
        "sweep", "--cache", other, "--out", tmp_path / "runs", *COMMON, *words, "--epochs", 5
    )
    assert "shapes-resnet8-ce-s0" in line
    assert tree(tmp_path / "runs") == before


def test_a_trial_that_fails_is_told_by_the_run_itself(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """How many train at once is tried on a GPU; here on a CPU that is taken for one."""
    steps, tried = Trainer.steps, []

    def failing(self: Trainer, *arguments: Any) -> Any:
        tried.append(self)
        if "seeds-s1" in self.settings.out or self.settings.seed == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        yield from steps(self, *arguments)

    monkeypatch.setattr(Trainer, "steps", failing)
    monkeypatch.setattr(local, "choose_concurrent", partial(choose_concurrent, worth_trying_s=0))
    plain = local.cuda
    monkeypatch.setattr(local, "cuda", lambda device: len(tried) < 2 or plain(device))
    done = run(
        "sweep",
        "--cache",
        store,
        "--students",
        "resnet8",
        "--methods",
        "kd",
        "--seeds",
        3,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--lr",
        0.02,
        "--device",
        "cpu",
        "--out",
        tmp_path / "runs",
        "--json",
    )
    assert len(tried) > 3 and done.code == 2
    assert len(done.json["runs"]) == 2
    assert ["-s1" in each["run"] for each in done.json["failed"]] == [True]

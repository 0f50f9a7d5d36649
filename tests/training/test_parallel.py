"""One student in several processes: the losses of one process, whatever the method."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forks, Kill, Outcome, Process
from helpers import refusal, refuses, stage_one_of, write_photos, write_teacher

from richkd.config.settings import Distill
from richkd.core.ranks import Ranks
from richkd.training.parallel import Slices, batch_sizes, check_ranks, device_of

STEPS = Path(__file__).with_name("shared_steps.py")


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    if world == 1:
        return {"OMP_NUM_THREADS": "1"}
    return {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def job(start: Callable[[dict[str, str], int], Process], world: int) -> list[Process]:
    """Start the processes of a job."""
    port = free_port()
    return [start(environment(rank, world, port), rank) for rank in range(world)]


def finish(processes: list[Process]) -> list[Any]:
    """Wait for all processes of a job; none may hang."""
    try:
        for process in processes:
            process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
    return [process.outcome() for process in processes]


def steps(forks: Forks, folder: Path, world: int, jobs: list[dict[str, Any]]) -> list[Any]:
    """Train each job in a number of processes; return what the first one writes."""
    given, out = folder / "jobs.json", folder / f"{world}.json"
    given.write_text(json.dumps(jobs))
    ended = finish(job(lambda env, _: forks.start_python(STEPS, given, out, env=env), world))
    assert [outcome.code for outcome in ended] == [0] * world, ended
    results: list[Any] = json.loads(out.read_text())
    return results


def gap(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    gaps = (abs(a - b) / max(1.0, abs(a)) for a, b in zip(one, other, strict=True))
    return max(gaps, default=0.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, clip_dir: Path) -> Path:
    """A cache of photographs, of logits of both teachers and features."""
    folder = tmp_path_factory.mktemp("photographs")
    images = write_photos(folder, ["cat", "dog", "owl"], np.random.default_rng(0), train=13, test=5)
    weights = str(write_teacher(folder / "t.safetensors", "resnet8", 3))
    made = stage_one_of(
        folder / "p.zarr",
        f"imagefolder:{images}",
        "resnet8",
        teacher_weights=weights,
        clip=str(clip_dir),
        views=4,
    )
    return made.path


@pytest.fixture(scope="module")
def mixed(make_store: Callable[..., Path]) -> Path:
    """A cache of images of which some are mixed."""
    return make_store(augment="mix", views=2)


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 3), (7, 4), (3, 3), (1, 1)])
def test_slices_are_all_of_a_batch_in_its_order(batch_size: int, world: int) -> None:
    order = torch.randperm(53)
    slices = [Slices(Ranks(rank, world), batch_size) for rank in range(world)]
    own = [torch.split(each.of(order), each.own_sizes(53)) for each in slices]
    assert batch_sizes(53, batch_size) == [len(part) for part in torch.split(order, batch_size)]
    for batch, *parts in zip(torch.split(order, batch_size), *own, strict=True):
        if len(batch) < world:  # each takes the whole
            assert all(torch.equal(part, batch) for part in parts)
        else:
            assert torch.equal(torch.cat(parts), batch)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_too_many_processes_are_refused() -> None:
    def settings(**given: Any) -> Distill:
        return Distill(cache="c.zarr", **given)

    with refuses("more-ranks-than-samples", 5, 4):
        check_ranks(Ranks(0, 5), settings(batch_size=4), 100)
    with refuses("more-ranks-than-samples", 5, "3 training samples"):
        check_ranks(Ranks(0, 5), settings(batch_size=64), 3)
    with refuses("more-ranks-than-samples", 3, 5):
        check_ranks(Ranks(0, 3), settings(batch_size=5, batch_norm="local"), 100)
    check_ranks(Ranks(0, 4), settings(batch_size=4), 4)
    for step in ("captured", "compiled"):
        with refuses("ranks-step", step):
            check_ranks(Ranks(0, 2), settings(step=step), 100)
    with refuses("ranks-device", "cuda:1"):
        device_of(Ranks(0, 2), "cuda:1")
    assert device_of(Ranks(0, 1), "cuda:1") == "cuda:1"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    forks: Forks, store: Path, mixed: Path, photographs: Path, tmp_path: Path
) -> None:
    """51 steps in f32 at a low rate, at which differences of rounding do not grow."""
    given = {"student": "resnet8", "batch_size": 16, "lr": 0.00002, "method": "richkd"}
    jobs: list[dict[str, Any]] = [
        {**given, "cache": str(store), "epochs": 17, "eval_every": 17},
        {**given, "cache": str(photographs), "epochs": 2},
        {**given, "cache": str(mixed), "epochs": 2},
    ]
    one, two = (steps(forks, tmp_path, world, jobs) for world in (1, 2))
    assert len(one[0]["losses"]) == 51
    assert two[0]["bytes"] <= 0.51 * one[0]["bytes"]
    for whole, shared in zip(one, two, strict=True):
        assert gap(whole["losses"], shared["losses"]) < 1e-5


@pytest.mark.slow
def test_three_processes_train_as_one_to_the_last_bits_of_f64(
    forks: Forks, store: Path, photographs: Path, tmp_path: Path
) -> None:
    """Odd batches, every kind of loss, augmented orders: only sums are taken in another order.

    One job's last batches have two samples, which each of the three processes takes in whole.
    """
    given = {"student": "resnet8", "batch_size": 10, "epochs": 1, "lr": 0.05, "wide": True}
    arrays = {**given, "cache": str(store)}
    photos = {**given, "cache": str(photographs), "epochs": 2}
    jobs: list[dict[str, Any]] = [
        *({**arrays, "method": method} for method in ("richkd", "dkd", "sp", "ce")),
        {**photos, "method": "richkd", "ema": 0.9, "warmup": 1.0, "batch_size": 37},
        {**photos, "method": "kd", "crops_per_decode": 2},
        {**arrays, "method": "kd", "student": "timm/test_efficientnet"},
    ]
    one, three = (steps(forks, tmp_path, world, jobs) for world in (1, 3))
    for job, whole, shared in zip(jobs, one, three, strict=True):
        assert gap(whole["losses"], shared["losses"]) < 1e-9, job
        assert gap(whole["banks"], shared["banks"]) < 1e-9, job
        assert whole["evaluated"] == shared["evaluated"], job
        assert whole["names"] == shared["names"]


@pytest.mark.slow
def test_local_batch_norm_is_another_training(forks: Forks, store: Path, tmp_path: Path) -> None:
    given = {"cache": str(store), "student": "resnet8", "batch_size": 16, "epochs": 2, "lr": 0.02}
    jobs = [{**given, "method": "kd", "batch_norm": norm} for norm in ("sync", "local")]
    sync, local = steps(forks, tmp_path, 2, jobs)
    assert gap(sync["losses"], local["losses"]) > 1e-4


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_process_and_other_numbers_of_processes(
    forks: Forks, photographs: Path, tmp_path: Path
) -> None:
    """A run goes on in one process or in three; and what all refuse is said once."""
    words = (
        f"distill --cache {photographs} --student resnet8 --epochs 3 --batch-size 8 --lr 0.00002 "
        f"--device cpu --method richkd --out"
    ).split()

    def run(name: str, world: int, *more: str, kill: Kill | None = None) -> list[Outcome]:
        def start(env: dict[str, str], rank: int) -> Process:
            own = kill if rank == world - 1 else None
            return forks.start(*words, tmp_path / name, *more, env=env, kill=own)

        return finish(job(start, world))

    (whole,) = run("whole", 1)
    assert whole.code == 0
    step = "richkd.training.loop:Trainer.step"
    first, last = run("killed", 2, kill=Kill(at=step, count=8))
    assert (first.code, last.code) == (2, -signal.SIGKILL)
    assert refusal(first.err).code == "rank-lost"
    stopped = run("stopped", 2, kill=Kill(at=step, count=8, by=signal.SIGTERM))
    assert stopped[1].code == 128 + signal.SIGTERM and "interrupted" not in stopped[1].err
    for name, world, ranks in (("killed", 3, [2, 3]), ("stopped", 1, [1, 2])):
        ended = run(name, world, "--json")
        assert [outcome.code for outcome in ended] == [0] * world, ended
        assert ended[0].json["ranks"] == ranks and not any(each.out for each in ended[1:])
        assert gap(losses(tmp_path / "whole"), losses(tmp_path / name)) < 1e-5
        assert not (tmp_path / name / "checkpoint.safetensors").exists()
    for more, code in (
        ("--lr -1", "value-out-of-range"),
        ("--student nosuch", "unknown-model"),
    ):
        ended = run("refused", 2, *more.split())
        assert [outcome.code for outcome in ended] == [2, 2]
        assert refusal(ended[0].err).code == code and ended[1].err == ""
    assert not (tmp_path / "refused").exists()
    for command in ("sweep", "train-teacher"):
        outcome = forks.run(command, env=environment(0, 2, 1))
        assert outcome.code == 2 and refusal(outcome.err).code == "command-of-one-process"

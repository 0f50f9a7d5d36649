"""Sweeps on Ray: the local engine's results, lost workers, interruptions, disks apart, mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optional
import pytest
import torch
from helpers import Refusal, assert_same_run, refusal, refuses, tree

from richkd.config.settings import Sweep

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
COMMON = ["--students", "resnet8", "--batch-size", 16, "--device", "cpu", "--lr", 0.02]

# Two nodes of one CPU each, the second with a GPU that it only says it has. They end with this
# process's standard input, so with the tests, whatever becomes of those.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
os.makedirs("/tmp/ray", exist_ok=True)  # where it writes the address whatever temp_dir says
temporary, port = sys.argv[1:]
own = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
head = {**own, "gcs_server_port": int(port), "temp_dir": temporary}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(**own, num_gpus=1)
print("ready", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine."""
    optional.require("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's are too long for sockets
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder, str(port)],
            text=True,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin and process.stdout
        try:
            assert "ready" in process.stdout.read(6)
            members = family(process.pid)
            assert len(members) > 4
            yield f"127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()
        assert alive(members) == []


def environment() -> dict[str, str]:
    """One thread, no Ray of the user's, nothing of Ray in the home folder."""
    mine = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | mine


def family(pid: int) -> list[int]:
    """A process, and all that it started, directly or not."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    members = [pid]
    for member in members:
        members += parents.get(member, [])
    return members


def alive(pids: list[int], patience_s: float = 15.0) -> list[int]:
    """Those that do not end in that time."""
    end = time.monotonic() + patience_s
    while True:
        left = [pid for pid in pids if running(pid)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Driver:
    """A sweep on Ray in a process of its own."""

    process: subprocess.Popen[str]

    def end(self, code: int = 0) -> tuple[str, str]:
        """Its tables and what it said."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == code, err
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def start(store: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """A function that starts a sweep on Ray; what it started is gone when the test is."""
    drivers: list[Driver] = []

    def start(*words: object, program: tuple[str, ...] = ("-m", "richkd")) -> Any:
        common = ["sweep", "--engine", "ray", "--cache", store, "--out", "ray", *COMMON]
        command = [sys.executable, *program, *map(str, [*common, *words])]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        drivers.append(Driver(process))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            members = family(driver.process.pid)
            driver.process.kill()
            driver.process.communicate()
            assert alive(members) == []


@pytest.fixture
def local(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """A function that runs the same sweep on the local engine, with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def local(*words: object) -> Any:
        monkeypatch.chdir(tmp_path)
        return run("sweep", "--cache", store, "--out", "local", *COMMON, *words)

    yield local
    torch.set_num_threads(threads)


def assert_same_sweep(tmp_path: Path, out: str, local: Any) -> None:
    """Table, files, settings, weights and metrics."""
    table, other = out.split("\nray/ ")[1], local.out.split("\nlocal/ ")[1]
    assert "resnet8" in table and table.strip() == other.strip()
    theirs, ours = tree(tmp_path / "ray"), tree(tmp_path / "local")
    assert theirs.keys() == ours.keys()
    for path in (tmp_path / "local").iterdir():
        recipe = f"{path.name}/recipe.toml"
        assert theirs[recipe].replace(b'"ray/', b'"local/') == ours[recipe]
        if (path / "summary.json").is_file():
            assert_same_run(tmp_path / "ray" / path.name, path)


def wait_for(condition: Callable[[], bool], driver: Driver) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert driver.process.poll() is None, driver.process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def epochs(run: Path) -> list[dict[str, Any]]:
    """The lines of its metrics that are whole."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def worker_of(run: Path) -> int:
    """The process that has the run folder."""
    found = re.match(r"process (\d+) ", (run.parent / f".{run.name}.lock").read_text())
    assert found
    return int(found[1])


# --- the same results ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_give_the_local_engines_table_and_files(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    words = ["--methods", "kd,richkd", "--seeds", 2, "--epochs", 3]
    driver = start(*words, "--address", cluster)
    here = local(*words)
    out, said = driver.end()
    assert_same_sweep(tmp_path, out, here)
    assert len([*(tmp_path / "ray").glob("*/summary.json")]) == 4
    where = f"2 at once, each with 1 CPU and 0 GPUs, on the Ray cluster at {cluster}: 2 nodes, "
    assert f"4 runs of 3 epochs, 4 to do, {where}2 CPUs, 1 GPU\n" in said
    assert "4 of 4 runs done" in said
    ours = ("4 runs of ", "shapes-resnet8-", "sweep: ", "“Best” is ")
    assert [line for line in said.splitlines() if not line.startswith(ours)] == []  # Ray is quiet

    page = run("report", tmp_path / "ray", "--json")
    assert page.code == 0, page.err
    assert len(page.json["leaderboard"]) == 2 and (tmp_path / "ray" / "report.html").is_file()


@pytest.mark.slow
def test_halving_stops_the_same_runs(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--methods", "ce,kd,richkd-l,dkd", "--seeds", 1, "--halving", 2, "--epochs", 4]
    driver = start(*words, "--address", cluster)
    here = local(*words)
    out, _ = driver.end()
    assert_same_sweep(tmp_path, out, here)
    trained = {path.name: len(epochs(path)) for path in (tmp_path / "ray").iterdir()}
    assert sorted(trained.values()) == [1, 1, 2, 4]
    assert trained == {path.name: len(epochs(path)) for path in (tmp_path / "local").iterdir()}


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault
def test_a_run_whose_worker_is_killed_goes_on_from_its_checkpoint(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--methods", "kd,richkd-l", "--seeds", 1, "--epochs", 15]
    victim = tmp_path / "ray" / "shapes-resnet8-kd-s0"
    driver = start(*words, "--address", cluster)
    wait_for(lambda: len(epochs(victim)) >= 3, driver)
    os.kill(worker_of(victim), signal.SIGKILL)
    before = epochs(victim)
    out, said = driver.end()
    assert len(before) < 15
    assert f"{victim.name}: its worker was lost (" in said
    went_on = re.search(rf"{victim.name} resumes after epoch (\d+)\n", said)
    assert went_on and int(went_on[1]) in (len(before) - 1, len(before))
    kept = int(went_on[1])
    assert epochs(victim)[:kept] == before[:kept]  # their seconds, too: not trained again
    assert "raylet" not in out  # Ray's own account of it is not among the results
    assert_same_sweep(tmp_path, out, local(*words))


@pytest.mark.slow
@pytest.mark.fault
def test_interrupted_it_leaves_no_process_and_goes_on(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], tmp_path: Path
) -> None:
    """On a cluster of its own, which ends with it; it may go on anywhere."""
    words = ["--methods", "kd,richkd-l", "--seeds", 1, "--epochs", 15]
    runs = [tmp_path / "ray" / f"shapes-resnet8-{method}-s0" for method in ("kd", "richkd-l")]
    driver = start(*words)
    wait_for(lambda: any(len(epochs(run)) >= 2 for run in runs), driver)
    members = family(driver.process.pid)
    assert len(members) > 4
    driver.process.send_signal(signal.SIGTERM)
    _, said = driver.end(code=128 + signal.SIGTERM)
    assert said.splitlines()[-1] == (
        "richkd: interrupted; the same command resumes each run from its last epoch"
    )
    assert alive(members) == []
    assert not [*(tmp_path / "ray").glob(".*.lock")]  # the workers could tidy up
    before = [epochs(run) for run in runs]
    assert all(len(each) < 15 for each in before)

    out, _ = start(*words, "--address", cluster).end()
    for run, was in zip(runs, before, strict=True):
        kept = max(0, len(was) - 1)  # the last one's checkpoint may be missing
        assert epochs(run)[:kept] == was[:kept]
    assert_same_sweep(tmp_path, out, local(*words))


@pytest.mark.slow
def test_a_run_that_diverges_leaves_the_others_whole(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[distill.options.kd]\nlogit_weight = 1e39\n")
    words = ["--methods", "ce,kd", "--seeds", 1, "--epochs", 2, "--recipe", recipe]
    driver = start(*words, "--address", cluster)
    here = local(*words)
    out, said = driver.end(code=2)
    failure = re.search(r"^shapes-resnet8-kd-s0 failed: the student diverged: .*$", said, re.M)
    assert failure and failure[0] in here.err and here.code == 2
    line = refusal(said)
    assert line.code == "sweep-runs-failed" and "ray/shapes-resnet8-kd-s0" in line
    assert (tmp_path / "ray" / "shapes-resnet8-ce-s0" / "summary.json").is_file()
    assert_same_sweep(tmp_path, out, here)


ELSEWHERE = """
import sys
from richkd.__main__ import main
from richkd.sweep.ray_engine import RayEngine
node = sys.argv.pop(1)
init = RayEngine.__init__
def elsewhere(self, *arguments):
    init(self, *arguments)
    self.folder = node
RayEngine.__init__ = elsewhere
main()
"""


@pytest.mark.slow
def test_files_come_back_from_a_disk_that_the_driver_does_not_see(
    cluster: str, start: Callable[..., Driver], local: Callable[..., Any], tmp_path: Path
) -> None:
    """The workers' folder is not the driver's, as on a node with a disk of its own."""
    words = ["--methods", "kd", "--seeds", 2, "--epochs", 2]
    node = tmp_path / "node"
    program = ("-c", ELSEWHERE, str(node))
    out, _ = start(*words, "--address", cluster, program=program).end()
    here = local(*words)
    assert_same_sweep(tmp_path, out, here)
    assert tree(node / "ray") == tree(tmp_path / "ray")  # it was there that they trained
    assert not [*(tmp_path / "ray").glob(".*")]

    # the driver is lost before the files come: the workers have them still
    (tmp_path / "ray" / "shapes-resnet8-kd-s1" / "summary.json").unlink()
    trained = tree(node)
    words += ["--gpus-per-run", 0.25]
    out, said = start(*words, "--address", cluster, program=program).end()
    assert "1 at once, each with 1 CPU and 0.25 GPUs, on the Ray cluster" in said
    assert_same_sweep(tmp_path, out, here)
    assert tree(node) == trained


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "value"),
    [
        ("--engine spark", "unknown-name", "'spark'"),
        ("--address auto", "value-out-of-range", "address = 'auto'"),
        ("--gpus-per-run 0.5", "value-out-of-range", "gpus_per_run = 0.5"),
        ("--cpus-per-run 2", "value-out-of-range", "cpus_per_run = 2"),
        ("--engine ray --concurrent 2", "value-out-of-range", "concurrent = 2"),
        ("--engine ray --gpus-per-run 1.5", "value-out-of-range", "gpus_per_run = 1.5"),
        ("--engine ray --gpus-per-run -1", "value-out-of-range", "gpus_per_run = -1.0"),
        ("--engine ray --gpus-per-run nan", "value-out-of-range", "gpus_per_run = nan"),
        ("--engine ray --cpus-per-run 0", "value-out-of-range", "cpus_per_run = 0"),
        ("--engine ray --address 127.0.0.1:9", "ray-unreachable", "127.0.0.1:9"),
        ("--engine ray --address ray://h:1", "ray-address", "'ray://h:1'"),
        ("--engine ray --device cuda:1", "ray-device", "'cuda:1'"),
        ("--engine ray --students crossvit_9_240", "model-does-not-fit", "crossvit_9_240"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    fails: Fails, store: Path, tmp_path: Path, words: str, code: str, value: str
) -> None:
    optional.require("ray")
    start = time.perf_counter()
    line = fails(
        "sweep", "--cache", store, "--out", tmp_path / "runs", *COMMON, *shlex.split(words)
    )
    assert line.code == code and value in line
    assert not (tmp_path / "runs").exists()
    assert time.perf_counter() - start < 30


@pytest.mark.slow
def test_a_cluster_without_room_is_refused(
    cluster: str, start: Callable[..., Driver], tmp_path: Path
) -> None:
    _, said = start("--address", cluster, "--cpus-per-run", 2).end(code=2)
    line = refusal(said)
    assert line.code == "ray-no-room" and cluster in line and len(said.splitlines()) == 1
    for value in ("2 CPUs and 0 GPUs", "1 CPU, 0 GPUs; 1 CPU, 1 GPU", "--cpus-per-run"):
        assert value in line
    assert not (tmp_path / "ray").exists()


def test_without_ray_the_remedy_is_named(
    fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = fails("sweep", "--cache", store, "--out", tmp_path / "runs", *COMMON, "--engine", "ray")
    assert line.code == "extra-missing" and "richkd[ray]" in line


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
import richkd.sweep.run
from richkd.__main__ import main
main()
"""


@pytest.mark.slow
def test_the_local_engine_needs_no_ray(store: Path, tmp_path: Path) -> None:
    words = [
        "sweep",
        "--cache",
        store,
        "--out",
        tmp_path / "runs",
        *COMMON,
        "--methods",
        "ce",
        "--seeds",
        1,
        "--epochs",
        1,
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(json.loads(done.stdout)["runs"]) == 1


# --- what a run gets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "asked", "device", "at_once"),
    [
        ({"CPU": 8}, {}, "auto", 8),  # no GPU anywhere: a CPU a run
        ({"CPU": 8}, {"cpus_per_run": 3}, "auto", 2),
        ({"CPU": 8, "GPU": 2}, {}, "auto", 2),  # a GPU a run
        ({"CPU": 8, "GPU": 2}, {}, "cpu", 8),
        ({"CPU": 16, "GPU": 2}, {"gpus_per_run": 0.25}, "cuda", 8),
        ({"CPU": 16, "GPU": 2}, {"gpus_per_run": 0.3}, "auto", 6),  # three on each, none on both
        ({"CPU": 16, "GPU": 2}, {"gpus_per_run": 0.4}, "auto", 4),
        ({"CPU": 4, "GPU": 2}, {"gpus_per_run": 0.25}, "auto", 4),
        ({"CPU": 16, "GPU": 5}, {"gpus_per_run": 2.0}, "auto", 2),
        ({"CPU": 16}, {"gpus_per_run": 0.25}, "auto", 0),
        ({"CPU": 16}, {}, "cuda", 0),
    ],
)
def test_how_many_runs_a_node_holds(
    node: dict[str, float], asked: dict[str, Any], device: str, at_once: int
) -> None:
    optional.require("ray")
    from richkd.sweep.ray_engine import choose_share, room

    share = choose_share(Sweep(students=("resnet8",), engine="ray", **asked), device, [node])
    assert room(node, share) == at_once


@pytest.mark.parametrize("done", [2, 3])
def test_processes_that_fail_leave_a_reason(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the last checkpoint, when only the summary is left to be written."""
    optional.require("ray")
    from richkd.config.settings import Distill
    from richkd.sweep import ray_engine
    from richkd.training.run_folder import RunFolder

    failing = [sys.executable, "-c", "import sys; sys.exit('richkd: no space [disk-full]')"]
    monkeypatch.setattr(ray_engine, "shared_command", lambda *_: failing)
    monkeypatch.setattr(ray_engine, "CHECK_EVERY_S", 0.05)
    monkeypatch.setattr(RunFolder, "epochs_done", lambda _: done)
    given = Distill(cache="c.zarr", out=str(tmp_path), epochs=3)
    share = ray_engine.Share(cpus=2, gpus=2.0, device="cpu")
    with refuses("ray-processes-failed", "no space"):
        list(ray_engine.train_in_processes(given, 3, share))


@pytest.mark.slow
def test_a_run_that_has_two_gpus_is_trained_in_two_processes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here on CPUs, in a worker that was itself started in some job of torchrun."""
    optional.require("ray")
    from richkd.config.settings import Distill
    from richkd.store.reader import open_cache
    from richkd.sweep.ray_engine import Share, train_in_processes
    from richkd.training.student import with_defaults

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    out, options = tmp_path / "run", {"kd": {"temperature": 2.0}}
    given = Distill(cache=str(store), method="kd", student="resnet8", out=str(out), epochs=3)
    given = with_defaults(replace(given, options=options, batch_size=16), open_cache(store))
    share = Share(cpus=2, gpus=2.0, device="cpu")
    reports = list(train_in_processes(given, 2, share))
    assert [report.done for report in reports][-1] <= 2 and not (out / "summary.json").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    (out / "checkpoint.safetensors").write_bytes(b"")
    (out / "previous.safetensors").write_bytes(b"")
    with refuses("checkpoint-unreadable"):
        list(train_in_processes(given, 3, share))

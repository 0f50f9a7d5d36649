"""Real machines: containers with few CPUs, little shared memory, workers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refuses
from PIL import Image

from richkd.__main__ import prepare_threads
from richkd.config.settings import Distill
from richkd.core import cpus
from richkd.core.errors import RichKDError, machine_fault
from richkd.data import workers
from richkd.data.workers import Sample, Samples, load, num_workers
from richkd.sweep.entries import describe_failure

Run = Callable[..., Any]
Fails = Callable[..., str]

pytestmark = pytest.mark.fault


# --- CPUs ----------------------------------------------------------------------------------------

V2, V1 = "0::{}\n", "4:cpu,cpuacct:{}\n3:cpuset:/x\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "usable"),
    [
        ("", {}, 64),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, 64),
        (V2.format("/"), {"cpu.max": "200000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "150000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "10000 100000\n"}, 1),
        (V2.format("/"), {"cpu.max": "12800000 100000\n"}, 64),
        (V2.format("/a/b"), {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        (V2.format("/a/b"), {"a/cpu.max": "800000 100000", "a/b/cpu.max": "500000 100000"}, 5),
        (V2.format("/docker/0123"), {"cpu.max": "400000 100000"}, 4),  # as the host names it
        (V2.format("/../.."), {"cpu.max": "400000 100000"}, 4),
        (V2.format("/"), {"cpu.max": "damaged"}, 64),
        (
            V1.format("/"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            64,
        ),
        (
            V1.format("/"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            V1.format("/job/7"),
            {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "50000"},
            2,
        ),
        (V1.format("/"), {"cpu,cpuacct/cpu.cfs_quota_us": "100000"}, 64),
    ],
)
def test_cpus_of_a_control_group(
    membership: str, files: dict[str, str], usable: int, tmp_path: Path
) -> None:
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(membership)
    assert cpus.usable_cpus(64, tmp_path / "own", tmp_path / "groups") == usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cpus_that_the_scheduler_assigns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus.usable_cpus() == 1 and num_workers(10**6, 8) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_no_more_threads_look_at_a_folder_than_there_are_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from richkd.data.folders import list_images

    (tmp_path / "images" / "cat").mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / f"{number}.png")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr("richkd.data.scans.usable_cpus", lambda: 2)
    seen: set[int] = set()
    opened = Image.open

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.add(threading.get_ident())
        time.sleep(0.001)
        return opened(*args, **kwargs)

    monkeypatch.setattr(Image, "open", look)
    list_images(tmp_path / "images", "refuse")
    assert 1 <= len(seen) <= 2


@pytest.mark.parametrize(
    ("given", "usable", "set_"),
    [
        ({}, 64, {"GOMP_SPINCOUNT": "1000"}),
        ({}, 3, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}),
        ({"OMP_NUM_THREADS": "8"}, 3, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 64, {}),
        ({"GOMP_SPINCOUNT": "5"}, 64, {}),
    ],
)
def test_openmp_is_configured_before_pytorch_loads_it(
    given: dict[str, str], usable: int, set_: dict[str, str]
) -> None:
    environment = dict(given)
    prepare_threads(environment, assigned=64, usable=usable)
    assert environment == {**given, **set_}


# --- workers -------------------------------------------------------------------------------------

BATCHES = [[4 * number + i for i in range(4)] for number in range(12)]


class Squares(Samples):
    """Sample i: its number and its square; `odd` is called with 17."""

    def __init__(self, odd: Callable[[], Any] = lambda: None) -> None:
        self.odd = odd

    def __getitem__(self, index: int) -> Sample:
        if index == 17:
            self.odd()
        return index, torch.full((3, 5), index**2)


def loaded(samples: Samples, count: int = 2, bytes_: int = 100) -> list[tuple[list[int], Any]]:
    return [
        (index.tolist(), squares.clone())
        for index, squares in load(samples, iter(BATCHES), count, bytes_)
    ]


def check_right(batches: list[tuple[list[int], Any]]) -> None:
    assert [index for index, _ in batches] == BATCHES
    for index, squares in batches:
        wanted = torch.tensor(index)[:, None, None].expand(-1, 3, 5) ** 2
        assert torch.equal(squares, wanted)


def check_nothing_left() -> None:
    assert multiprocessing.active_children() == [] and not workers._open
    assert not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    workers._log_once.cache_clear()
    capfd.readouterr()
    return lambda: capfd.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("room", [None, 0, 10**9])
def test_batches_are_the_same_by_memory_and_by_pipes(
    count: int, room: int | None, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: room)
    for _ in range(2):
        check_right(loaded(Squares(), count))
    lines = said().splitlines()
    assert len(lines) == (1 if count and room == 0 else 0), lines
    assert all("/dev/shm" in line and "--shm-size" in line for line in lines)
    check_nothing_left()


def test_processes_share_the_free_shared_memory(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 10**9)
    assert workers.fits_shared_memory(2 * 10**8)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert not workers.fits_shared_memory(2 * 10**8)
    assert "/dev/shm" in said()


def test_batches_come_through_pipes_when_shared_memory_runs_out(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: torch.Tensor) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", none_left)
    check_right(loaded(Squares()))
    assert said() == ""
    check_nothing_left()


def test_without_workers_the_process_loads_the_images(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers.multiprocessing, "get_context", refused)
    check_right(loaded(Squares()))
    assert "no data-loader workers ([Errno 28] No space left on device)" in said()
    check_nothing_left()


def ends(code: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), code) if code < 128 else os._exit(code - 128)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (signal.SIGKILL, ("signal 9", "SIGKILL")),
        (signal.SIGBUS, ("signal 7", "SIGBUS", "/dev/shm")),
        (signal.SIGSEGV, ("signal 11", "SIGSEGV")),
        (128 + 3, ("exit code 3",)),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_worker_that_is_killed_is_named_with_the_remedy(
    code: int,
    named: tuple[str, ...],
    shared: bool,
    said: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "fits_shared_memory", lambda _: shared)
    handler = signal.getsignal(signal.SIGCHLD)
    with refuses("worker-died", *named, "RICHKD_WORKERS="):
        loaded(Squares(ends(code)))
    assert "Traceback" not in said()
    assert signal.getsignal(signal.SIGCHLD) == handler
    check_nothing_left()
    check_right(loaded(Squares()))


def test_a_killed_worker_raises_only_while_a_batch_is_awaited() -> None:
    batches = load(Squares(), iter(BATCHES), 2, 100)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.01)  # here PyTorch would raise
    with refuses("worker-died", "SIGKILL"):
        list(batches)
    check_nothing_left()


def missing() -> None:
    open("/no/such/image.png", "rb").close()  # noqa: PTH123


def refused() -> None:
    raise RichKDError("photos/cat/17.png became unreadable; restore it", code="image-changed")


def bug() -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize("count", [0, 2])
def test_errors_in_workers_come_out_as_they_are(count: int, said: Callable[[], str]) -> None:
    with pytest.raises(RichKDError) as told:
        loaded(Squares(refused), count)
    assert str(told.value) == "photos/cat/17.png became unreadable; restore it"
    with pytest.raises(FileNotFoundError) as lost:
        loaded(Squares(missing), count)
    assert lost.value.filename == "/no/such/image.png" and "\n" not in str(lost.value)
    with pytest.raises(ValueError, match="a bug"):
        loaded(Squares(bug), count)
    assert said() == ""
    check_nothing_left()


def test_workers_are_out_of_reach_of_what_stops_a_job() -> None:
    batches = load(Squares(), iter(BATCHES), 2, 100)
    first = next(batches)
    for child in multiprocessing.active_children():
        for by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(child.pid or 0, by)
    check_right([(first[0].tolist(), first[1]), *((i.tolist(), s) for i, s in batches)])
    check_nothing_left()


def test_workers_end_at_once_with_what_needed_them() -> None:
    began = time.perf_counter()
    batches = load(Squares(lambda: time.sleep(60)), iter(BATCHES), 2, 100)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    check_nothing_left()
    left = load(Squares(lambda: time.sleep(60)), iter(BATCHES), 2, 100)
    next(left)
    workers.end_all()  # as at exit
    check_nothing_left()
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("given", "count"), [("0", 0), ("1", 1), ("12", 12), ("", None), ("many", None), ("-1", None)]
)
def test_the_number_of_workers_can_be_set(
    given: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RICHKD_WORKERS", given)
    if given in ("many", "-1"):
        with refuses("value-malformed", "RICHKD_WORKERS", given):
            num_workers(1000, 8)
    else:
        usual = min(cpus.usable_cpus(), workers.MAX_WORKERS)
        assert num_workers(1000, 8) == (usual if count is None else count)
        assert num_workers(32, 8) == 0  # starting them would take longer


def test_a_thread_can_load_with_workers() -> None:
    """As in a program that runs richkd beside something else."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(loaded(Squares())))
    thread.start()
    thread.join()
    check_right(found)
    check_nothing_left()


@pytest.mark.parametrize("killed", [False, True])
def test_the_thread_that_pins_memory_ends_quietly(
    killed: bool, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a GPU, except that nothing is pinned."""
    from torch.utils.data._utils import pin_memory

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(pin_memory, "pin_memory", lambda data, _=None: data)
    batches = load(
        Squares(ends(signal.SIGKILL) if killed else lambda: None),
        iter(BATCHES),
        2,
        100,
        pin_memory=True,
    )
    if killed:
        with refuses("worker-died", "SIGKILL"):
            list(batches)
    else:
        for _ in range(3):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
    time.sleep(0.3)
    assert said() == ""
    check_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(method: str, tmp_path: Path) -> None:
    """forkserver is Python 3.14's own, spawn that of macOS; what this process uses is `fork`."""
    for number in range(40):
        path = tmp_path / "photos" / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + number, 40), (number, 0, 0)).save(path)
    script = (
        "import sys, os, signal, multiprocessing, torch\nfrom pathlib import Path\n"
        "from richkd.data import workers\nfrom richkd.data.datasets import files_split\n"
        "from richkd.data.decoding import Decoding\n"
        "from richkd.data.folders import list_images\nfrom richkd.data.inputs import FileInputs\n"
        "def main():\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    listing = list_images(Path('photos'), 'refuse')\n"
        "    files = files_split(listing, 16, Decoding()).images\n"
        "    def colours(stop):\n"
        "        said = []\n"
        "        for index, images in FileInputs(files, torch.device('cpu')).batches(\n"
        "            torch.arange(40), None, 4):\n"
        "            if stop: os.killpg(0, signal.SIGTERM)\n"
        "            said += images[:, 0, 0, 0].tolist()\n"
        "        return said\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    os.environ['RICHKD_WORKERS'] = '1'\n"
        "    first = colours(False)  # by fork, whatever is set\n"
        f"    workers.START_METHOD = {method!r}\n"
        "    assert colours(True) == first\n"
        "    print(first == sorted(first, key=lambda c: first.index(c)), len(set(first)))\n"
        "if __name__ == '__main__': main()\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(  # a fork cannot start processes in these ways
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        env={**os.environ, "RICHKD_HOME": str(tmp_path)},
    )
    assert done.returncode == 0 and done.stdout == "True 40\n" and done.stderr == "", done


# --- what the machine lacks, in one line ---------------------------------------------------------

SHARED = "unable to allocate shared memory(shm) for file </torch_71_2_0>: No space left (28)"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "out of memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 9 bytes. Error code 12"
            ),
            "out of memory",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "out of memory"),
        (RuntimeError(SHARED), "shared memory ran out"),
        (
            RuntimeError("unable to write to file </torch_9_1>: No space left on device (28)"),
            "shared memory ran out",
        ),
        (RuntimeError("received 0 items of ancdata"), "too many open files"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (memory format)"), None),
        (ValueError("memory_format is not supported"), None),
    ],
)
def test_a_fault_of_the_machine_is_told_from_a_bug(error: Exception, named: str | None) -> None:
    told = machine_fault(error)
    assert told is None if named is None else told is not None and told.startswith(named)


def test_a_sweep_names_shared_memory_as_that_and_memory_as_that() -> None:
    settings = Distill(cache="x", batch_size=48)
    shared = describe_failure(RuntimeError(SHARED), settings, "--concurrent")
    assert "/dev/shm" in shared and "--shm-size" in shared and "--concurrent" not in shared
    ours = RichKDError(workers._describe(-signal.SIGKILL), code="worker-died")
    assert describe_failure(ours, settings, "--concurrent") == str(ours)
    memory = describe_failure(MemoryError(), settings, "--concurrent")
    assert memory == "out of memory with batches of 48; lower --batch-size or --concurrent"
    assert describe_failure(RuntimeError("no memory_format"), settings, "") == "no memory_format"


def test_memory_that_runs_out_is_no_traceback(
    fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summarize(_: str) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("richkd.tools.inspect.summarize", summarize)
    assert "out of memory" in fails("inspect", "x")


@pytest.mark.slow
@pytest.mark.root
def test_a_small_shared_memory(tmp_path: Path) -> None:
    """One of 1 MiB; Docker gives 64."""
    for split, count in (("train", 60), ("val", 4)):
        for name in ("cat", "dog"):
            for number in range(count):
                path = tmp_path / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (130, 130), (number, 0, 0)).save(path)
    command = (
        "train-teacher --dataset imagefolder:images --image-size 128 --device cpu --epochs 1"
        " --model resnet8 --batch-size 16 --out t.safetensors"
    )
    for size, line in (("1m", "through pipes"), ("4k", None)):
        done = subprocess.run(
            [
                "unshare",
                "-m",
                "sh",
                "-c",
                f"mount -t tmpfs -o size={size} t /dev/shm && exec "
                f"{sys.executable} -m richkd {command} --overwrite",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RICHKD_HOME": str(tmp_path / "home"), "RICHKD_WORKERS": "2"},
        )
        assert done.returncode == 0, done.stderr
        if line:
            assert done.stderr.count("/dev/shm") == 1 and line in done.stderr
        assert "Traceback" not in done.stderr

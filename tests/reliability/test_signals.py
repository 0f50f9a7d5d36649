"""Signals to all processes of a job, at any moment of any command: one line, and it resumes.

RICHKD_TEST_SIGNALS=30 sends so many to each command.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forks, Process
from helpers import write_teacher
from PIL import Image

from richkd.core.files import is_temporary
from richkd.core.interrupts import (
    SAME_REQUEST_S,
    Interrupted,
    deferred,
    interruptible,
    mark_work_started,
    uninterrupted,
)

SIGNALS = int(os.environ.get("RICHKD_TEST_SIGNALS", "2"))
KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(autouse=True)
def hangups_end_a_process() -> Iterator[None]:
    """Undo nohup, which ignores SIGHUP, for the tests that send it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("RICHKD_TEST_SEED") or random.randrange(2**32))
    print(f"RICHKD_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, more than it takes for workers to be worth it, and what needs them."""
    root = tmp_path_factory.mktemp("signals")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for name in ("cat", "dog"):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    write_teacher(root / "teacher.safetensors", "resnet8", 2)
    (root / "mine.toml").write_text(
        '[precompute]\ndataset = "imagefolder:images"\nimage_size = 32\nteacher = "resnet8"\n'
        'teacher_weights = "teacher.safetensors"\nclip = "none"\nviews = 2\nbatch_size = 8\n'
        "teacher_size = 32\n"
        '[distill]\nstudent = "resnet8"\nmethod = "kd"\nepochs = 4\nbatch_size = 8\n'
    )
    return root


@pytest.fixture(scope="module")
def start(forks: Forks, photographs: Path) -> Callable[..., Process]:
    """Start a command in the folder of images, in a process group of its own."""
    env = {"RICHKD_HOME": str(photographs / "home")}
    return lambda words, **given: forks.start(*words, cwd=photographs, env=env, **given)


@pytest.fixture(scope="module")
def finish(start: Callable[..., Process]) -> Callable[[list[Any]], float]:
    """Run a command to its end; return the seconds that it took."""

    def finish(words: list[Any]) -> float:
        began = time.perf_counter()
        done = start(words).outcome()
        assert done.code == 0, done.err
        return time.perf_counter() - began

    return finish


def ready(process: Process | subprocess.Popen[str]) -> None:
    """Wait until the command handles signals."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        if caught and int(caught[1], 16) & bit:
            return
        time.sleep(0.002)


def members(group: int) -> list[int]:
    """Return the live processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, own, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(own) == group and state != "Z":
                found.append(int(entry.name))
    return found


def gone(group: int) -> bool:
    """Whether all processes of a group end within two seconds."""
    for _ in range(100):
        if not members(group):
            return True
        time.sleep(0.02)
    return False


def signalled(process: Process, by: int) -> tuple[int, str]:
    """Signal the whole group; return its exit code and its standard error."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, by)
    try:
        process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.wait(), process.err


def check_stopped(code: int, err: str, by: int) -> None:
    """Check that it ended with one line of richkd's and the exit code of the signal."""
    lines = err.strip().splitlines()
    assert code == 128 + by, (code, err)
    assert [line for line in lines if line.startswith("richkd: ")] == lines[-1:], err
    for noise in ("Traceback", "Exception ignored", "Error"):
        assert noise not in err, err


@dataclass
class Job:
    """A command and what it writes to a folder."""

    words: Callable[[Path], list[Any]]
    made: Callable[[Path], Any]  # comparable
    last: str = "?"  # the file that is written last
    resumes: bool = True


def complete(job: Job, out: Path) -> bool:
    """Whether the work was done when the signal came, though the process had not ended."""
    file = out / job.last
    return file.is_file() and '"complete": false' not in file.read_bytes()[:4096].decode("latin-1")


def checksums(store: Path) -> Any:
    return json.loads((store / "zarr.json").read_text())["attributes"]["checksums"]


def content(file: Path) -> tuple[Any, bytes]:
    """Return the header of a file of tensors, whose notes have no order, and the tensors' bytes."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def weights(folder: Path) -> Any:
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("last.safetensors"))
    }


def evaluation(folder: Path) -> Any:
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def jobs(finish: Callable[[list[Any]], float]) -> dict[str, Job]:
    images = ["--dataset", "imagefolder:images", "--image-size", 32, "--device", "cpu"]
    stage_one = [
        "precompute",
        *images,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        "teacher.safetensors",
        "--teacher-size",
        32,
        "--clip",
        "none",
        "--batch-size",
        8,
    ]
    student = ["--batch-size", 8, "--device", "cpu"]
    finish([*stage_one, "--views", 2, "--out", "given.zarr"])
    finish(
        [
            "distill",
            "--cache",
            "given.zarr",
            "--student",
            "resnet8",
            "--method",
            "kd",
            "--epochs",
            1,
            *student,
            "--out",
            "given",
        ],
    )

    return {
        "train-teacher": Job(
            lambda out: [
                "train-teacher",
                *images,
                "--model",
                "resnet8",
                "--epochs",
                4,
                "--batch-size",
                8,
                "--out",
                out / "w.safetensors",
            ],
            lambda out: content(out / "w.safetensors"),
            "w.safetensors",
        ),
        "precompute": Job(
            lambda out: [*stage_one, "--views", 24, "--out", out / "s.zarr"],
            lambda out: checksums(out / "s.zarr"),
            "s.zarr/zarr.json",
        ),
        "distill": Job(
            lambda out: [
                "distill",
                "--cache",
                "given.zarr",
                "--student",
                "resnet8",
                "--method",
                "kd",
                "--epochs",
                4,
                *student,
                "--out",
                out,
            ],
            weights,
            "summary.json",
        ),
        "sweep": Job(
            lambda out: [
                "sweep",
                "--cache",
                "given.zarr",
                "--students",
                "resnet8",
                "--methods",
                "ce,kd",
                "--seeds",
                1,
                "--epochs",
                2,
                *student,
                "--out",
                out,
            ],
            weights,
        ),
        "run": Job(
            lambda out: [
                "run",
                "mine.toml",
                "--device",
                "cpu",
                "--cache",
                out / "s.zarr",
                "--out",
                out / "run",
            ],
            lambda out: (checksums(out / "s.zarr"), weights(out)),
        ),
        "evaluate": Job(
            lambda out: ["evaluate", "given", "--corruptions", "--device", "cpu", "--out", out],
            evaluation,
            resumes=False,
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["train-teacher", "precompute", "distill", "sweep", "run", "evaluate"]
)
def test_signals_to_all_processes_at_any_moment(
    name: str,
    jobs: dict[str, Job],
    start: Callable[..., Process],
    finish: Callable[[list[Any]], float],
    photographs: Path,
    tmp_path: Path,
    moments: random.Random,
) -> None:
    job = jobs[name]
    whole = tmp_path / "whole"
    seconds = finish(job.words(whole))
    right = job.made(whole)
    codes: Counter[int] = Counter()
    sent, runs = 0, 0
    while sent < SIGNALS:
        out = tmp_path / f"cut-{runs}"
        runs += 1
        code = -1
        while code != 0 and sent < SIGNALS and not complete(job, out):
            by = moments.choice(KINDS)
            process = start(job.words(out))
            ready(process)
            time.sleep(moments.uniform(0, seconds))
            code, err = signalled(process, by)
            sent += 1
            codes[code] += 1
            if code != 0:
                check_stopped(code, err, by)
                assert ("same command" in err.splitlines()[-1]) == job.resumes, err
            assert gone(process.pid), members(process.pid)
            assert not [*filter(is_temporary, tmp_path.rglob("*"))], err
            assert not [*tmp_path.rglob(".*.lock")], err
            assert not [*filter(is_temporary, photographs.rglob("*"))], err
        if code != 0 and not complete(job, out):
            finish(job.words(out))
        assert job.made(out) == right
    print(f"{name}: {seconds:.1f} s undisturbed, {sent} signals in {runs} runs, codes {codes}")
    assert not [*Path("/dev/shm").glob("torch_*")] or os.environ.get("PYTEST_XDIST_WORKER")


@pytest.mark.slow
def test_a_second_signal_does_not_wait(
    jobs: dict[str, Job],
    start: Callable[..., Process],
    finish: Callable[[list[Any]], float],
    tmp_path: Path,
    moments: random.Random,
) -> None:
    by = moments.choice(KINDS)
    process = start(jobs["precompute"].words(tmp_path))
    while process.poll() is None and len(members(process.pid)) < 2:
        time.sleep(0.01)
    for _ in range(3):
        os.killpg(process.pid, by)
        time.sleep(1.2 * SAME_REQUEST_S)
        if process.poll() is not None:
            break
    code, err = signalled(process, by)
    check_stopped(code, err, by)
    assert gone(process.pid)
    finish(jobs["precompute"].words(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inspect", "distill"])
def test_signals_while_python_imports(
    name: str, jobs: dict[str, Job], photographs: Path, tmp_path: Path, moments: random.Random
) -> None:
    """In a fresh process: a fork has imported everything."""
    words = ["inspect", "given.zarr"] if name == "inspect" else jobs[name].words(tmp_path)
    for _ in range(max(4, SIGNALS)):
        by = moments.choice(KINDS)
        process = subprocess.Popen(
            [sys.executable, "-m", "richkd", *map(str, words)],
            cwd=photographs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        ready(process)
        time.sleep(moments.uniform(0, 0.6 if name == "inspect" else 3))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, by)
        _, err = process.communicate(timeout=90)
        if process.returncode != 0:
            check_stopped(process.returncode, err, by)


@pytest.mark.slow
def test_a_process_that_ignores_hangups_continues(
    jobs: dict[str, Job], start: Callable[..., Process], tmp_path: Path
) -> None:
    """As nohup starts it."""
    process = start(
        jobs["precompute"].words(tmp_path),
        ignore=signal.SIGHUP,
    )
    while process.poll() is None and len(members(process.pid)) < 2:
        time.sleep(0.01)
    code, err = signalled(process, signal.SIGHUP)
    assert code == 0, err


# --- in this process -----------------------------------------------------------------------------


@contextmanager
def answered(*args: Any) -> Iterator[None]:
    """Signals raise Interrupted here, which must come."""
    with pytest.raises(Interrupted) as caught, interruptible():
        yield
    assert caught.value.exit_code in (129, 130, 143)


def wait() -> None:
    for _ in range(500):
        time.sleep(0.01)
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("by", KINDS)
def test_a_signal_raises_at_once(by: signal.Signals) -> None:
    before = [signal.getsignal(which) for which in (*KINDS, signal.SIGALRM)]
    with answered():
        signal.raise_signal(by)
        wait()
    assert [signal.getsignal(which) for which in (*KINDS, signal.SIGALRM)] == before


def test_it_waits_for_what_is_held_back_and_for_what_must_be_whole() -> None:
    seen = []
    with answered():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            seen.append("whole")
        seen.append("never")
    with pytest.raises(Interrupted, match="done so far"), interruptible(), deferred() as check:
        check("nothing came")
        signal.raise_signal(signal.SIGINT)
        with uninterrupted():
            seen.append("inner")
        seen.append("held")
        check("done so far")
    with answered(), deferred():
        signal.raise_signal(signal.SIGINT)
        seen.append("to the end")
    assert seen == ["whole", "inner", "held", "to the end"]


def test_a_second_one_ends_what_is_held_back() -> None:
    with answered(), deferred():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1.2 * SAME_REQUEST_S)
        signal.raise_signal(signal.SIGTERM)
        wait()


def test_two_at_once_are_one_request() -> None:
    """As `timeout` sends them, to the process and to its group."""
    seen = []
    with pytest.raises(Interrupted, match="here"), interruptible(), deferred() as check:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        seen.append("held")
        check("here")
    assert seen == ["held"]


def test_it_is_raised_again_where_python_cannot_raise() -> None:
    class Slow:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)

    with answered():
        Slow()
        wait()


def test_an_import_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose modules would be half made; C turns what is raised in one to ImportError."""
    (tmp_path / "made_whole.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.2)\ndone = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with answered():
        mark_work_started()
        import made_whole  # type: ignore[import-not-found]

        assert made_whole.done
        wait()


def test_what_fails_after_a_signal_failed_because_of_it() -> None:
    with answered(), uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        raise ImportError("made of it by a library")


def test_what_is_cut_off_as_it_was_made_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Half:
        def __init__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            wait()

        def __del__(self) -> None:
            raise AttributeError("no attribute that was to come")

    with interruptible(), suppress(Interrupted):
        Half()
    assert capfd.readouterr().err == ""

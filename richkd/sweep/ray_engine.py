"""The engine that trains runs on Ray, a task for each, on a cluster or on this machine.

The driver is the process that the user started: it submits the runs and shows their progress. A
worker trains one run in its run folder and streams its progress to the driver. If a worker is lost,
its run is submitted again and resumes from its checkpoint. Ray's own retries cannot do that: they
skip as many items of the repeated stream as the driver had received, so the shorter stream of a
resumed run would end without its result.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import IO, Any

import ray
import tomli_w
import torch
from ray.exceptions import RayError, RaySystemError, RayTaskError

from richkd.config.settings import Distill, Sweep, to_table
from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError, first_line
from richkd.core.files import check_unlocked, locked
from richkd.core.interrupts import RESUMES, Interrupted, deferred, preserved_handlers
from richkd.core.launcher import without_launcher
from richkd.core.progress import Report
from richkd.store.reader import TeacherCache, open_cache
from richkd.sweep.board import Board
from richkd.sweep.entries import FAILURES, Entry, describe_failure
from richkd.sweep.grid import scores_until
from richkd.training.run_folder import RunFolder
from richkd.training.source import Source, build_student
from richkd.training.student import StudentRun, record

ATTEMPTS = 4  # workers that a run may lose
CONNECT_S = 10.0
LOCK_S = 60.0  # for which the lock of a lost worker may remain
CHECK_EVERY_S = 0.5  # for a signal: inside Ray, signals wait
CANCEL_S = 10.0
STOPPED = "interrupted; the same command resumes each run from its last epoch"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker reports before the first epoch, and after each."""

    done: int
    scores: Mapping[int, float]
    epoch_s: float | None
    lines: Sequence[str]  # for the log


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a worker reports last; of a complete run, its files follow."""

    summary: dict[str, Any] | None = None  # if the run is complete
    reason: str = ""  # if the run failed


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of a cluster that one run has to itself."""

    cpus: int
    gpus: float
    device: str  # of the settings; the CPU without GPUs

    @property
    def processes(self) -> int:
        """How many processes train a run: one for each GPU of several."""
        return max(1, int(self.gpus))

    def __str__(self) -> str:
        return f"{_count(self.cpus, 'CPU')} and {_count(self.gpus, 'GPU')}"


# --- the driver ----------------------------------------------------------------------------------


@contextmanager
def open_ray(sweep: Sweep, entries: Sequence[Entry], cache: TeacherCache) -> Iterator[RayEngine]:
    """Connect to the cluster that the settings name, or start one on this machine.

    Raises:
        RichKDError: a student does not fit the images, Ray does not assign such a device, the
            cluster cannot be reached, or it has no room for a run.
    """
    for settings in {entry.settings.student: entry.settings for entry in entries}.values():
        build_student(settings, cache)
    device = entries[0].settings.device
    if device not in ("auto", "cpu", "cuda"):
        raise RichKDError(
            f"device = {device!r}: must be auto, cpu or cuda with --engine ray, which chooses GPUs",
            code="ray-device",
        )
    with connected(sweep.address) as where, deferred() as check:
        known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in known if node["Alive"]]
        share = choose_share(sweep, device, nodes)
        lanes = sum(room(node, share) for node in nodes)
        if lanes == 0:
            largest = "; ".join(sorted({_resources([node]) for node in nodes}))
            raise RichKDError(
                f"no node of {where} can hold a run of {share} (they have {largest}); lower "
                f"--cpus-per-run or --gpus-per-run",
                code="ray-no-room",
            )
        in_all = f"{_count(len(nodes), 'node')}, {_resources(nodes)}"
        yield RayEngine(share, lanes, f"{where}: {in_all}", check)


@contextmanager
def connected(address: str) -> Iterator[str]:
    """Connect to the cluster at an address, and yield its name for messages.

    Raises:
        RichKDError: the cluster cannot be reached.
    """
    if ray.is_initialized():  # by the caller of run_sweep, who also shuts it down
        yield "the Ray cluster of this process"
        return
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    check_address(address)
    try:
        with preserved_handlers():
            start(address)
        yield "this machine" if address == "local" else f"the Ray cluster at {address}"
    finally:
        with preserved_handlers(), quiet():
            ray.shutdown()


def start(address: str) -> None:
    """Join the cluster at an address, or start one for `local`; raise as `connected`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # our own cluster sends no statistics
    try:
        cpus = usable_cpus() if address == "local" else None
        ray.init(
            address,
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise _unreachable(address, first_line(error)) from None
    except SystemExit:  # Ray's answer to SIGTERM
        raise Interrupted(signal.SIGTERM, RESUMES) from None


def check_address(address: str) -> None:
    """Check an address, which takes Ray minutes if nobody listens there.

    Raises:
        RichKDError: it is the address of a Ray client, or nobody listens there.
    """
    if "://" in address:
        raise RichKDError(
            f"address = {address!r}: give HOST:PORT or auto, and start the sweep on a node of the "
            f"cluster",
            code="ray-address",
        )
    host, _, port = address.rpartition(":")
    if not host:
        return
    if host in ("localhost", "127.0.0.1"):
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # as Ray does
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(error)) from None


def _unreachable(address: str, reason: str) -> RichKDError:
    return RichKDError(
        f"no Ray cluster at {address} ({reason}); check --address, and start the sweep on a node "
        f"of the cluster",
        code="ray-unreachable",
    )


def choose_share(sweep: Sweep, device: str, nodes: Sequence[Mapping[str, float]]) -> Share:
    """Choose what a run gets, as asked or by what the cluster has.

    Raises:
        RichKDError: the device is a GPU, but a run gets none.
    """
    gpus = sweep.gpus_per_run
    if gpus is None:
        any_gpu = any(node.get("GPU") for node in nodes)
        gpus = 1.0 if device == "cuda" or (device == "auto" and any_gpu) else 0.0
    if device == "cuda" and gpus == 0:
        raise RichKDError(
            "device = 'cuda': a run gets no GPU; set --gpus-per-run above 0", code="ray-device"
        )
    return Share(cpus=sweep.cpus_per_run or 1, gpus=gpus, device=device if gpus else "cpu")


def room(node: Mapping[str, float], share: Share) -> int:
    """Return how many runs a node holds at once; a share of a GPU is a share of one GPU."""
    gpus = int(node.get("GPU", 0))
    if share.gpus == 0:
        by_gpu = inf
    elif share.gpus < 1:
        by_gpu = gpus * int(1 / share.gpus)
    else:
        by_gpu = gpus // share.gpus
    return int(min(node.get("CPU", 0) // share.cpus, by_gpu))


def _resources(nodes: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(
        _count(sum(node.get(kind, 0) for node in nodes), kind) for kind in ("CPU", "GPU")
    )


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


class RayEngine:
    """Trains runs as tasks of the cluster that this process is connected to."""

    def __init__(
        self, share: Share, lanes: int, cluster: str, check: Callable[[str], None]
    ) -> None:
        """Take a `check` that raises Interrupted after a signal; inside Ray, signals wait."""
        self.share = share
        self.lanes = lanes
        self.cluster = cluster
        self.check = check
        self.folder = str(Path.cwd())
        self.task = ray.remote(
            num_cpus=share.cpus, num_gpus=share.gpus, num_returns="streaming", max_retries=0
        )(train)
        self.losses = Counter[str]()  # of workers, by run folder
        self.logged: set[str] = set()

    def describe(self, entries: Sequence[Entry]) -> str:
        return f"{self.lanes} at once, each with {self.share}, on {self.cluster}"

    def train(self, entries: Sequence[Entry], last: int, board: Board) -> None:
        """Submit all runs; Ray starts as many as there is room for."""
        streams = {self.submit(entry, last): entry for entry in entries}
        with quiet(), cancelled_at_the_end(streams):
            while streams:
                ready, _ = ray.wait(list(streams), timeout=CHECK_EVERY_S, fetch_local=False)
                self.check(STOPPED)
                for stream in ready:
                    entry = streams[stream]
                    try:
                        if self.follow(stream, entry, board):
                            continue
                    except RayTaskError as error:
                        if isinstance(error, RaySystemError):  # its arguments could not be read
                            raise _foreign(error.cause) from None
                        raise  # a bug
                    except RayError as error:
                        self.lose(entry, error, board)
                        if entry.state != "failed":
                            streams[self.submit(entry, last)] = entry
                    del streams[stream]

    def submit(self, entry: Entry, last: int) -> Any:
        """Submit a run, and return the stream of what its worker will report."""
        again = self.losses[entry.settings.out] > 0
        return self.task.remote(entry.settings, last, self.folder, self.share, again)

    def follow(self, stream: Any, entry: Entry, board: Board) -> bool:
        """Handle the next report of a run's worker; return whether more will follow."""
        report: Progress | Ended = ray.get(next(stream))
        if isinstance(report, Progress):
            self.note(report, entry, board)
        elif report.reason:
            entry.fail(report.reason)
            board.log_line(entry)
        elif report.summary is None:
            entry.state = "waiting"
        else:
            folder = RunFolder(Path(entry.settings.out))
            if not folder.complete:  # the worker has another disk
                with locked(folder.path):
                    folder.receive(ray.get(next(stream)))
            entry.finish(report.summary)
            board.log_line(entry)
        return isinstance(report, Progress)

    def note(self, progress: Progress, entry: Entry, board: Board) -> None:
        """Note how far a run is, and log the lines that no worker has sent before."""
        if progress.epoch_s is None and self.losses[entry.settings.out]:
            again = f"resumes after epoch {progress.done}" if progress.done else "starts over"
            board.log(f"{entry.label} {again}")
        entry.state, entry.done, entry.scores = "training", progress.done, {**progress.scores}
        entry.epoch_s = progress.epoch_s or entry.epoch_s
        for line in progress.lines:
            if line not in self.logged:
                self.logged.add(line)
                board.log(line)
        board.tick(entry, 0)

    def lose(self, entry: Entry, error: RayError, board: Board) -> None:
        """Count a lost worker; after too many, the run has failed."""
        self.losses[entry.settings.out] += 1
        reason = first_line(error).partition(". ")[0]
        if self.losses[entry.settings.out] < ATTEMPTS:
            entry.state = "waiting"
            board.log(f"{entry.label}: its worker was lost ({reason}); another takes over")
        else:
            entry.fail(f"{ATTEMPTS} workers were lost, the last because: {reason}")
            board.log_line(entry)


def _foreign(cause: BaseException) -> RichKDError:
    return RichKDError(
        f"a worker cannot read a run ({first_line(cause)}); install the same versions of "
        f"richkd, Ray and Python on every node",
        code="ray-worker-differs",
    )


@contextmanager
def cancelled_at_the_end(streams: Mapping[Any, Entry]) -> Iterator[None]:
    """On exit, cancel the tasks that are left, and wait a moment for them to end."""
    try:
        yield
    finally:
        for stream in streams:
            ray.cancel(stream)
        if streams:
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=CANCEL_S)


def quiet() -> AbstractContextManager[Any]:
    """Silence what Ray prints about its workers on standard output, which is for results."""
    return redirect_stdout(io.StringIO())


# --- a worker ------------------------------------------------------------------------------------


def train(
    settings: Distill, last: int, folder: str, share: Share, again: bool
) -> Iterator[Progress | Ended | dict[str, bytes]]:
    """Train one run up to an epoch, resuming from its checkpoint if it has one.

    Args:
        settings: of the run.
        last: the epoch to train up to.
        folder: the driver's working directory, to which paths are relative.
        share: the part of the cluster that the run has to itself.
        again: whether a worker of this run was lost before.

    Yields:
        Progress, then Ended; of a complete run also its files, which are sent only if the driver
        asks for them.
    """
    run = RunFolder(Path(settings.out))
    try:
        work_in(folder)
        torch.set_num_threads(max(1, share.cpus // share.processes))
        if again:
            wait_until_free(run.path)
        if run.complete:  # and the driver does not know
            run.check_same(*record(settings, open_cache(settings.cache), run))
        elif share.processes > 1:
            yield from train_in_processes(settings, last, share)
        else:
            yield from train_run(shared_source(settings, share.device), settings, last)
        summary = run.summary()
    except (*FAILURES, OSError) as error:
        yield Ended(reason=describe_failure(error, settings, "raise --gpus-per-run"))
        return
    yield Ended(summary=summary)
    if summary:
        yield run.contents()


def train_run(source: Source, settings: Distill, last: int) -> Iterator[Progress]:
    """Train the epochs of a run, and finish it after its last; yield Progress around each."""
    with StudentRun(source, settings) as run:
        scores = scores_until(run.done, run.folder)
        yield Progress(done=run.done, scores=scores, epoch_s=None, lines=LINES.take())
        for rows, waited in source.epochs(run.rows.values(), run.done + 1, last):
            record = run.train_epoch(rows, waited)
            if record.score is not None:
                scores[record.epoch] = record.score
            yield Progress(done=run.done, scores=scores, epoch_s=run.epoch_s, lines=LINES.take())
        if run.done == settings.epochs:
            run.finish()


class Lines(Report):
    """Collects a worker's log until the driver receives it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


LINES = Lines()


def train_in_processes(settings: Distill, last: int, share: Share) -> Iterator[Progress]:
    """Train the epochs of a run by torchrun, with a process for each GPU; yield as `train_run`.

    Raises:
        RichKDError: what the processes say.
    """
    run = RunFolder(Path(settings.out))
    done = run.epochs_done()
    yield Progress(done=done, scores=scores_until(done, run), epoch_s=None, lines=[])
    with tempfile.TemporaryDirectory() as folder:
        recipe, log = Path(folder) / "run.toml", Path(folder) / "log.txt"
        table = to_table(replace(settings, device=share.device))
        recipe.write_text(tomli_w.dumps({"distill": table}), encoding="utf-8")
        began = time.perf_counter()
        with log.open("wb") as output, ended(shared_command(recipe, last, share), output) as going:
            while going():
                time.sleep(CHECK_EVERY_S)
                now = min(run.epochs_done(), last)
                if now > done:
                    epoch_s, began, done = time.perf_counter() - began, time.perf_counter(), now
                    scores = scores_until(done, run)
                    yield Progress(done=done, scores=scores, epoch_s=epoch_s, lines=[])
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    done = run.epochs_done()
    if not run.complete and (done < last or done == settings.epochs):  # it failed to finish
        own = [line for line in said if line.startswith("richkd: ")]
        reason = own[0].removeprefix("richkd: ") if own else "".join(said[-1:])
        raise RichKDError(
            f"{share.processes} processes could not train it: {reason}", code="ray-processes-failed"
        )


def shared_command(recipe: Path, last: int, share: Share) -> list[str]:
    """Return the command that trains a run up to an epoch in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    count = ["--nproc-per-node", str(share.processes)]
    words = ["-m", "richkd", "distill", "--recipe", str(recipe), "--stop-after", str(last)]
    return [sys.executable, *launcher, *count, *words]


@contextmanager
def ended(command: Sequence[str], output: IO[bytes]) -> Iterator[Callable[[], bool]]:
    """Start a command, yield a function that tells whether it runs, and end it with the block."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**without_launcher(os.environ), **threads},
    )
    try:
        yield lambda: process.poll() is None
    finally:
        process.terminate()  # torchrun passes it on, and the run can be resumed
        try:
            process.wait(LOCK_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def shared_source(settings: Distill, device: str) -> Source:
    """Return the cache, images and slabs of a run, which this worker keeps for its next run."""
    names = ("cache", "dataset", "data_root", "decode", "crops_per_decode")
    return _source(device, **{name: getattr(settings, name) for name in names})


@lru_cache(maxsize=1)
def _source(device: str, **settings: Any) -> Source:
    return Source(Distill(device=device, **settings), LINES)


def work_in(folder: str) -> None:
    """Change to the driver's working directory, so that relative paths are the same.

    Raises:
        RichKDError: this node has no such folder and cannot create it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError as error:
        raise RichKDError(
            f"{socket.gethostname()} cannot use the folder {folder} ({error.strerror}); start "
            f"the sweep in a folder that every node has",
            code="ray-folder",
        ) from None


def wait_until_free(path: Path) -> None:
    """Wait for a lost worker to release its lock; raise as `check_unlocked`."""
    patience = time.monotonic() + LOCK_S
    while True:
        try:
            return check_unlocked(path)
        except RichKDError:
            if time.monotonic() > patience:
                raise
        time.sleep(0.2)

"""Data-loader workers: their number, how batches and errors return from them, and how they end.

PyTorch's DataLoader leaves all this to its user: a signal to all processes of a job would reach the
workers, an error would return as a traceback, shared memory may be too small for the batches, and a
worker may be killed when memory runs out.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data._utils import signal_handling as _signal_handling

from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.interrupts import STOPPING, mark_work_started, signals_blocked, uninterrupted
from richkd.core.launcher import processes_here
from richkd.core.progress import Report, size

MAX_WORKERS = 8
PREFETCH = 2  # batches that each worker prepares ahead
JOIN_SECONDS = 5.0  # to wait for a killed worker
SHARED_MEMORY = Path("/dev/shm")
# A forked worker starts in milliseconds; a spawned one would import PyTorch again in every epoch.
# Where forks are not safe, e.g. on macOS, the default of the system is used.
START_METHOD = "fork" if sys.platform == "linux" else None

Sample = tuple[int | Tensor, ...]
Samples = TorchDataset[Sample]
signal_handling: Any = _signal_handling
_open: set[Any] = set()  # iterators with workers


def num_workers(count: int, batch_size: int) -> int:
    """Return the number of workers for `count` images; 0 if starting them would take longer.

    It is this process's share of the usable CPUs, up to `MAX_WORKERS`, unless RICHKD_WORKERS is
    set.

    Raises:
        RichKDError: RICHKD_WORKERS is not an integer of at least 0.
    """
    given = os.environ.get("RICHKD_WORKERS", "")
    if given and not given.isdecimal():
        raise RichKDError(
            f"RICHKD_WORKERS = {given!r}: must be an integer of at least 0",
            code="value-malformed",
        )
    if count <= 4 * batch_size:
        return 0
    return int(given) if given else min(max(1, usable_cpus() // processes_here()), MAX_WORKERS)


def load(
    samples: Samples,
    batches: Iterable[list[Any]],
    workers: int,
    batch_bytes: int,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the stacked parts of each batch of samples, computed by workers.

    Args:
        samples: tuples of integers and tensors by index.
        batches: the indices of each batch.
        workers: number of worker processes; 0 computes in this process.
        batch_bytes: maximum size of the tensors of a batch.
        pin_memory: whether batches go to a GPU.

    Raises:
        RichKDError: from `samples`, or because a worker was killed.
        OSError: from `samples`.
    """
    in_flight = (PREFETCH * workers + 2) * batch_bytes
    shared = workers > 0 and fits_shared_memory(in_flight)
    iterator = _start(_Reported(samples), batches, workers, _Collate(shared), pin_memory)
    try:
        while (parts := _next(iterator)) is not None:
            if isinstance(parts, Exception):
                raise parts
            yield tuple(
                torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts
            )
    finally:
        _end(iterator)


def fits_shared_memory(wanted: int) -> bool:
    """Return whether `wanted` bytes of batches may use shared memory; if not, log it once.

    Half of the free space is left to other programs; the processes of a job share the other half.
    """
    free, wanted = free_shared_memory(), wanted * processes_here()
    if free is None or wanted <= free // 2:
        return True
    _log_once(
        f"{SHARED_MEMORY} has only {size(free)} free, but data-loader workers may need "
        f"{size(wanted)} there: they send images through pipes instead, which is slower; to "
        f"avoid that, enlarge it (docker run --shm-size=1g)"
    )
    return False


def free_shared_memory() -> int | None:
    """Return the free shared memory in bytes; None if the system has none, e.g. macOS."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


class _Reported(TorchDataset[Any]):
    """Samples by batch, or the error of one: PyTorch would pass on no more than its traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, index: Any) -> Sample:
        return self.samples[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[Sample] | Exception:
        try:
            return [self.samples[index] for index in indices]
        except (RichKDError, OSError, MemoryError) as error:
            return error


class _Collate:
    """Stacks samples to the parts of a batch, in shared memory as long as there is space."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared

    def __call__(self, samples: list[Sample] | Exception) -> Any:
        if isinstance(samples, Exception):
            return samples
        parts = [_together(part) for part in zip(*samples, strict=True)]
        if torch.utils.data.get_worker_info() is None:
            return parts
        if self.shared:
            with suppress(RuntimeError):  # none left: other processes use it too
                return [part.share_memory_() for part in parts]  # type: ignore[no-untyped-call]
        return [part.numpy() for part in parts]


def _together(part: tuple[Any, ...]) -> Tensor:
    """Return one part of all samples: numbers [B], or tensors, stacked, or end to end if 1-D."""
    if isinstance(part[0], int):
        return torch.tensor(part)
    return torch.cat(part) if part[0].dim() == 1 else torch.stack(part)


def _start(
    samples: _Reported, batches: Iterable[list[Any]], workers: int, collate: _Collate, pin: bool
) -> Any:
    """Return an iterator over the batches; without workers if they cannot be started."""

    def make(workers: int) -> Any:
        with warnings.catch_warnings():  # of PyTorch about more workers than CPUs
            warnings.simplefilter("ignore", UserWarning)
            return iter(
                DataLoader(
                    samples,
                    batch_sampler=batches,
                    num_workers=workers,
                    collate_fn=collate,
                    pin_memory=pin,
                    worker_init_fn=_init_worker if workers else None,
                    prefetch_factor=PREFETCH if workers else None,
                    multiprocessing_context=multiprocessing.get_context(START_METHOD)
                    if workers
                    else None,
                )
            )

    if workers == 0:
        return make(0)
    try:
        if START_METHOD != "fork":
            resource_tracker.ensure_running()  # its start unblocks signals
        with signals_blocked(), _handler_restored(signal.SIGCHLD):
            mark_work_started()
            _prepare()
            iterator = make(workers)
            _open.add(iterator)
            return iterator
    except OSError as error:  # e.g. no space for semaphores, too many processes
        _log_once(f"no data-loader workers ({error}): images are decoded in the main process")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None  # frees the incomplete iterator, whose __del__ fails
        sys.unraisablehook = hook
        return make(0)


def _init_worker(_: int) -> None:
    """Ignore signals and print nothing: the parent process ends workers and reports errors."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # PyTorch's handler prints a line
    # called by the thread that passes on shared memory, whose receiver may be interrupted
    sys.excepthook = lambda *_: None


def _next(iterator: Any) -> Any:
    """Return the next batch, or None after the last one; raise an error if a worker was killed.

    PyTorch would raise it wherever the main thread happens to be.
    """
    if not hasattr(iterator, "_workers"):
        return next(iterator, None)
    try:
        with _handler_restored(signal.SIGCHLD):
            if _in_main_thread():
                signal.signal(signal.SIGCHLD, partial(_fail_once, signal.getsignal(signal.SIGCHLD)))
            signal_handling._error_if_any_worker_fails()
            return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:
        for worker in iterator._workers:
            worker.join(timeout=0.1)  # its exit code is known a moment after its end
        codes = [worker.exitcode for worker in iterator._workers if worker.exitcode]
        if not codes:
            raise
        raise RichKDError(_describe(codes[0]), code="worker-died") from error


def _fail_once(before: Any, *_: object) -> None:
    """Handle SIGCHLD: raise an error if a worker failed, and leave further signals to `before`.

    A second one would otherwise raise while the handler is being restored.
    """
    try:
        signal_handling._error_if_any_worker_fails()
    except RuntimeError:
        signal.signal(signal.SIGCHLD, before)
        raise


def _describe(code: int) -> str:
    """Describe how a worker ended, by its exit code, and the remedy."""
    if code > 0:
        return (
            f"a data-loader worker ended with exit code {code}; run the same command again, and "
            f"without workers (RICHKD_WORKERS=0) if that happens again"
        )
    number = -code
    name = next((known.name for known in signal.Signals if known == number), "unknown")
    event = f"a data-loader worker was killed (signal {number}, {name})"
    if number == signal.SIGBUS:
        free = free_shared_memory()
        space = "" if free is None else f", with {size(free)} free now"
        return (
            f"{event}: shared memory probably ran out ({SHARED_MEMORY}{space}); enlarge it (docker "
            f"run --shm-size=1g) or set RICHKD_WORKERS=0, and run the same command again"
        )
    reason = "memory probably ran out" if number == signal.SIGKILL else "it crashed"
    return (
        f"{event}: {reason}; run the same command again, and with fewer workers (RICHKD_WORKERS=1, "
        f"or 0 for none) or a smaller --batch-size if that happens again"
    )


def _end(iterator: Any) -> None:
    """Kill the workers at once, as nobody needs their results.

    PyTorch would wait for their current batches, and forever for a lock that a killed one holds.
    """
    if iterator not in _open:
        return
    with uninterrupted():
        _open.discard(iterator)
        if iterator._shutdown:  # after the last batch
            return
        iterator._shutdown = True
        if hasattr(iterator, "_pin_memory_thread"):  # fetches batches from the workers
            iterator._pin_memory_thread_done_event.set()
            iterator._worker_result_queue.put((None, None))
            iterator._pin_memory_thread.join(JOIN_SECONDS)
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
        for worker in iterator._workers:
            worker.join(JOIN_SECONDS)
            for left in SHARED_MEMORY.glob(f"torch_{worker.pid}_*"):  # interrupted as it was made
                left.unlink(missing_ok=True)
        for queue in (*iterator._index_queues, iterator._worker_result_queue):
            queue.cancel_join_thread()
            queue.close()


def end_all() -> None:
    """End the workers of every unfinished loader."""
    for iterator in list(_open):
        _end(iterator)


@cache
def _prepare() -> None:
    """Make sure that workers end at exit, before multiprocessing waits for them."""
    atexit.register(end_all)
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        # PyTorch's thread cannot fetch the batches of a killed worker; `_next` reports that
        if failure.thread is None or "_pin_memory_loop" not in failure.thread.name:
            before(failure)

    threading.excepthook = hook


@contextmanager
def _handler_restored(which: signal.Signals) -> Iterator[None]:
    """Restore a signal's handler afterwards, so that PyTorch sets its own for the next loader."""
    if not _in_main_thread():
        yield
        return
    earlier, known = signal.getsignal(which), signal_handling._SIGCHLD_handler_set
    try:
        yield
    finally:
        signal.signal(which, earlier)
        signal_handling._SIGCHLD_handler_set = known


@cache
def _log_once(message: str) -> None:
    Report().log(message)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

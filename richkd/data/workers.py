"""Data-loader workers: how many, how batches and errors come back from them, and how they end.

Each part is there because PyTorch's DataLoader leaves it to its user: a signal to all processes of
a job would reach the workers, an error would come back as its traceback, shared memory may be too
small for the batches, and a worker may be killed when the machine is short of memory.
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
from functools import cache
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
from richkd.core.progress import Report, size

MOST_WORKERS = 8
PREFETCHED = 2  # batches that a worker makes ahead
ENDING_S = 5.0  # for what is killed to be gone
SHARED_MEMORY = Path("/dev/shm")
# Threads and all, a worker starts in milliseconds as a fork; anew, it would import PyTorch again,
# in every epoch. Where forks are not safe, as on macOS, the system's own way stays.
START_METHOD = "fork" if sys.platform == "linux" else None

Sample = tuple[int | Tensor, ...]
Samples = TorchDataset[Sample]
signal_handling: Any = _signal_handling
_open: set[Any] = set()  # iterators with workers


def num_workers(count: int, batch_size: int) -> int:
    """Data-loader processes for so many images; none where starting them would take longer.

    As many as there are CPUs to use, up to `MOST_WORKERS`, or as RICHKD_WORKERS says.

    Raises:
        RichKDError: RICHKD_WORKERS is not a number from 0.
    """
    given = os.environ.get("RICHKD_WORKERS", "")
    if given and not given.isdecimal():
        raise RichKDError(
            f"RICHKD_WORKERS = {given!r}: must be a number of workers, from 0",
            code="value-malformed",
        )
    if count <= 4 * batch_size:
        return 0
    return int(given) if given else min(usable_cpus(), MOST_WORKERS)


def load(
    samples: Samples,
    batches: Iterable[list[Any]],
    workers: int,
    batch_bytes: int,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of each batch of samples, stacked, computed by the workers.

    Args:
        samples: numbers and tensors by index.
        batches: the indices of each batch.
        workers: processes; 0 for this one.
        batch_bytes: what the tensors of a batch take, at most.
        pin_memory: whether batches go to a GPU.

    Raises:
        RichKDError: as `samples`, or a worker was killed.
        OSError: as `samples`.
    """
    under_way = (PREFETCHED * workers + 2) * batch_bytes
    shared = workers > 0 and fits_shared_memory(under_way)
    iterator = _start(_Told(samples), batches, workers, _Stacked(shared), pin_memory)
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
    """Whether batches of so many bytes may lie in shared memory; says so, once, where they do not.

    Others need room there, too, so that half of what is free is not touched.
    """
    free = free_shared_memory()
    if free is None or wanted <= free // 2:
        return True
    _say_once(
        f"{SHARED_MEMORY} has {size(free)} free, and data-loader workers would put up to "
        f"{size(wanted)} of images there: they send them through pipes, which is slower (docker "
        f"run --shm-size=1g makes it larger)"
    )
    return False


def free_shared_memory() -> int | None:
    """Bytes; None where there is no such file system, as on macOS."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


class _Told(TorchDataset[Any]):
    """Samples by batch, or the error that came of one: PyTorch would tell of its traceback only."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, index: Any) -> Sample:
        return self.samples[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[Sample] | Exception:
        try:
            return [self.samples[index] for index in indices]
        except (RichKDError, OSError, MemoryError) as error:
            return error


class _Stacked:
    """Samples to the parts of a batch, in shared memory while there is room for them."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared

    def __call__(self, samples: list[Sample] | Exception) -> Any:
        if isinstance(samples, Exception):
            return samples
        parts = [
            torch.tensor(part) if isinstance(part[0], int) else torch.stack(part)
            for part in zip(*samples, strict=True)
        ]
        if torch.utils.data.get_worker_info() is None:
            return parts
        if self.shared:
            with suppress(RuntimeError):  # none left: others take of it, too
                return [part.share_memory_() for part in parts]  # type: ignore[no-untyped-call]
        return [part.numpy() for part in parts]


def _start(
    samples: _Told, batches: Iterable[list[Any]], workers: int, stack: _Stacked, pin: bool
) -> Any:
    """An iterator over the batches; of this process's own making where there can be no workers."""

    def make(workers: int) -> Any:
        with warnings.catch_warnings():  # PyTorch's on RICHKD_WORKERS beyond the CPUs
            warnings.simplefilter("ignore", UserWarning)
            return iter(
                DataLoader(
                    samples,
                    batch_sampler=batches,
                    num_workers=workers,
                    collate_fn=stack,
                    pin_memory=pin,
                    worker_init_fn=_leave_alone if workers else None,
                    prefetch_factor=PREFETCHED if workers else None,
                    multiprocessing_context=multiprocessing.get_context(START_METHOD)
                    if workers
                    else None,
                )
            )

    if workers == 0:
        return make(0)
    try:
        if START_METHOD != "fork":
            resource_tracker.ensure_running()  # which unblocks signals as it starts
        with signals_blocked(), _kept(signal.SIGCHLD):
            mark_work_started()
            _prepare()
            iterator = make(workers)
            _open.add(iterator)
            return iterator
    except OSError as error:  # no room for semaphores, too many processes, …
        _say_once(f"no data-loader workers ({error}): this process decodes the images itself")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None  # with which an iterator goes that was not made to its end
        sys.unraisablehook = hook
        return make(0)


def _leave_alone(_: int) -> None:
    """What a worker does first: its parent ends it, and is the one to say what went wrong."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # PyTorch's prints a line of its own
    # called by the thread that hands out shared memory, whose taker may be interrupted
    sys.excepthook = lambda *_: None


def _next(iterator: Any) -> Any:
    """The next batch, None after the last; a worker that was killed is an error here only.

    PyTorch would raise it wherever the main thread is.
    """
    if not hasattr(iterator, "_workers"):
        return next(iterator, None)
    try:
        with _kept(signal.SIGCHLD):
            if _in_main_thread():
                signal.signal(
                    signal.SIGCHLD, lambda *_: signal_handling._error_if_any_worker_fails()
                )
            signal_handling._error_if_any_worker_fails()
            return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:
        for worker in iterator._workers:
            worker.join(timeout=0.1)  # its exit code comes a moment after its end
        codes = [worker.exitcode for worker in iterator._workers if worker.exitcode]
        if not codes:
            raise
        raise RichKDError(_describe(codes[0]), code="worker-died") from error


def _describe(code: int) -> str:
    """What became of a worker, by its exit code, and the remedy."""
    if code > 0:
        return (
            f"a data-loader worker ended with exit code {code}; run the same command again, "
            f"without workers (RICHKD_WORKERS=0) where that happens again"
        )
    number = -code
    name = next((known.name for known in signal.Signals if known == number), "unknown")
    said = f"a data-loader worker was killed (signal {number}, {name})"
    if number == signal.SIGBUS:
        free = free_shared_memory()
        room = "" if free is None else f", with {size(free)} free now"
        return (
            f"{said}: shared memory probably ran out ({SHARED_MEMORY}{room}); enlarge it (docker "
            f"run --shm-size=1g) or set RICHKD_WORKERS=0, and run the same command again"
        )
    reason = "memory probably ran out" if number == signal.SIGKILL else "it crashed"
    return (
        f"{said}: {reason}; run the same command again, with fewer workers (RICHKD_WORKERS=1, or "
        f"0 for none) or a smaller --batch-size where that happens again"
    )


def _end(iterator: Any) -> None:
    """End the workers there and then: nothing of theirs is needed, and nobody waits for it.

    PyTorch would wait for the batches in hand, and for ever for a lock that a killed one has.
    """
    if iterator not in _open:
        return
    with uninterrupted():
        _open.discard(iterator)
        if iterator._shutdown:  # after the last batch
            return
        iterator._shutdown = True
        if hasattr(iterator, "_pin_memory_thread"):  # which fetches batches from the workers
            iterator._pin_memory_thread_done_event.set()
            iterator._worker_result_queue.put((None, None))
            iterator._pin_memory_thread.join(ENDING_S)
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
        for worker in iterator._workers:
            worker.join(ENDING_S)
            for left in SHARED_MEMORY.glob(f"torch_{worker.pid}_*"):  # cut off as it was made
                left.unlink(missing_ok=True)
        for queue in (*iterator._index_queues, iterator._worker_result_queue):
            queue.cancel_join_thread()
            queue.close()


def end_all() -> None:
    """End the workers of every loader that was left in the middle."""
    for iterator in list(_open):
        _end(iterator)


@cache
def _prepare() -> None:
    """What the first workers need: an end at exit, before multiprocessing waits for theirs."""
    atexit.register(end_all)
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        # PyTorch's thread cannot fetch the batches of a worker that was killed; `_next` says so
        if failure.thread is None or "_pin_memory_loop" not in failure.thread.name:
            before(failure)

    threading.excepthook = hook


@contextmanager
def _kept(which: signal.Signals) -> Iterator[None]:
    """A signal's handler is afterwards what it was; PyTorch's is set again for the next loader."""
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
def _say_once(message: str) -> None:
    Report().log(message)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

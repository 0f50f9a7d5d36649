"""Handle SIGINT, SIGTERM and SIGHUP so that no finished work is lost.

A signal raises `Interrupted` in the main thread, with three exceptions. While signals are deferred,
it waits for the current piece of work. During an import, it waits for the import to end, because a
caller that catches ImportError would be left with half-initialised modules; before any work has
started, it ends the process instead. Where Python cannot raise (`__del__`), it is raised again
later. A second signal does not wait. A signal that arrives while `Interrupted` is propagating ends
the process immediately.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
RESUMES = "interrupted; the same command resumes it"
# `timeout` and others signal the process and then its group, which counts as one request
SAME_REQUEST_S = 0.5
TRY_AGAIN_S = 0.05


class Interrupted(BaseException):
    """A signal asked the program to stop; the message tells how to resume."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass
class _State:
    """The signals received by the main thread, and how far they have been handled."""

    message: str = RESUMES
    handled: bool = False  # this module's handlers are installed
    started: bool = False  # there is something to clean up
    imports: int = 0  # imports on the stack when the handlers were installed
    caught: int = 0  # the first signal received
    when: float = 0.0  # time at which it was received
    deferring: int = 0  # blocks that defer signals
    insisted: bool = False  # a second signal arrived: defer no longer
    raised: bool = False


_state = _State()


@contextmanager
def interruptible(message: str = RESUMES) -> Iterator[None]:
    """Raise Interrupted with this message on a signal, or on an exception that follows one."""
    with _handled(message):
        try:
            yield
        except Exception:  # some libraries turn Interrupted into errors of their own
            if not _state.caught:
                raise
            raise Interrupted(_state.caught, _state.message) from None


@contextmanager
def deferred() -> Iterator[Callable[[str], None]]:
    """Defer signals until the yielded function is called; a second signal is not deferred."""

    def check(message: str) -> None:
        if _state.caught and not _state.raised and _in_main_thread():
            _raise(message)

    with _handled(_state.message), uninterrupted():
        yield check


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer signals until the end of the block."""
    if not _in_main_thread():
        yield
        return
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1
        if _state.caught and not _state.deferring and not _state.raised:
            signal.raise_signal(signal.SIGALRM)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals in the processes started in the block, which their parent ends itself.

    A terminal or a batch system signals all processes of a job.
    """
    with uninterrupted():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def mark_work_started() -> None:
    """Note that there is something to clean up: temporary files, locks, processes.

    Before that, a signal during an import, which may take long, ends the process at once.
    """
    _state.started = True


@contextmanager
def preserved_handlers() -> Iterator[None]:
    """Restore the signal handlers after the block, whatever a library installs in it."""
    if not _in_main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in STOPPING}
    try:
        yield
    finally:
        for which, earlier in before.items():
            signal.signal(which, earlier)


def exit_process(code: int) -> NoReturn:
    """Exit with a code; a signal received meanwhile ends the process at once with the same code."""
    logging.disable()  # asyncio and Python would report what was interrupted
    sys.unraisablehook = lambda _: None
    for which in STOPPING:
        signal.signal(which, lambda *_: os._exit(code))
    sys.exit(code)


def ignore_signals_at_exit() -> None:
    """Let no signal change the exit code while Python shuts down; must be called early."""

    def ignore() -> None:
        for which in STOPPING:
            signal.signal(which, signal.SIG_IGN)

    atexit.register(ignore)  # first registered, so called last


@contextmanager
def _handled(message: str) -> Iterator[None]:
    """Install the handlers for the block; does nothing outside the main thread."""
    if not _in_main_thread() or _state.handled:
        yield
        return
    before, hook = vars(_state).copy(), sys.unraisablehook
    own = _State(message, handled=True, started=_state.started, imports=_imports(sys._getframe()))
    vars(_state).update(vars(own))
    alarm = signal.getsignal(signal.SIGALRM)
    with preserved_handlers():
        for which in STOPPING:
            # nohup ignores SIGHUP, for the process to outlive its terminal
            if which is signal.SIGINT or signal.getsignal(which) is not signal.SIG_IGN:
                signal.signal(which, _handle)
        signal.signal(signal.SIGALRM, _handle)
        sys.unraisablehook = _raise_again(hook)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            sys.unraisablehook = hook
            vars(_state).update(before)


def _handle(signum: int, frame: FrameType | None) -> None:
    """Handle a signal, or the alarm that retries one."""
    if signum != signal.SIGALRM:
        now = time.monotonic()
        if not _state.caught:
            _state.caught, _state.when = signum, now
        elif now - _state.when < SAME_REQUEST_S:
            return
        elif _state.raised or _state.insisted or _importing(frame):
            _end()
        else:
            _state.insisted, _state.when = True, now
    if _state.raised or not _state.caught or (_state.deferring and not _state.insisted):
        return
    if not _importing(frame):
        _raise(_state.message)
    if not _state.started:
        _end()
    signal.setitimer(signal.ITIMER_REAL, TRY_AGAIN_S)


def _raise(message: str) -> NoReturn:
    _state.raised = True
    raise Interrupted(_state.caught, message)


def _raise_again(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an unraisablehook that raises Interrupted again later."""

    def unraisable(failure: Any) -> None:
        if isinstance(failure.exc_value, Interrupted):
            _state.raised = False
            signal.setitimer(signal.ITIMER_REAL, TRY_AGAIN_S)
        elif not _state.raised:  # else it concerns an object that was interrupted in __init__
            hook(failure)

    return unraisable


def _importing(frame: FrameType | None) -> bool:
    return _imports(frame) > _state.imports


def _imports(frame: FrameType | None) -> int:
    """Return how many imports are on a frame's stack."""
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return depth


def _end() -> NoReturn:
    """Kill this process and its children, whatever they are doing."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    with suppress(Exception):
        for child in multiprocessing.active_children() if multiprocessing else ():
            child.kill()
    with suppress(OSError):
        os.write(2, f"richkd: {_state.message}\n".encode("ascii", "replace"))
    os._exit(128 + _state.caught)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

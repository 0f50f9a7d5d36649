"""Being told to stop (Ctrl-C, a batch system, a terminal that is closed), so that nothing is lost.

A signal raises `Interrupted` wherever the program is, but for three places: while signals are held
back, which is until the work in hand is done; inside an import, whose modules would stay half made
for whoever catches ImportError; and where Python cannot raise (`__del__`), after which it is raised
again. Before any work has begun, one in an import ends the process. A second signal does not wait;
one that comes while the first is being answered ends the process there and then.
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
RESUMES = "interrupted; the same command goes on"
# `timeout` and others signal the process and then its group, which is one request
SAME_REQUEST_S = 0.5
TRY_AGAIN_S = 0.05


class Interrupted(BaseException):
    """Somebody asked the program to stop; the message says how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass
class _State:
    """What has been asked of the main thread, and how far the answer is."""

    message: str = RESUMES
    handled: bool = False  # by this module
    begun: bool = False  # there is something to take down
    imports: int = 0  # that whoever is stopped is inside of, and that are not awaited
    caught: int = 0  # the signal that is being answered
    when: float = 0.0  # it came
    holding: int = 0  # blocks that hold signals back
    insisted: bool = False  # a second one came: hold nothing back
    raised: bool = False


_state = _State()


@contextmanager
def interruptible(message: str = RESUMES) -> Iterator[None]:
    """A signal raises Interrupted, with the message; what fails afterwards failed because of it."""
    with _handled(message):
        try:
            yield
        except Exception:  # as some libraries make of what is raised inside them
            if not _state.caught:
                raise
            raise Interrupted(_state.caught, _state.message) from None


@contextmanager
def deferred() -> Iterator[Callable[[str], None]]:
    """Signals wait for a call of what this gives, with the message; a second one does not wait."""

    def check(message: str) -> None:
        if _state.caught and not _state.raised and _in_main_thread():
            _raise(message)

    with _handled(_state.message), uninterrupted():
        yield check


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal waits for the end of the block, wherever signals are handled."""
    if not _in_main_thread():
        yield
        return
    _state.holding += 1
    try:
        yield
    finally:
        _state.holding -= 1
        if _state.caught and not _state.holding and not _state.raised:
            signal.raise_signal(signal.SIGALRM)


@contextmanager
def children_left_alone() -> Iterator[None]:
    """Processes made in the block are never reached by these signals: whoever made them ends them.

    A terminal or a batch system signals all processes of a job.
    """
    with uninterrupted():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work_begins() -> None:
    """Say that there is something to take down: files that are temporary, locks, processes.

    Until then a signal need not wait for an import to end, which may take long: it ends the
    process.
    """
    _state.begun = True


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What handles signals now does so afterwards, whatever a library sets meanwhile."""
    if not _in_main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in STOPPING}
    try:
        yield
    finally:
        for which, earlier in before.items():
            signal.signal(which, earlier)


def leave(code: int) -> NoReturn:
    """End the process, whose work is over: a signal hurries it, and changes nothing else."""
    logging.disable()  # asyncio would tell of what was cut off, as would Python
    sys.unraisablehook = lambda _: None
    for which in STOPPING:
        signal.signal(which, lambda *_: os._exit(code))
    sys.exit(code)


def ignore_signals_at_exit() -> None:
    """Let no signal change the exit code while Python takes itself down; to be called early."""

    def ignore() -> None:
        for which in STOPPING:
            signal.signal(which, signal.SIG_IGN)

    atexit.register(ignore)  # the first to be registered is the last to be called


@contextmanager
def _handled(message: str) -> Iterator[None]:
    """Signals are answered here. In a thread other than the main one, where none arrive, no-op."""
    if not _in_main_thread() or _state.handled:
        yield
        return
    before, hook = vars(_state).copy(), sys.unraisablehook
    own = _State(message, handled=True, begun=_state.begun, imports=_imports(sys._getframe()))
    vars(_state).update(vars(own))
    alarm = signal.getsignal(signal.SIGALRM)
    with handlers_kept():
        for which in STOPPING:
            # nohup ignores SIGHUP, for the process to outlive its terminal
            if which is signal.SIGINT or signal.getsignal(which) is not signal.SIG_IGN:
                signal.signal(which, _answer)
        signal.signal(signal.SIGALRM, _answer)
        sys.unraisablehook = _raise_again(hook)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            sys.unraisablehook = hook
            vars(_state).update(before)


def _answer(signum: int, frame: FrameType | None) -> None:
    """The handler: of the signals, and of the alarm that reminds of one."""
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
    if _state.raised or not _state.caught or (_state.holding and not _state.insisted):
        return
    if not _importing(frame):
        _raise(_state.message)
    if not _state.begun:
        _end()
    signal.setitimer(signal.ITIMER_REAL, TRY_AGAIN_S)


def _raise(message: str) -> NoReturn:
    _state.raised = True
    raise Interrupted(_state.caught, message)


def _raise_again(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for what Python could not raise."""

    def unraisable(failure: Any) -> None:
        if isinstance(failure.exc_value, Interrupted):
            _state.raised = False
            signal.setitimer(signal.ITIMER_REAL, TRY_AGAIN_S)
        elif not _state.raised:  # else it is of something that was cut off as it was made
            hook(failure)

    return unraisable


def _importing(frame: FrameType | None) -> bool:
    return _imports(frame) > _state.imports


def _imports(frame: FrameType | None) -> int:
    """How deep in imports a frame is."""
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return depth


def _end() -> NoReturn:
    """End this process and those that it made, whatever they are doing."""
    made = sys.modules.get("multiprocessing.process")
    with suppress(Exception):
        for child in made.active_children() if made else ():
            child.kill()
    with suppress(OSError):
        os.write(2, f"richkd: {_state.message}\n".encode("ascii", "replace"))
    os._exit(128 + _state.caught)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

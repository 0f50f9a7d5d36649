"""Being told to stop, by SIGINT (Ctrl-C) or SIGTERM (batch systems), so that nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AT_ONCE = "interrupted; the same command goes on, distill with --resume"


class Interrupted(BaseException):
    """Somebody asked the program to stop; the message says how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """A signal raises Interrupted wherever the program is."""

    def stop(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum, AT_ONCE)

    with _handled_by(stop):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[str], None]]:
    """Signals wait for a call of what this gives, with the message; a second one does not wait."""
    caught: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        if caught:
            raise Interrupted(signum, AT_ONCE)
        caught.append(signum)

    def check(message: str) -> None:
        if caught:
            raise Interrupted(caught[0], message)

    with _handled_by(note):
        yield check


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What handles signals now does so afterwards, whatever a library sets meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, earlier in before.items():
            signal.signal(which, earlier)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In a thread other than the main one, where signals never arrive, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handlers_kept():
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, handler)
        yield

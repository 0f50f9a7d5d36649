"""The error that users see: one line that names the value, the place and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED",
    re.IGNORECASE,
)


class RichKDError(Exception):
    """An error that the user can fix. The command line prints it on one line and exits with 2.

    Attributes:
        code: a stable identifier in kebab case; unlike the message, it never changes.
    """

    def __init__(self, message: str, *, code: str) -> None:
        message = " ".join(message.split())
        super().__init__(message)
        self.message = message
        self.code = code

    def __reduce__(self) -> Any:  # Ray sends errors between processes
        return partial(type(self), code=self.code), (self.message,)


def nearest(name: str, choices: Iterable[str], limit: int = 8, fallback: Iterable[str] = ()) -> str:
    """Return the choices nearest to a mistyped name, or all if there are few, for a message.

    If none is near, list some of the choices: those in `fallback`, if given.
    """
    known = sorted(choices)
    if len(known) <= limit:
        return "choose from " + ", ".join(known)
    lower = {choice.lower(): choice for choice in known}
    close = [lower[c] for c in difflib.get_close_matches(name.lower(), lower, limit, cutoff=0.5)]
    if close:
        return "nearest: " + ", ".join(close)
    named = list(fallback) or known[:limit]
    return f"{len(known)} are known, among them " + ", ".join(named)


def unknown(kind: str, name: str, choices: Iterable[str]) -> RichKDError:
    """Return the error for an unknown name; it lists the nearest known names."""
    return RichKDError(f"unknown {kind} {name!r}; {nearest(name, choices)}", code="unknown-name")


def machine_fault(error: Exception) -> str | None:
    """Return one line with what the machine lacks and the remedy; None for any other error.

    PyTorch reports a lack of memory as RuntimeErrors with many different texts.
    """
    reason = " ".join(str(error).split())
    if "received 0 items of ancdata" in reason or "Too many open files" in reason:
        return "too many open files; allow more (ulimit -n 4096), or set RICHKD_WORKERS=0"
    if "can't start new thread" in reason:
        return (
            "no more threads can be started; allow more (ulimit -u, or the container's pids limit)"
        )
    if re.search(r"shared memory|/torch_\d+_", reason):
        return (
            f"shared memory ran out ({reason[:120]}); enlarge /dev/shm (docker run --shm-size=1g) "
            f"or do without data-loader workers (RICHKD_WORKERS=0)"
        )
    if isinstance(error, MemoryError) or _NO_MEMORY.search(reason) is not None:
        return (
            f"out of memory ({reason[:120] or type(error).__name__}); lower --batch-size or choose "
            f"smaller networks, then rerun the command"
        )
    return None


def local_path(name: str | Path, setting: str = "--out") -> Path:
    """Return a local path; raise RichKDError for a URL, which would become a folder named `s3:`."""
    if _URL.match(str(name)):
        raise RichKDError(
            f"{setting} {name}: must be a local path; only a cache can be at a URL "
            f"(precompute --out, or --cache)",
            code="path-is-url",
        )
    return Path(name)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without XML that a server appended."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].partition("<?xml")[0].strip().rstrip(":")


def require(condition: bool, name: str, value: object, must: str) -> None:
    """Raise a RichKDError that states what a value must be, unless the condition holds."""
    if not condition:
        raise RichKDError(f"{name} = {value!r}: must be {must}", code="value-out-of-range")

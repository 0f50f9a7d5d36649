"""Standard output and standard error that take any text, wherever they lead."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

# What our own text has and a terminal may not; those of one column stay one, for tables.
READABLE = {
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": ".",
    "…": "...",
    "→": "->",
    "÷": "/",
    "±": "+-",
    "α": "a",
    "β": "b",
    "γ": "g",
    "η": "eta",
    "λ": "lambda",
    "τ": "T",
    "Σ": "sum",
    "²": "^2",
    "³": "^3",
    "⁹": "^9",
    "ᵀ": "^T",
    "‖": "||",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "─": "-",
    "━": "-",
    "│": "|",
    "┐": "+",
    "┴": "+",
    "└": "+",
    "▶": ">",
    "●": "*",
    "★": "*",
    "◆": "*",
    "■": "*",
    "▲": "*",
    "✖": "x",
    "\N{REPLACEMENT CHARACTER}": "?",
}


def prepare() -> None:
    """Make the three streams take any text, in what encoding ever, and be there where closed.

    A name that is no text in the stream's encoding is shown with escapes, as in caf\\xe9.
    """
    codecs.register_error("readable", _readable)
    closed = [fd for fd in range(3) if not _is_open(fd)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # else the next file opened would be standard error
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(fd, "w", encoding="utf-8", errors="readable", closefd=False)
            setattr(sys, name, stream)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="readable")


def fail(message: str, code: int) -> int:
    """Say in one line why the program ends; its exit code."""
    from richkd.core.progress import harmless

    with suppress(OSError):
        print(f"richkd: {harmless(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


def flushed(code: int) -> int:
    """The exit code, once standard output is written; another where that fails.

    A reader that has seen enough (`| head`) is no failure to speak of, but shows in the code, as
    of a program that SIGPIPE ends.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _discard(stream)
            if error.errno == errno.EPIPE:
                code = code or 141
            elif stream is sys.stdout:
                code = code or fail(f"cannot write to standard output: {error}", 2)
    return code


def _discard(stream: TextIO) -> None:
    """Let what is left in the stream go nowhere, so that Python does not try again at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler: our own symbols by letters, all else by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = []
    for char in error.object[error.start : error.end]:
        if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
            parts.append(f"\\x{ord(char) - 0xDC00:02x}")
        else:
            parts.append(READABLE.get(char) or char.encode("ascii", "backslashreplace").decode())
    return "".join(parts), error.end

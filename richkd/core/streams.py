"""Make the standard streams accept any text, whatever they are connected to."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

# Replacements for symbols that a terminal may lack; single columns stay single, for tables.
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
    """Make the standard streams accept any text in any encoding, and open those that are closed.

    What the stream's encoding lacks is shown with escapes, as in caf\\xe9.
    """
    codecs.register_error("readable", _readable)
    closed = [fd for fd in range(3) if not _is_open(fd)]
    for _ in closed:
        os.open(
            os.devnull, os.O_RDWR
        )  # else the next file to be opened would become standard error
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(fd, "w", encoding="utf-8", errors="readable", closefd=False)
            setattr(sys, name, stream)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="readable")


def fail(message: str, code: int) -> int:
    """Print in one line why the program ends, and return its exit code."""
    from richkd.core.progress import harmless

    with suppress(OSError):
        print(f"richkd: {harmless(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


def flushed(code: int) -> int:
    """Flush the standard streams and return the exit code, or another one if that fails.

    A reader that closes the pipe (`| head`) is not reported, but gives the code of SIGPIPE.
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
    """Discard what is left in a stream, so that Python does not try to flush it again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode our own symbols as ASCII and everything else as escapes (a codec error handler)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = []
    for char in error.object[error.start : error.end]:
        if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not valid UTF-8
            parts.append(f"\\x{ord(char) - 0xDC00:02x}")
        else:
            parts.append(READABLE.get(char) or char.encode("ascii", "backslashreplace").decode())
    return "".join(parts), error.end

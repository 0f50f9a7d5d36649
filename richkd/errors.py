"""The one error that users see: it names the value, the place and the remedy, on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class RichKDError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(name: str, choices: Iterable[str], limit: int = 8, fallback: Iterable[str] = ()) -> str:
    """The choices nearest to a mistyped name (all of them, when there are few), for a message.

    Where none is near, some of them are named: those of `fallback`, where it is given.
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
    """The error for a name that does not exist, with the names that do."""
    return RichKDError(f"unknown {kind} {name!r}; {nearest(name, choices)}")


def local_path(name: str | Path, setting: str = "--out") -> Path:
    """A path on this machine; RichKDError for a URL, which would become a folder called `s3:`."""
    if _URL.match(str(name)):
        raise RichKDError(
            f"{setting} {name}: must be a path on this machine; only a store can be at a URL "
            f"(precompute --out, or --cache)"
        )
    return Path(name)

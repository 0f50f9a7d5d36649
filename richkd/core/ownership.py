"""What richkd wrote, told apart from other people's files of the same name.

Nothing else is written over or deleted: pages and exports lie where users have files of their own.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from richkd.core.files import read_json

Ours = Callable[[Path], bool]
EVENTS = "events.out.tfevents.*"  # of TensorBoard


def is_page(path: Path) -> bool:
    """A page of HTML."""
    with path.open("rb") as file:
        return b"<title>richkd: " in file.read(1024)


def has_keys(*keys: str) -> Ours:
    """JSON with these keys."""
    return lambda path: {*keys} <= (read_json(path) or {}).keys()


def is_leaderboard(path: Path) -> bool:
    """A leaderboard as CSV."""
    with path.open("rb") as file:
        return file.readline(1024).strip().split(b",")[0] == b"student"


def is_export(path: Path) -> bool:
    """A student as ONNX or as an exported program."""
    if not zipfile.is_zipfile(path):
        content = path.read_bytes()
        return all(name in content for name in (b"class_names", b"pixels", b"logits"))
    try:
        with zipfile.ZipFile(path) as archive:
            models = [name for name in archive.namelist() if name.endswith(".json")]
            return any(b'"student.' in archive.read(name) for name in models)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):  # damaged, or encrypted
        return False


# by name, what is written into a run folder about the run in it
ABOUT_RUN: dict[str, Ours] = {
    "evaluation.json": lambda _: True,  # a name of our own, and the remedy where one is damaged
    "evaluation-best.json": lambda _: True,
    "evaluation.html": is_page,
    "comparison.json": has_keys("dataset", "runs"),
    "student.onnx": is_export,
    "student.pt2": is_export,
}


def remove_about_run(folder: Path) -> None:
    """Delete what tells of a run that is to be replaced."""
    for name, ours in ABOUT_RUN.items():
        path = folder / name
        with suppress(OSError):
            if path.is_file() and ours(path):
                path.unlink()

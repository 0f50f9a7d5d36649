"""Recognise files that richkd wrote.

Pages and exports are written where users keep files of their own; only files recognised here are
overwritten or deleted.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from richkd.core.files import read_json

Ours = Callable[[Path], bool]
EVENTS = "events.out.tfevents.*"  # TensorBoard's event files


def is_page(path: Path) -> bool:
    """Return whether a file is an HTML page by richkd."""
    with path.open("rb") as file:
        return b"<title>richkd: " in file.read(1024)


def has_keys(*keys: str) -> Ours:
    """Return a test for JSON files that have these keys."""
    return lambda path: {*keys} <= (read_json(path) or {}).keys()


def is_leaderboard(path: Path) -> bool:
    """Return whether a file is a leaderboard in CSV."""
    with path.open("rb") as file:
        return file.readline(1024).strip().split(b",")[0] == b"student"


def is_export(path: Path) -> bool:
    """Return whether a file is a student as ONNX or as an exported program."""
    if not zipfile.is_zipfile(path):
        content = path.read_bytes()
        return all(name in content for name in (b"class_names", b"pixels", b"logits"))
    try:
        with zipfile.ZipFile(path) as archive:
            models = [name for name in archive.namelist() if name.endswith(".json")]
            return any(b'"student.' in archive.read(name) for name in models)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):  # damaged, or encrypted
        return False


# files about a run that are written into its folder, by name
ABOUT_RUN: dict[str, Ours] = {
    "evaluation.json": lambda _: True,  # even a damaged one, which is to be rewritten
    "evaluation-best.json": lambda _: True,
    "evaluation.html": is_page,
    "comparison.json": has_keys("dataset", "runs"),
    "student.onnx": is_export,
    "student.pt2": is_export,
}


def remove_about_run(folder: Path) -> None:
    """Delete the files about a run that is about to be replaced."""
    for name, ours in ABOUT_RUN.items():
        path = folder / name
        with suppress(OSError):
            if path.is_file() and ours(path):
                path.unlink()

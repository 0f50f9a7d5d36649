"""Writing files: whole or not at all, and refused early where it cannot work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from richkd.errors import RichKDError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes it 0600
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be made, before anything long is done for it; makes nothing.

    Raises:
        RichKDError: a file is where a folder should be, or a folder may not be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RichKDError(f"cannot write {path}: {folder} is a file; choose another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RichKDError(f"cannot write {path}: no permission in {folder}; choose another --out")

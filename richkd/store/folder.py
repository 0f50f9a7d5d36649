"""A cache in a folder of this machine.

obstore's LocalStore cannot replace it: it has no conditional puts to lock a cache with, never
calls fsync, and is an optional dependency.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from richkd.core import files
from richkd.store.location import Location

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Folder(Location):
    """A cache on a disk."""

    durable = False
    at_once = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The path as text."""
        return str(self.path)

    def zarr(self, *, read_only: bool) -> Store:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def tail(self, file: str, count: int) -> bytes:
        with (self.path / file).open("rb") as opened:
            end = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, end - count))
            return opened.read(count)

    def write(self, file: str, content: bytes) -> None:
        with files.atomic_write(self.path / file) as temporary:
            temporary.write_bytes(content)

    def delete(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path / prefix, followlinks=True):
            for file in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):  # a temporary file of another process
                    found[file.relative_to(self.path).as_posix()] = file.stat().st_size
        return found

    def create(self, content: Mapping[str, bytes]) -> None:
        """Write the files to a folder beside it, then rename that: there is never half a cache."""
        target = self.path.resolve()  # a symbolic link stays one
        new, old = self._beside(target)
        for leftover in (new, old):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for file, data in content.items():
            Folder(new).write(file, data)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _beside(target: Path) -> tuple[Path, Path]:
        """Return the temporary names of a new and an old cache."""
        return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")

    def remove_temporary(self) -> None:
        files.remove_temporary(self.path, deep=True)
        for leftover in self._beside(self.path.resolve()):
            shutil.rmtree(leftover, ignore_errors=True)

    def check_writable(self) -> None:
        files.check_writable(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Lock by flock, which ends with the process."""
        return files.locked(self.path)

    def check_unlocked(self) -> None:
        files.check_unlocked(self.path)

    def check_still_locked(self) -> None:
        """Check the lock where there is no flock; with flock it cannot be lost."""
        files.check_still_locked(self.path)

    def explained(self, do: str) -> AbstractContextManager[None]:
        """Pass errors through: disk errors need no explanation."""
        return nullcontext()

    @property
    def vacant(self) -> bool:
        """Whether there is nothing; an empty folder is something."""
        return not self.path.exists()

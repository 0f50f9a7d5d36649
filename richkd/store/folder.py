"""A cache in a folder of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from richkd.core import files
from richkd.store.location import Location

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Folder(Location):
    """A store on a disk."""

    durable = False
    at_once = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def zarr(self, *, read_only: bool) -> Store:
        """zarr's own store of files."""
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def read(self, file: str) -> bytes:
        """From the disk."""
        return (self.path / file).read_bytes()

    def tail(self, file: str, count: int) -> bytes:
        """Without reading the rest."""
        with (self.path / file).open("rb") as opened:
            end = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, end - count))
            return opened.read(count)

    def write(self, file: str, content: bytes) -> None:
        """Beside it first, then into its place."""
        with files.atomic_write(self.path / file) as temporary:
            temporary.write_bytes(content)

    def delete(self, file: str) -> None:
        """From the disk."""
        (self.path / file).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """By walking through the folder."""
        return {
            (file := Path(folder, name)).relative_to(self.path).as_posix(): file.stat().st_size
            for folder, _, names in os.walk(self.path / prefix)
            for name in names
        }

    def create(self, content: Mapping[str, bytes]) -> None:
        """Beside it first, so that there is never half of a store."""
        place = self.path.resolve()  # a link stays one
        unborn, gone = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
        for left in (unborn, gone):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for file, data in content.items():
            Folder(unborn).write(file, data)
        if place.exists():
            place.rename(gone)
        unborn.rename(place)
        shutil.rmtree(gone, ignore_errors=True)

    def remove_temporary(self) -> None:
        """By their names."""
        files.remove_temporary(self.path, deep=True)
        place = self.path.resolve()
        for word in ("new", "old"):
            shutil.rmtree(place.with_name(f".{place.name}.{word}"), ignore_errors=True)

    def check_writable(self) -> None:
        """As of every file that richkd writes."""
        files.check_writable(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """By a lock that dies with its process."""
        return files.locked(self.path)

    def check_unlocked(self) -> None:
        """Where a lock is there, whether somebody has it."""
        files.check_unlocked(self.path)

    def check_still_locked(self) -> None:
        """A lock on a disk is held until its process ends, but not where there is no flock."""
        files.check_still_locked(self.path)

    def explained(self, do: str) -> AbstractContextManager[None]:
        """What befalls a disk says itself what it is."""
        return nullcontext()

    @property
    def vacant(self) -> bool:
        """A folder without a file is something."""
        return not self.path.exists()

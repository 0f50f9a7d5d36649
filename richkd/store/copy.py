"""What is read of a store, on this disk: the store itself, or a copy that grows as it is read.

A copy lies in the user's cache folder. It is of one manifest: a store that was made anew has a copy
of its own. A chunk is kept only if its bytes are those that its CRC was computed of; that they are
the right ones is for the reader to check, as of any store.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from richkd.core.errors import RichKDError
from richkd.core.files import atomic_write, home
from richkd.store.checksums import intact, read_chunk
from richkd.store.folder import Folder
from richkd.store.location import METADATA, Location

UNUSED_S = 7 * 86_400.0


class LocalCopy:
    """The files of a store that were read so far. `path` is a folder that zarr can open."""

    def __init__(self, place: Location, path: Path) -> None:
        self.location = place
        self.path = path

    def fetch(self, names: Iterable[str]) -> None:
        """Bring files here that are not; those that the store lacks stay missing.

        Raises:
            RichKDError: the place cannot be read, a chunk arrives damaged again and again, or
                this disk is full.
        """
        if not isinstance(self.location, Folder):
            missing = [name for name in names if not (self.path / name).exists()]
            for _ in self.location.map(self._fetch_one, missing):
                pass

    def drop(self, names: Iterable[str]) -> bool:
        """Forget files whose copies were damaged here; whether there is a place to ask again."""
        if isinstance(self.location, Folder):
            return False
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        return True

    def _fetch_one(self, name: str) -> None:
        chunk = "/c/" in name
        try:
            content = read_chunk(self.location, name) if chunk else self.location.read(name)
        except FileNotFoundError:
            return
        if chunk and not intact(content):
            raise RichKDError(
                f"{self.location}: {name} is damaged; richkd verify says what else is, and richkd "
                f"repair mends it",
                code="cache-damaged",
            )
        keep(self.path / name, content)


def open_copy(place: Location) -> LocalCopy:
    """The folder itself, or the copy of a store elsewhere, its manifest newly read.

    Raises:
        RichKDError: the place cannot be read; FileNotFoundError where no store is there.
    """
    if isinstance(place, Folder):
        return LocalCopy(place, place.path)
    manifest = place.read(METADATA)
    name, version = (
        hashlib.sha256(part).hexdigest()[:16] for part in (place.name.encode(), manifest)
    )
    copies = home() / "stores" / f"{place.stem}-{name}"
    path = copies / f"{version}.zarr"
    keep(path / METADATA, manifest)
    for other in copies.glob("*.zarr"):  # of a time when the store was another
        if other != path and _unused(other):
            shutil.rmtree(other, ignore_errors=True)
    return LocalCopy(place, path)


def _unused(copy: Path) -> bool:
    """Whether nobody has opened a copy for so long that nobody reads it any more."""
    try:
        return time.time() - (copy / METADATA).stat().st_mtime > UNUSED_S
    except OSError:
        return False


def keep(path: Path, content: bytes) -> None:
    """Write a file of a copy.

    Raises:
        RichKDError: there is no room for it, or the folder is not ours to write.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise RichKDError(
            f"cannot keep a copy of what is read in {home()} ({error.strerror or error}); make "
            f"room there, or name another folder by RICHKD_HOME",
            code="local-copy-failed",
        ) from None

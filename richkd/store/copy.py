"""A cache on this disk: the cache itself, or a copy that grows as files are read.

Copies are in RICHKD_HOME. Each belongs to one manifest, so a cache that is written again gets a
new copy. A chunk is kept only if it matches its own CRC; the reader checks that it is the right
chunk, as in any cache.
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
    """The files of a cache that were read so far; `path` is a folder that zarr can open."""

    def __init__(self, location: Location, path: Path) -> None:
        self.location = location
        self.path = path

    def fetch(self, names: Iterable[str]) -> None:
        """Download files that are not here yet; files that do not exist stay missing.

        Raises:
            RichKDError: the location cannot be read, a chunk repeatedly arrives damaged, or this
                disk is full.
        """
        if not isinstance(self.location, Folder):
            missing = [name for name in names if not (self.path / name).exists()]
            for _ in self.location.map(self._fetch_one, missing):
                pass

    def drop(self, names: Iterable[str]) -> bool:
        """Delete damaged copies of files; return whether they can be downloaded again."""
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
                f"{self.location}: {name} is damaged; richkd verify lists all damage, and richkd "
                f"repair fixes it",
                code="cache-damaged",
            )
        keep(self.path / name, content)


def open_copy(location: Location) -> LocalCopy:
    """Return a folder itself, or the copy of a cache elsewhere, after reading its manifest.

    Raises:
        RichKDError: the location cannot be read.
        FileNotFoundError: there is no cache.
    """
    if isinstance(location, Folder):
        return LocalCopy(location, location.path)
    manifest = location.read(METADATA)
    name, version = (
        hashlib.sha256(part).hexdigest()[:16] for part in (location.name.encode(), manifest)
    )
    copies = home() / "stores" / f"{location.stem}-{name}"
    path = copies / f"{version}.zarr"
    keep(path / METADATA, manifest)
    for other in copies.glob("*.zarr"):  # of earlier manifests
        if other != path and _unused(other):
            shutil.rmtree(other, ignore_errors=True)
    return LocalCopy(location, path)


def _unused(copy: Path) -> bool:
    """Return whether a copy was last opened so long ago that nobody reads it any more."""
    try:
        return time.time() - (copy / METADATA).stat().st_mtime > UNUSED_S
    except OSError:
        return False


def keep(path: Path, content: bytes) -> None:
    """Write a file of a copy.

    Raises:
        RichKDError: the disk is full, or the folder is not writable.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise RichKDError(
            f"cannot keep a copy of the cache in {home()} ({error.strerror or error}); free some "
            f"space there, or set RICHKD_HOME to another folder",
            code="local-copy-failed",
        ) from None

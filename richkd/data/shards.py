"""Read WebDataset shards: `wds:PATH`, tar files with an index, which are not unpacked.

Images are read by their place in the shards (see `shard_samples`).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data.contents import Contents, Labelled, of_labelled
from richkd.data.labels import choose_splits, kept_splits
from richkd.data.layouts import Layout
from richkd.data.shard_index import describe_index, find_shards
from richkd.data.shard_samples import choose_members, list_samples, version_of
from richkd.data.sources import Paths, Which

_NAMES = ("classes.txt", "classes.json")  # files of class names


class _OpenShard:
    """An open file that is closed when nobody needs it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = (
            None if hasattr(os, "pread") else Lock()
        )  # Windows has no pread, and no forks either

    def read(self, count: int, start: int) -> bytes:
        """Read up to `count` bytes from a place."""
        if self._lock is None:
            return os.pread(self.descriptor, count, start)
        with self._lock:
            os.lseek(self.descriptor, start, os.SEEK_SET)
            return os.read(self.descriptor, count)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Section(io.RawIOBase):
    """A part of a file. Reads depend on no position in it, so threads and forks may share it."""

    def __init__(self, file: _OpenShard, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position relative to the begin, the position or the end of the part."""
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        """Return the position in the part."""
        return self._at

    def readall(self) -> bytes:
        """Read the rest of the part."""
        count = max(0, self._length - self._at)
        found = self._file.read(count, self._start + self._at)
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        """Read up to the length of a buffer; return the number of bytes."""
        count = min(len(buffer), max(0, self._length - self._at))
        found = self._file.read(count, self._start + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@lru_cache(maxsize=256)
def _opened(path: str, _: tuple[int, int, int]) -> _OpenShard:
    """Open a shard once in each process, and again if it is another file."""
    return _OpenShard(path)


def part_of(path: str, start: int, length: int) -> BinaryIO:
    """Return a part of a file as a file of its own."""
    found = os.stat(path)  # noqa: PTH116
    version = found.st_ino, found.st_size, found.st_mtime_ns
    return cast(BinaryIO, io.BufferedReader(Section(_opened(path, version), start, length)))


@dataclass(frozen=True)
class ShardMembers:
    """Images in tar files."""

    folder: Path
    split: str
    shards: Paths  # relative to the folder
    shard: NDArray[np.int64]  # [N], positions in shards
    spans: NDArray[np.int64]  # [N,2], where the bytes of an image begin, and how many there are
    members: Paths  # [N], names in the tar files

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def origin(self) -> str:
        """The folder and the split."""
        return f"wds:{self.folder.resolve()}, split {self.split}"

    @property
    def place(self) -> str:
        """The folder and the split, as the user names it."""
        return f"wds:{self.folder}, split {self.split}"

    def name(self, index: int) -> str:
        """Return the names of the member and of its shard."""
        return f"{self.members[index]} in {self.folder / self.shards[int(self.shard[index])]}"

    def key(self, index: int) -> str:
        """Return the paths of the shard and of the member in it."""
        return f"{self.shards[int(self.shard[index])]}/{self.members[index]}"

    def file(self, index: int) -> BinaryIO:
        """Return an image as a part of its shard."""
        path = f"{self.folder}/{self.shards[int(self.shard[index])]}"
        return part_of(path, *map(int, self.spans[index]))

    def take(self, which: Which) -> ShardMembers:
        """Select images."""
        return replace(
            self,
            shard=self.shard[which],
            spans=self.spans[which],
            members=self.members.take(which),
        )

    def state(self) -> str:
        """Return a digest of the shards and of the places of the images in them."""
        digest = hashlib.sha256(version_of(self.folder, self.shards).encode())
        digest.update(np.ascontiguousarray(self.shard).data)
        digest.update(np.ascontiguousarray(self.spans).data)
        return digest.hexdigest()


def contents(
    settings: Images,
    folder: Path,
    layout: Layout | None,
    skipped: Collection[str] | None,
    report: Report,
) -> Contents:
    """Return the contents of a folder of shards.

    Args:
        settings: which images.
        folder: the folder.
        layout: the splits and extensions that a cache was made from; None to choose them.
        skipped: the images that stage one left out; None to decode every image once.
        report: shows the progress.

    Raises:
        RichKDError: there is no index or no split that fits, or a shard, an image or a label is
            invalid.
    """
    if not folder.is_dir():
        raise RichKDError(
            f"wds:{folder}: no such folder; give the folder of the shards, not a file or a pattern",
            code="dataset-folder-missing",
        )
    place = f"wds:{folder}"
    shards = find_shards(folder)
    if layout is None:
        no_train = f"move the shards to train on to {folder}/train"
        no_test = f"move some shards to {folder}/val, with an index of their own"
        splits, notes = choose_splits(shards, "", place, no_train, no_test)
        first = folder / shards[splits["train"]][0].path
        columns = choose_members(first, settings.image_column, settings.label_column)
    else:
        splits, notes, columns = kept_splits(shards, layout, place), [], dict(layout.columns)
    found = {
        name: list_samples(folder, name, shards[name], columns, report) for name in splits.values()
    }
    own = Labelled(
        place=place,
        splits=splits,
        labels={name: each.raw for name, each in found.items()},
        sources={
            name: ShardMembers(folder, name, each.shards, each.shard, each.spans, each.members)
            for name, each in found.items()
        },
        columns=columns,
        notes=[describe_index(shards), *notes],
        class_file=next((folder / name for name in _NAMES if (folder / name).is_file()), None),
    )
    return of_labelled(settings, own, layout, skipped, report)

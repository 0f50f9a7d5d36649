"""Which files below a folder are images, and what else lies there.

What systems and tools leave in folders is no data, and no real folder is read twice. For all other
folders the order is that of torchvision's ImageFolder: classes by name, the folders of a class by
path, files by name.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import insort
from collections.abc import Collection, Iterator
from enum import Enum
from functools import cache
from pathlib import Path

from PIL import Image

from richkd.core.errors import RichKDError

# What NAS, Windows, macOS and Python make; any other name that begins with a dot is hidden, too.
_SYSTEM = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "network trash folder",
    "temporary items",
    "lost+found",
    "__pycache__",
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
}
_CHECKED_DISK = re.compile(r"found\.\d{3}", re.IGNORECASE)  # by Windows
# Images that Pillow does not open, and what it opens that are no images.
_RAW = {
    ".3fr",
    ".arw",
    ".cr2",
    ".cr3",
    ".crw",
    ".dng",
    ".erf",
    ".kdc",
    ".mrw",
    ".nef",
    ".nrw",
    ".orf",
    ".pef",
    ".raf",
    ".raw",
    ".rw2",
    ".sr2",
    ".srf",
    ".srw",
    ".x3f",
}
_RARE = {".dcm", ".exr", ".hdr", ".jxl", ".svg", ".svgz", ".xcf"}
_NO_IMAGES = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".pdf"}
_SHOWN = 3  # examples a line


class Kind(Enum):
    """What may lie among images; as it is said of one and of several, and what can be done."""

    HIDDEN = "left out", "hidden or system file or folder", "hidden or system files or folders", ""
    OTHER = "left out", "file that is not called an image", "files that are not called images", ""
    FORMAT = (
        "left out",
        "image of a format that is not read",
        "images of formats that are not read",
        " (convert them to PNG or JPEG)",
    )
    BESIDE = (
        "left out",
        "image that lies beside the class folders",
        "images that lie beside the class folders",
        " (move each into the folder of its class)",
    )
    LINK = (
        "left out",
        "link to a folder that is read elsewhere, or that it lies in",
        "links to folders that are read elsewhere, or that they lie in",
        "",
    )
    BELOW = (
        "read",
        "image in a folder below a class folder",
        "images in folders below a class folder",
        " as images of that class",
    )


class Tally:
    """How often there was something of each kind, and where: the first few paths."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(Kind, 0)
        self.paths: dict[Kind, list[str]] = {kind: [] for kind in Kind}

    def add(self, kind: Kind, path: str, count: int = 1) -> None:
        """Count something at a path."""
        self.counts[kind] += count
        shown = self.paths[kind]
        if len(shown) < _SHOWN or path < shown[-1]:
            insort(shown, path)
            del shown[_SHOWN:]

    def merge(self, other: Tally) -> None:
        """Count what another has counted."""
        for kind, count in other.counts.items():
            for path in other.paths[kind]:
                self.add(kind, path, 0)
            self.counts[kind] += count

    def lines(self) -> Iterator[str]:
        """A line for each kind that there is."""
        for kind, count in self.counts.items():
            if count:
                verb, one, many, remedy = kind.value
                paths = ", ".join(self.paths[kind])
                rest = count - len(self.paths[kind])
                more = f" and {rest:,} more" if rest > 0 else ""
                yield f"{verb} {count:,} {one if count == 1 else many}{remedy}: {paths}{more}"


class Walk:
    """A walk over one folder of class folders.

    Attributes:
        classes: the names of the class folders, sorted.
        tally: what else is there, by paths that begin with the folder's own name.
        real: each real folder that was read (device, inode), by its path in the folder.
    """

    def __init__(self, folder: Path, suffixes: Collection[str], with_hidden: bool = False) -> None:
        """Find the classes.

        Args:
            folder: to read.
            suffixes: of files that are images.
            with_hidden: take hidden files and folders for data, as earlier versions did.

        Raises:
            RichKDError: a folder cannot be read, or two class folders are one.
        """
        self._folder, self._suffixes, self._with_hidden = folder, suffixes, with_hidden
        self._root = os.path.realpath(folder)
        self.tally = Tally()
        self.real: dict[tuple[int, int], str] = {}
        self.classes: list[str] = []
        names, files = self._list("", self.tally)
        for name in names:
            path = f"{folder}/{name}"
            if os.path.islink(path) and self._leads_back("", path):  # noqa: PTH114
                self.tally.add(Kind.LINK, f"{folder.name}/{name}")
                continue
            key = _identity(path)
            if key in self.real:
                raise RichKDError(
                    f"{path} and {folder / self.real[key]} are one and the same folder; remove one "
                    f"of these links, so that no image has two classes",
                    code="folder-linked-twice",
                )
            self.real[key] = name
            self.classes.append(name)
        for name in files:
            self.tally.add(Kind.BESIDE, f"{folder.name}/{name}")

    def images(self, name: str, tally: Tally) -> Iterator[str]:
        """The images of a class, by paths in the folder; what else is there goes to a tally.

        Raises:
            RichKDError: a folder cannot be read.
        """
        found: list[tuple[str, list[str]]] = []
        todo = [name]
        while todo:
            where = todo.pop()
            names, files = self._list(where, tally)
            found.append((where, files))
            todo += [f"{where}/{inner}" for inner in names if self._enters(where, inner, tally)]
        for where, files in sorted(found):
            if where != name and files:
                tally.add(Kind.BELOW, f"{self._folder.name}/{where}/{files[0]}", len(files))
            yield from (f"{where}/{file}" for file in files)

    def _list(self, where: str, tally: Tally) -> tuple[list[str], list[str]]:
        """The folders and the images in one folder, each sorted by name."""
        at = f"{self._folder}/{where}" if where else str(self._folder)
        shown = f"{self._folder.name}/{where}" if where else self._folder.name
        folders, images = [], []
        try:
            with os.scandir(at) as entries:
                for entry in entries:
                    name = entry.name
                    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
                    if not self._with_hidden and is_hidden(name):
                        tally.add(Kind.HIDDEN, f"{shown}/{name}")
                    elif _is_folder(entry):
                        folders.append(name)
                    elif suffix in self._suffixes and _may_be_opened(entry):
                        images.append(name)
                    elif suffix in not_read() and suffix not in self._suffixes:
                        tally.add(Kind.FORMAT, f"{shown}/{name}")
                    else:
                        tally.add(Kind.OTHER, f"{shown}/{name}")
        except OSError as error:
            raise RichKDError(
                f"cannot read the folder {at} ({error.strerror}); make it "
                f"readable, or move it away",
                code="folder-unreadable",
            ) from None
        return sorted(folders), sorted(images)

    def _enters(self, where: str, name: str, tally: Tally) -> bool:
        """Whether a folder below a class folder is to be read: not twice."""
        path = f"{self._folder}/{where}/{name}"
        if not (os.path.islink(path) and self._leads_back(where, path)):  # noqa: PTH114
            key = _identity(path)
            if key not in self.real:
                self.real[key] = f"{where}/{name}"
                return True
        tally.add(Kind.LINK, f"{self._folder.name}/{where}/{name}")
        return False

    def _leads_back(self, where: str, link: str) -> bool:
        """Whether a link leads to a folder that it lies in, or to one that is read without it."""
        target = os.path.realpath(link)
        if _within(self._root, target) or _within(
            os.path.realpath(f"{self._folder}/{where}"), target
        ):
            return True
        if not _within(target, self._root):
            return False
        below = Path(target).relative_to(self._root)
        return self._with_hidden or not any(map(is_hidden, below.parts))


def is_hidden(name: str) -> bool:
    """Whether a file or a folder is hidden, or one that a system made for itself."""
    return (
        name.startswith(".")
        or name.casefold() in _SYSTEM
        or (name[:1] in "fF" and _CHECKED_DISK.fullmatch(name) is not None)
    )


@cache
def not_read() -> frozenset[str]:
    """Suffixes of images, in lower case; those of formats that are read may be among them."""
    return frozenset({*Image.registered_extensions(), *_RAW, *_RARE} - _NO_IMAGES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_opened(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file; a link to nowhere counts as one, so that it is named later."""
    if entry.is_file(follow_symlinks=False):
        return True
    try:
        return entry.is_symlink() and stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116
    return found.st_dev, found.st_ino


def _within(path: str, folder: str) -> bool:
    """Whether a path is a folder's or lies below it; both without links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)

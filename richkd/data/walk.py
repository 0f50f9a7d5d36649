"""Find the image files below a folder, and report what else is there.

Files that operating systems and tools leave behind are not data, and no folder is read twice, even
through links. Apart from that, the order is as in torchvision's ImageFolder: classes by name, the
folders of a class by path, files by name.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from functools import cache
from pathlib import Path

from PIL import Image

from richkd.core.errors import RichKDError

# Made by NAS, Windows, macOS and Python; other names are hidden if they begin with a dot.
_SYSTEM = re.compile(
    r"@eadir|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|__macosx|\$recycle\.bin"
    r"|system volume information|network trash folder|temporary items|lost\+found|__pycache__"
    r"|thumbs\.db|ehthumbs\.db|ehthumbs_vista\.db|desktop\.ini|icon\r|found\.\d{3}"
)
# Images that Pillow cannot open (raw photographs, then others), and what it opens that is no image.
_NOT_IN_PILLOW = (
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf "
    ".srw .x3f .dcm .exr .hdr .jxl .svg .svgz .xcf"
)
_NO_IMAGES = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".pdf"}
_EXAMPLES = 3  # in a line of a tally

ScanDir = AbstractContextManager[Iterable[os.DirEntry[str]]]


class Kind(Enum):
    """What else may lie in an image folder: verb, singular, plural, and what becomes of it."""

    HIDDEN = "left out", "hidden or system file or folder", "hidden or system files or folders", ""
    OTHER = "left out", "file that is not an image", "files that are not images", ""
    FORMAT = (
        "left out",
        "image in an unsupported format",
        "images in unsupported formats",
        " (convert them to PNG or JPEG)",
    )
    BESIDE = (
        "left out",
        "image outside the class folders",
        "images outside the class folders",
        " (move each into the folder of its class)",
    )
    LINK = (
        "left out",
        "link to a folder that contains it or that is read anyway",
        "links to folders that contain them or that are read anyway",
        "",
    )
    BELOW = (
        "read",
        "image in a subfolder of a class folder",
        "images in subfolders of a class folder",
        " as images of that class",
    )


class Tally:
    """Counts what was found of each kind, and keeps the first few paths as examples."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(Kind, 0)
        self.paths: dict[Kind, list[str]] = {kind: [] for kind in Kind}

    def add(self, kind: Kind, path: str, count: int = 1) -> None:
        """Add `count` of a kind, with one path as an example."""
        self.counts[kind] += count
        shown = self.paths[kind]
        if len(shown) < _EXAMPLES or path < shown[-1]:
            insort(shown, path)
            del shown[_EXAMPLES:]

    def merge(self, other: Tally) -> None:
        """Add the counts and examples of another tally."""
        for kind, count in other.counts.items():
            for path in other.paths[kind]:
                self.add(kind, path, 0)
            self.counts[kind] += count

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind that was found."""
        for kind, count in self.counts.items():
            if count:
                verb, one, many, note = kind.value
                paths = listed(self.paths[kind], count)
                yield f"{verb} {count:,} {one if count == 1 else many}{note}: {paths}"


def listed(names: Sequence[str], count: int | None = None, most: int = 4) -> str:
    """Join the first `most` names, and add how many of all `count` are left."""
    shown = names[:most]
    rest = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")


class Walk:
    """A walk through an image folder, which has a folder for each class.

    Attributes:
        classes: names of the class folders, sorted.
        tally: what else was found; paths begin with the folder's own name.
        real: the folders that were read, as device and inode: path relative to the folder.
    """

    def __init__(
        self,
        folder: Path,
        suffixes: Collection[str],
        with_hidden: bool = False,
        scandir: Callable[[str], ScanDir] = os.scandir,
    ) -> None:
        """Find the classes.

        Args:
            folder: the image folder.
            suffixes: file extensions of images, in lower case.
            with_hidden: read hidden files and folders too, as earlier versions did.
            scandir: lists a folder.

        Raises:
            RichKDError: a folder cannot be read, or two class folders are the same folder.
        """
        self._folder, self._suffixes, self._with_hidden = folder, suffixes, with_hidden
        self._root = os.path.realpath(folder)
        self._scandir = scandir
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
                    f"{path} and {folder / self.real[key]} are the same folder, so its images "
                    f"would have two classes; remove one of the links",
                    code="folder-linked-twice",
                )
            self.real[key] = name
            self.classes.append(name)
        for name in files:
            self.tally.add(Kind.BESIDE, f"{folder.name}/{name}")

    def images(self, name: str, tally: Tally) -> Iterator[str]:
        """Yield the images of a class as paths relative to the folder; tally everything else.

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
        """Return the folders and the images in one folder, each sorted by name."""
        at = f"{self._folder}/{where}" if where else str(self._folder)
        shown = f"{self._folder.name}/{where}" if where else self._folder.name
        folders, images = [], []
        try:
            with self._scandir(at) as entries:
                for entry in entries:
                    name = entry.name
                    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
                    if not self._with_hidden and is_hidden(name):
                        tally.add(Kind.HIDDEN, f"{shown}/{name}")
                    elif _is_folder(entry):
                        folders.append(name)
                    elif suffix in self._suffixes and _may_be_opened(entry):
                        images.append(name)
                    elif suffix in unsupported() and suffix not in self._suffixes:
                        tally.add(Kind.FORMAT, f"{shown}/{name}")
                    else:
                        tally.add(Kind.OTHER, f"{shown}/{name}")
        except OSError as error:
            raise RichKDError(
                f"cannot read the folder {at} ({error.strerror}); make it readable or move it away",
                code="folder-unreadable",
            ) from None
        return sorted(folders), sorted(images)

    def _enters(self, where: str, name: str, tally: Tally) -> bool:
        """Return whether to read a folder below a class folder, and mark it as read."""
        path = f"{self._folder}/{where}/{name}"
        if not (os.path.islink(path) and self._leads_back(where, path)):  # noqa: PTH114
            key = _identity(path)
            if key not in self.real:
                self.real[key] = f"{where}/{name}"
                return True
        tally.add(Kind.LINK, f"{self._folder.name}/{where}/{name}")
        return False

    def _leads_back(self, where: str, link: str) -> bool:
        """Return whether a link leads to a folder that contains it or that is read without it."""
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
    """Return whether a file or folder is hidden or made by an operating system for itself."""
    return name.startswith(".") or _SYSTEM.fullmatch(name.casefold()) is not None


@cache
def unsupported() -> frozenset[str]:
    """Return file extensions of images, in lower case; supported ones may be among them."""
    return frozenset({*Image.registered_extensions(), *_NOT_IN_PILLOW.split()} - _NO_IMAGES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_opened(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file; a dangling link counts, so that it is reported later."""
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
    """Return whether a path is a folder or lies below it; both must have no links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)

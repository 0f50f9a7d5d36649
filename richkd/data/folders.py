"""Folders of people's own images: which files are images, and what their folders are called.

Layout: PATH/train/CLASS/* and PATH/val/CLASS/* (or test), as torchvision's ImageFolder reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from richkd.errors import RichKDError, nearest
from richkd.progress import Report

# As torchvision has them, and those of GIF.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
_SYNSET = re.compile(r"n\d{8}")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NUMBERED = re.compile(r"\d+[._-]+(?=\D)")  # as in 001.Black_footed_Albatross


@dataclass(frozen=True)
class Listing:
    """The image files of one split, the classes evenly spread."""

    folder: Path
    classes: tuple[str, ...]  # names of folders
    paths: tuple[str, ...]  # relative to folder
    labels: tuple[int, ...]
    sizes: NDArray[np.int64]  # [N,2], height and width
    skipped: tuple[str, ...]  # files that are no whole images, relative to what folder is in
    ignored: tuple[str, ...]  # likewise: files that are not called images


def list_images(
    folder: Path,
    broken: str,
    known: Collection[str] | None = None,
    report: Report | None = None,
) -> Listing:
    """Read a folder of class folders.

    Args:
        folder: with a folder a class.
        broken: what to do with files that cannot be decoded to their end: refuse or skip.
        known: the broken files, as an earlier listing skipped them: none is decoded then.
        report: where progress goes.

    Raises:
        RichKDError: no class, a class without images, or a broken file that is to be refused.
    """
    from torchvision.datasets import ImageFolder

    ignored = []

    def is_image(file: str) -> bool:
        path = Path(file)
        called = path.suffix.lower() in SUFFIXES
        if not called and not path.name.startswith("."):
            ignored.append(f"{folder.name}/{path.relative_to(folder)}")
        return called

    try:
        listing = ImageFolder(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:
        raise RichKDError(f"{folder}: {error}") from None
    # interleave the classes, so that --limit N does not take the first classes only
    samples = [(str(Path(file).relative_to(folder)), label)
               for file, label in _spread(listing.samples)]  # fmt: skip
    samples = [sample for sample in samples if f"{folder.name}/{sample[0]}" not in (known or ())]
    report, found = report or Report(quiet=True), []
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        report.track(f"looking at {folder}", len(samples), "files") as tick,
    ):
        for size in pool.map(lambda s: _size(folder / s[0], decode=known is None), samples):
            found.append(size)
            tick(1)
    faults = [(path, size) for (path, _), size in zip(samples, found, strict=True)
              if isinstance(size, str)]  # fmt: skip
    if faults and (broken == "refuse" or known is not None):
        more = f", nor {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RichKDError(
            f"{folder / faults[0][0]} is no image that can be read ({faults[0][1]}){more}; remove "
            f"such files, or leave them out with --broken skip"
        )
    good = [(*sample, size) for sample, size in zip(samples, found, strict=True)
            if not isinstance(size, str)]  # fmt: skip
    lacking = sorted({*range(len(listing.classes))} - {label for _, label, _ in good})
    if lacking:
        raise RichKDError(f"{folder / listing.classes[lacking[0]]}: no image in it can be read")
    return Listing(
        folder=folder,
        classes=tuple(listing.classes),
        paths=tuple(path for path, _, _ in good),
        labels=tuple(label for _, label, _ in good),
        sizes=np.array([size for _, _, size in good], np.int64).reshape(-1, 2),
        skipped=tuple(f"{folder.name}/{path}" for path, _ in faults),
        ignored=tuple(ignored),
    )


def _spread(samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The samples in an order in which every prefix holds the classes evenly."""
    seen: dict[int, int] = {}
    keyed = []
    for file, label in samples:
        seen[label] = seen.get(label, 0) + 1
        keyed.append((seen[label], label, file))
    return [(file, label) for _, label, file in sorted(keyed)]


def _size(path: Path, decode: bool) -> tuple[int, int] | str:
    """Height and width of an image, else why it has none; `decode` reads it to its end."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error).replace(str(path), "it")


# --- class names ---------------------------------------------------------------------------------


def class_words(folder: str) -> str:
    """A folder's name as words: no underscores, no numbers in front, camel case apart.

    WordNet ids (n02123045) are looked up among timm's ImageNet classes; the first lemma is taken.
    """
    if _SYNSET.fullmatch(folder):
        return _lemmas().get(folder, folder)
    words = _CAMEL.sub(" ", _NUMBERED.sub("", folder).replace("_", " ").replace("-", " "))
    return " ".join(words.split()) or folder


@cache
def _lemmas() -> dict[str, str]:
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    return {
        synset: known.label_name_to_description(synset).split(",")[0]
        for synset in known.label_names()  # type: ignore[no-untyped-call]
    }


def read_class_names(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Names from a text file: a line a class in the order of the folders, or FOLDER: NAME lines.

    Raises:
        RichKDError: no such file, a folder that there is not, or too few or too many names.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RichKDError(f"cannot read --class-names {file}: {error}") from None
    lines = [line for line in lines if line]
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    if len(named) < len(lines):
        if len(lines) != len(folders):
            raise RichKDError(
                f"{file} has {len(lines)} names for {len(folders)} classes; write a name a line in "
                f"the order of the folders, or lines of FOLDER: NAME"
            )
        return tuple(lines)
    named = {folder.strip(): name.strip() for folder, name in named.items()}
    strange = sorted(named.keys() - {*folders})
    if strange:
        raise RichKDError(
            f"{file} names {strange[0]!r}, which is no folder of a class; "
            f"{nearest(strange[0], folders)}"
        )
    return tuple(named.get(folder) or class_words(folder) for folder in folders)


def suggest_image_size(sizes: NDArray[np.int64]) -> int:
    """The largest usual side that three quarters of the images have at least; 32 at the least."""
    shorter = sizes.min(1)
    for side in (224, 160, 128, 96, 64, 48):
        if np.quantile(shorter, 0.25) >= side:
            return side
    return 32

"""Entries of the manifest about images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class DecodingEntry(TypedDict):
    """How image files became RGB (see data/decoding.py)."""

    background: str  # #RRGGBB
    ranges: dict[str, list[float]]  # [black, white] by kind of file


class PixelsEntry(TypedDict):
    """Decoded photographs that are kept, reduced and end to end (see data/kept.py)."""

    side: int  # the shorter side of an image; smaller images are kept as they are
    images: int  # in a chunk; divides the block
    bytes: dict[str, int]  # of a chunk, by split: as many as the largest needs


def describe_splits(counts: Mapping[str, int]) -> str:
    """Return the sizes of the splits in words, e.g. `500 training and 10,000 test`."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *first, last = (f"{counts[split]:,} {word}" for split, word in words.items() if split in counts)
    return f"{', '.join(first)} and {last}"

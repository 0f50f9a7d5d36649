"""What the manifest of a cache records of image files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class DecodingEntry(TypedDict):
    """How image files became RGB (data/decoding.py)."""

    background: str  # #RRGGBB
    ranges: dict[str, list[float]]  # by kind of file: the values that are black and white


def describe_splits(counts: Mapping[str, int]) -> str:
    """The sizes of the splits in words, such as `500 training and 10,000 test`."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *first, last = (f"{counts[split]:,} {word}" for split, word in words.items() if split in counts)
    return f"{', '.join(first)} and {last}"

"""Entries of the manifest about images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class DecodingEntry(TypedDict):
    """How image files became RGB (see data/decoding.py)."""

    background: str  # #RRGGBB
    ranges: dict[str, list[float]]  # [black, white] by kind of file


def describe_splits(counts: Mapping[str, int]) -> str:
    """Return the sizes of the splits in words, e.g. `500 training and 10,000 test`."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *first, last = (f"{counts[split]:,} {word}" for split, word in words.items() if split in counts)
    return f"{', '.join(first)} and {last}"

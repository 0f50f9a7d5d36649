"""Boxes in photographs, in whole pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLEAN_SHARE = 7 / 8  # of a photograph's shorter side, in the clean view


def central_box(height: ArrayLike, width: ArrayLike, share: float) -> tuple[NDArray[np.int64], ...]:
    """Return top, left, height and width of the central square; `share` is of the shorter side."""
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    side = np.maximum(1, (np.minimum(height, width) * share).astype(np.int64))
    return (height - side) // 2, (width - side) // 2, side, side

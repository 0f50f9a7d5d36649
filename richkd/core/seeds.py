"""Derive seeds from other seeds."""

from __future__ import annotations

import numpy as np


def derive_seed(*numbers: int) -> int:
    """Return a seed that is independent for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

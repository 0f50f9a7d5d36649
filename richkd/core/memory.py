"""Measure the available memory, and process rows in slices to save it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROWS_AT_ONCE = 4096  # results do not depend on it


def available_memory() -> int:
    """Return the bytes that this process may still use on the machine or in its container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # not Linux
        return 4 * 2**30
    return min(free, _free_in_container(free))


def spans(count: int) -> Iterator[slice]:
    """Yield consecutive slices that cover 0 to `count`, `ROWS_AT_ONCE` at a time."""
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, count))


def _free_in_container(free: int, group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left below the container's limit; reclaimable page cache counts as free."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such limit
        return free

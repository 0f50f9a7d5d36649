"""How much memory this process may still take, and how to take little at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROWS_AT_ONCE = 4096  # no result depends on it


def available_memory() -> int:
    """Bytes: of the machine, or of the container that this process is in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # no Linux
        return 4 * 2**30
    return min(free, _free_in_container(free))


def spans(count: int) -> Iterator[slice]:
    """0 to `count` in parts, so that what is made of one part stays small beside all the rows."""
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, count))


def _free_in_container(free: int, group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the limit of a container leaves, pages of files that can be dropped included."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such limit
        return free

"""The CPUs that this process may use; os.cpu_count() counts all of the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus(
    assigned: int | None = None, membership: Path = MEMBERSHIP, groups: Path = CGROUPS
) -> int:
    """Return the number of CPUs that this process may use: its affinity, limited by its quota.

    A batch system or `taskset` sets the affinity, `docker run --cpus` or Kubernetes the quota of
    the control group. A fraction of a CPU counts as one.

    Args:
        assigned: the size of the affinity mask, if known.
        membership: the file that names the process's control groups.
        groups: the folder in which control groups are mounted.
    """
    return max(1, min([assigned or assigned_cpus(), *map(math.ceil, _quotas(membership, groups))]))


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads; pending work is cancelled when the block ends."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def assigned_cpus() -> int:
    """Return the number of CPUs in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(membership: Path, groups: Path) -> Iterator[float]:
    """Yield the CPU quotas of this process's control groups (v1 and v2) and of their parents.

    In a container the paths may be those of the host.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            for folder in _with_parents(groups, group):
                yield from _quota(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for mount in (groups / controllers, groups / "cpu"):
                for folder in _with_parents(mount, group):
                    yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _with_parents(mount: Path, group: str) -> list[Path]:
    folder = mount / group.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _quota(*files: Path) -> Iterator[float]:
    """Yield quota divided by period; `max` and -1 mean that there is no limit."""
    try:
        quota, period = " ".join(file.read_text(encoding="ascii") for file in files).split()
        if float(quota) > 0 and float(period) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError):
        return

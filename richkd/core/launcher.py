"""What torchrun tells a process about its job, by environment variables; PyTorch is not needed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from richkd.core.errors import RichKDError

# Besides TORCHELASTIC_*.
LAUNCHER = re.compile("((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)")
SHARED = ("precompute", "add-teacher", "distill")  # the commands that several processes share
_met: list[bool] = []  # not empty once this process has joined its job


def is_first() -> bool:
    """Return whether this is the process of its job that prints and decides."""
    return processes() == 1 or os.environ.get("RANK") == "0"


def reports(code: str) -> bool:
    """Return whether this process prints an error of this code, or an interruption (code "").

    What all processes find before they meet, or stop for together, is said once on each machine.
    """
    together = not _met or code in ("", "rank-zero-failed")
    return number("LOCAL_RANK", 0) == 0 or not (together and processes() > 1)


def processes_here() -> int:
    """Return the number of processes of the job on this machine, which share its CPUs."""
    return number("LOCAL_WORLD_SIZE", 1) if processes() > 1 else 1


def check_processes(command: str) -> None:
    """Raise RichKDError if several processes were started for a command that runs in one."""
    if processes() > 1 and command and command not in SHARED:
        raise RichKDError(
            f"{command} runs in one process, but was started in {processes()}; start it without "
            f"torchrun, which is for {', '.join(SHARED)}",
            code="command-of-one-process",
        )


def meet() -> None:
    """Note that this process has joined its job: from now on its errors may be its own."""
    _met.append(True)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those that torchrun sets."""
    return {
        name: value
        for name, value in environment.items()
        if not LAUNCHER.fullmatch(name) and not name.startswith("TORCHELASTIC_")
    }


def processes() -> int:
    """Return the number of processes of the job, from the launcher's environment variables."""
    return number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def number(name: str, otherwise: int) -> int:
    """Return an environment variable as a number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise

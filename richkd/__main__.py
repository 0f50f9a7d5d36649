"""Set up the process of `richkd` and `python -m richkd`: signals, standard streams and OpenMP.

This happens before anything heavy is imported. The commands are in cli.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import MutableMapping, Sequence
from typing import NoReturn

from richkd.core import cpus, streams
from richkd.core import interrupts as interrupt

# Commands that resume when they are rerun.
RESUMED = {"demo", "train-teacher", "precompute", "add-teacher", "distill", "sweep", "run"}
NARROW = 60  # columns


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    streams.prepare()
    prepare_threads()
    if shutil.get_terminal_size().columns < NARROW:
        os.environ.setdefault("TYPER_USE_RICH", "0")  # its columns would cut the names of flags
    interrupt.ignore_signals_at_exit()
    try:
        with interrupt.interruptible(closing_line(sys.argv[1:])):
            from richkd.cli import execute

            code = streams.flushed(execute(sys.argv[1:]))
    except interrupt.Interrupted as interrupted:
        code = streams.flushed(streams.fail(str(interrupted), interrupted.exit_code))
    interrupt.exit_process(code)


def closing_line(arguments: Sequence[str]) -> str:
    """Return what to print if a command is interrupted and has no message of its own."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return interrupt.RESUMES if command in RESUMED else "interrupted; rerun it from the start"


def prepare_threads(
    environment: MutableMapping[str, str] = os.environ,
    assigned: int | None = None,
    usable: int | None = None,
) -> None:
    """Tell OpenMP, before PyTorch loads it, how many threads to use and how they wait.

    By default a thread of GNU OpenMP spins for about a millisecond before it sleeps; beside one
    other busy process on two CPUs, a training step then takes five times as long. Spinning for a
    few microseconds costs a few per cent of a step on an idle machine. OpenMP also ignores the CPU
    quota of a container.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    usable = usable or cpus.usable_cpus()
    if usable < (assigned or cpus.assigned_cpus()):
        environment.setdefault("OMP_NUM_THREADS", str(usable))


if __name__ == "__main__":
    main()

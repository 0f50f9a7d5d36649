"""Measure how long commands take to start, against the imports that they need.

`distill` is timed to its first training step, the others to their end, on a small cache. The bare
imports are timed in a typer command that does nothing else. Every round runs both, in separate
processes; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from richkd.core.versions import versions
from richkd.training.device import choose_device, hardware

# Exits when a network is called in training mode for the first time.
TO_THE_FIRST_STEP = """
import os
from torch.nn.modules.module import register_module_forward_pre_hook
register_module_forward_pre_hook(lambda module, _: os._exit(0) if module.training else None)
from richkd.__main__ import main
main()
"""
BARE = """
import typer
def command(argument: str) -> None:
    import rich.console, rich.table
    {needed}
typer.run(command)
"""
# PyTorch imports its compiler to make an optimizer, and to count operations.
FOR_REPORT = """import jinja2, torch, plotly.graph_objects
    from torch.utils.flop_counter import FlopCounterMode
    plotly.graph_objects.Figure()
    with FlopCounterMode(display=False):
        torch.zeros(1) + 1"""
FOR_DISTILL = """import os, torch, zarr
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    os._exit(0)"""


@dataclass(frozen=True)
class Case:
    """A command, and the statements that import what it needs."""

    name: str
    needed: str
    command: tuple[str, ...]


def richkd(words: str, *paths: str) -> tuple[str, ...]:
    """Return a command line of words, and paths that may contain spaces."""
    return (sys.executable, "-m", "richkd", *words.split(), *paths)


def cases(folder: Path) -> list[Case]:
    """Write a cache and a run to the folder, and return the commands to time."""
    teacher, store, runs = (str(folder / name) for name in ("t.safetensors", "s.zarr", "runs"))
    data = "--dataset shapes --limit 200"
    stage_one = f"precompute {data} --teacher resnet8 --clip none --views 2 --teacher-weights"
    student = "distill --student resnet8 --method kd --epochs 1 --cache"
    for command in (
        richkd(f"train-teacher {data} --model resnet8 --epochs 1 --out", teacher),
        richkd(stage_one, teacher, "--out", store),
        richkd(student, store, "--out", f"{runs}/kd"),
    ):
        subprocess.run(command, check=True, capture_output=True)
    begun = (*student.split(), store, "--out", str(folder / "begun"))
    return [
        Case("--help", "pass", richkd("--help")),
        Case("inspect", "import zarr", richkd("inspect", store)),
        Case("verify", "import zarr, torch", richkd("verify", store)),
        Case("report", FOR_REPORT, richkd("report", runs)),
        Case("distill", FOR_DISTILL, (sys.executable, "-c", TO_THE_FIRST_STEP, *begun)),
    ]


def seconds(*command: str) -> float:
    """Return how long a command runs, which has to succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


@dataclass
class Rounds:
    """The seconds of each round."""

    bare: list[float]
    command: list[float]

    @property
    def ratio(self) -> float:
        """The median ratio of command to bare imports."""
        return median(c / b for b, c in zip(self.bare, self.command, strict=True))


def measure(case: Case, rounds: int) -> Rounds:
    """Time bare imports and command in turn, after a round to warm up."""
    bare = sys.executable, "-c", BARE.format(needed=case.needed), "argument"
    pairs = [(seconds(*bare), seconds(*case.command)) for _ in range(rounds + 1)]
    return Rounds(*map(list, zip(*pairs[1:], strict=True)))


def main() -> None:
    """Print the table, and write all rounds as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", help="comma-separated, e.g. inspect,distill")
    parser.add_argument("--json", type=Path, help="file for the seconds of every round")
    options = parser.parse_args()
    print("| command | bare imports, s | command, s | ratio |\n|---|---|---|---|")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            if options.commands and case.name not in options.commands.split(","):
                continue
            found = measure(case, options.rounds)
            figures = median(found.bare), median(found.command), found.ratio
            print(f"| {case.name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
            results[case.name] = {"needed": case.needed, "ratio": found.ratio, **asdict(found)}
    if options.json:
        machine = {"hardware": hardware(choose_device("cpu")), "versions": versions()}
        content = json.dumps({**machine, "commands": results}, indent=2)
        options.json.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

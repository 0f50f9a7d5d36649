"""Make the table of students under corruptions from `richkd evaluate --corruptions`.

    cd runs/methods/runs
    richkd evaluate KD-s* CE-s* RichKD-L-native-scale-s* RichKD-L+F-native-scale-s* --corruptions \\
        --limit 1000 --cache CACHE --out EVALUATION
    python benchmarks/students.py EVALUATION/comparison.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference

SCORES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "top-1": lambda run: run["top1"],
    "ECE": lambda run: run["ece"],
    "confident, right": lambda run: run["confident_correct"],
    "confident, wrong": lambda run: run["confident_wrong"],
    "corrupted top-1": lambda run: 1 - run["corruptions"]["mean_error"],
}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return mean ± standard deviation by method, and differences to KD paired by seed."""
    methods: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        methods.setdefault(run["method"], {})[run["seed"]] = run
    lines = [f"| method | n | {' | '.join(SCORES)} |", f"|{'---|' * (len(SCORES) + 2)}"]
    for method, by_seed in methods.items():
        cells = [
            mean_std(mean_and_std([score(run) for run in by_seed.values()]))
            for score in SCORES.values()
        ]
        lines.append(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    lines += ["", f"| minus KD | {' | '.join(SCORES)} |", f"|{'---|' * (len(SCORES) + 1)}"]
    for method, by_seed in methods.items():
        if method != "kd":
            cells = [
                minus_kd(
                    paired_difference(
                        [score(run) - score(methods["kd"][seed]) for seed, run in by_seed.items()]
                    )
                )
                for score in SCORES.values()
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path)
    print(table(json.loads(parser.parse_args().comparison.read_text())["runs"]))


if __name__ == "__main__":
    main()

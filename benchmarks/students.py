"""Make the table of students under corruption from `richkd evaluate --corruptions`.

    cd runs/methods/runs
    richkd evaluate KD-s* CE-s* RichKD-L-native-scale-s* RichKD-L+F-native-scale-s* --corruptions \\
        --limit 1000 --cache STORE --out EVALUATION
    python benchmarks/students.py EVALUATION/comparison.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference

SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "top-1": lambda run: run["top1"],
    "ECE": lambda run: run["ece"],
    "confident, right": lambda run: run["confident_correct"],
    "confident, wrong": lambda run: run["confident_wrong"],
    "corrupted top-1": lambda run: 1 - run["corruptions"]["mean_error"],
}


def main() -> None:
    """Print mean ± standard deviation by method, and differences to KD paired by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path)
    runs = json.loads(parser.parse_args().comparison.read_text())["runs"]
    methods: dict[str, dict[int, Any]] = {}
    for run in runs:
        methods.setdefault(run["method"], {})[run["seed"]] = run
    print(f"| method | n | {' | '.join(SCORES)} |\n|{'---|' * (len(SCORES) + 2)}")
    for method, by_seed in methods.items():
        cells = [
            mean_std(mean_and_std([score(run) for run in by_seed.values()]))
            for score in SCORES.values()
        ]
        print(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    print()
    for method, by_seed in methods.items():
        for name, score in SCORES.items() if method != "kd" else ():
            pairs = [score(run) - score(methods["kd"][seed]) for seed, run in by_seed.items()]
            print(f"{method} − kd, {name}: {minus_kd(paired_difference(pairs))}")


if __name__ == "__main__":
    main()

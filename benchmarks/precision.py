"""Compare ways to run training steps: their accuracy and speed against eager float32.

    python benchmarks/precision.py CACHE --out runs/precision
    python benchmarks/precision.py CACHE --out runs/gpu --modes eager/float32,captured/bfloat16

Each mode is a sweep over the same seeds, so differences to the first mode are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference
from richkd.core.files import write
from richkd.core.versions import versions
from richkd.training.device import choose_device, hardware

MODES = "eager/float32,compiled/float32,eager/bfloat16,compiled/bfloat16"


def main() -> None:
    """Train the students that are missing, and write precision.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", default=MODES, help="comma-separated STEP/PRECISION")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    runs = {mode: train(mode, options) for mode in options.modes.split(",")}
    result = {
        "hardware": hardware(choose_device(options.device)),
        "versions": versions(),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "precision.json", json.dumps(result, indent=1) + "\n")
    print(table(runs))


def train(mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and return the runs of one mode, by seed."""
    step, precision = mode.split("/")
    words = [
        sys.executable,
        "-m",
        "richkd",
        "sweep",
        "--cache",
        options.store,
        "--students",
        options.student,
        "--methods",
        options.method,
        "--seeds",
        options.seeds,
        "--epochs",
        options.epochs,
        "--eval-every",
        options.epochs,
        "--step",
        step,
        "--precision",
        precision,
        "--device",
        options.device,
        "--out",
        options.out / mode.replace("/", "-"),
        "--json",
    ]
    done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    found = sorted(json.loads(done.stdout)["runs"], key=lambda run: run["seed"])
    keys = ("seed", "top1_last", "seconds", "images_per_second", "step")
    return [{key: run[key] for key in keys} for run in found]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return accuracy, paired difference to the first mode, and speed, in Markdown."""
    first = next(iter(runs.values()))
    lines = [
        "| steps | n | top-1, % | difference [95 %], points | images/s |",
        "|---|---|---|---|---|",
    ]
    for mode, each in runs.items():
        top1 = mean_std(mean_and_std([run["top1_last"] for run in each]))
        pairs = [a["top1_last"] - b["top1_last"] for a, b in zip(each, first, strict=True)]
        gap = "" if each is first else minus_kd(paired_difference(pairs))
        pace, _ = mean_and_std([run["images_per_second"] for run in each])
        ran = {run["step"] for run in each}
        name = mode if ran == {mode.partition("/")[0]} else f"{mode} (ran {', '.join(sorted(ran))})"
        lines.append(f"| {name} | {len(each)} | {top1} | {gap} | {pace:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Train students by each method and target from one cache, and compare them.

Every run holds out a fifth of the test images, on which `--alpha auto` chooses its blend, and is
tested on the others. Differences to KD are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference
from richkd.config.settings import Distill
from richkd.core.files import write
from richkd.core.progress import percent
from richkd.core.versions import versions
from richkd.distill import distill

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "CE": {"method": "ce"},
    "KD": {"method": "kd"},
    "KD, `--target fused`": {"method": "kd", "target": "fused"},
    "DKD (warm-up 3 epochs)": {"method": "dkd", "options": {"dkd": {"warmup": 3}}},
    "DKD, `--target fused`": {
        "method": "dkd",
        "target": "fused",
        "options": {"dkd": {"warmup": 3}},
    },
    "CRD": {"method": "crd"},
    "RichKD L, native scale": {"method": "richkd-l"},
    "RichKD L, raw": {"method": "richkd-l", "scale": "raw"},
    "RichKD L, probe": {"method": "richkd-l", "clip_head": "probe"},
    "RichKD L, `--alpha auto`": {"method": "richkd-l", "alpha": "auto"},
    "RichKD L, probe, `--alpha auto`": {
        "method": "richkd-l",
        "clip_head": "probe",
        "alpha": "auto",
    },
    "RichKD F": {"method": "richkd-f"},
    "RichKD L+F, native scale": {"method": "richkd"},
    "RichKD L+F, raw": {"method": "richkd", "scale": "raw"},
    "RichKD L+F, probe": {"method": "richkd", "clip_head": "probe"},
}


def run_name(name: str, seed: int) -> str:
    """Return the name of the run folder of a configuration and seed."""
    words = "".join(c if c.isalnum() or c in "+-" else " " for c in name).split()
    return f"{'-'.join(words)}-s{seed}"


def train(job: tuple[argparse.Namespace, str, int]) -> str:
    """Train one student, unless it is trained already, and return its name."""
    options, name, seed = job
    torch.set_num_threads(options.threads)
    folder = options.out / "runs" / run_name(name, seed)
    if not (folder / "summary.json").is_file():
        distill(
            Distill(
                cache=str(options.store),
                student=options.student,
                seed=seed,
                holdout=0.2,
                epochs=options.epochs,
                eval_every=options.epochs,
                schedule=options.schedule,
                device=options.device,
                out=str(folder),
                **CONFIGURATIONS[name],
            ),
            resume=True,
        )
    return folder.name


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return mean ± standard deviation of each configuration, and its difference to KD.

    Args:
        results: summaries of runs, with the names of their folders under `run`.
    """
    by_name = {result["run"]: result for result in results}
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name in CONFIGURATIONS:
        for seed in sorted({result["seed"] for result in results}):
            if run_name(name, seed) in by_name:
                found.setdefault(name, {})[seed] = by_name[run_name(name, seed)]
    lines = ["| method | n | target's top-1 | student's top-1, % | − KD |", f"|{'---|' * 5}"]
    for name, runs in found.items():
        target = next(iter(runs.values()))["target"]
        reads_logits = target is not None and not name.startswith("RichKD F")
        top1 = {seed: run["top1_last"] for seed, run in runs.items()}
        kd = {seed: run["top1_last"] for seed, run in found.get("KD", {}).items()}
        pairs = [top1[seed] - kd[seed] for seed in top1 if seed in kd]
        difference = "" if name == "KD" else minus_kd(paired_difference(pairs))
        accuracy = mean_std(mean_and_std([*top1.values()]))
        cells = (name, len(runs), percent(target["top1"]) if reads_logits else "", accuracy)
        lines.append(f"| {' | '.join(map(str, cells))} | {difference} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the students that are missing, and write methods.json and methods.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    jobs = [(options, name, seed) for seed in range(options.seeds) for name in CONFIGURATIONS]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for done, name in enumerate(pool.imap_unordered(train, jobs), 1):
            print(f"{done}/{len(jobs)} {name}", flush=True)
    runs = [
        json.loads(path.read_text()) for path in sorted(options.out.glob("runs/*/summary.json"))
    ]
    for run in runs:
        run["run"] = Path(run["run"]).name
    settings = {**vars(options), "store": options.store.name, "out": ""}
    found = {"settings": settings, "versions": versions(), "runs": runs}
    write(options.out / "methods.json", json.dumps(found) + "\n")
    write(options.out / "methods.md", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

"""Measure what blends of several teachers teach: two CNNs, a CNN and CLIP, and all three.

The students' 2,000 images are Fashion-MNIST's first, with 500 more for choices. Each CNN teacher
learned from one half of the 2,000, so it knows the other half only as it knows new images; CLIP
learned from captions of other images. Differences are paired by seed, to KD from the first CNN.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference
from richkd.config.settings import Distill, Images, Precompute, TrainTeacher
from richkd.core.files import write
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.data.datasets import Dataset, load_dataset
from richkd.distill import distill
from richkd.precompute import add_teacher, precompute
from richkd.store.reader import open_cache
from richkd.store.schema import teacher_accuracies
from richkd.teachers.cnn import train_teacher
from richkd.training.device import hardware

IMAGES = {"dataset": "fashion-mnist", "limit": 2500, "validation": 0.2}
CACHE, EPOCHS, REFERENCE = "three.zarr", 20, "KD from A"
TEACHERS = {"A": "resnet20", "B": "wrn_16_1"}
THIRD = 1 / 3
# what a student learns from: its method and the settings of its target
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "labels alone": {"method": "ce"},
    REFERENCE: {"method": "kd"},
    "KD from B": {"method": "kd", "target": "B"},
    "KD from CLIP": {"method": "kd", "target": "clip"},
    "KD from A + B": {"weights": {"cnn": 0.5, "B": 0.5, "clip": 0.0}},
    "KD from A + CLIP": {"weights": {"cnn": 0.5, "B": 0.0, "clip": 0.5}},
    "KD from A + B + CLIP": {"weights": {"cnn": THIRD, "B": THIRD, "clip": THIRD}},
    "KD from A + B + CLIP, weights auto": {"weights": "auto"},
    "AVER": {"method": "aver"},
    "EBKD": {"method": "ebkd"},
    "CA-MKD, logits": {"method": "ca-mkd"},
}


def half_of(dataset: Dataset, second: bool) -> Dataset:
    """Return the dataset with one half of its training images."""
    count = len(dataset.train) // 2
    half = slice(count, None) if second else slice(0, count)
    return replace(dataset, train=dataset.train.take(half))


def make_cache(report: Report) -> None:
    """Train the three teachers and write their cache to the current folder."""
    from fashion_mnist import train_clip

    dataset = load_dataset(Images(**IMAGES))
    for number, (name, model) in enumerate(TEACHERS.items()):
        settings = TrainTeacher(
            dataset="fashion-mnist",
            model=model,
            epochs=60,
            eval_every=60,
            out=f"{name}.safetensors",
        )
        train_teacher(settings, half_of(dataset, second=number == 1), report)
    if not Path("clip").is_dir():
        train_clip(Path("clip"), first=20_000, last=26_000, epochs=4)
    settings_of = {"teacher": TEACHERS["A"], "teacher_weights": "A.safetensors", "clip": "clip"}
    precompute(Precompute(**IMAGES, **settings_of, views=EPOCHS, out=CACHE), report=report)
    given = {"teacher": TEACHERS["B"], "teacher_weights": "B.safetensors"}
    add_teacher(CACHE, given, name="B", report=report)


def settings_for(name: str, seed: int) -> Distill:
    """Return the settings of a run."""
    given = {"method": "kd", "eval_every": EPOCHS, **CONFIGURATIONS[name]}
    if "weights" in given:
        given["target"] = "fused"
    folder = f"runs/{name.replace(' ', '-').replace(',', '')}-s{seed}"
    return Distill(cache=CACHE, student="resnet8", epochs=EPOCHS, seed=seed, out=folder, **given)


def table(runs: list[dict[str, Any]]) -> str:
    """Return test accuracy by configuration, and its difference to KD from the first CNN."""
    top1 = {(run["configuration"], run["seed"]): run["top1"] for run in runs}
    target = {run["configuration"]: run["target"] for run in runs}
    lines = ["| student learns from | target, % | n | student, % | − KD from A [95 %] |"]
    lines.append("|---|---|---|---|---|")
    for name in CONFIGURATIONS:
        own = {seed: value for (other, seed), value in top1.items() if other == name}
        pairs = [value - top1[REFERENCE, s] for s, value in own.items() if (REFERENCE, s) in top1]
        if not own:
            continue
        less = "" if name == REFERENCE else minus_kd(paired_difference(pairs))
        shown = f"{100 * target[name]:.2f}" if target[name] is not None else ""
        accuracy = mean_std(mean_and_std([*own.values()]))
        lines.append(f"| {name} | {shown} | {len(own)} | {accuracy} | {less} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the cache, the runs that are missing, several-teachers.json and .md to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    torch.set_num_threads(1)
    report = Report()
    make_cache(report)
    cache = open_cache(CACHE)
    runs = []
    for seed in range(options.seeds):
        for name in CONFIGURATIONS:
            summary = distill(settings_for(name, seed), report=Report(quiet=True))
            target = summary["target"]
            runs.append(
                {
                    "configuration": name,
                    "seed": seed,
                    "top1": summary["top1_last"],
                    "target": target and target["top1"],
                    "weights": target and target.get("weights"),
                    "seconds": summary["seconds"],
                }
            )
            report.log(f"{name}, seed {seed}: {100 * summary['top1_last']:.2f} %")
    found = {
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "epochs": EPOCHS,
        "images": IMAGES,
        "teachers": {
            **teacher_accuracies(cache.manifest),
            "B": teacher_accuracies(cache.addition("B").manifest)["cnn"],
        },
        "settings": {k: asdict(settings_for(k, 0)) for k in CONFIGURATIONS},
        "runs": runs,
    }
    write(Path("several-teachers.json"), json.dumps(found, indent=1) + "\n")
    write(Path("several-teachers.md"), table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

"""Measure what several views of one decode cost in accuracy, against one view of each decode.

    python benchmarks/crops_per_decode.py runs/crops

Fashion-MNIST is enlarged and written as JPEG files, whose views are random resized crops. Students
of one seed start from the same weights and, over a few epochs, see the same views of the same
images, so differences are paired by seed. Two orders are compared: `spread`, that of richkd, in
which the views of an image come a few batches apart, and `together`, in which they follow each
other.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference
from richkd.config.settings import Distill, Images, Precompute, TrainTeacher
from richkd.core.files import write
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.data.datasets import load_dataset
from richkd.distill import distill
from richkd.precompute import precompute
from richkd.teachers.cnn import train_teacher
from richkd.training import loop

SIDE = 24  # of the networks' input
ONE = "1"
CASES = (ONE, "2 spread", "4 spread", "4 together")


def write_folder(folder: Path, images: Any, labels: Any, names: tuple[str, ...]) -> None:
    """Write images as JPEG files of 44 to 64 pixels a side, in a folder a class."""
    rng = np.random.default_rng(0)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / names[int(label)].replace("/", "-")
        place.mkdir(parents=True, exist_ok=True)
        width, height = map(int, rng.integers(44, 65, 2))
        photo = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.BICUBIC)
        photo.save(place / f"{number}.jpg", quality=90)


def balanced(labels: Any) -> Any:
    """Return a random order of images of which every part has about as many of each class."""
    order = np.random.default_rng(1).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels[order] == label] = np.arange(np.count_nonzero(labels == label))
    return order[turn.argsort(kind="stable")]


def prepare(options: argparse.Namespace) -> Path:
    """Write the folders, train the teacher and write the cache, unless they are there."""
    out, report = options.out, Report()
    if not (out / "written").is_file():
        found = load_dataset(Images(dataset="fashion-mnist"))
        train, test = found.train, found.test
        order = balanced(train.labels.numpy())
        tested = balanced(test.labels.numpy())[: options.tested]
        for name, count in (("student", options.images), ("teacher", options.teacher_images)):
            which, order = order[:count], order[count:]
            for split, of, some in (("train", train, which), ("test", test, tested)):
                data = of.images[some], of.labels[some]
                write_folder(out / name / split, *data, found.class_names)
        write(out / "written", "")
    weights = out / "teacher.safetensors"
    common: dict[str, Any] = {"image_size": SIDE, "device": "cpu"}
    if not weights.is_file():
        dataset = f"imagefolder:{out / 'teacher'}"
        epochs = options.teacher_epochs
        settings = TrainTeacher(
            dataset=dataset,
            model="resnet14",
            epochs=epochs,
            eval_every=epochs,
            out=str(weights),
            **common,
        )
        train_teacher(settings, load_dataset(settings), report)
    cache = precompute(
        Precompute(
            dataset=f"imagefolder:{out / 'student'}",
            teacher="resnet14",
            teacher_weights=str(weights),
            clip="none",
            views=options.views,
            out=str(out / "cache.zarr"),
            **common,
        ),
        report=report,
    )
    return Path(cache.path)


def train(options: argparse.Namespace, cache: Path, run: tuple[int, str, str]) -> dict[str, Any]:
    """Train one student; return its test accuracy after the last epoch."""
    seed, method, case = run
    each, _, order = case.partition(" ")
    usual = loop.choose_lag
    if order == "together":
        loop.choose_lag = lambda *_: 0
    try:
        summary = distill(
            Distill(
                cache=str(cache),
                student="resnet8",
                method=method,
                seed=seed,
                epochs=options.epochs,
                eval_every=options.epochs,
                batch_size=options.batch_size,
                crops_per_decode=int(each),
                device="cpu",
                out=str(options.out / "students" / f"{method}-{case.replace(' ', '-')}-s{seed}"),
            )
        )
    finally:
        loop.choose_lag = usual
    kept = ("top1_last", "seconds", "image_wait_s", "hardware")
    return {"method": method, "case": case, "seed": seed, **{name: summary[name] for name in kept}}


def table(runs: list[dict[str, Any]]) -> str:
    """Return the accuracies, and the differences to one view of each decode, paired by seed."""
    found = {(run["method"], run["case"], run["seed"]): run["top1_last"] for run in runs}
    lines = [
        "| method, views of a decode | n | top-1, % | minus 1 view [95 %] |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(method for method, _, _ in found):
        for case in CASES:
            top1 = {s: a for (m, c, s), a in found.items() if (m, c) == (method, case)}
            if not top1:
                continue
            pairs = [
                accuracy - found[method, ONE, seed]
                for seed, accuracy in top1.items()
                if (method, ONE, seed) in found
            ]
            minus = "" if case == ONE else minus_kd(paired_difference(pairs))
            accuracy = mean_std(mean_and_std([*top1.values()]))
            lines.append(f"| {method}, {case} | {len(top1)} | {accuracy} | {minus} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the students that are missing, and write crops-per-decode.json and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--tested", type=int, default=1000)
    parser.add_argument("--teacher-images", type=int, default=3000)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--methods", default="kd")
    options = parser.parse_args()
    cache = prepare(options)
    runs: list[dict[str, Any]] = []
    for run in product(range(options.seeds), options.methods.split(","), CASES):
        runs.append(train(options, cache, run))
        print(run, f"{100 * runs[-1]['top1_last']:.2f} %", flush=True)
    settings = {**vars(options), "out": ""}
    found = {"settings": settings, "versions": versions(), "runs": runs}
    write(options.out / "crops-per-decode.json", json.dumps(found) + "\n")
    write(options.out / "crops-per-decode.md", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

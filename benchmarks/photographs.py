"""Time epochs of photographs: plain torchvision training and richkd's, alternating in one process.

    python benchmarks/photographs.py runs/photographs
    python benchmarks/photographs.py runs/photographs-gpu --student timm/resnet50 --side 224 \\
        --batch-size 128 --device cuda

Plain training is torchvision's ImageFolder, random resized crop and flip in a DataLoader, with
cross-entropy on labels. richkd's students learn by KD from a cache. All have the same files, number
of workers, student, batch size and optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import richkd
from richkd.config.settings import Distill, Precompute
from richkd.core.cpus import usable_cpus
from richkd.core.files import write
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.data.inputs import FileInputs, Normalize
from richkd.models.weights import save_tensors
from richkd.precompute import precompute
from richkd.training.data import timed
from richkd.training.device import cuda, hardware, wait_for
from richkd.training.source import Source
from richkd.training.student import with_defaults

PLAIN = "plain training"
KEPT, DRAFT = "kept pixels", "drafts"
CASES: dict[str, dict[str, Any]] = {
    "1 view of each decode": {"decode": "exact"},
    "2 views": {"decode": "exact", "crops_per_decode": 2},
    "4 views": {"decode": "exact", "crops_per_decode": 4},
    DRAFT: {"decode": "draft"},
    f"4 views, {DRAFT}": {"decode": "draft", "crops_per_decode": 4},
    KEPT: {"decode": "auto"},
    f"4 views, {KEPT}": {"decode": "auto", "crops_per_decode": 4},
}
DEFAULT = tuple(name for name in CASES if name != "2 views")
Epoch = Callable[[int], tuple[float, float]]  # epoch -> seconds, and those of waiting for images
CLASSES = 10


def write_photograph(number: int, path: Path, long_side: int) -> None:
    """Write a JPEG file with the spectrum of a photograph: fields of colour in many octaves."""
    rng = np.random.default_rng(number)
    short = int(long_side * rng.uniform(0.62, 0.8))
    width, height = (long_side, short) if rng.random() < 0.7 else (short, long_side)
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, 8):
        cells = rng.normal(0, 70 / octave, (2**octave, 2**octave, 3)).astype(np.float32)
        coarse = Image.fromarray((cells + 128).clip(0, 255).astype(np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR)) - 128.0
    pixels += rng.normal(0, 10, (height, width, 1)).astype(np.float32)  # grain
    pixels[..., number % 3] += 40
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def write_folder(folder: Path, count: int, long_side: int) -> Path:
    """Write `count` training images and a few test images, unless they are there."""
    if (folder / "written").is_file():
        return folder
    jobs = []
    for split, images in (("train", count), ("val", 2 * CLASSES)):
        for number in range(images):
            place = folder / split / f"class {number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            jobs.append((number, place / f"{number}.jpg", long_side))
    with ProcessPoolExecutor(usable_cpus()) as pool:
        list(pool.map(write_photograph, *zip(*jobs, strict=True), chunksize=50))
    write(folder / "written", "")
    return folder


def make_cache(options: argparse.Namespace, folder: Path, keep: bool) -> Path:
    """Write a cache of a teacher without training, whose outputs cost a student no less."""
    weights = options.out / "teacher.safetensors"
    if not weights.is_file():
        torch.manual_seed(0)
        save_tensors(weights, richkd.create_model("resnet8", CLASSES).state_dict())
    name = "kept.zarr" if keep else "cache.zarr"
    settings = {
        "dataset": f"imagefolder:{folder}",
        "image_size": options.side,
        "teacher": "resnet8",
        "teacher_weights": str(weights),
        "teacher_size": 32,
        "clip": "none",
        "views": 4,
        "device": options.device,
        "out": str(options.out / name),
        **({"keep_pixels": 2 * options.side} if keep else {}),
    }
    return Path(precompute(Precompute(**settings), report=Report()).path)


def plain(options: argparse.Namespace, folder: Path) -> Epoch:
    """Return an epoch of plain training."""
    device = torch.device(options.device)
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.side),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder / "train"), augment),
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=cuda(device),
    )
    torch.manual_seed(0)
    model = richkd.create_model(options.student, CLASSES)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=cuda(device) or None
    )
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), device)

    def epoch(_: int) -> tuple[float, float]:
        model.train()
        start, waiting = time.perf_counter(), 0.0
        for (images, labels), waited in timed(iter(loader)):
            waiting += waited
            pixels = images.to(device, non_blocking=True).permute(0, 2, 3, 1)
            wanted = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda(device)):
                logits = model(normalize(pixels))
            loss = F.cross_entropy(logits.float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        wait_for(device)
        return time.perf_counter() - start, waiting

    return epoch


def ours(options: argparse.Namespace, cache: Path, case: dict[str, Any]) -> Epoch:
    """Return an epoch of KD from a cache, without the evaluation after it."""
    known = {each.name for each in fields(Distill)}
    settings = Distill(
        cache=str(cache),
        student=options.student,
        method="kd",
        batch_size=options.batch_size,
        lr=0.01,
        epochs=1000,
        device=options.device,
        out=str(options.out / "run"),
        **{name: value for name, value in case.items() if name in known},
    )
    source = Source(settings, Report(quiet=True))
    settings = with_defaults(settings, source.cache)
    trainer, names, _ = source.trainer(settings)
    train = trainer.data.train
    assert isinstance(train, FileInputs)
    train.workers = options.workers
    epochs: Iterator[Any] = source.epochs(names.values(), 1, 1000)

    def epoch(number: int) -> tuple[float, float]:
        before, start = trainer.waited, time.perf_counter()
        shared, _ = next(epochs)
        for _ in trainer.steps(number, source.own(shared, names, 0, number)):
            pass
        assert trainer.runner is not None
        trainer.runner.join()
        wait_for(source.device)
        return time.perf_counter() - start, trainer.waited - before

    return epoch


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def table(runs: list[dict[str, Any]]) -> str:
    """Return the seconds of an epoch: medians, and their ratios to plain training by round."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["training"], []).append(run)
    plain = {run["round"]: run for run in found[PLAIN]}

    def ratios(rounds: list[dict[str, Any]], what: str) -> str:
        return median_std([run[what] / plain[run["round"]][what] for run in rounds])

    lines = [
        "| training | rounds | seconds an epoch | of them waiting for images | of plain training "
        "| CPU seconds | of plain training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        parts = (
            median_std([run["seconds"] for run in rounds]),
            median_std([run["image_wait_s"] for run in rounds]),
            "1" if name == PLAIN else ratios(rounds, "seconds"),
            median_std([run["cpu_s"] for run in rounds]),
            "1" if name == PLAIN else ratios(rounds, "cpu_s"),
        )
        lines.append(f"| {name} | {len(rounds)} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def median_std(values: list[float]) -> str:
    """Format a median and the standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def main() -> None:
    """Time the rounds, and write photographs.json and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--long-side", type=int, default=500, help="of the photographs")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--side", type=int, default=64, help="of the student's images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=min(8, usable_cpus()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", default=",".join(DEFAULT).replace(", ", " + "))
    options = parser.parse_args()
    folder = write_folder(options.out / "images", options.images, options.long_side)
    keeps = any(each.name == "keep_pixels" for each in fields(Precompute))
    names = [name.strip().replace(" + ", ", ") for name in options.cases.split(",")]
    if not keeps:
        names = [name for name in names if KEPT not in name and DRAFT not in name]
    caches = {keep: make_cache(options, folder, keep) for keep in {KEPT in name for name in names}}
    trained = {PLAIN: plain(options, folder)}
    trained |= {name: ours(options, caches[KEPT in name], CASES[name]) for name in names}
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds + 1):  # the first one warms up
        for name, epoch in trained.items():
            before = cpu_seconds()
            seconds, waited = epoch(number + 1)
            run = {
                "training": name,
                "round": number,
                "seconds": seconds,
                "image_wait_s": waited,
                "cpu_s": cpu_seconds() - before,
            }
            print(json.dumps(run), flush=True)
            runs += [run] if number else []
    settings = {**vars(options), "out": ""}
    found = {
        "settings": settings,
        "hardware": hardware(torch.device(options.device)),
        "versions": versions(),
        "runs": runs,
    }
    write(options.out / "photographs.json", json.dumps(found) + "\n")
    write(options.out / "photographs.md", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

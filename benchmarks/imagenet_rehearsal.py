"""Rehearse ImageNet at a small scale: 1,000 classes of drawn photographs through both stages.

    python benchmarks/imagenet_rehearsal.py runs/rehearsal

The folders, class names, recipe and commands are those of ImageNet; the photographs, the networks
and the CLIP are small ones, made here. The oddities of ImageNet's files are among the photographs:
grey and CMYK images, and a PNG that is called JPEG. Both stages run under torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from richkd.core.files import write
from richkd.core.versions import versions
from richkd.training.device import choose_device, hardware

RECIPE = "imagenet-resnet34-resnet18"
NETWORK = "test_resnet"  # timm's small ResNet, for the teacher and the student
SIDE = 64  # pixels that the networks see
TEST_PER_CLASS = 2
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def main(words: Sequence[str] | None = None) -> None:
    """Run every step, write the seconds of each as JSON, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for everything; complete steps are skipped")
    parser.add_argument("--json", type=Path, help="file for the results; by default in the folder")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=20, help="training images of a class")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = steps(options)
    checks = check(options)
    result = {
        "hardware": hardware(choose_device("cpu")),
        "versions": versions(),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "json"},
        "checks": checks,
        "runs": runs,
    }
    file = options.json or options.out / "imagenet-rehearsal.json"
    write(file, json.dumps(result, indent=1) + "\n")
    print(table(runs))


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the steps one after the other; return what each took."""
    out, classes, clip = options.out, options.classes, options.out / "clip"
    data = f"--recipe {RECIPE} --dataset imagefolder:{out / 'imagenet'} --image-size {SIDE}"
    teacher, cache, run = out / "teacher.safetensors", out / "imagenet.zarr", out / "run"
    networks = f"--teacher {NETWORK} --teacher-weights {teacher} --clip {clip}"
    rows = f"--views {options.epochs} --keep top-{min(50, classes // 2)} --features none"
    training = f"--epochs {options.epochs} --batch-size 250 --lr 0.1 --device cpu"
    commands = [
        (1, f"train-teacher {data} --model {NETWORK} {training} --out {teacher}"),
        (options.ranks, f"precompute {data} {networks} {rows} --device cpu --out {cache}"),
        (1, f"verify {cache} --teacher {teacher}"),
        (1, f"inspect {cache}"),
        (
            options.ranks,
            f"distill --recipe {RECIPE} --cache {cache} --student {NETWORK} --method richkd-l "
            f"{training} --milestones 1 --out {run}",
        ),
        (1, f"evaluate {run} --device cpu"),
    ]
    record = out / "steps.json"
    runs = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    actions = [partial(prepare, options), *(partial(timed, *command) for command in commands)]
    for action in actions[len(runs) :]:
        runs.append(action())
        write(record, json.dumps(runs))
    return runs


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the photographs and the CLIP; return what it took."""
    start = time.perf_counter()
    images = draw(options.out / "imagenet", options.classes, options.per_class)
    write_clip(options.out / "clip")
    return {"step": f"draw {images:,} photographs", "seconds": time.perf_counter() - start}


def timed(ranks: int, words: str) -> dict[str, Any]:
    """Run a command of richkd in so many processes; return what it took."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "richkd", *words.split()]
    print(f"+ {' '.join(command[1:])}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    name = words.split(maxsplit=1)[0]
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)  # of this process and those that it started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"richkd {name} failed")
    return {
        "step": f"{name}{f', {ranks} processes' if ranks > 1 else ''}",
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss,  # of the largest process
    }


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the cache and the run hold; fail if it is not what they should."""
    import richkd

    cache = richkd.open_cache(options.out / "imagenet.zarr")
    names = cache.manifest["class_names"]
    entry = cache.manifest["dataset"]
    summary = json.loads((options.out / "run/summary.json").read_text(encoding="utf-8"))
    assert len({name.casefold() for name in names}) == len(names) == options.classes
    assert entry["num_train"] == options.classes * options.per_class
    assert cache.text_embeddings.shape == (options.classes, 12, CLIP["embed_dim"])
    return {
        "class_names": names[:8],
        "num_train": entry["num_train"],
        "num_test": entry["num_test"],
        "texts": 12 * len(names),
        "cache_bytes": sum(cache.location.sizes().values()),
        "top1_last": summary["top1_last"],
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table of the documentation."""
    total = sum(run["seconds"] for run in runs)
    lines = [
        f"| {run['step']} | {run['seconds']:.0f} | "
        + (f"{run['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in run else "")
        + " |"
        for run in [*runs, {"step": "together", "seconds": total}]
    ]
    return "\n".join(["| step | seconds | largest process, GiB |", "|---|---|---|", *lines])


# --- images and networks -------------------------------------------------------------------------


def draw(folder: Path, classes: int, per_class: int) -> int:
    """Write train/ and val/ with a folder per WordNet ID; return the number of images."""
    from timm.data import ImageNetInfo

    synsets = sorted(ImageNetInfo().label_names())[:classes]
    with ProcessPoolExecutor() as pool:
        made = partial(draw_class, folder, per_class)
        return sum(pool.map(made, range(classes), synsets, chunksize=10))


def draw_class(folder: Path, per_class: int, number: int, synset: str) -> int:
    """Write the images of one class, each with its colours and its own arrangement of them."""
    palette = np.random.default_rng(number).integers(0, 256, (4, 3), np.uint8)
    for split, count in (("train", per_class), ("val", TEST_PER_CLASS)):
        (folder / split / synset).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            rng = np.random.default_rng([number, index, split == "val"])
            name = folder / split / synset / f"{synset}_{index}.JPEG"
            image = photograph(palette, rng)
            if (number, index) == (0, 0):
                image.save(name, format="PNG")  # ImageNet has one such file
            else:
                mode = {1: "L", 2: "CMYK"}.get(int(rng.integers(100)), "RGB")
                image.convert(mode).save(name, quality=int(rng.integers(70, 96)))
    return per_class + TEST_PER_CLASS


def photograph(palette: np.ndarray[Any, Any], rng: np.random.Generator) -> Image.Image:
    """Draw fields of a palette's colours in some light, with grain, in any size."""
    width, height = map(int, rng.integers(120, 320, 2))
    cells = palette[rng.integers(0, len(palette), rng.integers(3, 9, 2))]
    smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    light = rng.uniform(0.6, 1.2) * np.linspace(rng.uniform(0.7, 1), 1, width)[:, None]
    grain = rng.normal(0, 8, (height, width, 1))
    pixels = np.asarray(smooth) * light + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_clip(folder: Path) -> Path:
    """Write a small CLIP of random weights to a directory; it has a real text tower."""
    import open_clip
    import torch

    from richkd.models.weights import save_tensors

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    config = {"model_cfg": CLIP, "preprocess_cfg": preprocess}
    write(folder / "open_clip_config.json", json.dumps(config))
    save_tensors(folder / "open_clip_model.safetensors", open_clip.CLIP(**CLIP).state_dict())
    return folder


if __name__ == "__main__":
    main()

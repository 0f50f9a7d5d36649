"""Measure on a GPU what the issue of speed is about, and write it as JSON with the card's name.

    python tests/gpu/measure.py OUT [--only epoch,bench,stage_one,sweep,accuracy,photographs,…]

Each part takes about a minute on an H100. Parts that fail are named and the others go on; after
five minutes no other part begins, unless --seconds says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from richkd.config.settings import Distill, Precompute
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.precompute import precompute
from richkd.tools.bench import QUICK, SMALL_STUDENTS, random_dataset, run_bench, write_teachers
from richkd.training.device import hardware
from richkd.training.source import Source
from richkd.training.student import StudentRun

STUDENT = "resnet8x4"
PROFILED = 60  # steps
STAGE_ONE = os.environ.get("RICHKD_STAGE_ONE", "--views 54").split()


def main() -> int:
    """Run the parts that were asked for."""
    parts: dict[str, Callable[[Path], Any]] = {
        "epoch": epoch,
        "bench": bench,
        "stage_one": stage_one,
        "sweep": sweep,
        "accuracy": accuracy,
        "photographs": photographs,
        "decoding": decoding,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the JSON")
    parser.add_argument("--only", default=",".join(parts), help="parts with commas")
    parser.add_argument("--seconds", type=float, default=300, help="when the last part may begin")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU that PyTorch can use")
    device = torch.device("cuda")
    result: dict[str, Any] = {"hardware": hardware(device), "versions": versions()}
    failed, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="richkd-gpu-") as folder:
        for name in options.only.split(","):
            start = time.perf_counter()
            if start - begun > options.seconds:
                print(f"# {name}: not reached", flush=True)
                continue
            try:
                result[name] = parts[name](Path(folder))
            except Exception:
                traceback.print_exc()
                failed.append(name)
            print(f"# {name}: {time.perf_counter() - start:.0f} s", flush=True)
            card = hardware(device).replace(" ", "-").lower()
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{card}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name}: " + json.dumps(value.get("ratios", value))[:1500], flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def cifar_store(folder: Path, count: int = 50_000, views: int = 2) -> Path:
    """A store in the shape of CIFAR-100, of random images and teachers; made once."""
    store = folder / f"random-{count}.zarr"
    if not store.exists():
        weights, clip = write_teachers(folder, "resnet8", 100)
        precompute(
            Precompute(
                dataset="shapes",
                teacher="resnet8",
                teacher_weights=str(weights),
                clip=str(clip),
                prompts="single",
                views=views,
                out=str(store),
            ),
            dataset=random_dataset(count, 10_000, 100),
        )
    return store


def epoch(folder: Path) -> dict[str, Any]:
    """Epochs of L+F of 50,000 images by resnet8x4, and how much of one the GPU is idle."""
    from torch.profiler import ProfilerActivity, profile

    store, found = cifar_store(folder), {}
    for step in ("captured", "compiled"):
        settings = Distill(
            cache=str(store),
            student=STUDENT,
            epochs=240,
            lr=0.05,
            step=step,
            device="cuda",
            out=str(folder / f"epochs-{step}"),
        )
        source = Source(settings, Report())
        with StudentRun(source, settings) as run:
            whole, trained, idle, step_s = [], [], 0.0, 0.0
            for number, (rows, waited) in enumerate(source.epochs(run.rows.values(), 1, 5), 1):
                torch.cuda.synchronize()
                start = time.perf_counter()
                if number == 4:
                    steps = run.trainer.steps(4, source.own(rows, run.rows, 0, 4))
                    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
                        for _ in islice(steps, PROFILED):
                            pass
                        torch.cuda.synchronize()
                    idle, step_s = idle_share(seen)
                    continue
                if number == 5:
                    break
                record = run.train_epoch(rows, waited)
                whole.append(time.perf_counter() - start)
                trained.append(record.seconds)
        found[step] = {
            "first_epoch_s": whole[0],
            "epoch_s": statistics.median(whole[1:]),
            "training_s": statistics.median(trained[1:]),
            "idle_between_steps": idle,
            "idle_in_epoch": 1 - step_s * 782 / statistics.median(whole[1:]),
            "minutes_for_240": (whole[0] + 239 * statistics.median(whole[1:])) / 60,
        }
    return found


def idle_share(seen: Any) -> tuple[float, float]:
    """The share of time from the first kernel to the last in which none runs; busy s a step."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0]), busy / 1e6 / PROFILED


def bench(folder: Path) -> dict[str, Any]:
    """`richkd bench`."""
    return run_bench(QUICK, Report(), device="cuda")


def sweep(folder: Path) -> dict[str, Any]:
    """The command on eight small students, together, apart, and as it chooses."""
    store, seconds = cifar_store(folder, 10_000), {}
    for name in ("1", "8", "auto"):
        start = time.perf_counter()
        command(
            "sweep",
            "--cache",
            store,
            "--students",
            ",".join(SMALL_STUDENTS),
            "--methods",
            "kd",
            "--seeds",
            1,
            "--epochs",
            10,
            "--eval-every",
            10,
            "--device",
            "cuda",
            "--concurrent",
            name,
            "--out",
            folder / f"sweep-{name}",
            "--json",
        )
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "together_over_apart": seconds["8"] / seconds["1"]}


def command(*words: Any) -> str:
    """Run a command of richkd; its standard output."""
    whole = [sys.executable, "-m", "richkd", *map(str, words)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(whole)}:\n{done.stderr[-2000:]}")
    print(*[line for line in done.stderr.splitlines() if " at once" in line], flush=True)
    return done.stdout


def accuracy(folder: Path) -> dict[str, Any]:
    """Fashion-MNIST, 5,000 images: what captured and bfloat16 runs lose to eager f32, by seed.

    Its files are in $RICHKD_DATA as torchvision stores them.
    """
    data = [
        "--dataset",
        "fashion-mnist",
        "--limit",
        5000,
        "--data-root",
        os.environ.get("RICHKD_DATA", "data"),
        "--device",
        "cuda",
    ]
    weights, store = folder / "fashion.safetensors", folder / "fashion.zarr"
    command("train-teacher", *data, "--model", "resnet20", "--epochs", 20, "--out", weights)
    command(
        "precompute",
        *data,
        "--teacher",
        "resnet20",
        "--teacher-weights",
        weights,
        "--clip",
        "none",
        "--views",
        20,
        "--out",
        store,
    )
    script = Path(__file__).parents[2] / "benchmarks" / "precision.py"
    words = [
        script,
        store,
        "--out",
        folder / "precision",
        "--epochs",
        10,
        "--seeds",
        6,
        "--modes",
        "eager/float32,captured/float32,captured/bfloat16",
    ]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    found: dict[str, Any] = json.loads((folder / "precision" / "precision.json").read_text())
    return found


def stage_one(folder: Path) -> dict[str, Any]:
    """A third of all 162 views of 50,000 images by resnet32x4, unless $RICHKD_STAGE_ONE says so."""
    script = Path(__file__).parent / "stage_one.py"
    out = folder / "stage_one.json"
    subprocess.run([sys.executable, script, out, *STAGE_ONE], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def photographs(folder: Path) -> dict[str, Any]:
    """Two epochs of 2,000 photographs of 256×320 by a ResNet-18."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 2000), ("val", 200)):
        for number in range(count):
            place = folder / "photographs" / split / f"class {number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = torch.rand(1, 3, 8, 10, generator=generator)
            pixels = (255 * F.interpolate(coarse, (256, 320), mode="bicubic")).clamp(0, 255)
            Image.fromarray(pixels[0].byte().permute(1, 2, 0).numpy()).save(place / f"{number}.jpg")
    from richkd.models import create_model
    from richkd.models.weights import save_tensors

    weights = folder / "teacher.safetensors"
    save_tensors(weights, create_model("timm/resnet18", 10).state_dict())
    store = folder / "photographs.zarr"
    start = time.perf_counter()
    precompute(
        Precompute(
            dataset=f"imagefolder:{folder / 'photographs'}",
            image_size=224,
            views=2,
            teacher="timm/resnet18",
            teacher_weights=str(weights),
            clip="none",
            out=str(store),
        ),
    )
    found = {"precompute_s": time.perf_counter() - start}
    for step, decode in (("eager", "exact"), ("captured", "exact"), ("captured", "gpu")):
        settings = Distill(
            cache=str(store),
            student="timm/resnet18",
            method="kd",
            epochs=3,
            lr=0.05,
            eval_every=3,
            step=step,
            decode=decode,
            device="cuda",
            out=str(folder / f"photos-{step}-{decode}"),
        )
        source = Source(settings, Report())
        with StudentRun(source, settings) as run:
            seconds = []
            for rows, waited in source.epochs(run.rows.values(), 1, 2):
                seconds.append(run.train_epoch(rows, waited).seconds)
        found[f"{step}_epoch_s" if decode == "exact" else f"{step}_{decode}_epoch_s"] = seconds[-1]
    return found


def decoding(folder: Path) -> dict[str, Any]:
    """Epochs of 4,000 photographs of 500 pixels by a ResNet-50, beside plain training."""
    script = Path(__file__).parents[2] / "benchmarks" / "photographs.py"
    out = folder / "decoding"
    words = [script, out, "--student", "timm/resnet50", "--side", 224, "--batch-size", 128]
    words += ["--device", "cuda", "--rounds", 3]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    found: dict[str, Any] = json.loads((out / "photographs.json").read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())

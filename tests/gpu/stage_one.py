"""Stage one's speed on this machine, and whether its rows are true: one JSON file.

    python tests/gpu/stage_one.py OUT_JSON [--views 162] [--samples 50000] [--bench]

Random images of CIFAR's shape, a resnet32x4 and a tiny CLIP of random weights, which cost what real
ones cost; `richkd precompute` from its first line to its last, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import richkd
from richkd import precompute as stage_one
from richkd.config.settings import Precompute
from richkd.core.cpus import usable_cpus
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.data.datasets import Dataset
from richkd.data.inputs import ArrayInputs
from richkd.data.views import views_tensor
from richkd.models.weights import load_into, read_weights
from richkd.store.reader import TeacherCache
from richkd.store.writer import StoreWriter
from richkd.teachers.clip import load_clip
from richkd.teachers.cnn import CNNTeacher, load_teacher
from richkd.teachers.framing import resolve_input
from richkd.teachers.rows import Teachers
from richkd.tools import bench
from richkd.training.device import choose_device, hardware, wait_for

CLASSES = 100
TEACHER = "resnet32x4"
ENOUGH_S = 40.0  # of forward passes alone; of so many views as that takes
CHECKED, CHECKED_VIEWS = 64, 8  # rows, of so many views at most


def main() -> None:
    """Measure, check, and write the JSON."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--views", type=int, default=162)
    asked.add_argument("--samples", type=int, default=50_000)
    asked.add_argument("--batch-size", type=int, default=None)
    asked.add_argument("--device", default="auto")
    asked.add_argument("--folder", help="where the store may lie meanwhile")
    asked.add_argument("--bench", action="store_true", help="precompute_over_forward, too")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="richkd-stage-one-", dir=given.folder) as folder:
        result = measure(given, Path(folder))
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; seconds unless they say otherwise."""
    device = choose_device(given.device)
    dataset = bench.random_dataset(given.samples, max(64, given.samples // 5), CLASSES)
    weights, clip = bench.write_teachers(folder, TEACHER, CLASSES)
    settings = Precompute(
        dataset="shapes",
        teacher=TEACHER,
        teacher_weights=str(weights),
        clip=str(clip),
        views=given.views,
        prompts="single",
        batch_size=given.batch_size,
        device=str(device),
        out=str(folder / "store.zarr"),
    )
    few = bench.random_dataset(64, 32, CLASSES)
    first, _, _ = timed(settings, few, device)  # what a process takes once: CUDA's context
    seconds, cache, waited = timed(settings, dataset, device)
    images = given.samples * given.views + len(dataset.test)
    memory = {}
    if device.type == "cuda":
        memory = {
            "gpu_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "gpu_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    forward = forward_alone(settings, dataset, device, seconds["all"] / given.views)
    result = {
        "hardware": hardware(device),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "samples": given.samples,
        "views": given.views,
        "test": len(dataset.test),
        "batch_size": cache.manifest["recipe"]["batch_size"],
        "block": cache.manifest["block"],
        "first_seconds": first["all"],
        "seconds": seconds,
        "waited_for_the_writer_s": waited,
        "forward": forward,
        "over_forward": seconds["all"] / forward["all_views_s"],
        "teacher_images": images,
        "images_a_second": images / seconds["all"],
        "stored_bytes": sum(cache.location.sizes().values()),
        "host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **memory,
        "rows": check_rows(cache, dataset, weights, device),
    }
    if given.bench:
        result["precompute_over_forward"] = bench_ratio(device, folder)
    return result


def timed(
    settings: Precompute, dataset: Dataset, device: torch.device
) -> tuple[dict[str, float], TeacherCache, float]:
    """Stage one: its seconds by part, the store, and how long computing waited for the writer."""
    moments, waits = [time.perf_counter()], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        noted(stage_one.StageOne, "write", lambda start, end: moments.extend([start, end])),
        noted(StoreWriter, "_wait", lambda start, end: waits.append(end - start)),
    ):
        cache = stage_one.precompute(
            settings, dataset=dataset, overwrite=True, report=Report(quiet=True)
        )
    start, begun, written, end = *moments, time.perf_counter()
    parts = {
        "all": end - start,
        "set-up": begun - start,
        "computing and writing": written - begun,
        "finishing": end - written,
    }
    return parts, cache, sum(waits)


@contextmanager
def noted(owner: Any, name: str, note: Callable[[float, float], object]) -> Iterator[None]:
    """Tell when a function was called and when it was done."""
    right = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return right(*arguments, **keywords)
        finally:
            note(start, time.perf_counter())

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, right)


def fresh_teacher(settings: Precompute, dataset: Dataset, device: torch.device) -> CNNTeacher:
    """The CNN teacher as stage one loads it."""
    weights = Path(settings.teacher_weights)
    taken = resolve_input(settings, weights, dataset, Report(quiet=True))
    return load_teacher(settings.teacher, weights, CLASSES, taken, device)


def forward_alone(
    settings: Precompute, dataset: Dataset, device: torch.device, view_s: float
) -> dict[str, Any]:
    """Forward passes of the same images with nothing else: gathered, asked, and dropped.

    Of many views some are measured, and count for all.
    """
    cnn = fresh_teacher(settings, dataset, device)
    clip = load_clip(settings.clip, device)
    teachers = Teachers(settings, cnn, clip, None)
    train, test = dataset.train, dataset.test
    assert isinstance(train.images, torch.Tensor) and isinstance(test.images, torch.Tensor)
    inputs = {"train": ArrayInputs(train.images, device), "test": ArrayInputs(test.images, device)}
    views = views_tensor(train.view_space.draw(settings.seed, len(train), settings.views))
    count = max(1, min(settings.views, int(ENOUGH_S / view_s)))

    def seconds(work: Callable[[], object]) -> float:
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        return time.perf_counter() - start

    def ask(split: str, view: int | None, batch: int) -> None:
        order = torch.arange(len(inputs[split].images), device=device)
        which = None if view is None else views[view].to(device)
        for _, images in inputs[split].batches(order, which, batch):
            cnn.rows(images)

    def clean(split: str) -> None:
        clip.image_features(inputs[split], 0, len(inputs[split].images), teachers.clip_batch)

    batch = teachers.cnn_batch
    ask("test", None, batch)  # warm
    each = [seconds(lambda view=v: ask("train", view, batch)) for v in range(count)]  # type: ignore[misc]
    small = seconds(lambda: ask("train", 0, 256))
    once = sum(
        map(
            seconds,
            (
                lambda: ask("test", None, batch),
                lambda: clean("test"),
                lambda: clean("train"),
            ),
        )
    )
    return {
        "views_measured": count,
        "view_s": statistics.median(each),
        "view_s_at_batch_256": small,
        "clean_s": once,
        "all_views_s": once + statistics.mean(each) * settings.views,
    }


def check_rows(
    cache: TeacherCache, dataset: Dataset, weights: Path, device: torch.device
) -> dict[str, Any]:
    """Some rows against a network of its own, one image at a time: errors by the row's largest.

    With TF32, as PyTorch convolves by default on such GPUs, and in plain f32.
    """
    images = dataset.train.images
    assert isinstance(images, torch.Tensor)
    model: Any = richkd.create_model(TEACHER, CLASSES)
    load_into(model, read_weights(weights), TEACHER, weights)
    model = model.to(device).eval()
    mean, std = (torch.tensor(cache.manifest[key], device=device) for key in ("mean", "std"))
    chosen = torch.randperm(cache.num_views)[:CHECKED_VIEWS].tolist()
    errors: dict[str, float] = {}
    allowed = torch.backends.cudnn.allow_tf32
    for view in chosen:
        slab = cache.slab(view, ["teacher_logits", "teacher_features"])
        assert slab.view_ids is not None
        for index in torch.randint(len(images), (CHECKED // len(chosen),)).tolist():
            ids = slab.view_ids[index : index + 1]
            pixels = richkd.apply_views(images[index : index + 1], ids).to(device)
            x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            for kind, tf32 in (("tf32", True), ("f32", False)):
                torch.backends.cudnn.allow_tf32 = tf32
                with torch.no_grad():
                    true = richkd.forward(model, x)
                for name, row in zip(("teacher_logits", "teacher_features"), true, strict=True):
                    stored = getattr(slab, name)[index].to(device).float()
                    error = (stored - row[0]).abs().max() / row[0].abs().max()
                    key = f"{name}, {kind}"
                    errors[key] = max(errors.get(key, 0.0), float(error))
    torch.backends.cudnn.allow_tf32 = allowed
    worst = max(errors.values())
    return {"checked": CHECKED, "largest_relative_error": errors, "right": worst < 0.02}


def bench_ratio(device: torch.device, folder: Path) -> dict[str, Any]:
    """`precompute_over_forward` of richkd bench, at its sizes."""
    times = 100 if device.type == "cuda" else 1
    sizes = bench.Sizes(stage_one=times * bench.FULL.stage_one)
    (folder / "bench").mkdir()
    found = bench.time_stage_one(sizes, device, Report(quiet=True), folder / "bench")
    return {"ratio": bench.ratio(found, "stage one", "its forward passes"), "seconds": found}


if __name__ == "__main__":
    main()

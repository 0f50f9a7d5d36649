"""Memory and time of students that train in one process, against students alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import write_random_store

import richkd
from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.store import schema
from richkd.sweep import cost
from richkd.training.source import Source

COMMON = ["--epochs", 2, "--batch-size", 16, "--device", "cpu", "--lr", 0.02]

PEAK = """
import json, shlex, sys
from richkd.__main__ import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmHWM" in line)
print(peak, file=sys.stderr)
"""


def test_students_at_once_share_one_copy_of_the_data(store: Path, tmp_path: Path) -> None:
    """Three at once need no more than one does, and weights and activations of two others."""
    path = write_random_store(tmp_path / "s.zarr", store, 24_000, 2000, image_size=32)
    specs = schema.array_specs(richkd.open_cache(path).manifest)
    slab = specs["train/fused_logits"].nbytes // 3
    images = specs["train/images"].nbytes

    def peak(seeds: int) -> int:
        words = [
            "sweep",
            "--cache",
            path,
            "--students",
            "resnet8",
            "--methods",
            "richkd-l",
            "--seeds",
            seeds,
            "--epochs",
            1,
            "--device",
            "cpu",
            "--batch-size",
            16,
            "--concurrent",
            3,
            "--json",
            "--precision",
            "float32",
            "--out",
            tmp_path / f"{seeds}",
        ]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, words)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert len(json.loads(done.stdout)["runs"]) == seeds
        return int(done.stderr.strip().splitlines()[-1])

    one, three = peak(1), peak(3)
    settings = Distill(cache=str(path), student="resnet8", batch_size=16, device="cpu")
    source = Source(settings, Report(quiet=True))
    others = 2 * cost.try_student(settings, source).memory
    sizes = {"one": one, "three": three, "others": others, "slab": slab, "images": images}
    print({name: f"{size / 2**20:.0f} MiB" for name, size in sizes.items()})
    noise = 32 * 2**20  # logits of 2,000 classes come and go, and the heap has gaps
    assert others + noise < min(slab, images)  # a second copy of either would be seen
    assert three <= one + others + noise


def test_one_process_takes_less_time_than_many(store: Path, tmp_path: Path) -> None:
    students = ["resnet8", "resnet14", "wrn_16_1"]

    def seconds(*words: object) -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "richkd", *map(str, words)], check=True, capture_output=True
        )
        return time.perf_counter() - start

    together = seconds(
        "sweep",
        "--cache",
        store,
        "--students",
        ",".join(students),
        "--methods",
        "kd",
        "--seeds",
        1,
        "--out",
        tmp_path / "sweep",
        *COMMON,
    )
    apart = sum(
        seconds(
            "distill",
            "--cache",
            store,
            "--student",
            student,
            "--method",
            "kd",
            "--out",
            tmp_path / student,
            *COMMON,
        )
        for student in students
    )
    print(f"{together:.1f} s in one process, {apart:.1f} s in {len(students)}")
    assert together <= 0.9 * apart

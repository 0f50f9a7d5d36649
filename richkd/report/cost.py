"""The cost of running a student: parameters, multiply-adds, and latency on this CPU."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from richkd.models import create_model
from richkd.training.run_folder import Run

WARM_UP, TIMED = 3, 20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one image."""

    parameters: int
    multiply_adds: int
    latency_ms: float  # batch of one, on the CPU, median of 20 forward passes


@torch.inference_mode()
def student_cost(run: Run) -> Cost:
    """Measure the student of a complete run, with fresh weights: they cost the same."""
    summary, settings = run.complete, run.settings
    side = summary["image_size"]
    model = create_model(
        settings["student"],
        summary["num_classes"],
        image_size=side,
        **settings.get("student_options", {}),
    ).eval()
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(image)
    times = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
        latency_ms=1000 * statistics.median(times[WARM_UP:]),
    )

"""Measure what bfloat16 would save on a CPU, where f32 is the default."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from richkd.config.settings import Training
from richkd.models import forward
from richkd.training.device import has_bfloat16, wait_for

LONG = 500  # steps of training; below that, measuring is not worth it
WORTH_IT_BELOW = 0.9  # of the time in f32


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a training step on noise."""

    float32: float
    bfloat16: float

    @property
    def share(self) -> float:
        """The time of a step in bfloat16 as a share of that in f32."""
        return self.bfloat16 / self.float32


def time_precisions(model: nn.Module, images: torch.Tensor) -> StepTimes:
    """Time a step in each precision, the second of two; the model is left unchanged.

    Args:
        model: a network, on the device of the images.
        images: a batch [B,3,H,W], f32.
    """
    model = copy.deepcopy(model).train()
    device, seconds = images.device, {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for half in (False, False, True, True):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits, _ = forward(model, images)
            logits.float().logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            wait_for(device)
            seconds[half] = time.perf_counter() - start
    return StepTimes(seconds[False], seconds[True])


def is_open(settings: Training, device: torch.device, steps: int, long: int = LONG) -> bool:
    """Return whether a long training uses f32 by default, on a CPU that has bfloat16."""
    return (
        settings.precision == "auto"
        and device.type == "cpu"
        and steps >= long
        and has_bfloat16(device)
    )


def advice(times: Mapping[str, StepTimes]) -> str:
    """Return a line about the students that bfloat16 would make faster, "" if there are none."""
    worth = [
        f"{name} {each.bfloat16:.2g} s per step instead of {each.float32:.2g} s"
        for name, each in times.items()
        if each.share < WORTH_IT_BELOW
    ]
    if not worth:
        return ""
    return (
        f"timed over two steps, this CPU is faster in bfloat16: {', '.join(worth)} (--precision "
        f"bfloat16)"
    )

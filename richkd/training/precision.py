"""What bfloat16 would save where networks are trained in f32: CPUs, on which f32 is the default."""

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

LONG = 500  # steps; before that, measuring a few of them is not worth it
TOLD_BELOW = 0.9


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a training step on noise."""

    float32: float
    bfloat16: float

    @property
    def share(self) -> float:
        """What is left of a step in bfloat16."""
        return self.bfloat16 / self.float32


def time_precisions(model: nn.Module, images: torch.Tensor) -> StepTimes:
    """Time a step in each precision, the second of two; the model stays as it is.

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


def is_open(settings: Training, device: torch.device, steps: int) -> bool:
    """Whether the precision was left to richkd, which takes f32 on a CPU that has bfloat16."""
    return (
        settings.precision == "auto"
        and device.type == "cpu"
        and steps >= LONG
        and has_bfloat16(device)
    )


def advice(times: Mapping[str, StepTimes]) -> str:
    """A line about students for which bfloat16 would be quicker; "" where it is for none."""
    worth = [
        f"{name} {each.bfloat16:.2g} s a step instead of {each.float32:.2g} s"
        for name, each in times.items()
        if each.share < TOLD_BELOW
    ]
    if not worth:
        return ""
    return (
        f"in bfloat16 this CPU would take, by two steps: {', '.join(worth)} (--precision bfloat16)"
    )

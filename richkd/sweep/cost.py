"""Estimate time and memory of the runs of a sweep, from a few steps of each student."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from richkd.config.settings import Distill
from richkd.data.reuse import buffer_bytes
from richkd.losses.method import EVERY
from richkd.models import forward
from richkd.store.reader import TeacherCache
from richkd.store.schema import split_sizes
from richkd.sweep.entries import Entry, Estimate
from richkd.training.device import half_precision, wait_for
from richkd.training.precision import is_open, time_precisions
from richkd.training.source import Source, build_student, method_of


def estimate(entries: Sequence[Entry], source: Source) -> None:
    """Set the cost of every entry, from two steps of its student on noise.

    Raises:
        RichKDError: a student does not fit the images.
    """
    students: dict[str, Estimate] = {}
    for entry in entries:
        name = entry.settings.student
        if name not in students:
            students[name] = try_student(entry.settings, source)
        banks = method_memory(entry.settings, students[name], source)
        waiting = reuse_memory(entry.settings, source.cache)
        entry.cost = replace(students[name], memory=students[name].memory + banks + waiting)


def try_student(settings: Distill, source: Source) -> Estimate:
    """Train two steps on noise and test once; time the second step and count what it saves."""
    cache, device = source.cache, source.device
    model, width = build_student(settings, cache)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(settings.batch_size, cache.num_samples)
    side = cache.manifest["image_size"]
    images = torch.randn(batch, 3, side, side, device=device)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = half_precision(settings.precision, device)
    seconds = {}
    for stage in ("train", "train", "test"):
        model.train(stage == "train")
        if stage == "train":
            saved.clear()  # count one step: the tensors of the next may have other addresses
        wait_for(device)
        start = time.perf_counter()
        with (
            torch.set_grad_enabled(stage == "train"),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            logits, _ = forward(model, images)
        if stage == "train":
            logits.float().logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
        wait_for(device)
        seconds[stage] = (time.perf_counter() - start) / batch
    sizes = split_sizes(cache.manifest)
    evaluated = sizes.get("validation", sizes["test"] * (settings.holdout or 1.0))
    epoch_s = (
        seconds["train"] * cache.num_samples + seconds["test"] * evaluated / settings.eval_every
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    # with gradients and momentum, a second moment, and the average
    copies = 3 + (settings.optimizer != "sgd") + (settings.ema > 0)
    steps = settings.epochs * cache.num_samples // batch
    choice = is_open(settings, device, steps)
    return Estimate(
        precisions=time_precisions(model, images) if choice else None,
        parameters=weights,
        features=width,
        epoch_s=epoch_s,
        memory=4 * copies * weights + sum(saved.values()),
    )


def method_memory(settings: Distill, student: Estimate, source: Source) -> int:
    """Return the bytes of a method's buffers, such as memory banks."""
    kind, options = method_of(settings)
    task = source.task(
        student.features, every=EVERY in kind.reads(options)
    )  # which may read the images
    with torch.device("meta"):
        method = kind(options, task)
    return sum(buffer.nbytes for buffer in method.buffers())


def reuse_memory(settings: Distill, cache: TeacherCache) -> int:
    """Return the bytes of the crops that wait in memory if an image is decoded for several."""
    each, side = settings.crops_per_decode, cache.manifest["image_size"]
    return buffer_bytes(cache.num_samples // each, each, settings.batch_size, 3 * side**2)


def total_left(entries: Sequence[Entry]) -> float:
    """Return the seconds that the runs take one after the other, as far as is known."""
    return sum(entry.seconds_left or 0.0 for entry in entries)

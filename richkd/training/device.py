"""The device to run on: its choice, its capabilities and its name."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError, first_line
from richkd.core.memory import available_memory

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


def choose_device(name: str) -> torch.device:
    """Choose a device by name; `auto` is the first GPU, or the CPU without one.

    Raises:
        RichKDError: the device does not exist or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise RichKDError(
            f"device {name!r} cannot be used: {reason}; try --device cpu", code="device-unusable"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory(kept: int = 2**30) -> None:
    """Ask glibc to keep freed blocks of up to `kept` bytes.

    Every training step on the CPU frees and allocates the same large tensors; by default, those
    above 32 MiB get a new mapping each time, whose pages fault in one by one. No effect without
    glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, kept)


def half_precision(name: str, device: torch.device) -> bool:
    """Return whether networks run in bfloat16; with `auto`, on a GPU that computes in it."""
    if name == "auto":
        return cuda(device) and has_bfloat16(device)
    return name == "bfloat16"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 without emulation (CPUs: AVX-512 or AMX)."""
    if cuda(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def cuda(device: torch.device) -> bool:
    """Return whether a device is a CUDA GPU."""
    return device.type == "cuda"


def default_generator(device: torch.device) -> torch.Generator:
    """Return the default random generator of a GPU."""
    number = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[number]
    return generator


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes free for more runs: on the GPU, or in this process's share of memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def hardware(device: torch.device) -> str:
    """Describe the device, for summaries."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {usable_cpus()} cores"

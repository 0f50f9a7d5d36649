"""Examine this machine (packages, devices, disk, datasets) for what the commands need."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from richkd.config.catalog import PLACES, found
from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.progress import Report, size

# By extra: the command that needs it, and the module whose import shows whether it works.
EXTRAS = {
    "tokenizers": ("CLIPs such as SigLIP", "transformers"),
    "onnx": ("richkd export", "onnxruntime"),
    "tensorboard": ("richkd report --tensorboard", "torch.utils.tensorboard"),
    "corruptions": ("richkd evaluate --corruptions", "imagecorruptions"),
    "ray": ("richkd sweep --engine ray", "ray"),
    "cloud": ("caches at s3://, gs://, az://", "obstore"),
    "hf": ("--dataset hf:NAME", "datasets"),
}
LITTLE_SHARED_MEMORY = 2**30  # bytes, twice what data-loader workers may use


@dataclass(frozen=True)
class Finding:
    """One thing that was examined; `remedy` is empty if nothing is wrong."""

    what: str
    found: str
    remedy: str = ""
    required: bool = False  # whether nothing works without it


def examine(data_root: str = "data", report: Report | None = None) -> dict[str, list[Finding]]:
    """Examine everything, by topic, without downloading or writing anything."""
    report = report or Report(quiet=True)
    topics: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": packages,
        "for some commands": extras,
        "device": devices,
        "room on the disk": places,
        "data": lambda: data(Path(data_root)),
    }
    findings = {}
    with report.track("doctor", len(topics), "topics") as tick:
        for topic, examine_topic in topics.items():
            findings[topic] = list(examine_topic())
            tick(1)
    return findings


def packages(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """Compare requirements, by default richkd's own, with the installed packages."""
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("richkd", f"{_version('richkd') or 'not installed'}, {machine}")
    for wanted in map(Requirement, _requirements() if requirements is None else requirements):
        if wanted.marker is None:
            yield _package(wanted)


def extras(wanted: Mapping[str, tuple[str, str]] = EXTRAS) -> Iterator[Finding]:
    """Import the packages that single commands need."""
    for extra, (command, module) in wanted.items():
        try:
            import_module(module)
            yield Finding(command, "ready")
        except Exception as error:  # missing, of another version, without a system library, …
            reason = " ".join(str(error).split()) or type(error).__name__
            pip = f"pip install 'richkd[{extra}]'"
            remedy = "install Debian's libgl1" if "libGL" in reason else pip
            yield Finding(command, reason, remedy)


def devices() -> Iterator[Finding]:
    """Examine CPU, memory and GPUs."""
    import torch

    from richkd.data.workers import SHARED_MEMORY, free_shared_memory
    from richkd.models import create_model
    from richkd.training.device import free_memory, has_bfloat16
    from richkd.training.precision import WORTH_IT_BELOW, time_precisions

    machine, usable = os.cpu_count() or 1, usable_cpus()
    cores = f"{usable} cores" if usable == machine else f"{usable} of {machine} cores"
    free = free_memory(torch.device("cpu"))
    yield Finding("cpu", f"{cores}, {torch.get_num_threads()} threads, {size(free)} of memory free")
    if has_bfloat16(torch.device("cpu")):
        times = time_precisions(create_model("resnet20", 10), torch.randn(32, 3, 32, 32))
        remedy = "try --precision bfloat16" if times.share < WORTH_IT_BELOW else ""
        share = f"a step of resnet20 takes {times.share:.2f} of its time in float32"
        yield Finding("bfloat16", share, remedy)
    shared = free_shared_memory()
    if shared is not None:
        little = "too little for image folders; docker run --shm-size=1g"
        remedy = little if shared < LITTLE_SHARED_MEMORY else ""
        yield Finding("shared memory", f"{size(shared)} free in {SHARED_MEMORY}", remedy)
    for number in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", number)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        yield Finding(
            f"cuda:{number}",
            f"{torch.cuda.get_device_name(gpu)}, {size(free_memory(gpu))} free, {bf16}",
        )
    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            f"none that PyTorch {torch.__version__} can use",
            "not needed for small datasets; large CLIPs need one",
        )


def places() -> Iterator[Finding]:
    """Examine the folders to which richkd and its libraries write, and the free space there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from richkd.core.files import home
    from richkd.teachers.demo_clip import NAME

    for what, folder in (
        ("caches: cache/", Path("cache")),
        ("students: runs/", Path("runs")),
        ("pretrained CLIPs", Path(HF_HUB_CACHE)),
        (f"demo CLIP ({'ready' if (home() / NAME).is_dir() else 'trained on first use'})", home()),
    ):
        near = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        free = f"{size(shutil.disk_usage(near).free)} free in {folder}"
        writable = os.access(near, os.W_OK)
        yield Finding(what, free, "" if writable else f"{near} is not writable")


def data(root: Path) -> Iterator[Finding]:
    """Find which datasets exist, and which would be downloaded."""
    for name, (_, other) in PLACES.items():
        location = found(name, root)
        if location is not None:
            yield Finding(name, f"in {location}")
        else:
            copy = f"downloaded on first use; without a network, copy {Path(other).name} there"
            yield Finding(name, f"not in {root}", copy)


def show(findings: dict[str, list[Finding]], report: Report) -> None:
    """Print one table per topic."""
    for topic, rows in findings.items():
        report.table(
            topic, ("", "", ""), [(row.what, row.found, row.remedy) for row in rows], left=3
        )


def raise_missing(findings: dict[str, list[Finding]]) -> None:
    """Raise RichKDError if something that every command needs is missing."""
    lacking = [row for rows in findings.values() for row in rows if row.required and row.remedy]
    if lacking:
        raise RichKDError(
            f"{lacking[0].what}: {lacking[0].found}; {lacking[0].remedy}", code="doctor-missing"
        )


def as_json(findings: dict[str, list[Finding]]) -> dict[str, Any]:
    """Return the findings as JSON for scripts."""
    return {topic: [asdict(row) for row in rows] for topic, rows in findings.items()}


def _requirements() -> list[str]:
    try:
        return requires("richkd") or []
    except PackageNotFoundError:  # a source tree that was never installed
        return []


def _package(wanted: Requirement) -> Finding:
    found, remedy = _version(wanted.name), f"pip install '{wanted}'"
    if found is None:
        state = "not installed"
    elif wanted.specifier.contains(found, prereleases=True):
        state, remedy = found, ""
    else:
        state = f"{found}, not {wanted.specifier}"
    return Finding(wanted.name, state, remedy, required=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

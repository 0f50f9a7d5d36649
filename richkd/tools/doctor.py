"""What this machine has (packages, device, disk, data), and what is missing for which command."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
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

# Extras and the command that wants each; the module whose import shows whether it works.
EXTRAS = {
    "onnx": ("richkd export", "onnxruntime"),
    "tensorboard": ("richkd report --tensorboard", "torch.utils.tensorboard"),
    "corruptions": ("richkd evaluate --corruptions", "imagecorruptions"),
    "ray": ("richkd sweep --engine ray", "ray"),
    "cloud": ("stores at s3://, gs://, az://", "obstore"),
}
LITTLE_SHARED_MEMORY = 2**30  # what data-loader workers may put there, twice


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where all is well."""

    what: str
    found: str
    remedy: str = ""
    required: bool = False  # without it, nothing works


def examine(data_root: str = "data", report: Report | None = None) -> dict[str, list[Finding]]:
    """Look at everything, by topic; nothing is downloaded or written."""
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
        for topic, look in topics.items():
            findings[topic] = list(look())
            tick(1)
    return findings


def packages() -> Iterator[Finding]:
    """richkd's own requirements, against what is installed."""
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("richkd", f"{_version('richkd') or 'not installed'}, {machine}")
    for wanted in _requirements():
        if wanted.marker is None:
            yield _package(wanted)


def extras() -> Iterator[Finding]:
    """The packages that one command wants each, tried by importing."""
    for extra, (command, module) in EXTRAS.items():
        try:
            import_module(module)
            yield Finding(command, "ready")
        except Exception as error:  # absent, of another version, without a system library, …
            reason = " ".join(str(error).split()) or type(error).__name__
            remedy = (
                "install Debian's libgl1"
                if "libGL" in reason
                else (f"pip install 'richkd[{extra}]'")
            )
            yield Finding(command, reason, remedy)


def devices() -> Iterator[Finding]:
    """CPU, memory and GPUs."""
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
        share = f"a step of resnet20 takes {times.share:.2f} of one in float32"
        yield Finding("bfloat16", share, remedy)
    shared = free_shared_memory()
    if shared is not None:
        yield Finding(
            "shared memory",
            f"{size(shared)} free in {SHARED_MEMORY}",
            "small for image folders; docker run --shm-size=1g"
            if shared < LITTLE_SHARED_MEMORY
            else "",
        )
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
            "fine for small data; large CLIPs want one",
        )


def places() -> Iterator[Finding]:
    """Where richkd and its libraries write, and how much room there is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from richkd.core.files import home
    from richkd.teachers.demo_clip import NAME

    for what, folder in (
        ("stores: cache/", Path("cache")),
        ("students: runs/", Path("runs")),
        ("pretrained CLIPs", Path(HF_HUB_CACHE)),
        (f"demo CLIP ({'there' if (home() / NAME).is_dir() else 'made on first use'})", home()),
    ):
        near = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        free = f"{size(shutil.disk_usage(near).free)} free in {folder}"
        writable = os.access(near, os.W_OK)
        yield Finding(what, free, "" if writable else f"{near} cannot be written to")


def data(root: Path) -> Iterator[Finding]:
    """Which data sets are there, and which would be downloaded."""
    for name, (_, other) in PLACES.items():
        place = found(name, root)
        if place is not None:
            yield Finding(name, f"in {place}")
        else:
            yield Finding(
                name,
                f"not in {root}",
                f"downloaded on first use; without a network put {Path(other).name} there",
            )


def show(findings: dict[str, list[Finding]], report: Report) -> None:
    """A table a topic on standard output."""
    for topic, rows in findings.items():
        report.table(
            topic, ("", "", ""), [(row.what, row.found, row.remedy) for row in rows], left=3
        )


def raise_missing(findings: dict[str, list[Finding]]) -> None:
    """Raise RichKDError where something is missing without which nothing works."""
    lacking = [row for rows in findings.values() for row in rows if row.required and row.remedy]
    if lacking:
        raise RichKDError(
            f"{lacking[0].what}: {lacking[0].found}; {lacking[0].remedy}", code="doctor-missing"
        )


def as_json(findings: dict[str, list[Finding]]) -> dict[str, Any]:
    """The findings for a script."""
    return {topic: [asdict(row) for row in rows] for topic, rows in findings.items()}


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires("richkd") or []]
    except PackageNotFoundError:  # a source tree that was never installed
        return []


def _package(wanted: Requirement) -> Finding:
    found = _version(wanted.name)
    if found is None:
        return Finding(wanted.name, "not installed", f"pip install '{wanted}'", required=True)
    if wanted.specifier.contains(found, prereleases=True):
        return Finding(wanted.name, found, required=True)
    return Finding(
        wanted.name, f"{found}, not {wanted.specifier}", f"pip install '{wanted}'", required=True
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

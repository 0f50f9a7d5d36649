"""Versions of richkd and of the packages it depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = ("richkd", "torch", "torchvision", "timm", "open_clip_torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def richkd_version() -> str:
    """Return the version of richkd; "0+unknown" in a source tree that is not installed."""
    try:
        return version("richkd")
    except PackageNotFoundError:
        return "0+unknown"

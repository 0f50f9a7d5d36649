"""The versions of packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("richkd", "torch", "torchvision", "timm", "open_clip_torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def richkd_version() -> str:
    """The version of richkd; "0+unknown" in a source tree that was never installed."""
    try:
        return version("richkd")
    except PackageNotFoundError:
        return "0+unknown"

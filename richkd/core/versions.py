"""The versions of richkd and of the packages that its results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "zarr", "numpy")
    return {
        "python": platform.python_version(),
        "richkd": richkd_version(),
        **{name: version(name) for name in packages},
    }


def richkd_version() -> str:
    """Return the version of richkd; "0+unknown" in a source tree that was never installed."""
    try:
        return version("richkd")
    except PackageNotFoundError:
        return "0+unknown"

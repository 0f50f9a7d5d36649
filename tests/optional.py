"""Packages that users may lack: tests that need them are skipped there, and run in CI."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

import pytest


def require(*packages: str) -> None:
    """Skip the test, or the module that calls this at its top, if a package is not installed."""
    missing = [name for name in packages if not _installed(name)]
    if missing and "RICHKD_TEST_ALL" not in os.environ:
        reason = f"{', '.join(missing)} is not installed (pip install -e '.[dev]')"
        pytest.skip(reason, allow_module_level=True)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


def load(module: str) -> Any:
    """Import a module of an optional package, as `require` does."""
    require(module.partition(".")[0])
    return importlib.import_module(module)

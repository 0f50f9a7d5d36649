"""A cache of the hub for tests of teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from richkd.teachers.pretrained import configuration


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, out of reach of the network."""
    configuration.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    return tmp_path / "hub"

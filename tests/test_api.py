"""The public names, and that importing richkd costs nothing."""

import subprocess
import sys

import pytest

import richkd


def test_every_public_name_is_there() -> None:
    for name in richkd.__all__:
        assert getattr(richkd, name) is not None
        assert name in dir(richkd)
    assert richkd.losses.kd_loss and richkd.losses.CRDLoss
    with pytest.raises(AttributeError, match="nothing"):
        _ = richkd.nothing


def test_import_is_lazy() -> None:
    probe = "import sys, richkd; print('torch' in sys.modules, 'zarr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_public_names_are_documented() -> None:
    for name in richkd.__all__:
        assert getattr(richkd, name).__doc__, name

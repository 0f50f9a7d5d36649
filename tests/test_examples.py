"""The examples of the documentation run as they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))
SAID = {
    "plain_loop": "epoch 3: loss",
    "lightning_module": "`max_epochs=2` reached",
    "timm_train_step": "epoch 2: loss",
    "read_with_zarr": "alpha 0.7:",
    "read_with_xarray": "of view 0 are classified right",
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, store: Path, tmp_path: Path) -> None:
    lines = [line for line in example.read_text().splitlines() if line.strip()]
    assert 5 <= len(lines) <= 30
    shutil.copytree(store, tmp_path / "cache" / "shapes.zarr")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:richkd", example],
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAID[example.stem] in done.stdout + done.stderr


@pytest.mark.slow
def test_what_reads_the_store_alone_gives_what_richkd_counted(store: Path, tmp_path: Path) -> None:
    import richkd

    (tmp_path / "cache").mkdir()
    shutil.copytree(store, tmp_path / "cache" / "shapes.zarr")
    example = next(path for path in EXAMPLES if path.stem == "read_with_zarr")
    assert "richkd" not in example.read_text()
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    manifest = richkd.open_cache(store).manifest
    said = dict(line.split(" % ")[0].split(": ") for line in done.stdout.splitlines())
    assert float(said["alpha 1.0"]) == pytest.approx(
        100 * manifest["teacher"]["accuracy"], abs=0.01
    )
    assert float(said["alpha 0.0"]) == pytest.approx(100 * manifest["clip"]["accuracy"], abs=0.01)

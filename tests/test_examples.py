"""The examples of the documentation run as they stand."""

from __future__ import annotations

import shutil
from pathlib import Path

import optional
import pytest
from forked import Forks

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))
SAID = {
    "plain_loop": "epoch 3: loss",
    "lightning_module": "`max_epochs=2` reached",
    "timm_train_step": "epoch 2: loss",
    "read_with_zarr": "alpha 0.7:",
    "read_with_xarray": "of view 0 are classified right",
}

PACKAGES = {"lightning_module": ["lightning"], "read_with_xarray": ["xarray"]}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(forks: Forks, example: Path, store: Path, tmp_path: Path) -> None:
    optional.require(*PACKAGES.get(example.stem, ()))
    lines = [line for line in example.read_text().splitlines() if line.strip()]
    assert 5 <= len(lines) <= 30
    shutil.copytree(store, tmp_path / "cache" / "shapes.zarr")
    done = forks.run_python(example, cwd=tmp_path, env={"NO_COLOR": "1"})
    assert done.code == 0, done.err
    assert SAID[example.stem] in done.out + done.err


def test_zarr_alone_gives_the_accuracies_of_richkd(
    forks: Forks, store: Path, tmp_path: Path
) -> None:
    import richkd

    (tmp_path / "cache").mkdir()
    shutil.copytree(store, tmp_path / "cache" / "shapes.zarr")
    example = next(path for path in EXAMPLES if path.stem == "read_with_zarr")
    assert "richkd" not in example.read_text()
    done = forks.run_python(example, cwd=tmp_path)
    assert done.code == 0, done.err
    manifest = richkd.open_cache(store).manifest
    said = dict(line.split(" % ")[0].split(": ") for line in done.out.splitlines())
    assert float(said["alpha 1.0"]) == pytest.approx(
        100 * manifest["teacher"]["accuracy"], abs=0.01
    )
    assert float(said["alpha 0.0"]) == pytest.approx(100 * manifest["clip"]["accuracy"], abs=0.01)

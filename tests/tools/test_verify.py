"""`richkd verify` and `richkd repair`: every byte, every value, and no block too many."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import Refusal, changed, tree, write_teacher

import richkd
from richkd.config.settings import Distill
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.distill import distill
from richkd.models.weights import read_weights
from richkd.store.checksums import take_checksums, write_sealed
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.schema import array_specs
from richkd.tools.verify import verify_store

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
QUIET = Report(quiet=True)


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


def faults(path: Path) -> list[str]:
    return [fault for check in verify_store(path, None, QUIET) for fault in check.faults]


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= int(rng.integers(1, 256))
    path.write_bytes(content)


def test_a_good_store_has_no_faults(run: Run, store: Path, shapes_teacher: Path) -> None:
    before = tree(store)
    done = run("verify", store, "--teacher", shapes_teacher, "--json")
    assert done.code == 0, done.err
    names = {check["name"]: check["faults"] for check in done.json["checks"]}
    assert len(names) == 9 and not any(names.values())
    shown = run("verify", store)
    assert shown.code == 0 and shown.out.count("right") == 8
    assert changed(before, tree(store)) == []


@pytest.mark.slow
@pytest.mark.fault
def test_two_hundred_flipped_bytes(copy: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each is found by `verify`, and by `distill` where it would have changed the result."""

    def train(out: str) -> dict[str, torch.Tensor]:
        path = tmp_path / out
        distill(
            Distill(
                cache=str(copy),
                student="resnet8",
                method="richkd",
                epochs=1,
                batch_size=16,
                device="cpu",
                out=str(path),
            )
        )
        return read_weights(path / "last.safetensors")

    right = train("right")
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    arrays = {str(path.relative_to(copy)).partition("/c/")[0] for path in files}
    assert len(arrays) == len(array_specs(richkd.open_cache(copy).manifest)) * 2 + 4
    extra = rng.choice(len(files), 200 - len(files)) if len(files) < 200 else []
    chosen = [*files, *(files[number] for number in extra)]
    refused = 0
    for number, path in enumerate(chosen):
        content = path.read_bytes()
        flip(path, rng)
        where = f"{number}: {path.relative_to(copy)}"
        try:
            found = faults(copy)
        except RichKDError as error:  # the manifest itself
            found = [str(error)]
        assert found, where
        try:
            trained = train(f"run-{number}")
            assert all(torch.equal(trained[name], right[name]) for name in right), where
        except RichKDError:
            refused += 1
        path.write_bytes(content)
    print(f"{len(chosen)} flipped bytes in {len(files)} files: {refused} runs refused")
    assert len(chosen) >= 200 and refused > 50
    assert not faults(copy)


def rewritten(path: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Rows that stage one could have written wrongly: every checksum is right."""
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    array: Any = group[name]
    values = array[:]
    change(values)
    array[:] = values
    manifest: Any = {**read_manifest(path)}
    manifest["checksums"] = take_checksums(open_location(path), array_specs(manifest))
    write_sealed(open_location(path), manifest)


def put(index: tuple[int, ...], value: float) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[index] = value

    return change


def repeat(values: np.ndarray[Any, Any]) -> None:
    values[1, 7] = values[0, 7]


def double(values: np.ndarray[Any, Any]) -> None:
    values[3] *= 2


WRONG: list[tuple[str, Callable[[np.ndarray[Any, Any]], None], str]] = [
    ("train/labels", put((5,), 16), "train/labels: 1 are not in 0..15"),
    ("train/view_ids", put((2, 9), 162), "train/view_ids: some are not in 0..161"),
    ("train/view_ids", repeat, "train/view_ids: 1 samples have a view twice"),
    ("train/teacher_features", put((1, 4, 3), np.nan), "NaN or infinity in view 1"),
    ("test/clip_features", double, "test/clip_features: 1 are not of unit length"),
    ("test/clip_similarity", put((2, 1), 0.9), "test/clip_similarity does not match"),
    ("train/fused_logits", put((2, 11, 4), 9.0), "view 2: 1 rows are not the blend"),
    ("test/teacher_logits", lambda v: v.__imul__(-1), "accuracy of cnn is"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_values_that_cannot_be(
    copy: Path, fails: Fails, name: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "richkd.core.memory.ROWS_AT_ONCE", 5
    )  # rows beyond the first part count, too
    rewritten(copy, name, change)
    found = faults(copy)
    assert any(message in fault for fault in found), found
    line = fails("verify", copy)
    assert line.code == "cache-verify-failed" and "precompute --overwrite" in line


def test_rows_of_another_teacher(
    copy: Path, fails: Fails, shapes_teacher: Path, tmp_path: Path
) -> None:
    other = write_teacher(tmp_path / "other.safetensors", "resnet8", 16, seed=1)
    assert str(other) in fails("verify", copy, "--teacher", other)
    rewritten(copy, "train/teacher_features", lambda values: values.__imul__(1.1))
    assert "train/teacher_features view" in fails("verify", copy, "--teacher", shapes_teacher)


@pytest.mark.fault
def test_repair_computes_only_what_is_damaged(
    run: Run, fails: Fails, store: Path, copy: Path, rng: np.random.Generator
) -> None:
    flip(copy / "train/fused_logits/c/1/0/0", rng)
    (copy / "train/teacher_features/c/2/0/0").unlink()
    flip(copy / "text/embeddings/zarr.json", rng)
    line = fails("verify", copy)
    assert line.code == "cache-verify-failed"
    assert "text/embeddings/zarr.json: changed and 2 more" in line and "richkd repair" in line
    assert "repair" in fails("distill", "--cache", copy, "--out", copy.parent / "run")
    done = run("repair", copy, "--json")
    assert done.code == 0, done.err
    assert done.json["blocks"] == ["train view 1 samples 0..47", "train view 2 samples 0..47"]
    assert not faults(copy)
    was, now = tree(store), tree(copy)
    assert was.keys() == now.keys()
    assert [name for name in was if was[name] != now[name]] == ["zarr.json"]  # `out`, in the recipe
    again = run("repair", copy)
    assert again.code == 0 and "nothing to repair" in again.err


def test_repair_needs_what_stage_one_had(
    make_store: Callable[..., Path],
    fails: Fails,
    clip_dir: Path,
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    weights = write_teacher(tmp_path / "w.safetensors", "resnet8", 16)
    path = make_store(teacher_weights=str(weights), out=str(tmp_path / "s.zarr"))
    flip(path / "train/teacher_logits/c/0/0/0", rng)
    before = tree(path)
    weights.unlink()
    line = fails("repair", path)
    assert line.code == "weights-missing" and str(weights) in line
    write_teacher(weights, "resnet8", 16, seed=3)
    line = fails("repair", path)
    assert line.code == "cache-settings-differ" and "teacher.sha256" in line
    assert changed(before, tree(path)) == []


def test_what_cannot_be_verified(fails: Fails, copy: Path, tmp_path: Path) -> None:
    assert fails("verify", tmp_path / "none.zarr").code == "cache-missing"
    text = (copy / "zarr.json").read_text()
    (copy / "zarr.json").write_text(text.replace('"alpha": 0.7', '"alpha": 0.8'))
    for command in ("verify", "repair"):
        assert fails(command, copy).code == "cache-unsealed"

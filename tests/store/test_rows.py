"""Caches that keep only some rows: their bytes, students from them, and what they cannot do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refusal, assert_same_run, changed, refuses, tree, write_teacher
from PIL import Image

import richkd
from richkd.analysis.teachers import analyze
from richkd.config.settings import Distill, Precompute
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.distill import distill
from richkd.report.analysis import WITHOUT_FEATURES
from richkd.store import schema
from richkd.store.checksums import write_sealed
from richkd.store.locations import open_location
from richkd.tools.verify import repair_store, verify_store
from richkd.training.identity import RunIdentity
from richkd.training.source import Source

Make = Callable[..., Path]
Run = Callable[..., Any]
Fails = Callable[..., Refusal]
QUIET = Report(quiet=True)
FEATURES = ("teacher_features", "clip_features")


@pytest.fixture(scope="module")
def plain(make_store: Make) -> Path:
    """A cache like `store`, without features."""
    return make_store(features="none")


@pytest.fixture(scope="module")
def bare(make_store: Make) -> Path:
    """The same with the CNN teacher's logits alone."""
    return make_store(rows=("teacher_logits",))


def arrays_of(path: Path) -> set[str]:
    return {*richkd.open_cache(path).specs}


def check_bytes(some: Path, whole: Path, *lacking: str) -> None:
    """Check that every file of a cache is one of another, and which arrays it lacks."""
    few, all_files = tree(some), tree(whole)
    assert changed(few, {name: all_files[name] for name in few}) == ["zarr.json"]
    assert arrays_of(whole) - arrays_of(some) == {*lacking}
    assert not [fault for check in verify_store(some, None, QUIET) for fault in check.faults]


def test_what_is_kept_is_the_same_to_the_byte(store: Path, plain: Path, bare: Path) -> None:
    features = [f"{split}/{name}" for split in ("train", "test") for name in FEATURES]
    check_bytes(plain, store, *features)
    check_bytes(bare, store, *features, "train/fused_logits")
    manifest = richkd.open_cache(plain).manifest
    assert manifest["rows"] == ["fused_logits", "teacher_logits"]
    assert "features" not in manifest["recipe"]
    whole = richkd.open_cache(store).manifest
    assert "rows" not in whole and not {"rows", "features"} & whole["recipe"].keys()
    assert richkd.open_cache(plain).slab(0).teacher_features is None
    assert set(richkd.torch_dataset(bare, 0)[0]) >= {"teacher_logits", "clip_similarity"}


@pytest.mark.slow
def test_photographs_and_the_largest_logits(
    make_store: Make, tmp_path: Path, rng: np.random.Generator
) -> None:
    for part in ("train", "val", "test"):
        for name in ("cat", "dog", "eel"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "p" / part / name / f"{number}.png")
    common = {
        "dataset": f"imagefolder:{tmp_path / 'p'}",
        "image_size": 32,
        "limit": None,
        "keep": "top-2",
        "teacher_weights": str(write_teacher(tmp_path / "t.safetensors", "resnet8", 3)),
        "block": 5,
    }
    whole = make_store(**common, out=str(tmp_path / "whole.zarr"))
    some = make_store(**common, rows=("teacher_logits", "clip_features"), out=str(tmp_path / "s"))
    features = [f"{split}/teacher_features" for split in ("train", "test", "validation")]
    check_bytes(some, whole, *features, *schema.part_names("train/fused_logits"))


def test_without_clip(make_store: Make) -> None:
    path = make_store(clip="none", features="none", views=1)
    cache = richkd.open_cache(path)
    assert cache.manifest["rows"] == ["teacher_logits"]
    assert not [fault for check in verify_store(path, None, QUIET) for fault in check.faults]
    with refuses("array-absent", "--clip none", "train/clip_features"):
        distill(Distill(cache=str(path), student="resnet8", method="richkd"))


@pytest.mark.fault
def test_resumed_repaired_and_checked_again(
    plain: Path, make_store: Make, tmp_path: Path, run: Run, shapes_teacher: Path
) -> None:
    path = Path(shutil.copytree(plain, tmp_path / "s.zarr"))
    before = tree(path)
    (path / "train/teacher_logits/c/1/0/0").unlink()
    assert repair_store(path, QUIET) == ["train view 1 samples 0..47"]
    assert changed(before, tree(path)) == ["zarr.json"]  # its recipe names `out`
    checked = run("verify", path, "--teacher", shapes_teacher, "--json")
    assert checked.code == 0, checked.err
    with refuses("cache-settings-differ", "rows", "['teacher_logits', 'fused_logits']"):
        make_store(out=str(path))
    manifest: Any = {**richkd.open_cache(plain).manifest}
    other = {name: value for name, value in manifest.items() if name != "rows"}
    difference = schema.difference(manifest, other)
    assert difference == "rows was ['fused_logits', 'teacher_logits'] and is now 'all'"


# --- students ------------------------------------------------------------------------------------


def train(cache: Path, out: Path, **settings: Any) -> Path:
    given = {"student": "resnet8", "epochs": 2, "batch_size": 16, "device": "cpu", "lr": 0.02}
    distill(Distill(cache=str(cache), out=str(out), **{**given, **settings}))
    return out


@pytest.mark.parametrize("blend", [{}, {"alpha": 0.4}])
def test_logits_alone_train_the_same_student(
    store: Path, plain: Path, tmp_path: Path, blend: dict[str, Any]
) -> None:
    runs = [
        train(path, tmp_path / path.parent.name, method="richkd-l", **blend)
        for path in (store, plain)
    ]
    assert_same_run(*runs)
    assert RunIdentity.of(richkd.open_cache(store)) == RunIdentity.of(richkd.open_cache(plain))


def target_rows(path: Path, **blend: Any) -> torch.Tensor:
    settings = Distill(cache=str(path), method="richkd-l", device="cpu", **blend)
    source = Source(settings, QUIET)
    name, _ = source.target(settings, "fused")
    rows: torch.Tensor = next(source.epochs([name], 2, 2))[0].rows[name].float()
    return rows


@pytest.mark.parametrize("keep", ["all", "top-5"])
def test_a_blend_that_is_not_kept_is_computed(
    store: Path, bare: Path, make_store: Make, keep: str
) -> None:
    """From whole logits it differs from the stored one by f16's rounding of the teacher's."""
    path = bare if keep == "all" else make_store(rows=("teacher_logits",), keep=keep)
    cache = richkd.open_cache(path)
    teacher = cache.read("train/teacher_logits", 1).double()
    cosines = cache.read("train/clip_similarity").double()
    clip = cache.manifest["clip"]
    assert clip is not None
    alpha, found = cache.manifest["alpha"], target_rows(path).double()
    again = alpha * teacher + (1 - alpha) * clip["logit_scale"] * cosines
    torch.testing.assert_close(found, again, rtol=2**-11, atol=1e-4)
    stored = richkd.open_cache(store).read("train/fused_logits", 1).double()
    room = 2**-11 * (2 * stored.abs() + teacher.abs()) + 1e-4
    if keep == "all":
        assert ((found - stored).abs() <= room).all()
    assert RunIdentity.of(cache).blend == "computed"
    assert torch.equal(target_rows(path, alpha=0.7), found.float())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "value"),
    [
        ("distill --method richkd", "method-needs-features", "richkd-l"),
        ("distill --method rkd", "method-needs-features", "teacher_features kd"),
        ("distill --method kd --target fused --prompts 0,3", "blend-needs-features", "(0, 3)"),
        ("distill --method richkd-l --clip-head probe", "blend-needs-features", "'probe'"),
        ("sweep --students resnet8", "method-needs-features", "richkd-l"),
    ],
)
def test_what_needs_features_says_so_first(
    plain: Path, fails: Fails, tmp_path: Path, words: str, code: str, value: str
) -> None:
    command, *rest = words.split()
    out = tmp_path / "runs"
    line = fails(command, "--cache", plain, *rest, "--out", out)
    assert line.code == code and all(part in line for part in (str(plain), *value.split()))
    assert "--features all" in line and not out.exists()


def test_a_recipe_says_so_before_stage_one(fails: Fails, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    for two, named in (
        ("[distill]\nmethod = 'crd'", "crd"),
        ("[sweep]\nstudents = ['a']", "richkd"),
    ):
        recipe.write_text(f"[precompute]\ndataset = 'shapes'\nfeatures = 'none'\n{two}\n")
        line = fails("run", recipe, "--cache", tmp_path / "c.zarr")
        assert line.code == "method-needs-features" and named in line
    assert sorted(tmp_path.iterdir()) == [recipe]


def test_settings_that_contradict() -> None:
    def rows(**given: Any) -> tuple[str, ...] | None:
        return Precompute(dataset="shapes", **given).rows

    assert rows() is rows(features="all") is rows(clip="none") is None
    assert rows(features="none") == rows(rows=["fused_logits", "teacher_logits"])
    assert rows(features="none", clip="none") == ("teacher_logits",)
    for given, value in (
        ({"rows": ["fused_logits"]}, "teacher_logits"),
        ({"rows": []}, "teacher_logits"),
        ({"rows": ["teacher_logits"], "features": "all"}, "features = 'all'"),
        ({"rows": ["teacher_logits", "clip_features"], "features": "none"}, "features = 'none'"),
        ({"rows": ["teacher_logits", "fused_logits"], "clip": "none"}, "no CLIP"),
    ):
        with refuses("value-out-of-range", value):
            rows(**given)
    with refuses("unknown-name", "'logits'", "teacher_features"):
        rows(rows=["logits"])


def test_manifests_that_cannot_be(plain: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(plain, tmp_path / "copy.zarr"))
    manifest: Any = richkd.open_cache(plain).manifest
    for entries in (
        {"rows": ["fused_logits"]},
        {"rows": []},
        {"rows": ["teacher_logits", "fused_logits"]},
        {"rows": ["labels", "teacher_logits"]},
        {"clip": None},
        {"rows": "teacher_logits"},
        {"rows": [["teacher_logits"]]},
    ):
        write_sealed(open_location(path), {**manifest, **entries})
        with refuses("manifest-damaged", path, "rows"):
            richkd.open_cache(path)
    more = ["fused_logits", "teacher_features", "teacher_logits"]
    write_sealed(open_location(path), {**manifest, "rows": more})
    with pytest.raises(RichKDError):  # it lacks them
        richkd.open_cache(path)


# --- the rest ------------------------------------------------------------------------------------


def test_analysis_copes(store: Path, bare: Path, run: Run, tmp_path: Path) -> None:
    found, whole = (analyze(richkd.open_cache(path), split="train") for path in (bare, store))
    for name in ("cnn", "clip"):
        assert found["teachers"][name] == whole["teachers"][name]
    fused = found["teachers"]["fused"]
    assert fused == pytest.approx(whole["teachers"]["fused"], rel=1e-3, abs=0.03)
    assert found["blend"]["prompt"] is None and found["blend"]["alpha"] == whole["blend"]["alpha"]
    assert found["consistency"]["cnn"].keys() == {"text"}
    done = run("analyze", bare, "--out", tmp_path)
    assert done.code == 0 and WITHOUT_FEATURES in done.err
    page = next(tmp_path.glob("*.html")).read_text()
    assert WITHOUT_FEATURES.replace("'", "&#39;") in page and 'id="best"' in page


def test_other_commands(bare: Path, run: Run) -> None:
    from richkd.tools.bench import store_bytes

    shown = run("inspect", bare)
    assert shown.code == 0 and "only teacher_logits" in shown.out
    assert store_bytes(richkd.open_cache(bare), QUIET)["as stored"]["bytes"] > 0
    with refuses("array-absent", "train/fused_logits", "cache.fuse"):
        richkd.open_cache(bare).read("train/fused_logits", 0)
    with refuses("array-absent", "test/teacher_features", "--features all"):
        richkd.open_cache(bare).read("test/teacher_features")
    torch.testing.assert_close(
        richkd.open_cache(bare).fuse(1).half().float(), target_rows(bare), rtol=1e-3, atol=1e-3
    )

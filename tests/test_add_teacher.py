"""Teachers that are added to a cache: the same rows, and nothing else changes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from forked import Forks, Kill
from helpers import changed, refuses, tree, write_clip, write_teacher
from PIL import Image

import richkd
from richkd.config.settings import Precompute
from richkd.core.progress import Report
from richkd.data.shapes import CLASS_NAMES
from richkd.precompute import add_teacher, precompute

Make = Callable[..., Path]
Run = Callable[..., Any]
Fails = Callable[..., Any]
QUIET = Report(quiet=True)
WRITE = "richkd.store.writer:StoreWriter.write"
# fewer test images, and blocks of 16 samples: three of the test split, nine of training views
FEW = {"richkd.data.datasets:SHAPES_TEST": 40, "richkd.store.schema:MAX_BLOCK": 16}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("b") / "b.safetensors"
    return write_teacher(path, "resnet14", len(CLASS_NAMES), seed=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "other", seed=1)


@pytest.fixture
def cnn(weights: Path) -> dict[str, Any]:
    return {"teacher": "resnet14", "teacher_weights": str(weights), "device": "cpu"}


def copy_of(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "shapes.zarr"))


def stamps(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def differing(one: Path, other: Path) -> list[str]:
    """Files that differ; manifests name the location of their cache."""
    names = changed(tree(one), tree(other))
    assert {*names} <= {"zarr.json", "teachers/b/zarr.json", "teachers/c/zarr.json"}, names
    return names


def test_nothing_else_changes(store: Path, cnn: dict[str, Any], clip: Path, tmp_path: Path) -> None:
    path = copy_of(store, tmp_path)
    bytes_before, stamps_before = tree(path), stamps(path)
    add_teacher(path, cnn, name="b")
    first = tree(path), stamps(path)
    add_teacher(path, {"clip": str(clip), "device": "cpu"}, name="c")
    for files, times in ((bytes_before, stamps_before), first):
        assert {name: tree(path)[name] for name in files} == files
        assert {name: stamps(path)[name] for name in times} == times
    cache = richkd.open_cache(path)
    assert cache.teachers == ("cnn", "clip", "b", "c")
    plain = zarr.open_group(path, mode="r")
    rows: Any = plain["teachers/b/train/teacher_logits"]
    assert np.array_equal(cache.read("teachers/b/train/teacher_logits", 1), rows[1])


def test_its_rows_are_those_of_a_cache_that_was_made_with_it(
    make_store: Make, store: Path, cnn: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    path = copy_of(store, tmp_path)
    add_teacher(path, cnn, name="b")
    add_teacher(path, {"clip": str(clip), "prompts": "single", "device": "cpu"}, name="c")
    whole = tree(make_store(**cnn, clip=str(clip), prompts="single"))
    own = {name: content for name, content in tree(path / "teachers").items() if "/c/" in name[2:]}
    assert sum("/complete/" not in name for name in own) == 13  # 8 arrays of c, 5 chunks of b
    for name, content in own.items():
        array = name.partition("/")[2]
        assert array.startswith("complete/") or whole[array] == content, name


def test_at_once_or_one_after_the_other(
    make_store: Make, cnn: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    further = {"b": cnn, "c": {"clip": str(clip), "prompts": "single"}}
    at_once = make_store(teachers=further)
    path = make_store()
    for name, given in further.items():
        add_teacher(path, {**given, "device": "cpu"}, name=name)
    differing(at_once, path)
    one, other = richkd.open_cache(at_once), richkd.open_cache(path)
    assert "teachers" not in one.manifest["recipe"]
    for name in further:
        manifests = [
            {**cache.addition(name).manifest, "seal": "", "recipe": {}} for cache in (one, other)
        ]
        assert manifests[0] == manifests[1]
    again = precompute(
        Precompute(**{**one.manifest["recipe"], "teachers": further}), report=QUIET
    )  # a complete cache is left as it is
    assert again.teachers == ("cnn", "clip", "b", "c")


@pytest.mark.slow
@pytest.mark.fault
def test_killed_ten_times(forks: Forks, make_store: Make, weights: Path) -> None:
    path, whole = make_store(), make_store()
    before, times = tree(path), stamps(path)
    words = [
        "--teacher",
        "resnet14",
        "--teacher-weights",
        weights,
        "--name",
        "b",
        "--device",
        "cpu",
    ]
    for _ in range(10):
        killed = forks.run("add-teacher", path, *words, kill=Kill(WRITE), values=FEW)
        assert killed.code == -signal.SIGKILL, killed.err
        cache = richkd.open_cache(path)  # still usable, without the half-written teacher
        assert cache.read("train/teacher_logits", 0).shape == (48, 16)
        with refuses("cache-incomplete", "add-teacher", "teachers/b"):
            cache.addition("b")
    for cache_path in (path, whole):
        done = forks.run("add-teacher", cache_path, *words, values=FEW)
        assert done.code == 0, done.err
    assert {name: tree(path)[name] for name in before} == before
    assert {name: stamps(path)[name] for name in times} == times
    assert not list((path / "teachers").glob(".*.new"))
    differing(path, whole)


def test_photographs_at_the_teachers_own_size(tmp_path: Path, clip_dir: Path, clip: Path) -> None:
    rng = np.random.default_rng(5)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40 + number, 52, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    a = write_teacher(tmp_path / "a.safetensors", "resnet8", 2)
    b = write_teacher(tmp_path / "b.safetensors", "resnet14", 2, seed=3)
    images = {
        "dataset": f"imagefolder:{tmp_path / 'photos'}",
        "image_size": 32,
        "views": 2,
        "device": "cpu",
    }
    other = {"teacher": "resnet14", "teacher_weights": str(b), "teacher_size": 48}
    path = tmp_path / "a.zarr"
    precompute(
        Precompute(
            **images, teacher="resnet8", teacher_weights=str(a), clip=str(clip_dir), out=str(path)
        )
    )
    add_teacher(path, {**other, "device": "cpu"}, name="b")
    add_teacher(path, {"clip": str(clip), "device": "cpu"}, name="c")
    whole = precompute(Precompute(**images, **other, clip=str(clip), out=str(tmp_path / "b.zarr")))
    cache = richkd.open_cache(path)
    for name in ("train/teacher_logits", "train/teacher_features", "test/teacher_logits"):
        assert torch.equal(cache.read(f"teachers/b/{name}"), whole.read(name))
    for name in ("train/clip_similarity", "test/clip_features", "text/embeddings"):
        assert torch.equal(cache.read(f"teachers/c/{name}"), whole.read(name))


def test_only_the_rows_that_the_cache_keeps(
    make_store: Make, cnn: dict[str, Any], clip: Path
) -> None:
    path = make_store(features="none", keep="top-4", dtype="float32")
    for name, given in (("b", cnn), ("c", {"clip": str(clip), "device": "cpu"})):
        group = add_teacher(path, given, name=name)
        assert not any(array.endswith("features") for array in group.specs)
    cache = richkd.open_cache(path)
    assert cache.addition("b").kept == {"train/teacher_logits"}
    assert cache.read("teachers/b/train/teacher_logits", 1).shape == (48, 16)
    assert cache.addition("c").manifest.get("keep") is None


def test_damage_is_found_and_repaired(
    run: Run, make_store: Make, cnn: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    add_teacher(path, {"clip": str(clip), "device": "cpu"}, name="c")
    whole = tree(path)
    assert run("verify", path, "--teacher", f"b={cnn['teacher_weights']}").code == 0
    (path / "teachers/c/test/clip_similarity/c/0/0").unlink()
    chunk = path / "teachers/b/train/teacher_logits/c/1/0/0"
    chunk.write_bytes(b"?" + chunk.read_bytes()[1:])
    broken = run("verify", path)
    assert broken.code == 2 and "train/teacher_logits/c/1/0/0" in broken.err
    with refuses("cache-damaged", "teachers/b"):
        richkd.open_cache(path).read("teachers/b/train/teacher_logits")
    repaired = run("repair", path, "--json")
    assert repaired.json["blocks"] == ["b: train view 1 samples 0..47", "c: test samples 0..39"]
    assert changed(tree(path), whole) == []


def test_inspect_shows_it(run: Run, make_store: Make, cnn: dict[str, Any]) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    shown = run("inspect", path)
    assert "added: b" in shown.out and "teachers/b/train/teacher_logits" in shown.out
    assert run("inspect", path / "teachers" / "b").code == 0
    assert run("inspect", path, "--json").json["added"]["b"]["complete"]


def test_a_cache_that_is_overwritten_loses_it(make_store: Make, cnn: dict[str, Any]) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    half = path / "teachers" / ".c.new" / "train" / "teacher_logits" / "zarr.json"
    half.parent.mkdir(parents=True)  # of a process that was killed
    half.write_text("{}")
    manifest = richkd.open_cache(path).manifest
    again = precompute(Precompute(**manifest["recipe"]), overwrite=True, report=QUIET)
    assert again.teachers == ("cnn", "clip") and not (path / "teachers").exists()


def test_of_another_cache(make_store: Make, cnn: dict[str, Any]) -> None:
    path, other = make_store(), make_store(seed=1)
    add_teacher(path, cnn, name="b")
    shutil.copytree(path / "teachers", other / "teachers")
    with refuses("teacher-of-other-cache", "views", other / "teachers" / "b"):
        richkd.open_cache(other).addition("b")


BAD = {
    "--name b": ("teacher-not-named",),
    "--clip none": ("teacher-not-named",),
    "--teacher none": ("teacher-not-named",),
    "--teacher resnet14 --dataset fashion-mnist": ("setting-of-the-cache", "fashion-mnist"),
    "--teacher resnet14 --clip demo": ("teacher-not-named",),
    "--teacher resnet14 --prompts single": ("setting-of-other-teacher", "--prompts"),
    "--clip demo --teacher-size 64": ("setting-of-other-teacher", "--teacher-size"),
    "--teacher resnet41 --teacher-weights b.safetensors": ("unknown-model", "resnet44"),
    "--teacher resnet14 --teacher-weights none.pth": ("weights-missing", "none.pth"),
    "--teacher resnet14 --name clip": ("teacher-name", "clip"),
    "--teacher resnet14 --name ../x": ("teacher-name", "../x"),
    "--clip none.there/at-all": ("clip-directory", "none.there"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(
    fails: Fails, store: Path, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = copy_of(store, tmp_path)
    code, *values = BAD[words]
    error = fails("add-teacher", path, *words.split(), "--device", "cpu")
    assert error.code == code and all(value in error for value in values), error
    assert not (path / "teachers").exists()


def test_two_teachers_of_one_name(
    fails: Fails, run: Run, make_store: Make, cnn: dict[str, Any], shapes_teacher: Path
) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    before = tree(path)
    words = ["add-teacher", path, "--teacher", "resnet8", "--teacher-weights", shapes_teacher]
    error = fails(*words, "--name", "b", "--device", "cpu")
    assert error.code == "teacher-exists" and "--name" in error and "--overwrite" in error
    assert changed(before, tree(path)) == []
    same = ["--teacher", "resnet14", "--teacher-weights", cnn["teacher_weights"], "--name", "b"]
    assert run("add-teacher", path, *same, "--device", "cpu").code == 0  # is already there
    assert changed(before, tree(path)) == []
    assert run(*words, "--name", "b", "--device", "cpu", "--overwrite").code == 0
    assert richkd.open_cache(path).addition("b").manifest["teacher"]["name"] == "resnet8"


def test_tables_of_a_recipe_are_checked_before_anything_is_computed(
    fails: Fails, tmp_path: Path, shapes_teacher: Path
) -> None:
    recipe = tmp_path / "two.toml"
    out = tmp_path / "c.zarr"
    head = f'[precompute]\ndataset = "shapes"\nlimit = 32\nclip = "none"\nout = "{out}"\n'
    head += f'teacher = "resnet8"\nteacher_weights = "{shapes_teacher}"\n'
    for table, code in (
        ('[precompute.teachers.clip]\nteacher = "resnet14"\n', "teacher-name"),
        ('[precompute.teachers.b]\nviews = 3\nteacher = "resnet14"\n', "setting-of-the-cache"),
        ("[precompute.teachers.b]\nteachr = 'resnet14'\n", "unknown-setting"),
        ("[precompute.teachers]\nb = 3\n", "teacher-not-named"),
        ("[precompute.teachers.b]\nclip = 'none'\n", "teacher-not-named"),
        ("[precompute.teachers.b]\nclip = 'no/where'\n", "clip-directory"),
        ("[precompute.teachers.b]\nteacher = 'resnet77'\n", "unknown-model"),
        (
            "[precompute.teachers.b]\nteacher = 'resnet8'\nteacher_weights = 'x.pt'\n",
            "weights-missing",
        ),
    ):
        recipe.write_text(head + table)
        assert fails("precompute", "--recipe", recipe).code == code
        assert not out.exists()


def test_a_cnn_is_not_taken_for_a_clip_of_its_name(
    fails: Fails, make_store: Make, cnn: dict[str, Any], clip: Path
) -> None:
    path = make_store()
    add_teacher(path, {"clip": str(clip), "device": "cpu"}, name="c")
    add_teacher(path, cnn, name="b")
    words = ["--teacher", "resnet14", "--teacher-weights", cnn["teacher_weights"]]
    error = fails("add-teacher", path, *words, "--name", "c", "--device", "cpu")
    assert error.code == "teacher-exists" and "CLIP" in error
    error = fails("add-teacher", path, "--clip", clip, "--name", "b", "--device", "cpu")
    assert error.code == "teacher-exists" and "CNN" in error


def test_a_lost_manifest_is_damage(
    run: Run, fails: Fails, make_store: Make, cnn: dict[str, Any]
) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    (path / "teachers" / "b" / "zarr.json").rename(path / "teachers" / "b" / "zarr.json.tmp")
    assert "teachers/b/zarr.json: missing" in fails("verify", path)
    (path / "teachers" / "b" / "zarr.json.tmp").rename(path / "teachers" / "b" / "zarr.json")
    assert run("verify", path).code == 0
    assert fails("verify", path, "--teacher", "nope=x.pt").code == "unknown-teacher"
    manifest = path / "teachers" / "b" / "zarr.json"
    manifest.write_text(manifest.read_text().replace("resnet14", "resnet20"))
    error = fails("verify", path)
    assert error.code == "cache-unsealed" and "precompute --overwrite" not in error


def test_links_are_not_written_through(
    fails: Fails, make_store: Make, cnn: dict[str, Any], tmp_path: Path
) -> None:
    path = make_store()
    add_teacher(path, cnn, name="b")
    (path / "teachers").rename(tmp_path / "elsewhere")
    (path / "teachers").symlink_to(tmp_path / "elsewhere")
    assert richkd.open_cache(path).teachers == ("cnn", "clip", "b")  # reading is fine
    words = ["--teacher", "resnet14", "--teacher-weights", cnn["teacher_weights"]]
    error = fails("add-teacher", path, *words, "--name", "c", "--device", "cpu")
    assert error.code == "teacher-is-link" and str(path / "teachers") in error

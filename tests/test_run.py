"""Recipes from end to end, each of those that richkd brings along, on drawn images."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refusal, tree, write_teacher
from PIL import Image
from timm.data import ImageNetInfo

import richkd
from richkd.config import recipes
from richkd.run import published_lines

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
NAMES = sorted(path.stem for path in recipes.packaged().glob("*.toml"))


@pytest.fixture
def tiny(
    clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Any]]:
    """Flags that make a recipe small: few images, an epoch or two, weights that were not trained.

    The images are drawings, or a folder of noise where the recipe is for a folder.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("richkd.data.datasets.SHAPES_TEST", 32)

    def flags(name: str) -> list[Any]:
        content = recipes.load(name)
        teacher = content.table("precompute")["teacher"]
        weights = tmp_path / f"{teacher.replace('/', '-')}.safetensors"
        if not weights.exists():
            write_teacher(weights, teacher, 16)
        folder = content.table("precompute")["dataset"].startswith("imagefolder")
        dataset = f"imagefolder:{write_folder(tmp_path / 'noise', 16)}" if folder else "shapes"
        given = content.table("distill").get("milestones")
        epochs = ["--epochs", 2, "--milestones", 1] if given else ["--epochs", 1]
        return [
            "run",
            name,
            "--dataset",
            dataset,
            "--limit",
            32,
            *epochs,
            "--views",
            3,
            "--clip",
            clip_dir,
            "--teacher-weights",
            weights,
        ]

    return flags


def write_folder(folder: Path, num_classes: int) -> Path:
    """Two training images and one to test on of some classes of ImageNet, each of another size."""
    rng = np.random.default_rng(0)
    classes = ImageNetInfo("imagenet1k").label_names()[:num_classes]
    for split, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for image in range(count):
                side = 48 + number + image
                pixels = rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{image}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs(run: Run, tiny: Callable[..., list[Any]], name: str) -> None:
    done = run(*tiny(name), "--json")
    assert done.code == 0, done.err
    content = recipes.load(name)
    # of a recipe with a sweep all runs are listed
    summary = {**done.json, **done.json.get("runs", [{}])[-1]}
    assert Path(summary["page"]).is_file()
    assert summary["student"] == content.table("distill")["student"]
    assert summary["method"] == content.table("distill").get("method", "richkd")
    assert summary["published"] == {key: asdict(value) for key, value in content.published.items()}
    teacher = content.table("precompute")["teacher"]
    data = "noise" if "imagenet" in name else "shapes"
    made = content.table("precompute").get("out", f"cache/{data}-{teacher.replace('/', '-')}.zarr")
    cache = richkd.open_cache(made)
    assert cache.manifest["teacher"]["name"] == teacher
    recorded = tomllib.loads(Path(summary["run"], "recipe.toml").read_text())
    light = summary["student"] in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
    assert recorded["lr"] == (0.2 if "imagenet" in name else 0.01 if light else 0.05)
    assert Path(summary["run"], "summary.json").is_file()


def test_the_published_pairs_are_all_there() -> None:
    pairs = {
        (load.table("precompute")["teacher"], load.table("distill")["student"])
        for load in map(recipes.load, NAMES)
        if load.published
    }
    assert len(pairs) == 14
    for name in NAMES:
        for method, figure in recipes.load(name).published.items():
            assert 60 < figure.top1 < 80, (name, method)
            assert figure.epoch in recipes.EPOCHS and figure.source.count("/") == 1, (name, method)


def test_figures_are_said_by_kind_of_epoch() -> None:
    lines = list(published_lines(recipes.load("resnet32x4-resnet8x4").published))
    assert [line.partition(": ")[2] for line in lines] == [
        "teacher 79.42, ce 72.50, kd 73.33, crd 75.51",
        "dkd 76.32, mlkd 77.08, kd-ls 76.62, dkd-ls 77.01, mlkd-ls 78.28",
        "revkd 75.63",
    ]
    assert "last epoch" in lines[0] and "best epoch on the test images" in lines[1]
    assert "unknown epoch" in lines[2]
    assert not list(published_lines({}))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(run: Run, tiny: Callable[..., list[Any]]) -> None:
    command = tiny("kd-t4")
    first = run(*command, "--json").json
    before = tree(Path("cache")), tree(Path("runs"))
    again = run(*command)
    assert again.code == 0
    assert again.err.count("is already complete") == 2
    assert "published by others" in again.err and "kd 73.33" in again.err
    assert (tree(Path("cache")), tree(Path("runs"))) == before
    other = run(*command, "--method", "ce", "--seed", 1, "--json").json
    assert other["run"] != first["run"] and other["method"] == "ce"
    assert tree(Path("cache")) == before[0]


@pytest.mark.slow
def test_a_sweep_and_its_report(run: Run, tiny: Callable[..., list[Any]]) -> None:
    command = tiny("shapes")
    outcome = run(*command, "--json").json
    runs = {(one["method"], one["seed"]) for one in outcome["runs"]}
    assert runs == {(m, s) for m in ("ce", "kd", "richkd-l", "richkd") for s in range(3)}
    assert outcome["page"] == "runs/shapes/report.html"
    rows = json.loads(Path("runs/shapes/report.json").read_text())["leaderboard"]
    assert {row["method"]: row["n"] for row in rows} == {m: 3 for m, _ in runs}
    before = tree(Path("cache")), tree(Path("runs"))
    again = run(*command)
    assert again.code == 0 and again.out.strip().endswith(outcome["page"])
    assert "report.html is up to date" in again.err
    assert (tree(Path("cache")), tree(Path("runs"))) == before
    one = run(*command, "--method", "kd", "--seed", 7, "--json").json
    assert one["method"] == "kd" and one["seed"] == 7
    rows = json.loads(Path("runs/shapes/report.json").read_text())["leaderboard"]
    assert {row["method"]: row["n"] for row in rows} == {**{m: 3 for m, _ in runs}, "kd": 4}


@pytest.mark.slow
def test_a_store_or_run_of_other_settings_is_named(
    run: Run, fails: Fails, tiny: Callable[..., list[Any]]
) -> None:
    command = tiny("kd-t4")
    assert run(*command).code == 0
    before = tree(Path())
    for words, code, value in (
        (["--student", "resnet9", "--cache", "x.zarr"], "unknown-model", "resnet9"),
        (["--method", "kdd", "--cache", "x.zarr"], "unknown-name", "kdd"),
        (["--limit", 16], "cache-settings-differ", "limit was 32 and is now 16"),
        (["--epochs", 2], "run-settings-differ", "epochs was 1 and is now 2"),
    ):
        line = fails(*command, *words)
        assert line.code == code and value in line
    write_teacher(Path("other.safetensors"), "resnet32x4", 16, seed=1)
    line = fails(*command, "--teacher-weights", "other.safetensors")
    assert line.code == "cache-teacher-differs"
    assert "other.safetensors" in line and "--cache" in line
    Path("other.safetensors").unlink()
    assert tree(Path()) == before


@pytest.mark.slow
def test_options_of_the_method_that_was_chosen(run: Run, tiny: Callable[..., list[Any]]) -> None:
    done = run(*tiny("vgg13-vgg8"), "--method", "dkd", "--set", "warmup=3", "--json")
    assert done.code == 0, done.err
    recorded = tomllib.loads(Path(done.json["run"], "recipe.toml").read_text())
    assert recorded["options"]["dkd"] == {"nckd_weight": 6.0, "warmup": 3}


@pytest.mark.slow
def test_listings(run: Run, fails: Fails) -> None:
    listed = run("recipes", "--json").json
    assert set(listed) == set(NAMES)
    assert listed["vgg13-vgg8"]["published"]["dkd"] == {
        "top1": 74.68,
        "epoch": "best",
        "source": "sunshangquan/logit-standardization-KD",
    }
    methods = run("methods", "--json").json
    assert methods["dkd"]["options"]["nckd_weight"] == 8.0
    assert methods["richkd"]["target"] == "fused" and methods["crd"]["target"] is None
    assert run("methods", "kd", "--json").json.keys() == {"kd"}
    zoo = run("models", "--json").json
    assert len(zoo) == 23 and zoo["resnet8x4"]["parameters"] == 1_233_540
    found = run("models", "mobilenet*", "--json").json
    assert found["MobileNetV2"]["zoo"] and not found["mobilenetv3_small_050"]["zoo"]
    for words, code in (
        (("models", "nothing*"), "unknown-model"),
        (("methods", "kdd"), "unknown-name"),
        (("run", "kd-t3"), "recipe-missing"),
    ):
        line = fails(*words)
        assert line.code == code and words[1] in line
    for command in (("recipes",), ("methods",), ("methods", "richkd"), ("models",)):
        assert run(*command).out

"""`plan` against what stage one then really takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refusal, write_teacher
from PIL import Image

from richkd.config.settings import Precompute
from richkd.core.progress import Report
from richkd.data.shapes import CLASS_NAMES
from richkd.precompute import precompute
from richkd.store.schema import array_specs
from richkd.tools import plan as plans

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rough pace, measured quickly."""
    monkeypatch.setattr(plans, "plan", partial(plans.plan, enough=0.02, most=64))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """400 + 100 JPEGs, coarse shapes with grain, in five classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("val", 100)):
        for number in range(count):
            folder = tmp_path / "images" / part / f"class-{number % 5}"
            folder.mkdir(parents=True, exist_ok=True)
            size = rng.integers(90, 140, 2).tolist()
            coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(size)
            grain = rng.normal(0, 12, np.asarray(coarse).shape)
            pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=85)
    return tmp_path / "images"


def settings_of(
    kind: str, request: pytest.FixtureRequest, clip: Path, tmp_path: Path
) -> Precompute:
    """Real settings, of a size that stage one takes some ten seconds for."""
    common: dict[str, Any] = {"clip": str(clip), "device": "cpu", "out": str(tmp_path / "s.zarr")}
    if kind == "drawings":
        weights = write_teacher(tmp_path / "resnet20.safetensors", "resnet20", len(CLASS_NAMES))
        return Precompute(
            dataset="shapes",
            limit=3000,
            views=5,
            teacher="resnet20",
            teacher_weights=str(weights),
            **common,
        )
    folder = request.getfixturevalue("images")
    weights = write_teacher(tmp_path / "resnet20.safetensors", "resnet20", 5)
    return Precompute(
        dataset=f"imagefolder:{folder}",
        image_size=64,
        views=6,
        teacher="resnet20",
        teacher_weights=str(weights),
        **common,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drawings", "photographs"])
def test_sizes_within_5_and_time_within_30_percent(
    kind: str,
    request: pytest.FixtureRequest,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("richkd.data.datasets.SHAPES_TEST", 500)
    settings = settings_of(kind, request, clip_dir, tmp_path)
    ratios = []
    for attempt in range(3):  # others may use the machine meanwhile, in one of the two
        report = Report(quiet=True)
        planned = plans.plan(settings, report)
        said: list[str] = []
        monkeypatch.setattr(report, "log", said.append)
        cache = precompute(settings, overwrite=attempt > 0, report=report)
        taken = next(
            float(found[1])
            for line in said
            if (found := re.search(r"complete: .* in ([\d.]+) s;", line))
        )
        stored = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
        print(
            f"{kind}: bytes {planned['stored_bytes'] / stored:.3f} of {stored:,}, "
            f"time {planned['seconds'] / taken:.3f} of {taken:.1f} s"
        )
        assert planned["stored_bytes"] == pytest.approx(stored, rel=0.05)
        for name, count in planned["arrays"].items():
            chunks = (cache.path / name / "c").rglob("*")
            real = sum(file.stat().st_size for file in chunks if file.is_file())
            if real > 0.05 * stored:
                assert count == pytest.approx(real, rel=0.12), name
        assert planned["raw_bytes"] == sum(spec.nbytes for spec in cache.specs.values())
        ratios.append(planned["seconds"] / taken)
        if abs(ratios[-1] - 1) <= 0.3:
            break
    assert abs(ratios[-1] - 1) <= 0.3, ratios


@pytest.mark.parametrize(
    "change", [{"keep": "top-3"}, {"dtype": "float32"}, {"keep_bits": 6}, {"clip": "none"}]
)
def test_bytes_of_every_kind_of_rows(
    change: dict[str, Any], quick: None, clip_dir: Path, tmp_path: Path, shapes_teacher: Path
) -> None:
    given: dict[str, Any] = {
        "dataset": "shapes",
        "limit": 256,
        "views": 2,
        "teacher": "resnet8",
        "clip": str(clip_dir),
        "teacher_weights": str(shapes_teacher),
        "device": "cpu",
        "out": str(tmp_path / "s.zarr"),
    }
    settings = Precompute(**{**given, **change})
    planned = plans.plan(settings, Report(quiet=True))
    cache = precompute(settings)
    stored = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    assert planned["arrays"].keys() == array_specs(cache.manifest).keys()
    assert planned["stored_bytes"] == pytest.approx(stored, rel=0.08)  # chunks are small here
    passes = planned["passes"]
    assert passes["cnn"] == 2 * 256 + 40
    assert passes["clip"] == (0 if change.get("clip") else 256 + 40)


def test_imagenet_before_there_is_any_of_it(
    run: Run, quick: None, clip_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [
        "plan",
        "--dataset",
        "imagenet",
        "--image-size",
        32,
        "--teacher",
        "resnet8",
        "--clip",
        clip_dir,
        "--views",
        8,
        "--device",
        "cpu",
        "--price",
        0.1,
    ]
    done = run(*words)
    assert done.code == 0, done.err
    assert "imagenet: 1,281,167 + 50,000 images of 32×32, 1,000 classes" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "10,299,336 passes of the CNN teacher, 1,331,167 of CLIP and 12,000 of its" in done.err
    planned = run(*words, "--json").json
    options = planned["options"]
    by_row = {
        (o["views"], o["dtype"], o["keep"], o["keep_bits"]): o for o in options if o["rows"] is None
    }
    assert {o["keep"] for o in options if o["rows"]} == {"all", "top-50"}  # the others: features
    chosen = by_row[8, "float16", "all", None]
    # teacher logits, fused logits and 64 features a view; compression takes some of it
    rows = 1_281_167 * 8 * 2 * (2 * 1000 + 64)
    assert 0.8 * rows < chosen["stored_bytes"] < 1.2 * rows
    assert chosen["usd_a_month"] == pytest.approx(chosen["stored_bytes"] / 1e9 * 0.1)
    assert by_row[8, "float16", "top-50", None]["stored_bytes"] < 0.4 * chosen["stored_bytes"]
    assert by_row[8, "float32", "all", None]["stored_bytes"] > 1.5 * chosen["stored_bytes"]
    sizes = [by_row[views, "float16", "all", None]["stored_bytes"] for views in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)


@pytest.mark.slow
def test_the_pace_of_another_machine(
    run: Run, fails: Fails, quick: None, clip_dir: Path, tmp_path: Path
) -> None:
    words = [
        "plan",
        "--dataset",
        "shapes",
        "--limit",
        64,
        "--views",
        2,
        "--device",
        "cpu",
        "--clip",
        clip_dir,
        "--teacher",
        "resnet8",
    ]
    here = run(*words, "--json").json
    pace = {**here["pace"], "hardware": "A GPU", "clean_s": 0.5, "view_s": 0.25, "text_s": 0.125}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**here, "pace": pace}))
    there = run(*words, "--measured", file, "--json").json
    # 64 training images with two views, 40 test images with one, 16 classes by 12 prompts
    assert there["seconds"] == pytest.approx(64 * (0.5 + 2 * 0.25) + 40 * 0.75 + 192 * 0.125)
    assert "(A GPU)" in run(*words, "--measured", file).err
    line = fails(*words[:-1], "resnet14", "--measured", file)
    assert line.code == "plan-measured-differs" and "'resnet8'" in line and "'resnet14'" in line
    for content in ("", "[]", "{}", json.dumps({"pace": {**pace, "clean_s": "fast"}})):
        file.write_text(content)
        assert fails(*words, "--measured", file).code == "plan-unreadable"
    assert fails(*words, "--measured", tmp_path / "nowhere").code == "plan-unreadable"


def test_mistakes(fails: Fails, quick: None, tmp_path: Path) -> None:
    line = fails("plan", "--dataset", f"imagefolder:{tmp_path / 'no'}")
    assert line.code == "dataset-folder-missing" and "--dataset imagenet" in line
    assert fails("plan").code == "dataset-not-given"
    line = fails(
        "plan",
        "--dataset",
        "imagenet",
        "--clip",
        "ViT-nothing",
        "--image-size",
        32,
        "--teacher",
        "resnet8",
    )
    assert "'ViT-nothing'" in line
    line = fails("plan", "--dataset", "shapes", "--teacher", "no-net")
    assert line.code == "unknown-model" and "'no-net'" in line
    line = fails("plan", "--dataset", "shapes", "--teacher-weights", "no.pt", "--clip", "none")
    assert line.code == "weights-missing" and "no.pt" in line


def test_nothing_is_left_and_nothing_of_pytorchs_is_moved(
    quick: None,
    clip_dir: Path,
    shapes_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    plans.plan(
        Precompute(
            dataset="shapes",
            limit=32,
            views=1,
            teacher="resnet8",
            teacher_weights=str(shapes_teacher),
            clip=str(clip_dir),
            device="cpu",
        ),
        Report(quiet=True),
    )
    assert not list(tmp_path.iterdir())

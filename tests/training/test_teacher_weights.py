"""Blends of any number of teachers in stage two, against plain numpy in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses, write_clip, write_teacher
from test_distill import metrics, train

import richkd
from richkd.analysis.results import leaderboard
from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.data.shapes import CLASS_NAMES
from richkd.precompute import add_teacher
from richkd.store.added import array_of
from richkd.training.run_folder import load_runs
from richkd.training.source import Source

Make = Callable[..., Path]
Rows = np.ndarray[Any, Any]
QUIET = Report(quiet=True)
WEIGHTS = {"cnn": 0.5, "clip": 0.1, "b": 0.15, "c": 0.25}
SHOWN = "b=0.15,c=0.25,clip=0.1,cnn=0.5"


@pytest.fixture(scope="module")
def several(make_store: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in f32 with a CNN, a CLIP, and one of each that were added: `b` and `c`."""
    folder, path = tmp_path_factory.mktemp("several"), make_store(dtype="float32")
    weights = write_teacher(folder / "b.safetensors", "resnet14", len(CLASS_NAMES), seed=1)
    clip = write_clip(folder / "clip", seed=1, init_logit_bias=-3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("richkd.data.datasets.SHAPES_TEST", 40)
        given = {"teacher": "resnet14", "teacher_weights": str(weights), "device": "cpu"}
        add_teacher(path, given, name="b")
        add_teacher(path, {"clip": str(clip), "device": "cpu"}, name="c")
    return path


def rows_of(cache: richkd.TeacherCache, row: str, view: int) -> Rows:
    own = view if row.endswith("teacher_logits") else None
    return cache.read(array_of("train", row), own).numpy().astype(np.float64)


def logits_of(cache: richkd.TeacherCache, view: int) -> dict[str, Rows]:
    """The logits of each teacher on its own scale."""
    clip, added = cache.manifest["clip"], cache.addition("c").manifest["clip"]
    assert clip is not None and added is not None and added["logit_bias"] == -3.0
    return {
        "cnn": rows_of(cache, "teacher_logits", view),
        "clip": clip["logit_scale"] * rows_of(cache, "clip_similarity", view),
        "b": rows_of(cache, "b/teacher_logits", view),
        "c": added["logit_scale"] * rows_of(cache, "c/clip_similarity", view) - 3.0,
    }


def target_rows(path: Path, view: int, **settings: Any) -> Rows:
    chosen = Distill(cache=str(path), device="cpu", **settings)
    source = Source(chosen, QUIET)
    name, _ = source.target(chosen, "fused")
    rows, _ = next(source.epochs([name], view + 1, view + 1))
    return np.asarray(rows.rows[name].float())


def test_logits_of_equal_spread_are_summed_by_weight(several: Path) -> None:
    cache = richkd.open_cache(several)
    spread = {k: z.std(1, ddof=1).mean() for k, z in logits_of(cache, 0).items()}
    for view in (0, 2):
        z = logits_of(cache, view)
        wanted = sum(w * spread["cnn"] / spread[k] * z[k] for k, w in WEIGHTS.items())
        np.testing.assert_allclose(
            target_rows(several, view, weights=WEIGHTS), wanted, rtol=1e-4, atol=1e-4
        )
        plain = sum(w * z[k] for k, w in WEIGHTS.items())
        found = target_rows(several, view, weights=WEIGHTS, balance="none")
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)
        two = target_rows(several, view, weights={"cnn": 3, "clip": 0, "b": 1, "c": 0})
        wanted = 0.75 * z["cnn"] + 0.25 * spread["cnn"] / spread["b"] * z["b"]
        np.testing.assert_allclose(two, wanted, rtol=1e-4, atol=1e-4)


def test_the_features_of_a_target_are_its_own(several: Path) -> None:
    settings = Distill(cache=str(several), student="resnet8", target="b", lr=0.05, device="cpu")
    trainer, rows, _ = Source(settings, QUIET).trainer(settings)
    assert {*rows} == {"target_logits", "b/features"} and trainer.method.weights == {"b": 1.0}


def test_one_teacher_alone(several: Path) -> None:
    cache = richkd.open_cache(several)
    for name in ("b", "c"):
        found = target_rows(several, 1, target=name)
        np.testing.assert_allclose(found, logits_of(cache, 1)[name], rtol=1e-5, atol=1e-5)


def test_weights_auto_are_likelier_than_others(several: Path) -> None:
    settings = Distill(cache=str(several), weights="auto", holdout=0.5, device="cpu")
    _, target = Source(settings, QUIET).target(settings, "fused")
    assert sum(target.weights.values()) == pytest.approx(1)
    cache = richkd.open_cache(several)
    from richkd.training.targets import held_out

    index = held_out(40, 0.5)[0].numpy()
    labels = cache.read("test/labels").numpy()[index]

    def nll(parts: dict[str, float]) -> float:
        z = np.zeros((len(index), cache.num_classes))
        for name, factor in parts.items():
            z += factor * clean[name][index]
        z -= z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean())

    clip, added = cache.manifest["clip"], cache.addition("c").manifest["clip"]
    assert clip is not None and added is not None
    clean = {
        "cnn": cache.read("test/teacher_logits").numpy().astype(np.float64),
        "clip": clip["logit_scale"] * cache.read("test/clip_similarity").double().numpy(),
        "b": cache.read("teachers/b/test/teacher_logits").numpy().astype(np.float64),
        "c": added["logit_scale"] * cache.read("teachers/c/test/clip_similarity").double().numpy(),
    }
    about = target.about
    chosen = {k: w * about["scale"] * about["balance"][k] for k, w in target.weights.items()}
    assert nll(chosen) == pytest.approx(about["held_out_nll"], rel=1e-4)
    rng = np.random.default_rng(3)
    for _ in range(200):
        other = {k: max(0.0, chosen.get(k, 0.0) + rng.normal(0, 0.05)) for k in clean}
        assert nll(other) >= about["held_out_nll"] - 1e-5


def test_features_of_each_teacher_reach_the_method(several: Path) -> None:
    settings = Distill(cache=str(several), student="resnet8", weights=WEIGHTS, lr=0.05)
    trainer, rows, _ = Source(settings, QUIET).trainer(settings)
    assert {name: rows[name] for name in ("b/features", "c/features")} == {
        "b/features": "b/teacher_features",
        "c/features": "c/clip_features",
    }
    assert trainer.method.weights == WEIGHTS
    few = Distill(
        cache=str(several),
        student="resnet8",
        weights={"cnn": 0.0, "clip": 1.0, "b": 1.0, "c": 0.0},
        lr=0.05,
    )
    _, rows, _ = Source(few, QUIET).trainer(few)
    assert {*rows} == {"target_logits", "clip_features", "b/features"}


def test_methods_read_the_logits_of_every_teacher(several: Path) -> None:
    cache = richkd.open_cache(several)
    settings = Distill(cache=str(several), student="resnet8", method="aver", lr=0.05, device="cpu")
    source = Source(settings, QUIET)
    _, rows, _ = source.trainer(settings)
    assert [*rows] == [f"{name}/logits" for name in cache.teachers]
    shared, _ = next(source.epochs(rows.values(), 2, 2))
    own = source.own(shared, rows, 0, 2).rows
    for name, wanted in logits_of(cache, 1).items():
        found = np.asarray(own[f"{name}/logits"].float())
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_training_records_what_was_blended(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "w"
    summary = train(several, out, method="richkd", weights=WEIGHTS, epochs=2)
    assert summary["target"]["weights"] == WEIGHTS and {*summary["target"]["balance"]} == {*WEIGHTS}
    assert len(metrics(out)) == 2
    again = tmp_path / "again"
    train(several, again, method="richkd", weights=dict(reversed(WEIGHTS.items())), epochs=2)
    assert (out / "last.safetensors").read_bytes() == (again / "last.safetensors").read_bytes()
    train(several, tmp_path / "kd", method="kd", epochs=2)
    train(several, tmp_path / "aver", method="aver", epochs=2)
    runs = load_runs([tmp_path], str(several))
    assert {run.settings["method"] for run in runs} == {"richkd", "kd", "aver"}
    command = next(run for run in runs if "weights" in run.settings).command([0])
    assert f"--weights {SHOWN}" in command


def test_another_teacher_of_that_name_is_another_run(
    make_store: Make, tmp_path: Path, several: Path
) -> None:
    path = Path(shutil.copytree(several, tmp_path / "c.zarr"))
    train(path, tmp_path / "w", method="kd", target="b", epochs=1)
    train(path, tmp_path / "kd", method="kd", epochs=1)
    weights = write_teacher(tmp_path / "b.safetensors", "resnet8", len(CLASS_NAMES), seed=5)
    given = {"teacher": "resnet8", "teacher_weights": str(weights), "device": "cpu"}
    add_teacher(path, given, name="b", overwrite=True)
    with refuses("run-cache-differs", "added"):
        train(path, tmp_path / "w", method="kd", target="b", epochs=1)
    assert train(path, tmp_path / "kd", method="kd", epochs=1)["run"]  # it does not read b


@pytest.mark.parametrize(
    ("settings", "code", "value"),
    [
        ({"weights": {"cnn": 1.0, "b": 1.0}}, "weights-incomplete", "clip=0"),
        ({"weights": {"cnn": 1e308, "b": 1e308}}, "value-out-of-range", "1e+308"),
        ({"weights": {**WEIGHTS, "vit": 1.0}}, "unknown-teacher", "'vit'"),
        ({"method": "kd", "weights": WEIGHTS}, "weights-without-blend", "--target fused"),
        ({"method": "ce", "weights": WEIGHTS}, "weights-not-taken", "ce"),
        ({"method": "ca-mkd", "weights": WEIGHTS}, "weights-not-taken", "ca-mkd"),
        ({"method": "kd", "target": "vit"}, "unknown-name", "'vit'"),
        ({"method": "richkd", "target": "b", "alpha": 0.3}, "value-out-of-range", "alpha"),
        ({"method": "kd", "target": "c", "prompts": (0,)}, "value-out-of-range", "prompts"),
        ({"method": "kd", "target": "c", "clip_head": "probe"}, "value-out-of-range", "clip_head"),
        (
            {"weights": WEIGHTS, "options": {"richkd": {"feature_alpha": 0.5}}},
            "feature-alpha-with-weights",
            "0.5",
        ),
    ],
)
def test_weights_that_do_not_fit(
    several: Path, tmp_path: Path, settings: dict[str, Any], code: str, value: str
) -> None:
    with refuses(code, value):
        train(several, tmp_path / "w", epochs=1, **{"method": "richkd", **settings})
    assert not (tmp_path / "w").exists()


def test_two_cnns_without_a_clip(make_store: Make, tmp_path: Path, shapes_teacher: Path) -> None:
    path = make_store(clip="none")
    with refuses("method-needs-teachers", "add-teacher"):
        train(path, tmp_path / "w", method="aver", epochs=1)
    given = {"teacher": "resnet8", "teacher_weights": str(shapes_teacher), "device": "cpu"}
    add_teacher(path, given, name="b")
    with refuses("weights-needed", "--weights cnn=1,b=1"):
        train(path, tmp_path / "w", method="richkd", epochs=1)
    found = train(path, tmp_path / "w", method="richkd", weights={"cnn": 1.0, "b": 1.0}, epochs=1)
    assert found["target"]["weights"] == {"cnn": 0.5, "b": 0.5}
    same = torch.equal(
        richkd.open_cache(path).read("train/teacher_logits", 0),
        richkd.open_cache(path).read("teachers/b/train/teacher_logits", 0),
    )
    assert same and found["target"]["balance"] == {"cnn": 1.0, "b": 1.0}


def test_a_teacher_that_is_added_later_changes_no_run(
    make_store: Make, tmp_path: Path, several: Path, shapes_teacher: Path
) -> None:
    path = Path(shutil.copytree(several, tmp_path / "c.zarr"))
    given = {"method": "kd", "target": "fused", "weights": {**WEIGHTS, "c": 0.0}, "epochs": 1}
    before = train(path, tmp_path / "w", **given)
    train(path, tmp_path / "aver-0", method="aver", epochs=1)
    b = {"teacher": "resnet8", "teacher_weights": str(shapes_teacher), "device": "cpu"}
    add_teacher(path, b, name="later")
    assert train(path, tmp_path / "w", **given) == before
    with refuses("weights-incomplete", "later=0"):
        train(path, tmp_path / "new", **given)
    weights = {**given["weights"], "later": 0.0}
    assert train(path, tmp_path / "w", **{**given, "weights": weights}) == before
    train(path, tmp_path / "aver-1", method="aver", epochs=1, seed=1)
    runs = load_runs([tmp_path], str(path))
    standings = leaderboard([(run.settings, run.complete) for run in runs])
    assert [len(each.runs) for each in standings if each.method == "aver"] == [1, 1]

"""What a run was trained on, as a table of recipe.toml, and as the sentence of earlier versions."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import assert_same_run, refuses, tree
from test_distill import train

import richkd
from richkd.analysis.students import evaluate
from richkd.training.identity import RunIdentity, TeacherIdentity
from richkd.training.run_folder import RunFolder, load_run, load_runs

Make = Callable[..., Path]
PLAIN = RunIdentity(
    dataset="0123456789012345",
    teacher="12e4567890123456",
    clip="none",
    views=3,
    view_seed=7,
    alpha=0.7,
    scale="native",
    dtype="float16",
)
# what earlier versions wrote, word by word
SENTENCES = {
    "0123456789012345, 12e4567890123456, none, 3 views of seed 7, alpha 0.7 scale native float16": (
        PLAIN
    ),
    "0123456789012345, , abcdefabcdefabcd, 3 views of seed 7, alpha 1.0 scale 40.0 float32, the "
    "teacher sees 40×40, crop 87.5 %, bicubic, mean 0.5,0.5,0.5, std 0.2,0.2,0.2, top 50 at 3": (
        replace(
            PLAIN,
            teacher="",
            clip="abcdefabcdefabcd",
            alpha=1.0,
            scale=40.0,
            dtype="float32",
            teacher_input="40×40, crop 87.5 %, bicubic, mean 0.5,0.5,0.5, std 0.2,0.2,0.2",
            keep=50,
            keep_temperature=3.0,
        )
    ),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_of_earlier_versions_are_read(sentence: str) -> None:
    identity = RunIdentity.read(sentence)
    assert identity == SENTENCES[sentence]
    assert RunIdentity.read(tomllib.loads(tomli_w.dumps(identity.table))) == identity


def test_a_teachers_sentence_is_read() -> None:
    was = "0123456789012345, 16 classes, images of 32×32, crop 100 %, bilinear, mean 0.5, std 0.2"
    assert TeacherIdentity.read(was) == TeacherIdentity(
        dataset="0123456789012345",
        classes=16,
        input="32×32, crop 100 %, bilinear, mean 0.5, std 0.2",
    )


FIELDS = {"dataset": "a", "teacher": "b", "clip": "c", "views": 2, "view_seed": 0}
FIELDS |= {"alpha": 0.7, "scale": "raw", "dtype": "float16"}


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        3,
        "",
        "a, b, c",
        {},
        {"dataset": "a", "teachers": 2},
        {**FIELDS, "alpha": [1]},
        {**FIELDS, "views": "2"},
        {**FIELDS, "more": 1},
    ],
)
def test_anything_else_is_no_identity(recorded: object) -> None:
    with pytest.raises(ValueError):
        RunIdentity.read(recorded)
    assert RunIdentity.read(FIELDS).table == FIELDS


def test_the_difference_names_the_fields_and_both_values() -> None:
    assert PLAIN.difference(replace(PLAIN)) == ""
    other = replace(PLAIN, views=5, scale=40.0)
    assert PLAIN.difference(other) == (
        "views was 3 and is now 5, scale was 'native' and is now 40.0"
    )


def test_another_cache_is_named_by_what_differs(
    store: Path, make_store: Make, tmp_path: Path
) -> None:
    train(store, tmp_path / "run", method="ce", epochs=1)
    recorded = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["richkd-distill"]
    assert recorded == RunIdentity.of(richkd.open_cache(store)).table
    with refuses("run-cache-differs", tmp_path / "run", "view_seed was 0 and is now 3", "--out"):
        train(make_store(seed=3), tmp_path / "run", method="ce", epochs=1)


def as_earlier(run: Path) -> None:
    """Put the sentence in place of the table that a run's recipe.toml has."""
    path = run / "recipe.toml"
    recipe = tomllib.loads(path.read_text())
    it: Any = recipe["richkd-distill"]
    recipe["richkd-distill"] = (
        f"{it['dataset']}, {it['teacher']}, {it['clip']}, {it['views']} views of seed "
        f"{it['view_seed']}, alpha {it['alpha']} scale {it['scale']} {it['dtype']}"
    )
    path.write_text(tomli_w.dumps(recipe))


def test_runs_of_earlier_versions_are_resumed_reported_and_evaluated(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(store, tmp_path / "runs" / "new", method="kd", epochs=2)
    saved = RunFolder.save_epoch

    class CutOff(BaseException):
        pass

    def cut(self: RunFolder, *arguments: Any) -> None:
        saved(self, *arguments)
        raise CutOff

    old = tmp_path / "runs" / "old"
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunFolder, "save_epoch", cut)
        train(store, old, method="kd", epochs=2)
    as_earlier(old)
    recipe = (old / "recipe.toml").read_bytes()
    train(store, old, method="kd", epochs=2)
    assert (old / "recipe.toml").read_bytes() == recipe
    assert_same_run(old, tmp_path / "runs" / "new")
    before = tree(old)
    train(store, old, method="kd", epochs=2)
    assert tree(old) == before
    runs = load_runs([tmp_path / "runs"], str(store))
    assert [run.path.name for run in runs] == ["new", "old"]
    assert load_run(old) == runs[1] and runs[0].identity == runs[1].identity
    found = evaluate([old, tmp_path / "runs" / "new"])["runs"]
    assert found[0]["top1"] == found[1]["top1"]


def test_configurations_are_told_apart_by_their_settings(store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(store, tmp_path / f"{seed}", method="ce", epochs=1, seed=seed)
    train(store, tmp_path / "kd", method="kd", epochs=1)
    by_path = {run.path.name: run.configuration for run in load_runs([tmp_path], None)}
    assert by_path["0"] == by_path["1"] != by_path["kd"]
    assert not {"seed", "out", "cache", "device"} & by_path["0"].keys()

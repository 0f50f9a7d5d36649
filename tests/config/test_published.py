"""The settings beside published figures are the settings of these figures.

tests/config/published has one file per recipe, written from the sources: one section per figure,
with its epoch, its source and how it was trained. methods.toml has the defaults.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from richkd.config import recipes
from richkd.config.recipes import Recipe
from richkd.config.settings import (
    Distill,
    Precompute,
    Training,
    TrainTeacher,
    resolve,
)
from richkd.losses import METHODS
from richkd.training.source import method_of
from richkd.training.student import with_defaults

TABLES = Path(__file__).parent / "published"
OWN = {"demo", "shapes", "fashion-mnist"}  # recipes of this project, that nobody else published
NAMES = {path.stem for path in recipes.packaged().glob("*.toml")} - OWN
ABOUT = {"top1", "epoch", "source", "settings", "options", "alpha"}
STORE: Any = SimpleNamespace(  # as much as the defaults ask of one
    manifest={"dataset": {"name": "cifar100"}, "image_size": 32},
    location=SimpleNamespace(stem="cifar100"),
    splits=["train", "test"],
)


def table(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads((TABLES / f"{name}.toml").read_text(encoding="utf-8"))


def entries() -> Iterator[tuple[str, str]]:
    for name in sorted(NAMES):
        yield from ((name, figure) for figure in table(name))


def resolved(recipe: Recipe, figure: str) -> Training:
    """The settings of the teacher, or of the student by a method, as they would be recorded."""
    if figure == "teacher":
        given = {"dataset": "cifar100", "model": recipe.table("precompute")["teacher"]}
        return resolve(TrainTeacher, recipe.table("train-teacher"), given).for_size(32)
    given = {"cache": "cache/cifar100.zarr", "method": figure}
    return with_defaults(resolve(Distill, recipe.table("distill"), given), STORE)


def milestones(settings: Training) -> list[int]:
    """The epochs after which the learning rate falls, by the schedule itself."""
    from richkd.training.loop import learning_rate

    rates = [learning_rate(settings, epoch) for epoch in range(1, settings.epochs + 1)]
    return [epoch for epoch in range(1, settings.epochs) if rates[epoch] < 0.2 * rates[epoch - 1]]


def test_every_recipe_has_a_table_and_every_table_a_recipe() -> None:
    assert {path.stem for path in TABLES.glob("*.toml")} == NAMES | {"methods"}
    for name in OWN:
        assert not recipes.load(name).published


@pytest.mark.parametrize("name", sorted(NAMES))
def test_figures_are_the_published_ones(name: str) -> None:
    recipe, published = recipes.load(name), table(name)
    assert list(recipe.published) != ["teacher"]
    assert recipe.published.keys() == {key for key, entry in published.items() if "top1" in entry}
    for key, figure in recipe.published.items():
        entry = published[key]
        assert (figure.top1, figure.epoch) == (entry["top1"], entry["epoch"]), key
        assert entry["source"].startswith(f"{figure.source}@"), key


@pytest.mark.parametrize(("name", "figure"), list(entries()))
def test_settings_are_those_of_the_figure(name: str, figure: str) -> None:
    recipe, entry = recipes.load(name), table(name)[figure]
    if "settings" not in entry:  # a figure of a method that richkd lacks, or of given weights
        assert figure not in METHODS or (name.startswith("imagenet-"), figure) == (True, "ce")
        return
    ours = resolved(recipe, figure)
    if "options" in entry:
        assert isinstance(ours, Distill)
        options = method_of(ours)[1]
        assert {key: getattr(options, key) for key in entry["options"]} == entry["options"]
    if "alpha" in entry:
        stage_one = resolve(Precompute, recipe.table("precompute"), {})
        assert stage_one.alpha == entry["alpha"]
    training = {key: value for key, value in entry.items() if key not in ABOUT}
    assert training.keys() >= {"epochs", "batch_size", "lr", "weight_decay", "momentum"}
    have = {key: getattr(ours, key) for key in training} | {"milestones": milestones(ours)}
    differ = {key for key in training if training[key] != have[key]}
    # a recipe trains all of its methods alike: what a figure had otherwise, its comments say
    comments = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    said = " ".join(line.removeprefix("#").strip() for line in comments)
    words = {"epochs": "{} epochs", "lr": "lr {:g}", "batch_size": "batch_size {}"}
    assert differ <= words.keys(), {key: (training[key], have[key]) for key in differ}
    for key in differ:
        assert f"{figure} " in said and words[key].format(training[key]) in said, (key, said)


def recipe_text(name: str) -> str:
    return (recipes.packaged() / f"{name}.toml").read_text(encoding="utf-8")


def test_defaults_of_methods_are_the_published_ones(run: Callable[..., Any]) -> None:
    published, listed = table("methods"), run("methods", "--json").json
    assert listed.keys() == published.keys()
    for name, entry in published.items():
        options = listed[name]["options"]
        assert {key: options[key] for key in entry["options"]} == entry["options"], name
        assert entry["source"]

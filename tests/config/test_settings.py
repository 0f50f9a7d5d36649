"""Recipes: defaults, overrides, and every way of getting a key wrong."""

from pathlib import Path

import numpy as np
import pytest
import tomli_w
from helpers import refuses

from richkd.config import catalog, recipes
from richkd.config.flags import flags
from richkd.config.recipes import Figure
from richkd.config.settings import (
    Distill,
    Precompute,
    Sweep,
    TrainTeacher,
    resolve,
    to_table,
)


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[precompute]\ndataset = "cifar100"\nviews = 4\nalpha = 1\nscale = "raw"\n')
    table = recipes.load(str(file)).table("precompute")
    settings = resolve(Precompute, table, {"views": 2, "limit": None})
    assert (settings.views, settings.alpha, settings.scale, settings.seed) == (2, 1, "raw", 0)
    assert settings.teacher == "resnet32x4" and settings.out == "cache/cifar100.zarr"


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    settings = Distill(
        cache="c.zarr", alpha=0.5, prompts=(0, 2), options={"kd": {"temperature": 4}}
    )
    file = tmp_path / "r.toml"
    file.write_text(tomli_w.dumps({"distill": to_table(settings)}))
    assert resolve(Distill, recipes.load(str(file)).table("distill"), {}) == settings


@pytest.mark.parametrize("path", sorted(recipes.packaged().glob("*.toml")), ids=lambda p: p.stem)
def test_packaged_recipes_resolve(path: Path) -> None:
    content = recipes.load(path.stem)
    assert content.name == path.stem and content.about
    assert resolve(Precompute, content.table("precompute"), {}).dataset
    for name, kind in (("train-teacher", TrainTeacher), ("distill", Distill)):
        given = {"dataset": "shapes"} if kind is TrainTeacher else {"cache": "c.zarr"}
        resolve(kind, {**given, **content.table(name)}, {})


def test_there_are_packaged_recipes() -> None:
    names = {path.stem for path in recipes.packaged().glob("*.toml")}
    assert {"richkd", "richkd-l", "richkd-f", "kd-t4", "kd-t2", "fashion-mnist"} <= names


def test_flags_and_options_by_method(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        "[distill]\nstudent = 'vit_tiny_patch16_224'\nmethod = 'dkd'\n"
        "student_options = { patch_size = 4 }\n"
        "[distill.options.dkd]\nnckd_weight = 6\n[distill.options.kd]\ntemperature = 2\n"
    )
    table = {**recipes.load(str(file)).table("distill"), "cache": "c.zarr"}
    own = resolve(Distill, table, {"options": {"warmup": 3}})
    assert own.options == {"dkd": {"nckd_weight": 6, "warmup": 3}, "kd": {"temperature": 2}}
    assert own.student_options == {"patch_size": 4}
    other = resolve(
        Distill, table, {"method": "kd", "student": "resnet8", "options": {"ce_weight": 1}}
    )
    assert other.options["kd"] == {"temperature": 2, "ce_weight": 1}
    assert other.student_options == {}


@pytest.mark.parametrize(
    ("content", "code", "values"),
    [
        ("[precompute", "recipe-unreadable", ()),
        ("[precomputed]\n", "unknown-name", ("'precomputed'", "precompute")),
        ("views = 3", "unknown-name", ("'views'",)),
        ("[precompute]\nveiws = 3", "unknown-setting", ("[precompute]", "'veiws'", "views")),
        ("[precompute]\nviews = 3.5", "setting-type", ("[precompute]", "views", 3.5, "integer")),
        ("[precompute]\nviews = true", "setting-type", ("views", True, "integer")),
        ("[precompute]\nviews = 0", "value-out-of-range", ("[precompute]", "views", 0, 1)),
        ("[precompute]\ndtype = 'f8'", "unknown-name", ("dtype", "'f8'", "float16", "float32")),
        ("[precompute]\nalpha = 'auto'", "setting-type", ("alpha", "'auto'", "number")),
        ("[precompute]\npixel_range = [1, 'a']", "setting-type", ("pixel_range[1]", "'a'")),
        ("[precompute]\npixel_range = [5, 1]", "value-out-of-range", ("[5, 1]",)),
        ("[distill]\nalpha = 'most'", "unknown-name", ("alpha", "'most'", "auto")),
        ("[distill]\nscale = [1]", "setting-type", ("scale", [1], "native", "raw")),
        ("[distill]\nprompts = ['a']", "setting-type", ("prompts[0]", "'a'", "integer")),
        ("[distill]\noptions = 3", "setting-type", ("options", 3, "table")),
        ("about = 3", "recipe-value", ("about", 3)),
        ("published = 3", "recipe-value", ("[published]",)),
        ("[published]\nkd = 'good'", "setting-type", ("[published]: kd", "top1", "'good'")),
        ("[published]\nkd = 733.3", "value-out-of-range", ("[published]: kd", "top1", 733.3, 100)),
        ("[published]\nkd = nan", "value-out-of-range", ("top1", "nan")),
        ("[published.kd]\nepoch = 'last'", "recipe-value", ("[published]: kd", "top1")),
        ("[published.kd]\ntop1 = 73\nepochs = 'last'", "unknown-setting", ("'epochs'", "epoch")),
        ("[published.kd]\ntop1 = 73\nepoch = 'final'", "unknown-name", ("'final'", "best")),
        ("[published.kd]\ntop1 = 73\nsource = 4", "setting-type", ("source", 4, "text")),
        ("[distill]\nmilestones = [30.5]", "setting-type", ("milestones[0]", 30.5)),
        ("[distill]\nmilestones = 30", "setting-type", ("milestones", 30)),
    ],
)
def test_bad_recipes(tmp_path: Path, content: str, code: str, values: tuple[object, ...]) -> None:
    file = tmp_path / "r.toml"
    file.write_text(content)
    with refuses(code, *values):
        recipes.load(str(file))


def test_unknown_recipe() -> None:
    with refuses("recipe-missing", "'richkdl'", "richkd-l"):
        recipes.load("richkdl")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("epochs", 0, "value-out-of-range"),
        ("epochs", 2.0, "setting-type"),
        ("epochs", True, "setting-type"),
        ("batch_size", 0, "value-out-of-range"),
        ("lr", 0.0, "value-out-of-range"),
        ("lr", float("nan"), "value-out-of-range"),
        ("lr", float("inf"), "value-out-of-range"),
        ("lr", "0.1", "setting-type"),
        ("momentum", 1.0, "value-out-of-range"),
        ("weight_decay", -1.0, "value-out-of-range"),
        ("eval_every", 0, "value-out-of-range"),
        ("seed", -1, "value-out-of-range"),
        ("seed", 2**32, "value-out-of-range"),
        ("schedule", "steps", "unknown-name"),
        ("precision", "half", "unknown-name"),
        ("alpha", 1.2, "value-out-of-range"),
        ("alpha", -0.1, "value-out-of-range"),
        ("scale", -3.0, "value-out-of-range"),
        ("scale", "naive", "unknown-name"),
    ],
)
def test_bad_values_are_refused_however_they_are_given(
    tmp_path: Path, name: str, value: object, code: str
) -> None:
    with refuses(code, name, value):
        Distill(**{"cache": "c.zarr", name: value})
    with refuses(code, name, value):
        resolve(Distill, {"cache": "c.zarr"}, {name: value})
    file = tmp_path / "r.toml"
    file.write_text(tomli_w.dumps({"distill": {name: value}}))
    with refuses(code, file, "[distill]", name, value):
        recipes.load(str(file))


def test_numbers_of_numpy_are_numbers() -> None:
    settings = Distill(cache="c.zarr", seed=np.int64(3), alpha=np.float32(0.5))
    assert (settings.seed, settings.alpha) == (3, 0.5)


def test_figures_say_of_which_epoch_they_are_where_that_is_known(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        "[published]\nteacher = 79.42\nce = 72\nkd = { top1 = 73.33, epoch = 'last' }\n"
        "dkd = { top1 = 76.32, epoch = 'best', source = 'x/y' }\n"
    )
    figures = recipes.load(str(file)).published
    assert figures["teacher"] == Figure(top1=79.42) and figures["teacher"].epoch == "unknown"
    assert figures["ce"].top1 == 72
    assert figures["kd"] == Figure(top1=73.33, epoch="last")
    assert figures["dkd"] == Figure(top1=76.32, epoch="best", source="x/y")


def test_milestones_are_epochs_of_the_step_schedule(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[distill]\nepochs = 100\nmilestones = [30, 60, 90]\n")
    table = {"cache": "c.zarr", **recipes.load(str(file)).table("distill")}
    settings = resolve(Distill, table, {})
    assert settings.milestones == (30, 60, 90)
    assert to_table(settings)["milestones"] == [30, 60, 90]
    assert resolve(Distill, table, {"milestones": (5,)}).milestones == (5,)
    assert "milestones" not in to_table(resolve(Distill, {"cache": "c.zarr"}, {}))
    for given in ((30, 30), (60, 30), (0, 30), (30, 100), ()):
        with refuses("value-out-of-range", "milestones", list(given), 100):
            resolve(Distill, table, {"milestones": given})
    with refuses("value-out-of-range", "milestones", "cosine"):
        resolve(Distill, table, {"schedule": "cosine"})


def test_the_learning_rate_depends_on_the_network_unless_it_is_given() -> None:
    for model in ("MobileNetV2", "ShuffleV1", "ShuffleV2", "resnet20", "vgg8"):
        own = TrainTeacher(dataset="cifar100", model=model)
        assert own.lr is None
        light = model not in ("resnet20", "vgg8")
        assert own.for_size(32).lr == catalog.learning_rate(model) == (0.01 if light else 0.05)
        given = TrainTeacher(dataset="cifar100", model=model, lr=0.2)
        assert given.for_size(32).lr == 0.2


@pytest.mark.parametrize(
    ("dataset", "code", "value"),
    [
        ("cifar", "unknown-name", "'cifar'"),
        ("imagefolder", "dataset-path-missing", "imagefolder:PATH"),
        ("cifar10:x", "dataset-takes-no-path", "cifar10:x"),
        ("", "dataset-not-given", "--dataset"),
    ],
)
def test_bad_datasets(dataset: str, code: str, value: str) -> None:
    with refuses(code, value):
        Precompute(dataset=dataset)


def test_image_size_is_for_folders() -> None:
    assert Precompute(dataset="imagefolder:/x/photos", image_size=64).out == "cache/photos.zarr"
    with refuses("value-out-of-range", "image_size", 64, "cifar10"):
        Precompute(dataset="cifar10", image_size=64)


def test_every_setting_is_typed_on_the_command_line_as_its_type_says() -> None:
    read = {flag.parameter.name: flag.read for flag in (*flags(Distill), *flags(Sweep))}
    assert read["milestones"]("30,60") == (30, 60)
    assert read["students"]("resnet8, resnet20,") == ("resnet8", "resnet20")
    assert read["alpha"]("0.5,auto") == (0.5, "auto")
    assert (read["scale"]("2"), read["scale"]("raw"), read["concurrent"]("4")) == (2.0, "raw", 4)
    assert read["options"](["temperature=2", "contrast=bank", "standardize=true"]) == {
        "temperature": 2,
        "contrast": "bank",
        "standardize": True,
    }
    ranges = {flag.parameter.name: flag.read for flag in flags(Precompute)}
    assert ranges["pixel_range"]("0,4095") == (0.0, 4095.0)
    assert ranges["teacher_mean"]("0.5") == (0.5,)

"""Recipes: defaults, overrides, and every way of getting a key wrong."""

from pathlib import Path

import pytest

from richkd.config import catalog, recipes
from richkd.config.recipes import Figure
from richkd.config.settings import (
    Distill,
    Precompute,
    TrainTeacher,
    parse_epochs,
    resolve,
    to_table,
)
from richkd.core.errors import RichKDError


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[precompute]\ndataset = "cifar100"\nviews = 4\nalpha = 1\nscale = "raw"\n')
    table = recipes.load(str(file)).table("precompute")
    settings = resolve(Precompute, table, {"views": 2, "limit": None})
    assert (settings.views, settings.alpha, settings.scale, settings.seed) == (2, 1, "raw", 0)
    assert settings.teacher == "resnet32x4" and settings.out == "cache/cifar100.zarr"


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    import tomli_w

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
    ("content", "message"),
    [
        ("[precompute", "cannot read recipe"),
        ("[precomputed]\n", "unknown table.*'precomputed'.*precompute"),
        ("views = 3", "unknown table"),
        ("[precompute]\nveiws = 3", "unknown key 'veiws'.*views"),
        ("[precompute]\nviews = 3.5", "views = 3.5 should be int"),
        ("[precompute]\nviews = true", "views = True should be int"),
        ("[distill]\nprompts = ['a']", "prompts"),
        ("[distill]\noptions = 3", "options = 3"),
        ("about = 3", "about = 3 should be text"),
        ("published = 3", r"\[published\] should be a table of figures"),
        ("[published]\nkd = 'good'", r"\[published\]: kd: top1 = 'good' should be float"),
        ("[published]\nkd = 733.3", r"\[published\]: kd: top1 = 733.3: must be in 0..100"),
        ("[published]\nkd = nan", "top1 = nan: must be in 0..100"),
        ("[published.kd]\nepoch = 'last'", r"\[published\]: kd: top1 is missing"),
        ("[published.kd]\ntop1 = 73\nepochs = 'last'", "unknown key 'epochs'.*epoch"),
        ("[published.kd]\ntop1 = 73\nepoch = 'final'", "'final'.*best, last, unknown"),
        ("[published.kd]\ntop1 = 73\nsource = 4", "source = 4 should be str"),
        ("[distill]\nmilestones = [30.5]", "milestones"),
        ("[distill]\nmilestones = 30", "milestones"),
    ],
)
def test_bad_recipes(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(content)
    with pytest.raises(RichKDError, match=message):
        recipes.load(str(file))


def test_unknown_recipe() -> None:
    with pytest.raises(RichKDError, match=r"no recipe 'richkdl'.*richkd-l"):
        recipes.load("richkdl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("eval_every", 0),
        ("seed", -1),
        ("schedule", "steps"),
        ("precision", "half"),
        ("alpha", 1.2),
        ("alpha", -0.1),
        ("scale", -3.0),
        ("scale", "naive"),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(RichKDError, match=name):
        resolve(Distill, {"cache": "c.zarr"}, {name: value})


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
    for given, message in (
        ((30, 30), r"milestones = \[30, 30\]: must be ascending"),
        ((60, 30), r"milestones = \[60, 30\]: must be ascending"),
        ((0, 30), "from 1"),
        ((30, 100), "below epochs = 100"),
        ((), "ascending"),
    ):
        with pytest.raises(RichKDError, match=message):
            resolve(Distill, table, {"milestones": given})
    with pytest.raises(RichKDError, match="left out for schedule cosine"):
        resolve(Distill, table, {"schedule": "cosine"})
    with pytest.raises(RichKDError, match="milestones = '30;60': must be epochs with commas"):
        parse_epochs("30;60")


def test_the_learning_rate_depends_on_the_network_unless_it_is_given() -> None:
    for model in ("MobileNetV2", "ShuffleV1", "ShuffleV2", "resnet20", "vgg8"):
        own = TrainTeacher(dataset="cifar100", model=model)
        assert own.lr is None
        light = model not in ("resnet20", "vgg8")
        assert own.for_size(32).lr == catalog.learning_rate(model) == (0.01 if light else 0.05)
        given = TrainTeacher(dataset="cifar100", model=model, lr=0.2)
        assert given.for_size(32).lr == 0.2


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("cifar", "unknown data set 'cifar'"),
        ("imagefolder", "imagefolder:PATH"),
        ("cifar10:x", "takes no path"),
        ("", "no data set given"),
    ],
)
def test_bad_data_sets(dataset: str, message: str) -> None:
    with pytest.raises(RichKDError, match=message):
        Precompute(dataset=dataset)


def test_image_size_is_for_folders() -> None:
    assert Precompute(dataset="imagefolder:/x/photos", image_size=64).out == "cache/photos.zarr"
    with pytest.raises(RichKDError, match="image_size"):
        Precompute(dataset="cifar10", image_size=64)

"""The recipes of ImageNet: they can be planned, and their networks are those of the figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import richkd
from richkd.config import recipes
from richkd.config.settings import Distill, resolve
from richkd.models import names_weights
from richkd.tools import plan as plans
from richkd.training.source import method_of

NAMES = sorted(path.stem for path in recipes.packaged().glob("imagenet-*.toml"))
PARAMETERS = {"imagenet-resnet34-resnet18": 11_689_512, "imagenet-resnet50-mobilenetv1": 4_231_976}
METHODS = ("ce", "kd", "dkd", "crd", "dist", "richkd")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_planned_without_its_files(
    name: str, run: Callable[..., Any], clip_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "plan", partial(plans.plan, enough=0.0, most=1))
    monkeypatch.setattr(plans, "FIRST", 1)
    done = run(*f"plan --recipe {name} --dataset imagenet --clip {clip_dir} --json".split())
    assert done.code == 0, done.err
    found = done.json
    assert (found["num_train"], found["num_classes"], found["views"]) == (1_281_167, 1000, 100)
    assert found["passes"]["texts"] == 12_000
    assert recipes.load(name).table("precompute")["teacher"] in found["about"]


@pytest.mark.parametrize("name", NAMES)
def test_its_networks_and_methods(name: str) -> None:
    recipe = recipes.load(name)
    for method in METHODS:
        given = {"cache": "cache/imagenet.zarr", "method": method}
        settings = resolve(Distill, recipe.table("distill"), given)
        assert method_of(settings)
    student = richkd.create_model(settings.student, 1000, **settings.student_options)
    assert sum(weight.numel() for weight in student.parameters()) == PARAMETERS[name]
    assert names_weights(recipe.table("precompute")["teacher"])


def test_the_student_is_the_published_mobilenet() -> None:
    """timm's network against the layers of MobileNetV1's table 1, with ReLU as in mdistiller."""

    def layer(width: int, out: int, stride: int, *, groups: int = 1, side: int = 3) -> list[Any]:
        conv = nn.Conv2d(width, out, side, stride, side // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(out), nn.ReLU()]

    layers, width = layer(3, 32, 2), 32
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    for out, stride in [*widths, (1024, 2), (1024, 1)]:
        layers += layer(width, width, stride, groups=width) + layer(width, out, 1, side=1)
        width = out
    plain = nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(1024, 1000)).eval()
    recipe = recipes.load("imagenet-resnet50-mobilenetv1").table("distill")
    student = richkd.create_model(recipe["student"], 1000, **recipe["student_options"]).eval()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(1, 3)  # large enough for ReLU6 to differ
    state = plain.state_dict()
    student.load_state_dict(dict(zip(student.state_dict(), state.values(), strict=True)))
    images = torch.randn(1, 3, 224, 224)

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.double()(images.double())
        return found

    torch.testing.assert_close(outputs(student), outputs(plain))
    other = richkd.create_model(recipe["student"], 1000).eval()
    other.load_state_dict(student.state_dict())
    assert not torch.allclose(outputs(other), outputs(plain), rtol=1e-3)


def test_every_recipe_of_imagenet_is_here() -> None:
    assert {*NAMES} == {*PARAMETERS}

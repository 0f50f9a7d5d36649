"""The CIFAR zoo: published keys, shapes, checkpoints, and forward passes written out a second time.

The functional forms below read a state dict alone, in evaluation mode and float64, so that the
order of every stride, shuffle, ReLU and shortcut is pinned and not only the weights' shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import refuses
from torch import Tensor

import richkd
from richkd.models import ZOO
from richkd.models.weights import load_into, read_weights, state_sha256

PUBLISHED = json.loads((Path(__file__).parent / "zoo.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_shapes_and_sizes(name: str) -> None:
    model = richkd.create_model(name, 100)
    wanted = PUBLISHED[name]
    shapes = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert shapes == list(wanted["state_dict"].items())  # their order too
    assert sum(p.numel() for p in model.parameters()) == wanted["parameters"]
    x = torch.randn(2, 3, 32, 32)
    logits, features = richkd.forward(model, x)
    assert features.shape == (2, wanted["pooled_feature_dim"]) and logits.shape == (2, 100)
    assert model.num_features == wanted["pooled_feature_dim"]
    (logits.sum() + features.sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_zoo_is_the_published_list() -> None:
    assert set(ZOO) == set(PUBLISHED)


@pytest.mark.parametrize("layout", ["mdistiller", "bare"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "resnet32x4",
        "wrn_16_2",
        "vgg13",
        "MobileNetV2",
        "ShuffleV1",
        "ShuffleV2",
        "ResNet18",
    ],
)
def test_published_checkpoints_load_strictly(tmp_path: Path, name: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.zeros((), dtype=torch.int64)
        if key.endswith("tracked")
        else torch.rand(shape, generator=generator)
        for key, shape in PUBLISHED[name]["state_dict"].items()
    }
    path = tmp_path / "student_best"
    torch.save({"model": state, "epoch": 240} if layout == "mdistiller" else state, path)
    model = richkd.create_model(name, 100)
    load_into(model, read_weights(path), name, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert state_sha256(model) != state_sha256(richkd.create_model(name, 100))
    other = "wrn_16_1" if name != "wrn_16_1" else "resnet8"
    with refuses("weights-other-architecture", path, other):
        load_into(richkd.create_model(other, 100), read_weights(path), other, path)
    with refuses("weights-do-not-fit", path, name, "100 classes"):
        load_into(richkd.create_model(name, 10), read_weights(path), name, path)


class Functional:
    """Layers by the names of a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def bn(self, x: Tensor, name: str) -> Tensor:
        s = {
            k: self.state[f"{name}.{k}"][:, None, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        return (x - s["running_mean"]) / (s["running_var"] + 1e-5).sqrt() * s["weight"] + s["bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def has(self, name: str) -> bool:
        return any(key.startswith(name + ".") for key in self.state)

    def count(self, name: str) -> int:
        number = 0
        while self.has(f"{name}.{number}"):
            number += 1
        return number


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def shuffle(x: Tensor, groups: int) -> Tensor:
    per_group = x.shape[1] // groups
    dealt = [x[:, g * per_group + i] for i in range(per_group) for g in range(groups)]
    return torch.stack(dealt, 1)


def cifar_resnet(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = relu(f.bn(f.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for i in range(f.count(f"layer{stage}")):
            n, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = relu(f.bn(f.conv(x, f"{n}.conv1", stride), f"{n}.bn1"))
            out = f.bn(f.conv(out, f"{n}.conv2"), f"{n}.bn2")
            if f.has(f"{n}.downsample"):
                x = f.bn(f.conv(x, f"{n}.downsample.0", stride), f"{n}.downsample.1")
            x = relu(out + x)
    return x, "fc"


def deep_resnet(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = relu(f.bn(f.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3, 4):
        for i in range(f.count(f"layer{stage}")):
            n, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            deep = f.has(f"{n}.conv3")
            out = relu(f.bn(f.conv(x, f"{n}.conv1", 1 if deep else stride), f"{n}.bn1"))
            out = f.bn(f.conv(out, f"{n}.conv2", stride if deep else 1), f"{n}.bn2")
            if deep:
                out = f.bn(f.conv(relu(out), f"{n}.conv3"), f"{n}.bn3")
            if f.has(f"{n}.shortcut"):
                x = f.bn(f.conv(x, f"{n}.shortcut.0", stride), f"{n}.shortcut.1")
            x = relu(out + x)
    return x, "linear"


def wide_resnet(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = f.conv(x, "conv1")
    for stage in (1, 2, 3):
        for i in range(f.count(f"block{stage}.layer")):
            n, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
            active = relu(f.bn(x, f"{n}.bn1"))
            out = relu(f.bn(f.conv(active, f"{n}.conv1", stride), f"{n}.bn2"))
            out = f.conv(out, f"{n}.conv2")
            projected = f.has(f"{n}.convShortcut")
            x = out + (f.conv(active, f"{n}.convShortcut", stride) if projected else x)
    return relu(f.bn(x, "bn1")), "fc"


def vgg(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    for block in range(5):
        i = 0
        while f.has(f"block{block}.{i}"):
            x = relu(f.bn(f.conv(x, f"block{block}.{i}"), f"block{block}.{i + 1}"))
            i += 3
        if block < 3:  # at 32 px
            x = F.max_pool2d(x, 2)
    return x, "classifier"


def mobilenet(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = relu(f.bn(f.conv(x, "conv1.0", 2), "conv1.1"))
    for stage, first_stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        for i in range(f.count(f"blocks.{stage}")):
            n, stride = f"blocks.{stage}.{i}.conv", first_stride if i == 0 else 1
            out = relu(f.bn(f.conv(x, f"{n}.0"), f"{n}.1"))
            out = relu(f.bn(f.conv(out, f"{n}.3", stride, groups=out.shape[1]), f"{n}.4"))
            out = f.bn(f.conv(out, f"{n}.6"), f"{n}.7")
            x = out + x if out.shape == x.shape else out
    return relu(f.bn(f.conv(x, "conv2.0"), "conv2.1")), "classifier.0"


def shuffle_v1(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = relu(f.bn(f.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for i in range(f.count(f"layer{stage}")):
            n, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            groups = 1 if x.shape[1] == 24 else 3
            out = relu(f.bn(f.conv(x, f"{n}.conv1", groups=groups), f"{n}.bn1"))
            out = shuffle(out, groups)
            out = relu(f.bn(f.conv(out, f"{n}.conv2", stride, out.shape[1]), f"{n}.bn2"))
            out = f.bn(f.conv(out, f"{n}.conv3", groups=3), f"{n}.bn3")
            if stride == 2:
                x = relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
            else:
                x = relu(out + x)
    return x, "linear"


def shuffle_v2(f: Functional, x: Tensor) -> tuple[Tensor, str]:
    x = relu(f.bn(f.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for i in range(f.count(f"layer{stage}")):
            n = f"layer{stage}.{i}"
            if i == 0:
                left = f.bn(f.conv(x, f"{n}.conv1", 2, x.shape[1]), f"{n}.bn1")
                left = relu(f.bn(f.conv(left, f"{n}.conv2"), f"{n}.bn2"))
                right = relu(f.bn(f.conv(x, f"{n}.conv3"), f"{n}.bn3"))
                right = f.bn(f.conv(right, f"{n}.conv4", 2, right.shape[1]), f"{n}.bn4")
                right = relu(f.bn(f.conv(right, f"{n}.conv5"), f"{n}.bn5"))
            else:
                half = x.shape[1] // 2
                left, right = x[:, :half], x[:, half:]
                right = relu(f.bn(f.conv(right, f"{n}.conv1"), f"{n}.bn1"))
                right = f.bn(f.conv(right, f"{n}.conv2", groups=half), f"{n}.bn2")
                right = relu(f.bn(f.conv(right, f"{n}.conv3"), f"{n}.bn3"))
            x = shuffle(torch.cat([left, right], 1), 2)
    return relu(f.bn(f.conv(x, "conv2"), "bn2")), "linear"


@pytest.mark.parametrize(
    ("name", "written_out"),
    [
        ("resnet14", cifar_resnet),
        ("resnet8x4", cifar_resnet),
        ("ResNet18", deep_resnet),
        ("ResNet50", deep_resnet),
        ("wrn_16_1", wide_resnet),
        ("wrn_16_2", wide_resnet),
        ("vgg8", vgg),
        ("vgg16", vgg),
        ("MobileNetV2", mobilenet),
        ("ShuffleV1", shuffle_v1),
        ("ShuffleV2", shuffle_v2),
    ],
)
def test_forward_passes_written_out(
    rng: Any, name: str, written_out: Callable[[Functional, Tensor], tuple[Tensor, str]]
) -> None:
    model = richkd.create_model(name, 12).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    f = Functional(model.state_dict())
    with torch.no_grad():
        logits, features = richkd.forward(model.eval(), x)
        last, classifier = written_out(f, x)
    pooled = last.sum((2, 3)) / (last.shape[2] * last.shape[3])
    torch.testing.assert_close(features, pooled, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logits, f.linear(pooled, classifier), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2", "ShuffleV2", "wrn_16_1", "ResNet18"])
@pytest.mark.parametrize("size", [28, 48, 64, 96])
def test_other_image_sizes(name: str, size: int) -> None:
    with torch.no_grad():
        logits, _ = richkd.forward(
            richkd.create_model(name, 7).eval(), torch.randn(2, 3, size, size)
        )
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()


def test_a_name_of_both_is_the_zoos_and_timm_keeps_its_own() -> None:
    assert richkd.create_model("vgg13", 5).num_features == 512
    with torch.device("meta"):  # timm's have 129 M parameters
        assert type(timm.create_model("vgg13", num_classes=5)).__module__ == "timm.models.vgg"
        assert type(richkd.create_model("timm/vgg13", 5)).__module__ == "timm.models.vgg"

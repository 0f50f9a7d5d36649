"""timm's models as students: logits and pooled features of many families, at the data's size."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import refuses

import richkd
from richkd.models import check_fit, remedy

# Twelve families, each by a small member.
FAMILIES = [
    "resnet18",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnetx_002",
    "ghostnet_050",
    "mixer_s32_224",
    "edgenext_xx_small",
    "lcnet_035",
    "pit_ti_224",
]
# Heads that are not one linear layer on a vector: convolutions, or two whose logits are averaged.
OTHER_HEADS = ["dla46x_c", "resnetv2_18", "deit_tiny_distilled_patch16_224", "levit_128s"]


@pytest.mark.parametrize("name", FAMILIES + OTHER_HEADS)
def test_a_step_at_32_px_and_features_of_what_the_model_gives(name: str) -> None:
    torch.manual_seed(0)
    model = richkd.create_model(name, 7, image_size=32)
    width = check_fit(model, name, 32, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    model.train()
    logits, features = richkd.forward(model, x)
    assert logits.shape == (4, 7) and features.shape == (4, width)
    loss = torch.nn.functional.cross_entropy(logits, labels) + features.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.isfinite(loss)
    with torch.no_grad():
        after, _ = richkd.forward(model, x)
    assert not torch.equal(after, logits)
    model.eval()
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    entered: list[torch.Tensor] = []
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].flatten(1)))
    with torch.no_grad():
        expected = model(x)
        # two heads read two tokens in some models; the features are their mean
        mean_entered = torch.stack(entered).mean(0)
        logits, features = richkd.forward(model, x)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features, mean_entered, rtol=1e-3, atol=1e-4)


def test_one_pass_counts_one_batch() -> None:
    model = richkd.create_model("cpubone_nano", 7, image_size=32)  # batch norm within its head
    richkd.forward(model, torch.randn(4, 3, 32, 32))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and {int(norm.num_batches_tracked) for norm in norms} == {1}


def test_checking_draws_nothing_from_the_global_generator() -> None:
    model = richkd.create_model("resnet8", 5)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_fit(model, "resnet8", 32, 5)
    assert torch.equal(torch.rand(2), expected) and model.training


def test_the_setting_that_a_message_names_makes_the_model_fit() -> None:
    name = "deepseek_vit_412m"  # patches of 14 px do not divide 32
    assert "--student-set patch_size=4" in remedy(name, 32, {})
    with refuses("model-cannot-be-built", "--student-set patch_size=4"), torch.device("meta"):
        richkd.create_model(name, 5, image_size=32)
    with torch.device("meta"), torch.no_grad():
        model = richkd.create_model(name, 5, image_size=32, patch_size=4).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 5)


def test_patches_that_leave_out_pixels_are_refused_with_the_remedy() -> None:
    with refuses("model-cannot-be-built", "16 px", "28 px", "--student-set patch_size=4"):
        richkd.create_model("vit_tiny_patch16_224", 5, image_size=28)
    model = richkd.create_model("vit_tiny_patch16_224", 5, image_size=28, patch_size=4)
    assert check_fit(model, "vit_tiny_patch16_224", 28, 5) == 192
    x = torch.zeros(1, 3, 28, 28)
    corner = x.clone()
    corner[..., -1, -1] = 5.0
    with torch.no_grad():
        assert not torch.equal(model.eval()(x), model(corner))


def test_models_that_cannot_work_say_so() -> None:
    model = richkd.create_model("inception_v3", 10)
    with refuses("model-does-not-fit", "inception_v3", "32×32", "resnet8x4"):
        check_fit(model, "inception_v3", 32, 10)
    model = richkd.create_model("volo_d1_224", 10, image_size=32)
    with refuses("model-without-features", "volo_d1_224"):
        check_fit(model, "volo_d1_224", 32, 10)
    with refuses("model-cannot-be-built", "gcvit_xxtiny", "division by zero"):
        richkd.create_model("gcvit_xxtiny", 10, image_size=28)


def test_a_setting_that_a_model_does_not_take() -> None:
    with refuses("model-cannot-be-built", "resnet18", "patch_size = 4"):
        richkd.create_model("resnet18", 5, patch_size=4)
    with refuses("model-takes-no-settings", "resnet8", "patch_size = 4"):
        richkd.create_model("resnet8", 5, patch_size=4)


@pytest.mark.slow
def test_importing_the_zoo_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import richkd.models"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""

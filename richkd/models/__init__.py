"""Networks by name: the CIFAR zoo and everything that timm has, behind two functions."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from richkd.errors import RichKDError, unknown
from richkd.models import resnet_cifar as resnet_cifar  # registers its models with timm


def create_model(
    name: str, num_classes: int, in_chans: int = 3, image_size: int | None = None
) -> nn.Module:
    """A fresh network with `model(x) -> logits [B, num_classes]`.

    Args:
        name: of the zoo (`resnet8x4`) or of timm (`mobilenetv3_small_050`).
        num_classes: the number of logits.
        in_chans: channels of the images.
        image_size: side of the images, for timm models that are built for one size.

    Raises:
        RichKDError: no model has that name.
    """
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    settings: dict[str, Any] = {}
    config = timm.models.get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        settings["img_size"] = image_size
    try:
        model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **settings)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise RichKDError(f"model {name} cannot be built for {image_size} px: {error}") from None
    return model


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B,C] and the pooled features [B,F] that enter the classifier, in one pass."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return model.get_classifier()(features), features  # type: ignore[operator]


def check_fit(model: nn.Module, name: str, image_size: int, num_classes: int) -> int:
    """Run two blank images through a model and return its feature width F.

    Raises:
        RichKDError: the model does not take images of this size, or gives other shapes.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits, features = forward(model, torch.zeros(2, 3, image_size, image_size))
    except (AttributeError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RichKDError(
            f"model {name} does not fit images of {image_size}×{image_size}: {reason}; "
            f"choose one with less downsampling, e.g. resnet8x4"
        ) from None
    finally:
        model.train(training)
    if logits.shape != (2, num_classes) or features.ndim != 2:
        raise RichKDError(
            f"model {name} gives logits {tuple(logits.shape)} and features "
            f"{tuple(features.shape)}; a classifier with pooled features is needed"
        )
    return features.shape[1]

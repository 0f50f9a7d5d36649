"""VGG with batch norm for CIFAR (Simonyan & Zisserman 2014, arXiv 1409.1556), one linear layer.

timm uses the names vgg11 to vgg19 for ImageNet networks, so these are registered as cifar_vgg8 and
so on; `create_model` also accepts the names of the literature.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet
from richkd.models.registry import register_model

WIDTHS = (64, 128, 256, 512, 512)
LARGE_IMAGES = 64  # from this side in pixels, the fourth block's map is pooled too


class VGG(CifarNet):
    """Five blocks of 3×3 convolutions with max pooling between them."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, WIDTHS[-1])
        in_width = in_chans
        for number, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            self.add_module(f"block{number}", _block(in_width, width, depth))
            in_width = width
        self.classifier = nn.Linear(in_width, num_classes)
        self.init_convolutions()
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,512,H/8,W/8], or [B,512,H/16,W/16] from 64 pixels on."""
        pools = 4 if x.shape[-1] >= LARGE_IMAGES else 3
        for number in range(len(WIDTHS)):
            x = F.relu(self.get_submodule(f"block{number}")(x), inplace=True)
            if number < pools:
                x = F.max_pool2d(x, 2)
        return x

    def get_classifier(self) -> nn.Module:
        return self.classifier


def _block(in_width: int, width: int, depth: int) -> nn.Sequential:
    """Return convolutions, batch norms and ReLUs, without the last ReLU, which `VGG` applies."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(in_width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
        in_width = width
    return nn.Sequential(*layers[:-1])


def _vgg(depths: tuple[int, ...], settings: dict[str, Any]) -> VGG:
    return VGG(depths, settings.get("num_classes", 100), settings.get("in_chans", 3))


@register_model
def cifar_vgg8(pretrained: bool = False, **settings: Any) -> VGG:
    """VGG-8, 4.0 M parameters."""
    return _vgg((1, 1, 1, 1, 1), settings)


@register_model
def cifar_vgg11(pretrained: bool = False, **settings: Any) -> VGG:
    """VGG-11, 9.3 M parameters."""
    return _vgg((1, 1, 2, 2, 2), settings)


@register_model
def cifar_vgg13(pretrained: bool = False, **settings: Any) -> VGG:
    """VGG-13, 9.5 M parameters."""
    return _vgg((2, 2, 2, 2, 2), settings)


@register_model
def cifar_vgg16(pretrained: bool = False, **settings: Any) -> VGG:
    """VGG-16, 14.8 M parameters."""
    return _vgg((2, 2, 3, 3, 3), settings)


@register_model
def cifar_vgg19(pretrained: bool = False, **settings: Any) -> VGG:
    """VGG-19, 20.1 M parameters."""
    return _vgg((2, 2, 4, 4, 4), settings)

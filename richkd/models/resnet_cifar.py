"""The CIFAR ResNets of He et al. 2015 (arXiv 1512.03385, section 4.2), also four times as wide.

Their depth is 6n+2.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet
from richkd.models.registry import register_model


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected if the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or in_width != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(shortcut), inplace=True)


class CifarResNet(CifarNet):
    """A stem, three stages of basic blocks, global pooling and a linear classifier."""

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], num_classes: int, in_chans: int
    ) -> None:
        super().__init__(num_classes, widths[-1])
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        self.init_convolutions()

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,F,H/4,W/4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        return self.fc


def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_width, width, stride),
        *(BasicBlock(width, width, 1) for _ in range(blocks - 1)),
    )


def _resnet(depth: int, widths: tuple[int, int, int, int], settings: dict[str, Any]) -> CifarResNet:
    return CifarResNet(depth, widths, settings.get("num_classes", 100), settings.get("in_chans", 3))


_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)


@register_model
def resnet8(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-8, 0.08 M parameters."""
    return _resnet(8, _NARROW, settings)


@register_model
def resnet14(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-14, 0.18 M parameters."""
    return _resnet(14, _NARROW, settings)


@register_model
def resnet20(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-20, 0.28 M parameters."""
    return _resnet(20, _NARROW, settings)


@register_model
def resnet32(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-32, 0.47 M parameters."""
    return _resnet(32, _NARROW, settings)


@register_model
def resnet44(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-44, 0.67 M parameters."""
    return _resnet(44, _NARROW, settings)


@register_model
def resnet56(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-56, 0.86 M parameters."""
    return _resnet(56, _NARROW, settings)


@register_model
def resnet110(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-110, 1.7 M parameters."""
    return _resnet(110, _NARROW, settings)


@register_model
def resnet8x4(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-8 four times as wide, 1.2 M parameters."""
    return _resnet(8, _WIDE, settings)


@register_model
def resnet32x4(pretrained: bool = False, **settings: Any) -> CifarResNet:
    """ResNet-32 four times as wide, 7.4 M parameters."""
    return _resnet(32, _WIDE, settings)

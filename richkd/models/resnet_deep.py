"""ResNet-18 and ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1) with a stem for 32×32 images.

The stem is one 3×3 convolution without stride or pooling; the rest is as for ImageNet.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet
from richkd.models.registry import register_model


def _shortcut(in_width: int, width: int, stride: int) -> nn.Sequential:
    """Return the identity, or a projection if the shape changes."""
    if stride == 1 and in_width == width:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; four times as wide at its end."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(in_width, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,4·width,H/stride,W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)).add_(self.shortcut(x)), inplace=True)


class DeepResNet(CifarNet):
    """A 3×3 stem, four stages, pooling and a linear classifier."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(num_classes, 512 * block.expansion)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_width = 64
        for number, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
            blocks = []
            for index in range(depth):
                stride = 2 if number > 1 and index == 0 else 1
                blocks.append(block(in_width, width, stride))
                in_width = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_width, num_classes)
        self.init_convolutions()

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,F,H/8,W/8]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x

    def get_classifier(self) -> nn.Module:
        return self.linear


@register_model
def ResNet18(pretrained: bool = False, **settings: Any) -> DeepResNet:
    """ResNet-18 for small images, 11.2 M parameters."""
    return DeepResNet(
        BasicBlock, (2, 2, 2, 2), settings.get("num_classes", 100), settings.get("in_chans", 3)
    )


@register_model
def ResNet50(pretrained: bool = False, **settings: Any) -> DeepResNet:
    """ResNet-50 for small images, 23.7 M parameters."""
    return DeepResNet(
        Bottleneck, (3, 4, 6, 3), settings.get("num_classes", 100), settings.get("in_chans", 3)
    )

"""ShuffleNetV2 for CIFAR (Ma et al. 2018, arXiv 1807.11164) at width 1, as in RepDistiller."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet, shuffle_channels
from richkd.models.registry import register_model

STEM_WIDTH = 24
STAGES = ((116, 3), (232, 7), (464, 3))  # width, and units after the strided one
LAST_WIDTH = 1024


def _depthwise(width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)


def _pointwise(in_width: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, 1, bias=False)


class BasicUnit(nn.Module):
    """Filter one half of the channels, pass the other on, then shuffle them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B,width,H,W] -> [B,width,H,W]."""
        passed, x = x.chunk(2, dim=1)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return shuffle_channels(torch.cat([passed, x], dim=1), 2)


class DownUnit(nn.Module):
    """Concatenate two strided branches, then shuffle the channels."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _depthwise(in_width, 2), nn.BatchNorm2d(in_width)
        self.conv2, self.bn2 = _pointwise(in_width, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(in_width, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _pointwise(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/2,W/2]."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffle_channels(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(CifarNet):
    """A 1×1 stem, three stages, a last 1×1 convolution, pooling and a linear classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, LAST_WIDTH)
        self.conv1, self.bn1 = _pointwise(in_chans, STEM_WIDTH), nn.BatchNorm2d(STEM_WIDTH)
        in_width = STEM_WIDTH
        for number, (width, units) in enumerate(STAGES, 1):
            self.add_module(
                f"layer{number}",
                nn.Sequential(DownUnit(in_width, width), *(BasicUnit(width) for _ in range(units))),
            )
            in_width = width
        self.conv2, self.bn2 = _pointwise(in_width, LAST_WIDTH), nn.BatchNorm2d(LAST_WIDTH)
        self.linear = nn.Linear(LAST_WIDTH, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,1024,H/8,W/8]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for number in range(1, len(STAGES) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)

    def get_classifier(self) -> nn.Module:
        return self.linear


@register_model
def ShuffleV2(pretrained: bool = False, **settings: Any) -> ShuffleNetV2:
    """ShuffleNetV2 at width 1, 1.4 M parameters."""
    return ShuffleNetV2(settings.get("num_classes", 100), settings.get("in_chans", 3))

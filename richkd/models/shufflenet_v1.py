"""ShuffleNet for CIFAR (Zhang et al. 2017, arXiv 1707.01083) with 3 groups, as in RepDistiller."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet, shuffle_channels
from richkd.models.registry import register_model

GROUPS = 3
STEM_WIDTH = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # width and blocks


class ShuffleUnit(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; strided units concatenate a shortcut."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        added = width - in_width if stride == 2 else width
        inner = added // 4
        # the stem has too few channels to be worth grouping
        self.groups = 1 if in_width == STEM_WIDTH else GROUPS
        self.conv1 = nn.Conv2d(in_width, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, added, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(added)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(shuffle_channels(out, self.groups))), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], dim=1), inplace=True)
        return F.relu(out + x, inplace=True)


class ShuffleNetV1(CifarNet):
    """A 1×1 stem, three stages, pooling and a linear classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, STAGES[-1][0])
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        in_width = STEM_WIDTH
        for number, (width, blocks) in enumerate(STAGES, 1):
            units = [ShuffleUnit(in_width, width, 2)]
            units += [ShuffleUnit(width, width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*units))
            in_width = width
        self.linear = nn.Linear(in_width, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,960,H/8,W/8]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for number in range(1, len(STAGES) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x

    def get_classifier(self) -> nn.Module:
        return self.linear


@register_model
def ShuffleV1(pretrained: bool = False, **settings: Any) -> ShuffleNetV1:
    """ShuffleNet with 3 groups, 0.95 M parameters."""
    return ShuffleNetV1(settings.get("num_classes", 100), settings.get("in_chans", 3))

"""Wide ResNets for CIFAR (Zagoruyko & Komodakis 2016, arXiv 1605.07146), WRN-depth-width.

Their depth is 6n+4. Blocks are pre-activated: batch norm and ReLU precede each convolution.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from richkd.models.cifar import CifarNet
from richkd.models.registry import register_model


class WideBlock(nn.Module):
    """Two pre-activated 3×3 convolutions and a shortcut, projected if the width changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_width, width, 1, stride, bias=False) if in_width != width else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]; projections start from the activation."""
        active = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True)).add_(shortcut)  # type: ignore[no-any-return]


class WideStage(nn.Module):
    """Blocks of one width, of which the first has the stride."""

    def __init__(self, in_width: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            WideBlock(in_width, width, stride),
            *(WideBlock(width, width, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]."""
        return self.layer(x)  # type: ignore[no-any-return]


class WideResNet(CifarNet):
    """A stem, three stages, batch norm, pooling and a linear classifier."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, 64 * widen)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, 16 * widen, blocks, stride=1)
        self.block2 = WideStage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = WideStage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        self.init_convolutions()
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,F,H/4,W/4]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x), inplace=True)

    def get_classifier(self) -> nn.Module:
        return self.fc


def _wrn(depth: int, widen: int, settings: dict[str, Any]) -> WideResNet:
    return WideResNet(depth, widen, settings.get("num_classes", 100), settings.get("in_chans", 3))


@register_model
def wrn_16_1(pretrained: bool = False, **settings: Any) -> WideResNet:
    """WRN-16-1, 0.18 M parameters."""
    return _wrn(16, 1, settings)


@register_model
def wrn_16_2(pretrained: bool = False, **settings: Any) -> WideResNet:
    """WRN-16-2, 0.70 M parameters."""
    return _wrn(16, 2, settings)


@register_model
def wrn_40_1(pretrained: bool = False, **settings: Any) -> WideResNet:
    """WRN-40-1, 0.57 M parameters."""
    return _wrn(40, 1, settings)


@register_model
def wrn_40_2(pretrained: bool = False, **settings: Any) -> WideResNet:
    """WRN-40-2, 2.3 M parameters."""
    return _wrn(40, 2, settings)

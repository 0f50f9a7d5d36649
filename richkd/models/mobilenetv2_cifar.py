"""MobileNetV2 at half width for CIFAR (Sandler et al. 2018, arXiv 1801.04381), as in RepDistiller.

Differs from the paper: expansion 6 in every block but the first, ReLU instead of ReLU6, and the
second stage keeps its resolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from richkd.models.cifar import CifarNet
from richkd.models.registry import register_model

# expansion, width, blocks and stride of every stage (table 2 of the paper), widths before halving
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_WIDTH = 1280


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut if the shape stays the same."""

    def __init__(self, in_width: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_width * expansion
        self.shortcut = stride == 1 and in_width == width
        self.conv = nn.Sequential(
            nn.Conv2d(in_width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(True),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,width,H/stride,W/stride]."""
        out: Tensor = self.conv(x)
        return out + x if self.shortcut else out


class MobileNetV2Cifar(CifarNet):
    """A strided stem, seven stages, a last 1×1 convolution, pooling and a linear classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, LAST_WIDTH)
        in_width = 16
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, in_width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(in_width),
            nn.ReLU(True),
        )
        stages = []
        for expansion, full_width, blocks, stride in STAGES:
            width = full_width // 2
            layers = []
            for number in range(blocks):
                layers.append(
                    InvertedResidual(in_width, width, stride if number == 0 else 1, expansion)
                )
                in_width = width
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = nn.Sequential(
            nn.Conv2d(in_width, LAST_WIDTH, 1, bias=False),
            nn.BatchNorm2d(LAST_WIDTH),
            nn.ReLU(True),
        )
        linear = nn.Linear(LAST_WIDTH, num_classes)
        self.classifier = nn.Sequential(linear)
        self.init_convolutions()
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,1280,H/16,W/16]."""
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return self.conv2(x)  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        return self.classifier


@register_model
def MobileNetV2(pretrained: bool = False, **settings: Any) -> MobileNetV2Cifar:
    """MobileNetV2 at half width, 0.81 M parameters."""
    return MobileNetV2Cifar(settings.get("num_classes", 100), settings.get("in_chans", 3))

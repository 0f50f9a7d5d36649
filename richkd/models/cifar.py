"""The common parts of the CIFAR zoo: global pooling, then one linear layer.

The published checkpoints of RepDistiller and mdistiller load as they are: keys and shapes of the
state dicts are the same. Since pooling is global, other image sizes work too.
"""

from __future__ import annotations

from torch import Tensor, nn


class CifarNet(nn.Module):
    """A network that computes a feature map, pools it globally and classifies the result."""

    def __init__(self, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map: [B,in_chans,H,W] -> [B,F,h,w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool [B,F,h,w]: return features [B,F] if `pre_logits`, else logits [B,C]."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes logits from pooled features."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: [B,in_chans,H,W] -> [B,C]."""
        return self.forward_head(self.forward_features(x))

    def init_convolutions(self) -> None:
        """Initialise convolutions by their fan-out, after He et al. 2015 (arXiv 1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Shuffle the channels of [B,C,H,W] between groups (ShuffleNet, arXiv 1707.01083)."""
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(x.shape)

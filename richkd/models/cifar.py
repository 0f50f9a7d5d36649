"""What the networks of the CIFAR zoo have in common: global pooling, then one linear layer.

State-dict keys and shapes are those of the checkpoints that RepDistiller and mdistiller published,
which load as they are. Pooling is global, so the networks take other image sizes as well.
"""

from __future__ import annotations

from torch import Tensor, nn


class CifarNet(nn.Module):
    """A network that gives a feature map, pools it, and classifies what comes out."""

    def __init__(self, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> [B,F,h,w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B,F,h,w] -> pooled features [B,F] where `pre_logits`, else logits [B,C]."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Module:
        """The layer from pooled features to logits."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B,in_chans,H,W] -> logits [B,C]."""
        return self.forward_head(self.forward_features(x))

    def init_convolutions(self) -> None:
        """Convolutions as He et al. 2015 (arXiv 1502.01852) draw them, by the fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """[B,C,H,W] with its channels dealt out over the groups (ShuffleNet, arXiv 1707.01083)."""
    batch, channels, height, width = x.shape
    dealt = x.reshape(batch, groups, channels // groups, height, width)
    return dealt.transpose(1, 2).reshape(x.shape)

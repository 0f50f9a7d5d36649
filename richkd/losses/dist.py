"""Knowledge distillation from a stronger teacher (DIST; Huang et al. 2022, arXiv 2205.10536)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import NotNegative, Positive
from richkd.losses.kd import LogitMethod, LogitOptions
from richkd.losses.method import Batch, register


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 − Pearson's correlation of the rows of [B,C] and [B,C], averaged over the rows."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def dist_loss(
    student_logits: Tensor, target_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the inter-class and intra-class losses (equations 8 and 9), times τ²; f32 scalars.

    Inter correlates the classes of each sample, intra the samples of the batch for each class.

    Args:
        student_logits: [B,C].
        target_logits: [B,C]; they get no gradient.
        temperature: τ > 0.
    """
    student, target = (
        F.softmax(z.float() / temperature, dim=1) for z in (student_logits, target_logits.detach())
    )
    inter, intra = pearson_distance(student, target), pearson_distance(student.T, target.T)
    return inter * temperature**2, intra * temperature**2


@register("dist")
class DIST(LogitMethod):
    """Distillation of relations (DIST; Huang et al. 2022), as in its code for CIFAR-100."""

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """Weights β and γ of the two losses, and τ (1 in the published code for ImageNet)."""

        inter_weight: NotNegative = 2.0
        intra_weight: NotNegative = 2.0
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Huang et al., equation 10."""
        o = self.options
        inter, intra = dist_loss(*self.logits(batch), o.temperature)
        return {
            "ce": self.label_term(batch),
            "inter": o.inter_weight * inter,
            "intra": o.intra_weight * intra,
        }

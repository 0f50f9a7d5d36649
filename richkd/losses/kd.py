"""Cross-entropy, and knowledge distillation of logits (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from richkd.losses.method import Batch, Method, register


def kd_loss(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """τ² · KL(softmax(target/τ) ‖ softmax(student/τ)), the mean over the batch.

    Args:
        student_logits: [B,C].
        target_logits: [B,C]; no gradient flows into them.
        temperature: τ > 0.

    Returns:
        A scalar, in f32.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    target = F.log_softmax(target_logits.detach().float() / temperature, dim=1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


@register("ce")
class CE(Method):
    """The student alone: cross-entropy with the labels."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The weight of the one term."""

        ce_weight: float = 1.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy."""
        return {"ce": self.options.ce_weight * F.cross_entropy(batch.logits.float(), batch.labels)}


@register("kd")
class KD(Method):
    """Cross-entropy and the CNN teacher's logits, weighted as in mdistiller."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Weights of the terms and the temperature τ."""

        ce_weight: float = 0.1
        logit_weight: float = 0.9
        temperature: float = 4.0

    @classmethod
    def reads(cls, options: Options) -> tuple[str, ...]:
        """The CNN teacher's logits."""
        return ("teacher_logits",)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Hinton et al., section 2."""
        o = self.options
        return {
            "ce": o.ce_weight * F.cross_entropy(batch.logits.float(), batch.labels),
            "logit": o.logit_weight
            * kd_loss(batch.logits, batch.rows["teacher_logits"], o.temperature),
        }

"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import Count, NotNegative, Positive
from richkd.losses.kd import LogitMethod, LogitOptions
from richkd.losses.method import Batch, register


def dkd_loss(
    student_logits: Tensor, target_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return TCKD and NCKD (equation 7), times τ², averaged over the batch; f32 scalars.

    TCKD is the divergence of the true class against all others, NCKD that among the others.

    Args:
        student_logits: [B,C].
        target_logits: [B,C]; they get no gradient.
        labels: [B].
        temperature: τ > 0.
    """
    student, target = (z.float() / temperature for z in (student_logits, target_logits.detach()))
    true = F.one_hot(labels, student.shape[1]).bool()
    student_pair, target_pair = (_true_and_others(z, true) for z in (student, target))
    tckd = F.kl_div(student_pair, target_pair, reduction="batchmean", log_target=True)
    student_rest, target_rest = (
        F.log_softmax(z.masked_fill(true, -torch.inf), dim=1).masked_fill(true, 0.0)
        for z in (student, target)
    )
    divergence = target_rest.exp() * (target_rest - student_rest)  # 0 at the true class
    return tckd * temperature**2, divergence.sum(1).mean() * temperature**2


def _true_and_others(z: Tensor, true: Tensor) -> Tensor:
    """Return log-probabilities of the true class and of all others: [B,C] -> [B,2]."""
    parts = (z.masked_fill(~true, -torch.inf), z.masked_fill(true, -torch.inf))
    return torch.stack([part.logsumexp(1) for part in parts], dim=1) - z.logsumexp(1, keepdim=True)


@register("dkd")
@register("dkd-ls", standardize=True, temperature=2.0, tckd_weight=9.0, nckd_weight=72.0)
class DKD(LogitMethod):
    """Decoupled knowledge distillation (Zhao et al. 2022), weighted as in mdistiller."""

    needs_one_label = True

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """Weights α and β, epochs over which they grow to these values, and temperature τ."""

        tckd_weight: NotNegative = 1.0
        nckd_weight: NotNegative = 8.0
        warmup: Count = 20
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Zhao et al., equation 7, with the warm-up of the published code."""
        o = self.options
        tckd, nckd = dkd_loss(*self.logits(batch), batch.labels, o.temperature)
        warmup = torch.as_tensor(batch.epoch / o.warmup).clamp(max=1.0)
        return {
            "ce": self.label_term(batch),
            "tckd": (warmup * o.tckd_weight).to(tckd.dtype) * tckd,
            "nckd": (warmup * o.nckd_weight).to(nckd.dtype) * nckd,
        }

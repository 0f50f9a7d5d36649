"""Cross-entropy, and knowledge distillation of logits (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import NotNegative, Positive
from richkd.losses import method
from richkd.losses.method import TARGET, Batch, Method, register


def kd_loss(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """Return τ² · KL(softmax(target/τ) ‖ softmax(student/τ)), averaged over the batch.

    Args:
        student_logits: [B,C].
        target_logits: [B,C]; they get no gradient.
        temperature: τ > 0.

    Returns:
        A scalar, f32.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    target = F.log_softmax(target_logits.detach().float() / temperature, dim=1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def standardize(logits: Tensor) -> Tensor:
    """Standardise logits over the classes: [B,C] -> [B,C], f32, rows of mean 0 and deviation 1.

    Logit standardisation (Sun et al. 2024, arXiv 2403.01732, algorithm 1) is applied to student and
    target before dividing by the temperature. As there, the standard deviation is the unbiased one.
    """
    logits = logits.float()
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)


@dataclass(frozen=True, kw_only=True)
class LogitOptions(method.Options):
    """Options of methods that match logits: whether to standardise them first."""

    standardize: bool = False


class LogitMethod(Method):
    """A method that matches the student's logits to the target's."""

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        return (TARGET,)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the student's and the target's logits [B,C], f32, standardised if so chosen."""
        pair = batch.logits.float(), batch.rows[TARGET].float()
        return (standardize(pair[0]), standardize(pair[1])) if self.options.standardize else pair


@register("ce")
class CE(Method):
    """Training without a teacher: cross-entropy with the labels."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"ce": self.label_term(batch)}


@register("kd")
@register("kd-ls", standardize=True, temperature=2.0, logit_weight=9.0)
class KD(LogitMethod):
    """Knowledge distillation (Hinton et al. 2015), weighted as in mdistiller."""

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """Weights of the label term and the logit term, and temperature τ."""

        ce_weight: NotNegative = 0.1
        logit_weight: NotNegative = 0.9
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Hinton et al., section 2."""
        loss = kd_loss(*self.logits(batch), self.options.temperature)
        return {"ce": self.label_term(batch), "logit": self.options.logit_weight * loss}

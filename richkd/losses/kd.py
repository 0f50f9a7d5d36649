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


def standardize(logits: Tensor) -> Tensor:
    """Z-scores over the classes: [B,C] -> [B,C], f32, mean 0 and standard deviation 1 a row.

    Logit standardisation (Sun et al. 2024, arXiv 2403.01732, algorithm 1), which is done to student
    and target before a temperature divides them. The deviation is the unbiased one, as there.
    """
    logits = logits.float()
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)


@dataclass(frozen=True, kw_only=True)
class LogitOptions(method.Options):
    """Those of methods that match logits: whether to standardise them first."""

    standardize: bool = False


class LogitMethod(Method):
    """A method that matches the student's logits to the target's."""

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        """The target's logits."""
        return (TARGET,)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Student's and target's logits [B,C], f32, standardised where the options say so."""
        pair = batch.logits.float(), batch.rows[TARGET].float()
        return (standardize(pair[0]), standardize(pair[1])) if self.options.standardize else pair


@register("ce")
class CE(Method):
    """The student alone: cross-entropy with the labels."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy."""
        return {"ce": self.label_term(batch)}


@register("kd")
@register("kd-ls", standardize=True, temperature=2.0, logit_weight=9.0)
class KD(LogitMethod):
    """Knowledge distillation (Hinton et al. 2015), weighted as in mdistiller."""

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """The weight of the term beside the labels', and its temperature τ."""

        ce_weight: NotNegative = 0.1
        logit_weight: NotNegative = 0.9
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Hinton et al., section 2."""
        loss = kd_loss(*self.logits(batch), self.options.temperature)
        return {"ce": self.label_term(batch), "logit": self.options.logit_weight * loss}

"""The logit-level terms of multi-level logit distillation (Jin et al., CVPR 2023).

The published code shows every image twice, the second time strongly augmented, and trains 480
epochs (960 for most ShuffleNet pairs). Here there is one view a step, and the recipe decides how
long. The published code also computes masks of the half that the teacher is less sure of, for
samples and for classes, but multiplies losses by them that are means already: nothing is left out,
and the batch and class terms are halved, as they are here. Its instance terms are halved on the
first view and whole on the second; the one of our single view is whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import NotNegative, Positive
from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import TARGET, Batch, register

TEMPERATURES = (2.0, 3.0, 5.0, 6.0)  # of the prediction augmentation, beside the options' own
MASK = 0.5  # the mean of the published code's masks, which keep what lies up to the median


def alignment(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Batch and class alignment of probabilities [B,C]: ‖G_T − G_S‖²_F/B and ‖M_T − M_S‖²_F/C.

    G = p·pᵀ [B,B] relates the samples of a batch, M = pᵀ·p [C,C] the classes; f32 scalars.
    """
    batch = (target @ target.T - student @ student.T).square().sum() / len(student)
    classes = (target.T @ target - student.T @ student).square().sum() / student.shape[1]
    return batch, classes


@register("mlkd")
@register("mlkd-ls", standardize=True, temperature=2.0, logit_weight=9.0)
class MLKD(LogitMethod):
    """Multi-level logit distillation (Jin et al. 2023), its logit terms on one view."""

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """The weight of the three terms, and the first of their five temperatures."""

        ce_weight: NotNegative = 0.1
        logit_weight: NotNegative = 0.9
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Instance, batch and class alignment, each summed over the temperatures."""
        student, target = self.logits(batch)
        plain = batch.logits.float(), batch.rows[TARGET].float()
        sums = torch.zeros(3, device=student.device)
        for temperature in (self.options.temperature, *TEMPERATURES):
            probabilities = (F.softmax(z / temperature, dim=1) for z in plain)
            sums = sums + torch.stack(
                [kd_loss(student, target, temperature), *alignment(*probabilities)]
            )
        instance, batches, classes = self.options.logit_weight * sums
        return {
            "ce": self.label_term(batch),
            "instance": instance,
            "batch": MASK * batches,
            "class": MASK * classes,
        }

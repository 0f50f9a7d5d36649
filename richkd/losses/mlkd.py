"""The logit-level terms of multi-level logit distillation (Jin et al., CVPR 2023).

The published code trains on two views of every image, the second strongly augmented, for 480
epochs (960 for most ShuffleNet pairs). Here there is one view per step, and the recipe sets the
number of epochs. The published code also computes masks of the less certain half of the samples and
classes, but multiplies them with losses that are already averaged: nothing is masked, and the batch
and class terms are halved, as they are here. Its instance term is halved on the first view but not
on the second; on the single view here, it is not halved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import NotNegative, Positive
from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import TARGET, Batch, register

TEMPERATURES = (2.0, 3.0, 5.0, 6.0)  # of the prediction augmentation, besides the options' own
MASK = 0.5  # mean of the published code's masks, which keep values up to the median


def alignment(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖G_T − G_S‖²_F/B and ‖M_T − M_S‖²_F/C of probabilities [B,C]; f32 scalars.

    G = p·pᵀ [B,B] relates the samples of a batch, M = pᵀ·p [C,C] the classes.
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
        """Weights of the label term and of the three others, and the first of five temperatures."""

        ce_weight: NotNegative = 0.1
        logit_weight: NotNegative = 0.9
        temperature: Positive = 4.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return instance, batch and class alignment, each summed over the temperatures."""
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

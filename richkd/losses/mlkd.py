"""The logit-level terms of multi-level logit distillation (Jin et al., CVPR 2023).

The paper also trains 480 epochs, with a second, strongly augmented view of every image, and leaves
out the teacher's more confident half of it: that is a recipe, and not done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import TARGET, Batch, register

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)  # of the prediction augmentation


def alignment(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Batch and class alignment of probabilities [B,C]: ‖G_T − G_S‖²_F/B and ‖M_T − M_S‖²_F/C.

    G = p·pᵀ [B,B] relates the samples of a batch, M = pᵀ·p [C,C] the classes; f32 scalars.
    """
    batch = (target @ target.T - student @ student.T).square().sum() / len(student)
    classes = (target.T @ target - student.T @ student).square().sum() / student.shape[1]
    return batch, classes


@register("mlkd")
@register("mlkd-ls", standardize=True, logit_weight=9.0)
class MLKD(LogitMethod):
    """Multi-level logit distillation (Jin et al. 2023), its logit terms on one view."""

    @dataclass(frozen=True, kw_only=True)
    class Options(LogitOptions):
        """The weight of the three terms."""

        ce_weight: float = 0.1
        logit_weight: float = 0.9

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Instance, batch and class alignment, each summed over the temperatures."""
        student, target = self.logits(batch)
        plain = batch.logits.float(), batch.rows[TARGET].float()
        sums = torch.zeros(3, device=student.device)
        for temperature in TEMPERATURES:
            probabilities = (F.softmax(z / temperature, dim=1) for z in plain)
            sums = sums + torch.stack(
                [kd_loss(student, target, temperature), *alignment(*probabilities)]
            )
        instance, batches, classes = self.options.logit_weight * sums
        return {"ce": self.label_term(batch), "instance": instance, "batch": batches,
                "class": classes}  # fmt: skip

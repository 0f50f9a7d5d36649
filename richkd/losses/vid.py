"""Variational information distillation (Ahn et al. 2019, arXiv 1904.05835), on pooled features.

RepDistiller's VID takes intermediate feature maps, so its results belong to another method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.core.validation import NotNegative
from richkd.losses import method
from richkd.losses.method import Batch, Task, register
from richkd.losses.relational import FeatureMethod

EPSILON = 1e-5  # lower bound of the variance
FIRST_VARIANCE = 5.0


class VIDLoss(nn.Module):
    """−log q(t|s), q a Gaussian: its mean by a small network, one variance per teacher channel.

    Equations 5 and 6 without the constant. As in the published code, the network has three layers
    of the teacher's width and no biases.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Linear(student, teacher, bias=False),
            nn.ReLU(),
            nn.Linear(teacher, teacher, bias=False),
            nn.ReLU(),
            nn.Linear(teacher, teacher, bias=False),
        )
        first = math.log(math.expm1(FIRST_VARIANCE - EPSILON))
        self.log_scale = nn.Parameter(torch.full((teacher,), first))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean over samples and channels of [B,F_S] and [B,F_T]; an f32 scalar."""
        variance = F.softplus(self.log_scale) + EPSILON
        error: Tensor = self.regressor(student.float()) - teacher.detach().float()
        return 0.5 * (error.square() / variance + variance.log()).mean()


@register("vid")
class VID(FeatureMethod):
    """Variational information distillation (Ahn et al. 2019) on pooled features, not on maps.

    The weight is as in RepDistiller, which takes intermediate feature maps.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weight of the information term."""

        feature_weight: NotNegative = 1.0

    def __init__(self, options: Options, task: Task) -> None:
        super().__init__(options, task)
        self.information = VIDLoss(task.student_dim, task.teacher_dim)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Ahn et al., equation 4, for one layer."""
        loss = self.information(batch.features, batch.rows["teacher_features"])
        return {"ce": self.label_term(batch), "feature": self.options.feature_weight * loss}

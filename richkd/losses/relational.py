"""Relations among the samples of a batch in feature space: RKD, SP and PKT.

All three take pooled features [B,F] of any two widths and have no trainable layers. RepDistiller
does the same for RKD and PKT, but its SP takes the last feature map, so its results belong to
another method. The teacher's features get no gradient. Losses are f32 scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.validation import NotNegative
from richkd.losses import method
from richkd.losses.method import Batch, FewViews, Method, register


def rkd_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance-wise and angle-wise loss (RKD; Park et al. 2019, arXiv 1904.05068, eq. 6, 9).

    They compare the distances of all pairs, relative to their mean, and the angles of all triplets.
    """
    pairs = [f.float()[None] - f.float()[:, None] for f in (student, teacher.detach())]  # [B,B,F]
    distances = [torch.linalg.vector_norm(pair, dim=2) for pair in pairs]
    units = [pair / d.where(d > 0, 1)[..., None] for pair, d in zip(pairs, distances, strict=True)]
    angles = [unit @ unit.transpose(1, 2) for unit in units]  # [B,B,B], the vertex first
    relative = [d * (d > 0).sum() / d.sum().clamp_min(1e-12) for d in distances]  # mean 1
    return F.smooth_l1_loss(*relative), F.smooth_l1_loss(*angles)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖G_T − G_S‖²_F/B², where G = f·fᵀ with normalised rows.

    SP: Tung & Mori 2019, arXiv 1907.09682, equation 4.
    """
    similar = [F.normalize(f.float() @ f.float().T, dim=1) for f in (student, teacher.detach())]
    return (similar[1] - similar[0]).square().mean()


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of neighbour probabilities, averaged over all B² pairs.

    PKT: Passalis & Tefas 2018, arXiv 1803.10837, averaged as in the published code. The
    probabilities are cosine similarities mapped to 0..1, normalised over each row.
    """
    probabilities = []
    for features in (student, teacher.detach()):
        unit = F.normalize(features.float(), dim=1)
        kernel = (unit @ unit.T + 1) / 2
        probabilities.append(kernel / kernel.sum(dim=1, keepdim=True))
    student_p, teacher_p = (p + 1e-7 for p in probabilities)
    return (probabilities[1] * (teacher_p / student_p).log()).mean()


class FeatureMethod(Method):
    """A method that matches the student's pooled features to the CNN teacher's."""

    few_views = FewViews(measured_with="pkt", points={8: 0.39})

    @classmethod
    def reads(cls, options: method.Options) -> tuple[str, ...]:
        return ("teacher_features",)


@register("rkd")
class RKD(FeatureMethod):
    """Relational knowledge distillation (Park et al. 2019) on pooled features.

    Features and weights are as in RepDistiller.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weights of the distance and the angle term."""

        distance_weight: NotNegative = 25.0
        angle_weight: NotNegative = 50.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Park et al., equation 12."""
        distance, angle = rkd_loss(batch.features, batch.rows["teacher_features"])
        return {
            "ce": self.label_term(batch),
            "distance": self.options.distance_weight * distance,
            "angle": self.options.angle_weight * angle,
        }


@register("sp")
class SP(FeatureMethod):
    """Similarity-preserving distillation (Tung & Mori 2019) on pooled features, not on maps.

    The weight is as in RepDistiller, which takes the last feature map.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weight γ."""

        feature_weight: NotNegative = 3000.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Tung & Mori, equation 5."""
        loss = sp_loss(batch.features, batch.rows["teacher_features"])
        return {"ce": self.label_term(batch), "feature": self.options.feature_weight * loss}


@register("pkt")
class PKT(FeatureMethod):
    """Probabilistic knowledge transfer (Passalis & Tefas 2018) on pooled features.

    Features and weight are as in RepDistiller.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weight of the divergence."""

        feature_weight: NotNegative = 30000.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = pkt_loss(batch.features, batch.rows["teacher_features"])
        return {"ce": self.label_term(batch), "feature": self.options.feature_weight * loss}

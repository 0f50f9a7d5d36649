"""Distillation from several teachers, each with logits of its own.

The formulas, weights and temperature are those of the code that Zhang, Chen and Wang released with
CA-MKD (github.com/Rorozhl/CA-MKD, commit c2f39a9), which the comparisons of that paper were run
with. With K teachers, D_k the divergence τ²·KL(softmax(z_k/τ) ‖ softmax(z_S/τ)) of a sample, H_k
the entropy of softmax(z_k), and CE_k the cross-entropy of z_k with the label:

- `aver`: Σ_k D_k / K. You et al. (KDD 2017, "Learning from multiple teacher networks") average the
  teachers' soft labels, which has the same gradient: KL to a mean and the mean of KLs differ by a
  constant.
- `ebkd`: Σ_k w_k·D_k / K with w_k = 1 − H_k / Σ_j H_j, after Kwon et al. (ICASSP 2020, "Adaptive
  knowledge distillation based on entropy"). These weights sum to K − 1.
- `ca-mkd`: Σ_k w_k·D_k / K with w_k = (1 − softmax_k(CE_k)) / (K − 1), after Zhang et al. (ICASSP
  2022, arXiv 2201.00007). These weights sum to 1, so that the term is a K-th of a weighted mean.

All weights are of one sample, and nothing flows back through them. CA-MKD's second term is left
out: it compares feature maps with the student's, weighted by the teacher's classifier on the
projected map of the student, and a cache has neither maps nor classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.core.validation import NotNegative, Positive
from richkd.losses import method
from richkd.losses.method import EVERY, Batch, Method, Task, register

NEGLIGIBLE = 1e-30  # nats; teachers that are all this certain get equal weights


def entropy_weights(teachers: Tensor) -> Tensor:
    """Return w_k = 1 − H_k/Σ_j H_j of each sample: logits [K,B,C] -> [K,B], f32.

    Entropies are of probabilities at temperature 1.
    """
    log_p = F.log_softmax(teachers.float(), dim=2)
    entropy = -(log_p.exp() * log_p).sum(2) + NEGLIGIBLE
    return 1 - entropy / entropy.sum(0)


def confidence_weights(teachers: Tensor, labels: Tensor) -> Tensor:
    """Return w_k = (1 − softmax_k(CE_k)) / (K−1) of each sample: [K,B,C] and [B] -> [K,B], f32."""
    log_p = F.log_softmax(teachers.float(), dim=2)
    true = labels.expand(len(teachers), -1)[:, :, None]
    loss = -log_p.gather(2, true)[:, :, 0]
    return (1 - loss.softmax(0)) / (len(teachers) - 1)


def weighted_kd_loss(
    student_logits: Tensor, teachers: Tensor, weights: Tensor | None, temperature: float
) -> Tensor:
    """Return Σ_k w_k·τ²·KL(softmax(z_k/τ) ‖ softmax(z_S/τ)) / K, averaged over the batch.

    Args:
        student_logits: [B,C].
        teachers: [K,B,C], the logits of each teacher; they get no gradient.
        weights: [K,B]; None for ones.
        temperature: τ > 0.

    Returns:
        A scalar, f32.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    target = F.log_softmax(teachers.detach().float() / temperature, dim=2)
    each = (target.exp() * (target - student)).sum(2)  # [K,B]
    return (each if weights is None else weights * each).mean() * temperature**2


class MultiTeacher(Method):
    """A method that weighs the logits of every teacher, sample by sample."""

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weights of the label term and of the logit term, and temperature τ."""

        logit_weight: NotNegative = 1.0
        temperature: Positive = 4.0

    def __init__(self, options: Options, task: Task) -> None:
        super().__init__(options, task)
        if len(task.teachers) < 2:
            have = ", ".join(task.teachers) or "none"
            raise RichKDError(
                f"the method weighs several teachers against each other, but the cache has "
                f"{have}; add another with richkd add-teacher, or choose another method",
                code="method-needs-teachers",
            )
        self.rows = self.row_names(options, task)

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        return (EVERY,)

    def weights(self, teachers: Tensor, labels: Tensor) -> Tensor | None:
        """Return the weights [K,B] of the teachers' logits [K,B,C]; None for ones."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the label term, and the weighted mean of the divergences from the teachers."""
        o = self.options
        teachers = torch.stack([batch.rows[name].float() for name in self.rows]).detach()
        weights = self.weights(teachers, batch.labels)
        loss = weighted_kd_loss(batch.logits, teachers, weights, o.temperature)
        return {"ce": self.label_term(batch), "logit": o.logit_weight * loss}


@register("aver")
class AVER(MultiTeacher):
    """The mean of all teachers (You et al. 2017), as CA-MKD's comparison computes it."""

    def weights(self, teachers: Tensor, labels: Tensor) -> Tensor | None:
        return None


@register("ebkd")
class EBKD(MultiTeacher):
    """Teachers weighted by their certainty (Kwon et al. 2020), as in CA-MKD's comparison."""

    def weights(self, teachers: Tensor, labels: Tensor) -> Tensor | None:
        return entropy_weights(teachers)


@register("ca-mkd")
class CAMKD(MultiTeacher):
    """Teachers weighted by how right they are (Zhang et al. 2022): the logit term alone."""

    needs_one_label = True

    def weights(self, teachers: Tensor, labels: Tensor) -> Tensor | None:
        return confidence_weights(teachers, labels)

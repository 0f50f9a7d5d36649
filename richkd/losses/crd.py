"""Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699).

The embeddings of each side are scored against the memory bank of the other side, which has a row
for each of the N training samples. One matrix product [B,D]·[D,N] computes all scores, of which
B·(K+1) are gathered. Gathering K+1 vectors per sample gives the same result with many times
the memory traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.core.errors import RichKDError
from richkd.core.validation import Count, NotNegative, Positive, Share
from richkd.losses import method
from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import Batch, Task, register
from richkd.losses.relational import FeatureMethod

EPSILON = 1e-7  # as in the published loss
EMBEDDING = 128
Contrast = Literal["exact", "shared", "bank"]


class Embed(nn.Module):
    """A linear layer to 128 dimensions, then L2 normalisation (E_S, E_T and E_C in the papers)."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, EMBEDDING)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features: [B,F] -> [B,128], unit length, f32."""
        return F.normalize(self.linear(features.float().flatten(1)), dim=1)


class CRDLoss(nn.Module):
    """The two-sided noise-contrastive loss with its memory banks.

    Negatives are samples of other classes if `labels` are given, else all other samples. They are
    drawn uniformly with replacement, which is the noise distribution 1/N of the loss. (The
    published code draws them without replacement for CIFAR, and with it for ImageNet.)

    - exact: draw K negatives for every sample;
    - shared: draw K for the whole batch; each sample ignores those of its own class;
    - bank: draw none; all samples of other classes are negatives.

    Args:
        num_samples: N, the number of rows of each bank.
        dim: D, the width of the embeddings.
        num_negatives: K.
        temperature: divides the scores.
        momentum: of the banks.
        labels: [N], the classes of all samples; only needed to draw negatives.
        contrast: exact, shared or bank.

    Raises:
        RichKDError: all samples are of one class, so there are no negatives; or the
            temperature makes the exponentials overflow.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor
    _class: Tensor
    _order: Tensor
    _first: Tensor
    _count: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        num_negatives: int,
        temperature: float = 0.07,
        momentum: float = 0.5,
        labels: Tensor | None = None,
        contrast: Contrast = "exact",
    ) -> None:
        super().__init__()
        check_temperature(temperature, max(num_samples, num_negatives))
        self.contrast = contrast
        self.num_samples = num_samples
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        bound = 1 / math.sqrt(dim / 3)
        for side in ("student_bank", "teacher_bank"):
            self.register_buffer(side, torch.empty(num_samples, dim).uniform_(-bound, bound))
        # Z of the student's and the teacher's scores; 0 until the first batch sets them
        self.register_buffer("normalizers", torch.zeros(2))
        # samples sorted by class, and for every sample the first position and size of its class
        groups = torch.arange(num_samples, device="cpu") if labels is None else labels.cpu()
        order = groups.argsort(stable=True)
        counts = torch.bincount(groups)
        first = counts.cumsum(0) - counts
        if num_samples < 2 or int(counts.max()) == num_samples:
            raise RichKDError(
                f"CRD needs samples of at least two classes, but all {num_samples} training "
                f"samples are of one; use more samples, or another method",
                code="crd-one-class",
            )
        self.register_buffer("_class", groups, persistent=False)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_first", first[groups], persistent=False)
        self.register_buffer("_count", counts[groups], persistent=False)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def draw_negatives(self, index: Tensor) -> Tensor:
        """Draw K samples of other classes for each of [B] samples, on the device -> [B,K]."""
        first, count = self._first[index, None].int(), self._count[index, None].int()
        others = self.num_samples - count
        # a position among the samples of other classes, shifted past the sample's own class
        uniform = torch.rand(len(index), self.num_negatives, device=index.device)
        rank = torch.minimum(uniform.mul_(others).int(), others - 1)
        rank += (rank >= first) * count
        return self._order.take(rank.long())

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        negative_index: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch, the sum of both sides; gradients flow into both embeddings.

        Args:
            student: [B,D], unit length.
            teacher: [B,D], unit length.
            index: [B], the training samples of the batch.
            negative_index: [B,K]; None to draw them.

        Returns:
            A scalar, f32.
        """
        student, teacher = student.float(), teacher.float()
        self._pending = (student.detach(), teacher.detach(), index)
        columns = candidates = kept = None
        if negative_index is not None:
            columns = torch.cat([index[:, None], negative_index], dim=1)
        elif self.contrast == "exact":
            columns = torch.cat([index[:, None], self.draw_negatives(index)], dim=1)
        else:
            candidates = self._candidates(index)
            kept = self._class[candidates] != self._class[index, None]
        sides = ((student, self.teacher_bank, 0), (teacher, self.student_bank, 1))
        losses = []
        for embedding, bank, side in sides:
            scaled = embedding / self.temperature
            if candidates is None:
                scores = scaled @ bank.T
            else:
                positive = (scaled * bank[index]).sum(1, keepdim=True)
                scores = torch.cat([positive, scaled @ bank[candidates].T], dim=1)
            loss, z = _NoiseContrast.apply(
                scores, columns, kept, self.normalizers[side], self.num_samples
            )
            self.normalizers[side] = z
            losses.append(loss)
        return losses[0] + losses[1]  # type: ignore[no-any-return]

    def _candidates(self, index: Tensor) -> Tensor:
        """Return candidate negatives [M] for the whole batch; some are of a sample's own class."""
        if self.contrast == "bank":
            return torch.arange(self.num_samples, device=index.device)
        return torch.randint(self.num_samples, (self.num_negatives,), device=index.device)

    @torch.no_grad()
    def update(self) -> None:
        """Update the banks' rows of the last batch; call it after the backward pass."""
        if self._pending is None:
            raise RuntimeError("CRDLoss.update() before forward()")
        student, teacher, index = self._pending
        for bank, embedding in ((self.student_bank, student), (self.teacher_bank, teacher)):
            rows = self.momentum * bank[index] + (1 - self.momentum) * embedding
            bank[index] = F.normalize(rows, dim=1)
        self._pending = None


def check_temperature(temperature: float, count: int) -> None:
    """Check that sums of `count` exponentials per sample fit f32; raise RichKDError if not."""
    room = math.log(torch.finfo(torch.float32).max) - math.log(
        1024 * count
    )  # up to 1024 samples per batch
    if 1 / temperature > room:
        raise RichKDError(
            f"crd_temperature = {temperature:g}: exp(1/{temperature:g}) overflows float32 among "
            f"{count:,} samples; use {math.ceil(1000 / room) / 1000:g} or more",
            code="crd-temperature-too-low",
        )


class _NoiseContrast(torch.autograd.Function):
    """The loss of one side: equations 8 to 13 of the paper, in the form of the published code.

    With p = exp(score)/Z and noise n = K/N, it sums −log(p/(p+n)) of the positive and −log(n/(p+n))
    of all negatives, averaged over the batch. The gradient with respect to a score is p/(p+n),
    minus 1 for the positive, so that one pass computes both the loss and the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        columns: Tensor | None,
        kept: Tensor | None,
        z: Tensor,
        num_samples: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the constant Z, which the first batch sets.

        Args:
            ctx: the context of autograd.
            scores: cosines over temperature: [B,N], or [B,1+M] for the positive and M negatives.
            columns: [B,1+M], the columns of [B,N] of the positive and the negatives.
            kept: [B,M], the negatives that count; None for all.
            z: Z, or 0 before the first batch.
            num_samples: N.
        """
        p = scores.exp() if columns is None else scores.gather(1, columns).exp_()  # [B,1+M]
        if kept is not None:
            p[:, 1:] *= kept
        count = scores.new_full((), p.shape[1] - 1.0) if kept is None else kept.sum(1, keepdim=True)
        mean = p.sum() / (count + 1).expand(len(p), 1).sum()
        z = torch.where(z > 0, z, mean * num_samples)
        p /= z
        noise = count.clamp_min(1) / num_samples
        share = p + (noise + EPSILON)
        negative = (share[:, 1:] / noise).log_()
        if kept is not None:
            negative *= kept
        loss = negative.sum() - (p[:, 0] / share[:, 0]).log_().sum()
        slope = p.div_(share)
        slope[:, 0] -= 1
        ctx.save_for_backward(slope, columns)
        ctx.width = scores.shape[1]
        ctx.mark_non_differentiable(z)
        return loss / len(p), z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient with respect to the scores."""
        slope, columns = ctx.saved_tensors
        slope = slope * (gradients[0] / len(slope))
        if columns is not None:
            slope = slope.new_zeros(len(slope), ctx.width).scatter_add_(1, columns, slope)
        return slope, None, None, None, None


@register("crd")
class CRD(FeatureMethod):
    """Contrastive representation distillation (Tian et al. 2020), weighted as in RepDistiller."""

    @dataclass(frozen=True, kw_only=True)
    class Options(method.Options):
        """Weight; kind and number K of negatives; temperature; momentum of the banks."""

        feature_weight: NotNegative = 0.8
        contrast: Contrast = "exact"
        negatives: Count = 16384
        crd_temperature: Positive = 0.07
        bank_momentum: Share = 0.5

    def __init__(self, options: Options, task: Task) -> None:
        super().__init__(options, task)
        self.embed_student = Embed(task.student_dim)
        self.embed_teacher = Embed(task.teacher_dim)
        self.contrast = contrast_of(options, task)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Tian et al., equation 18, and the label term."""
        contrast = self.contrast(
            self.embed_student(batch.features),
            self.embed_teacher(batch.rows["teacher_features"]),
            batch.index,
        )
        return {
            "ce": self.label_term(batch),
            "feature": self.options.feature_weight * contrast,
        }

    def update(self) -> None:
        """Update the memory banks."""
        self.contrast.update()


@register("crd-kd")
class CRDKD(LogitMethod, CRD):
    """CRD beside knowledge distillation (Tian et al. 2020), weighted as in RepDistiller."""

    @dataclass(frozen=True, kw_only=True)
    class Options(CRD.Options, LogitOptions):
        """Options of CRD, and weight and temperature τ of the logit term."""

        logit_weight: NotNegative = 1.0
        temperature: Positive = 4.0

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        return (*LogitMethod.reads(options), *CRD.reads(options))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of CRD and the logit term of Hinton et al."""
        loss = kd_loss(*self.logits(batch), self.options.temperature)
        return {**CRD.forward(self, batch), "logit": self.options.logit_weight * loss}


def contrast_of(options: CRD.Options, task: Task) -> CRDLoss:
    """Return the contrastive loss for a method's options.

    Mixed images are of two classes, so that all other samples are negatives.
    """
    return CRDLoss(
        len(task.labels),
        EMBEDDING,
        options.negatives,
        options.crd_temperature,
        options.bank_momentum,
        None if task.mixed else task.labels,
        options.contrast,
    )

"""RichKD (Mansourian et al. 2026, arXiv 2511.09286): the CNN teacher fused with CLIP.

Variant L distils fused logits, F fused features (with CRD), L+F both. The weights are those of the
release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from richkd.core.fusion import fuse_features
from richkd.core.validation import NotNegative, Positive, Share
from richkd.losses.crd import CRD, Embed, contrast_of
from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import TARGET, Batch, Task, register


@register("richkd")
@register("richkd-l", feature_weight=0.0)
@register("richkd-f", logit_weight=0.0)
@register("richkd-ls", standardize=True, temperature=2.0, logit_weight=9.0)
class RichKD(LogitMethod):
    """CNN teacher fused with CLIP (Mansourian et al. 2026), with the weights of the release."""

    target = "fused"

    @dataclass(frozen=True, kw_only=True)
    class Options(CRD.Options, LogitOptions):
        """Options of CRD, weight and temperature τ of the logit term, and the features' blend.

        `feature_alpha` is λ in the paper; by default features are blended with the α of the logits,
        as in the release.
        """

        logit_weight: NotNegative = 3.0
        temperature: Positive = 3.0
        feature_alpha: Share | None = None

    def __init__(self, options: Options, task: Task) -> None:
        super().__init__(options, task)
        self.alpha = task.alpha if options.feature_alpha is None else options.feature_alpha
        if options.feature_weight > 0:
            self.embed_student = Embed(task.student_dim)
            self.embed_teacher = Embed(task.teacher_dim)
            self.embed_clip = Embed(task.clip_dim)
            self.contrast = contrast_of(options, task)

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        logits = (TARGET,) if options.logit_weight > 0 else ()
        features = ("teacher_features", "clip_features") if options.feature_weight > 0 else ()
        return logits + features

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of w_ce·CE + w_logit·L_logit + w_feat·L_feat whose weight is not 0."""
        o = self.options
        terms = {"ce": self.label_term(batch)}
        if o.logit_weight > 0:
            terms["logit"] = o.logit_weight * kd_loss(*self.logits(batch), o.temperature)
        if o.feature_weight > 0:
            target = fuse_features(
                self.embed_teacher(batch.rows["teacher_features"]),
                self.embed_clip(batch.rows["clip_features"]),
                self.alpha,
            )
            student = self.embed_student(batch.features)
            terms["feature"] = o.feature_weight * self.contrast(student, target, batch.index)
        return terms

    def update(self) -> None:
        if self.options.feature_weight > 0:
            self.contrast.update()

"""RichKD (Mansourian et al. 2026, arXiv 2511.09286): the CNN teacher fused with CLIP.

Variant L distils fused logits, F fused features (with CRD), L+F both. The weights are those of the
release. With weights by teacher, any number of teachers is fused, and those of weight 0 are not
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from richkd.core.errors import RichKDError
from richkd.core.fusion import fuse_many_features
from richkd.core.validation import NotNegative, Positive, Share
from richkd.losses.crd import CRD, Embed, contrast_of
from richkd.losses.kd import LogitMethod, LogitOptions, kd_loss
from richkd.losses.method import TARGET, Batch, Task, register

FEATURES = {"cnn": "teacher_features", "clip": "clip_features"}


def feature_row(teacher: str) -> str:
    """Return the name of the rows of a teacher's features."""
    return FEATURES.get(teacher, f"{teacher}/features")


def feature_weights(options: Any, task: Task) -> dict[str, float]:
    """Return the weights of teachers in the fused features: CNN, CLIP, then the added by name.

    Raises:
        RichKDError: both `feature_alpha` and weights by teacher are given.
    """
    if not task.weights:
        alpha = task.alpha if options.feature_alpha is None else options.feature_alpha
        return {"cnn": alpha, "clip": 1 - alpha}
    if options.feature_alpha is not None:
        given = ",".join(f"{name}={weight:g}" for name, weight in task.weights.items())
        raise RichKDError(
            f"feature_alpha = {options.feature_alpha:g} contradicts the weights {given}, which "
            f"features are fused by as well; give one of the two",
            code="feature-alpha-with-weights",
        )
    used = {name: weight for name, weight in task.weights.items() if weight > 0}
    order = [*FEATURES, *sorted(task.others)]
    return {name: used[name] for name in sorted(used, key=order.index)}


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
        self.weights = feature_weights(options, task)
        if options.feature_weight > 0:
            self.embed_student = Embed(task.student_dim)
            if "cnn" in self.weights:
                self.embed_teacher = Embed(task.teacher_dim)
            if "clip" in self.weights:
                self.embed_clip = Embed(task.clip_dim)
            others = [name for name in self.weights if name not in FEATURES]
            # in a list: a ModuleDict refuses some names, such as `type`
            self.embed_others = nn.ModuleList(Embed(task.others[name]) for name in others)
            self.contrast = contrast_of(options, task)

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        logits = (TARGET,) if options.logit_weight > 0 else ()
        features = tuple(FEATURES.values()) if options.feature_weight > 0 else ()
        return logits + features

    @classmethod
    def row_names(cls, options: Any, task: Task) -> tuple[str, ...]:
        logits = (TARGET,) if options.logit_weight > 0 else ()
        names = feature_weights(options, task) if options.feature_weight > 0 else ()
        return logits + tuple(feature_row(name) for name in names)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of w_ce·CE + w_logit·L_logit + w_feat·L_feat whose weight is not 0."""
        o = self.options
        terms = {"ce": self.label_term(batch)}
        if o.logit_weight > 0:
            terms["logit"] = o.logit_weight * kd_loss(*self.logits(batch), o.temperature)
        if o.feature_weight > 0:
            target = self.fused_features(batch)
            student = self.embed_student(batch.features)
            terms["feature"] = o.feature_weight * self.contrast(student, target, batch.index)
        return terms

    def fused_features(self, batch: Batch) -> Tensor:
        """Return normalise(Σ_k w_k·E_k(f_k)), [B,128] f32."""
        others = iter(self.embed_others)
        own = {"cnn": "embed_teacher", "clip": "embed_clip"}
        layers = [getattr(self, own[k]) if k in own else next(others) for k in self.weights]
        rows = [batch.rows[feature_row(name)] for name in self.weights]
        embeddings = [layer(row) for layer, row in zip(layers, rows, strict=True)]
        return fuse_many_features(embeddings, [*self.weights.values()])

    def update(self) -> None:
        if self.options.feature_weight > 0:
            self.contrast.update()

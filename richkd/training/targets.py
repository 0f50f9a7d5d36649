"""The target logits of a student: the CNN teacher's, CLIP's, or their blend, from the cache.

The blend that the cache was made with is read, if the cache keeps it; any other α, scale, set of
prompts or CLIP head is computed from the cached parts. No teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.config.settings import Distill
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.choices import Scale
from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.core.progress import Report
from richkd.core.seeds import derive_seed
from richkd.store import schema
from richkd.store.reader import TeacherCache
from richkd.store.topk import Rows
from richkd.training.probe import fit_probe

ALPHAS = torch.linspace(0, 1, 21)
SCALES_A_DOUBLING = 2
DOUBLINGS = 12  # of the scale, below its native value; 3 above


@dataclass(frozen=True)
class Target:
    """A resolved choice of target logits: no value is `auto` or a name of a scale."""

    kind: str  # teacher, clip or fused
    alpha: float  # of the blend, which fused features use too
    scale: float  # of CLIP's logits: of its cosines, or of the probe's logits
    clip: Mapping[str, Tensor]  # split -> CLIP's logits before the scale [N,C], if they are used
    about: Mapping[str, Any]  # for the summary
    bias: float = 0.0  # added to scaled cosines

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays of the cache, with a row per view and sample, that `logits` starts from."""
        if self.kind == "fused" and not self.clip:
            return ("fused_logits",)
        return () if self.kind == "clip" else ("teacher_logits",)

    def logits(
        self, split: str, rows: Mapping[str, Rows], empty: Callable[..., Tensor] = torch.empty
    ) -> Rows:
        """Return target logits [N,C] of a split, from the rows that `reads` names.

        If they are not such rows themselves, they are computed, a span of samples at a time, into
        the tensor that `empty` creates of their shape, and rounded to its dtype.
        """
        if self.kind != "clip" and not self.clip:
            return rows[self.reads[0]]
        clip = self.clip[split]
        logits = empty(clip.shape)
        for span in spans(len(clip)):
            if self.kind == "clip":
                own = fusion.clip_logits(clip[span], self.scale, self.bias)
                logits[span] = own.to(logits.dtype)
            else:
                teacher = rows["teacher_logits"][span].float()
                fused = fusion.fuse_logits(teacher, clip[span], self.alpha, self.scale, self.bias)
                logits[span] = fused.to(logits.dtype)
        return logits


def choose_target(cache: TeacherCache, settings: Distill, kind: str, report: Report) -> Target:
    """Resolve the target that the settings ask for.

    Args:
        cache: to train from.
        settings: target, alpha, scale, prompts, clip_head and holdout are read.
        kind: the method's own target, if the settings name none.
        report: where the fit of a probe and the choice of α are logged.

    Raises:
        RichKDError: the cache lacks what it needs, or a setting is out of range.
    """
    kind = settings.target or kind
    settings = settings.with_holdout("validation" in cache.splits)
    manifest = cache.manifest
    alpha = manifest["alpha"] if settings.alpha is None else settings.alpha
    if kind == "teacher":
        if alpha == "auto":
            raise RichKDError(
                "alpha 'auto' chooses a blend, but the target is the CNN teacher alone; pass "
                "--target fused",
                code="alpha-auto-without-blend",
            )
        return Target(kind, alpha, 1.0, {}, {"kind": kind})
    cache.require("train/clip_similarity")
    assert manifest["clip"] is not None
    zero_shot = settings.clip_head == "zero-shot"
    native = manifest["clip"]["logit_scale"] if zero_shot else 1.0
    scale, bias = _number(cache, native, settings), 0.0
    if zero_shot and not (alpha == "auto" and settings.scale is None):  # which chooses a number
        named = cast(Scale, manifest["scale"]) if settings.scale is None else settings.scale
        bias = fusion.resolve_bias(named, manifest["clip"].get("logit_bias"))
    about: dict[str, Any] = {"kind": kind, "head": settings.clip_head}
    clip: dict[str, Tensor] = {}
    if kind == "clip" or settings.reblends or not cache.has("train/fused_logits"):
        clip, fitted = _clip_logits(cache, settings, report)
        about |= fitted
    if alpha == "auto":
        candidates = _scales(native) if settings.scale is None else torch.tensor([scale])
        split, index = choice_samples(cache, settings.holdout or 0.0)
        alpha, scale, nll = choose_blend(cache, clip[split], candidates, split, index)
        about |= {"held_out_nll": nll}
        report.log(
            f"the likelihood of {len(index):,} {split} images{' held out' * (split == 'test')} "
            f"chooses alpha {alpha:.2f}, scale {scale:.4g}"
        )
    about |= {"scale": scale} if kind == "clip" else {"alpha": alpha, "scale": scale}
    return Target(kind, alpha, scale, clip, about, bias)


def _clip_logits(
    cache: TeacherCache, settings: Distill, report: Report
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return CLIP's logits of all splits before the scale, and what the fit of a probe found."""
    if settings.clip_head == "zero-shot":
        return {split: cache.similarity(split, settings.prompts) for split in cache.splits}, {}
    if settings.prompts is not None:
        raise RichKDError(
            "prompts are for the zero-shot head, and the probe has none; remove --prompts",
            code="prompts-with-probe",
        )
    report.log(f"fitting a probe on CLIP's features of {cache.num_samples:,} images")
    features = {split: cache.read(f"{split}/clip_features") for split in cache.splits}
    train, labels = features.pop("train"), cache.read("train/labels")
    probe = fit_probe(train, labels, torch.cat([*features.values()]), cache.num_classes)
    if probe.too_small:
        names = [cache.manifest["class_names"][number] for number in probe.too_small]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        report.log(f"these classes have fewer training images than the probe has folds: {shown}")
    others = torch.split(probe.other_logits, [len(each) for each in features.values()])
    found = {
        "penalty": probe.penalty,
        "out_of_fold_nll": probe.nll,
        "out_of_fold_top1": accuracy(probe.train_logits, labels, 1),
    }
    return {"train": probe.train_logits, **dict(zip(features, others, strict=True))}, found


def _number(cache: TeacherCache, native: float, settings: Distill) -> float:
    """Return the scale as a number, of cosines or of the probe's logits."""
    scale = cast(Scale, cache.manifest["scale"]) if settings.scale is None else settings.scale
    if settings.clip_head == "probe":
        if settings.scale is None:
            return 1.0  # the cache's scale is of cosines
        if scale == "raw":
            raise RichKDError(
                "scale 'raw' is for CLIP's cosines, but the probe gives logits; remove --scale, or "
                "give a number to multiply them by",
                code="scale-with-probe",
            )
    return fusion.resolve_scale(scale, native)


def _scales(native: float) -> Tensor:
    """Return candidates around a native scale, evenly spaced in the logarithm."""
    steps = torch.arange(-DOUBLINGS * SCALES_A_DOUBLING, 3 * SCALES_A_DOUBLING + 1)
    return native * 2 ** (steps / SCALES_A_DOUBLING)


def held_out(num_test: int, share: float) -> tuple[Tensor, Tensor]:
    """Split the test samples: to make choices on, and to test students on.

    Returns:
        Their ids, ascending: the same for every seed, student and method.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, num_test, 4))
    order = torch.randperm(num_test, generator=generator)
    count = round(num_test * share)
    return order[:count].sort().values, order[count:].sort().values


def choice_samples(cache: TeacherCache, holdout: float) -> tuple[str, Tensor]:
    """Return the samples that choices are made on: their split, and their ids in it.

    These are the cache's validation images, or else a share of the test images, which students are
    then not tested on.

    Raises:
        RichKDError: the share leaves no sample to choose or to test on.
    """
    if "validation" in cache.splits:
        return "validation", torch.arange(schema.split_sizes(cache.manifest)["validation"])
    count = schema.split_sizes(cache.manifest)["test"]
    chosen, tested = held_out(count, holdout)
    if not len(chosen) or not len(tested):
        raise RichKDError(
            f"holdout = {holdout}: of {count} test images, this leaves {len(chosen)} to choose on "
            f"and {len(tested)} to test on; give another share",
            code="holdout-share",
        )
    return "test", chosen


def choose_blend(
    cache: TeacherCache, clip_logits: Tensor, scales: Tensor, split: str, index: Tensor
) -> tuple[float, float, float]:
    """Return α and scale of the highest likelihood on held-out samples, and their NLL in nats.

    The CNN teacher knows the training labels by heart, so only samples that it never saw can tell
    how far to trust it.

    Args:
        cache: to train from.
        clip_logits: [M,C], of a split, before the scale.
        scales: the candidates.
        split: validation or test.
        index: ids of the samples to choose on.
    """
    labels = cache.read(f"{split}/labels")[index]
    teacher, clip = cache.read(f"{split}/teacher_logits")[index], clip_logits[index]
    best = (1.0, float(scales[0]), F.cross_entropy(teacher.float(), labels).item())
    for alpha in ALPHAS.tolist():
        for scale in scales.tolist():
            fused = fusion.fuse_logits(teacher, clip, alpha, scale)
            nll = F.cross_entropy(fused, labels).item()
            if nll < best[2]:
                best = (alpha, scale, nll)
    return best


def describe_target(target: Target, cache: TeacherCache, tested: Tensor) -> dict[str, Any]:
    """Return the target's entry in a summary: its settings, and its scores on tested samples."""
    rows = {name: cache.read(f"test/{name}") for name in target.reads}
    logits = target.logits("test", rows)[tested].float()
    labels = cache.read("test/labels")[tested]
    return {
        **target.about,
        "top1": accuracy(logits, labels, 1),
        "nll": F.cross_entropy(logits, labels).item(),
    }

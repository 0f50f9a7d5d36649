"""The target logits of a student: one teacher's, or a blend of several, from the cache.

The blend that the cache was made with is read, if the cache keeps it; any other α, scale, set of
prompts or CLIP head is computed from the cached parts. No teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.config.settings import Distill, shown_weights
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError, require, unknown
from richkd.core.progress import Report
from richkd.core.seeds import derive_seed
from richkd.data.mixing import Mix
from richkd.losses import method_class, method_options
from richkd.losses.method import EVERY
from richkd.store import schema
from richkd.store.added import array_of, unknown_teacher
from richkd.store.reader import TeacherCache
from richkd.store.topk import Rows
from richkd.training.blend_weights import likeliest
from richkd.training.identity import RunIdentity
from richkd.training.parts import Part, blended, clip_scale, read_rows, teacher_part

ALPHAS = torch.linspace(0, 1, 21)
SCALES_A_DOUBLING = 2
DOUBLINGS = 12  # of the scale, below its native value; 3 above


@dataclass(frozen=True)
class Target:
    """A resolved choice of target logits: no value is `auto` or a name of a scale."""

    kind: str  # teacher, clip, fused, or the name of an added teacher
    parts: tuple[Part, ...]  # their sum is the target
    about: Mapping[str, Any]  # for the summary
    alpha: float = 1.0  # of the blend, which fused features use too
    weights: Mapping[str, float] = field(default_factory=dict)  # likewise, by teacher

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows of the cache, one per view and sample, that `logits` starts from."""
        return tuple(part.row for part in self.parts if part.row)

    @property
    def is_stored(self) -> bool:
        """Whether the target is rows of the cache as they are."""
        return self.parts == (Part(self.parts[0].row),)

    def logits(
        self,
        split: str,
        rows: Mapping[str, Rows],
        empty: Callable[..., Tensor] = torch.empty,
        samples: Tensor | None = None,
        mix: Mix | None = None,
    ) -> Rows:
        """Return target logits [E,C] of a split, from the rows that `reads` names.

        If they are not such rows themselves, they are computed into the tensor that `empty`
        creates of their shape, and rounded to its dtype. `samples` and `mix` as in `blended`.
        """
        if self.is_stored:
            return rows[self.parts[0].row]
        return blended(self.parts, split, rows, empty, samples, mix)


def choose_target(cache: TeacherCache, settings: Distill, kind: str, report: Report) -> Target:
    """Resolve the target that the settings ask for.

    Args:
        cache: to train from.
        settings: target, alpha, weights, balance, scale, prompts, clip_head and holdout are read.
        kind: the method's own target, if the settings name none.
        report: where the fit of a probe and the choice of α or weights are logged.

    Raises:
        RichKDError: the cache lacks what it needs, or a setting is out of range.
    """
    kind = settings.target or kind
    settings = settings.with_holdout("validation" in cache.splits)
    check_target(cache, settings, kind)
    if kind == "fused" and settings.weights is not None:
        return choose_weighted(cache, settings, report)
    if kind == "fused" and cache.added:
        report.log(f"the blend leaves out {', '.join(cache.added)}; --weights takes them too")
    alpha = cache.manifest["alpha"] if settings.alpha is None else settings.alpha
    if kind == "teacher":
        return Target(kind, (Part("teacher_logits"),), {"kind": kind}, float(alpha))
    if kind not in ("clip", "fused"):
        part, _ = teacher_part(cache, kind, settings, report)
        return Target(kind, (part,), {"kind": kind}, weights={kind: 1.0})
    cache.require("train/clip_similarity")
    about: dict[str, Any] = {"kind": kind, "head": settings.clip_head}
    if kind == "fused" and not settings.reblends and cache.has("train/fused_logits"):
        scale, _ = clip_scale(cache, settings)
        about |= {"alpha": alpha, "scale": scale}
        return Target(kind, (Part("fused_logits"),), about, float(alpha))
    clip, found = teacher_part(cache, "clip", settings, report)
    about |= found
    if alpha == "auto":
        alpha, clip, chosen = choose_alpha(cache, settings, clip, report)
        about |= chosen
    if kind == "clip":
        return Target(kind, (clip,), {**about, "scale": clip.factor}, alpha)
    about |= {"alpha": alpha, "scale": clip.factor}
    parts = (Part("teacher_logits", factor=alpha), clip.times(1 - alpha))
    return Target(kind, parts, about, alpha)


def check_target(cache: TeacherCache, settings: Distill, kind: str) -> None:
    """Raise RichKDError if the cache has no such target, or the settings ask for another blend."""
    known = ("teacher", "clip", "fused", *cache.added)
    if kind not in known:
        raise unknown("target", kind, known)
    if kind in cache.added:
        of_clip = {"scale": settings.scale, "prompts": settings.prompts, "alpha": settings.alpha}
        for name, value in of_clip.items():
            must = f"left out for the target {kind}, an added teacher"
            require(value is None, name, value, must)
        must = f"zero-shot for the target {kind}, an added teacher"
        require(settings.clip_head == "zero-shot", "clip_head", settings.clip_head, must)
    what = "the CNN teacher" if kind == "teacher" else kind
    if kind == "teacher" and settings.alpha == "auto":
        raise RichKDError(
            f"alpha 'auto' chooses a blend, but the target is {what} alone; pass --target fused",
            code="alpha-auto-without-blend",
        )
    if kind != "fused" and settings.weights is not None:
        raise RichKDError(
            f"weights {shown_weights(settings.weights)} choose a blend, but the target is {what} "
            f"alone; pass --target fused, or leave --weights out",
            code="weights-without-blend",
        )


def choose_alpha(
    cache: TeacherCache, settings: Distill, clip: Part, report: Report
) -> tuple[float, Part, dict[str, Any]]:
    """Choose α, and CLIP's scale unless it is given, by likelihood on held-out samples."""
    clip = replace(clip, shift=0.0 if settings.scale is None else clip.shift)
    native = clip.factor
    if settings.scale is None and settings.clip_head == "zero-shot":
        assert cache.manifest["clip"] is not None
        native = cache.manifest["clip"]["logit_scale"]
    candidates = _scales(native) if settings.scale is None else torch.tensor([clip.factor])
    split, index = choice_samples(cache, settings.holdout or 0.0)
    alpha, scale, nll = choose_blend(cache, clip.fixed[split], candidates, split, index)
    report.log(
        f"the likelihood of {len(index):,} {split} images{' held out' * (split == 'test')} "
        f"chooses alpha {alpha:.2f}, scale {scale:.4g}"
    )
    return alpha, replace(clip, factor=scale), {"held_out_nll": nll}


def choose_weighted(cache: TeacherCache, settings: Distill, report: Report) -> Target:
    """Return the blend of any number of teachers: Σ_k w_k·s_k·z_k, with weights that sum to 1.

    The scales s_k give all teachers the spread of the first one (fusion.balance), measured on the
    training images in their first view, unless `balance` is none.
    """
    wanted = resolve_weights(cache, settings)
    parts: dict[str, Part] = {}
    about: dict[str, Any] = {}
    for name in wanted:
        parts[name], found = teacher_part(cache, name, settings, report)
        about |= found
    if settings.balance != "none":
        own = {n: blended([p], "train", read_rows(cache, [p], "train")) for n, p in parts.items()}
        scales = fusion.balance(own)
        parts = {name: part.times(scales[name]) for name, part in parts.items()}
        about |= {"balance": scales}
    if settings.weights == "auto":
        split, index = choice_samples(cache, settings.holdout or 0.0)
        labels = cache.read(f"{split}/labels")[index]
        logits = [p.logits(split, read_rows(cache, [p], split), index) for p in parts.values()]
        chosen, scale, nll = likeliest(logits, labels)
        wanted = dict(zip(parts, chosen, strict=True))
        parts = {name: part.times(scale) for name, part in parts.items()}
        about |= {"held_out_nll": nll, "scale": scale}
        report.log(
            f"the likelihood of {len(index):,} {split} images{' held out' * (split == 'test')} "
            f"chooses the weights {shown_weights(wanted)}"
        )
    used = {name: weight for name, weight in wanted.items() if weight > 0}
    about = {"kind": "fused", "head": settings.clip_head, "weights": used, **about}
    report.log(f"the target blends {shown_weights(used)}")
    blend = tuple(parts[name].times(weight) for name, weight in used.items())
    return Target("fused", blend, about, weights=used)


def resolve_weights(cache: TeacherCache, settings: Distill) -> dict[str, float]:
    """Return the teachers of a blend with their weights, which sum to 1; with `auto`, all alike.

    Raises:
        RichKDError: the weights name a teacher that the cache does not have.
    """
    given = settings.weights
    if not isinstance(given, Mapping):
        return {name: 1 / len(cache.teachers) for name in cache.teachers}
    for name in given:
        if name not in cache.teachers:
            raise unknown_teacher(cache.location, name, cache.teachers)
    total = sum(given.values())
    return {name: given[name] / total for name in cache.teachers if given.get(name)}


def run_identity(cache: TeacherCache, settings: Distill) -> RunIdentity:
    """Return what a run learns from, as its recipe.toml records it."""
    return RunIdentity.of(cache, added_teachers(cache, settings))


def added_teachers(cache: TeacherCache, settings: Distill) -> tuple[str, ...]:
    """Return the added teachers whose rows a run reads."""
    method_type, options = method_class(
        settings.method, method_options(settings.options, settings.method)
    )
    reads, target = method_type.reads(options), settings.target or method_type.target
    if EVERY in reads:
        return cache.added
    if target in cache.added:
        return (target,)
    if settings.weights is None or target != "fused" or not reads:
        return ()
    return tuple(name for name in resolve_weights(cache, settings) if name in cache.added)


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
    rows = {name: cache.read(array_of("test", name)) for name in target.reads}
    logits = target.logits("test", rows)[tested].float()
    labels = cache.read("test/labels")[tested]
    return {
        **target.about,
        "top1": accuracy(logits, labels, 1),
        "nll": F.cross_entropy(logits, labels).item(),
    }

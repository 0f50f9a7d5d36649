"""The logits of each teacher of a cache, of which target logits are made. No teacher is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor

from richkd.config.settings import Distill
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.choices import Scale
from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.core.progress import Report
from richkd.data.mixing import Mix
from richkd.store.added import array_of
from richkd.store.reader import TeacherCache
from richkd.store.topk import Rows, TopKRows
from richkd.training.probe import fit_probe


@dataclass(frozen=True)
class Part:
    """A teacher's share of target logits: factor · z + shift.

    `z` is either rows that differ between views, or logits that are the same in all of them.
    """

    row: str = ""  # name of the rows, as `array_of` takes it; empty: `fixed`
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # split -> [N,C]
    factor: float = 1.0
    shift: float = 0.0

    def times(self, weight: float) -> Part:
        """Return a share of this part."""
        return replace(self, factor=weight * self.factor, shift=weight * self.shift)

    def logits(
        self,
        split: str,
        rows: Mapping[str, Rows],
        span: slice | Tensor,
        samples: Tensor | None = None,
        mix: Mix | None = None,
    ) -> Tensor:
        """Return factor · z + shift of some entries: [n,C] f32; arguments as in `blended`."""
        if not self.row and mix is not None:
            return fusion.clip_logits(mix.rows(self.fixed[split], span), self.factor, self.shift)
        given = rows[self.row] if self.row else self.fixed[split]
        some = given[span if self.row or samples is None else samples[span]]
        dense = some.dense() if isinstance(some, TopKRows) else some
        return fusion.clip_logits(dense, self.factor, self.shift)


def blended(
    parts: Sequence[Part],
    split: str,
    rows: Mapping[str, Rows],
    empty: Callable[..., Tensor] = torch.empty,
    samples: Tensor | None = None,
    mix: Mix | None = None,
) -> Tensor:
    """Return the sum of parts [E,C], computed a span of entries at a time.

    Args:
        parts: of the sum.
        split: of the samples.
        rows: those that the parts name, of one view.
        empty: creates the tensor that is returned, of a shape; sums are rounded to its dtype.
        samples: [E], the sample of each entry of the rows; None if entry i is of sample i.
        mix: of the same entries, if they are of two samples each. Rows of one view are of both;
            logits that are the same in all views are mixed.
    """
    first = rows[parts[0].row] if parts[0].row else parts[0].fixed[split]
    count = len(first) if samples is None else len(samples)
    logits = empty((count, first.shape[-1]))
    for span in spans(count):
        whole = reduce(add, (part.logits(split, rows, span, samples, mix) for part in parts))
        logits[span] = whole.to(logits.dtype)
    return logits


def read_rows(cache: TeacherCache, parts: Sequence[Part], split: str) -> dict[str, Rows]:
    """Read the rows that parts name, of a split; of the training split, the first view's."""
    view = 0 if split == "train" else None
    return {part.row: cache.rows(array_of(split, part.row), view) for part in parts if part.row}


def teacher_part(
    cache: TeacherCache, name: str, settings: Distill, report: Report
) -> tuple[Part, dict[str, Any]]:
    """Return the logits of one teacher of a cache on their own scale.

    A CLIP's are its cosines at its native scale, with its bias. For the cache's first CLIP,
    `scale`, `prompts` and `clip_head` of the settings count.

    Args:
        cache: to train from.
        name: cnn, clip, or that of an added teacher.
        settings: of the run.
        report: receives the fit of a probe.

    Returns:
        The part, and what the fit of a probe found.
    """
    if name == "cnn":
        return Part("teacher_logits"), {}
    if name == "clip":
        fixed, found = clip_logits(cache, settings, report)
        scale, bias = clip_scale(cache, settings)
        return Part(fixed=fixed, factor=scale, shift=bias), found
    group = cache.addition(name)
    clip = group.manifest["clip"]
    if clip is None:
        return Part(f"{name}/teacher_logits"), {}
    fixed = {split: group.similarity(split) for split in group.splits}
    return Part(fixed=fixed, factor=clip["logit_scale"], shift=clip.get("logit_bias", 0.0)), {}


def clip_logits(
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


def clip_scale(cache: TeacherCache, settings: Distill) -> tuple[float, float]:
    """Return the scale and the bias of CLIP's logits: of its cosines, or of the probe's logits."""
    clip = cache.manifest["clip"]
    assert clip is not None
    stored = cast(Scale, cache.manifest["scale"])
    if settings.clip_head == "zero-shot":
        named = stored if settings.scale is None else settings.scale
        bias = fusion.resolve_bias(named, clip.get("logit_bias"))
        return fusion.resolve_scale(named, clip["logit_scale"]), bias
    if settings.scale == "raw":
        raise RichKDError(
            "scale 'raw' is for CLIP's cosines, but the probe gives logits; remove --scale, or "
            "give a number to multiply them by",
            code="scale-with-probe",
        )
    # the cache's scale is of cosines, the probe's native one is 1
    return 1.0 if settings.scale in (None, "native") else float(settings.scale), 0.0

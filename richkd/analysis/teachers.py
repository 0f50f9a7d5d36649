"""Analysis of the teachers from a cache alone: no model is loaded.

    cached rows ─▶ logits of each teacher ─▶ scores, reliability, disagreement, class similarity,
                                             complementarity
    parts of the blend ─▶ the effect of α, scale and prompts

All teachers are compared on the same samples: all test images, or the training images in their
first view, from which students learn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.analysis import metrics
from richkd.analysis.complementarity import complementarity
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.choices import Scale
from richkd.core.errors import RichKDError, unknown
from richkd.core.progress import Report
from richkd.core.teacher_names import name_of
from richkd.store.reader import TeacherCache

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
SCALES = tuple(2.0**step for step in range(-4, 5))  # times CLIP's own
SUBSETS = 8  # random subsets of the prompts of each size
CHANGED = 10  # classes shown that gain, and that lose
EXAMPLES = 4  # images of each


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The cached arrays of one split; those that the cache lacks are None."""

    labels: Tensor  # [N]
    teacher: Tensor  # logits [N,C] f32
    features: Tensor | None  # [N,F]
    clip_features: Tensor | None  # [N,D]
    similarity: Tensor | None  # CLIP's cosines [N,C]
    fused: Tensor | None  # the cached blend [N,C]


def analyze(
    cache: TeacherCache,
    *,
    threshold: float = 0.8,
    split: str = "test",
    report: Report | None = None,
) -> dict[str, Any]:
    """Analyze the teachers of a cache.

    Args:
        cache: an open cache.
        threshold: the lowest top probability of a confident prediction.
        split: test, train (in its first view), or validation if the cache has it.
        report: receives progress.

    Returns:
        The analysis, as `richkd analyze` writes it to JSON: accuracies and shares in 0..1, NLL in
        nats. Entries that need CLIP are None for a cache without CLIP, and so are those on prompts
        for a cache without CLIP's features. `complementarity` is there if teachers were added to
        the cache.

    Raises:
        RichKDError: a setting is out of range, or cached logits are not finite.
    """
    metrics.check_threshold(threshold)
    if split not in cache.splits:
        raise unknown("split", split, cache.splits)
    if split == "train" and cache.augment is not None and cache.augment.mixes:
        raise RichKDError(
            f"split = 'train': {cache.location} has mixed training images (augment "
            f"{cache.augment.text}), each of two classes; choose test",
            code="split-mixed",
        )
    report = report or Report(quiet=True)
    rows, every = read_rows(cache, split), every_logits(cache, split)
    logits = {**every, **teacher_logits(cache, rows)}
    check_finite(cache, logits)
    with report.track("analyze", 4, "parts") as tick:
        result: dict[str, Any] = {
            "store": cache.location.name,
            "dataset": cache.manifest["dataset"]["name"],
            "split": split,
            "samples": len(rows.labels),
            "classes": cache.num_classes,
            "threshold": threshold,
            "alpha": cache.manifest["alpha"],
            "scale": cache.manifest["scale"],
            "blend_scale": blend_scale(cache),
            "teachers": {
                kind: metrics.score(own, rows.labels, threshold) for kind, own in logits.items()
            },
            "reliability": {
                kind: [asdict(bin) for bin in metrics.reliability(own, rows.labels)]
                for kind, own in logits.items()
            },
            "consistency": consistency(cache, rows, logits),
        }
        tick(1)
        for name, part in (
            ("disagreement", disagreement),
            ("class_changes", class_changes),
            ("blend", blend_effects),
        ):
            result[name] = None if rows.similarity is None else part(cache, rows, logits)
            tick(1)
        if every.keys() - {"cnn", "clip"}:
            result["complementarity"] = complementarity(every, rows.labels)
    return result


def blend_scale(cache: TeacherCache) -> float | None:
    """Return the scale of CLIP's cosines in the cached blend; None without CLIP."""
    clip = cache.manifest["clip"]
    if clip is None:
        return None
    return fusion.resolve_scale(cast(Scale, cache.manifest["scale"]), clip["logit_scale"])


def read_rows(cache: TeacherCache, split: str) -> Rows:
    """Read the arrays of a split, as float32."""
    view = 0 if split == "train" else None

    def read(name: str, view: int | None = None) -> Tensor | None:
        return cache.read(f"{split}/{name}", view).float() if cache.has(f"{split}/{name}") else None

    teacher = cache.read(f"{split}/teacher_logits", view).float()
    similarity, fused = read("clip_similarity"), read("fused_logits", view)
    if similarity is not None and fused is None:
        fused = cache.blend(teacher, similarity, alpha=None, scale=None)
    return Rows(
        labels=cache.read(f"{split}/labels"),
        teacher=teacher,
        features=read("teacher_features", view),
        clip_features=read("clip_features"),
        similarity=similarity,
        fused=fused,
    )


def teacher_logits(cache: TeacherCache, rows: Rows) -> dict[str, Tensor]:
    """Return the logits of the CNN, of CLIP at its own scale, and of the blends."""
    clip = cache.manifest["clip"]
    if clip is None or rows.similarity is None or rows.fused is None:
        return {"cnn": rows.teacher}
    stored = blend_scale(cache)
    logits = {
        "cnn": rows.teacher,
        "clip": fusion.clip_logits(
            rows.similarity, clip["logit_scale"], clip.get("logit_bias", 0.0)
        ),
        "fused": rows.fused,
    }
    for name, scale in (("native", clip["logit_scale"]), ("raw", 1.0)):
        if scale != stored:
            logits[name] = cache.blend(rows.teacher, rows.similarity, alpha=None, scale=scale)
    return logits


def every_logits(cache: TeacherCache, split: str) -> dict[str, Tensor]:
    """Return the logits of every teacher of a cache by name, CLIP's at its own scale: [N,C] f32.

    Those of the training images are of their first view.
    """
    view = 0 if split == "train" else None
    entries = {name: cache.addition(name).manifest.get("clip") for name in cache.added}
    entries = {"cnn": None, "clip": cache.manifest["clip"], **entries}
    found = {}
    for name in cache.teachers:
        place = f"teachers/{name}/{split}" if name in cache.added else split
        clip = entries[name]
        if clip is None:
            found[name] = cache.read(f"{place}/teacher_logits", view).float()
        else:
            similarity = cache.read(f"{place}/clip_similarity").float()
            found[name] = fusion.clip_logits(
                similarity, clip["logit_scale"], clip.get("logit_bias", 0.0)
            )
    return found


def check_finite(cache: TeacherCache, logits: Mapping[str, Tensor]) -> None:
    """Raise RichKDError if logits of a teacher are not finite."""
    for name, own in logits.items():
        if not torch.isfinite(own).all():
            raise RichKDError(
                f"{cache.location}: the logits of {name_of(name)} contain NaN or infinity; run "
                f"richkd verify {cache.location} to find them",
                code="logits-not-finite",
            )


def disagreement(
    cache: TeacherCache, rows: Rows, logits: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return how often each teacher is right, alone or with the other, and the blend's accuracy."""
    right = {kind: logits[kind].argmax(1) == rows.labels for kind in ("cnn", "clip", "fused")}
    same = logits["cnn"].argmax(1) == logits["clip"].argmax(1)
    cnn, clip = right["cnn"], right["clip"]
    cases = {
        "both right": cnn & clip,
        "only the CNN teacher right": cnn & ~clip,
        "only CLIP right": ~cnn & clip,
        "both wrong, the same class": ~cnn & ~clip & same,
        "both wrong, different classes": ~cnn & ~clip & ~same,
    }
    return [
        {
            "case": name,
            "share": case.double().mean().item(),
            "fused_top1": right["fused"][case].double().mean().item() if case.any() else None,
        }
        for name, case in cases.items()
    ]


def consistency(
    cache: TeacherCache, rows: Rows, logits: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Return how well each teacher's soft labels reflect which classes are similar.

    This is the rank correlation, over pairs of classes, between the similarity of soft labels
    and of the CNN's mean features, and between soft labels and text embeddings, where the cache
    has them.
    """
    references: dict[str, Tensor] = {}
    if rows.features is not None:
        references["features"] = metrics.mean_similarity(
            rows.features, rows.labels, cache.num_classes
        )
    if cache.manifest["clip"] is not None:
        references["text"] = metrics.cosines(fusion.class_embeddings(cache.text_embeddings))
    similarity = {
        kind: metrics.soft_label_similarity(own, rows.labels) for kind, own in logits.items()
    }
    return {
        kind: {name: metrics.rank_correlation(own, other) for name, other in references.items()}
        for kind, own in similarity.items()
    }


def class_changes(
    cache: TeacherCache, rows: Rows, logits: Mapping[str, Tensor]
) -> dict[str, list[dict[str, Any]]]:
    """Return the classes that gain and lose most accuracy by fusion, with samples that changed."""
    cnn, clip, fused = (
        metrics.class_accuracy(metrics.confusion(logits[kind], rows.labels))
        for kind in ("cnn", "clip", "fused")
    )
    change = (fused - cnn).nan_to_num(0)
    before, after = (logits[kind].argmax(1) == rows.labels for kind in ("cnn", "fused"))

    def table(order: list[int], changed: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "class": cache.manifest["class_names"][number],
                "cnn": cnn[number].item(),
                "clip": clip[number].item(),
                "fused": fused[number].item(),
                "samples": torch.nonzero(changed & (rows.labels == number))[:EXAMPLES, 0].tolist(),
            }
            for number in order
        ]

    gains = [n for n in change.argsort(descending=True, stable=True).tolist() if change[n] > 0]
    losses = [n for n in change.argsort(stable=True).tolist() if change[n] < 0]
    return {
        "gain": table(gains[:CHANGED], ~before & after),
        "lose": table(losses[:CHANGED], before & ~after),
    }


def blend_effects(
    cache: TeacherCache, rows: Rows, logits: Mapping[str, Tensor]
) -> dict[str, list[dict[str, Any]] | None]:
    """Return accuracy and NLL of the blend by α, scale, number of prompts, and prompt.

    The last two are None if the cache does not keep CLIP's features.
    """
    clip = cache.manifest["clip"]
    assert clip is not None and rows.similarity is not None
    alpha, native = cache.manifest["alpha"], clip["logit_scale"]
    stored = blend_scale(cache)
    assert stored is not None
    scales = {"raw": 1.0, "native": native}
    if stored not in scales.values():
        scales[f"{stored:g}"] = stored
    swept = sorted({*(native * factor for factor in SCALES), 1.0, stored})
    alone = None if rows.clip_features is None else _by_prompt(cache, rows, alpha, stored)
    return {
        "alpha": [
            {"scale": name, "alpha": a, **_fit(rows, rows.similarity, a, scale)}
            for name, scale in scales.items()
            for a in ALPHAS
        ],
        "scale": [{"scale": scale, **_fit(rows, rows.similarity, alpha, scale)} for scale in swept],
        "num_prompts": alone and _by_num_prompts(cache, rows, alone, alpha, stored),
        "prompt": alone,
    }


def _fit(rows: Rows, similarity: Tensor, alpha: float, scale: float) -> dict[str, float]:
    fused = fusion.fuse_logits(rows.teacher, similarity, alpha, scale)
    return {
        "top1": accuracy(fused, rows.labels, 1),
        "nll": F.cross_entropy(fused, rows.labels).item(),
    }


def _by_num_prompts(
    cache: TeacherCache, rows: Rows, alone: list[dict[str, Any]], alpha: float, scale: float
) -> list[dict[str, Any]]:
    """Return mean accuracies over single prompts, random subsets of each size, and all prompts."""
    count = len(alone)
    generator = np.random.default_rng(0)
    by_size = {1: alone}
    for size in sorted({*range(2, min(count, 8)), *range(8, count, 8), count} - {1}):
        draws = 1 if size == count else SUBSETS
        subsets = [generator.permutation(count)[:size].tolist() for _ in range(draws)]
        by_size[size] = [_by_prompts(cache, rows, prompts, alpha, scale) for prompts in subsets]
    return [
        {
            "prompts": size,
            **{
                name: float(np.mean([one[name] for one in each]))
                for name in ("clip_top1", "fused_top1")
            },
        }
        for size, each in by_size.items()
    ]


def _by_prompt(cache: TeacherCache, rows: Rows, alpha: float, scale: float) -> list[dict[str, Any]]:
    """Return accuracies with each prompt alone, in the order of CLIP's."""
    found = [
        {"prompt": prompt, **_by_prompts(cache, rows, [number], alpha, scale)}
        for number, prompt in enumerate(cache.manifest["prompts"])
    ]
    return sorted(found, key=lambda row: -row["clip_top1"])


def _by_prompts(
    cache: TeacherCache, rows: Rows, prompts: list[int], alpha: float, scale: float
) -> dict[str, float]:
    """Return the accuracies of CLIP and of the blend with some of the prompts."""
    assert rows.clip_features is not None
    classes = fusion.class_embeddings(cache.text_embeddings, prompts)
    similarity = fusion.clip_similarity(rows.clip_features, classes)
    return {
        "clip_top1": accuracy(similarity, rows.labels, 1),
        "fused_top1": _fit(rows, similarity, alpha, scale)["top1"],
    }


def images_as_png(cache: TeacherCache, split: str, samples: list[int]) -> dict[int, str]:
    """Return images of samples as PNG data URIs; empty if the cache has no images."""
    if not cache.manifest["dataset"]["embedded"] or not samples:
        return {}
    from PIL import Image

    images = cache.read(f"{split}/images")
    found = {}
    for sample in samples:
        buffer = io.BytesIO()
        Image.fromarray(images[sample].numpy()).save(buffer, "PNG")
        found[sample] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return found

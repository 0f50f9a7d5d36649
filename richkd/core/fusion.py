"""Blend the CNN teacher with CLIP (RichKD, arXiv 2511.09286): pure functions for both stages.

C is the number of classes, P of prompts per class, D the width of CLIP's embeddings. All
arithmetic is in f32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.choices import Scale, check_blend
from richkd.core.errors import RichKDError
from richkd.core.memory import spans


def class_embeddings(
    prompt_embeddings: Tensor,
    prompts: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return one text embedding per class: the mean of its prompts' embeddings, normalised.

    Args:
        prompt_embeddings: [C,P,D], unit length.
        prompts: indices of the prompts to use; None for all.
        device: of the result, and where it is computed; by default that of the embeddings.

    Returns:
        [C,D], unit length.

    Raises:
        RichKDError: no prompts, a repeated one, or one that does not exist.
    """
    if prompts is not None:
        have = prompt_embeddings.shape[1]
        wrong = [p for p in prompts if not 0 <= p < have]
        if wrong or not prompts or len(set(prompts)) != len(prompts):
            raise RichKDError(
                f"prompts = {list(prompts)}: must be different numbers from 0 to {have - 1}",
                code="prompts-out-of-range",
            )
    means = []
    for span in spans(len(prompt_embeddings)):  # of 21,841 classes, a copy of all takes a gigabyte
        some = prompt_embeddings[span].to(device=device)
        some = some if prompts is None else some[:, list(prompts)]
        means.append(F.normalize(some.float(), dim=-1).mean(1))
    return F.normalize(torch.cat(means), dim=-1)


def clip_similarity(image_features: Tensor, classes: Tensor) -> Tensor:
    """Return cosine similarities: unit vectors [N,D] and [C,D] -> [N,C], f32."""
    return image_features.float() @ classes.float().T


def resolve_scale(scale: Scale, logit_scale: float) -> float:
    """Return a scale as a number: `native` is CLIP's own, `raw` is 1.

    The released RichKD code uses `raw`. Cosines lie in [-1, 1], so CLIP then hardly changes the
    blend.
    """
    check_blend(0.0, scale)
    if scale == "native":
        return logit_scale
    return 1.0 if scale == "raw" else float(scale)


def resolve_bias(scale: Scale, logit_bias: float | None) -> float:
    """Return what is added to scaled cosines: CLIP's own bias goes with its own scale, `native`.

    Only CLIPs trained with a sigmoid loss (SigLIP) have one. It is the same for all classes, so no
    softmax, likelihood or accuracy depends on it.
    """
    return (logit_bias or 0.0) if scale == "native" else 0.0


def clip_logits(similarity: Tensor, scale: float, bias: float = 0.0) -> Tensor:
    """Return CLIP's logits z_C = s·cosine + b: [N,C] -> [N,C], f32."""
    scaled = scale * similarity.float()
    return scaled + bias if bias else scaled


def fuse_logits(
    teacher_logits: Tensor, similarity: Tensor, alpha: float, scale: float, bias: float = 0.0
) -> Tensor:
    """Return the fused logits z_F = α·z_T + (1−α)·(s·cosine + b): [N,C] and [N,C] -> [N,C], f32."""
    rest = 1 - alpha
    return alpha * teacher_logits.float() + clip_logits(similarity, rest * scale, rest * bias)


def blend_logits(
    logits: Sequence[Tensor], weights: Sequence[float], scales: Sequence[float] | None = None
) -> Tensor:
    """Return the blend Σ_k w_k·s_k·z_k of several teachers: each [N,C] -> [N,C], f32.

    Args:
        logits: of each teacher, [N,C].
        weights: w of each teacher.
        scales: s of each teacher, as from `balance`; 1 by default.
    """
    scales = scales or [1.0] * len(logits)
    parts = zip(logits, weights, scales, strict=True)
    return reduce(add, (weight * scale * own.float() for own, weight, scale in parts))


def spread(logits: Tensor) -> float:
    """Return how far apart a teacher's logits [N,C] are.

    This is the standard deviation over the classes of a row (the unbiased one, as in logit
    standardisation), averaged over the samples.
    """
    rows = (logits[span].float().std(dim=1).double().sum().item() for span in spans(len(logits)))
    return sum(rows) / len(logits)


def balance(logits: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the factor of each teacher's logits that gives all of them the first one's spread.

    Weights of a blend then are shares of it: networks trained with label smoothing or another
    temperature would otherwise count for less, or for more, than their weights.

    Args:
        logits: of each teacher by name, [N,C], of the same samples.

    Raises:
        RichKDError: the logits of a teacher are the same for all classes, or not finite.
    """
    spreads = {name: spread(own) for name, own in logits.items()}
    for name, own in spreads.items():
        if not 0 < own < math.inf:
            raise RichKDError(
                f"the logits of teacher {name!r} have spread {own:g} over the classes, so that "
                f"they cannot be balanced with the others; leave it out of the blend",
                code="logits-without-spread",
            )
    first = next(iter(spreads.values()))
    return {name: first / own for name, own in spreads.items()}


def fuse_features(teacher: Tensor, clip: Tensor, alpha: float) -> Tensor:
    """Return f_F = normalise(α·E_T(f_T) + (1−α)·E_C(f_C)): unit vectors [B,d], [B,d] -> [B,d]."""
    return fuse_many_features((teacher, clip), (alpha, 1 - alpha))


def fuse_many_features(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return normalise(Σ_k w_k·E_k(f_k)) of several teachers: unit vectors [B,d] each -> [B,d]."""
    parts = (weight * own for own, weight in zip(embeddings, weights, strict=True))
    return F.normalize(reduce(add, parts), dim=-1)

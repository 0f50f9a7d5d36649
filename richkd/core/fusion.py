"""Blend the CNN teacher with CLIP (RichKD, arXiv 2511.09286): pure functions for both stages.

C is the number of classes, P of prompts per class, D the width of CLIP's embeddings. All
arithmetic is in f32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from richkd.core.choices import Scale, check_blend
from richkd.core.errors import RichKDError


def class_embeddings(prompt_embeddings: Tensor, prompts: Sequence[int] | None = None) -> Tensor:
    """Return one text embedding per class: the mean of its prompts' embeddings, normalised.

    Args:
        prompt_embeddings: [C,P,D], unit length.
        prompts: indices of the prompts to use; None for all.

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
        prompt_embeddings = prompt_embeddings[:, list(prompts)]
    mean = F.normalize(prompt_embeddings.float(), dim=-1).mean(1)
    return F.normalize(mean, dim=-1)


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


def fuse_features(teacher: Tensor, clip: Tensor, alpha: float) -> Tensor:
    """Return f_F = normalise(α·E_T(f_T) + (1−α)·E_C(f_C)): unit vectors [B,d], [B,d] -> [B,d]."""
    return F.normalize(alpha * teacher + (1 - alpha) * clip, dim=-1)

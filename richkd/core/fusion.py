"""The blend of CNN teacher and CLIP (RichKD, arXiv 2511.09286): pure functions, for both stages.

C classes, P prompts a class, D CLIP's embedding width. All arithmetic is in f32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from richkd.core.choices import Scale, check_blend
from richkd.core.errors import RichKDError


def class_embeddings(prompt_embeddings: Tensor, prompts: Sequence[int] | None = None) -> Tensor:
    """One text embedding a class: the unit embeddings of its prompts, averaged, unit again.

    Args:
        prompt_embeddings: [C,P,D], unit length.
        prompts: which of the P prompts to use; all for None.

    Returns:
        [C,D], unit length.

    Raises:
        RichKDError: no prompt is left, one is named twice, or one that does not exist.
    """
    if prompts is not None:
        have = prompt_embeddings.shape[1]
        wrong = [p for p in prompts if not 0 <= p < have]
        if wrong or not prompts or len(set(prompts)) != len(prompts):
            raise RichKDError(
                f"prompts = {list(prompts)}: name each wanted prompt once, from 0 to {have - 1}",
                code="prompts-out-of-range",
            )
        prompt_embeddings = prompt_embeddings[:, list(prompts)]
    mean = F.normalize(prompt_embeddings.float(), dim=-1).mean(1)
    return F.normalize(mean, dim=-1)


def clip_similarity(image_features: Tensor, classes: Tensor) -> Tensor:
    """Cosines of images and classes: [N,D] and [C,D], both unit length, -> [N,C] f32."""
    return image_features.float() @ classes.float().T


def resolve_scale(scale: Scale, logit_scale: float) -> float:
    """The number that a scale stands for: `native` is CLIP's own, `raw` is 1.

    `raw` is what the released RichKD code does; cosines lie in [-1, 1], so CLIP then hardly
    moves the blend.
    """
    check_blend(0.0, scale)
    if scale == "native":
        return logit_scale
    return 1.0 if scale == "raw" else float(scale)


def fuse_logits(teacher_logits: Tensor, similarity: Tensor, alpha: float, scale: float) -> Tensor:
    """Fused logits z_F = α·z_T + (1−α)·s·cosine, [N,C] and [N,C] -> [N,C] f32."""
    return alpha * teacher_logits.float() + (1 - alpha) * scale * similarity.float()


def fuse_features(teacher: Tensor, clip: Tensor, alpha: float) -> Tensor:
    """Fused features f_F = unit(α·E_T(f_T) + (1−α)·E_C(f_C)): unit [B,d], [B,d] -> unit [B,d]."""
    return F.normalize(alpha * teacher + (1 - alpha) * clip, dim=-1)

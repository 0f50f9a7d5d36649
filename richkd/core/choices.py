"""Names to choose from that settings and the rooms that act on them share."""

from __future__ import annotations

from typing import Literal

from richkd.core.errors import require, unknown

Scale = float | Literal["native", "raw"]


Alpha = float | Literal["auto"]


TARGETS = ("teacher", "clip", "fused")


CLIP_HEADS = ("zero-shot", "probe")


STEPS = ("auto", "eager", "captured", "compiled")


PRECISIONS = ("auto", "float32", "bfloat16")


CLIP_PRECISIONS = ("float32", "bfloat16", "float16")


INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


ORDERS = ("sorted", "natural")  # of classes, by the names of their folders


def check_blend(alpha: float, scale: Scale) -> None:
    """Refuse an alpha outside [0, 1] and a scale that is neither a name nor a positive number."""
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    if isinstance(scale, str):
        if scale not in ("native", "raw"):
            raise unknown("scale", scale, ["native", "raw", "or a positive number"])
    else:
        require(0 < scale < float("inf"), "scale", scale, "a positive number, native or raw")

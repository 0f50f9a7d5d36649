"""Names that settings offer to choose from."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from richkd.core.validation import Limit, Share, check

Scale = (
    Annotated[float, Limit("a positive number, native or raw", lambda scale: 0 < scale < math.inf)]
    | Literal["native", "raw"]
)
Target = Literal["teacher", "clip", "fused"]
ClipHead = Literal["zero-shot", "probe"]
TeacherHead = Literal["own", "probe", "rows"]
Step = Literal["auto", "eager", "captured", "compiled"]
Precision = Literal["auto", "float32", "bfloat16"]
ClipPrecision = Literal["float32", "bfloat16", "float16"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Row = Literal["teacher_logits", "teacher_features", "fused_logits", "clip_features"]

CLIP_PRECISIONS = get_args(ClipPrecision)
INTERPOLATIONS = get_args(Interpolation)
ROWS = get_args(Row)
CNN_ROWS = ROWS[:2]  # of a cache without CLIP
ORDERS = ("sorted", "natural")  # of classes, by the names of their folders


def check_blend(alpha: float, scale: Scale) -> None:
    """Check that alpha is in [0, 1], and the scale native, raw or positive; raise RichKDError."""
    check(alpha, Share, "alpha")
    check(scale, Scale, "scale")

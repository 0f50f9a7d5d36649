"""Names that settings offer to choose from."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from richkd.core.errors import RichKDError
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
Decode = Literal["auto", "exact", "draft", "gpu"]
Row = Literal["teacher_logits", "teacher_features", "fused_logits", "clip_features"]

CLIP_PRECISIONS = get_args(ClipPrecision)
INTERPOLATIONS = get_args(Interpolation)
ROWS = get_args(Row)
CNN_ROWS = ROWS[:2]  # of a cache without CLIP
ORDERS = ("sorted", "natural")  # of classes, by the names of their folders
CROP = "crop"  # views without any of the components below
MIXING = ("mixup", "cutmix", "mix")
AUGMENT = ("jitter", "trivial", "rand", "erase", *MIXING)  # in the order in which they are applied
ONE_OF = (("trivial", "rand"), MIXING)  # components that exclude each other


def check_blend(alpha: float, scale: Scale) -> None:
    """Check that alpha is in [0, 1], and the scale native, raw or positive; raise RichKDError."""
    check(alpha, Share, "alpha")
    check(scale, Scale, "scale")


def read_augment(text: str) -> str:
    """Return the components of `--augment`, as in rand+erase+mix, in the order they are applied.

    `crop` is part of every view, and named only if it is alone.

    Raises:
        RichKDError: one is unknown or repeated, or two exclude each other.
    """
    parts = [part.strip() for part in text.split("+")]
    known = (CROP, *AUGMENT)
    fault = next((f"{part!r} is unknown" for part in parts if part not in known), None)
    if fault is None and len({*parts}) < len(parts):
        fault = f"{next(part for part in parts if parts.count(part) > 1)} is repeated"
    for group in ONE_OF:
        both = [part for part in parts if part in group]
        if fault is None and len(both) > 1:
            fault = f"{both[0]} and {both[1]} exclude each other"
    if fault is not None:
        raise RichKDError(
            f"augment = {text!r}: {fault}; join some of {', '.join(known)} by +, as in "
            f"rand+erase+mix",
            code="augment-components",
        )
    return "+".join(part for part in AUGMENT if part in parts) or CROP

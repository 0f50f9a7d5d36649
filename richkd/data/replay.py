"""Replay the row of an augmented view: the same pixels on every machine and in both stages.

Crop, colour and geometry are Pillow's, by torchvision's functional transforms; mixing is in
integers. Everything runs on the crop, resized to the side of the network that sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.data.augment import CUTMIX, MIX_COLUMNS, OPS, ORDERS, RAND_OPS, Augment

Pixels = NDArray[np.uint8]
Crops = Callable[[int, Tensor], Tensor]  # a sample and its crops [V,…] -> [V,S,S,3] uint8
SHARES = 2**16  # mixup's share of an image is a whole number of these parts


def replay(augment: Augment, rows: Tensor, sample: int, crops: Crops) -> Tensor:
    """Return views of a sample.

    Args:
        augment: what the rows consist of.
        rows: [V,k+…], joined with those of the partners.
        sample: its id.
        crops: returns the crops of any sample, given their columns.

    Returns:
        [V,S,S,3] uint8.
    """
    own = crops(sample, rows[:, : augment.geometry])
    views = [altered(augment, *pair) for pair in zip(own.numpy(), rows.tolist(), strict=True)]
    if augment.mixes:
        theirs = rows[:, augment.width :]
        for number, row in enumerate(rows.tolist()):
            partner = int(row[augment.at["partner"]])
            crop = crops(partner, theirs[number : number + 1, : augment.geometry]).numpy()[0]
            other = altered(augment, crop, theirs[number].tolist())
            first = augment.at[MIX_COLUMNS[1]]
            views[number] = mixed(views[number], other, row[first : augment.width])
    return torch.from_numpy(np.stack(views))


def altered(augment: Augment, crop: Pixels, row: Sequence[float]) -> Pixels:
    """Return a crop [S,S,3] after the components that concern one sample alone."""
    image, at = Image.fromarray(crop), augment.at
    for part in augment.parts:
        if part == "jitter":
            first = at["jitter_order"]
            image = jittered(image, ORDERS[int(row[first])], row[first + 1 : first + 5])
        elif part == "trivial":
            image = apply_op(image, int(row[at["op"]]), row[at["magnitude"]])
        elif part == "rand":
            first = at["op_1"]
            for op, magnitude in zip(*[iter(row[first : first + 2 * RAND_OPS])] * 2, strict=True):
                image = apply_op(image, int(op), magnitude)
    pixels = np.array(image)
    if "erase" in augment.parts:
        first = at["erase_top"]
        pixels[window(row[first : first + 4], len(pixels))] = 0
    return pixels


def jittered(image: Image.Image, order: Sequence[int], factors: Sequence[float]) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in the given order of these four."""
    from torchvision.transforms.v2 import functional

    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for number in order:
        image = changes[number](image, factors[number])
    return image


def apply_op(image: Image.Image, op: int, magnitude: float) -> Image.Image:
    """Apply an op of TrivialAugment and RandAugment, as torchvision's v2 transforms do.

    The magnitude of a translation is a share of the side. Pixels are not interpolated, which is the
    default of both policies and of these functions.
    """
    from torchvision.transforms.v2 import functional

    name = OPS[op]
    if name in ("ShearX", "ShearY"):
        shear = float(np.degrees(np.arctan(magnitude)))
        angles = [shear, 0.0] if name == "ShearX" else [0.0, shear]
        return _affine(image, shear=angles, center=[0, 0])
    if name in ("TranslateX", "TranslateY"):
        # rounded first, as the share was: 16 pixels of 224 are not 15.999…
        pixels = int(round(magnitude * image.width, 3))
        return _affine(image, translate=[pixels, 0] if name == "TranslateX" else [0, pixels])
    by_name: dict[str, Callable[[], Image.Image]] = {
        "Identity": lambda: image,
        "Rotate": lambda: functional.rotate(image, magnitude),
        "Brightness": lambda: functional.adjust_brightness(image, 1 + magnitude),
        "Color": lambda: functional.adjust_saturation(image, 1 + magnitude),
        "Contrast": lambda: functional.adjust_contrast(image, 1 + magnitude),
        "Sharpness": lambda: functional.adjust_sharpness(image, 1 + magnitude),
        "Posterize": lambda: functional.posterize(image, int(magnitude)),
        "Solarize": lambda: functional.solarize(image, 255 * magnitude),
        "AutoContrast": lambda: functional.autocontrast(image),
        "Equalize": lambda: functional.equalize(image),
    }
    return by_name[name]()


def _affine(
    image: Image.Image,
    translate: Sequence[int] = (0, 0),
    shear: Sequence[float] = (0.0, 0.0),
    center: list[int] | None = None,
) -> Image.Image:
    from torchvision.transforms.v2 import functional

    moved: Image.Image = functional.affine(
        image, angle=0.0, translate=[*translate], scale=1.0, shear=[*shear], center=center
    )
    return moved


def window(box: Sequence[float], side: int) -> tuple[slice, slice]:
    """Return the rows and columns of a box (top, left, height, width) in shares of the side."""
    top, left, height, width = box
    bounds = (top, top + height), (left, left + width)
    rows, columns = (slice(*(int(edge * side + 0.5) for edge in edges)) for edges in bounds)
    return rows, columns


def mixed(own: Pixels, other: Pixels, mix: Sequence[float]) -> Pixels:
    """Mix two views: `mix` is the mode, the share of the first, and the box of the second.

    Mixup rounds to the nearest byte, with a share that is rounded to a 65,536th before.
    """
    mode, share, *box = mix
    if int(mode) == CUTMIX:
        here = window(box, len(own))
        own = own.copy()
        own[here] = other[here]
        return own
    parts = round(share * SHARES)
    whole = own.astype(np.uint32) * parts + other.astype(np.uint32) * (SHARES - parts)
    return ((whole + SHARES // 2) // SHARES).astype(np.uint8)

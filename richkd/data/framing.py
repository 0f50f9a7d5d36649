"""The input of a network: how an image becomes the square that it sees, and how it is normalised.

This belongs to a network, not to a dataset: the teacher and the students of one cache may differ in
all of it and still see the same crop of the same image. A manifest records it as `InputEntry`, a
weights file of `train-teacher` as its metadata. Reading a manifest must not need PyTorch, so it is
imported only in functions that handle images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypedDict, cast

from richkd.core.choices import INTERPOLATIONS
from richkd.core.validation import find_fault
from richkd.data.boxes import CLEAN_SHARE

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from richkd.data.decoding import Photograph

BOX = "box"  # crop mode of networks that richkd trains
CROP_MODES = (BOX, "center", "squash")


class InputEntry(TypedDict):
    """The input of a network as JSON; mean and std are of pixels in 0..1."""

    size: int
    mean: list[float]
    std: list[float]
    crop: float
    interpolation: str
    crop_mode: str


def input_fault(entry: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an untrusted entry, or None."""
    fault = find_fault(entry, InputEntry)
    if fault is not None:
        return str(fault)
    mean, std, crop, mode = (entry[name] for name in ("mean", "std", "crop", "crop_mode"))
    if entry["size"] < 1:
        return f"size is {entry['size']}"
    if (
        not len(mean) == len(std) == 3
        or not all(map(math.isfinite, [*mean, *std]))
        or min(std) <= 0
    ):
        return f"mean is {mean!r}, std {std!r}"
    if not 0 < crop <= (1 if mode == BOX else 2):  # some of timm's leave a margin
        return f"crop is {crop!r}"
    if entry["interpolation"] not in INTERPOLATIONS or mode not in CROP_MODES:
        return f"interpolation is {entry['interpolation']!r}, crop_mode {mode!r}"
    return None


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How an image becomes the square of bytes that a network sees.

    A view of a photograph is a box that is cut out and resized. The evaluation view depends on the
    crop mode. For `box`, used by all networks that richkd trains, it is the central square with
    `crop` times the shorter side, resized by torchvision on tensors. `center` and `squash` are
    timm's: PIL resizes the image so that its shorter side (for `squash`, each side) is
    `size`/`crop`, and the centre is cut out. Images in an array are resized in batches on their
    device.
    """

    size: int
    crop: float = CLEAN_SHARE
    interpolation: str = "bilinear"
    crop_mode: str = BOX

    def views(
        self, image: Image.Image | Photograph, views: Tensor, *, exact: bool = False
    ) -> Tensor:
        """Return views [V,5] of a photograph: [V,S,S,3] uint8.

        With `exact`, PIL resizes in every crop mode: in integers, the same on every machine. So it
        does if the photograph is reduced, as boxes then end between pixels.
        """
        import torch

        from richkd.data.decoding import Photograph
        from richkd.data.views import photo_pixels, resized_crop

        whole = Photograph.of(image)
        photo: Any = whole if whole.reduced else whole.image
        if self.crop_mode == BOX and not exact and not whole.reduced:
            photo = photo_pixels(whole.image)
        crops = torch.empty(len(views), self.size, self.size, 3, dtype=torch.uint8)
        for crop, view in zip(crops, views.tolist(), strict=True):
            crop.copy_(resized_crop(photo, view, self.size, self.interpolation))
        return crops

    def clean(self, image: Image.Image | Photograph) -> Tensor:
        """Return the evaluation view of a photograph: [1,S,S,3] uint8."""
        import torch

        from richkd.data.boxes import central_box
        from richkd.data.decoding import Photograph

        photo = Photograph.of(image)
        if self.crop_mode == BOX:
            box = map(int, central_box(*photo.size, self.crop))
            return self.views(photo, torch.tensor([[*box, 0]]))
        pixels: Tensor = self._evaluation(photo.image)
        return pixels.permute(1, 2, 0)[None]

    @cached_property
    def _evaluation(self) -> Any:
        """timm's transform from a PIL image to bytes [3,S,S]."""
        from timm.data import transforms_factory

        create: Any = transforms_factory.create_transform
        return create(
            (3, self.size, self.size),
            interpolation=self.interpolation,
            crop_pct=self.crop,
            crop_mode=self.crop_mode,
            normalize=False,
        )

    def of_array(self, images: Tensor, clean: bool) -> Tensor:
        """Resize images, or views of them: [B,H,W,3] uint8 -> [B,S,S,3] uint8.

        With `clean`, the result is the evaluation view, and otherwise the whole image.
        """
        from richkd.data.boxes import central_box
        from richkd.data.views import resize_bytes

        pixels = images.permute(0, 3, 1, 2)
        whole = self.size
        if clean and self.crop_mode == BOX:
            height, width = images.shape[1:3]
            top, left, height, width = map(int, central_box(height, width, self.crop))
            pixels = pixels[..., top : top + height, left : left + width]
        elif clean:
            whole = math.floor(self.size / self.crop)
        pixels = resize_bytes(pixels, [whole, whole], self.interpolation)
        if whole != self.size:
            from torchvision.transforms.v2 import functional

            pixels = functional.center_crop(pixels, [self.size, self.size])
        return pixels.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class NetworkInput(Framing):
    """A framing with the mean and standard deviation, of pixels in 0..1, that normalise it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Restore from a valid entry."""
        values: dict[str, Any] = {key: entry[key] for key in InputEntry.__annotations__}
        return cls(**{**values, "mean": tuple(entry["mean"]), "std": tuple(entry["std"])})

    @property
    def entry(self) -> InputEntry:
        """The entry of a manifest."""
        entry: Any = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        return cast(InputEntry, entry)

    @property
    def note(self) -> dict[str, str]:
        """The metadata of a weights file: text as it is, all else as JSON."""
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.entry.items()
        }

    @classmethod
    def of_note(cls, note: Mapping[str, str]) -> Self:
        """Restore from the metadata of a weights file; raise ValueError if it is damaged."""
        texts = {"interpolation", "crop_mode"}
        entry = {
            key: note[key] if key in texts else json.loads(note[key])
            for key in InputEntry.__annotations__
            if key in note
        }
        fault = input_fault(entry)
        if fault is not None:
            raise ValueError(fault)
        return cls.of(entry)

    def __str__(self) -> str:
        mean, std = (",".join(f"{number:g}" for number in each) for each in (self.mean, self.std))
        return (
            f"{self.size}×{self.size}, crop {100 * self.crop:g} %, {self.interpolation}, mean "
            f"{mean}, std {std}"
        )

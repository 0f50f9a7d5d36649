"""Decode JPEGs on the device of a training: by nvJPEG, which decodes a batch of them at once.

Data-loader workers only read such files. What is no plain JPEG (another format, grey, CMYK, turned
by EXIF) they decode themselves, and so does Pillow in the main process what the device cannot. The
pixels differ from Pillow's by a few units on a GPU; on the CPU they are the same.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from richkd.core.errors import RichKDError, first_line
from richkd.data.datasets import ImageFiles
from richkd.data.decoding import readable, upright
from richkd.data.framing import Framing
from richkd.data.views import resized_crop
from richkd.data.workers import Samples

TYPICAL_BYTES = 2**18  # of a JPEG, for the estimate of shared memory


class EncodedViews(Samples):
    """Entry i is (i, the length of its JPEG, the JPEG, its views [V,S,S,3]).

    The views are blank, and the length is 0 if they are not: then there is no JPEG.

    Args:
        files: the images.
        side: S.
        views: [V,E,5].
        samples: [E]; None if entry i is of sample i.
        otherwise: returns the entries of images that the device is not asked to decode.
    """

    def __init__(
        self,
        files: ImageFiles,
        side: int,
        views: Tensor,
        samples: Tensor | None,
        otherwise: Callable[[int], Sequence[int | Tensor]],
    ) -> None:
        self.files = files
        self.views = views
        self.samples = samples
        self.otherwise = otherwise
        self.blank = torch.zeros(len(views), side, side, 3, dtype=torch.uint8)

    def __getitem__(self, index: int) -> tuple[int | Tensor, ...]:
        content = plain_jpeg(self.files, self.sample(index))
        if content is None:
            _, crops = self.otherwise(index)
            return index, 0, torch.empty(0, dtype=torch.uint8), crops
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return index, len(content), encoded, self.blank

    def sample(self, index: int) -> int:
        """Return the sample of an entry."""
        return index if self.samples is None else int(self.samples[index])


def plain_jpeg(files: ImageFiles, sample: int) -> bytes | None:
    """Return the content of an image file if it is an upright JPEG in RGB, else None."""
    file = files.source.file(sample)
    try:
        content = file.read_bytes() if isinstance(file, Path) else file.read()
        with Image.open(io.BytesIO(content), formats=readable()) as image:
            plain = image.format == "JPEG" and image.mode == "RGB" and upright(image)
    except Exception:  # decoders raise errors of every kind; Pillow's path reports them
        return None
    return content if plain else None


def fill(
    loaded: Iterator[tuple[Tensor, ...]], samples: EncodedViews, framing: Framing
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode the JPEGs of loaded batches on the device; yield index [B] and views [B,V,S,S,3]."""
    for index, lengths, encoded, crops in loaded:
        counts, numbers = lengths.tolist(), index.tolist()
        chosen = [position for position, count in enumerate(counts) if count]
        parts = torch.split(encoded, [count for count in counts if count])
        photos = decode_jpegs(parts, crops.device)
        for position, part, photo in zip(chosen, parts, photos, strict=True):
            views = samples.views[:, numbers[position]]
            if photo is None:
                content = io.BytesIO(part.numpy().tobytes())
                name = samples.files.name(samples.sample(numbers[position]))
                whole = samples.files.decoding.photograph(content, name)
                crops[position] = framing.views(whole, views).to(crops.device)
                continue
            for view, box in enumerate(views.tolist()):
                crops[position, view] = resized_crop(
                    photo, box, framing.size, framing.interpolation
                )
        yield index, crops


def decode_jpegs(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs on a device: [3,h,w] uint8 each, or None for one that it cannot decode."""
    try:
        return [*_decode(encoded, device)]
    except RuntimeError:
        found: list[Tensor | None] = []
        for one in encoded:
            try:
                found += _decode([one], device)
            except RuntimeError:
                found.append(None)
        return found


def _decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs; raise RuntimeError if one of them, or torchvision, does not allow it."""
    if not encoded:
        return []
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:  # deprecated since torchvision 0.29
        raise RuntimeError(str(error)) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: list[Tensor] = decode_jpeg([*encoded], mode=ImageReadMode.RGB, device=device)
    return found


def check_device(device: torch.device, augmented: bool) -> None:
    """Raise RichKDError if a device cannot decode JPEGs, or views need Pillow's exact pixels."""
    if augmented:
        raise RichKDError(
            "decode = 'gpu': the cache's views change colours or mix images, which is replayed on "
            "Pillow's pixels; leave --decode out, or use --decode draft",
            code="decode-gpu-augmented",
        )
    reason = f"the device is {device.type}"
    if device.type == "cuda":
        content = io.BytesIO()
        Image.new("RGB", (16, 16)).save(content, "JPEG")
        encoded = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
        try:
            _decode([encoded], device)
            return
        except RuntimeError as error:
            reason = f"torchvision says: {first_line(error)}"
    raise RichKDError(
        f"decode = 'gpu': JPEGs cannot be decoded there ({reason}); it needs --device cuda and a "
        f"torchvision with nvJPEG, or leave --decode out",
        code="decode-gpu-unavailable",
    )

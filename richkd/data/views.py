"""Views: an augmented image is a pair (sample, view), and applying a view is a gather.

There are two view spaces. For CIFAR-like data (`PadCropFlip`), a view is one of 162 numbers; for
photographs (`ResizedCropFlip`), it is a row of five parameters. In both, `draw` gives the views of
a cache and depends only on (seed, sample, view index), and `fresh` gives those of an epoch without
cached views and depends only on (seed, epoch, sample). So neither the number of samples or views
nor the order of work changes a view. `AugmentedViews` adds the columns of `--augment` to either
space; only the partner of a mixed view depends on the number of samples as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.data.augment import Augment, Samples, param_faults, uniform
from richkd.data.boxes import CLEAN_SHARE, central_box
from richkd.data.decoding import Photograph

PAD = 4
OFFSETS = 2 * PAD + 1
NUM_VIEW_IDS = OFFSETS * OFFSETS * 2
CLEAN_VIEW_ID = (PAD * OFFSETS + PAD) * 2
_PHILOX_WORDS = 4  # random numbers per step of the counter of Philox


def apply_views(images: Tensor, view_ids: Tensor) -> Tensor:
    """Pad by 4 zeros, crop at (dy, dx), then flip left to right, for view_id = (dy·9+dx)·2+flip.

    Args:
        images: [B,H,W,3] uint8.
        view_ids: [B], integers in 0..161; 80 is the clean image.

    Returns:
        [B,H,W,3] uint8, on the device of the images.

    Raises:
        RichKDError: the views are rows of parameters, of photographs or of `--augment`.
    """
    images = torch.as_tensor(images)
    view_ids = torch.as_tensor(view_ids)
    if view_ids.ndim != 1:
        raise RichKDError(
            f"views of shape {[*view_ids.shape]} are rows of parameters, not ids; use "
            f"richkd.view_images(cache, view, samples)",
            code="views-not-ids",
        )
    return gather_views(images, torch.arange(len(images), device=images.device), view_ids)


def views_tensor(views: NDArray[Any]) -> Tensor:
    """Convert views to tensors: ids to int64 (PyTorch cannot index by uint16), parameters as is."""
    return torch.from_numpy(views.astype(np.int64) if views.dtype == np.uint16 else views)


def gather_views(images: Tensor, index: Tensor, view_ids: Tensor) -> Tensor:
    """Return views of some of the images, by one gather: [N,H,W,3], [B], [B] -> [B,H,W,3]."""
    height, width = images.shape[1:3]
    view_ids = view_ids.to(images.device, torch.int64)
    flip = view_ids % 2
    dx = view_ids // 2 % OFFSETS
    dy = view_ids // (2 * OFFSETS)
    rows = torch.arange(height, device=images.device) + (dy - PAD)[:, None]  # [B,H]
    columns = torch.arange(width, device=images.device).expand(len(view_ids), width)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + (dx - PAD)[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    rows = rows.clamp(0, height - 1)[:, :, None]
    columns = columns.clamp(0, width - 1)[:, None, :]
    return images[index[:, None, None], rows, columns] * inside[..., None]


def pad_crop_flip(image: NDArray[np.uint8], view_id: int) -> NDArray[np.uint8]:
    """Return a view of one image [H,W,3], as `apply_views` does; much faster for one."""
    height, width = image.shape[:2]
    y, x = view_id // (2 * OFFSETS) - PAD, view_id // 2 % OFFSETS - PAD
    view = np.zeros_like(image)
    view[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)] = image[
        max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)
    ]
    return view[:, ::-1] if view_id % 2 else view


class PadCropFlip:
    """The 162 views of small images in an array."""

    name = "pad-crop-flip"
    array = "view_ids"
    limit: int | None = NUM_VIEW_IDS

    def draw(self, seed: int, num_samples: int, num_views: int) -> NDArray[np.uint16]:
        """Draw view ids [V,N], without replacement for each sample.

        Every sample has a random permutation of all 162 ids (from row i of the stream of raw random
        numbers of the seed), and view v is the v-th of them.
        """
        check_num_views(num_views, self.limit)
        views = np.empty((num_views, num_samples), np.uint16)

        def fill(span: slice) -> None:
            stream, first = np.random.Philox(seed), span.start * NUM_VIEW_IDS
            stream.advance(first // _PHILOX_WORDS)
            stream.random_raw(first % _PHILOX_WORDS)
            keys = stream.random_raw((span.stop - span.start) * NUM_VIEW_IDS)
            order = keys.reshape(-1, NUM_VIEW_IDS).argsort(axis=1, kind="stable")
            views[:, span] = order[:, :num_views].T

        with threads(usable_cpus()) as pool:
            for _ in pool.map(fill, spans(num_samples)):
                pass
        return views

    def fresh(self, seed: int, epoch: int, num_samples: int) -> NDArray[np.uint16]:
        """Draw view ids [N] for one epoch, each from all 162."""
        return (_epoch_stream(seed, epoch).random_raw(num_samples) % NUM_VIEW_IDS).astype(np.uint16)

    def clean(self, num_samples: int) -> NDArray[np.uint16]:
        """Return the ids [N] of the clean view."""
        return np.full(num_samples, CLEAN_VIEW_ID, np.uint16)


class ResizedCropFlip:
    """Random resized crops (area 8..100 %, aspect 3/4..4/3) and flips of image files.

    A view is (top, left, height, width, flip) in pixels of the image in the file.
    """

    name = "resized-crop-flip"
    array = "view_params"
    limit: int | None = None
    attempts = 10

    def __init__(self, sizes: NDArray[np.int64], image_size: int) -> None:
        self.sizes = sizes  # [N,2], height and width of each image
        self.image_size = image_size

    def draw(self, seed: int, num_samples: int, num_views: int) -> NDArray[np.float32]:
        """Draw view parameters [V,N,5]."""
        check_num_views(num_views, self.limit)
        views = np.empty((num_views, num_samples, 5), np.float32)
        for view in range(num_views):
            self._fill(views[view], np.random.Philox(np.random.SeedSequence([seed, view])))
        return views

    def fresh(self, seed: int, epoch: int, num_samples: int) -> NDArray[np.float32]:
        """Draw view parameters [N,5] for one epoch."""
        views = np.empty((num_samples, 5), np.float32)
        self._fill(views, _epoch_stream(seed, epoch))
        return views

    def _fill(self, views: NDArray[np.float32], stream: np.random.Philox) -> None:
        """Draw one view [N,5] per sample; row i of the stream belongs to sample i."""
        for span in spans(len(views)):
            views[span] = self._draw(stream, self.sizes[span])

    def _draw(self, stream: np.random.Philox, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Draw one view [n,5] of each of the next samples of a stream, given their sizes [n,2]."""
        height, width = sizes.astype(np.float64).T[..., None]  # each [n,1]
        numbers = uniform(stream, len(sizes), 4 * self.attempts + 1)
        area, aspect, down, right = np.split(numbers[:, :-1], 4, axis=1)  # each [n,attempts]
        area = height * width * (0.08 + 0.92 * area)
        aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * aspect)
        box_height = np.rint(np.sqrt(area / aspect))
        box_width = np.rint(np.sqrt(area * aspect))
        fits = (box_height >= 1) & (box_height <= height) & (box_width >= 1)
        fits &= box_width <= width
        # like torchvision, fall back to the largest central box of a valid aspect ratio
        tall = np.minimum(height, np.rint(width / (3 / 4)))
        wide = np.minimum(width, np.rint(height * (4 / 3)))
        pick = fits.argmax(axis=1)[:, None]
        found = np.take_along_axis(fits, pick, 1)
        box_height = np.where(found, np.take_along_axis(box_height, pick, 1), tall)
        box_width = np.where(found, np.take_along_axis(box_width, pick, 1), wide)
        top = np.floor(np.take_along_axis(down, pick, 1) * (height - box_height + 1))
        left = np.floor(np.take_along_axis(right, pick, 1) * (width - box_width + 1))
        top = np.where(found, top, (height - box_height) // 2)
        left = np.where(found, left, (width - box_width) // 2)
        flip = numbers[:, -1:] < 0.5
        return np.concatenate([top, left, box_height, box_width, flip], axis=1)

    def clean(self, num_samples: int, share: float = CLEAN_SHARE) -> NDArray[np.float32]:
        """Return parameters [N,5] of the clean view, a central square.

        `share` is its part of the shorter side: 1 keeps all of a square image, e.g. of one that was
        cropped before.
        """
        height, width = self.sizes[:num_samples].T
        box = central_box(height, width, share)
        return np.stack([*box, np.zeros_like(height)], axis=1).astype(np.float32)


class AugmentedViews:
    """The views of another space, with a row of `Augment.columns` for each."""

    array = "view_params"

    def __init__(self, crops: PadCropFlip | ResizedCropFlip, augment: Augment, side: int) -> None:
        self.crops = crops
        self.augment = augment
        self.side = side  # of the views that students see
        self.name, self.limit = crops.name, crops.limit

    def draw(self, seed: int, num_samples: int, num_views: int) -> NDArray[np.float32]:
        """Draw rows [V,N,k]; the crops are those of the space without augmentation."""
        crops = self.crops.draw(seed, num_samples, num_views)
        views = np.empty((num_views, num_samples, self.augment.width), np.float32)
        views[..., : self.augment.geometry] = crops.reshape(num_views, num_samples, -1)
        for view in range(num_views):
            self._fill(views[view], seed, view, 5)
        return views

    def fresh(self, seed: int, epoch: int, num_samples: int) -> NDArray[np.float32]:
        """Draw rows [N,k] for one epoch."""
        views = np.empty((num_samples, self.augment.width), np.float32)
        crops = self.crops.fresh(seed, epoch, num_samples)
        views[:, : self.augment.geometry] = crops.reshape(num_samples, -1)
        self._fill(views, seed, epoch, 6)
        return views

    def _fill(self, views: NDArray[np.float32], *words: int) -> None:
        """Fill in one view [N,k] per sample; row i of every stream belongs to sample i."""
        streams = self.augment.streams(*words)
        for span in spans(len(views)):
            ids = np.arange(span.start, span.stop)
            self.augment.fill(views[span], Samples(ids, len(views), self.side), streams)


ViewSpace = PadCropFlip | ResizedCropFlip
DrawnSpace = ViewSpace | AugmentedViews


def view_faults(
    space: str,
    augment: Augment | None,
    views: NDArray[Any],
    total: int,
    sizes: NDArray[np.int64] | None = None,
    samples: NDArray[np.int64] | None = None,
) -> Iterator[str]:
    """Yield what is wrong with untrusted views, ids [N] or rows [N,k], also with an axis V before.

    Args:
        space: of the crops.
        augment: what rows have besides.
        views: ids or rows.
        total: the number of all samples.
        sizes: height and width of the photographs [N,2], if they are known.
        samples: those that the views are of, [N]; None for all.
    """
    if augment is not None:
        yield from param_faults(augment, views, total, samples)
    if space == PadCropFlip.name:
        ids = views if augment is None else views[..., 0]
        if not ((ids >= 0) & (ids < NUM_VIEW_IDS)).all():
            yield f"some are not in 0..{NUM_VIEW_IDS - 1}"
        return
    boxes = views[..., :5]
    good = ((boxes >= 0) & np.isfinite(boxes)).all(-1)
    good &= (boxes[..., 2:4] >= 1).all(-1) & (boxes[..., 4] <= 1)
    if sizes is not None:
        good &= (boxes[..., :2] + boxes[..., 2:4] <= sizes).all(-1)
    if not good.all():
        yield f"{np.count_nonzero(~good)} boxes are empty or out of range"


def _epoch_stream(seed: int, epoch: int) -> np.random.Philox:
    """Return the raw random numbers of an epoch, which differ from those of a cache's views."""
    return np.random.Philox(np.random.SeedSequence([seed, epoch, 3]))


def check_num_views(num_views: int, limit: int | None) -> None:
    """Raise RichKDError if more views are wanted than exist."""
    if limit is not None and num_views > limit:
        raise RichKDError(
            f"views = {num_views}: pad-crop-flip has only {limit} views of an image; "
            f"use --views {limit} for all of them",
            code="too-many-views",
        )


def photo_pixels(image: Image.Image) -> Tensor:
    """Return the pixels [3,h,w] uint8 of an RGB photograph."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_crop(
    photo: Tensor | Image.Image | Photograph,
    view: Any,
    image_size: int,
    interpolation: str = "bilinear",
) -> Tensor:
    """Return one view of one photograph, resized by torchvision or, unless it is a tensor, by PIL.

    Args:
        photo: [3,h,w] uint8, a PIL image in RGB, or a reduced photograph.
        view: (top, left, height, width, flip).
        image_size: S.
        interpolation: its name, e.g. bilinear.

    Returns:
        [S,S,3] uint8.
    """
    from torchvision.transforms.v2 import functional

    top, left, height, width, flip = (int(number) for number in view)
    if isinstance(photo, Photograph):
        crop: Any = _fractional_crop(photo, (top, left, height, width), image_size, interpolation)
    else:
        crop = functional.resized_crop(
            photo,
            top,
            left,
            height,
            width,
            [image_size, image_size],
            _mode(interpolation),
            antialias=True,
        )
    pixels: Tensor = photo_pixels(crop) if isinstance(crop, Image.Image) else crop
    return (pixels.flip(-1) if flip else pixels).permute(1, 2, 0).contiguous()


def _fractional_crop(
    photo: Photograph, box: tuple[int, int, int, int], image_size: int, interpolation: str
) -> Image.Image:
    """Return a box of a photograph, given in its own pixels, from a reduced image of it."""
    (top, left, height, width), (down, across) = box, photo.scale
    right = min((left + width) * across, photo.image.width)
    bottom = min((top + height) * down, photo.image.height)
    return photo.image.resize(
        (image_size, image_size),
        Image.Resampling[interpolation.upper()],
        box=(left * across, top * down, right, bottom),
    )


def resize_bytes(images: Tensor, size: list[int], interpolation: str) -> Tensor:
    """Resize a batch [B,3,h,w] uint8 on its device, and round to bytes as PIL does."""
    from torchvision.transforms.v2 import functional

    if [*images.shape[-2:]] == size:
        return images
    resized: Tensor = functional.resize(images.float(), size, _mode(interpolation), antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _mode(interpolation: str) -> Any:
    """Return torchvision's mode by name; its own `nearest` differs from PIL's."""
    from torchvision.transforms import InterpolationMode

    return InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)

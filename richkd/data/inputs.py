"""Batches of views for a network, the same for both stages.

An array of small images lies on the device as bytes and a batch is one gather; image files are
decoded and cropped in data-loader workers. Either way: indices and views in, uint8 batches out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from richkd.data.datasets import ImageFiles
from richkd.data.framing import Framing
from richkd.data.views import gather_views
from richkd.data.workers import MOST_WORKERS, Samples, load, num_workers

UNDER_WAY = 512 * 2**20  # bytes: what stage one's workers hold at once

Batches = Iterator[tuple[Tensor, Tensor]]


class ArrayInputs:
    """Images [N,H,W,3] uint8, copied to the device once.

    They are framed for a network as `framing` says; without one they stay as they are.
    """

    def __init__(
        self, images: Tensor, device: torch.device, framing: Framing | None = None
    ) -> None:
        self.images = images.to(device)
        self.framing = framing

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what `batches` yields."""
        height, width = self.images.shape[1:3]
        size = self.framing and self.framing.size
        return (size or height), (size or width), 3

    def batches(self, order: Tensor, views: Tensor | None, batch_size: int) -> Batches:
        """Yield (index [B], images [B,S,S,3] uint8) for views [N] of the samples in order.

        Without `views`, it is the network's evaluation view.
        """
        device = self.images.device
        views = None if views is None else views.to(device)
        for index in torch.split(order.to(device), batch_size):
            yield index, self.at(index, None if views is None else views[index])

    def at(self, index: Tensor, views: Tensor | None) -> Tensor:
        """Views [B] of the samples [B], on the device: [B,S,S,3] uint8."""
        images = self.images[index] if views is None else gather_views(self.images, index, views)
        if self.framing is not None:
            images = self.framing.of_array(images, clean=views is None)
        return images


Transform = Callable[[Image.Image], Tensor]


class FileInputs:
    """Image files, decoded by workers; every batch goes to the device as bytes.

    They are framed for a network as `framing` says; without one as for students.
    """

    def __init__(
        self, files: ImageFiles, device: torch.device, framing: Framing | None = None
    ) -> None:
        self.files = files
        self.device = device
        self.framing = framing or Framing(size=files.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what `batches` yields."""
        return self.framing.size, self.framing.size, 3

    def batches(self, order: Tensor, views: Tensor | None, batch_size: int) -> Batches:
        """Yield (index [B], images [B,S,S,3] uint8) for views [N,5] of the samples in order.

        Without `views`, it is the network's evaluation view.
        """
        cut = (index.tolist() for index in torch.split(order, batch_size))
        samples = _FileViews(self.files, self.framing, None if views is None else views[None])
        workers = num_workers(len(order), batch_size)
        batch_bytes = batch_size * self.framing.size**2 * 3
        for index, crops in self._loaded(cut, samples, workers, batch_bytes):
            yield index, crops[:, 0]

    def decode_once(
        self,
        spans: Sequence[range],
        views: Tensor | None,
        batch: int,
        transform: Transform | None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """All views of the samples in the spans, and the images as CLIP sees them, by one decode.

        One set of workers goes through all spans; no batch crosses the end of one. The batches
        under way, two a worker and the one in hand, take up to `UNDER_WAY` bytes: where so many of
        `batch` images would take more, batches have fewer.

        Args:
            spans: the samples, in order.
            views: [V,N,5]; None for one view, the network's evaluation view.
            batch: images of a batch, at most.
            transform: from the whole image to CLIP's pixels, on the CPU; None where none are asked.

        Yields:
            index [b], crops [b,V,S,S,3] uint8 and pixels [b,3,s,s] (or None), on the device.
        """
        image_bytes = (1 if views is None else len(views)) * self.framing.size**2 * 3
        if transform is not None:
            image_bytes += transform(Image.new("RGB", (1, 1))).nbytes
        # the same on every machine, for a teacher's last bits depend on the batch
        batch = min(batch, max(1, UNDER_WAY // ((2 * MOST_WORKERS + 1) * max(1, image_bytes))))
        cut = (
            [*range(start, min(start + batch, span.stop))]
            for span in spans
            for start in range(span.start, span.stop, batch)
        )
        samples = _FileViews(self.files, self.framing, views, transform)
        workers = num_workers(sum(map(len, spans)), batch)
        for index, crops, *pixels in self._loaded(cut, samples, workers, batch * image_bytes):
            yield index, crops, pixels[0] if pixels else None

    def _loaded(
        self, batches: Iterable[list[int]], samples: Samples, workers: int, batch_bytes: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the parts of each batch on the device; arguments and errors as of `load`."""
        pin = self.device.type == "cuda"
        for parts in load(samples, batches, workers, batch_bytes, pin_memory=pin):
            yield tuple(part.to(self.device, non_blocking=True) for part in parts)


class _FileViews(Samples):
    """Sample i: its number, its views [V,S,S,3] uint8 and, with a transform, the whole image's."""

    def __init__(
        self,
        files: ImageFiles,
        framing: Framing,
        views: Tensor | None,
        transform: Transform | None = None,
    ) -> None:
        self.files = files
        self.framing = framing
        self.views = views  # [V,N,5]
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[int | Tensor, ...]:
        with one_thread():
            image = self.files.open(index)
            crops = (
                self.framing.clean(image)
                if self.views is None
                else self.framing.views(image, self.views[:, index])
            )
            return index, crops, *([self.transform(image)] if self.transform else [])


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread here, as in a worker: on small images, several mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def image_views(images: Tensor | ImageFiles, index: Tensor, views: Tensor) -> Tensor:
    """Views [B] or [B,5] of the samples index [B], in this process: [B,H,W,3] uint8."""
    if isinstance(images, ImageFiles):
        framing, pairs = Framing(size=images.image_size), zip(index.tolist(), views, strict=True)
        return torch.cat([framing.views(images.open(number), view[None]) for number, view in pairs])
    return gather_views(images, index, views)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, which whoever sends it does not wait for."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


Inputs = ArrayInputs | FileInputs


def make_inputs(
    images: Tensor | ImageFiles, device: torch.device, framing: Framing | None = None
) -> Inputs:
    """The inputs that suit the images, as a network sees them; None for students."""
    if isinstance(images, ImageFiles):
        return FileInputs(images, device, framing)
    return ArrayInputs(images, device, framing)


class Normalize:
    """Bytes to what a network takes: [B,H,W,3] uint8 -> [B,3,H,W] f32, channels last in memory."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        center, spread = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.scale = 1 / (255 * spread)
        self.shift = -center / spread

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)

"""Batches of views for networks, in both stages: indices and views in, uint8 batches out.

Small images in an array stay on the device as bytes, and a batch is one gather. Image files are
decoded and cropped in data-loader workers. Augmented views are replayed there too, whatever they
are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from richkd.data.augment import Augment
from richkd.data.datasets import ImageFiles
from richkd.data.decoding import Photograph
from richkd.data.framing import Framing
from richkd.data.kept import Packer, Reducer
from richkd.data.mixing import joined_rows
from richkd.data.on_device import TYPICAL_BYTES, EncodedViews, fill
from richkd.data.replay import Crops, replay
from richkd.data.reuse import Reuse, largest
from richkd.data.views import gather_views, pad_crop_flip
from richkd.data.workers import MAX_WORKERS, Samples, load, num_workers

IN_FLIGHT_BYTES = 512 * 2**20  # of batches that stage one's workers hold at once

Batches = Iterator[tuple[Tensor, Tensor]]


class ArrayInputs:
    """Images [N,H,W,3] uint8, copied to the device once.

    `framing` adapts them to a network; with None they stay as they are. `augment` says what views
    consist of, if not of ids.
    """

    def __init__(
        self,
        images: Tensor,
        device: torch.device,
        framing: Framing | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.images = images.to(device)
        self.framing = framing
        self.augment = augment
        self._on_host = images

    @property
    def gathers(self) -> bool:
        """Whether a batch of views is a gather on the device, by `at`."""
        return self.augment is None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what `batches` yields."""
        height, width = self.images.shape[1:3]
        size = self.framing and self.framing.size
        return (size or height), (size or width), 3

    def batches(
        self,
        order: Tensor,
        views: Tensor | None,
        batch_size: int | list[int],
        samples: Tensor | None = None,
    ) -> Batches:
        """Yield batches of entries, on the device: index [B] and images [B,S,S,3] uint8.

        Args:
            order: the entries, in this order.
            views: of all entries, [E]; None for the evaluation view of the network.
            batch_size: B, or that of each batch.
            samples: of all entries, [E]; None if entry i is of sample i.
        """
        device = self.images.device
        if self.augment is not None and views is not None:
            crops = array_crops(self._on_host, self.framing)
            crops_of = _ArrayViews(self.augment, views.cpu()[None], crops, samples)
            batches = (index.tolist() for index in torch.split(order, batch_size))
            size, most = math.prod(self.shape), largest(batch_size)
            for index, images in _load(batches, crops_of, len(order), most, size, device):
                yield index, images[:, 0]
            return
        views = None if views is None else views.to(device)
        samples = None if samples is None else samples.to(device)
        for index in torch.split(order.to(device), batch_size):
            which = index if samples is None else samples[index]
            yield index, self.at(which, None if views is None else views[index])

    def at(self, index: Tensor, views: Tensor | None) -> Tensor:
        """Return views [B] of the samples [B] on the device: [B,S,S,3] uint8."""
        images = self.images[index] if views is None else gather_views(self.images, index, views)
        if self.framing is not None:
            images = self.framing.of_array(images, clean=views is None)
        return images


Transform = Callable[[Image.Image], Tensor]


class FileInputs:
    """Image files, decoded by data-loader workers; every batch goes to the device as bytes.

    `framing` adapts them to a network; with None they are as students see them. `workers` is the
    number of workers; None takes it from `num_workers`. `augment` says what views consist of
    besides a crop and flip.
    """

    gathers = False

    def __init__(
        self,
        files: ImageFiles,
        device: torch.device,
        framing: Framing | None = None,
        workers: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.files = files
        self.device = device
        self.framing = framing or Framing(size=files.image_size)
        self.workers = workers
        self.augment = augment

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what `batches` yields."""
        return self.framing.size, self.framing.size, 3

    def batches(
        self,
        order: Tensor,
        views: Tensor | None,
        batch_size: int | list[int],
        samples: Tensor | None = None,
    ) -> Batches:
        """Yield batches of entries, as `ArrayInputs.batches`; the views are [E,5]."""
        reuse = None if samples is None else Reuse.of(order, samples, batch_size)
        if reuse is not None and views is not None:
            yield from self._reusing(reuse, order, views, batch_size)
            return
        batches = (index.tolist() for index in torch.split(order, batch_size))
        given = None if views is None else views[None]
        crops_of = _FileViews(
            self.files, self.framing, given, samples=samples, augment=self.augment
        )
        image_bytes = self.framing.size**2 * 3
        most = largest(batch_size)
        for index, crops in self._crops(batches, crops_of, len(order), most, image_bytes):
            yield index, crops[:, 0]

    def _reusing(
        self, reuse: Reuse, order: Tensor, views: Tensor, batch_size: int | list[int]
    ) -> Batches:
        """Yield the same where images occur several times: each is decoded once."""
        size, crop_bytes = self.framing.size, self.framing.size**2 * 3
        crops_of = _FileViews(
            self.files,
            self.framing,
            views[reuse.entries.T],
            samples=reuse.samples,
            augment=self.augment,
        )
        chunks = torch.split(torch.arange(len(reuse.samples)), reuse.chunk)
        numbers = (chunk.tolist() for chunk in chunks)
        loaded = self._crops(numbers, crops_of, len(order), largest(batch_size), crop_bytes)
        buffer = torch.empty(reuse.buffer_rows, crop_bytes, dtype=torch.uint8, device=self.device)
        length = reuse.chunk * reuse.entries.shape[1]
        slots = iter(reuse.slots)
        done = 0
        places = torch.split(send(reuse.rows, self.device), batch_size)
        for needed, place, index in zip(
            reuse.loaded, places, torch.split(send(order, self.device), batch_size), strict=True
        ):
            for _ in range(needed - done):
                _, crops = next(loaded)
                first = next(slots) * length
                buffer[first : first + crops[:, :, 0, 0, 0].numel()] = crops.view(-1, crop_bytes)
            done = needed
            yield index, buffer.index_select(0, place).view(-1, size, size, 3)

    def decode_once(
        self,
        spans: Sequence[range],
        views: Tensor | None,
        batch: int,
        transform: Transform | None,
        in_flight_bytes: int = IN_FLIGHT_BYTES,
        packer: Packer | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Decode each sample once, and yield all its views and the image as CLIP sees it.

        Only mixed views decode more: the partner of each.

        One set of workers handles all spans, and no batch extends across two spans. Batches are
        smaller than `batch` if that many images in two batches per worker and the current one would
        take more than `in_flight_bytes`.

        Args:
            spans: the samples, in order.
            views: [V,N,5]; None for one view, the network's evaluation view.
            batch: maximum number of images in a batch.
            transform: from the whole image to CLIP's pixels, on the CPU; None for no pixels.
            in_flight_bytes: limit of the memory of batches, without reduced images.
            packer: receives the reduced images of each batch before the batch is yielded.

        Yields:
            index [b], crops [b,V,S,S,3] uint8 and pixels [b,3,s,s] (or None), on the device.
        """
        image_bytes = (1 if views is None else len(views)) * self.framing.size**2 * 3
        if transform is not None:
            image_bytes += transform(Image.new("RGB", (1, 1))).nbytes
        # the same on every machine, because the last bits of a teacher depend on the batch size
        most = in_flight_bytes // ((2 * MAX_WORKERS + 1) * max(1, image_bytes))
        batch = min(batch, max(1, most))
        batches = (
            [*range(start, min(start + batch, span.stop))]
            for span in spans
            for start in range(span.start, span.stop, batch)
        )
        reduce = None if packer is None else packer.reduce
        samples = _FileViews(
            self.files, self.framing, views, transform, augment=self.augment, reduce=reduce
        )
        count = sum(map(len, spans))
        image_bytes += 0 if reduce is None else reduce.image_bytes
        for index, crops, *rest in self._load(batches, samples, count, batch, image_bytes):
            if packer is not None:
                packer.add(index, rest.pop())
            yield index, crops, rest[0] if rest else None

    def _crops(
        self,
        batches: Iterable[list[int]],
        samples: _FileViews,
        count: int,
        batch_size: int,
        image_bytes: int,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield index [B] and views [B,V,S,S,3] of each batch, decoded by workers or the device."""
        views = samples.views
        if self.files.decode != "gpu" or views is None or samples.augment is not None:
            return self._load(batches, samples, count, batch_size, image_bytes)
        encoded = EncodedViews(
            self.files, self.framing.size, views, samples.samples, samples.__getitem__
        )
        image_bytes += TYPICAL_BYTES
        loaded = self._load(batches, encoded, count, batch_size, image_bytes)
        return fill(loaded, encoded, self.framing)

    def _load(
        self,
        batches: Iterable[list[int]],
        samples: Samples,
        count: int,
        batch_size: int,
        image_bytes: int,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the parts of each batch on the device."""
        return _load(batches, samples, count, batch_size, image_bytes, self.device, self.workers)


def _load(
    batches: Iterable[list[int]],
    samples: Samples,
    count: int,
    batch_size: int,
    image_bytes: int,
    device: torch.device,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of each batch on the device."""
    workers = num_workers(count, batch_size) if workers is None else workers
    pin = device.type == "cuda"
    for parts in load(samples, batches, workers, batch_size * image_bytes, pin_memory=pin):
        yield tuple(
            # bytes end to end go to a cache, not to a network
            part
            if part.dtype == torch.uint8 and part.dim() == 1
            else part.to(device, non_blocking=True)
            for part in parts
        )


class _FileViews(Samples):
    """Entry i is (i, its views [V,S,S,3] uint8, and the results of the transforms given)."""

    def __init__(
        self,
        files: ImageFiles,
        framing: Framing,
        views: Tensor | None,
        transform: Transform | None = None,
        samples: Tensor | None = None,
        augment: Augment | None = None,
        reduce: Reducer | None = None,
    ) -> None:
        self.files = files
        self.framing = framing
        self.views = views  # [V,E,5], or [V,E,k] with `augment`
        self.transform = transform
        self.samples = samples  # [E]; None if entry i is of sample i
        self.augment = augment
        self.reduce = reduce

    def __getitem__(self, index: int) -> tuple[int | Tensor, ...]:
        with one_thread():
            sample = index if self.samples is None else int(self.samples[index])
            views = None if self.views is None else self.views[:, index]
            photo = self.files.photograph(sample, reducible(self.framing, views))
            if views is None or self.views is None:
                crops = self.framing.clean(photo)
            elif self.augment is None or not len(views):
                crops = self.framing.views(photo, views)
            else:
                rows = joined_rows(self.augment, self.views, index)
                of = file_crops(self.files, self.framing, {sample: photo})
                crops = replay(self.augment, rows, sample, of)
            parts = [self.transform(photo.image)] if self.transform else []
            reduced = [self.reduce(sample, photo.image)] if self.reduce else []
            return index, crops, *parts, *reduced


class _ArrayViews(Samples):
    """Entry i is (i, its views [V,S,S,3] uint8) of images in an array."""

    def __init__(
        self, augment: Augment, views: Tensor, crops: Crops, samples: Tensor | None
    ) -> None:
        self.augment = augment
        self.views = views  # [V,E,k]
        self.crops = crops
        self.samples = samples  # [E]; None if entry i is of sample i

    def __getitem__(self, index: int) -> tuple[int | Tensor, ...]:
        with one_thread():
            sample = index if self.samples is None else int(self.samples[index])
            rows = joined_rows(self.augment, self.views, index)
            return index, replay(self.augment, rows, sample, self.crops)


def reducible(framing: Framing, views: Tensor | None) -> float:
    """Return by how much a photograph may be reduced before one of its views is enlarged."""
    if views is None or not len(views):
        return 1.0
    return float(views[:, 2:4].min()) / framing.size


def file_crops(files: ImageFiles, framing: Framing, opened: Mapping[int, Photograph]) -> Crops:
    """Return a function that crops an image file, or an image that is already open."""

    def crops(number: int, views: Tensor) -> Tensor:
        photo = opened.get(number) or files.photograph(number, reducible(framing, views))
        return framing.views(photo, views, exact=True)

    return crops


def array_crops(images: Tensor, framing: Framing | None) -> Crops:
    """Return a function that crops an image [H,W,3] of an array, framed for a network by PIL."""
    whole = torch.tensor([[0, 0, *images.shape[1:3], 0]])

    def crops(number: int, views: Tensor) -> Tensor:
        image = images[number].numpy()
        every = [pad_crop_flip(image, int(view_id)) for (view_id,) in views.tolist()]
        if framing is None or framing.size == image.shape[0] == image.shape[1]:
            return torch.from_numpy(np.stack(every))
        framed = (framing.views(Image.fromarray(one), whole, exact=True) for one in every)
        return torch.cat([*framed])

    return crops


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread, as in a worker: on small images, more threads mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def image_views(
    images: Tensor | ImageFiles,
    index: Tensor,
    views: Tensor,
    augment: Augment | None = None,
    framing: Framing | None = None,
) -> Tensor:
    """Return views of the samples [B], computed in this process: [B,H,W,3] uint8.

    Args:
        images: of all samples.
        index: the samples.
        views: [B] or [B,5], or with `augment` rows [B,k+…] as `joined` returns them.
        augment: what views are besides a crop and flip.
        framing: of a network; None means students.
    """
    pairs = zip(index.tolist(), views, strict=True)
    if isinstance(images, ImageFiles):
        framing = framing or Framing(size=images.image_size)
        if augment is None:
            opened = ((images.photograph(number), view) for number, view in pairs)
            return torch.cat([framing.views(photo, view[None]) for photo, view in opened])
        crops = file_crops(images, framing, {})
    elif augment is None:
        gathered = gather_views(images, index, views)
        return gathered if framing is None else framing.of_array(gathered, clean=False)
    else:
        crops = array_crops(images, framing)
    return torch.cat([replay(augment, row[None], number, crops) for number, row in pairs])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


Inputs = ArrayInputs | FileInputs


def make_inputs(
    images: Tensor | ImageFiles,
    device: torch.device,
    framing: Framing | None = None,
    augment: Augment | None = None,
) -> Inputs:
    """Return the inputs for images, framed for a network; `framing` None means students."""
    if isinstance(images, ImageFiles):
        return FileInputs(images, device, framing, augment=augment)
    return ArrayInputs(images, device, framing, augment)


class Normalize:
    """Normalise pixels: [B,H,W,3] uint8 -> [B,3,H,W] float32, channels last in memory."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        center, spread = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.scale = 1 / (255 * spread)
        self.shift = -center / spread

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)

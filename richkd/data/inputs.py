"""Batches of views for a network, the same for both stages.

An array of small images lies on the device as bytes and a batch is one gather; image files are
decoded and cropped in data-loader workers. Either way: indices and views in, uint8 batches out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from richkd.data.datasets import ImageFiles
from richkd.data.views import gather_views, resized_crop

Batches = Iterator[tuple[Tensor, Tensor]]


class ArrayInputs:
    """Images [N,H,W,3] uint8, copied to the device once."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images = images.to(device)

    def batches(self, order: Tensor, views: Tensor, batch_size: int) -> Batches:
        """Yield (index [B], images [B,H,W,3] uint8) for views [N] of the samples in order."""
        device = self.images.device
        order, views = order.to(device), views.to(device)
        for index in torch.split(order, batch_size):
            yield index, gather_views(self.images, index, views[index])


IndexedSamples = TorchDataset[tuple[int, Tensor]]


class FileInputs:
    """Image files, decoded by workers; every batch goes to the device as bytes."""

    def __init__(self, files: ImageFiles, device: torch.device) -> None:
        self.files = files
        self.device = device

    def batches(self, order: Tensor, views: Tensor, batch_size: int) -> Batches:
        """Yield (index [B], images [B,S,S,3] uint8) for views [N,5] of the samples in order."""
        return self.load(order, _FileViews(self.files, views), batch_size)

    def load(self, order: Tensor, samples: IndexedSamples, batch_size: int) -> Batches:
        """Yield (index [B], samples, stacked) in order, computed by the workers."""
        loader = DataLoader(
            samples,
            batch_size=batch_size,
            sampler=order.tolist(),
            num_workers=num_workers(len(order), batch_size),
            pin_memory=self.device.type == "cuda",
        )
        for index, images in loader:
            yield (
                index.to(self.device, non_blocking=True),
                images.to(self.device, non_blocking=True),
            )


def num_workers(count: int, batch_size: int) -> int:
    """Data-loader processes for so many images; none where starting them would take longer."""
    return min(os.cpu_count() or 1, 8) if count > 4 * batch_size else 0


class _FileViews(IndexedSamples):
    def __init__(self, files: ImageFiles, views: Tensor) -> None:
        self.files = files
        self.views = views.numpy()

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, _file_view(self.files, index, self.views[index])


def _file_view(files: ImageFiles, index: int, view: Any) -> Tensor:
    image = torch.from_numpy(np.array(files.open(index))).permute(2, 0, 1)
    return resized_crop(image, view, files.image_size)


def image_views(images: Tensor | ImageFiles, index: Tensor, views: Tensor) -> Tensor:
    """Views [B] or [B,5] of the samples index [B], in this process: [B,H,W,3] uint8."""
    if isinstance(images, ImageFiles):
        pairs = zip(index.tolist(), views.numpy(), strict=True)
        return torch.stack([_file_view(images, number, view) for number, view in pairs])
    return gather_views(images, index, views)


Inputs = ArrayInputs | FileInputs


def make_inputs(images: Tensor | ImageFiles, device: torch.device) -> Inputs:
    """The inputs that suit the images."""
    if isinstance(images, ImageFiles):
        return FileInputs(images, device)
    return ArrayInputs(images, device)


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

"""A cache as a PyTorch dataset, for training loops other than richkd's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from richkd.core.errors import RichKDError, unknown
from richkd.data.augment import Augment
from richkd.data.datasets import Split
from richkd.data.framing import NetworkInput
from richkd.data.inputs import Normalize, image_views
from richkd.data.mixing import Mix, joined
from richkd.data.views import views_tensor
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import teacher_input
from richkd.store.topk import Rows
from richkd.training.images import student_images

ROWS = ("teacher_logits", "teacher_features", "fused_logits", "clip_features", "clip_similarity")


def torch_dataset(
    cache: TeacherCache | str | Path,
    view: int | None = None,
    *,
    split: str = "train",
    arrays: Sequence[str] | None = None,
    dataset: str = "",
    data_root: str = "data",
    decode: str = "auto",
) -> Samples:
    """Return the samples of a cache with their teacher rows, for `torch.utils.data.DataLoader`.

    A sample is a dictionary: `image` [3,H,W] f32, the view that the rows were computed on,
    normalised by the cache's mean and std; `label` and `index`, int64; of mixed images
    `partner_label`, int64, and `share`, λ of the first image, f32; and the requested rows in
    f32: `teacher_logits` and `fused_logits` [C], `teacher_features` [F], and of the clean image
    `clip_features` [D] and `clip_similarity` [C].

    Args:
        cache: a complete cache, or its path.
        view: the number of a view of the training samples. Use another one in each epoch, e.g.
            `samples.at_view(epoch % V)`. Other splits have the clean view only: leave it out.
        split: train, test, or validation if the cache has one.
        arrays: the names of the rows; by default all that the cache has.
        dataset: the new location of the images, if they moved (image folders only).
        data_root: the folder of the datasets.
        decode: where the pixels of photographs come from: `auto` takes those that the cache keeps,
            if any, and `exact` the files.

    Raises:
        RichKDError: there is no such cache, split, view or array, or the images are missing or
            have changed.
    """
    cache = cache if isinstance(cache, TeacherCache) else open_cache(cache)
    if split not in cache.splits:
        raise unknown("split", split, cache.splits)
    if (view is None) != (split != "train"):
        raise RichKDError(
            f"view = {view}: "
            + (
                f"{split} samples have the clean view only; leave it out"
                if split != "train"
                else f"choose one of the views 0..{cache.num_views - 1} of the training samples"
            ),
            code="view-out-of-range",
        )
    names = [n for n in ROWS if cache.has(f"{split}/{n}")] if arrays is None else list(arrays)
    for name in names:
        if name not in ROWS:
            raise unknown("array", name, ROWS)
        cache.require(f"{split}/{name}")
    images = student_images(cache, dataset, data_root, decode)[split]
    return Samples(cache, split, view, tuple(names), images)


def view_images(
    cache: TeacherCache | str | Path,
    view: int,
    samples: Sequence[int] | Tensor | None = None,
    *,
    network: Literal["student", "teacher"] = "student",
    dataset: str = "",
    data_root: str = "data",
) -> Tensor:
    """Return a view of training samples, replayed as in both stages.

    Args:
        cache: a complete cache, or its path.
        view: the number of the view.
        samples: their ids, [B]; all by default.
        network: whose input size and interpolation the images have. The teacher's are cut out of
            whole image files, also if the cache keeps pixels, which only students see.
        dataset: the new location of the images, if they moved (image folders only).
        data_root: the folder of the datasets.

    Returns:
        [B,S,S,3] uint8.

    Raises:
        RichKDError: as `torch_dataset`.
    """
    decode = "exact" if network == "teacher" else "auto"
    found = torch_dataset(
        cache, view, arrays=(), dataset=dataset, data_root=data_root, decode=decode
    )
    index = torch.arange(len(found)) if samples is None else torch.as_tensor(samples).long()
    seen = None
    if network == "teacher":
        seen = NetworkInput.of(teacher_input(found.cache.manifest))
    return image_views(found.images.images, index, found.views[index], found.augment, seen)


@dataclass(frozen=True, eq=False)
class Samples(Dataset[dict[str, Tensor]]):
    """The samples of one split and view of a cache; see `torch_dataset`."""

    cache: TeacherCache
    split: str
    view: int | None
    arrays: tuple[str, ...]
    images: Split

    def at_view(self, view: int) -> Samples:
        """Return the same samples at another view, without reading the images again."""
        return replace(self, view=view)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples; PyTorch's loaders call this once per batch."""
        index = torch.as_tensor(indices)
        views = image_views(self.images.images, index, self.views[index], self.augment)
        columns = {
            "image": self._normalize(views),
            "label": self.images.labels[index],
            "index": index,
            **self._mixing(index),
            **{name: rows[index].float() for name, rows in self._rows.items()},
        }
        return [
            dict(zip(columns, sample, strict=True))
            for sample in zip(*columns.values(), strict=True)
        ]

    def _mixing(self, index: Tensor) -> dict[str, Tensor]:
        """Return the labels of the partners and the shares of mixed images."""
        mix = Mix.of(self.augment, self.views[index])
        if mix is None:
            return {}
        return {"partner_label": self.images.labels[mix.partner], "share": mix.share}

    @cached_property
    def _normalize(self) -> Normalize:
        manifest = self.cache.manifest
        return Normalize(tuple(manifest["mean"]), tuple(manifest["std"]), torch.device("cpu"))

    @cached_property
    def views(self) -> Tensor:
        """Views of all samples: [N] or [N,5], or joined rows of augmented ones."""
        if self.view is None:
            return views_tensor(self.images.view_space.clean(len(self)))
        return joined(self.cache.augment, self.cache.slab(self.view, ()).views)

    @property
    def augment(self) -> Augment | None:
        """What the views are besides a crop and flip."""
        return None if self.view is None else self.cache.augment

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """The rows by name, each read in one pass."""
        return {
            name: self.cache.rows(
                f"{self.split}/{name}", None if name.startswith("clip") else self.view
            )
            for name in self.arrays
        }

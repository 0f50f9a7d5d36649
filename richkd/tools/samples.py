"""A cache as a PyTorch dataset, for training loops other than richkd's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from richkd.core.errors import RichKDError, unknown
from richkd.data.datasets import Split
from richkd.data.inputs import Normalize, image_views
from richkd.data.views import views_tensor
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.topk import Rows
from richkd.training.images import load_images

ROWS = ("teacher_logits", "teacher_features", "fused_logits", "clip_features", "clip_similarity")


def torch_dataset(
    cache: TeacherCache | str | Path,
    view: int | None = None,
    *,
    split: str = "train",
    arrays: Sequence[str] | None = None,
    dataset: str = "",
    data_root: str = "data",
) -> Samples:
    """Return the samples of a cache with their teacher rows, for `torch.utils.data.DataLoader`.

    A sample is a dictionary: `image` [3,H,W] f32, the view that the rows were computed on,
    normalised by the cache's mean and std; `label` and `index`, int64; and the requested rows in
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
    images = load_images(cache, dataset, data_root)[split]
    return Samples(cache, split, view, tuple(names), images)


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
        columns = {
            "image": self._normalize(image_views(self.images.images, index, self._views[index])),
            "label": self.images.labels[index],
            "index": index,
            **{name: rows[index].float() for name, rows in self._rows.items()},
        }
        return [
            dict(zip(columns, sample, strict=True))
            for sample in zip(*columns.values(), strict=True)
        ]

    @cached_property
    def _normalize(self) -> Normalize:
        manifest = self.cache.manifest
        return Normalize(tuple(manifest["mean"]), tuple(manifest["std"]), torch.device("cpu"))

    @cached_property
    def _views(self) -> Tensor:
        """Views of all samples: [N] or [N,5]."""
        if self.view is None:
            return views_tensor(self.images.view_space.clean(len(self)))
        return self.cache.slab(self.view, ()).views

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """The rows by name, each read in one pass."""
        return {
            name: self.cache.rows(
                f"{self.split}/{name}", None if name.startswith("clip") else self.view
            )
            for name in self.arrays
        }

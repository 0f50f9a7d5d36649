"""The data of a training: images and labels, and the views and rows of each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from richkd.core.seeds import derive_seed
from richkd.data.augment import Augment
from richkd.data.datasets import Split
from richkd.data.inputs import Inputs, Normalize, make_inputs
from richkd.data.mixing import Mix
from richkd.data.views import views_tensor
from richkd.losses.method import PARTNER, SHARE
from richkd.store.topk import Rows

PARTS = 0x9A27  # of the seed of the parts: no run and no epoch has it
T = TypeVar("T")
StepBatch = tuple[Tensor, Tensor, dict[str, Tensor]]  # index, images, rows


@dataclass(frozen=True, eq=False)
class OfSamples:
    """Rows by sample that are indexed by entry, so that they need not be copied for each epoch."""

    rows: Rows  # [N,…]
    samples: Tensor  # [E], on the same device

    def __getitem__(self, index: Tensor) -> Rows:
        return self.rows[self.samples[index]]

    def to(self, device: torch.device, non_blocking: bool = False) -> OfSamples:
        """Return the rows on a device."""
        samples = self.samples.to(device, non_blocking=non_blocking)
        return OfSamples(self.rows.to(device, non_blocking=non_blocking), samples)


@dataclass(frozen=True)
class EpochRows:
    """The data of one epoch: entries, each a view of a sample and the cached rows of that view.

    Unless `samples` says otherwise, entry i is a view of sample i, so that E = N.
    """

    views: Tensor  # [E] or [E,5], or with `--augment` rows as `mixing.joined` returns them
    rows: Mapping[str, Rows]  # name -> [E,…]
    on_host: bool = False  # rows stay on the host, and each batch is copied to the device
    samples: Tensor | None = None  # [E], the sample of each entry, on the host
    each: int = 1  # M, views of each sample: entry m·E/M + i is another view of entry i's sample
    # Of several processes, this one's entries in the order of training, and how many all have.
    order: Tensor | None = None
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device, buffers: dict[str, Rows] | None = None) -> EpochRows:
        """Copy the rows to a device; the views stay where samples are gathered.

        Args:
            device: to copy to.
            buffers: rows of earlier epochs by name, which are overwritten.
        """
        if self.on_host:
            return self
        rows: dict[str, Rows] = {}
        for name, row in self.rows.items():
            buffer = None if buffers is None else buffers.get(name)
            if buffer is None:
                rows[name] = row.to(device, non_blocking=True)
            else:
                rows[name] = buffer if buffer is row else buffer.copy_(row, non_blocking=True)  # type: ignore[arg-type]
        if buffers is not None:
            buffers.update(rows)
        return replace(self, rows=rows)

    def pinned(self) -> EpochRows:
        """Copy views and rows to pinned memory."""
        rows = {name: row.pin_memory() for name, row in self.rows.items()}
        return replace(self, views=self.views.pin_memory(), rows=rows)

    def batch(self, index: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Gather rows [B,…] f32 of entries: `index` on the device, the same `ids` on the host."""
        if not self.on_host:
            return {name: row[index].float() for name, row in self.rows.items()}
        batch = {name: row[ids].float() for name, row in self.rows.items()}
        if index.is_cuda:
            batch = {name: row.pin_memory() for name, row in batch.items()}
        return {name: row.to(index.device, non_blocking=True) for name, row in batch.items()}


def with_partners(source: EpochRows, labels: Tensor, augment: Augment | None) -> EpochRows:
    """Add the label of each entry's partner and the share of its own image, where views are mixed.

    They are rows like those of teachers, so that they are gathered with them.

    Args:
        source: whose views are joined with those of the partners.
        labels: of all samples, [N].
        augment: what the views consist of.
    """
    mix = Mix.of(augment, source.views)
    if mix is None:
        return source
    where = torch.device("cpu") if source.on_host else labels.device
    mix = mix.to(where)
    added = {PARTNER: labels.to(where)[mix.partner].float(), SHARE: mix.share}
    return replace(source, rows={**source.rows, **added})


def timed(items: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds spent waiting for it."""
    start = time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - start
        start = time.perf_counter()


def part_of(group: int, part: int, parts: int, num_samples: int) -> Tensor:
    """Return one of several equal parts of the samples, ascending, of its own in every group.

    The parts do not depend on a run's seed, so that all runs of a sweep read the same rows.
    """
    generator = torch.Generator().manual_seed(derive_seed(group, PARTS))
    count = num_samples // parts
    drawn = torch.randperm(num_samples, generator=generator)[part * count : (part + 1) * count]
    return drawn.sort().values


def all_rows(rows: Callable[[int], EpochRows], first: int, last: int) -> Iterator[EpochRows]:
    """Yield `rows(epoch)` for epochs first..last; a thread reads one ahead."""
    from concurrent.futures import ThreadPoolExecutor

    if first > last:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="slab") as pool:
        pending = pool.submit(rows, first)
        for epoch in range(first, last + 1):
            current = pending.result()
            if epoch < last:
                pending = pool.submit(rows, epoch + 1)
            yield current


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Images of a split to evaluate a network on, and their labels, on the device."""

    images: Inputs  # of the whole split
    labels: Tensor  # [M], likewise
    views: Tensor  # the clean views, likewise
    ids: Tensor  # of the samples to evaluate, ascending

    @classmethod
    def of(cls, split: Split, device: torch.device) -> EvalSet:
        """Take all samples of a split."""
        return cls(
            images=make_inputs(split.images, device),
            labels=split.labels.to(device),
            views=views_tensor(split.view_space.clean(len(split))),
            ids=torch.arange(len(split), device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images and labels of all splits, on the device, which runs may share."""

    train: Inputs
    train_labels: Tensor  # [N]
    test: EvalSet
    choice: EvalSet | None = None  # to make choices on; no image of `test` is among them
    normalize: Normalize
    num_classes: int

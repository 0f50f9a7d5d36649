"""Several views of one decode: which images an epoch decodes, and where their crops wait.

An image that occurs several times in an epoch is decoded when it first occurs; its other crops wait
in a buffer until their batches come. The plan follows from the order of the epoch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BUFFER_BYTES = 512 * 2**20  # of the crops that wait, unless a lag of one batch takes more
FAR = 4  # batches of images between two views of an image: more do not help


@dataclass(frozen=True)
class Reuse:
    """A plan to decode each of D images once for the entries of an epoch.

    Images are numbered in the order of their first occurrence and decoded in chunks. A chunk takes
    a slot of the buffer until the last of its crops was used.
    """

    samples: Tensor  # [D], of each image
    entries: Tensor  # [D,M], the entries of each image; one with fewer repeats its first
    chunk: int  # images decoded at a time
    loaded: list[int]  # for each batch, how many chunks have to be decoded before it
    slots: list[int]  # of each chunk
    rows: Tensor  # [E], for each place in the order, the crop in the buffer

    @classmethod
    def of(cls, order: Tensor, samples: Tensor, batch_size: int | list[int]) -> Reuse | None:
        """Make a plan; None if no image occurs twice.

        Args:
            order: the entries [E] in the order of training.
            samples: the sample of every entry.
            batch_size: of the batches that the order is split into, or of each of them.
        """
        shown, by_sample = samples[order].sort(stable=True)
        start = torch.ones(len(order), dtype=torch.bool)
        start[1:] = shown[1:] != shown[:-1]
        firsts = start.nonzero()[:, 0]
        if len(firsts) == len(order):
            return None
        run = start.cumsum(0) - 1
        place = by_sample[firsts]  # of the first occurrence of each image, by sample
        number = torch.empty_like(place)
        number[place.argsort()] = torch.arange(len(place))
        images, turns = torch.empty_like(order), torch.empty_like(order)
        images[by_sample] = number[run]
        turns[by_sample] = torch.arange(len(order)) - firsts[run]
        most = int(turns.max()) + 1
        entries = order[place.sort().values][:, None].repeat(1, most)
        entries[images, turns] = order
        chunk = -(-largest(batch_size) // most)
        loaded, slots = _slots(images // chunk, batch_size)
        rows = (torch.tensor(slots)[images // chunk] * chunk + images % chunk) * most + turns
        return cls(samples[entries[:, 0]], entries, chunk, loaded, slots, rows)

    @property
    def buffer_rows(self) -> int:
        """The number of crops that the buffer holds."""
        return (max(self.slots) + 1) * self.chunk * self.entries.shape[1]


def largest(batch_size: int | list[int]) -> int:
    """Return the size of the largest batch: of all, or of each of them."""
    return batch_size if isinstance(batch_size, int) else max(batch_size)


def _slots(chunks: Tensor, batch_size: int | list[int]) -> tuple[list[int], list[int]]:
    """Return how many chunks each batch needs loaded, and the slot of each chunk.

    Args:
        chunks: the chunk [E] of each place in the order, numbered as they first occur.
        batch_size: of the batches that the order is split into, or of each of them.
    """
    lengths = torch.tensor([len(part) for part in torch.split(chunks, batch_size)])
    batch = torch.arange(len(lengths)).repeat_interleave(lengths)
    ends = torch.zeros(int(chunks.max()) + 1, dtype=torch.int64)
    ends.scatter_reduce_(0, chunks, batch, "amax")
    last = chunks.cummax(0).values
    loaded = [int(part[-1]) + 1 for part in torch.split(last, batch_size)]
    slots: list[int] = []
    free: list[int] = []
    count = 0
    ending: list[list[int]] = [[] for _ in loaded]
    for number, needed in enumerate(loaded):
        while len(slots) < needed:
            if not free:
                free.append(count)
                count += 1
            ending[int(ends[len(slots)])].append(free[-1])
            slots.append(free.pop())
        free += ending[number]
    return loaded, slots


def spread(images: Tensor, views: int, lag: int) -> Tensor:
    """Return the order [M·P] of an epoch's entries that shows each image's M views far apart.

    Images come one by one, and with each of them the next view of the image `lag` images before it,
    the view after that of the image 2·`lag` before it, and so on. So a batch has views of as many
    images as without reuse, of which one in M is new. With a lag of 0, the views of an image follow
    each other.

    Args:
        images: a permutation [P] of the images.
        views: M; entry m·P + i is view m of image i.
        lag: in images.
    """
    count, view = len(images), torch.arange(views)
    position = torch.arange(count + (views - 1) * lag)[:, None] - lag * view  # of each view's image
    shown = (position >= 0) & (position < count)
    return (images[position.clamp(0, count - 1)] + count * view)[shown]


def choose_lag(count: int, views: int, batch_size: int, crop_bytes: int) -> int:
    """Return the lag for `spread`: a few batches, fewer if the buffer would become too large.

    No image is twice in a batch, unless an epoch has fewer images than a batch.

    Args:
        count: P, the images of an epoch.
        views: M.
        batch_size: entries in a batch.
        crop_bytes: of one crop.
    """
    waiting = (views - 1) * views * crop_bytes * batch_size  # for a lag of one batch
    batches = max(1, min(FAR, BUFFER_BYTES // max(1, waiting)))
    return min(count, batches * batch_size)


def buffer_bytes(count: int, views: int, batch_size: int, crop_bytes: int) -> int:
    """Return the bytes of the crops that wait at most; arguments as of `choose_lag`."""
    if views == 1:
        return 0
    lag = choose_lag(count, views, batch_size, crop_bytes)
    # with chunks that are partly used, and one that has just been decoded
    images = (views - 1) * lag + 3 * -(-batch_size // views)
    return min(images, count + batch_size) * views * crop_bytes

"""Rows of logits of which only the largest are kept: the K largest with their classes, and one
logit for every other class.

At a temperature τ the other C−K classes together keep the very mass that they had, spread evenly:
the logit r of each has (C−K)·exp(r/τ) = Σ exp(z/τ) over them. Rows stay compact until a batch of
them is needed. C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.store.schema import LOGITS, part_names

MOST_CLASSES = 2**16  # that u16 can name


@dataclass(frozen=True, eq=False)
class TopKRows:
    """Logits [N,C] by their K largest; what training needs of rows. N may be several axes."""

    top: Tensor  # [N,K], descending
    classes: Tensor  # [N,K], the bits of u16 as i16: torch indexes no u16 on every device
    rest: Tensor  # [N], of each class that is not among them
    num_classes: int

    @classmethod
    def from_numpy(
        cls, top: NDArray[Any], classes: NDArray[Any], rest: NDArray[Any], num_classes: int
    ) -> TopKRows:
        """From arrays as they are stored (classes in u16), without a copy."""
        codes = torch.from_numpy(classes.view(np.int16))
        return cls(torch.from_numpy(top), codes, torch.from_numpy(rest), num_classes)

    @property
    def shape(self) -> torch.Size:
        """Of the rows filled up: [N,C]."""
        return torch.Size((*self.rest.shape, self.num_classes))

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index: Tensor | slice) -> TopKRows:
        return self._each(lambda part: part[index])

    def to(self, device: torch.device, non_blocking: bool = False) -> TopKRows:
        """The same on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopKRows:
        """The same in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def copy_(self, rows: TopKRows, non_blocking: bool = False) -> TopKRows:
        """Take over other rows of the same shape, in place."""
        for name in ("top", "classes", "rest"):
            getattr(self, name).copy_(getattr(rows, name), non_blocking=non_blocking)
        return self

    def class_index(self) -> Tensor:
        """The classes that are kept, [N,K] i64."""
        return self.classes.long() & (MOST_CLASSES - 1)

    def dense(self) -> Tensor:
        """The rows filled up: [N,C], in the dtype in which they are kept."""
        flat = self._each(lambda part: part.flatten(0, self.rest.ndim - 1))
        full = flat.rest[:, None].repeat(1, self.num_classes)
        for span in spans(len(full)):
            some = flat[span]
            full[span].scatter_(1, some.class_index(), some.top)
        return full.view(self.shape)

    def float(self) -> Tensor:
        """The rows filled up: [N,C] f32."""
        return self.dense().float()

    def _each(self, change: Callable[[Tensor], Tensor]) -> TopKRows:
        return TopKRows(change(self.top), change(self.classes), change(self.rest), self.num_classes)


Rows = Tensor | TopKRows  # what an epoch has of each array


def keep_top(logits: Tensor, keep: int, temperature: float) -> TopKRows:
    """The `keep` largest of logits [N,C]; of equal ones those of the lower classes.

    Args:
        logits: in any float dtype, which is that of the result; the arithmetic is in f32.
        keep: K, below C.
        temperature: τ, at which the others keep their mass.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return keep_classes(logits, order[..., :keep], temperature)


def keep_classes(logits: Tensor, classes: Tensor, temperature: float) -> TopKRows:
    """The same for classes [N,K] i64 that are given."""
    num_classes = logits.shape[-1]
    others = logits.float().scatter(-1, classes, -math.inf)
    mass = (others / temperature).logsumexp(-1)
    rest = temperature * (mass - math.log(num_classes - classes.shape[-1]))
    return TopKRows(
        logits.gather(-1, classes), classes.to(torch.int16), rest.to(logits.dtype), num_classes
    )


def compact(rows: Mapping[str, Tensor], keep: int, temperature: float) -> dict[str, Tensor]:
    """The rows of a block by the names of arrays, its logits by their K largest."""
    stored: dict[str, Tensor] = {}
    for name, tensor in rows.items():
        if name in LOGITS:
            kept = keep_top(tensor, keep, temperature)
            parts = (kept.top, kept.class_index(), kept.rest)
            stored |= dict(zip(part_names(name), parts, strict=True))
        else:
            stored[name] = tensor
    return stored


def check_keep(keep: int, num_classes: int) -> None:
    """Refuse to keep as many logits as there are, and classes that u16 cannot name."""
    if keep >= num_classes:
        raise RichKDError(
            f"keep = 'top-{keep}': there are {num_classes} classes; keep all, or fewer than that",
            code="keep-out-of-range",
        )
    if num_classes > MOST_CLASSES:
        raise RichKDError(
            f"keep = 'top-{keep}': of {num_classes:,} classes all have to be kept; at most "
            f"{MOST_CLASSES:,} can be named in 16 bits",
            code="keep-out-of-range",
        )


def kl_errors(logits: Tensor, keep: int, temperature: float) -> dict[str, float]:
    """What keeping the K largest costs: mean KL(softmax(z/τ) ‖ softmax(kept/τ)) in nats, by τ.

    Args:
        logits: [N,C], as they are stored.
        keep: K.
        temperature: at which the others keep their mass; the other τ is 1.
    """
    sums = dict.fromkeys((1.0, temperature), 0.0)
    for span in spans(len(logits)):
        whole = logits[span]
        kept = keep_top(whole, keep, temperature).dense()
        for tau in sums:
            target, told = ((z.double() / tau).log_softmax(-1) for z in (whole, kept))
            sums[tau] += F.kl_div(told, target, reduction="sum", log_target=True).item()
    return {f"{tau:g}": max(0.0, each / len(logits)) for tau, each in sums.items()}

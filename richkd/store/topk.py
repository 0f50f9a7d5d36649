"""Rows of logits that keep only the K largest, with their classes, and one logit for the others.

At a temperature τ the other C−K of C classes together keep their exact mass, spread evenly: their
common logit r solves (C−K)·exp(r/τ) = Σ exp(z/τ) over them. Rows stay compact until a batch needs
them.
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

MOST_CLASSES = 2**16  # that u16 can index


@dataclass(frozen=True, eq=False)
class TopKRows:
    """Logits [N,C] given by their K largest; N may stand for several axes."""

    top: Tensor  # [N,K], descending
    classes: Tensor  # [N,K], the bits of u16 as i16: not every device can index u16
    rest: Tensor  # [N], the logit of every other class
    num_classes: int

    @classmethod
    def from_numpy(
        cls, top: NDArray[Any], classes: NDArray[Any], rest: NDArray[Any], num_classes: int
    ) -> TopKRows:
        """Wrap arrays as they are stored (classes in u16), without a copy."""
        codes = torch.from_numpy(classes.view(np.int16))
        return cls(torch.from_numpy(top), codes, torch.from_numpy(rest), num_classes)

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense rows: [N,C]."""
        return torch.Size((*self.rest.shape, self.num_classes))

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index: Tensor | slice) -> TopKRows:
        return self._each(lambda part: part[index])

    def to(self, device: torch.device, non_blocking: bool = False) -> TopKRows:
        """Return the rows on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopKRows:
        """Return the rows in pinned memory."""
        return self._each(Tensor.pin_memory)

    def copy_(self, rows: TopKRows, non_blocking: bool = False) -> TopKRows:
        """Copy other rows of the same shape into these."""
        for name in ("top", "classes", "rest"):
            getattr(self, name).copy_(getattr(rows, name), non_blocking=non_blocking)
        return self

    def class_index(self) -> Tensor:
        """Return the classes that are kept, [N,K] i64."""
        return self.classes.long() & (MOST_CLASSES - 1)

    def dense(self) -> Tensor:
        """Return the dense rows [N,C] in the stored dtype."""
        flat = self._each(lambda part: part.flatten(0, self.rest.ndim - 1))
        full = flat.rest[:, None].repeat(1, self.num_classes)
        for span in spans(len(full)):
            some = flat[span]
            full[span].scatter_(1, some.class_index(), some.top)
        return full.view(self.shape)

    def float(self) -> Tensor:
        """Return the dense rows [N,C] in f32."""
        return self.dense().float()

    def _each(self, change: Callable[[Tensor], Tensor]) -> TopKRows:
        return TopKRows(change(self.top), change(self.classes), change(self.rest), self.num_classes)


Rows = Tensor | TopKRows  # of one array, for one epoch


def keep_top(logits: Tensor, keep: int, temperature: float) -> TopKRows:
    """Keep the `keep` largest of logits [N,C]; of equal ones, the lower classes.

    Args:
        logits: in any float dtype; the result has the same, computed in f32.
        keep: K, below C.
        temperature: τ at which the others keep their mass.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return keep_classes(logits, order[..., :keep], temperature)


def keep_classes(logits: Tensor, classes: Tensor, temperature: float) -> TopKRows:
    """Keep the logits of given classes [N,K] i64; arguments as in `keep_top`."""
    num_classes = logits.shape[-1]
    others = logits.float().scatter(-1, classes, -math.inf)
    mass = (others / temperature).logsumexp(-1)
    rest = temperature * (mass - math.log(num_classes - classes.shape[-1]))
    return TopKRows(
        logits.gather(-1, classes), classes.to(torch.int16), rest.to(logits.dtype), num_classes
    )


def compact(rows: Mapping[str, Tensor], keep: int, temperature: float) -> dict[str, Tensor]:
    """Return the rows of a block by array, with only the K largest of its logits."""
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
    """Raise RichKDError if K is not below the number of classes, or u16 cannot index them."""
    if keep >= num_classes:
        raise RichKDError(
            f"keep = 'top-{keep}': there are only {num_classes} classes; choose a smaller K or all",
            code="keep-out-of-range",
        )
    if num_classes > MOST_CLASSES:
        raise RichKDError(
            f"keep = 'top-{keep}': {num_classes:,} classes are more than the {MOST_CLASSES:,} that "
            f"16 bits can index; use keep = 'all'",
            code="keep-out-of-range",
        )


def kl_errors(logits: Tensor, keep: int, temperature: float) -> dict[str, float]:
    """Return the cost of keeping the K largest: mean KL(softmax(z/τ) ‖ softmax(kept/τ)), nats by τ.

    Args:
        logits: [N,C], as stored.
        keep: K.
        temperature: τ at which the others keep their mass; the error is given at it and at τ = 1.
    """
    sums = dict.fromkeys((1.0, temperature), 0.0)
    for span in spans(len(logits)):
        whole = logits[span]
        kept = keep_top(whole, keep, temperature).dense()
        for tau in sums:
            target, approximation = ((z.double() / tau).log_softmax(-1) for z in (whole, kept))
            sums[tau] += F.kl_div(approximation, target, reduction="sum", log_target=True).item()
    return {f"{tau:g}": max(0.0, each / len(logits)) for tau, each in sums.items()}

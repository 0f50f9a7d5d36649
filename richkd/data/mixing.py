"""Rows of mixed views: each with that of its partner, and what both samples' rows come to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from richkd.core.memory import spans
from richkd.data.augment import Augment


def joined(augment: Augment | None, views: Tensor, samples: Tensor | None = None) -> Tensor:
    """Return the rows [E,k] of one view, each with the row of its partner.

    Such rows [E,k+…] can be replayed one by one, in any order and selection.

    Args:
        augment: what the rows consist of; None for crops, which have no partners.
        views: the rows of all samples, [N,k], or [N] for crops.
        samples: which to return, [E]; None for all.
    """
    own = views if samples is None else views[samples]
    if augment is None or not augment.mixes:
        return own
    partners = own[:, augment.at["partner"]].long()
    return torch.cat([own, views[partners, : augment.unmixed]], dim=1)


def joined_rows(augment: Augment, views: Tensor, entry: int) -> Tensor:
    """Return the rows [V,k+…] of one entry, given those [V,N,k] of all samples, or joined ones."""
    own = views[:, entry]
    if not augment.mixes or own.shape[1] > augment.width:
        return own
    partners = own[:, augment.at["partner"]].long()
    theirs = views[torch.arange(len(views)), partners, : augment.unmixed]
    return torch.cat([own, theirs], dim=1)


@dataclass(frozen=True)
class Mix:
    """Which samples each of E views is mixed of."""

    samples: Tensor | None  # [E], of the first images; None if entry i is of sample i
    partner: Tensor  # [E], of the second
    share: Tensor  # [E], λ of the first, f32

    @classmethod
    def of(
        cls, augment: Augment | None, views: Tensor, samples: Tensor | None = None
    ) -> Self | None:
        """Read the rows [E,k+…] of views; return None if they are not mixed."""
        if augment is None or not augment.mixes:
            return None
        partner, share = (views[:, augment.at[name]] for name in ("partner", "share"))
        return cls(samples, partner.long(), share.contiguous())

    def to(self, device: torch.device) -> Self:
        """Copy it to a device."""
        samples = None if self.samples is None else self.samples.to(device)
        return replace(
            self, samples=samples, partner=self.partner.to(device), share=self.share.to(device)
        )

    def rows(self, rows: Tensor, span: slice | Tensor = slice(None)) -> Tensor:
        """Return λ·own + (1 − λ)·partner of the rows [N,…] of samples, for some entries, f32."""
        own = rows[span if self.samples is None else self.samples[span]].float()
        share = self.share[span].reshape(-1, *[1] * (rows.ndim - 1))
        return torch.lerp(rows[self.partner[span]].float(), own, share)

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return the same for all entries, in the dtype of the rows and some entries at a time."""
        mixed = rows.new_empty((len(self.share), *rows.shape[1:]))
        for span in spans(len(mixed)):
            mixed[span] = self.rows(rows, span).to(rows.dtype)
        return mixed

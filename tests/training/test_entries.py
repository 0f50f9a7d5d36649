"""An epoch of other entries than one view of every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.store.reader import open_cache
from richkd.store.topk import Rows, TopKRows
from richkd.training.loop import Trainer
from richkd.training.source import Source
from richkd.training.student import with_defaults

Make = Callable[..., Path]


def dense(rows: Rows) -> Tensor:
    return rows.dense() if isinstance(rows, TopKRows) else rows


@pytest.mark.parametrize("keep", ["all", "top-3"])
def test_rows_of_some_samples(make_store: Make, keep: str) -> None:
    """In any order, repeated or from a single chunk, they are those of the whole slab."""
    cache = open_cache(make_store(keep=keep, block=16))
    draw = torch.Generator().manual_seed(7)
    for samples in (
        torch.randperm(48, generator=draw)[:20],
        torch.randint(48, (60,), generator=draw),
        torch.tensor([47]),
    ):
        for name in ("train/teacher_logits", "train/teacher_features", "train/view_ids"):
            rows, every = (dense(cache.rows(name, 1, samples=each)) for each in (samples, None))
            assert torch.equal(rows, every[samples])
        labels = cache.rows("train/labels", samples=samples)
        assert torch.equal(dense(labels), cache.read("train/labels")[samples])


@pytest.mark.parametrize("method", ["richkd", "kd"])
def test_entries_in_another_order_are_the_same_training(
    store: Path, tmp_path: Path, method: str
) -> None:
    """Entry i of sample p(i), trained on in the order p⁻¹: the losses of the plain epoch."""
    settings = Distill(cache=str(store), method=method, epochs=2, out=str(tmp_path / "run"))
    source = Source(settings, Report(quiet=True))
    settings = with_defaults(settings, source.cache)
    samples = torch.randperm(48, generator=torch.Generator().manual_seed(3))

    def losses(permuted: bool) -> tuple[list[float], dict[str, Tensor]]:
        trainer, names, _ = source.trainer(settings)
        plain, _ = next(source.epochs(names.values(), 1, 1))
        rows = source.own(plain, names, 0, 1)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
        if permuted:
            rows = replace(
                rows,
                views=rows.views[samples],
                rows={name: row[samples] for name, row in rows.rows.items()},
                samples=samples,
            )
            order = samples.argsort()[order]
        found = [step(trainer, *batch) for batch in trainer.batches(order, rows)]
        return found, trainer.state()

    def step(trainer: Trainer, *batch: object) -> float:
        torch.manual_seed(0)  # of the negatives
        trainer.step(*batch)  # type: ignore[arg-type]
        assert trainer.sums is not None
        return float(trainer.sums.sum())

    (one, weights), (other, permuted) = losses(False), losses(True)
    assert one == other
    assert all(torch.equal(weights[name], permuted[name]) for name in weights)

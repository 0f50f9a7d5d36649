"""Train as one process of a job; the first writes the loss of every step, job by job.

Arguments: a JSON file with a list of settings of Distill, and where to write. Settings with `wide`
compute in f64, in which other orders of summation show nowhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.core.ranks import Ranks, joined
from richkd.data.inputs import Normalize
from richkd.training.source import Source
from richkd.training.student import with_defaults


def train(given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    wide = given.pop("wide", False)
    settings = Distill(device="cpu", out="unused", **given)
    source = Source(settings, Report(quiet=True), ranks=ranks)
    settings = with_defaults(settings, source.cache)
    trainer, names, _ = source.trainer(settings)
    if wide:
        for module in (trainer.model, trainer.method, trainer.result):
            module.double()
    trainer.share()
    losses: list[float] = []
    evaluated, held = [], 0
    for epoch, (shared, _) in enumerate(source.epochs(names.values(), 1, settings.epochs), 1):
        rows = source.own(shared, names, settings.seed, epoch)
        held = max(held, sum(row.nbytes for row in rows.rows.values()))
        before = 0.0
        for count in trainer.steps(epoch, rows):
            now = float(trainer.sums[1:].sum())
            losses.append((now - before) / count)
            before = now
        record = trainer.end_epoch()
        evaluated.append((record.test_accuracy, record.test_top5, record.train_accuracy))
    banks = [float(buffer.double().sum()) for buffer in trainer.method.buffers()]
    result = {"losses": losses, "evaluated": evaluated, "bytes": held, "banks": banks}
    return {**result, "names": list(trainer.result.state_dict())}


def keep_f64() -> None:
    """Let `.float()` and the images for a network be f64."""
    torch.Tensor.float = torch.Tensor.double
    Normalize.__call__ = lambda self, x: (x * self.scale.double() + self.shift).permute(0, 3, 1, 2)


if __name__ == "__main__":
    jobs, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    given = json.loads(jobs.read_text())
    with joined() as ranks:
        results = [train(job, ranks) for job in given if "wide" not in job]
        keep_f64()
        results += [train(job, ranks) for job in given if "wide" in job]
    if ranks.first:
        out.write_text(json.dumps(results))

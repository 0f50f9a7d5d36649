"""Measure how many cached views each method needs, against the teacher in the loop.

A cache of all 162 views contains smaller ones: its first V views are those that stage one draws for
V. It also stands for a teacher in the loop: every epoch draws a new view of each image from all 162
and reads the row of that view. Students of one seed start from the same weights and see the samples
in the same order, so differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.analysis.results import mean_and_std, mean_std, minus_kd, paired_difference
from richkd.config.settings import Distill
from richkd.core.files import write
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.losses.method import TARGET
from richkd.training.data import EpochRows
from richkd.training.device import hardware
from richkd.training.loop import Trainer
from richkd.training.source import Source, build_student, method_of
from richkd.training.student import with_defaults

METHODS = ("ce", "crd", "pkt", "kd", "richkd-l", "richkd-f", "richkd")
VIEWS = ("8", "16", "32", "64", "162", "online")

Run = tuple[str, str, int]  # method, views, seed


class Measure:
    """A cache on the device, and students trained from parts of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = Source(self.settings("ce", 0), Report(quiet=True))
        cache = self.source.cache
        if cache.num_views != 162:
            raise SystemExit(f"{options.store} has {cache.num_views} views; all 162 are needed")
        self.ids = cache.read("train/view_ids").long()  # [162,N]
        self.position = self.ids.argsort(dim=0)  # view id, sample -> index of the view

    def settings(self, method: str, seed: int) -> Distill:
        """Return the settings of a run: defaults but for the options."""
        options = self.options
        return Distill(
            cache=str(options.store),
            student=options.student,
            method=method,
            seed=seed,
            epochs=options.epochs,
            eval_every=options.epochs,
            device=options.device,
            precision=options.precision,
        )

    def rows(self, names: tuple[str, ...], settings: Distill) -> dict[str, Tensor]:
        """Return the rows of all views that a method reads: [162,N,…], or [N,…] without views."""
        cache, device = self.source.cache, self.source.device
        kind = method_of(settings)[0].target
        arrays = {TARGET: f"train/{kind}_logits"}
        return {name: cache.read(arrays.get(name, f"train/{name}")).to(device) for name in names}

    def epochs(self, views: str, rows: dict[str, Tensor], seed: int) -> Callable[[int], EpochRows]:
        """Return a function from epoch, from 1, to its views and rows."""
        samples = torch.arange(self.ids.shape[1])
        space = self.source.splits["train"].view_space

        def epoch_rows(epoch: int) -> EpochRows:
            if views == "online":
                ids = torch.from_numpy(space.fresh(seed, epoch, len(samples)).astype("int64"))
                which = self.position[ids, samples]
            else:
                which = torch.full_like(samples, (epoch - 1) % int(views))
                ids = self.ids[which, samples]
            at = which.to(self.source.device), samples.to(self.source.device)
            picked = {name: row if row.ndim == 2 else row[at] for name, row in rows.items()}
            return EpochRows(ids, picked)

        return epoch_rows

    def train(self, method: str, views: str, seed: int) -> dict[str, Any]:
        """Train one student and return its test accuracy after the last epoch."""
        settings = with_defaults(self.settings(method, seed), self.source.cache)
        kind, options = method_of(settings)
        model, width = build_student(settings, self.source.cache)
        _, target = self.source.target(settings, kind.target)
        objective = kind(options, self.source.task(width, target))
        trainer = Trainer(model, objective, self.source.data, settings, self.source.device)
        rows = self.rows(kind.reads(options), settings)
        epoch_rows = self.epochs(views, rows, seed)
        start = time.perf_counter()
        record = None
        for epoch in range(1, settings.epochs + 1):
            record = trainer.train_epoch(epoch, epoch_rows(epoch))
        assert record is not None
        return {
            "method": method,
            "views": views,
            "seed": seed,
            "top1": record.test_accuracy,
            "seconds": time.perf_counter() - start,
            "hardware": hardware(self.source.device),
        }


_measure: Measure | None = None  # of a worker process


def _begin(options: argparse.Namespace) -> None:
    global _measure  # noqa: PLW0603
    torch.set_num_threads(1)
    _measure = Measure(options)


def _train(run: Run) -> dict[str, Any]:
    assert _measure is not None
    return _measure.train(*run)


def file_of(folder: Path, run: Run) -> Path:
    """Return the file for the result of a run."""
    return folder / "{}-{}-s{}.json".format(*run)


def table(results: list[dict[str, Any]]) -> str:
    """Return each method's accuracy online, and differences with fewer views, paired by seed."""
    top1 = {(r["method"], r["views"], r["seed"]): r["top1"] for r in results}
    lines = [
        f"| method | n | online, % | {' | '.join(f'{v} views' for v in VIEWS[:-1])} |",
        f"|{'---|' * (len(VIEWS) + 2)}",
    ]
    for method in METHODS:
        online = {s: a for (m, v, s), a in top1.items() if (m, v) == (method, "online")}
        if not online:
            continue
        cells = []
        for views in VIEWS[:-1]:
            pairs = [
                top1[method, views, seed] - accuracy
                for seed, accuracy in online.items()
                if (method, views, seed) in top1
            ]
            cells.append(minus_kd(paired_difference(pairs)))
        accuracy = mean_std(mean_and_std([*online.values()]))
        lines.append(f"| {method} | {len(online)} | {accuracy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the students that are missing, and write views.json and views.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, help="made by fashion_mnist.py")
    parser.add_argument("--out", type=Path, default=Path("runs/views"))
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--views", default=",".join(VIEWS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    options = parser.parse_args()
    runs_folder = options.out / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)
    grid = product(range(options.seeds), options.methods.split(","), options.views.split(","))
    runs: list[Run] = [(method, views, seed) for seed, method, views in grid]
    todo = [run for run in runs if not file_of(runs_folder, run).is_file()]
    deadline = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, _begin, (options,)) as pool:
        for done, result in enumerate(pool.imap_unordered(_train, todo), 1):
            run = result["method"], result["views"], result["seed"]
            write(file_of(runs_folder, run), json.dumps(result))
            print(f"{done}/{len(todo)} {run}: {100 * result['top1']:.2f} %", flush=True)
            if time.monotonic() > deadline:
                print("time is up; rerun the same command to resume")
                pool.terminate()
                break
    results = [json.loads(path.read_text()) for path in sorted(runs_folder.glob("*.json"))]
    settings = {**vars(options), "store": options.store.name, "out": ""}
    found = {"settings": settings, "versions": versions(), "runs": results}
    write(options.out / "views.json", json.dumps(found) + "\n")
    write(options.out / "views.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()

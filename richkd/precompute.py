"""Stage one: run both teachers once and write their outputs to a cache.

    dataset ──▶ views ──▶ CNN teacher ─┐
       └──────▶ CLIP image + prompts ──┴▶ fusion ─▶ cache

Samples are computed in blocks. The cache keeps a flag per block, so the same command resumes an
interrupted run. Under torchrun the processes share the blocks; the first of them creates the cache
and completes it. Threads write beside the computation.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from richkd.config.settings import Precompute, check_resume
from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError
from richkd.core.interrupts import deferred
from richkd.core.progress import Report, duration, percent, size
from richkd.core.ranks import Ranks, joined
from richkd.data.datasets import Dataset
from richkd.data.views import views_tensor
from richkd.store import schema
from richkd.store.location import Location
from richkd.store.locations import open_location
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import Block, Manifest, TeacherEntry, describe_errors
from richkd.store.topk import kl_errors
from richkd.store.writer import ALONE, StoreWriter, open_writer
from richkd.teachers.clip import autocast
from richkd.teachers.find import Finder, training_settings
from richkd.teachers.manifest import make_manifest
from richkd.teachers.request import (
    check_request,
    check_room,
    check_settings,
    is_complete,
    load_images,
)
from richkd.teachers.rows import BlockRows, Preview, Teachers
from richkd.training.device import choose_device

QUIET = Report(quiet=True)


def precompute(
    settings: Precompute,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dataset: Dataset | None = None,
    teacher_recipe: Mapping[str, Any] | None = None,
    block: int | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Run both teachers over a dataset and write the cache.

    An interrupted cache is resumed, and a complete one is left as it is.

    Args:
        settings: what to compute.
        resume: has no effect, since resuming is the default; contradicts `overwrite`.
        overwrite: replace a cache that exists.
        dataset: the images, if they are already loaded; by default, loaded from the settings.
        teacher_recipe: settings for the teacher's training, if one has to be trained.
        block: the number of samples per block; None chooses it by the widest row.
        report: receives progress.

    Raises:
        RichKDError: anything the user can fix; found before anything that takes long.
        Interrupted: by SIGINT or SIGTERM, after the block that is being computed.
    """
    check_resume(resume, overwrite)
    given = teacher_recipe or {}
    with joined() as ranks:
        report = report if report and ranks.first else QUIET
        out, device = open_location(settings.out), choose_device(settings.device)
        autocast(device, settings.clip_precision)  # fails if the device lacks this precision
        dataset, interrupted = ranks.from_first(
            lambda: check_request(settings, out, overwrite, dataset, report)
        )
        settings = settings.for_size(dataset.image_size)
        training = training_settings(settings, given)
        if not overwrite and ranks.from_first(
            lambda: is_complete(settings, out, dataset, training, report)
        ):
            return open_cache(settings.out)
        check_same_files(dataset, ranks)
        finder = Finder(settings, dataset, training, device, ranks, report)
        stage = StageOne.of(dataset, *finder.find(interrupted=interrupted, given=given), block)
        return stage.run(out, ranks, report, overwrite=overwrite)


def recompute(
    manifest: Manifest,
    settings: Precompute,
    damaged: Collection[Block] | None,
    *,
    dataset: Dataset | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Compute the missing or damaged blocks of a cache, as its manifest describes them.

    The CNN teacher keeps its recorded input and class order, and the rules for new caches do not
    apply, as the cache may be older than they are.

    Args:
        manifest: of the cache.
        settings: its recipe, with `out` where the cache is.
        damaged: the blocks of a complete cache to compute again; None for an incomplete cache.
        dataset: the images, if they are already loaded.
        report: receives progress.

    Raises:
        RichKDError: as `precompute`; or the images or teachers are no longer the same.
    """
    recorded = TeacherEntry(**{**manifest["teacher"], "input": schema.teacher_input(manifest)})
    with joined() as ranks:
        report = report if report and ranks.first else QUIET
        out, device = open_location(settings.out), choose_device(settings.device)
        autocast(device, settings.clip_precision)
        ranks.from_first(lambda: check_settings(settings, out, overwrite=False))
        dataset = ranks.from_first(lambda: load_images(settings, dataset, report))
        settings = settings.for_size(dataset.image_size)
        check_same_files(dataset, ranks)
        training = training_settings(settings, {})
        finder = Finder(settings, dataset, training, device, ranks, report)
        stage = StageOne.of(dataset, *finder.find(recorded=recorded), manifest["block"])
        return stage.run(out, ranks, report, damaged=damaged)


def check_same_files(dataset: Dataset, ranks: Ranks) -> None:
    """Check, once per machine, that an image folder has the files that the first process read."""
    if ranks.first or not ranks.first_here or isinstance(dataset.train.images, Tensor):
        return
    try:
        same = replace(dataset).fingerprint == dataset.fingerprint  # of the files on this machine
    except OSError:
        same = False
    if not same:
        raise RichKDError(
            f"rank {ranks.rank} sees other files in {dataset.name} than rank 0; every machine of "
            f"the job needs the same files",
            code="rank-files-differ",
        )


@dataclass(frozen=True)
class StageOne:
    """Stage one, ready to run: images, views, teachers, and the manifest of their cache."""

    dataset: Dataset
    views: NDArray[Any]  # of the training split, [V,N] or [V,N,5]
    teachers: Teachers
    manifest: Manifest
    preview: Preview

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        teachers: Teachers,
        preview: Preview | None = None,
        block: int | None = None,
    ) -> StageOne:
        """Draw the views and make the manifest; `block` as in `make_manifest`."""
        settings, train, preview = teachers.settings, dataset.train, preview or Preview()
        views = train.view_space.draw(settings.seed, len(train), settings.views)
        manifest = make_manifest(dataset, teachers, preview.precision_error, block)
        return cls(dataset, views, teachers, manifest, preview)

    def run(
        self,
        out: Location,
        ranks: Ranks,
        report: Report,
        *,
        overwrite: bool = False,
        damaged: Collection[Block] | None = None,
    ) -> TeacherCache:
        """Write the cache and complete it; arguments as in `open_writer`."""
        self.check_same_teachers(ranks)
        ranks.from_first(lambda: check_room(out, self.manifest, report))
        start = time.perf_counter()
        with self.open(out, ranks, overwrite=overwrite, damaged=damaged) as writer:
            self.write(writer, ranks, report)
            if ranks.first:
                self.complete(writer)
            ranks.wait()
        cache = open_cache(out.name)
        report.log(closing(cache, time.perf_counter() - start))
        return cache

    def check_same_teachers(self, ranks: Ranks) -> None:
        """Raise RichKDError if this process loaded other weights than the first, from its disk."""
        different = schema.difference(ranks.from_first(lambda: self.manifest), self.manifest)
        if different is not None:
            raise RichKDError(
                f"rank {ranks.rank} would write another cache than rank 0: {different}; every "
                f"machine of the job needs the same weights at the same paths",
                code="rank-teachers-differ",
            )

    def open(
        self,
        location: Location,
        ranks: Ranks = ALONE,
        *,
        overwrite: bool = False,
        damaged: Collection[Block] | None = None,
    ) -> AbstractContextManager[StoreWriter]:
        """Open the cache for writing; arguments as in `open_writer`."""
        known = {f"train/{self.dataset.train.view_space.array}": self.views}
        if self.teachers.text is not None:
            known["text/embeddings"] = self.teachers.text.cpu().numpy()
        return open_writer(
            location, self.manifest, known, overwrite=overwrite, damaged=damaged, ranks=ranks
        )

    def write(self, writer: StoreWriter, ranks: Ranks = ALONE, report: Report = QUIET) -> None:
        """Compute and write this process's share of the missing blocks.

        A signal waits for the block that is being computed.
        """
        views, device = views_tensor(self.views), self.teachers.cnn.device
        compute = BlockRows(self.dataset, views, device, self.teachers, writer.read, self.preview)
        todo = [block for block, done in zip(writer.blocks, writer.done, strict=True) if not done]
        count, written = len(writer.blocks), 0
        if len(todo) < count:
            report.log(f"resuming: {count - len(todo)} of {count} blocks are already written")
        phases = [ranks.own(units) for units in compute.phases(todo)]
        own = [block for units in phases for unit in units for block in unit]
        total = sum(block.stop - block.start for block in own)
        with (
            deferred() as check_stopped,
            report.track(f"precompute{ranks.task}", total, "images") as tick,
        ):

            def check() -> None:
                check_stopped(
                    f"stopped with {count - len(todo) + written} of {count} blocks written; the "
                    f"same command resumes it"
                    if ranks.world == 1
                    else f"rank {ranks.rank} stopped with {written} of its {len(own)} blocks "
                    f"written; the same job resumes it"
                )

            for units in phases:
                for block, rows in compute(units, tick, check):
                    writer.write(block, rows)
                    written += 1
                    check()
                writer.flush()  # the next phase reads what all processes wrote in this one
                ranks.wait()
                if ranks.first and any(block.split == "test" for unit in units for block in unit):
                    compute.log_zero_shot(report)

    def complete(self, writer: StoreWriter) -> None:
        """Compute accuracies and errors from the written test rows and complete the cache."""
        manifest, count = writer.manifest, self.manifest["dataset"]["num_test"]
        labels = writer.read("test/labels", 0, count)

        def top1(name: str) -> float:
            return accuracy(writer.read(f"test/{name}", 0, count), labels, 1)

        has_clip = manifest["clip"] is not None
        if "keep" in manifest:
            logits = writer.read(f"test/{'fused' if has_clip else 'teacher'}_logits", 0, count)
            manifest["keep_kl"] = kl_errors(logits, manifest["keep"], manifest["keep_temperature"])
        writer.finish(
            top1("teacher_logits"),
            top1("clip_similarity") if has_clip else None,
            top1("fused_logits") if has_clip else None,
        )


def closing(cache: TeacherCache, seconds: float) -> str:
    """Return stage one's last line, after a line on the cost of keeping only the largest logits."""
    manifest = cache.manifest
    clip = manifest["clip"]
    stored = sum(cache.location.sizes().values())
    blend = (
        f", CLIP {percent(clip['accuracy'])} %, fused {percent(manifest['fused_accuracy'])} %"
        if clip
        else ""
    )
    kept = (
        f"the {manifest['keep']} largest of {cache.num_classes:,} logits per row are kept; KL "
        f"error on the test images: {describe_errors(manifest['keep_kl'])}\n"
        if "keep" in manifest
        else ""
    )
    return (
        f"{kept}{cache.location} is complete: {size(stored)} in {duration(seconds)}; "
        f"test accuracy: CNN teacher {percent(manifest['teacher']['accuracy'])} %{blend}"
    )

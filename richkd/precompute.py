"""Stage one: run both teachers once and write their outputs to a cache.

    dataset ──▶ views ──▶ CNN teacher ─┐
       └──────▶ CLIP image + prompts ──┴▶ fusion ─▶ cache

Samples are computed in blocks. The cache keeps a flag per block, so the same command resumes an
interrupted run. Under torchrun the processes share the blocks; the first of them creates the cache
and completes it. Threads write beside the computation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from richkd.config.settings import NO_TEACHER, Precompute, check_resume
from richkd.core.accuracy import accuracy
from richkd.core.choices import CROP
from richkd.core.errors import RichKDError
from richkd.core.interrupts import deferred
from richkd.core.progress import QUIET, Report, duration, percent, size
from richkd.core.ranks import ALONE, Ranks, joined
from richkd.data.datasets import Dataset, Reading
from richkd.data.kept import reduced_sizes
from richkd.data.views import views_tensor
from richkd.store import schema
from richkd.store.added import added_names, place_of
from richkd.store.location import METADATA, Location
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import Block, Manifest, TeacherEntry, describe_errors
from richkd.store.topk import kl_errors
from richkd.store.writer import StoreWriter, open_writer
from richkd.teachers.addition import (
    addition_settings,
    check_addition,
    check_further,
    check_given_teacher,
    default_name,
)
from richkd.teachers.clip import autocast
from richkd.teachers.find import Finder, training_settings
from richkd.teachers.manifest import make_addition, make_manifest
from richkd.teachers.matching import check_head
from richkd.teachers.request import (
    check_request,
    check_room,
    check_settings,
    is_complete,
    load_images,
    load_request,
)
from richkd.teachers.rows import BlockRows, Preview, Teachers
from richkd.training.device import choose_device
from richkd.training.images import load_dataset_of


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
    check_further(settings)
    cache = _precompute(settings, overwrite, dataset, teacher_recipe or {}, block, report)
    return add_further(settings, cache, report)


def add_further(settings: Precompute, cache: TeacherCache, report: Report | None) -> TeacherCache:
    """Add the further teachers of the settings to a complete cache, and open it again."""
    for name, table in settings.teachers.items():
        where = {"data_root": settings.data_root, "device": settings.device}
        add_teacher(settings.out, {**where, **table}, name=name, report=report)
    return open_cache(settings.out) if settings.teachers else cache


def _precompute(
    settings: Precompute,
    overwrite: bool,
    dataset: Dataset | None,
    given: Mapping[str, Any],
    block: int | None,
    report: Report | None,
) -> TeacherCache:
    """Write the cache with its first two teachers; arguments as in `precompute`."""
    with joined() as ranks:
        report = report if report and ranks.first else QUIET
        out, device = open_location(settings.out), choose_device(settings.device)
        autocast(device, settings.clip_precision)  # fails if the device lacks this precision
        interrupted = ranks.from_first(lambda: check_request(settings, out, overwrite, dataset))
        dataset = load_alike(
            lambda: load_request(settings, dataset, report, interrupted), dataset, settings, ranks
        )
        settings = settings.for_size(dataset.image_size)
        training = training_settings(settings, given)
        if not overwrite and ranks.from_first(
            lambda: is_complete(settings, out, dataset, training, report)
        ):
            return open_cache(settings.out)
        if overwrite and out.exists and (lost := added_names(out.sizes())):
            report.log(f"{out} is replaced, and its added teachers are lost: {', '.join(lost)}")
        finder = Finder(settings, dataset, training, device, ranks, report)
        found = finder.find(interrupted=interrupted, given=given, place=out)
        stage = StageOne.of(dataset, *found, block)
        stage.run(out, ranks, report, overwrite=overwrite)
        return open_cache(settings.out)


def add_teacher(
    cache: str | Path,
    given: Mapping[str, Any],
    *,
    name: str = "",
    overwrite: bool = False,
    block: int | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Compute the rows of one more teacher, for the images and views of a cache.

    They are a group of their own below `teachers/`; nothing else in the cache changes. An
    interrupted addition is resumed, and a complete one is left as it is.

    Args:
        cache: a complete cache.
        given: the settings of the teacher, by their names in `Precompute`: `teacher` and
            `teacher_*`, or `clip`, `clip_precision` and `prompts`; and `batch_size`, `device`,
            `data_root` and `dataset` (where the images are now).
        name: of the teacher among those of the cache; by default made from the network's.
        overwrite: replace a teacher of this name.
        block: as in `precompute`.
        report: receives progress.

    Returns:
        The rows of the added teacher.

    Raises:
        RichKDError: anything the user can fix; found before anything that takes long.
        Interrupted: by SIGINT or SIGTERM, after the block that is being computed.
    """
    check_given_teacher(given, "add-teacher")
    with joined() as ranks:
        report = report if report and ranks.first else QUIET
        whole = open_cache(cache)
        settings = addition_settings(whole.manifest, given, whole.location)
        name = name or default_name(settings)
        out, device = place_of(whole.location, name), choose_device(settings.device)
        autocast(device, settings.clip_precision)
        with whole.location.locked() if ranks.first else nullcontext():
            interrupted = ranks.from_first(lambda: check_addition(settings, out, name, overwrite))
            moved = str(given.get("dataset") or "")
            check_moved(whole, moved)
            dataset = ranks.after_first(
                lambda: load_dataset_of(whole, moved, settings.data_root, report)
            )
            if settings.teacher != NO_TEACHER:
                ranks.from_first(lambda: check_head(settings, dataset))
            training = training_settings(settings, {})
            finder = Finder(settings, dataset, training, device, ranks, report)
            found = finder.find(interrupted=interrupted, place=out)
            stage = StageOne.added_to(whole, name, dataset, *found, block)
            if ranks.from_first(lambda: has_teacher(out, stage.manifest, overwrite)):
                report.log(f"{whole.location} already has the teacher {name}")
            else:
                ranks.from_first(lambda: write_group(whole.location))
                stage.run(out, ranks, report, overwrite=overwrite)
        return open_cache(cache).addition(name)


def recompute(
    manifest: Manifest,
    settings: Precompute,
    damaged: Collection[Block] | None,
    *,
    dataset: Dataset | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Compute the missing or damaged blocks of a cache or of an added teacher.

    The CNN teacher keeps its recorded input and class order, and the rules for new caches do not
    apply, as the cache may be older than they are.

    Args:
        manifest: of the cache or of the added teacher, which describes what to compute.
        settings: its recipe, with `out` where the cache is.
        damaged: the blocks of a complete cache to compute again; None for an incomplete cache.
        dataset: the images, if they are already loaded.
        report: receives progress.

    Raises:
        RichKDError: as `precompute`; or the images or teachers are no longer the same.
    """
    name, recorded = manifest.get("addition"), None
    if "teacher" in manifest:
        recorded = TeacherEntry(**{**manifest["teacher"], "input": schema.teacher_input(manifest)})
    with joined() as ranks:
        report = report if report and ranks.first else QUIET
        location, device = open_location(settings.out), choose_device(settings.device)
        whole = None if name is None else open_cache(settings.out)
        out = location if name is None else place_of(location, name)
        autocast(device, settings.clip_precision)
        ranks.from_first(lambda: check_settings(settings, out, overwrite=False))
        dataset = load_alike(
            lambda: load_images(settings, dataset, report), dataset, settings, ranks
        )
        settings = settings.for_size(dataset.image_size)
        training = training_settings(settings, {})
        finder = Finder(settings, dataset, training, device, ranks, report)
        found = finder.find(recorded=recorded, interrupted=manifest, place=out)
        block = manifest["block"]
        if whole is None or name is None:
            stage = StageOne.of(dataset, *found, block)
        else:
            stage = StageOne.added_to(whole, name, dataset, *found, block)
        stage.run(out, ranks, report, damaged=damaged)
        return open_cache(settings.out)


def load_alike(
    load: Callable[[], Dataset], given: Dataset | None, settings: Precompute, ranks: Ranks
) -> Dataset:
    """Load the dataset in rank 0, and then in the other processes as it was loaded there.

    It is not sent: arrays may be large, and tables refer to files of their machine.

    Args:
        load: loads it in rank 0.
        given: the dataset of another process, if it is already loaded.
        settings: which images.
        ranks: of the job.

    Raises:
        RichKDError: what `load` raises, or this process has other images.
    """
    of_first: list[Dataset] = []

    def first() -> tuple[Reading, str]:
        of_first.append(load())
        return Reading.of(of_first[0]), of_first[0].fingerprint

    reading, fingerprint = ranks.from_first(first)
    dataset = ranks.after_first(
        lambda: of_first[0] if of_first else given or reading.load(settings)
    )
    if dataset.fingerprint != fingerprint:
        raise RichKDError(
            f"rank {ranks.rank} sees other images in {dataset.name} than rank 0; every machine of "
            f"the job needs the same files",
            code="rank-files-differ",
        )
    return dataset


@dataclass(frozen=True)
class StageOne:
    """Stage one, ready to run: images, views, teachers, and the manifest of what it writes."""

    dataset: Dataset
    views: NDArray[Any]  # of the training split, [V,N], [V,N,5] or [V,N,k]
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
        views = train.views(settings.augment).draw(settings.seed, len(train), settings.views)
        manifest = make_manifest(dataset, teachers, preview.precision_error, block)
        return cls(dataset, views, teachers, manifest, preview)

    @classmethod
    def added_to(
        cls,
        cache: TeacherCache,
        name: str,
        dataset: Dataset,
        teachers: Teachers,
        preview: Preview,
        block: int | None = None,
    ) -> StageOne:
        """Take the views of a cache, and make the manifest of a teacher that is added to it."""
        views, train = cache.manifest["views"], dataset.train
        space = train.views(views.get("augment", CROP))
        drawn = space.draw(views["seed"], len(train), views["count"])
        kept = cache.read(f"train/{space.array}")
        if not torch.equal(views_tensor(drawn).to(kept.dtype), kept):
            raise RichKDError(
                f"{cache.location} has other views than this version of richkd draws, so no "
                f"teacher can be added to it; write it again with richkd precompute --overwrite",
                code="views-differ",
            )
        manifest = make_addition(cache.manifest, name, teachers, preview.precision_error, block)
        return cls(dataset, drawn, teachers, manifest, preview)

    @property
    def is_addition(self) -> bool:
        """Whether it writes the rows of a teacher that is added to a cache."""
        return "addition" in self.manifest

    def run(
        self,
        out: Location,
        ranks: Ranks,
        report: Report,
        *,
        overwrite: bool = False,
        damaged: Collection[Block] | None = None,
    ) -> None:
        """Write the cache and complete it; arguments as in `open_writer`."""
        self.check_same_teachers(ranks)
        ranks.from_first(lambda: check_room(out, self.manifest, report))
        start = time.perf_counter()
        with self.open(out, ranks, overwrite=overwrite, damaged=damaged) as writer:
            self.write(writer, ranks, report)
            if ranks.first:
                self.complete(writer)
            ranks.wait()
        if not ranks.first:  # whose manifest lacks what the first has counted
            return
        stored = sum(out.sizes().values())
        report.log(closing(writer.manifest, out, stored, time.perf_counter() - start))

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
        views = {schema.view_array(self.manifest)[0]: self.views}
        known = {} if self.is_addition else views | self._kept_sizes()
        if self.teachers.text is not None:
            known[schema.TEXT_ARRAY] = self.teachers.text.numpy()
        if self.teachers.cnn is not None and self.teachers.cnn.probe is not None:
            known |= self.teachers.cnn.probe.arrays
        return open_writer(
            location, self.manifest, known, overwrite=overwrite, damaged=damaged, ranks=ranks
        )

    def _kept_sizes(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the sizes of photographs, whole and as they are kept."""
        arrays: dict[str, NDArray[Any]] = {}
        if "pixels" in self.manifest:
            side = self.manifest["pixels"]["side"]
            for split, sizes in self.dataset.file_sizes.items():
                arrays[f"{split}/{schema.SIZES}"] = sizes.astype(np.int32)
                arrays[f"{split}/{schema.PIXEL_SIZES}"] = reduced_sizes(sizes, side)
        return arrays

    def write(self, writer: StoreWriter, ranks: Ranks = ALONE, report: Report = QUIET) -> None:
        """Compute and write this process's share of the missing blocks.

        A signal waits for the block that is being computed.
        """
        compute = BlockRows(
            self.dataset,
            views_tensor(self.views),
            self.teachers.device,
            self.teachers,
            writer.read,
            self.preview,
            schema.augment_of(self.manifest),
            with_images=not self.is_addition,
            pixels=self.manifest.get("pixels"),
        )
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
        labels, arrays = self.dataset.test.labels, schema.array_specs(manifest)

        def top1(name: str) -> float | None:
            if f"test/{name}" not in arrays:
                return None
            return accuracy(writer.read(f"test/{name}", 0, count), labels, 1)

        if "keep" in manifest:
            fused = "test/fused_logits" in arrays
            logits = writer.read(f"test/{'fused' if fused else 'teacher'}_logits", 0, count)
            manifest["keep_kl"] = kl_errors(logits, manifest["keep"], manifest["keep_temperature"])
        writer.finish(top1("teacher_logits"), top1("clip_similarity"), top1("fused_logits"))


def check_moved(cache: TeacherCache, moved: str) -> None:
    """Raise RichKDError if a place is given for images that are in the cache itself."""
    if moved and cache.manifest["dataset"]["embedded"]:
        raise RichKDError(
            f"dataset = {moved!r}: {cache.location} has its images in itself; leave it out",
            code="setting-of-the-cache",
        )


def has_teacher(out: Location, manifest: Manifest, overwrite: bool) -> bool:
    """Return whether a cache already has a complete teacher of this name and these settings.

    Raises:
        RichKDError: the teacher of this name is another one.
    """
    if overwrite or not out.exists:
        return False
    present = read_manifest(out.name)
    changed = schema.difference(present, manifest)
    if changed is not None:
        raise RichKDError(
            f"{out} holds another teacher of this name ({changed}); choose another --name, or "
            f"replace it with --overwrite",
            code="teacher-exists",
        )
    return present["complete"]


def write_group(location: Location) -> None:
    """Write the metadata of the group that holds a cache's added teachers, if it is missing."""
    file = f"{schema.ADDED}/{METADATA}"
    if file not in location.sizes(schema.ADDED):
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        location.write(file, json.dumps(group, indent=2).encode())


def closing(manifest: Manifest, out: Location, stored: int, seconds: float) -> str:
    """Return stage one's last line, after a line on the cost of keeping only the largest logits."""
    clip, teacher = manifest["clip"], manifest.get("teacher")
    found = {
        "CNN teacher": teacher["accuracy"] if teacher else None,
        "CLIP": clip["accuracy"] if clip else None,
        "fused": manifest["fused_accuracy"],
    }
    shares = [f"{name} {percent(share)} %" for name, share in found.items() if share is not None]
    kept = (
        f"the {manifest['keep']} largest of {len(manifest['class_names']):,} logits per row are "
        f"kept; KL error on the test images: {describe_errors(manifest['keep_kl'])}\n"
        if "keep" in manifest
        else ""
    )
    return (
        f"{kept}{out} is complete: {size(stored)} in {duration(seconds)}; test accuracy: "
        f"{', '.join(shares)}"
    )

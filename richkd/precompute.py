"""Stage one: ask both teachers once, and write what they say to a store.

    data set ─▶ views ─▶ CNN teacher ─┐
       └──────▶ CLIP image + prompts ─┴▶ fusion ─▶ store

Blocks of samples go through in the order of the store's `complete` flags, so the same command goes
on where an earlier one was cut off; writing happens in a thread beside the computing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd import fusion
from richkd.data.datasets import Dataset, Split, load_dataset
from richkd.data.inputs import Inputs, Normalize, make_inputs
from richkd.data.prompts import load_prompts
from richkd.data.views import check_num_views, views_tensor
from richkd.errors import RichKDError
from richkd.files import check_not_held, check_writable, held
from richkd.interrupt import held_back
from richkd.models import check_fit, create_model
from richkd.models.weights import read_safetensors
from richkd.progress import Report, duration, percent, size
from richkd.recipe import Precompute, TrainTeacher, resolve, to_table
from richkd.store import schema
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import Block, Manifest
from richkd.store.writer import StoreWriter, check_target
from richkd.teachers.clip import ClipTeacher, check_clip, load_clip
from richkd.teachers.cnn import CNNTeacher, load_teacher, train_teacher
from richkd.training.device import choose_device, versions
from richkd.training.loop import accuracy

PREVIEWED = 256  # test images that CLIP sees before anything long


def precompute(
    settings: Precompute,
    *,
    overwrite: bool = False,
    dataset: Dataset | None = None,
    teacher_recipe: Mapping[str, Any] | None = None,
    redo: Collection[Block] | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Run both teachers over a data set and write the store.

    Args:
        settings: what to compute.
        overwrite: replace a store that is there.
        dataset: the images, where they are at hand; else `settings` say which to load.
        teacher_recipe: settings of the teacher's training, where one has to be trained.
        redo: the store is complete but for these blocks, which are damaged.
        report: where progress goes.

    Raises:
        RichKDError: anything the user can mend; found before anything long starts.
        Interrupted: by SIGINT or SIGTERM, after the block in hand.
    """
    report = report or Report(quiet=True)
    out = Path(settings.out)
    device = choose_device(settings.device)
    check_writable(out)
    check_not_held(out)
    check_target(out, overwrite, repairing=redo is not None)
    check_clip(settings.clip)
    templates = load_prompts(settings.prompts)
    check_given(settings)
    dataset = dataset or load_dataset(settings, report=report)
    settings = settings.for_size(dataset.image_size)
    training = resolve(TrainTeacher, dict(teacher_recipe or {}), {
        "dataset": settings.dataset, "limit": settings.limit, "data_root": settings.data_root,
        "image_size": settings.image_size, "model": settings.teacher, "device": settings.device,
    })  # fmt: skip
    weights = teacher_weights(settings, training)
    space = dataset.train.view_space
    check_num_views(settings.views, space.limit)
    report.say(f"{describe(dataset)}; fingerprint {dataset.fingerprint[:12]}")
    say_left_out(dataset, report)

    def load(weights: Path) -> CNNTeacher:
        normalize = Normalize(dataset.mean, dataset.std, device)
        return load_teacher(settings.teacher, weights, len(dataset.class_names),
                            dataset.image_size, normalize, device)  # fmt: skip

    if weights is None:
        model = create_model(
            settings.teacher, len(dataset.class_names), image_size=dataset.image_size
        )
        check_fit(model, settings.teacher, dataset.image_size, len(dataset.class_names))
    else:
        if not settings.teacher_weights:
            check_trained_on(weights, dataset)
        teacher = load(weights)
    clip = open_clip_teacher(settings.clip, device, report)
    text = clip.text_embeddings(dataset.class_names, templates) if clip else None
    if clip is not None and text is not None:
        preview(clip, text, templates, dataset, device, report)
    if weights is None:
        report.say(
            f"no --teacher-weights given and none at {training.out}: training the teacher, "
            f"{settings.teacher}, first"
        )
        train_teacher(training, dataset, report)
        teacher = load(Path(training.out))
    manifest = make_manifest(settings, dataset, teacher, clip, text, templates)
    check_room(out, manifest, report)

    views = space.draw(settings.seed, len(dataset.train), settings.views)
    inputs = {
        "train": make_inputs(dataset.train.images, device),
        "test": make_inputs(dataset.test.images, device),
    }
    started = time.perf_counter()
    with held(out):
        with StoreWriter.open(out, manifest, overwrite, redo) as writer:
            writer.put(f"train/{space.array}", views)
            if text is not None:
                writer.put("text/embeddings", text.cpu().numpy())
            rows = BlockComputer(
                settings, dataset, inputs, views_tensor(views), teacher, clip, text
            )
            write_blocks(writer, rows, report)
        finish(writer, manifest)
    cache = open_cache(out)
    report.say(closing(cache, time.perf_counter() - started))
    return cache


def write_blocks(writer: StoreWriter, compute: BlockComputer, report: Report) -> None:
    """Compute and write what is not done yet; signals wait for the block in hand."""
    todo = [block for block, done in zip(writer.blocks, writer.done, strict=True) if not done]
    count = len(writer.blocks)
    if len(todo) < count:
        report.say(f"going on: {count - len(todo)} of {count} blocks are there already")
    total = sum(block.stop - block.start for block in todo)
    with held_back() as check_stopped, report.track("precompute", total, "images") as tick:
        for number, block in enumerate(todo, 1):
            writer.write(block, compute(block, writer))
            tick(block.stop - block.start)
            if block.split == "test" and compute.tested == len(compute.splits["test"]):
                report.say(f"CLIP zero-shot: {percent(compute.zero_shot)} % of the test images")
            check_stopped(
                f"stopped with {count - len(todo) + number} of {count} blocks written; the same "
                f"command goes on"
            )


class BlockComputer:
    """The rows of a block, by the teachers."""

    def __init__(
        self,
        settings: Precompute,
        dataset: Dataset,
        inputs: Mapping[str, Inputs],
        views: Tensor,
        teacher: CNNTeacher,
        clip: ClipTeacher | None,
        text: Tensor | None,
    ) -> None:
        self.settings = settings
        self.splits: dict[str, Split] = {"train": dataset.train, "test": dataset.test}
        self.inputs = inputs
        self.views = views  # [V,N,…]
        self.teacher = teacher
        self.clip = clip
        self.classes = None if text is None else fusion.class_embeddings(text)
        self._similarity: tuple[Block, Tensor] | None = None  # of the last block of clean images
        self._hits: list[Tensor] = []

    @property
    def tested(self) -> int:
        """How many test images CLIP has seen here."""
        return sum(len(hits) for hits in self._hits)

    @property
    def zero_shot(self) -> float:
        """Top-1 of CLIP over those, in 0..1."""
        return float(torch.cat(self._hits).float().mean())

    def __call__(self, block: Block, writer: StoreWriter) -> dict[str, Tensor]:
        """The arrays of a block by name, without the split."""
        rows: dict[str, Tensor] = {}
        split = self.splits[block.split]
        if block.view is None:
            rows["labels"] = split.labels[block.start : block.stop]
            if isinstance(split.images, Tensor):
                rows["images"] = split.images[block.start : block.stop]
            if self.clip is not None:
                rows |= self._clip_rows(self.clip, block)
        if block.split == "test":
            clean = views_tensor(split.view_space.clean(len(split)))
            rows |= self._teacher_rows(block, clean, writer)
        elif block.view is not None:
            rows |= self._teacher_rows(block, self.views[block.view], writer)
        return rows

    def _clip_rows(self, clip: ClipTeacher, block: Block) -> dict[str, Tensor]:
        features = clip.image_features(
            self.inputs[block.split], block.start, block.stop, self.settings.batch_size
        )
        assert self.classes is not None
        similarity = fusion.clip_similarity(features, self.classes)
        self._similarity = (block, similarity)
        if block.split == "test":
            labels = self.splits["test"].labels[block.start : block.stop]
            self._hits.append(similarity.argmax(1).cpu() == labels)
        return {"clip_features": features, "clip_similarity": similarity}

    def _teacher_rows(self, block: Block, views: Tensor, writer: StoreWriter) -> dict[str, Tensor]:
        order = torch.arange(block.start, block.stop)
        parts = [
            self.teacher.rows(images)
            for _, images in self.inputs[block.split].batches(
                order, views, self.settings.batch_size
            )
        ]
        logits, features = (torch.cat(part) for part in zip(*parts, strict=True))
        rows = {"teacher_logits": logits, "teacher_features": features}
        if self.clip is not None:
            scale = fusion.resolve_scale(self.settings.scale, self.clip.logit_scale)
            similarity = self._similarity_of(block, writer).to(logits.device)
            rows["fused_logits"] = fusion.fuse_logits(
                logits, similarity, self.settings.alpha, scale
            )
        return rows

    def _similarity_of(self, block: Block, writer: StoreWriter) -> Tensor:
        """CLIP's cosines of the block's samples: just computed, or written by an earlier run."""
        span = (block.split, block.start, block.stop)
        if self._similarity is not None:
            known, similarity = self._similarity
            if (known.split, known.start, known.stop) == span:
                return similarity
        similarity = writer.read(f"{block.split}/clip_similarity", block.start, block.stop)
        self._similarity = (replace(block, view=None), similarity)
        return similarity


def check_given(settings: Precompute) -> None:
    """Refuse teacher weights that are given and not there, before any image is read."""
    path = Path(settings.teacher_weights)
    if settings.teacher_weights and not path.is_file():
        raise RichKDError(
            f"no teacher weights at {path}; pass a file of {settings.teacher or 'its'} weights, or "
            f"leave --teacher-weights out to train one"
        )


def say_left_out(dataset: Dataset, report: Report) -> None:
    """Name the files of a folder that are not in the data set."""
    for path in dataset.skipped:
        report.say(f"left out, for it is no whole image: {path}")
    if dataset.ignored:
        report.say(
            f"ignored, for they are not called images: {len(dataset.ignored)} files, "
            f"{dataset.ignored[0]} among them"
        )


def preview(
    clip: ClipTeacher, text: Tensor, templates: tuple[str, ...], dataset: Dataset,
    device: torch.device, report: Report,
) -> None:  # fmt: skip
    """Say, before anything long, what CLIP will be asked and how well it answers so far."""
    names = dataset.class_names
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    report.say(f"classes: {shown}")
    asked = "; ".join(template.replace("{}", names[0]) for template in templates[:3])
    more = f"; and {len(templates) - 3} more" if len(templates) > 3 else ""
    report.say(f"prompts a class: {len(templates)}: {asked}{more}")
    count = min(PREVIEWED, len(dataset.test))
    inputs = make_inputs(dataset.test.first(count).images, device)
    similarity = fusion.clip_similarity(
        clip.image_features(inputs, 0, count, PREVIEWED), fusion.class_embeddings(text)
    )
    top1 = accuracy(similarity.cpu(), dataset.test.labels[:count], 1)
    report.say(f"CLIP zero-shot on {count} of the test images: {percent(top1)} % (chance "
               f"{percent(1 / len(names))} %)")  # fmt: skip


def teacher_weights(settings: Precompute, training: TrainTeacher) -> Path | None:
    """The teacher's weights: those given, else those trained before, else None."""
    if settings.teacher_weights:
        return Path(settings.teacher_weights)
    trained = Path(training.out)
    return trained if trained.is_file() else None


def check_trained_on(weights: Path, dataset: Dataset) -> None:
    """Refuse a teacher that was found by its name and learnt from other data.

    Raises:
        RichKDError: its metadata names another fingerprint, or none.
    """
    trained_on = read_safetensors(weights)[1].get("fingerprint", "nothing that it names")
    if trained_on != dataset.fingerprint:
        raise RichKDError(
            f"{weights} was trained on other data ({trained_on[:12]}) than {dataset.name} "
            f"({dataset.fingerprint[:12]}); pass it as --teacher-weights to use it all the same, "
            f"or move it away to train another"
        )


def open_clip_teacher(name: str, device: torch.device, report: Report) -> ClipTeacher | None:
    """The CLIP of a name; `demo` is trained first where it is not there, `none` is None."""
    if name == "none":
        return None
    if name == "demo":
        from richkd.teachers.demo_clip import demo_clip

        name = str(demo_clip(report))
    return load_clip(name, device)


def make_manifest(
    settings: Precompute,
    dataset: Dataset,
    teacher: CNNTeacher,
    clip: ClipTeacher | None,
    text: Tensor | None,
    templates: tuple[str, ...],
) -> Manifest:
    """Everything that is known before the first block."""
    widest = max(len(dataset.class_names), teacher.num_features)
    images = schema.DatasetEntry(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        num_train=len(dataset.train),
        num_test=len(dataset.test),
        embedded=isinstance(dataset.train.images, Tensor),
    )
    if dataset.skipped:
        images["skipped"] = list(dataset.skipped)
    return Manifest(
        format=schema.FORMAT,
        schema=schema.SCHEMA,
        complete=False,
        dataset=images,
        class_names=list(dataset.class_names),
        image_size=dataset.image_size,
        mean=list(dataset.mean),
        std=list(dataset.std),
        views={
            "space": dataset.train.view_space.name,
            "count": settings.views,
            "seed": settings.seed,
        },
        teacher={
            "name": teacher.name,
            "sha256": teacher.sha256,
            "num_features": teacher.num_features,
            "accuracy": None,
        },
        clip=None
        if clip is None or text is None
        else {
            "model": settings.clip,
            "sha256": clip.sha256,
            "logit_scale": clip.logit_scale,
            "num_features": text.shape[-1],
            "accuracy": None,
        },
        prompts=list(templates) if clip else [],
        alpha=settings.alpha,
        scale=settings.scale,
        fused_accuracy=None,
        dtype=settings.dtype,
        keep_bits=settings.keep_bits,
        block=schema.choose_block(widest, settings.dtype),
        recipe=to_table(settings),
        versions=versions(),
        checksums=None,
        seal=None,
    )


def check_room(out: Path, manifest: Manifest, report: Report) -> None:
    """Say how big the store will be, and refuse to start on a disk without room for it.

    Raises:
        RichKDError: the disk has less room than the uncompressed arrays need.
    """
    wanted = schema.raw_bytes(manifest)
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    views = manifest["views"]["count"]
    report.say(f"{out}: {size(wanted)} of arrays before compression, {views} views; "
               f"{size(free)} are free")  # fmt: skip
    if wanted > free and not out.exists():
        raise RichKDError(
            f"{out} needs {size(wanted)} and {folder} has {size(free)} free; make room, choose "
            f"fewer --views, or another --out"
        )


def finish(writer: StoreWriter, manifest: Manifest) -> None:
    """Count the accuracies from the stored rows and mark the store complete."""
    count = manifest["dataset"]["num_test"]
    labels = writer.read("test/labels", 0, count)

    def top1(name: str) -> float:
        return accuracy(writer.read(f"test/{name}", 0, count), labels, 1)

    has_clip = manifest["clip"] is not None
    writer.finish(
        top1("teacher_logits"),
        top1("clip_similarity") if has_clip else None,
        top1("fused_logits") if has_clip else None,
    )


def describe(dataset: Dataset) -> str:
    """A data set in one line."""
    return (
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images "
        f"of {dataset.image_size}×{dataset.image_size}, {len(dataset.class_names)} classes"
    )


def closing(cache: TeacherCache, seconds: float) -> str:
    """The last line of stage one."""
    manifest = cache.manifest
    clip = manifest["clip"]
    stored = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    blend = (
        f", CLIP {percent(clip['accuracy'])} %, fused {percent(manifest['fused_accuracy'])} %"
        if clip
        else ""
    )
    return (
        f"{cache.path} is complete: {size(stored)} in {duration(seconds)}; test accuracy: CNN "
        f"teacher {percent(manifest['teacher']['accuracy'])} %{blend}"
    )

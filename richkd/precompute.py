"""Stage one: ask both teachers once, and write what they say to a store.

    data set ─▶ views ─▶ CNN teacher ─┐
       └──────▶ CLIP image + prompts ─┴▶ fusion ─▶ store

Work goes in blocks of samples, each with a flag in the store, so the same command goes on where an
earlier one was cut off. Under torchrun the processes share the blocks; the first of them makes the
store and completes it. Writing happens in a thread beside the computing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from richkd import fusion
from richkd.data.datasets import Dataset, load_dataset
from richkd.data.framing import NetworkInput
from richkd.data.inputs import make_inputs
from richkd.data.prompts import load_prompts
from richkd.data.views import PadCropFlip, check_num_views, views_tensor
from richkd.errors import RichKDError
from richkd.interrupt import held_back, not_in_between
from richkd.models import check_fit, create_model
from richkd.models.weights import read_note
from richkd.progress import Report, duration, percent, size
from richkd.ranks import Ranks, joined
from richkd.recipe import Precompute, TrainTeacher, resolve, to_table
from richkd.store import schema
from richkd.store.place import Folder, Place, open_place
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import Block, Manifest
from richkd.store.topk import check_keep, kl_errors, say_errors
from richkd.store.writer import StoreWriter, check_target
from richkd.teachers.clip import ClipTeacher, check_clip, load_clip
from richkd.teachers.cnn import CNNTeacher, load_teacher, train_teacher
from richkd.teachers.framing import check_from_elsewhere, check_unsaid, resolve_input
from richkd.teachers.rows import BlockRows, Teachers
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
    teacher_input: NetworkInput | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Run both teachers over a data set and write the store.

    Args:
        settings: what to compute.
        overwrite: replace a store that is there.
        dataset: the images, where they are at hand; else `settings` say which to load.
        teacher_recipe: settings of the teacher's training, where one has to be trained.
        redo: the store is complete but for these blocks, which are damaged.
        teacher_input: what the CNN teacher takes, where a store says so; else it is resolved.
        report: where progress goes.

    Raises:
        RichKDError: anything the user can mend; found before anything long starts.
        Interrupted: by SIGINT or SIGTERM, after the block in hand.
    """
    with joined() as ranks:
        report = report if report and ranks.first else Report(quiet=True)
        out = open_place(settings.out)
        device = choose_device(settings.device)
        dataset = ranks.from_first(
            lambda: look_ahead(settings, out, overwrite, redo, dataset, report)
        )
        check_same_files(dataset, ranks)
        settings = settings.for_size(dataset.image_size)
        teacher, clip, text = make_teachers(
            settings, dataset, teacher_input, teacher_recipe or {}, device, ranks, report
        )
        manifest = make_manifest(settings, dataset, teacher, clip, text)
        views = dataset.train.view_space.draw(settings.seed, len(dataset.train), settings.views)
        first = ranks.from_first(lambda: manifest)
        check_same_teachers(first, manifest, ranks)

        def begin() -> StoreWriter:
            check_room(out, manifest, report)
            with not_in_between():
                return begin_store(out, manifest, views, text, overwrite, redo)

        started = time.perf_counter()
        with out.held() if ranks.first else nullcontext():
            with open_writer(begin, out, manifest, ranks) as writer:
                classes = None if text is None else fusion.class_embeddings(text)
                teachers = Teachers(settings, teacher, clip, classes)
                blocks = BlockRows(dataset, views_tensor(views), device, teachers, writer)
                again = "same command" if redo is None else "richkd precompute that made it"
                write_blocks(writer, blocks, ranks, report, again)
            if ranks.first:
                finish(writer, manifest)
            ranks.wait()
        cache = open_cache(settings.out)
        report.say(closing(cache, time.perf_counter() - started))
        return cache


def look_ahead(
    settings: Precompute,
    out: Place,
    overwrite: bool,
    redo: Collection[Block] | None,
    dataset: Dataset | None,
    report: Report,
) -> Dataset:
    """Refuse what can be refused before anything long, and read the data set."""
    out.check_writable()
    out.check_not_held()
    check_target(out, overwrite, repairing=redo is not None)
    check_clip(settings.clip)
    load_prompts(settings.prompts)
    check_given(settings)
    check_from_elsewhere(settings)
    check_unsaid(settings, Path(settings.teacher_weights))
    dataset = dataset or load_dataset(settings, report=report)
    check_counts(settings, dataset)
    report.say(f"{describe(dataset)}; fingerprint {dataset.fingerprint[:12]}")
    say_left_out(dataset, report)
    return dataset


def make_teachers(
    settings: Precompute,
    dataset: Dataset,
    teacher_input: NetworkInput | None,
    teacher_recipe: Mapping[str, Any],
    device: torch.device,
    ranks: Ranks,
    report: Report,
) -> tuple[CNNTeacher, ClipTeacher | None, Tensor | None]:
    """Both teachers, the CNN one trained first where there is none, and the text embeddings."""
    training = resolve(TrainTeacher, dict(teacher_recipe), {
        "dataset": settings.dataset, "limit": settings.limit, "data_root": settings.data_root,
        "image_size": settings.image_size, "model": settings.teacher, "device": settings.device,
        "validation": settings.validation,
    })  # fmt: skip
    weights = ranks.from_first(lambda: teacher_weights(settings, training))

    def load(weights: Path) -> CNNTeacher:
        found = teacher_input or resolve_input(settings, weights, dataset, report)
        return load_teacher(settings.teacher, weights, len(dataset.class_names), found, device)

    if weights is None:
        model = create_model(
            settings.teacher, len(dataset.class_names), image_size=dataset.image_size
        )
        check_fit(model, settings.teacher, dataset.image_size, len(dataset.class_names))
    else:
        if settings.teacher_weights:
            say_what_it_learnt(weights, dataset, report)
        else:
            check_trained_on(weights, dataset)
        teacher = load(weights)
    clip = open_clip_teacher(settings.clip, device, ranks, report)
    text = None
    if clip is not None:
        templates = load_prompts(settings.prompts)
        text = clip.text_embeddings(dataset.class_names, templates)
        if ranks.first:
            preview(clip, text, templates, dataset, device, report)
    if weights is None:
        report.say(
            f"no --teacher-weights given and none at {training.out}: training the teacher, "
            f"{settings.teacher}, first"
        )
        ranks.from_first(lambda: train_teacher(training, dataset, report))
        teacher = load(Path(training.out))
    return teacher, clip, text


def check_same_files(dataset: Dataset, ranks: Ranks) -> None:
    """Refuse a machine on which a folder of images is not what the first process read.

    Raises:
        RichKDError: that is so; one process of each machine looks.
    """
    if ranks.first or not ranks.first_here or isinstance(dataset.train.images, Tensor):
        return
    try:
        same = replace(dataset).fingerprint == dataset.fingerprint  # of the files, not as told
    except OSError:
        same = False
    if not same:
        raise RichKDError(
            f"rank {ranks.rank} sees other files in {dataset.name} than rank 0; every machine of "
            f"the job needs the same ones"
        )


def check_same_teachers(first: Manifest, own: Manifest, ranks: Ranks) -> None:
    """Refuse a process that loaded other weights than the first one, from its own disk.

    Raises:
        RichKDError: that is so.
    """
    different = schema.difference(first, own)
    if different is not None:
        raise RichKDError(
            f"rank {ranks.rank} would write another store than rank 0: {different}; every machine "
            f"of the job needs the same weights at the same paths"
        )


def open_writer(
    begin: Callable[[], StoreWriter], out: Place, manifest: Manifest, ranks: Ranks
) -> StoreWriter:
    """A writer of the store that the first process begins, and what is done in it already."""
    begun: list[StoreWriter] = []

    def first() -> tuple[list[bool], str | None]:
        begun.append(begin())
        return begun[0].done, out.token

    done, token = ranks.from_first(first)
    if begun:
        return begun[0]
    if not out.exists:
        raise RichKDError(
            f"rank {ranks.rank} sees no store at {out}, where rank 0 made it; name a folder that "
            f"all machines share, or object storage (s3://…)"
        )
    out.follow(token)
    return StoreWriter(out, manifest, done)


def begin_store(
    out: Place,
    manifest: Manifest,
    views: NDArray[Any],
    text: Tensor | None,
    overwrite: bool = False,
    redo: Collection[Block] | None = None,
) -> StoreWriter:
    """A store with what is known before the first block; arguments as of `StoreWriter.open`."""
    writer = StoreWriter.open(out, manifest, overwrite, redo)
    ids = manifest["views"]["space"] == PadCropFlip.name
    writer.put("train/view_ids" if ids else "train/view_params", views)
    if text is not None:
        writer.put("text/embeddings", text.cpu().numpy())
    return writer


def write_blocks(
    writer: StoreWriter, compute: BlockRows, ranks: Ranks, report: Report,
    again: str = "same command",
) -> None:  # fmt: skip
    """Compute and write what is not done yet; signals wait for the block in hand.

    `again` says which command goes on where this one was stopped.
    """
    todo = [block for block, done in zip(writer.blocks, writer.done, strict=True) if not done]
    count, written = len(writer.blocks), 0
    if len(todo) < count:
        report.say(f"going on: {count - len(todo)} of {count} blocks are there already")
    phases = [ranks.own(units) for units in compute.phases(todo)]
    own = [block for units in phases for unit in units for block in unit]
    total = sum(block.stop - block.start for block in own)
    with (
        held_back() as check_stopped,
        report.track(f"precompute{ranks.task}", total, "images") as tick,
    ):

        def check() -> None:
            check_stopped(
                f"stopped with {count - len(todo) + written} of {count} blocks written; the "
                f"{again} goes on" if ranks.world == 1 else
                f"rank {ranks.rank} stopped with {written} of its {len(own)} blocks written; the "
                f"same job goes on"
            )  # fmt: skip

        for units in phases:
            for block, rows in compute(units, tick, check):
                writer.write(block, rows)
                written += 1
                check()
            writer.flush()  # the next phase reads what this one wrote, whoever wrote it
            ranks.wait()
            if ranks.first and any(block.split == "test" for unit in units for block in unit):
                compute.say_zero_shot(report)


def check_given(settings: Precompute) -> None:
    """Refuse teacher weights that are given and not there, before any image is read."""
    path = Path(settings.teacher_weights)
    if settings.teacher_weights and not path.is_file():
        raise RichKDError(
            f"no teacher weights at {path}; pass a file of {settings.teacher or 'its'} weights, or "
            f"leave --teacher-weights out to train one"
        )


def check_counts(settings: Precompute, dataset: Dataset) -> None:
    """Refuse more views than there are, and to keep as many logits as there are classes."""
    check_num_views(settings.views, dataset.train.view_space.limit)
    if settings.top_k is not None:
        check_keep(settings.top_k, len(dataset.class_names))


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
    trained_on = read_note(weights).get("fingerprint", "nothing that it names")
    if trained_on != dataset.fingerprint:
        raise RichKDError(
            f"{weights} was trained on other data ({trained_on[:12]}) than {dataset.name} "
            f"({dataset.fingerprint[:12]}); pass it as --teacher-weights to use it all the same, "
            f"or move it away to train another"
        )


def say_what_it_learnt(weights: Path, dataset: Dataset, report: Report) -> None:
    """Say where a teacher from elsewhere may have been trained on the validation images."""
    if dataset.validation is None:
        return
    note = read_note(weights) if weights.suffix == ".safetensors" else {}
    if note.get("fingerprint") != dataset.fingerprint:
        report.say(
            f"{weights} may have been trained on the validation images, too; if so, alpha auto "
            f"trusts the CNN teacher too much: train one on the others by leaving "
            f"--teacher-weights out"
        )


def open_clip_teacher(
    name: str, device: torch.device, ranks: Ranks, report: Report
) -> ClipTeacher | None:
    """The CLIP of a name; `demo` is trained first where it is not there, `none` is None."""
    if name == "none":
        return None
    if name == "demo":
        from richkd.teachers.demo_clip import demo_clip

        name = str(ranks.from_first(lambda: demo_clip(report)))
    return load_clip(name, device)


def make_manifest(
    settings: Precompute,
    dataset: Dataset,
    teacher: CNNTeacher,
    clip: ClipTeacher | None,
    text: Tensor | None,
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
    if dataset.validation is not None:
        images |= {"validation": settings.validation, "num_validation": len(dataset.validation)}
    manifest = Manifest(
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
            "input": teacher.input.entry,
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
        prompts=list(load_prompts(settings.prompts)) if clip else [],
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
    if settings.top_k is not None:
        manifest |= {"keep": settings.top_k, "keep_temperature": settings.keep_temperature}
    return manifest


def check_room(out: Place, manifest: Manifest, report: Report) -> None:
    """Say how big the store will be, and refuse to start on a disk without room for it.

    Raises:
        RichKDError: the disk has less room than the uncompressed arrays need.
    """
    wanted = schema.raw_bytes(manifest)
    expected = f"{out}: {size(wanted)} of arrays before compression"
    expected += f", {manifest['views']['count']} views"
    if not isinstance(out, Folder):
        report.say(expected)
        return
    folder = next(parent for parent in out.path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    report.say(f"{expected}; {size(free)} are free")
    if wanted > free and not out.path.exists():
        raise RichKDError(
            f"{out} needs {size(wanted)} and {folder} has {size(free)} free; make room, choose "
            f"fewer --views, or another --out"
        )


def finish(writer: StoreWriter, manifest: Manifest) -> None:
    """Count accuracies and errors from the stored test rows and mark the store complete."""
    count = manifest["dataset"]["num_test"]
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


def describe(dataset: Dataset) -> str:
    """A data set in one line."""
    counts = schema.say_splits({name: len(split) for name, split in dataset.splits.items()})
    side = dataset.image_size
    return f"{dataset.name}: {counts} images of {side}×{side}, {len(dataset.class_names)} classes"


def closing(cache: TeacherCache, seconds: float) -> str:
    """The last line of stage one; before it, what it cost to keep the largest logits only."""
    manifest = cache.manifest
    clip = manifest["clip"]
    stored = sum(cache.place.sizes().values())
    blend = (
        f", CLIP {percent(clip['accuracy'])} %, fused {percent(manifest['fused_accuracy'])} %"
        if clip
        else ""
    )
    kept = (
        f"of {cache.num_classes:,} logits a row the {manifest['keep']} largest are kept; KL error "
        f"on the test images: {say_errors(manifest['keep_kl'])}\n"
        if "keep" in manifest
        else ""
    )
    return (
        f"{kept}{cache.place} is complete: {size(stored)} in {duration(seconds)}; test accuracy: "
        f"CNN teacher {percent(manifest['teacher']['accuracy'])} %{blend}"
    )

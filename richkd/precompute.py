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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from richkd.config.settings import Precompute, TrainTeacher, check_resume, resolve, to_table
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError
from richkd.core.fusion import class_embeddings
from richkd.core.interrupts import deferred, uninterrupted
from richkd.core.progress import Report, duration, percent, size
from richkd.core.ranks import Ranks, joined
from richkd.core.versions import versions
from richkd.data.class_names import check_distinct, class_words
from richkd.data.datasets import Dataset, check_class_names, introduce, load_dataset
from richkd.data.framing import NetworkInput
from richkd.data.inputs import make_inputs
from richkd.data.prompts import load_prompts
from richkd.data.views import PadCropFlip, check_num_views, views_tensor
from richkd.models import check_fit, check_trainable, create_model
from richkd.models.weights import check_weights, file_sha256, read_note
from richkd.store import schema
from richkd.store.folder import Folder
from richkd.store.location import Location
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import Block, Manifest, PrecisionError, TeacherEntry, describe_errors
from richkd.store.topk import check_keep, kl_errors
from richkd.store.writer import StoreWriter, check_target
from richkd.teachers.class_order import (
    LOOKED_AT,
    check_teacher_classes,
    given_outputs,
    preview_teacher,
    resolve_outputs,
)
from richkd.teachers.clip import (
    ClipTeacher,
    autocast,
    check_clip,
    load_clip,
    local_folder,
    precision_error,
)
from richkd.teachers.cnn import (
    CNNTeacher,
    Outputs,
    check_output,
    difference,
    load_teacher,
    train_teacher,
)
from richkd.teachers.framing import check_from_elsewhere, check_unsaid, resolve_input
from richkd.teachers.rows import BlockRows, Preview, Teachers, batch_size
from richkd.training.device import choose_device
from richkd.training.run_folder import TeacherFolder

# Settings that do not change what is in the store; weights and images are compared by content.
NOT_IN_STORE = {"device", "batch_size", "data_root", "out", "teacher_weights", "dataset"}


def precompute(
    settings: Precompute,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dataset: Dataset | None = None,
    teacher_recipe: Mapping[str, Any] | None = None,
    redo: Collection[Block] | None = None,
    recorded: TeacherEntry | None = None,
    report: Report | None = None,
) -> TeacherCache:
    """Run both teachers over a data set and write the store.

    A store that was begun is resumed, and one that is complete is left as it is.

    Args:
        settings: what to compute.
        resume: changes nothing, for resuming is the default; it contradicts `overwrite`.
        overwrite: replace a store that is there.
        dataset: the images, where they are at hand; else `settings` say which to load.
        teacher_recipe: settings of the teacher's training, where one has to be trained.
        redo: the store is complete but for these blocks, which are damaged.
        recorded: what the store says of the CNN teacher, where it is to be the same again: what it
            takes, and the order of its classes; else both are resolved.
        report: where progress goes.

    Raises:
        RichKDError: anything the user can mend; found before anything long starts.
        Interrupted: by SIGINT or SIGTERM, after the block in hand.
    """
    check_resume(resume, overwrite)
    with joined() as ranks:
        report = report if report and ranks.first else Report(quiet=True)
        out = open_location(settings.out)
        device = choose_device(settings.device)
        autocast(device, settings.clip_precision)  # which the device may not have
        dataset, begun = ranks.from_first(
            lambda: look_ahead(settings, out, overwrite, recorded is not None, dataset, report)
        )
        settings = settings.for_size(dataset.image_size)
        training = training_settings(settings, teacher_recipe or {})
        if (
            not overwrite
            and redo is None
            and ranks.from_first(lambda: is_complete(settings, out, dataset, training, report))
        ):
            return open_cache(settings.out)
        check_same_files(dataset, ranks)
        teacher, clip, text, seen = make_teachers(
            settings,
            dataset,
            recorded,
            begun,
            training,
            teacher_recipe or {},
            device,
            ranks,
            report,
        )
        manifest = make_manifest(settings, dataset, teacher, clip, text, seen.precision_error)
        views = dataset.train.view_space.draw(settings.seed, len(dataset.train), settings.views)
        first = ranks.from_first(lambda: manifest)
        check_same_teachers(first, manifest, ranks)

        def begin() -> StoreWriter:
            check_room(out, manifest, report)
            with uninterrupted():
                return begin_store(out, manifest, views, text, overwrite, redo)

        started = time.perf_counter()
        with out.locked() if ranks.first else nullcontext():
            with open_writer(begin, out, manifest, ranks) as writer:
                classes = None if text is None else fusion.class_embeddings(text)
                teachers = Teachers(settings, teacher, clip, classes)
                blocks = BlockRows(dataset, views_tensor(views), device, teachers, writer, seen)
                again = "same command" if redo is None else "richkd precompute that made it"
                write_blocks(writer, blocks, ranks, report, again)
            if ranks.first:
                finish(writer, manifest)
            ranks.wait()
        cache = open_cache(settings.out)
        report.log(closing(cache, time.perf_counter() - started))
        return cache


def look_ahead(
    settings: Precompute,
    out: Location,
    overwrite: bool,
    repairing: bool,
    dataset: Dataset | None,
    report: Report,
) -> tuple[Dataset, Mapping[str, Any] | None]:
    """Refuse what can be refused before anything long, and read the data set.

    Returns:
        It, and the manifest of the store to go on with, where there is one.
    """
    out.check_writable()
    out.check_unlocked()
    begun = check_target(out, overwrite)
    check_clip(settings.clip)
    load_prompts(settings.prompts)
    if dataset is None:
        check_class_names(settings)
    if not repairing:  # a store may be older than these rules
        check_trainable(settings.teacher, settings.teacher_weights)
        check_teacher_classes(settings)
    check_given(settings)
    check_from_elsewhere(settings)
    check_unsaid(settings, Path(settings.teacher_weights))
    dataset = dataset or load_dataset(settings, report=report)
    check_counts(settings, dataset)
    introduce(dataset, report)
    if not repairing:
        if settings.clip != "none":
            check_distinct(dataset.class_names)
        if settings.teacher_classes:
            given_outputs(settings, dataset)
    return dataset, begun


def training_settings(settings: Precompute, recipe: Mapping[str, Any]) -> TrainTeacher:
    """How the CNN teacher is trained where there are no weights of it."""
    return resolve(
        TrainTeacher,
        dict(recipe),
        {
            "dataset": settings.dataset,
            "limit": settings.limit,
            "data_root": settings.data_root,
            "image_size": settings.image_size,
            "model": settings.teacher,
            "device": settings.device,
            "validation": settings.validation,
        },
    )


def is_complete(
    settings: Precompute, out: Location, dataset: Dataset, training: TrainTeacher, report: Report
) -> bool:
    """Whether the store is there already, from these very images and teachers.

    A CLIP that is published under its name, and the demo's own, are known by it; one of a folder is
    loaded and compared.

    Raises:
        RichKDError: it is there, and was made otherwise.
    """
    if not out.exists or not read_manifest(out.name)["complete"]:
        return False
    manifest = open_cache(out.name).manifest
    remedy = "choose another --out, or replace it with --overwrite"
    check_same_settings(manifest, settings, out, remedy)
    pairs: list[tuple[str, object, object]] = [
        ("fingerprint of the images", manifest["dataset"]["fingerprint"], dataset.fingerprint),
        ("image_size", manifest["image_size"], dataset.image_size),
        ("mean of the images", manifest["mean"], list(dataset.mean)),
        ("std of the images", manifest["std"], list(dataset.std)),
        ("classes", manifest["class_names"], list(dataset.class_names)),
        ("files left out", manifest["dataset"].get("skipped", []), list(dataset.skipped)),
    ]
    weights = teacher_weights(settings, training)
    said = ""
    if weights is None:
        said = f"; its teacher is not at {training.out} any more and was not compared"
    else:
        pairs.append(("teacher.sha256", manifest["teacher"]["sha256"], file_sha256(weights)))
    clip = manifest["clip"]
    if clip is not None:
        pairs.append(("prompts", manifest["prompts"], list(load_prompts(settings.prompts))))
        if local_folder(settings.clip) is not None:
            loaded = load_clip(settings.clip, torch.device("cpu"))
            pairs.append(("clip.sha256", clip["sha256"], loaded.sha256))
    for name, was, now in pairs:
        if was != now:
            raise settings_differ(out, name, was, now, remedy)
    report.log(
        f"{out} is complete already (richkd verify checks its bytes); --overwrite makes it "
        f"anew{said}"
    )
    return True


def check_same_settings(
    manifest: Manifest, settings: Precompute, out: Location, remedy: str
) -> None:
    """Refuse a complete store that was made with other settings; the data set's name may be."""
    was = to_table(resolve(Precompute, manifest["recipe"], {}))  # with newer settings, too
    now = to_table(settings)
    for name in sorted((was.keys() | now.keys()) - NOT_IN_STORE):
        if was.get(name) != now.get(name):
            raise settings_differ(out, name, was.get(name), now.get(name), remedy)


def settings_differ(out: Location, name: str, was: object, now: object, remedy: str) -> RichKDError:
    """The error for a complete store that is not what was asked for."""
    return RichKDError(
        f"{out} is complete and of other settings: {name} was {schema.shown(was)} and is now "
        f"{schema.shown(now)}; {remedy}",
        code="cache-settings-differ",
    )


def make_teachers(
    settings: Precompute,
    dataset: Dataset,
    recorded: TeacherEntry | None,
    begun: Mapping[str, Any] | None,
    training: TrainTeacher,
    teacher_recipe: Collection[str],
    device: torch.device,
    ranks: Ranks,
    report: Report,
) -> tuple[CNNTeacher, ClipTeacher | None, Tensor | None, Preview]:
    """Both teachers, the CNN one trained first where there is none, and the text embeddings.

    Returns:
        Them, and what they say of the first test images.
    """
    seen = Preview()
    weights = ranks.from_first(lambda: teacher_weights(settings, training))

    def load(weights: Path) -> CNNTeacher:
        found = (
            NetworkInput.of(recorded["input"])
            if recorded is not None
            else resolve_input(settings, weights, dataset, report)
        )
        return load_teacher(
            settings.teacher, weights, len(dataset.class_names), found, device, report=report
        )

    if weights is None:
        model = create_model(
            settings.teacher, len(dataset.class_names), image_size=dataset.image_size
        )
        check_fit(model, settings.teacher, dataset.image_size, len(dataset.class_names))
        ranks.from_first(lambda: check_output(Path(training.out), overwrite=False))
    else:
        if settings.teacher_weights:
            warn_of_validation(weights, dataset, report)
        else:
            check_trained_on(weights, dataset)
            log_other_training(training, teacher_recipe, dataset, report)
        teacher = load(weights)
        known = recorded or recorded_order(begun, settings, teacher)

        def look() -> Outputs | None:
            if known is not None:
                return tuple(known["outputs"]) if "outputs" in known else None
            return resolve_outputs(settings, weights, teacher, dataset, report)

        teacher = replace(teacher, outputs=ranks.from_first(look))
        if ranks.first and recorded is None:
            batch = batch_size(settings, device, teacher.input.size)
            seen = Preview(cnn=preview_teacher(teacher, weights, dataset, batch, report))
    clip = open_clip_teacher(settings, device, ranks, report)
    text = None
    if clip is not None:
        templates = load_prompts(settings.prompts)
        text = clip.text_embeddings(dataset.class_names, templates)
        if ranks.first:
            features, error = preview(clip, text, templates, dataset, report)
            seen = replace(seen, clip=features, precision_error=error)
    if weights is None:
        interrupted = TeacherFolder(Path(training.out)).checkpoints.files
        report.log(
            f"no --teacher-weights given and none at {training.out}: "
            f"{'resuming the training of' if interrupted else 'training'} the teacher, "
            f"{settings.teacher}, first"
        )
        ranks.from_first(lambda: train_teacher(training, dataset, report))
        teacher = load(Path(training.out))
    return teacher, clip, text, seen


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
            f"the job needs the same ones",
            code="rank-files-differ",
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
            f"of the job needs the same weights at the same paths",
            code="rank-teachers-differ",
        )


def open_writer(
    begin: Callable[[], StoreWriter], out: Location, manifest: Manifest, ranks: Ranks
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
            f"all machines share, or object storage (s3://…)",
            code="rank-cache-missing",
        )
    out.follow(token)
    return StoreWriter(out, manifest, done)


def begin_store(
    out: Location,
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
    writer: StoreWriter,
    compute: BlockRows,
    ranks: Ranks,
    report: Report,
    again: str = "same command",
) -> None:
    """Compute and write what is not done yet; signals wait for the block in hand.

    `again` says which command goes on where this one was stopped.
    """
    todo = [block for block, done in zip(writer.blocks, writer.done, strict=True) if not done]
    count, written = len(writer.blocks), 0
    if len(todo) < count:
        report.log(f"resuming: {count - len(todo)} of {count} blocks are there already")
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
                f"{again} goes on"
                if ranks.world == 1
                else f"rank {ranks.rank} stopped with {written} of its {len(own)} blocks written; "
                f"the same job goes on"
            )

        for units in phases:
            for block, rows in compute(units, tick, check):
                writer.write(block, rows)
                written += 1
                check()
            writer.flush()  # the next phase reads what this one wrote, whoever wrote it
            ranks.wait()
            if ranks.first and any(block.split == "test" for unit in units for block in unit):
                compute.log_zero_shot(report)


def check_given(settings: Precompute) -> None:
    """Refuse teacher weights that are given and not there, before any image is read."""
    path = Path(settings.teacher_weights)
    if settings.teacher_weights and path.exists():
        check_weights(path)
    elif settings.teacher_weights:
        raise RichKDError(
            f"no teacher weights at {path}; pass a file of {settings.teacher or 'its'} weights, or "
            f"leave --teacher-weights out to train one",
            code="weights-missing",
        )


def check_counts(settings: Precompute, dataset: Dataset) -> None:
    """Refuse more views than there are, and to keep as many logits as there are classes."""
    check_num_views(settings.views, dataset.train.view_space.limit)
    if settings.top_k is not None:
        check_keep(settings.top_k, len(dataset.class_names))


def preview(
    clip: ClipTeacher,
    text: Tensor,
    templates: tuple[str, ...],
    dataset: Dataset,
    report: Report,
) -> tuple[Sequence[Tensor], PrecisionError | None]:
    """Say, before anything long, what CLIP will be asked and how well it answers so far.

    Returns:
        Its features of the first test images, batch by batch, and what its precision costs on them.
    """
    names = dataset.class_names
    shown = [
        f"{folder} → {name}" if folder and name != class_words(folder) else name
        for folder, name in zip_longest(dataset.class_folders[:8], names[:8])
    ]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    report.log(f"classes: {', '.join(shown)}{more}")
    asked = "; ".join(template.replace("{}", names[0]) for template in templates[:3])
    more = f"; and {len(templates) - 3} more" if len(templates) > 3 else ""
    report.log(f"prompts a class: {len(templates)}: {asked}{more}")
    count = min(LOOKED_AT, len(dataset.test))
    inputs = make_inputs(dataset.test.first(count).images, clip.device)
    features, classes = clip.image_features(inputs, 0, count, LOOKED_AT), class_embeddings(text)
    similarity = fusion.clip_similarity(features, classes)
    top1 = accuracy(similarity.cpu(), dataset.test.labels[:count], 1)
    report.log(
        f"CLIP zero-shot on {count} of the test images: {percent(top1)} % (chance "
        f"{percent(1 / len(names))} %)"
    )
    error = None
    if clip.precision != "float32":
        error = precision_error(clip, inputs, features, classes, LOOKED_AT)
        report.log(f"CLIP in {schema.describe_precision(clip.precision, error)}")
    return torch.split(features, LOOKED_AT), error


def teacher_weights(settings: Precompute, training: TrainTeacher) -> Path | None:
    """The teacher's weights: those given, else those trained before, else None."""
    if settings.teacher_weights:
        return Path(settings.teacher_weights)
    trained = Path(training.out)
    if not trained.is_file():
        return None
    TeacherFolder(trained).tidy(trained)
    return trained


def check_trained_on(weights: Path, dataset: Dataset) -> None:
    """Refuse a teacher that was found by its name and learnt from other data.

    Raises:
        RichKDError: its metadata names another fingerprint, or none.
    """
    trained_on = read_note(weights).get("fingerprint", "nothing that it names")
    if trained_on != dataset.fingerprint:
        raise RichKDError(
            f"{weights} was trained on other data ({trained_on[:12]}) than {dataset.name} "
            f"({dataset.fingerprint[:12]}), or on these read otherwise (--background, "
            f"--pixel-range, --broken); pass it as --teacher-weights to use it all the same, "
            f"or move it away to train another",
            code="teacher-of-other-data",
        )


def log_other_training(
    training: TrainTeacher, given: Collection[str], dataset: Dataset, report: Report
) -> None:
    """Say where a teacher that was found by its name is not what given settings say."""
    weights = Path(training.out)
    settings = training.for_size(dataset.image_size)
    found = difference(settings, dataset, read_note(weights), only=given)
    if found is not None:
        report.log(
            f"using {weights} as it is, though of its training {found}; richkd train-teacher "
            f"--overwrite trains another"
        )


def warn_of_validation(weights: Path, dataset: Dataset, report: Report) -> None:
    """Say where a teacher from elsewhere may have been trained on the validation images."""
    if dataset.validation is None:
        return
    if read_note(weights).get("fingerprint") != dataset.fingerprint:
        report.log(
            f"{weights} may have been trained on the validation images, too; if so, alpha auto "
            f"trusts the CNN teacher too much: train one on the others by leaving "
            f"--teacher-weights out"
        )


def recorded_order(
    begun: Mapping[str, Any] | None, settings: Precompute, teacher: CNNTeacher
) -> TeacherEntry | None:
    """What a store to go on with says of this very teacher, unless the user says its order."""
    if begun is None or settings.teacher_classes or schema.manifest_fault(begun) is not None:
        return None
    entry: TeacherEntry = begun["teacher"]
    return entry if entry["sha256"] == teacher.sha256 else None


def open_clip_teacher(
    settings: Precompute, device: torch.device, ranks: Ranks, report: Report
) -> ClipTeacher | None:
    """The CLIP that is asked for; `demo` is trained first where it is not there, `none` is None."""
    name = settings.clip
    if name == "none":
        return None
    if name == "demo":
        from richkd.teachers.demo_clip import demo_clip

        name = str(ranks.from_first(lambda: demo_clip(report)))
    return load_clip(name, device, settings.clip_precision)


def make_manifest(
    settings: Precompute,
    dataset: Dataset,
    teacher: CNNTeacher,
    clip: ClipTeacher | None,
    text: Tensor | None,
    error: PrecisionError | None = None,
) -> Manifest:
    """Everything that is known before the first block; `error` is that of CLIP's precision."""
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
    if dataset.decoding is not None:
        images["decoding"] = dataset.decoding.entry
    if dataset.validation is not None:
        images["num_validation"] = len(dataset.validation)
        if settings.validation:
            images["validation"] = settings.validation
    if dataset.folders:
        images["folders"] = dict(dataset.folders)
    entry = schema.TeacherEntry(
        name=teacher.name,
        sha256=teacher.sha256,
        num_features=teacher.num_features,
        input=teacher.input.entry,
        accuracy=None,
    )
    if teacher.outputs is not None:
        entry["outputs"] = list(teacher.outputs)
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
        teacher=entry,
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
        recipe=recorded_recipe(settings, teacher),
        versions=versions(),
        checksums=None,
        seal=None,
    )
    if settings.top_k is not None:
        manifest |= {"keep": settings.top_k, "keep_temperature": settings.keep_temperature}
    if manifest["clip"] is not None and settings.clip_precision != "float32":
        manifest["clip"]["precision"] = settings.clip_precision
        if error is not None:
            manifest["clip"]["precision_error"] = error
    return manifest


def recorded_recipe(settings: Precompute, teacher: CNNTeacher) -> dict[str, Any]:
    """The settings as a store keeps them, with the batch that was chosen: a repair takes the same.

    CLIP's precision is in it where it is not float32, as in the manifest's `clip`.
    """
    batch = batch_size(settings, teacher.device, teacher.input.size)
    recipe = to_table(replace(settings, batch_size=batch))
    if settings.clip_precision == "float32":
        del recipe["clip_precision"]
    return recipe


def check_room(out: Location, manifest: Manifest, report: Report) -> None:
    """Say how big the store will be, and refuse to start on a disk without room for it.

    Raises:
        RichKDError: the disk has less room than the uncompressed arrays need.
    """
    wanted = schema.raw_bytes(manifest)
    expected = f"{out}: {size(wanted)} of arrays before compression"
    expected += f", {manifest['views']['count']} views"
    if not isinstance(out, Folder):
        report.log(expected)
        return
    folder = next(parent for parent in out.path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    report.log(f"{expected}; {size(free)} are free")
    if wanted > free and not out.path.exists():
        raise RichKDError(
            f"{out} needs {size(wanted)} and {folder} has {size(free)} free; make room, choose "
            f"fewer --views, or another --out",
            code="disk-too-small",
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


def closing(cache: TeacherCache, seconds: float) -> str:
    """The last line of stage one; before it, what it cost to keep the largest logits only."""
    manifest = cache.manifest
    clip = manifest["clip"]
    stored = sum(cache.location.sizes().values())
    blend = (
        f", CLIP {percent(clip['accuracy'])} %, fused {percent(manifest['fused_accuracy'])} %"
        if clip
        else ""
    )
    kept = (
        f"of {cache.num_classes:,} logits a row the {manifest['keep']} largest are kept; KL error "
        f"on the test images: {describe_errors(manifest['keep_kl'])}\n"
        if "keep" in manifest
        else ""
    )
    return (
        f"{kept}{cache.location} is complete: {size(stored)} in {duration(seconds)}; "
        f"test accuracy: CNN teacher {percent(manifest['teacher']['accuracy'])} %{blend}"
    )

"""Make the manifest of a new cache: its images, both teachers, and how rows are stored."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

from torch import Tensor

from richkd.config.settings import Precompute, to_table
from richkd.core.versions import versions
from richkd.data.datasets import Dataset
from richkd.data.kept import pixels_entry
from richkd.data.prompts import load_prompts
from richkd.data.views import AugmentedViews
from richkd.store import schema
from richkd.store.added import shared_part
from richkd.store.schema import ClipEntry, DatasetEntry, Manifest, PrecisionError, TeacherEntry
from richkd.teachers.cnn import CNNTeacher
from richkd.teachers.rows import Teachers


def make_manifest(
    dataset: Dataset,
    teachers: Teachers,
    precision_error: PrecisionError | None = None,
    block: int | None = None,
) -> Manifest:
    """Return everything that is known before the first block.

    Args:
        dataset: the images.
        teachers: both teachers and the settings.
        precision_error: what CLIP's precision costs, if it was measured.
        block: the number of samples per block; None chooses it by the widest row.
    """
    settings = teachers.settings
    assert teachers.cnn is not None
    widest = max(len(dataset.class_names), teachers.cnn.num_features)
    space = dataset.train.views(settings.augment)
    manifest = Manifest(
        format=schema.FORMAT,
        schema=schema.SCHEMA,
        complete=False,
        dataset=_dataset_entry(settings, dataset),
        class_names=list(dataset.class_names),
        image_size=dataset.image_size,
        mean=list(dataset.mean),
        std=list(dataset.std),
        views={
            "space": space.name,
            "count": settings.views,
            "seed": settings.seed,
        },
        teacher=_teacher_entry(teachers.cnn, settings.teacher_weights_key),
        clip=_clip_entry(teachers, precision_error),
        prompts=list(load_prompts(settings.prompts)) if teachers.clip else [],
        alpha=settings.alpha,
        scale=settings.scale,
        fused_accuracy=None,
        dtype=settings.dtype,
        keep_bits=settings.keep_bits,
        block=block or schema.choose_block(widest, settings.dtype),
        recipe=_recipe(teachers),
        versions=versions(),
        checksums=None,
        seal=None,
    )
    if isinstance(space, AugmentedViews):
        augment = space.augment
        manifest["views"] |= {"augment": augment.text, "columns": [*augment.columns]}
        manifest["versions"]["pillow"] = version("pillow")  # which replays them
    if settings.top_k is not None:
        manifest |= {"keep": settings.top_k, "keep_temperature": settings.keep_temperature}
    if settings.rows is not None:
        manifest["rows"] = sorted(settings.rows)
    if settings.keep_pixels is not None:
        sizes = dataset.file_sizes
        manifest["pixels"] = pixels_entry(sizes, settings.keep_pixels, manifest["block"])
    return manifest


def make_addition(
    cache: Manifest,
    name: str,
    teachers: Teachers,
    precision_error: PrecisionError | None = None,
    block: int | None = None,
) -> Manifest:
    """Return the manifest of a teacher that is added to a cache.

    Args:
        cache: the manifest of the cache.
        name: of the teacher among those of the cache.
        teachers: the teacher, a CNN or a CLIP, and its settings.
        precision_error: as in `make_manifest`.
        block: as in `make_manifest`.
    """
    settings, cnn, text = teachers.settings, teachers.cnn, teachers.text
    width = cnn.num_features if cnn else 0 if text is None else text.shape[-1]
    widest = max(len(cache["class_names"]), width)
    own: dict[str, Any] = {
        "addition": name,
        "complete": False,
        "clip": _clip_entry(teachers, precision_error),
        "prompts": list(load_prompts(settings.prompts)) if teachers.clip else [],
        "alpha": 1.0 if cnn else 0.0,
        "scale": "native",
        "fused_accuracy": None,
        "block": block or schema.choose_block(widest, settings.dtype),
        "recipe": _recipe(teachers),
        "versions": versions(),
        "checksums": None,
        "seal": None,
    }
    if cnn is not None:
        own["teacher"] = _teacher_entry(cnn, settings.teacher_weights_key)
    return cast(Manifest, {**shared_part(cache, rows=cnn is not None), **own})


def _dataset_entry(settings: Precompute, dataset: Dataset) -> DatasetEntry:
    entry = DatasetEntry(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        num_train=len(dataset.train),
        num_test=len(dataset.test),
        embedded=isinstance(dataset.train.images, Tensor),
    )
    if dataset.skipped:
        entry["skipped"] = list(dataset.skipped)
    if dataset.decoding is not None:
        entry["decoding"] = dataset.decoding.entry
    if dataset.validation is not None:
        entry["num_validation"] = len(dataset.validation)
        if settings.validation:
            entry["validation"] = settings.validation
    if dataset.folders:
        entry["folders"] = dict(dataset.folders)
    if dataset.class_folders and entry["embedded"]:
        entry["class_folders"] = list(dataset.class_folders)
    if dataset.columns:
        entry["columns"] = dict(dataset.columns)
    return entry


def _teacher_entry(cnn: CNNTeacher, key: str) -> TeacherEntry:
    entry = TeacherEntry(
        name=cnn.name,
        sha256=cnn.sha256,
        num_features=cnn.num_features,
        input=cnn.input.entry,
        accuracy=None,
    )
    if key:
        entry["weights_key"] = key
    if cnn.outputs is not None:
        entry["outputs"] = list(cnn.outputs)
    if cnn.head != "own":
        entry["head"] = cnn.probe.entry if cnn.probe else {"kind": cnn.head}
    return entry


def _clip_entry(teachers: Teachers, precision_error: PrecisionError | None) -> ClipEntry | None:
    settings, clip, text = teachers.settings, teachers.clip, teachers.text
    if clip is None or text is None:
        return None
    entry = ClipEntry(
        model=settings.clip,
        sha256=clip.sha256,
        logit_scale=clip.logit_scale,
        num_features=text.shape[-1],
        accuracy=None,
    )
    if clip.logit_bias is not None:
        entry["logit_bias"] = clip.logit_bias
    if settings.clip_precision != "float32":
        entry["precision"] = settings.clip_precision
        if precision_error is not None:
            entry["precision_error"] = precision_error
    return entry


def _recipe(teachers: Teachers) -> dict[str, Any]:
    """Return the settings as a cache keeps them, with the batch size in use, for repairs.

    As in the manifest's entries, CLIP's precision is left out if it is float32, and the teacher's
    head if it is its own.
    """
    batch = teachers.cnn_batch if teachers.cnn else teachers.clip_batch
    recipe = to_table(replace(teachers.settings, batch_size=batch))
    recipe.pop("teachers", None)  # each has a manifest of its own
    if teachers.settings.clip_precision == "float32":
        del recipe["clip_precision"]
    if teachers.settings.teacher_head == "own":
        del recipe["teacher_head"]
    return recipe

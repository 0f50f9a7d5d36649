"""Check what stage one was asked for, before anything that takes long."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.config.settings import Precompute, TrainTeacher, resolve, to_table
from richkd.core.errors import RichKDError
from richkd.core.progress import Report, size
from richkd.data.augment import check_samples
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.class_names import check_distinct
from richkd.data.datasets import Dataset, check_class_names, introduce, load_as_before
from richkd.data.prompts import load_prompts
from richkd.data.views import AugmentedViews, check_num_views
from richkd.models.weights import check_weights, file_sha256
from richkd.store import schema
from richkd.store.folder import Folder
from richkd.store.location import Location
from richkd.store.manifest import read_manifest
from richkd.store.reader import open_cache
from richkd.store.schema import Manifest
from richkd.store.target import check_target
from richkd.store.topk import check_keep
from richkd.teachers.class_order import check_teacher_classes, given_outputs
from richkd.teachers.clip import check_clip, load_clip, local_folder
from richkd.teachers.find import teacher_weights
from richkd.teachers.framing import check_from_elsewhere, check_unsaid
from richkd.teachers.matching import check_head
from richkd.teachers.pretrained import by_name, check_teacher_name

# Settings that do not change the cache; weights and images are compared by content.
NOT_IN_CACHE = {
    "device",
    "batch_size",
    "data_root",
    "out",
    "teacher_weights",
    "dataset",
    "teachers",
    "view_space",  # the manifest has the one that was chosen
}


def check_request(
    settings: Precompute, out: Location, overwrite: bool, dataset: Dataset | None
) -> Mapping[str, Any] | None:
    """Raise RichKDError for whatever can be refused before the images are read.

    Returns:
        The manifest of the cache to resume, if there is one.
    """
    if dataset is None:
        check_class_names(settings)
    check_teacher_name(settings)
    check_teacher_classes(settings)
    return check_settings(settings, out, overwrite)


def load_request(
    settings: Precompute,
    dataset: Dataset | None,
    report: Report,
    interrupted: Mapping[str, Any] | None,
) -> Dataset:
    """Return the dataset, unless its classes can be refused; arguments as of `load_images`."""
    dataset = load_images(settings, dataset, report, interrupted)
    if settings.clip != "none":
        check_distinct(dataset.class_names)
    if settings.teacher_classes:
        given_outputs(settings, dataset)
    if interrupted is None or not interrupted.get("complete"):
        check_head(settings.for_size(dataset.image_size), dataset)
    return dataset


def check_settings(
    settings: Precompute, out: Location, overwrite: bool
) -> Mapping[str, Any] | None:
    """Check the location, and the settings that matter to old and new caches alike.

    Returns:
        The manifest of the cache at the location, if there is one that is not to be replaced.
    """
    out.check_writable()
    out.check_unlocked()
    present = check_target(out, overwrite)
    check_teachers(settings)
    return present


def check_teachers(settings: Precompute) -> None:
    """Check the teachers of the settings as far as no image and no network is needed."""
    check_clip(settings.clip)
    load_prompts(settings.prompts)
    check_given(settings)
    check_from_elsewhere(settings)
    check_unsaid(settings, Path(settings.teacher_weights))


def load_images(
    settings: Precompute,
    dataset: Dataset | None,
    report: Report,
    present: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return the dataset, loaded unless it is given; check that it has enough views and classes.

    Args:
        settings: of stage one.
        dataset: the images, if they are already loaded.
        report: receives progress.
        present: the manifest of the cache at its location, if there is one, whose images are
            treated as they were then.
    """
    of_files = (
        present is not None
        and schema.manifest_fault(present) is None
        and not present["dataset"]["embedded"]
    )
    dataset = dataset or load_as_before(
        settings, report, lambda _: settings.out if of_files else None
    )
    space = dataset.train.views(settings.augment)
    check_num_views(settings.views, space.limit)
    if isinstance(space, AugmentedViews):
        check_samples(space.augment, len(dataset.train))
    if settings.top_k is not None:
        check_keep(settings.top_k, len(dataset.class_names))
    introduce(dataset, report)
    check_kept(settings, dataset, report)
    return dataset


def check_kept(settings: Precompute, dataset: Dataset, report: Report) -> None:
    """Raise RichKDError if there are no pixels to keep, or too few of them for students."""
    side = settings.keep_pixels
    if side is None:
        return
    if isinstance(dataset.train.images, Tensor):
        raise RichKDError(
            f"keep_pixels = {side}: the cache holds the images of {dataset.name} anyway, as they "
            f"are small; leave --keep-pixels out",
            code="pixels-of-small-images",
        )
    size = dataset.image_size
    if side < size:
        raise RichKDError(
            f"keep_pixels = {side}: students see images of {size}×{size} pixels; choose at least "
            f"--keep-pixels {size}, or a smaller --image-size",
            code="pixels-too-few",
        )
    if CLEAN_SHARE * side < size:
        report.log(
            f"a shorter side of {side} pixels leaves fewer than {size} to the crop that students "
            f"are tested on; --keep-pixels {2 * size} would be sharper"
        )


def check_given(settings: Precompute) -> None:
    """Check teacher weights that were given, before any image is read."""
    path = Path(settings.teacher_weights)
    if settings.teacher_weights and path.exists():
        check_weights(path)
    elif settings.teacher_weights:
        raise RichKDError(
            f"no teacher weights at {path}; pass a file of {settings.teacher or 'its'} weights, or "
            f"leave --teacher-weights out to train one",
            code="weights-missing",
        )


def is_complete(
    settings: Precompute, out: Location, dataset: Dataset, training: TrainTeacher, report: Report
) -> bool:
    """Return whether the cache already exists, complete and made from the same images and teachers.

    Teachers that are published under their names, and the demo's CLIP, are compared by name; a CLIP
    from a folder is loaded and compared by content.

    Raises:
        RichKDError: the cache is complete, but of other images, teachers or settings.
    """
    if not out.exists or not read_manifest(out.name)["complete"]:
        return False
    manifest = open_cache(out.name).manifest
    remedy = "choose another --out, or replace it with --overwrite"
    check_same_settings(manifest, settings, out, remedy)
    pairs: list[tuple[str, object, object]] = [
        ("view space", manifest["views"]["space"], dataset.train.view_space.name),
        ("fingerprint of the images", manifest["dataset"]["fingerprint"], dataset.fingerprint),
        ("image_size", manifest["image_size"], dataset.image_size),
        ("mean of the images", manifest["mean"], list(dataset.mean)),
        ("std of the images", manifest["std"], list(dataset.std)),
        ("classes", manifest["class_names"], list(dataset.class_names)),
        ("files left out", manifest["dataset"].get("skipped", []), list(dataset.skipped)),
    ]
    weights = teacher_weights(settings, training)
    note = ""
    if by_name(settings):
        pass  # what is published under a name is compared by name
    elif weights is None:
        note = f"; its teacher is no longer at {training.out} and was not compared"
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
        f"{out} is already complete (richkd verify checks its bytes); --overwrite replaces it{note}"
    )
    return True


def check_same_settings(
    manifest: Manifest, settings: Precompute, out: Location, remedy: str
) -> None:
    """Raise RichKDError if a complete cache has other settings; the dataset's name may differ."""
    was = to_table(resolve(Precompute, manifest["recipe"], {}))  # with settings that are newer
    now = to_table(settings)
    for name in sorted((was.keys() | now.keys()) - NOT_IN_CACHE):
        if was.get(name) != now.get(name):
            raise settings_differ(out, name, was.get(name), now.get(name), remedy)


def settings_differ(out: Location, name: str, was: object, now: object, remedy: str) -> RichKDError:
    """Return the error for a complete cache with other settings than those asked for."""
    return RichKDError(
        f"{out} is complete, but with other settings: {name} was {schema.shown(was)} and is now "
        f"{schema.shown(now)}; {remedy}",
        code="cache-settings-differ",
    )


def check_room(out: Location, manifest: Manifest, report: Report) -> None:
    """Log how large the cache will be; raise RichKDError if the disk has no room for it."""
    wanted = schema.raw_bytes(manifest)
    expected = f"{out}: {size(wanted)} of arrays before compression"
    expected += f", {manifest['views']['count']} views"
    pixels = [s for name, s in schema.array_specs(manifest).items() if name.endswith("/pixels")]
    if pixels:
        expected += f", {size(sum(spec.nbytes for spec in pixels))} of them kept pixels"
    if not isinstance(out, Folder):
        report.log(expected)
        return
    folder = next(parent for parent in out.path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    report.log(f"{expected}; {size(free)} are free")
    if wanted > free and not out.path.exists():
        raise RichKDError(
            f"{out} needs {size(wanted)} and {folder} has {size(free)} free; free some "
            f"space, choose fewer --views, or another --out",
            code="disk-too-small",
        )

"""Load the dataset that the rows of a cache belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import layouts
from richkd.data.datasets import Dataset, Split, load_dataset
from richkd.data.decoding import Decoding
from richkd.store.reader import TeacherCache
from richkd.store.schema import Manifest


def load_images(
    cache: TeacherCache, dataset: str = "", data_root: str = "data", report: Report | None = None
) -> dict[str, Split]:
    """Load the images and labels of all splits; arguments and errors as in `load_dataset_of`."""
    return load_dataset_of(cache, dataset, data_root, report).splits


def load_dataset_of(
    cache: TeacherCache, dataset: str = "", data_root: str = "data", report: Report | None = None
) -> Dataset:
    """Load the dataset that a cache was made from, from the cache itself if it has the images.

    Args:
        cache: the cache.
        dataset: where the dataset is now, if it moved.
        data_root: the folder of the datasets.
        report: receives progress.

    Raises:
        RichKDError: the dataset is missing, has other classes, or changed since stage one.
    """
    labels_of = {split: cache.read(f"{split}/labels") for split in cache.splits}
    for split, labels in labels_of.items():
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < cache.num_classes:
            raise RichKDError(
                f"{cache.location}: {split}/labels are not in 0..{cache.num_classes - 1}; write "
                f"the cache again with richkd precompute --overwrite",
                code="cache-damaged",
            )
    if cache.manifest["dataset"]["embedded"]:
        return _embedded(cache, labels_of)
    found = load_again(cache.manifest, dataset, data_root, report)
    _check_same(cache, found, labels_of)
    return replace(found, class_names=tuple(cache.manifest["class_names"]))


def _embedded(cache: TeacherCache, labels_of: Mapping[str, Tensor]) -> Dataset:
    """Return the dataset whose images are in the cache."""
    manifest = cache.manifest
    splits = {
        split: Split(cache.read(f"{split}/images"), labels) for split, labels in labels_of.items()
    }
    return Dataset(
        name=manifest["dataset"]["name"],
        class_names=tuple(manifest["class_names"]),
        train=splits["train"],
        test=splits["test"],
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
        image_size=manifest["image_size"],
        validation=splits.get("validation"),
        class_folders=tuple(manifest["dataset"].get("class_folders", ())),
    )


def _check_same(cache: TeacherCache, found: Dataset, labels_of: Mapping[str, Tensor]) -> None:
    """Raise RichKDError if a dataset is not the one that a cache was made from."""
    if len(found.class_names) != cache.num_classes or (
        not catalog.is_own(found.name) and list(found.class_names) != cache.manifest["class_names"]
    ):
        raise RichKDError(
            f"{cache.location} has other classes than {found.name}: "
            f"{len(cache.manifest['class_names'])} and {len(found.class_names)}, or other names; "
            f"pass the --dataset that it was made from",
            code="images-classes-differ",
        )
    recorded = cache.manifest["dataset"]["fingerprint"]
    if {*found.splits} != {*labels_of} or found.fingerprint != recorded:
        raise RichKDError(
            f"{found.name} is not what {cache.location} was made from (its fingerprint differs); "
            f"restore the files, or write the cache again with richkd precompute --overwrite",
            code="images-differ",
        )
    for split, labels in labels_of.items():
        if not torch.equal(found.splits[split].labels, labels):
            raise RichKDError(
                f"the labels of {found.name} differ from those in {cache.location}; write the "
                f"cache again with richkd precompute --overwrite",
                code="images-differ",
            )


def load_again(
    manifest: Manifest, dataset: str = "", data_root: str = "data", report: Report | None = None
) -> Dataset:
    """Read the dataset that a cache was made from, as it was read then.

    Args:
        manifest: of the cache.
        dataset: where the dataset is now, if it moved.
        data_root: the folder of the datasets.
        report: receives progress.

    Raises:
        RichKDError: as `load_dataset`, or an earlier version decoded the files differently. The
            caller compares the fingerprint.
    """
    entry = manifest["dataset"]
    settings = Images(
        dataset=dataset or entry["name"],
        limit=entry["num_train"] + (entry.get("num_validation", 0) if "validation" in entry else 0),
        validation=entry.get("validation", 0.0),
        data_root=data_root,
        image_size=manifest["image_size"],
    )
    kind, path = catalog.split_name(settings.dataset)
    layout = None
    if path is not None:
        settings = replace(
            settings, view_space="pad-crop-flip" if entry["embedded"] else "resized-crop-flip"
        )
    if path is not None and kind == catalog.split_name(entry["name"])[0]:
        layout = (
            layouts.Layout(entry["folders"], columns=entry.get("columns", {}))
            if "folders" in entry
            else layouts.earlier_layout(path)
        )
    skipped = entry.get("skipped", [])
    decoding = Decoding.from_entry(entry["decoding"]) if "decoding" in entry else None
    found = load_dataset(settings, skipped, report, layout, decoding)
    if found.read_differently_in(entry["fingerprint"]):
        raise RichKDError(
            f"{found.name}: an earlier version of richkd made the cache and read some of these "
            f"files differently (with an EXIF orientation, transparency or more than 8 bits); "
            f"write it again with richkd precompute --overwrite",
            code="images-read-otherwise",
        )
    return replace(found, skipped=tuple(skipped))

"""Load the dataset that the rows of a cache belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report, size
from richkd.core.ranks import Ranks
from richkd.data import layouts
from richkd.data.datasets import Dataset, ImageFiles, Split, load_dataset
from richkd.data.decoding import Decoding
from richkd.data.kept import KeptImages, KeptPixels, reduced_sizes, starts
from richkd.store.added import write_again
from richkd.store.reader import TeacherCache
from richkd.store.schema import PIXEL_SIZES, SIZES, Manifest


def student_images(
    cache: TeacherCache,
    dataset: str = "",
    data_root: str = "data",
    decode: str = "auto",
    report: Report | None = None,
) -> dict[str, Split]:
    """Load the images and labels of all splits as students see them.

    Args:
        cache: the cache.
        dataset: as in `load_dataset_of`, like the other arguments and the errors.
        data_root: the folder of the datasets.
        decode: where the pixels of photographs come from: a setting of `Distill`.
        report: receives progress.
    """
    embedded = cache.manifest["dataset"]["embedded"]
    if decode == "auto" and "pixels" in cache.manifest:
        return kept_images(cache, report or Report(quiet=True))
    if embedded and decode not in ("auto", "exact"):
        raise RichKDError(
            f"decode = {decode!r}: the images of {cache.location} are in it, decoded; leave "
            f"--decode out",
            code="decode-of-arrays",
        )
    splits = load_images(cache, dataset, data_root, report)
    if decode in ("draft", "gpu"):
        train = splits["train"]
        assert isinstance(train.images, ImageFiles)
        splits["train"] = replace(train, images=replace(train.images, decode=decode))
    return splits


def kept_images(cache: TeacherCache, report: Report) -> dict[str, Split]:
    """Return the splits of a cache with kept pixels, which need no image files.

    Raises:
        RichKDError: the cache is damaged.
    """
    entry, manifest = cache.manifest["pixels"], cache.manifest
    splits: dict[str, Split] = {}
    for split, labels in labels_of(cache).items():
        sizes, pixel_sizes = (
            cache.read(f"{split}/{name}").numpy() for name in (SIZES, PIXEL_SIZES)
        )
        if int(sizes.min()) < 1 or not np.array_equal(
            pixel_sizes, reduced_sizes(sizes, entry["side"])
        ):
            raise RichKDError(
                f"{cache.location}: {split}/{PIXEL_SIZES} are not {split}/{SIZES} reduced to "
                f"{entry['side']} pixels; {write_again(cache.location)}",
                code="cache-damaged",
            )
        name = f"{split}/pixels"
        source = KeptPixels(
            folder=cache.chunk_folder(name),
            where=f"{cache.location} {name}",
            images=entry["images"],
            starts=starts(pixel_sizes, entry["images"]),
            pixel_sizes=pixel_sizes,
            sizes=sizes,
            numbers=np.arange(len(sizes)),
        )
        traits = np.zeros(len(sizes), np.uint8)
        images = KeptImages(
            source, sizes.astype(np.int64), traits, manifest["image_size"], Decoding()
        )
        splits[split] = Split(images, labels)
    total = sum(cache.specs[f"{split}/pixels"].nbytes for split in splits)
    report.log(
        f"images are the pixels that {cache.location} keeps ({entry['side']} pixels on the shorter "
        f"side, {size(total)}); no image file is read (--decode exact reads them)"
    )
    return splits


class PixelCheck:
    """Compares all kept pixels with their checksums, in a thread while the first epoch trains.

    Images are read apart from their chunks, whose CRCs cover many. The processes on a machine have
    a share each. What is read is also in the system's page cache then.
    """

    def __init__(self, cache: TeacherCache, splits: Collection[str], ranks: Ranks) -> None:
        """Start it."""
        self._cache = cache
        self._names = [f"{split}/pixels" for split in splits]
        self._share = slice(ranks.local, None, ranks.here)
        self._fault: Exception | None = None
        self._thread = Thread(target=self._run, daemon=True)  # an interrupted run does not wait
        self._thread.start()

    def _run(self) -> None:
        try:
            for name in self._names:
                self._cache.check_content(name, self._share)
        except Exception as error:
            self._fault = error

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            RichKDError: a chunk is damaged.
        """
        self._thread.join()
        if self._fault is not None:
            raise self._fault


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
    labels = labels_of(cache)
    if cache.manifest["dataset"]["embedded"]:
        return _embedded(cache, labels)
    found = load_again(cache.manifest, dataset, data_root, report)
    _check_same(cache, found, labels)
    return replace(found, class_names=tuple(cache.manifest["class_names"]))


def labels_of(cache: TeacherCache) -> dict[str, Tensor]:
    """Return the labels of all splits; raise RichKDError if they are no classes."""
    found = {split: cache.read(f"{split}/labels") for split in cache.splits}
    for split, labels in found.items():
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < cache.num_classes:
            raise RichKDError(
                f"{cache.location}: {split}/labels are not in 0..{cache.num_classes - 1}; write "
                f"the cache again with richkd precompute --overwrite",
                code="cache-damaged",
            )
    return found


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

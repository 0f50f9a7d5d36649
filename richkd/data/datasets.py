"""Load datasets: class names, and for each split uint8 images (or image files) and labels.

There are `shapes` (drawn on the spot), Fashion-MNIST (from Debian's package or torchvision's
files), CIFAR-10 and CIFAR-100 (torchvision), and image folders (see `layouts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Images
from richkd.core.choices import CROP
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import class_names, hf_datasets, layouts, published, shards, small
from richkd.data.augment import Augment
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.contents import Contents, of_folder
from richkd.data.decoding import CHANGED, Decoding, Photograph, describe_decoding
from richkd.data.entries import describe_splits
from richkd.data.framing import NetworkInput
from richkd.data.scans import Listing
from richkd.data.sources import FolderFiles, Source, Which
from richkd.data.views import (
    AugmentedViews,
    DrawnSpace,
    PadCropFlip,
    ResizedCropFlip,
    ViewSpace,
)
from richkd.data.walk import Walk

SMALL_SIDE = 32  # of the images of all datasets except folders
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000
SHAPES_SEEDS = {"train": 1, "test": 2}

# Mean and standard deviation of pixels in 0..1. The published checkpoints were trained with those
# of CIFAR; the others were computed from the training split (including padding).
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion-mnist": ((0.2190,) * 3, (0.3318,) * 3),
    "shapes": ((0.2782, 0.2404, 0.2283), (0.2271, 0.193, 0.1997)),
    **dict.fromkeys(catalog.OWN, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
}


@dataclass(frozen=True)
class ImageFiles:
    """Images that stay encoded until a view of them is needed."""

    source: Source
    sizes: NDArray[np.int64]  # [N,2], height and width when upright
    traits: NDArray[np.uint8]  # [N], flags defined in data/decoding.py
    image_size: int  # side of the square views
    decoding: Decoding
    prints: NDArray[np.uint64] | None = None  # [N], of `sources.print_of`; None for files
    decode: str = "exact"  # or draft (JPEGs at a fraction of their size), or gpu

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return self.source.name(index)

    def open(self, index: int) -> Image.Image:
        """Read an image as RGB; raise as `Decoding.read`."""
        return self.photograph(index).image

    def photograph(self, index: int, most: float = 1.0) -> Photograph:
        """Read an image as RGB; as a draft, reduced by up to `most`; raise as `open`."""
        most = most if self.decode == "draft" else 1.0
        name = self.source.name(index)
        try:
            file = self.source.file(index)
        except OSError as error:
            raise RichKDError(
                f"{name} can no longer be read ({error.strerror}); restore it", code="image-changed"
            ) from None
        return self.decoding.photograph(file, name, most)

    def take(self, which: Which) -> ImageFiles:
        """Select images by a slice, indices or a mask."""
        return replace(
            self,
            source=self.source.take(which),
            sizes=self.sizes[which],
            traits=self.traits[which],
            prints=None if self.prints is None else self.prints[which],
        )

    def marks(self) -> Iterator[bytes]:
        """Yield what identifies the images in a fingerprint, without decoding them."""
        if isinstance(self.source, FolderFiles):
            yield from self.source.marks()
        else:
            assert self.prints is not None
            yield self.prints.astype("<u8").tobytes()


@dataclass(frozen=True)
class Split:
    """Images [N,H,W,3] uint8 (or files) and labels [N] int64."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """Return the first `count` samples, or all of them for None."""
        return self if count is None or count >= len(self) else self.take(slice(count))

    def take(self, which: slice | Tensor) -> Split:
        """Select samples by a slice or indices."""
        images = self.images
        if isinstance(images, ImageFiles):
            images = images.take(which.numpy() if isinstance(which, Tensor) else which)
        else:
            images = images[which]
        return Split(images, self.labels[which])

    @property
    def view_space(self) -> ViewSpace:
        """The augmentation for these images."""
        if isinstance(self.images, ImageFiles):
            return ResizedCropFlip(self.images.sizes, self.images.image_size)
        return PadCropFlip()

    def views(self, augment: str = CROP) -> DrawnSpace:
        """Return the space of the views that `--augment` asks for."""
        space = self.view_space
        chosen = Augment.of(space.name, augment)
        if chosen is None:
            return space
        images = self.images
        side = images.image_size if isinstance(images, ImageFiles) else images.shape[1]
        return AugmentedViews(space, chosen, side)


@dataclass(frozen=True)
class Dataset:
    """Splits and class names; `mean` and `std` are of pixels in 0..1."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    validation: Split | None = None
    # of the user's own images only:
    skipped: tuple[str, ...] = ()  # files that cannot be used
    folders: Mapping[str, str] = field(default_factory=dict)  # or splits of a table, by split
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table: image and label
    class_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # how the folder was read, line by line
    # of images in files that are taken whole, as an array:
    whole: bool = False
    files: Dataset | None = None  # the same images before they were decoded

    @property
    def splits(self) -> dict[str, Split]:
        """The existing splits by name."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, "test": self.test, **validation}

    @property
    def file_sizes(self) -> dict[str, NDArray[np.int64]]:
        """Height and width [N,2] of the image files of each split that has them."""
        every = {name: split.images for name, split in self.splits.items()}
        return {name: each.sizes for name, each in every.items() if isinstance(each, ImageFiles)}

    @property
    def network_input(self) -> NetworkInput:
        """The input of networks that are trained on these images."""
        whole = isinstance(self.train.images, Tensor)
        return NetworkInput(
            size=self.image_size, mean=self.mean, std=self.std, crop=1.0 if whole else CLEAN_SHARE
        )

    @property
    def decoding(self) -> Decoding | None:
        """How files become RGB; None if all of them are read as they are stored."""
        every = [split.images for split in (self.files or self).splits.values()]
        files = [images for images in every if isinstance(images, ImageFiles)]
        changed = any((images.traits & CHANGED).any() for images in files)
        return files[0].decoding if changed else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels and labels of all splits.

        Of files in folders, it takes names and sizes instead of pixels; of encoded images in tables
        and shards, their `sources.print_of`. It includes how they are decoded, if that changes
        pixels.
        """
        return self._digest(self.decoding)

    def is_of(self, fingerprint: str | None) -> bool:
        """Return whether a fingerprint is that of these images, decoded or as files."""
        return fingerprint == self.fingerprint or (
            self.files is not None and fingerprint == self.files.fingerprint
        )

    def read_differently_in(self, fingerprint: str) -> bool:
        """Return whether a fingerprint was computed before files were read with `Decoding`."""
        return self.decoding is not None and fingerprint == self._digest(None)

    def _digest(self, decoding: Decoding | None) -> str:
        digest = hashlib.sha256()
        for split in self.splits.values():
            images = split.images
            if isinstance(images, ImageFiles):
                for mark in images.marks():
                    digest.update(mark)
                if decoding is not None:
                    digest.update((images.traits & CHANGED).data)
            else:
                digest.update(str(tuple(images.shape)).encode())
                digest.update(np.ascontiguousarray(images.numpy()).data)
            digest.update(split.labels.numpy().astype("<i8").data)
        if decoding is not None:
            digest.update(json.dumps(decoding.entry).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reading:
    """How a dataset was read, so that another process reads it alike."""

    image_size: int
    whole: bool
    skipped: tuple[str, ...]
    layout: layouts.Layout | None  # None of what is no folder, table or shards
    decoding: Decoding | None

    @classmethod
    def of(cls, dataset: Dataset) -> Reading:
        """Return how a dataset was read."""
        images = (dataset.files or dataset).train.images
        return cls(
            dataset.image_size,
            dataset.whole,
            dataset.skipped,
            layouts.Layout(dataset.folders, columns=dataset.columns) if dataset.folders else None,
            images.decoding if isinstance(images, ImageFiles) else None,
        )

    def load(self, settings: Images) -> Dataset:
        """Load the dataset of some settings in this way; raise as `load_dataset`."""
        if catalog.is_own(settings.dataset):
            settings = replace(
                settings,
                image_size=self.image_size,
                view_space="pad-crop-flip" if self.whole else "resized-crop-flip",
            )
        found = load_dataset(settings, self.skipped, layout=self.layout, decoding=self.decoding)
        return replace(found, skipped=self.skipped)


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of a dataset's pixels in 0..1."""
    return _STATISTICS[catalog.split_name(name)[0]]


def load_dataset(
    settings: Images,
    skipped: Collection[str] | None = None,
    report: Report | None = None,
    layout: layouts.Layout | None = None,
    decoding: Decoding | None = None,
    *,
    decoded: bool = True,
) -> Dataset:
    """Load a dataset by name, with its first `limit` training samples.

    For an image folder, `skipped`, `layout` and `decoding` repeat what stage one did; if they are
    None, every file is decoded once to find damaged ones and to choose a range of values.

    Args:
        settings: which images.
        skipped: the files that stage one left out.
        report: shows the progress.
        layout: the folders of the splits.
        decoding: how the files were decoded.
        decoded: decode the files of images that are taken whole; if not, `decode` does it later.

    Raises:
        RichKDError: the name is unknown, files are missing or damaged, or a download failed.
    """
    kind, path = catalog.split_name(settings.dataset)
    root, report = Path(settings.data_root), report or Report(quiet=True)
    if path is not None:
        read = {catalog.HUGGING_FACE: hf_datasets.contents, catalog.SHARDS: shards.contents}
        contents = read.get(kind, of_folder)(settings, path, layout, skipped, report)
        found = _of_files(settings, contents, decoding)
    elif kind == "shapes":
        found = _shapes(settings.limit)
    else:
        found = _small_images(kind, *published.read(kind, root))
    train, validation = hold_out(
        found.train.first(settings.limit), settings.validation, found.class_names
    )
    found = replace(found, train=train, validation=found.validation or validation)
    return decode(found, report) if found.whole and decoded else found


def load_as_before(
    settings: Images, report: Report, made_of: Callable[[Dataset], str | None]
) -> Dataset:
    """Load a dataset, and treat small images as photographs if what they are for was made so.

    Earlier versions treated all images in folders as photographs.

    Args:
        settings: which images.
        report: shows the progress.
        made_of: names what was made of these files as photographs, if anything.

    Raises:
        RichKDError: as `load_dataset`.
    """
    found = load_dataset(settings, report=report, decoded=False)
    if found.whole and settings.view_space == "auto" and (made := made_of(found)) is not None:
        report.log(
            f"{made} was made of these images as photographs, so they are treated as such again; "
            f"to take small images whole, replace it with --overwrite"
        )
        return load_dataset(replace(settings, view_space="resized-crop-flip"), report=report)
    return decode(found, report) if found.whole else found


def decode(dataset: Dataset, report: Report) -> Dataset:
    """Return a dataset whose images are taken whole with its files decoded to arrays.

    Raises:
        RichKDError: they do not fit into memory, or a file can no longer be read.
    """
    every = [split.images for split in dataset.splits.values()]
    small.check_memory([images for images in every if isinstance(images, ImageFiles)])

    def array(name: str, split: Split) -> Split:
        if isinstance(split.images, Tensor):
            return split
        what = f"{name} images of {dataset.name}"
        return replace(split, images=small.decode(split.images, report, what))

    return replace(
        dataset,
        train=array("training", dataset.train),
        test=array("test", dataset.test),
        validation=None if dataset.validation is None else array("validation", dataset.validation),
        files=dataset,
    )


def introduce(dataset: Dataset, report: Report) -> None:
    """Log what a dataset contains, how its files were read, and what was left out."""
    counts = describe_splits({name: len(split) for name, split in dataset.splits.items()})
    side, classes = dataset.image_size, len(dataset.class_names)
    undecoded = dataset.whole and dataset.files is None  # its fingerprint is of the pixels
    known = "" if undecoded else f"; fingerprint {dataset.fingerprint[:12]}"
    report.log(f"{dataset.name}: {counts} images of {side}×{side} pixels, {classes} classes{known}")
    for note in dataset.notes:
        report.log(note)
    for path in dataset.skipped:
        report.log(f"left out, because it cannot be used as an image: {path}")


def check_class_names(settings: Images) -> None:
    """Raise RichKDError if a file of class names does not fit the folders; read no images."""
    kind, path = catalog.split_name(settings.dataset)
    if kind == catalog.IMAGE_FOLDER and settings.class_names and path is not None and path.is_dir():
        train = path / layouts.find_layout(path).folders["train"]
        class_names.choose_names(settings.class_names, Walk(train, ()).classes)


def hold_out(train: Split, share: float, class_names: Sequence[str]) -> tuple[Split, Split | None]:
    """Split training samples into those to train on and those for validation.

    Each class gives up the same share of its samples, chosen at random with a fixed seed.

    Args:
        train: the samples, which keep their order.
        share: of each class, rounded to whole samples; 0 holds nothing out.
        class_names: C names, for messages.

    Raises:
        RichKDError: a class would have no sample left in one of the two parts.
    """
    if not share:
        return train, None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    order = order[train.labels[order].argsort(stable=True)]  # class by class
    counts = torch.bincount(train.labels, minlength=len(class_names))
    held = (share * counts.double()).round().long()
    short = ((counts > 0) & ((held == 0) | (held == counts))).nonzero().flatten()
    if len(short):
        first = int(short[0])
        side = "validate" if held[first] == 0 else "train"
        raise RichKDError(
            f"validation = {share}: the class {class_names[first]!r} has only {int(counts[first])} "
            f"training images, which leaves none to {side} on; choose another share, or use more "
            f"images",
            code="validation-share",
        )
    rank = torch.arange(len(train)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    chosen = rank < held.repeat_interleave(counts)
    return train.take(order[~chosen].sort().values), train.take(order[chosen].sort().values)


def _small_images(
    name: str,
    class_names: tuple[str, ...],
    train: tuple[NDArray[np.uint8], ArrayLike],
    test: tuple[NDArray[np.uint8], ArrayLike],
) -> Dataset:
    """Make a dataset of images [N,32,32,3] and labels [N] of two splits."""

    def split(images: NDArray[np.uint8], labels: ArrayLike) -> Split:
        return Split(torch.from_numpy(images), torch.from_numpy(np.asarray(labels, np.int64)))

    return Dataset(name, class_names, split(*train), split(*test), *statistics(name), SMALL_SIDE)


def _shapes(limit: int | None) -> Dataset:
    from richkd.data import shapes

    train = shapes.draw(limit or SHAPES_TRAIN, seed=SHAPES_SEEDS["train"])
    test = shapes.draw(SHAPES_TEST, seed=SHAPES_SEEDS["test"])
    return _small_images(
        "shapes", shapes.CLASS_NAMES, (train.images, train.labels), (test.images, test.labels)
    )


def _of_files(settings: Images, contents: Contents, decoding: Decoding | None) -> Dataset:
    """Make a dataset of images that stay encoded."""
    listings, named = contents.listings, contents.named
    treated = small.treatment(settings, [*listings.values()])
    values = [each.values for each in listings.values()]
    decoding = decoding or Decoding.of(settings.background, settings.pixel_range, values)
    traits = np.concatenate([each.traits for each in listings.values()])
    origin = "set by --pixel-range" if settings.pixel_range else ""
    read = describe_decoding(decoding, values, traits, origin)
    splits = {
        split: files_split(each, treated.image_size, decoding) for split, each in listings.items()
    }
    return Dataset(
        settings.dataset,
        named.names,
        splits["train"],
        splits["test"],
        *statistics(settings.dataset),
        treated.image_size,
        validation=splits.get("validation"),
        skipped=tuple(key for each in listings.values() for key in each.skipped),
        folders=contents.folders,
        columns=contents.columns,
        class_folders=contents.classes,
        notes=(*contents.notes, *read, treated.note),
        whole=treated.whole,
    )


def files_split(listing: Listing, image_size: int, decoding: Decoding) -> Split:
    """Make a split of images that stay files."""
    files = ImageFiles(
        listing.source, listing.sizes, listing.traits, image_size, decoding, listing.prints
    )
    return Split(files, torch.from_numpy(listing.labels))

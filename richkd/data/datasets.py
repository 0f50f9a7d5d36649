"""The data sets: class names, and for each split uint8 images (or image files) and labels.

What is read: `shapes` (drawn), Fashion-MNIST (Debian's package or torchvision's files), CIFAR-10
and -100 (torchvision), and folders of images (`layouts`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.config import catalog
from richkd.config.catalog import DEBIAN_FASHION_MNIST
from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data import class_names, folders, layouts
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.decoding import CHANGED, Decoding, describe_decoding
from richkd.data.entries import describe_splits
from richkd.data.folders import Paths
from richkd.data.framing import NetworkInput
from richkd.data.views import PadCropFlip, ResizedCropFlip, ViewSpace
from richkd.data.walk import Walk

SMALL_SIDE = 32  # of the images of every data set but folders
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000
SHAPES_SEEDS = {"train": 1, "test": 2}

# Mean and standard deviation of pixels in 0..1. CIFAR's are those that the published checkpoints
# were trained with; the others were computed over the training split (padding included).
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion-mnist": ((0.2190,) * 3, (0.3318,) * 3),
    "shapes": ((0.2782, 0.2404, 0.2283), (0.2271, 0.193, 0.1997)),
    catalog.IMAGE_FOLDER: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class ImageFiles:
    """Images that stay files until a view of them is wanted."""

    root: Path
    paths: Paths  # relative to root
    sizes: NDArray[np.int64]  # [N,2], height and width, upright
    traits: NDArray[np.uint8]  # [N], bits as of data/decoding.py
    image_size: int  # side of the square views
    decoding: Decoding

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """The image in RGB; errors are those of `Decoding.read`."""
        return self.decoding.read(self.root / self.paths[index])

    def take(self, which: slice | NDArray[np.generic]) -> ImageFiles:
        """Some of the files, by a slice, their numbers or a mask."""
        return replace(
            self,
            paths=self.paths.take(which),
            sizes=self.sizes[which],
            traits=self.traits[which],
        )


@dataclass(frozen=True)
class Split:
    """Images [N,H,W,3] uint8 (or files) and labels [N] int64."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """The first samples; all of them for None."""
        return self if count is None or count >= len(self) else self.take(slice(count))

    def take(self, which: slice | Tensor) -> Split:
        """Some of the samples, by a slice or by their ids."""
        images = self.images
        if isinstance(images, ImageFiles):
            images = images.take(which.numpy() if isinstance(which, Tensor) else which)
        else:
            images = images[which]
        return Split(images, self.labels[which])

    @property
    def view_space(self) -> ViewSpace:
        """The augmentation that suits the images."""
        if isinstance(self.images, ImageFiles):
            return ResizedCropFlip(self.images.sizes, self.images.image_size)
        return PadCropFlip()


@dataclass(frozen=True)
class Dataset:
    """Splits with class names; `mean` and `std` are of pixels in 0..1."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    skipped: tuple[str, ...] = ()  # files of a folder that are no whole images
    validation: Split | None = None  # that choices are made on
    folders: Mapping[str, str] = field(default_factory=dict)  # of each split, in that of a folder
    class_folders: tuple[str, ...] = ()  # of the classes, likewise
    notes: tuple[str, ...] = ()  # how a folder was read, line by line

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, "test": self.test, **validation}

    @property
    def network_input(self) -> NetworkInput:
        """What networks take that are trained here on these images."""
        whole = isinstance(self.train.images, Tensor)
        return NetworkInput(
            size=self.image_size, mean=self.mean, std=self.std, crop=1.0 if whole else CLEAN_SHARE
        )

    @property
    def decoding(self) -> Decoding | None:
        """How files become RGB, where that takes more than what is stored in some of them."""
        every = [split.images for split in self.splits.values()]
        files = [images for images in every if isinstance(images, ImageFiles)]
        changed = any((images.traits & CHANGED).any() for images in files)
        return files[0].decoding if changed else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all splits: pixels and labels, or for files their names and lengths.

        How files are decoded is part of it, where that changes pixels.
        """
        return self._digest(self.decoding)

    def read_otherwise_in(self, fingerprint: str) -> bool:
        """Whether a fingerprint is of these very files, decoded as before `Decoding` was there."""
        return self.decoding is not None and fingerprint == self._digest(None)

    def _digest(self, decoding: Decoding | None) -> str:
        digest = hashlib.sha256()
        for split in self.splits.values():
            images = split.images
            if isinstance(images, ImageFiles):
                for path in images.paths:
                    size = (images.root / path).stat().st_size
                    digest.update(f"{path}\0{size}\0".encode(errors="surrogateescape"))
                if decoding is not None:
                    digest.update((images.traits & CHANGED).data)
            else:
                digest.update(str(tuple(images.shape)).encode())
                digest.update(np.ascontiguousarray(images.numpy()).data)
            digest.update(split.labels.numpy().astype("<i8").data)
        if decoding is not None:
            digest.update(json.dumps(decoding.entry).encode())
        return digest.hexdigest()


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a data set's pixels in 0..1; RichKDError for no data set."""
    return _STATISTICS[catalog.split_name(name)[0]]


def load_dataset(
    settings: Images,
    skipped: Collection[str] | None = None,
    report: Report | None = None,
    layout: layouts.Layout | None = None,
    decoding: Decoding | None = None,
) -> Dataset:
    """Read a data set by name, its first `limit` training samples.

    Args:
        settings: which images.
        skipped: of a folder of images, the files that stage one left out, where that is known;
            else every file is decoded once to find those that are broken.
        report: where the progress of that goes.
        layout: of a folder of images, the folders of its splits, where that is known.
        decoding: likewise, how its files were decoded.

    Raises:
        RichKDError: an unknown name, missing or damaged files, or no network to fetch them.
    """
    kind, path = catalog.split_name(settings.dataset)
    root = Path(settings.data_root)
    if kind == catalog.IMAGE_FOLDER:
        assert path is not None
        parts = _image_folder(
            settings, path, skipped, layout, decoding, report or Report(quiet=True)
        )
    elif kind == "shapes":
        parts = _shapes(settings.limit)
    elif kind == "fashion-mnist":
        parts = _fashion_mnist(root)
    else:
        parts = _cifar(kind, root)
    mean, std = statistics(settings.dataset)
    train, validation = hold_out(
        parts.train.first(settings.limit), settings.validation, parts.class_names
    )
    return Dataset(
        name=settings.dataset,
        class_names=parts.class_names,
        train=train,
        validation=parts.validation or validation,
        test=parts.test,
        mean=mean,
        std=std,
        image_size=parts.image_size,
        skipped=parts.skipped,
        folders=parts.folders,
        class_folders=parts.class_folders,
        notes=parts.notes,
    )


def introduce(dataset: Dataset, report: Report) -> None:
    """Say what a data set is, how its files were read, and what was left out."""
    counts = describe_splits({name: len(split) for name, split in dataset.splits.items()})
    side, classes = dataset.image_size, len(dataset.class_names)
    report.log(
        f"{dataset.name}: {counts} images of {side}×{side}, {classes} classes; fingerprint "
        f"{dataset.fingerprint[:12]}"
    )
    for note in dataset.notes:
        report.log(note)
    for path in dataset.skipped:
        report.log(f"left out, for it is no whole image: {path}")


def check_class_names(settings: Images) -> None:
    """Refuse a file of class names that does not fit the folders, before any image is read.

    Raises:
        RichKDError: as `load_dataset`.
    """
    _, path = catalog.split_name(settings.dataset)
    if settings.class_names and path is not None and path.is_dir():
        train = path / layouts.find_layout(path).folders["train"]
        class_names.read_class_names(Path(settings.class_names), Walk(train, ()).classes)


def hold_out(train: Split, share: float, class_names: Sequence[str]) -> tuple[Split, Split | None]:
    """Split training samples into those to train on and those to make choices on.

    Each class gives up the same share of its samples, chosen at random and the same in every call.

    Args:
        train: the samples, which keep their order.
        share: of each class, rounded to whole samples; 0 holds nothing out.
        class_names: C of them, for messages.

    Raises:
        RichKDError: a class would have no sample left on one of the two sides.
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
            f"validation = {share}: of the {int(counts[first])} training images of class "
            f"{class_names[first]!r} that leaves none to {side} on; choose another share, or take "
            f"more images",
            code="validation-share",
        )
    rank = torch.arange(len(train)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    chosen = rank < held.repeat_interleave(counts)
    return train.take(order[~chosen].sort().values), train.take(order[chosen].sort().values)


@dataclass(frozen=True)
class Parts:
    """What differs between kinds of data sets."""

    class_names: tuple[str, ...]
    train: Split
    test: Split
    image_size: int = SMALL_SIDE
    validation: Split | None = None
    skipped: tuple[str, ...] = ()
    folders: Mapping[str, str] = field(default_factory=dict)
    class_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _shapes(limit: int | None) -> Parts:
    from richkd.data import shapes

    splits = []
    for part, count in (("train", limit or SHAPES_TRAIN), ("test", SHAPES_TEST)):
        drawing = shapes.draw(count, seed=SHAPES_SEEDS[part])
        splits.append(Split(torch.from_numpy(drawing.images), torch.from_numpy(drawing.labels)))
    return Parts(shapes.CLASS_NAMES, splits[0], splits[1])


def _fashion_mnist(root: Path) -> Parts:
    folder = root / "FashionMNIST" / "raw"
    names = [
        f"{part}-{what}"
        for part in ("train", "t10k")
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    if not all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
        if DEBIAN_FASHION_MNIST.is_dir():
            folder = DEBIAN_FASHION_MNIST
        else:
            _download_with_torchvision(
                "FashionMNIST",
                root,
                (
                    f"install Debian's package dataset-fashion-mnist, or copy the four *-ubyte.gz "
                    f"files into {folder}"
                ),
            )
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / name) for name in names
    )
    splits = [
        Split(_pad_to_32_rgb(images), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    ]
    return Parts(_FASHION_CLASSES, splits[0], splits[1])


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: magic (0, 0, 8, number of axes), axes as big-endian u32, values."""
    compressed = path.with_name(path.name + ".gz")
    try:
        if path.is_file():
            content = path.read_bytes()
        else:
            content = gzip.decompress(compressed.read_bytes())
    except (OSError, EOFError) as error:
        raise RichKDError(
            f"cannot read {path}[.gz]: {error}; fetch it again", code="dataset-file-unreadable"
        ) from None
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise RichKDError(
            f"{path} is no IDX file of bytes; fetch it again", code="dataset-file-damaged"
        )
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise RichKDError(
            f"{path} is cut short or damaged; fetch it again", code="dataset-file-damaged"
        )
    return values.reshape(shape)


def _pad_to_32_rgb(images: NDArray[np.uint8]) -> Tensor:
    """[N,28,28] -> [N,32,32,3]: zeros around, the one channel three times."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(np.repeat(padded[..., None], 3, axis=-1))


def _cifar(kind: str, root: Path) -> Parts:
    archive = "cifar-100-python.tar.gz" if kind == "cifar100" else "cifar-10-python.tar.gz"
    reader = _download_with_torchvision(
        kind.upper(), root, f"copy {archive} from elsewhere into {root} and run again"
    )
    splits = []
    for train in (True, False):
        data = reader(root, train=train)
        splits.append(Split(torch.from_numpy(data.data), torch.tensor(data.targets)))
    class_names = tuple(name.replace("_", " ") for name in data.classes)
    return Parts(class_names, splits[0], splits[1])


def _download_with_torchvision(name: str, root: Path, offline: str) -> Any:
    """torchvision's reader, its files in place: found under root, unpacked or downloaded."""
    import torchvision

    reader = getattr(torchvision.datasets, name)
    try:
        reader(root, train=True)
        reader(root, train=False)
    except RuntimeError:  # not there, or not whole
        try:
            reader(root, train=True, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise RichKDError(
                f"cannot download {name} to {root} ({error}); without a network {offline}",
                code="dataset-download-failed",
            ) from None
    return reader


def _image_folder(
    settings: Images,
    path: Path,
    skipped: Collection[str] | None,
    layout: layouts.Layout | None,
    decoding: Decoding | None,
    report: Report,
) -> Parts:
    if not path.is_dir():
        raise RichKDError(
            f"imagefolder:{path}: there is no such folder", code="dataset-folder-missing"
        )
    found, notes = layouts.find_splits(path, layout)
    if settings.validation and "validation" in found:
        raise RichKDError(
            f"validation = {settings.validation:g}: {found['validation'].folder} has validation "
            f"images; leave --validation out, or move that folder away to hold out training images",
            code="validation-and-folder",
        )
    train = found["train"]
    names = (
        class_names.read_class_names(Path(settings.class_names), train.classes)
        if settings.class_names
        else class_names.name_classes(train.classes)
    )
    listed = {
        split: folders.list_images(each.folder, settings.broken, skipped, report, each)
        for split, each in found.items()
    }
    image_size = settings.image_size or folders.suggest_image_size(listed["train"].sizes)
    values = [each.values for each in listed.values()]
    decoding = decoding or Decoding.of(settings.background, settings.pixel_range, values)
    splits = {split: files_split(each, image_size, decoding) for split, each in listed.items()}
    traits = np.concatenate([each.traits for each in listed.values()])
    origin = "--pixel-range" if settings.pixel_range else ""
    read = describe_decoding(decoding, values, traits, origin)
    return Parts(
        names.names,
        splits["train"],
        splits["test"],
        image_size,
        validation=splits.get("validation"),
        skipped=tuple(path for each in listed.values() for path in each.skipped),
        folders={}
        if layout is not None and layout.earlier
        else {split: each.folder.name for split, each in found.items()},
        class_folders=train.classes,
        notes=(*notes, *names.notes, *read),
    )


def files_split(listing: folders.Listing, image_size: int, decoding: Decoding) -> Split:
    """Images that stay files."""
    files = ImageFiles(
        listing.folder, listing.paths, listing.sizes, listing.traits, image_size, decoding
    )
    return Split(files, torch.from_numpy(listing.labels))

"""The catalogue of datasets and the defaults that follow from them. Does not import torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from richkd.core.errors import RichKDError, unknown

IMAGE_FOLDER = "imagefolder"
IMAGENET = "imagenet"  # for `plan`, which needs no images


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The networks that a dataset suggests."""

    teacher: str
    student: str
    clip: str


_OPENAI = "ViT-L-14-quickgelu:openai"  # the CLIP of the RichKD release

DATASETS: dict[str, Defaults] = {
    "shapes": Defaults(teacher="resnet20", student="resnet8", clip="demo"),
    "fashion-mnist": Defaults(teacher="resnet20", student="resnet8", clip=_OPENAI),
    "cifar10": Defaults(teacher="resnet32x4", student="resnet8x4", clip=_OPENAI),
    "cifar100": Defaults(teacher="resnet32x4", student="resnet8x4", clip=_OPENAI),
    # its networks follow from the size of the images (`networks`)
    IMAGE_FOLDER: Defaults(teacher="", student="", clip=_OPENAI),
}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The size of a dataset: its images, their classes and pixels per side."""

    train: int
    test: int
    classes: int
    image_size: int


COUNTS: dict[str, Counts] = {
    "cifar10": Counts(train=50_000, test=10_000, classes=10, image_size=32),
    "cifar100": Counts(train=50_000, test=10_000, classes=100, image_size=32),
    "fashion-mnist": Counts(train=60_000, test=10_000, classes=10, image_size=32),
    IMAGENET: Counts(train=1_281_167, test=50_000, classes=1000, image_size=224),
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# The unpacked files of a dataset under --data-root, and the archive they come from.
PLACES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "fashion-mnist": ("FashionMNIST/raw", str(DEBIAN_FASHION_MNIST)),
}
SMALL = 64  # pixels per side, up to which the CIFAR zoo is used; timm's networks beyond


def networks(dataset: str, image_size: int) -> tuple[str, str]:
    """Return the names of the teacher and the student for a dataset and an image size."""
    suggested = defaults(dataset)
    by_size = ("resnet32x4", "resnet8x4") if image_size <= SMALL else ("resnet50", "resnet18")
    return suggested.teacher or by_size[0], suggested.student or by_size[1]


# The initial learning rates of the CIFAR distillation literature, by network.
LEARNING_RATE = 0.05
LEARNING_RATES = {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}
# Of optimizers that divide a step by the size of past gradients: the default of their authors.
ADAMS_LEARNING_RATE = 1e-3
ADAMS = frozenset({"adam", "adamw", "adamp", "nadam", "nadamw", "radam", "radamw", "lamb", "lambw"})


def learning_rate(network: str, optimizer: str = "sgd") -> float:
    """Return the default initial learning rate of a network.

    Raises:
        RichKDError: the optimizer is neither a variant of SGD nor of Adam's family.
    """
    if optimizer in ADAMS:
        return ADAMS_LEARNING_RATE
    if "sgd" in optimizer or optimizer in ("momentum", "nesterov", "nesterovw"):
        return LEARNING_RATES.get(network, LEARNING_RATE)
    raise RichKDError(
        f"there is no default learning rate for optimizer {optimizer}; choose one with --lr",
        code="learning-rate-not-given",
    )


def at_home(text: str) -> str:
    """Expand `~` at the start of a path, or of the path in `imagefolder:PATH`.

    The shell expands it only at the start of a word: not after a colon or an equals sign.

    Raises:
        RichKDError: the home folder is unknown.
    """
    prefix = f"{IMAGE_FOLDER}:"
    path = text.removeprefix(prefix)
    if not path.startswith("~"):
        return text
    expanded = os.path.expanduser(path)  # noqa: PTH111  # leaves ~x as it is if x is no user
    if expanded == path and path[1:2] in ("", "/"):
        raise RichKDError(
            f"{text}: the home folder is unknown; set HOME, or write the whole path",
            code="home-unknown",
        )
    return text[: len(text) - len(path)] + expanded


def split_name(dataset: str) -> tuple[str, Path | None]:
    """Split `imagefolder:PATH` into its kind and path; other names give None for the path.

    Raises:
        RichKDError: an unknown dataset, a missing path, or a path where none belongs.
    """
    kind, colon, path = dataset.partition(":")
    if kind not in DATASETS:
        raise unknown("dataset", dataset, [*(set(DATASETS) - {IMAGE_FOLDER}), "imagefolder:PATH"])
    if kind == IMAGE_FOLDER and not path:
        raise RichKDError(
            "imagefolder needs a folder; use --dataset imagefolder:PATH",
            code="dataset-path-missing",
        )
    if kind != IMAGE_FOLDER and colon:
        raise RichKDError(
            f"dataset {dataset!r}: {kind} takes no path; use --dataset {kind}",
            code="dataset-takes-no-path",
        )
    return kind, Path(path) if path else None


def found(dataset: str, root: Path) -> Path | None:
    """Return where a dataset is on this disk, or None if it would have to be downloaded."""
    kind, path = split_name(dataset)
    places = [path] if path else [root / place for place in PLACES[kind]]
    return next((place for place in places if place.exists()), None)


def defaults(dataset: str) -> Defaults:
    """Return the defaults of a dataset, by its name as the user gives it."""
    return DATASETS[split_name(dataset)[0]]


def short_name(dataset: str) -> str:
    """Return a name for files: the dataset's, or the folder's for `imagefolder:PATH`."""
    kind, path = split_name(dataset)
    return kind if path is None else path.resolve().name or IMAGE_FOLDER

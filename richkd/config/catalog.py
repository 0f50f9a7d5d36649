"""The data sets by name, and what each suggests when the user says nothing. No torch in here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from richkd.core.errors import RichKDError, unknown

IMAGE_FOLDER = "imagefolder"
IMAGENET = "imagenet"  # for `plan`, which needs no images


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a data set suggests for settings that were not given."""

    teacher: str
    student: str
    clip: str


_OPENAI = "ViT-L-14-quickgelu:openai"  # the CLIP of the RichKD release

DATASETS: dict[str, Defaults] = {
    "shapes": Defaults(teacher="resnet20", student="resnet8", clip="demo"),
    "fashion-mnist": Defaults(teacher="resnet20", student="resnet8", clip=_OPENAI),
    "cifar10": Defaults(teacher="resnet32x4", student="resnet8x4", clip=_OPENAI),
    "cifar100": Defaults(teacher="resnet32x4", student="resnet8x4", clip=_OPENAI),
    # networks: by the size of the images, once that is known (`networks`)
    IMAGE_FOLDER: Defaults(teacher="", student="", clip=_OPENAI),
}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images there are, of how many classes and pixels a side."""

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
# Where a data set is: unpacked under --data-root, or beside that what it is unpacked from.
PLACES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "fashion-mnist": ("FashionMNIST/raw", str(DEBIAN_FASHION_MNIST)),
}
SMALL = 64  # pixels: up to here the CIFAR zoo is at home, beyond it timm's networks are


def networks(dataset: str, image_size: int) -> tuple[str, str]:
    """Teacher and student that suit a data set with images of a size."""
    suggested = defaults(dataset)
    by_size = ("resnet32x4", "resnet8x4") if image_size <= SMALL else ("resnet50", "resnet18")
    return suggested.teacher or by_size[0], suggested.student or by_size[1]


# The learning rate that the CIFAR distillation literature starts a network with, by its name.
LEARNING_RATE = 0.05
LEARNING_RATES = {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}


def learning_rate(network: str) -> float:
    """The learning rate to start a network with, where none was given."""
    return LEARNING_RATES.get(network, LEARNING_RATE)


def at_home(text: str) -> str:
    """A path, or a data set's name, with the user's home folder for a `~` at the path's start.

    The shell puts it there only at the start of a word: not after a colon or an equals sign.

    Raises:
        RichKDError: there is no home folder.
    """
    prefix = f"{IMAGE_FOLDER}:"
    path = text.removeprefix(prefix)
    if not path.startswith("~"):
        return text
    whole = os.path.expanduser(path)  # noqa: PTH111  # which leaves ~x where x is no user
    if whole == path and path[1:2] in ("", "/"):
        raise RichKDError(
            f"{text}: there is no home folder to put for ~; set HOME, or name it",
            code="home-unknown",
        )
    return text[: len(text) - len(path)] + whole


def split_name(dataset: str) -> tuple[str, Path | None]:
    """`imagefolder:PATH` into its kind and path; any other name into itself and None.

    Raises:
        RichKDError: the name is not one of the data sets, or a path is missing or too much.
    """
    kind, colon, path = dataset.partition(":")
    if kind not in DATASETS:
        raise unknown("data set", dataset, [*(set(DATASETS) - {IMAGE_FOLDER}), "imagefolder:PATH"])
    if kind == IMAGE_FOLDER and not path:
        raise RichKDError(
            "imagefolder needs a folder: --dataset imagefolder:PATH", code="dataset-path-missing"
        )
    if kind != IMAGE_FOLDER and colon:
        raise RichKDError(
            f"data set {kind!r} takes no path, got {dataset!r}", code="dataset-takes-no-path"
        )
    return kind, Path(path) if path else None


def found(dataset: str, root: Path) -> Path | None:
    """Where a data set is on this disk, so that nothing is downloaded; None where it is not."""
    kind, path = split_name(dataset)
    places = [path] if path else [root / place for place in PLACES[kind]]
    return next((place for place in places if place.exists()), None)


def defaults(dataset: str) -> Defaults:
    """The suggestions of a data set, by its name as the user gives it."""
    return DATASETS[split_name(dataset)[0]]


def short_name(dataset: str) -> str:
    """A name fit for a file: the data set's, or the folder's for `imagefolder:PATH`."""
    kind, path = split_name(dataset)
    return kind if path is None else path.resolve().name or IMAGE_FOLDER

"""The catalogue of datasets and the defaults that follow from them. Does not import torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from richkd.core.errors import RichKDError, unknown

IMAGE_FOLDER = "imagefolder"
HUGGING_FACE = "hf"
SHARDS = "wds"
# Kinds of the user's own images, and what their names look like.
OWN = {IMAGE_FOLDER: "imagefolder:PATH", HUGGING_FACE: "hf:NAME", SHARDS: "wds:PATH"}
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
    # their networks follow from the size of the images (`networks`)
    **dict.fromkeys(OWN, Defaults(teacher="", student="", clip=_OPENAI)),
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
    """Expand `~` at the start of a path, or of the path in `imagefolder:PATH` and the like.

    The shell expands it only at the start of a word: not after a colon or an equals sign.

    Raises:
        RichKDError: the home folder is unknown.
    """
    prefix = next((f"{kind}:" for kind in OWN if text.startswith(f"{kind}:")), "")
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

    Of `hf:NAME@CONFIG:SPLIT`, the path is NAME; `table_name` has the rest.

    Raises:
        RichKDError: an unknown dataset, a missing path, or a path where none belongs.
    """
    kind, colon, path = dataset.partition(":")
    if kind not in DATASETS:
        raise unknown("dataset", dataset, [*(DATASETS.keys() - OWN.keys()), *OWN.values()])
    if kind in OWN and not path:
        what = "the name of a dataset" if kind == HUGGING_FACE else "a folder"
        raise RichKDError(
            f"{kind} needs {what}; use --dataset {OWN[kind]}", code="dataset-path-missing"
        )
    if kind not in OWN and colon:
        raise RichKDError(
            f"dataset {dataset!r}: {kind} takes no path; use --dataset {kind}",
            code="dataset-takes-no-path",
        )
    if kind == HUGGING_FACE:
        path = table_name(dataset).name
    return kind, Path(path) if path else None


def is_own(dataset: str) -> bool:
    """Return whether a dataset consists of the user's own images, whose names are free."""
    return split_name(dataset)[0] in OWN


@dataclass(frozen=True)
class TableName:
    """The parts of `hf:NAME@CONFIG:SPLIT`."""

    name: str  # on the Hugging Face Hub, or a folder
    config: str = ""
    train: str = ""  # the split to train on

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).is_dir()


def table_name(dataset: str) -> TableName:
    """Split `hf:NAME@CONFIG:SPLIT`; the name of a folder that exists may contain @ and colons."""
    name, config, train = dataset.removeprefix(f"{HUGGING_FACE}:"), "", ""
    if not Path(name).is_dir() and ":" in name:
        name, _, train = name.rpartition(":")
    if not Path(name).is_dir() and "@" in name:
        name, _, config = name.rpartition("@")
    return TableName(name, config, train)


def found(dataset: str, root: Path) -> Path | None:
    """Return where a dataset is on this disk, or None if it would have to be downloaded."""
    kind, path = split_name(dataset)
    places = [path] if path else [root / place for place in PLACES[kind]]
    if kind == HUGGING_FACE:
        places += _kept_tables(str(path))
    return next((place for place in places if place.exists()), None)


def _kept_tables(name: str) -> list[Path]:
    """Return where the package `datasets` keeps a dataset of the Hub, if it does."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets")
    wanted = name.replace("/", "").replace("_", "").lower()  # its folders are in snake case
    try:
        return [each for each in kept.iterdir() if each.name.replace("_", "").lower() == wanted]
    except OSError:
        return []


def defaults(dataset: str) -> Defaults:
    """Return the defaults of a dataset, by its name as the user gives it."""
    return DATASETS[split_name(dataset)[0]]


def short_name(dataset: str) -> str:
    """Return a name for files: the dataset's, or the folder's for `imagefolder:PATH`."""
    kind, path = split_name(dataset)
    config = table_name(dataset).config if kind == HUGGING_FACE else ""
    name = kind if path is None else path.resolve().name or kind
    return f"{name}-{config}" if config else name

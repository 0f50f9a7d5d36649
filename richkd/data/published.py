"""Read the files of published datasets of small images: Fashion-MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from richkd.config.catalog import DEBIAN_FASHION_MNIST
from richkd.core.errors import RichKDError

_FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

# Class names, then images [N,32,32,3] and labels [N] to train and to test on.
Images = tuple[NDArray[np.uint8], ArrayLike]
Arrays = tuple[tuple[str, ...], Images, Images]


def read(kind: str, root: Path) -> Arrays:
    """Read a dataset, after downloading its files if they are missing.

    Raises:
        RichKDError: files are damaged, or the download failed.
    """
    return _fashion_mnist(root) if kind == "fashion-mnist" else _cifar(kind, root)


def _fashion_mnist(root: Path) -> Arrays:
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
            remedy = (
                f"install Debian's package dataset-fashion-mnist, or copy the four *-ubyte.gz "
                f"files to {folder}"
            )
            _torchvision_reader("FashionMNIST", root, remedy)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / name) for name in names
    )
    return (
        _FASHION_CLASSES,
        (_pad_to_32_rgb(train_images), train_labels),
        (_pad_to_32_rgb(test_images), test_labels),
    )


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: magic (0, 0, 8, number of axes), big-endian u32 sizes, values."""
    compressed = path.with_name(path.name + ".gz")
    try:
        if path.is_file():
            content = path.read_bytes()
        else:
            content = gzip.decompress(compressed.read_bytes())
    except (OSError, EOFError) as error:
        raise RichKDError(
            f"cannot read {path}[.gz]: {error}; download it again", code="dataset-file-unreadable"
        ) from None
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise RichKDError(
            f"{path} is not an IDX file of bytes; download it again", code="dataset-file-damaged"
        )
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise RichKDError(
            f"{path} is truncated or damaged; download it again", code="dataset-file-damaged"
        )
    return values.reshape(shape)


def _pad_to_32_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pad images with zeros and repeat their channel: [N,28,28] -> [N,32,32,3]."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[..., None], 3, axis=-1)


def _cifar(kind: str, root: Path) -> Arrays:
    archive = "cifar-100-python.tar.gz" if kind == "cifar100" else "cifar-10-python.tar.gz"
    reader = _torchvision_reader(kind.upper(), root, f"copy {archive} to {root}")
    train, test = reader(root, train=True), reader(root, train=False)
    class_names = tuple(name.replace("_", " ") for name in train.classes)
    return class_names, (train.data, train.targets), (test.data, test.targets)


def _torchvision_reader(name: str, root: Path, remedy: str) -> Any:
    """Return torchvision's reader of a dataset, after unpacking or downloading its files."""
    import torchvision

    reader = getattr(torchvision.datasets, name)
    try:
        reader(root, train=True)
        reader(root, train=False)
    except RuntimeError:  # missing or damaged
        try:
            reader(root, train=True, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise RichKDError(
                f"cannot download {name} to {root} ({error}); without a network, {remedy} and run "
                f"the same command again",
                code="dataset-download-failed",
            ) from None
    return reader

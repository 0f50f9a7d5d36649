"""The readers, on files in the exact layouts in which the datasets are published."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses, write_cifar100
from PIL import Image

from richkd.config.settings import Images
from richkd.data.datasets import ImageFiles, load_dataset
from richkd.data.inputs import make_inputs
from richkd.data.views import ResizedCropFlip, views_tensor


def test_cifar100_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch, 120, 30)
    dataset = load_dataset(Images(dataset="cifar100", data_root=str(tmp_path), limit=100))
    assert dataset.class_names[7] == "class 07" and len(dataset.class_names) == 100
    assert isinstance(dataset.train.images, torch.Tensor)
    assert dataset.train.images.shape == (100, 32, 32, 3)
    assert len(dataset.test) == 30
    with (tmp_path / "cifar-100-python" / "train").open("rb") as file:
        raw = pickle.load(file)
    assert dataset.train.labels.tolist() == raw["fine_labels"][:100]
    pixels = raw["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert (dataset.train.images.numpy() == pixels[:100]).all()


def test_cifar_absent_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with refuses("dataset-download-failed", "CIFAR10", tmp_path, "cifar-10-python.tar.gz"):
        load_dataset(Images(dataset="cifar10", data_root=str(tmp_path)))


def idx(values: np.ndarray) -> bytes:
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return b"\0\0\x08" + bytes([values.ndim]) + shape + values.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_in_torchvisions_layout(tmp_path: Path, zipped: bool) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    content = {}
    for part, count in (("train", 12), ("t10k", 5)):
        content[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        content[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    for name, values in content.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    dataset = load_dataset(Images(dataset="fashion-mnist", data_root=str(tmp_path)))
    images = dataset.train.images
    assert isinstance(images, torch.Tensor) and images.shape == (12, 32, 32, 3)
    inner = content["train-images-idx3-ubyte"]
    for channel in range(3):
        assert (images[:, 2:30, 2:30, channel].numpy() == inner).all()
    assert int(images.sum()) == 3 * int(inner.sum())  # zeros around
    assert dataset.test.labels.tolist() == content["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize(
    "damage", [b"", b"\0\0\x09\x01", b"\0\0\x08\x03\0\0\0\x0c", idx(np.ones((2, 4), np.uint8))[:-1]]
)
def test_damaged_idx(tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (folder / f"{part}-{what}").write_bytes(damage)
    with refuses("dataset-file-damaged", folder / "train-images-idx3-ubyte"):
        load_dataset(Images(dataset="fashion-mnist", data_root=str(tmp_path)))


@pytest.mark.real_data
def test_fashion_mnist_as_debian_ships_it(tmp_path: Path) -> None:
    dataset = load_dataset(Images(dataset="fashion-mnist", data_root=str(tmp_path)))
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert torch.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert dataset.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    pixels = dataset.train.images
    assert isinstance(pixels, torch.Tensor)
    values = pixels[..., 0].float() / 255
    assert values.mean().item() == pytest.approx(dataset.mean[0], abs=1e-4)
    assert values.std().item() == pytest.approx(dataset.std[0], abs=1e-4)


def test_shapes_statistics_and_limit() -> None:
    dataset = load_dataset(Images(dataset="shapes", limit=500))
    assert len(dataset.train) == 500 and isinstance(dataset.train.images, torch.Tensor)
    values = dataset.train.images.float() / 255
    assert values.mean((0, 1, 2)).tolist() == pytest.approx(dataset.mean, abs=0.03)
    assert values.std((0, 1, 2)).tolist() == pytest.approx(dataset.std, abs=0.03)


def test_train_and_test_shapes_are_other_drawings() -> None:
    dataset = load_dataset(Images(dataset="shapes", limit=200))
    train, test = dataset.train.images, dataset.test.images
    assert isinstance(train, torch.Tensor) and isinstance(test, torch.Tensor)
    assert not {bytes(i.numpy()) for i in train} & {bytes(i.numpy()) for i in test}


def test_fingerprint_tells_data_apart() -> None:
    one, two, three = (load_dataset(Images(dataset="shapes", limit=n)) for n in (20, 20, 21))
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert isinstance(two.train.images, torch.Tensor)
    changed = load_dataset(Images(dataset="shapes", limit=20))
    assert isinstance(changed.train.images, torch.Tensor)
    changed.train.images[3, 4, 5, 0] ^= 1
    assert changed.fingerprint != one.fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs of two classes in different sizes and modes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for part, count in (("train", 6), ("val", 3)):
        for name in ("red_panda", "tree"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                size = rng.integers(30, 90, 2)
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                image = Image.fromarray(pixels)
                if number == 1:
                    image = image.convert("L")
                image.save(root / part / name / f"{number}.png")
    return root


def test_image_folder(folder: Path) -> None:
    dataset = load_dataset(Images(dataset=f"imagefolder:{folder}", image_size=24))
    assert dataset.class_names == ("red panda", "tree")
    assert (len(dataset.train), len(dataset.test)) == (12, 6)
    assert dataset.train.first(4).labels.tolist() == [0, 1, 0, 1]  # a prefix holds all classes
    files = dataset.train.images
    assert isinstance(files, ImageFiles)
    for index in range(12):
        image = files.open(index)
        assert image.mode == "RGB" and image.size[::-1] == tuple(files.sizes[index])
    views = views_tensor(dataset.train.view_space.draw(0, 12, 1)[0])
    inputs = make_inputs(files, torch.device("cpu"))
    order = torch.randperm(12)
    batches = list(inputs.batches(order, views, 5))
    assert [len(index) for index, _ in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([index for index, _ in batches]), order)
    together = torch.cat([images for _, images in inputs.batches(order, views, 1)])
    assert torch.equal(torch.cat([images for _, images in batches]), together)
    assert together.shape == (12, 24, 24, 3) and together.dtype == torch.uint8


def test_image_folder_by_workers_equals_without(folder: Path) -> None:
    files = load_dataset(Images(dataset=f"imagefolder:{folder}", image_size=16)).train.images
    inputs = make_inputs(files, torch.device("cpu"))
    assert isinstance(files, ImageFiles)
    views = torch.from_numpy(ResizedCropFlip(files.sizes, 16).clean(12))
    workers = torch.cat([images for _, images in inputs.batches(torch.arange(12), views, 2)])
    alone = torch.cat([images for _, images in inputs.batches(torch.arange(12), views, 12)])
    assert torch.equal(workers, alone)


@pytest.mark.parametrize(
    ("spoil", "code", "named"),
    [
        (
            lambda root: (root / "train" / "tree" / "0.png").write_bytes(b"no"),
            "image-damaged",
            ("train/tree/0.png", "--broken skip"),
        ),
        (lambda root: (root / "val").rename(root / "other"), "folder-layout", ("val/CLASS",)),
        (
            lambda root: (root / "val" / "tree").rename(root / "val" / "bush"),
            "split-classes-differ",
            ("bush", "tree"),
        ),
        (lambda root: (root / "train" / "empty").mkdir(), "folder-classes", ("train/empty",)),
    ],
)
def test_bad_image_folders(
    folder: Path, spoil: Callable[[Path], object], code: str, named: tuple[str, ...]
) -> None:
    spoil(folder)
    with refuses(code, folder, *named):
        load_dataset(Images(dataset=f"imagefolder:{folder}"))

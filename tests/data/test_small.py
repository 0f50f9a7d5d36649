"""Small images in folders: when they are taken whole, and that they then are as those of CIFAR."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refusal, assert_same_run, refuses, stage_one_of, tree, write_teacher
from PIL import Image
from torch import Tensor

import richkd
from richkd.config.settings import Images, Precompute
from richkd.core.progress import Report
from richkd.data import small
from richkd.data.datasets import Dataset, ImageFiles, Split, load_dataset
from richkd.data.decoding import Decoding
from richkd.data.small import Treatment, treatment
from richkd.precompute import precompute
from richkd.store.checksums import write_sealed
from richkd.store.folder import Folder
from richkd.store.locations import open_location
from richkd.store.writer import open_writer
from richkd.teachers.framing import note_of

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
Sizes = list[tuple[int, int]]


class Listing:
    """Images of some sizes."""

    def __init__(self, split: str, sizes: Sizes) -> None:
        self.split = split
        self.sizes = np.array(sizes, np.int64)

    def name(self, index: int) -> str:
        return f"{self.split}/{index}.png"


def treated(train: Sizes, test: Sizes | None = None, **settings: Any) -> Treatment:
    listings = [Listing("train", train), Listing("test", train if test is None else test)]
    return treatment(Images(dataset="imagefolder:x", **settings), listings)


WHOLE: Mapping[str, Any] = {"view_space": "pad-crop-flip"}
CROPS: Mapping[str, Any] = {"view_space": "resized-crop-flip"}


@pytest.mark.parametrize(
    ("size", "settings", "whole", "image_size"),
    [
        ((32, 32), {}, True, 32),
        ((32, 32), {"image_size": 32}, True, 32),
        ((28, 28), {}, True, 28),
        ((64, 64), {}, True, 64),
        ((8, 8), {}, True, 8),
        ((7, 7), {}, False, 32),
        ((96, 96), {}, False, 96),
        ((96, 96), WHOLE, True, 96),
        ((100, 100), WHOLE, True, 100),
        ((500, 375), {}, False, 224),
        ((48, 64), {}, False, 48),
        ((64, 64), {"image_size": 32}, False, 32),
        ((32, 32), CROPS, False, 32),
        ((28, 28), CROPS, False, 32),
    ],
)
def test_images_of_one_small_size_are_taken_whole(
    size: tuple[int, int], settings: dict[str, Any], whole: bool, image_size: int
) -> None:
    found = treated([size] * 3, **settings)
    assert (found.whole, found.image_size) == (whole, image_size)
    other = "resized-crop-flip" if whole else "pad-crop-flip"
    assert f"--view-space {other}" in found.note and "\n" not in found.note


def test_images_that_keep_a_folder_from_being_small_are_named() -> None:
    many = [(32, 32)] * 30
    strayed = treated(many, [*many, (28, 31), (28, 31)])
    assert not strayed.whole and strayed.image_size == 32
    assert "test/30.png (and 1 more) has 31×28 pixels, all others 32×32" in strayed.note
    strayed = treated([(300, 400), *many], many)  # also if it is the first
    assert "train/0.png has 400×300 pixels, all others 32×32" in strayed.note
    assert "have 2 sizes" in treated([(32, 32), (28, 28)]).note
    assert "64×48" in treated([(48, 64)]).note
    assert "image_size = 32" in treated([(64, 64)], image_size=32).note
    assert "sizes" not in treated([(300, 400), (400, 300)]).note  # of photographs nobody asks


@pytest.mark.parametrize(
    ("train", "settings", "values"),
    [
        ([(32, 32), (32, 33)], {}, ["2 sizes"]),
        ([(32, 32)] * 20 + [(32, 33)], {}, ["train/20.png", "33×32"]),
        ([(300, 400)], {}, ["400×300"]),
        ([(64, 64)], {"image_size": 32}, ["64×64", "image_size = 32"]),
        ([(4, 4)], {}, ["4×4", "8"]),
    ],
)
def test_whole_images_are_refused_without_one_square_size(
    train: Sizes, settings: dict[str, Any], values: list[str]
) -> None:
    with refuses("view-space-sizes", "'pad-crop-flip'", *values):
        treated(train, **settings, **WHOLE)


def test_very_many_small_images_stay_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "MOST_BYTES", 3 * 32 * 32 * 9)
    assert treated([(32, 32)] * 4).whole
    found = treated([(32, 32)] * 5)
    assert not found.whole and "30.0 KiB" in found.note
    assert treated([(32, 32)] * 5, **WHOLE).whole


def test_images_beyond_the_memory_are_refused() -> None:
    files: Any = Listing("train", [(64, 64)] * 100)
    small.check_memory([files], free=100 * 3 * 64 * 64)
    with refuses("images-beyond-memory", "1.2 MiB", "1.0 MiB", "--limit", "resized-crop-flip"):
        small.check_memory([files], free=2**20)


@pytest.mark.parametrize("space", ["pad-crop-flip", "resized-crop-flip"])
def test_view_spaces_are_for_folders(fails: Fails, space: str) -> None:
    refusal = fails(*f"precompute --dataset shapes --view-space {space}".split())
    assert f"view_space = '{space}'" in refusal and "shapes" in refusal
    assert "auto" in fails(*["precompute", "--dataset", "imagefolder:x", "--view-space", "crop"])


def write(root: Path, rng: np.random.Generator, classes: int = 3, **counts: int) -> Path:
    """A folder of 32×32 PNG files of noise, around another value in each class."""
    for split, count in counts.items():
        for number in range(classes):
            folder = root / split / f"c{number}"
            folder.mkdir(parents=True)
            for image in range(count):
                low = 50 * number % 200
                pixels = rng.integers(low, low + 56, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{image:03}.png")
    return root


def load(root: Path, **settings: Any) -> Dataset:
    return load_dataset(Images(dataset=f"imagefolder:{root}", **settings))


def read_by_pillow(root: Path, split: str, classes: int = 3) -> tuple[Tensor, Tensor]:
    """The pixels and labels of a split in the order of a dataset: class after class, by turns."""
    files = [sorted((root / split / f"c{number}").iterdir()) for number in range(classes)]
    turns = [(label, path) for turn in zip(*files, strict=True) for label, path in enumerate(turn)]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for _, path in turns]
    return torch.from_numpy(np.stack(pixels)), torch.tensor([label for label, _ in turns])


def test_files_become_the_array_of_their_pixels(tmp_path: Path, rng: np.random.Generator) -> None:
    root = write(tmp_path / "own", rng, train=5, valid=2, test=3)
    found = load(root)
    assert {*found.splits} == {"train", "validation", "test"}
    for name, folder in {"train": "train", "validation": "valid", "test": "test"}.items():
        pixels, labels = read_by_pillow(root, folder)
        assert torch.equal(found.splits[name].images, pixels)  # type: ignore[arg-type]
        assert torch.equal(found.splits[name].labels, labels)
    assert found.network_input.crop == 1 and found.train.view_space.name == "pad-crop-flip"
    few = load(root, limit=4)
    assert len(few.train) == 4 and torch.equal(few.train.images, found.train.images[:4])  # type: ignore[arg-type,index]
    shutil.rmtree(root / "valid")
    shared = load(root, validation=0.2)
    assert (len(shared.train), len(shared.validation or ())) == (12, 3)


def test_the_fingerprint_is_of_pixels_and_knows_the_files(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    root = write(tmp_path / "own", rng, train=3, test=2)
    found, as_photographs = load(root), load(root, **CROPS)
    assert isinstance(as_photographs.train.images, ImageFiles)
    assert found.fingerprint != as_photographs.fingerprint
    assert found.is_of(found.fingerprint) and found.is_of(as_photographs.fingerprint)
    assert not as_photographs.is_of(found.fingerprint) and not found.is_of(None)
    path = root / "train/c1/001.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    assert load(root).fingerprint != found.fingerprint
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path, compress_level=0)  # other bytes, the same pixels
    assert load(root).fingerprint == found.fingerprint


def test_odd_files_are_decoded_as_photographs_are(tmp_path: Path, rng: np.random.Generator) -> None:
    root = write(tmp_path / "own", rng, train=2, test=2)
    train = root / "train" / "c0"
    deep = rng.integers(0, 4096, (32, 32), np.uint16)
    Image.fromarray(deep).save(train / "deep.png")
    for mode in ("L", "LA", "RGBA", "P", "1", "CMYK"):
        picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).convert(mode)
        picture.save(train / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    clear = Image.fromarray(rng.integers(0, 256, (32, 32, 4), np.uint8))
    clear.save(train / "clear.webp", lossless=True)
    turned = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    turned.save(train / "turned.jpg", exif=exif)
    (train / "cut.png").write_bytes((train / "000.png").read_bytes()[:900])
    found = load(root, broken="skip", background="black")
    files = load(root, broken="skip", background="black", **CROPS)
    assert found.skipped == files.skipped == ("train/c0/cut.png",)
    assert found.decoding == files.decoding and isinstance(found.decoding, Decoding)
    assert isinstance(files.train.images, ImageFiles) and isinstance(found.train.images, Tensor)
    for number, pixels in enumerate(found.train.images):
        assert (pixels.numpy() == np.asarray(files.train.images.open(number))).all()
    with refuses("image-damaged", "cut.png"):
        load(root)


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    root = write(tmp_path / "own", rng, train=2, test=2)
    files = load(root, **CROPS).train.images
    assert isinstance(files, ImageFiles)
    Image.new("RGB", (40, 32)).save(files.name(3))
    with refuses("image-changed", files.name(3), "40×32", "32×32"):
        small.decode(files, Report(quiet=True))
    Path(files.name(3)).write_bytes(b"gone")
    with refuses("image-changed", files.name(3)):
        small.decode(files, Report(quiet=True))


def as_array(root: Path, name: str = "cifar10", classes: int = 3) -> Dataset:
    """The images of a folder as a dataset like CIFAR-10, with the constants of folders."""
    train, test = (Split(*read_by_pillow(root, split, classes)) for split in ("train", "test"))
    own = load(root)
    return Dataset(name, own.class_names, train, test, own.mean, own.std, 32)


def assert_same_arrays(one: Path, other: Path) -> None:
    """Check that two caches have the same bytes, apart from their manifests."""
    files, others = tree(one), tree(other)
    assert files.keys() == others.keys()
    differing = {name for name in files if files[name] != others[name]}
    assert differing <= {"zarr.json"}, differing


@pytest.mark.slow
def test_a_folder_of_cifars_images_gives_the_cache_that_cifar_gives(
    run: Run, clip_dir: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Byte by byte, in both stages: views, rows and images; then the students' weights."""
    root = write(tmp_path / "own", rng, train=8, test=4)
    own, like_cifar = tmp_path / "own.zarr", tmp_path / "cifar.zarr"
    weights = str(write_teacher(tmp_path / "t.safetensors", "resnet8", 3))
    given: dict[str, Any] = {"teacher": "resnet8", "teacher_weights": weights, "views": 4}
    given |= {"clip": str(clip_dir), "device": "cpu", "teacher_mean": 0.4, "teacher_std": 0.2}
    stage_one_of(own, f"imagefolder:{root}", **given)
    arrays = as_array(root)
    settings = Precompute(dataset="cifar10", out=str(like_cifar), **given)
    precompute(settings, dataset=arrays)
    assert_same_arrays(own, like_cifar)
    shutil.rmtree(root)  # the images are in the cache
    for cache in (own, like_cifar):
        done = run(
            *f"distill --cache {cache} --student resnet8 --epochs 2 --device cpu --batch-size 8 "
            f"--out {cache.with_suffix('.run')}".split()
        )
        assert done.code == 0, done.err
    names = [cache.with_suffix(".run") for cache in (own, like_cifar)]
    for name, dataset in zip(names, (f"imagefolder:{root}", "cifar10"), strict=True):
        summary = name / "summary.json"
        summary.write_text(summary.read_text().replace(dataset, "x"))
    assert_same_run(*names)
    for command in (f"verify {own} --teacher {weights}", f"evaluate {names[0]} --device cpu"):
        assert run(*command.split()).code == 0


@pytest.mark.slow
@pytest.mark.real_data
def test_fashion_mnist_as_files_gives_the_rows_of_fashion_mnist(run: Run, tmp_path: Path) -> None:
    arrays = load_dataset(Images(dataset="fashion-mnist", limit=300))
    arrays = replace(arrays, test=arrays.test.first(100))
    order = {}
    for split, part in (("train", arrays.train), ("test", arrays.test)):
        seen = [0] * 10
        places = []
        assert isinstance(part.images, Tensor)
        for number, (pixels, label) in enumerate(
            zip(part.images.numpy(), part.labels.tolist(), strict=True)
        ):
            name = arrays.class_names[label]
            folder = tmp_path / "files" / split / f"{label:02}.{name}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(folder / f"{number:05}.png")  # grey
            places.append((seen[label], label, number))
            seen[label] += 1
        order[split] = torch.tensor([number for *_, number in sorted(places)])
    weights = str(write_teacher(tmp_path / "t.safetensors", "resnet8", 10))
    given: dict[str, Any] = {"teacher": "resnet8", "teacher_weights": weights, "clip": "none"}
    given |= {"teacher_mean": arrays.mean, "teacher_std": arrays.std, "views": 3, "device": "cpu"}
    own = tmp_path / "own.zarr"
    found = stage_one_of(own, f"imagefolder:{tmp_path / 'files'}", **given)
    mixed = replace(
        arrays,
        train=arrays.train.take(order["train"]),
        test=arrays.test.take(order["test"]),
    )
    settings = Precompute(dataset="fashion-mnist", out=str(tmp_path / "arrays.zarr"), **given)
    precompute(settings, dataset=mixed)
    assert_same_arrays(own, tmp_path / "arrays.zarr")
    assert found.manifest["class_names"] == [name.replace("-", " ") for name in arrays.class_names]


@pytest.fixture
def cached(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """A folder of small images whose classes other loaders order otherwise, and its cache."""
    root = write(tmp_path / "own", rng, classes=12, train=2, test=2)
    for split in ("train", "test"):
        for number in range(12):
            (root / split / f"c{number}").rename(root / split / f"{number + 1}. Kind {number}")
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 12)
    stage_one_of(
        tmp_path / "own.zarr",
        f"imagefolder:{root}",
        "resnet8",
        teacher_weights=str(weights),
        teacher_classes="sorted",
        block=16,
    )
    return root, tmp_path / "own.zarr"


def test_the_cache_knows_the_class_folders(cached: tuple[Path, Path], run: Run) -> None:
    """They order the outputs of added teachers, and images of a shift are matched by them."""
    root, path = cached
    manifest = richkd.open_cache(path).manifest
    folders = sorted(f"{number + 1}. Kind {number}" for number in range(12))
    assert manifest["dataset"]["class_folders"] == folders
    assert manifest["dataset"]["folders"] == {"train": "train", "test": "test"}
    root.rename(root.with_name("moved"))
    weights = root.with_name("t.safetensors")
    done = run(
        *f"add-teacher {path} --teacher resnet8 --teacher-weights {weights} --name natural "
        f"--teacher-classes natural --device cpu".split()
    )
    assert done.code == 0, done.err
    whole = richkd.open_cache(path)
    order = [folders.index(name) for name in sorted(folders, key=lambda n: int(n.split(".")[0]))]
    own, natural = (
        group.read("test/teacher_logits") for group in (whole, whole.addition("natural"))
    )
    assert torch.equal(natural[:, order], own)
    out = root.with_name("run")
    train = f"distill --cache {path} --student resnet8 --method ce --epochs 1 --device cpu"
    assert run(*train.split(), "--out", out).code == 0
    shift = write(root.with_name("other"), np.random.default_rng(0), classes=1, x=1) / "x"
    (shift / "c0").rename(shift / "3. Kind 2")
    done = run("evaluate", out, "--shift", shift, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    note = note_of(out / "last.safetensors")  # of a student that becomes a teacher
    assert note["crop"] == "1.0"


def test_damaged_blocks_are_decoded_again(
    cached: tuple[Path, Path], run: Run, fails: Fails
) -> None:
    root, path = cached
    before = tree(path)
    for name in ("train/images/c/0/0/0/0", "test/teacher_logits/c/1/0"):
        (path / name).write_bytes(b"damaged")
    done = run("repair", path)
    assert done.code == 0 and tree(path) == before, done.err
    assert run("verify", path, "--teacher", root.with_name("t.safetensors")).code == 0
    (path / "train/images/c/0/0/0/0").write_bytes(b"damaged")
    Image.new("RGB", (32, 32)).save(next((root / "train" / "1. Kind 0").iterdir()))
    assert "fingerprint" in fails("repair", path)


@pytest.fixture
def earlier(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """A folder of small images, and the command for its cache; one made earlier is there."""
    root = write(tmp_path / "own", rng, train=4, test=2)
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 3)
    path = tmp_path / "own.zarr"
    given = {"teacher_weights": str(weights), "block": 16, **CROPS}
    cache = stage_one_of(path, f"imagefolder:{root}", "resnet8", **given)
    del cache.manifest["recipe"]["view_space"]
    write_sealed(Folder(path), cache.manifest)
    return root, (
        f"precompute --dataset imagefolder:{root} --image-size 32 --teacher resnet8 --device cpu "
        f"--teacher-weights {weights} --clip none --views 2 --out {path}"
    )


@pytest.mark.slow
def test_a_cache_made_earlier_is_used_as_it_was_made(
    earlier: tuple[Path, str], run: Run, fails: Fails
) -> None:
    root, command = earlier
    path = root.with_suffix(".zarr")
    done = run(*command.split())
    assert done.code == 0 and "already complete" in done.err and "--overwrite" in done.err
    train = f"distill --cache {path} --student resnet8 --epochs 1 --device cpu --out {root}.run"
    assert run(*train.split(), "--method", "kd").code == 0
    assert run("verify", path, "--teacher", root.with_name("t.safetensors")).code == 0
    assert note_of(Path(f"{root}.run/last.safetensors"))["crop"] == "0.875"
    refusal = fails(*command.split(), "--view-space", "pad-crop-flip")
    assert "view space was 'resized-crop-flip' and is now 'pad-crop-flip'" in refusal
    assert run(*command.split(), "--overwrite").code == 0
    assert richkd.open_cache(path).manifest["views"]["space"] == "pad-crop-flip"


def test_a_cache_begun_earlier_is_resumed_as_it_was_begun(
    earlier: tuple[Path, str], run: Run
) -> None:
    root, command = earlier
    path = root.with_suffix(".zarr")
    cache = richkd.open_cache(path)
    arrays = {name: cache.read(name) for name in ("train/view_params", "train/teacher_logits")}
    begun: Any = {**cache.manifest, "complete": False, "checksums": None, "seal": None}
    begun["block"] = 8192
    shutil.rmtree(path)
    views = {"train/view_params": arrays["train/view_params"].numpy()}
    with open_writer(open_location(path), begun, views):
        pass
    done = run(*command.split())
    assert done.code == 0 and "as photographs" in done.err, done.err
    again = richkd.open_cache(path)
    assert again.manifest["views"]["space"] == "resized-crop-flip"
    for name, array in arrays.items():
        torch.testing.assert_close(again.read(name), array)


def test_a_teacher_trained_earlier_is_taken_for_whole_images(
    tmp_path: Path, run: Run, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own", rng, train=4, test=2)
    train = "train-teacher --dataset imagefolder:own --model resnet8 --epochs 1 --device cpu"
    assert run(*train.split(), "--view-space", "resized-crop-flip").code == 0
    done = run(*train.split())
    assert done.code == 0 and "already complete" in done.err and "as photographs" in done.err
    stage_one = "precompute --dataset imagefolder:own --teacher resnet8 --clip none --views 1"
    done = run(*stage_one.split(), "--device", "cpu")
    assert done.code == 0 and "crop 87.5 %" in done.err, done.err
    manifest = richkd.open_cache("cache/own.zarr").manifest
    assert manifest["teacher"]["input"]["crop"] == 0.875 and manifest["dataset"]["embedded"]
    assert run(*train.split(), "--overwrite").code == 0
    assert note_of(Path("teachers/own-resnet8.safetensors"))["crop"] == "1.0"


@pytest.mark.slow
def test_the_plan_counts_the_images(
    tmp_path: Path, run: Run, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own", rng, train=6, valid=3, test=3)
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 3)
    given = f"--dataset imagefolder:own --teacher resnet8 --teacher-weights {weights} --clip none "
    given += "--views 2 --device cpu --json"
    planned = run("plan", *given.split())
    assert planned.code == 0, planned.err
    made = run("precompute", *given.split())
    assert made.code == 0, made.err
    sizes = Folder(tmp_path / "cache/own.zarr").sizes()
    images = sum(count for name, count in sizes.items() if "/images/c/" in name)
    expected = planned.json["arrays"]
    found = sum(count for name, count in expected.items() if name.endswith("/images"))
    assert 0.95 * images < found < 1.05 * images
    assert 0.9 * sum(sizes.values()) < planned.json["stored_bytes"] < 1.1 * sum(sizes.values())

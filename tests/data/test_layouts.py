"""Which folders are the splits of a dataset, and what a cache records of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refusal, refuses, write_teacher
from PIL import Image
from torchvision.datasets import ImageFolder

import richkd
from richkd.config.settings import Images
from richkd.core.errors import RichKDError
from richkd.data.datasets import Dataset, load_dataset
from richkd.store import schema
from richkd.store.checksums import write_sealed
from richkd.store.folder import Folder

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
COUNTS = {"train": 8, "validation": 3, "test": 2}  # images a class


def put(root: Path, rng: np.random.Generator, *classes: str, count: int = 2) -> None:
    """A folder of class folders of noise; of images alone for the class `.`."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def load(root: Path, **settings: Any) -> Dataset:
    return load_dataset(Images(dataset=f"imagefolder:{root}", image_size=32, **settings))


# Existing folders, and those used for training, validation and testing.
LAYOUTS = [
    (("train", "val"), ("train", None, "val")),
    (("train", "test"), ("train", None, "test")),
    (("train", "valid"), ("train", None, "valid")),
    (("train", "validation"), ("train", None, "validation")),
    (("train", "dev"), ("train", None, "dev")),
    (("training", "testing"), ("training", None, "testing")),
    (("Train", "Val"), ("Train", None, "Val")),
    (("TRAIN", "TEST"), ("TRAIN", None, "TEST")),
    (("train", "valid", "test"), ("train", "valid", "test")),
    (("train", "val", "test"), ("train", "val", "test")),
    (("train", "dev", "test", "extra"), ("train", "dev", "test")),
    (("training", "validation", "testing"), ("training", "validation", "testing")),
    (("Train", "Valid", "Test"), ("Train", "Valid", "Test")),
    (("train", "val", "valid"), ("train", None, "val")),
    (("train", "valid", "dev", "test"), ("train", "valid", "test")),
    (("train", "Train", "val"), ("train", None, "val")),
    (("train", "training", "test"), ("train", None, "test")),
]


@pytest.mark.parametrize(("there", "used"), LAYOUTS)
def test_folders_are_found_by_their_names_and_logged(
    there: tuple[str, ...],
    used: tuple[str, str | None, str],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    for name in there:
        put(tmp_path / name, rng, "cat", "dog", count=1 + there.index(name))
    dataset = load(tmp_path)
    train, validation, test = used
    wanted = {"train": train, "test": test} | ({"validation": validation} if validation else {})
    assert dataset.folders == wanted
    assert {split: len(images) for split, images in dataset.splits.items()} == {
        split: 2 * (1 + there.index(name)) for split, name in wanted.items()
    }
    said = dataset.notes[0]
    assert f"{tmp_path / train} for training" in said and f"{tmp_path / test} for testing" in said
    assert (f"{tmp_path}/{validation} for validation" in said) == (validation is not None)
    assert ("no separate test" in said) == (validation is None and test.lower()[0] in "vd")
    several = len({*there} - {"extra"}) > len(wanted)
    assert any("only" in note and "to use another" in note for note in dataset.notes) == several


def flat(root: Path, rng: np.random.Generator) -> None:
    put(root / "train", rng, "n01440764", "n02012849")
    put(root / "val", rng, ".")


def imagenet(root: Path, rng: np.random.Generator) -> None:
    flat(root, rng)
    for path in (root / "val").iterdir():
        path.rename(path.with_name(f"ILSVRC2012_val_0000000{path.name}"))


def tiny(root: Path, rng: np.random.Generator) -> None:
    put(root / "train", rng, "n01440764", "n02012849")
    put(root / "val", rng, "images")
    (root / "val" / "val_annotations.txt").touch()


def case_only(root: Path, rng: np.random.Generator) -> None:
    for name in ("Train", "TRAIN", "val"):
        put(root / name, rng, "cat", "dog")


def of(**splits: tuple[str, ...]) -> Callable[[Path, np.random.Generator], None]:
    def write(root: Path, rng: np.random.Generator) -> None:
        for split, classes in splits.items():
            put(root / split, rng, *classes)

    return write


CD = ("cat", "dog")
# What is refused: the folders, the code, and values in the message, {} being the dataset's folder.
Case = tuple[Callable[[Path, np.random.Generator], None], str, tuple[str, ...]]
REFUSED: dict[str, Case] = {
    "flat val": (flat, "folder-classes", ("{}/val ", "2 images", "{}/val/CLASS/image")),
    "ImageNet's val": (imagenet, "folder-classes", ("{}/val/CLASS/image.jpg", "valprep")),
    "tiny-imagenet": (
        tiny,
        "split-classes-differ",
        ("{}/val has", "images", "{}/val/CLASS/image.jpg", "val_annotations.txt"),
    ),
    "flat train": (of(train=(".",), val=CD), "folder-classes", ("{}/train ", "2 images")),
    "both flat": (of(train=(".",), val=(".",)), "folder-classes", ("{}/train ", "2 images")),
    "flat val and test": (
        of(train=CD, val=(".",), test=(".",)),
        "folder-classes",
        ("{}/test ", "2 images"),
    ),
    "one class": (of(train=("cat",), val=("cat",)), "folder-one-class", ("{}/train ", " cat;")),
    "a level too many": (
        of(train=("images/cat", "images/dog"), val=("images/cat", "images/dog")),
        "folder-one-class",
        ("images", "(cat, dog)", "into {}/train"),
    ),
    "a level too many in val": (
        of(train=CD, val=("images/cat", "images/dog")),
        "split-classes-differ",
        ("{}/val has", "images", "{}/train"),
    ),
    "no held-out folder": (
        of(train=CD, holdout=CD),
        "folder-layout",
        ("{}/val/CLASS/", "holdout, train:", "test"),
    ),
    "no training folder": (of(val=CD), "folder-layout", ("{}/train/CLASS", "folders val")),
    "classes at the top": (
        of(cat=(".",), dog=(".",)),
        "folder-layout",
        ("{}/train/CLASS", "cat, dog", "train and val"),
    ),
    "a folder between": (
        of(**{"photos/train": CD, "photos/val": CD}),
        "folder-layout",
        ("--dataset imagefolder:{}/photos",),
    ),
    "case only": (case_only, "split-ambiguous", ("TRAIN, Train", "to train")),
    "other classes": (
        of(train=(*CD, "emu", "fox"), val=(*CD, "yak")),
        "split-classes-differ",
        ("{}/train has the classes emu, fox", "{}/val has the class yak"),
    ),
    "fewer classes": (
        of(train=(*CD, "emu"), val=(*CD, "emu"), test=CD),
        "split-classes-differ",
        ("{}/train has the class emu", "{}/test"),
    ),
    "other case": (
        of(train=CD, val=("Cat", "Dog")),
        "split-classes-differ",
        ("cat, dog", "Cat, Dog"),
    ),
    "no images": (
        lambda root, _: [(root / n).mkdir() for n in ("train", "val")] and None,
        "folder-classes",
        ("{}/train ",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_in_a_line_that_says_how(
    case: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    write, code, values = REFUSED[case]
    write(tmp_path, rng)
    for image in tmp_path.rglob("*.png"):
        image.write_bytes(b"no image")  # which would be refused if it were read
    with pytest.raises(RichKDError) as error:
        load(tmp_path)
    message = str(error.value)
    assert error.value.code == code, message
    assert all(value.replace("{}", str(tmp_path)) in message for value in values), message
    assert len(message.replace(str(tmp_path), "")) < 300


def test_a_split_itself_is_not_a_dataset(tmp_path: Path, rng: np.random.Generator) -> None:
    of(train=CD, val=CD)(tmp_path, rng)
    with refuses("folder-layout", f"the folder that contains {tmp_path}/train"):
        load(tmp_path / "train")


@pytest.mark.parametrize("flat", ["test", "val"])
@pytest.mark.parametrize("inner", [".", "images"])
def test_images_without_labels_are_not_used(
    flat: str, inner: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """As in challenges, and in ImageNet and tiny-imagenet once their val/ is sorted."""
    other = {"test": "val", "val": "test"}[flat]
    of(**{"train": CD, other: CD, flat: (inner,)})(tmp_path, rng)
    dataset = load(tmp_path)
    assert dataset.folders == {"train": "train", "test": other} and dataset.validation is None
    assert any(note.startswith(f"{tmp_path / flat} is not used") for note in dataset.notes)


def test_a_share_of_validation_images_besides_a_folder_of_them(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    of(train=CD, valid=CD, test=CD)(tmp_path, rng)
    with refuses("validation-and-folder", "validation = 0.5", tmp_path / "valid"):
        load(tmp_path, validation=0.5)


def test_a_limit_is_of_training_images(tmp_path: Path, rng: np.random.Generator) -> None:
    of(train=CD, valid=CD, test=CD)(tmp_path, rng)
    dataset = load(tmp_path, limit=2)
    assert {split: len(images) for split, images in dataset.splits.items()} == {
        "train": 2,
        "validation": 4,
        "test": 4,
    }


def test_folders_that_are_in_two_splits_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    of(train=CD, val=("cat",))(tmp_path, rng)
    (tmp_path / "val" / "dog").symlink_to(tmp_path / "train" / "dog")
    notes = load(tmp_path).notes
    assert any(f"{tmp_path}/train/dog and {tmp_path}/val/dog are" in note for note in notes)
    (tmp_path / "test").symlink_to("train")
    assert any("train/cat and" in note and "1 more" in note for note in load(tmp_path).notes)


# --- caches --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    """train, valid and test, in which classes differ in brightness."""
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        put(tmp_path / "photos" / name, rng, "cat", "dog", count=COUNTS[split])
    put(tmp_path / "photos" / "train", rng, "dog/.ipynb_checkpoints")
    return tmp_path / "photos"


def stage_one(photos: Path, tmp_path: Path, clip_dir: Path) -> tuple[object, ...]:
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 2)
    return (
        "precompute",
        "--dataset",
        f"imagefolder:{photos}",
        "--image-size",
        32,
        "--views",
        2,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        weights,
        "--clip",
        clip_dir,
        "--out",
        tmp_path / "p.zarr",
    )


@pytest.mark.slow
def test_a_validation_folder_through_both_stages(
    photos: Path,
    run: Run,
    fails: Fails,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*stage_one(photos, tmp_path, clip_dir))
    assert done.code == 0, done.err
    assert "16 training, 6 validation and 4 test images" in done.err
    assert f"{photos}/valid for validation" in done.err
    assert "left out 1 hidden or system file or folder: train/dog/.ipynb_checkpoints" in done.err
    entry = richkd.open_cache("p.zarr").manifest["dataset"]
    assert entry["folders"] == {"train": "train", "validation": "valid", "test": "test"}
    assert entry["num_validation"] == 6 and "validation" not in entry

    done = run(
        "distill",
        "--cache",
        "p.zarr",
        "--student",
        "resnet8",
        "--epochs",
        2,
        "--method",
        "richkd-l",
        "--alpha",
        "auto",
        "--device",
        "cpu",
        "--out",
        "r",
        "--json",
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert all(line["validation_accuracy"] is not None for line in lines)
    sweep = run(
        "sweep",
        "--cache",
        "p.zarr",
        "--students",
        "resnet8",
        "--methods",
        "ce,kd",
        "--seeds",
        1,
        "--epochs",
        4,
        "--halving",
        2,
        "--out",
        "s",
        "--device",
        "cpu",
        "--json",
    )
    assert sweep.code == 0, sweep.err
    kept, stopped = sorted(
        (
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in Path("s").glob("*/metrics.jsonl")
        ),
        key=len,
        reverse=True,
    )
    assert (len(kept), len(stopped)) == (4, 1)
    assert stopped[0]["validation_accuracy"] <= kept[0]["validation_accuracy"]
    assert run("verify", "p.zarr", "--teacher", "t.safetensors").code == 0
    assert run("inspect", "p.zarr").code == 0
    whole = (tmp_path / "p.zarr/validation/teacher_logits/c/0/0").read_bytes()
    (tmp_path / "p.zarr/validation/teacher_logits/c/0/0").write_bytes(b"damaged")
    assert "validation" in fails("verify", "p.zarr")
    done = run("repair", "p.zarr")
    assert done.code == 0, done.err
    assert (tmp_path / "p.zarr/validation/teacher_logits/c/0/0").read_bytes() == whole
    assert run("verify", "p.zarr", "--teacher", "t.safetensors").code == 0
    put(tmp_path / "other", rng, "cat", "dog")
    done = run("evaluate", "r", "--shift", "other", "--device", "cpu", "--json")
    assert done.code == 0 and done.json["runs"][0]["samples"] == 4, done.err
    assert run("analyze", "p.zarr").code == 0

    photos.rename(tmp_path / "moved")
    again = (
        "distill",
        "--cache",
        "p.zarr",
        "--student",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        "r2",
    )
    assert fails(*again).code == "dataset-folder-missing"
    assert run(*again, "--dataset", f"imagefolder:{tmp_path / 'moved'}").code == 0
    (tmp_path / "moved" / "valid").rename(tmp_path / "moved" / "val")
    refusal = fails(*again, "--dataset", f"imagefolder:{tmp_path / 'moved'}", "--out", "r3")
    assert refusal.code == "dataset-folder-gone" and "moved/valid" in refusal


def fingerprint_before(root: Path) -> str:
    """The fingerprint that earlier versions gave train and val, which torchvision listed."""
    digest = hashlib.sha256()
    suffixes = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    for split in ("train", "val"):
        place: Counter[int] = Counter()
        files = []
        for path, label in ImageFolder(
            str(root / split), is_valid_file=lambda path: path.endswith(suffixes)
        ).samples:
            files.append((place[label], label, path))
            place[label] += 1
        for _, _, path in sorted(files):
            name = path.removeprefix(f"{root / split}/")
            digest.update(f"{name}\0{Path(path).stat().st_size}\0".encode())
        digest.update(np.array([label for _, label, _ in sorted(files)], "<i8").data)
    return digest.hexdigest()


def test_an_earlier_cache_is_read_as_it_was_made(
    run: Run,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """Earlier, val was preferred to test, hidden folders were read, and fewer formats."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    of(train=(*CD, "cat/a"), val=CD)(photos, rng)
    done = run(*stage_one(photos, tmp_path, clip_dir))
    assert done.code == 0, done.err
    manifest = richkd.open_cache("p.zarr").manifest
    assert manifest["dataset"]["fingerprint"] == fingerprint_before(photos)
    (photos / "train" / "cat" / "a").rename(photos / "train" / "cat" / ".a")
    (photos / "train" / "dog" / "x.jfif").write_bytes((photos / "train/dog/0.png").read_bytes())
    put(photos / "test", rng, *CD)
    del manifest["dataset"]["folders"]
    manifest["dataset"]["fingerprint"] = fingerprint_before(photos)
    write_sealed(Folder(tmp_path / "p.zarr"), manifest)
    train = (
        "distill",
        "--cache",
        "p.zarr",
        "--student",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        "r",
    )
    done = run(*train)
    assert done.code == 0, done.err
    assert run("repair", "p.zarr").code == run("verify", "p.zarr").code == 0
    damaged = tmp_path / "p.zarr/test/teacher_logits/c/0/0"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    done = run("repair", "p.zarr")
    assert done.code == 0 and damaged.read_bytes() == whole, done.err
    assert run(*train, "--out", "r2").code == 0


@pytest.mark.parametrize(
    "named",
    [
        {"train": "train", "test": ".."},
        {"train": "../../etc", "test": "val"},
        {"train": "train", "test": "/etc"},
        {"train": "train"},
        {"train": "train", "test": ""},
        {"train": "train", "test": "val", "other": "x"},
        {"train": "train", "test": 3},
        ["train"],
    ],
)
def test_a_manifest_names_folders_of_the_dataset_only(named: Any, store: Path) -> None:
    manifest: Any = {**richkd.open_cache(store).manifest}
    manifest["dataset"] = {**manifest["dataset"], "folders": {"train": "Train", "test": "val"}}
    assert schema.manifest_fault(manifest) is None
    manifest["dataset"]["folders"] = named
    assert "dataset.folders" in (schema.manifest_fault(manifest) or "")


def test_a_cache_begun_before_folders_were_named_can_be_resumed() -> None:
    """The fingerprint shows that the images are the same; folders add nothing to that."""
    old = {"dataset": {"name": "x", "fingerprint": "f"}}
    new = {"dataset": {"name": "x", "fingerprint": "f", "folders": {"train": "train"}}}
    assert schema.difference(old, new) is None

"""Users' own image folders: names, sizes, and files that cannot be used."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refusal, refuses, write_teacher
from PIL import Image

import richkd
from richkd.config.settings import Images
from richkd.data import decoding
from richkd.data.datasets import load_dataset
from richkd.data.folders import list_images, suggest_image_size
from richkd.data.scans import Listing
from richkd.data.sources import Paths

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


@pytest.fixture
def own(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two classes in train and val; train has a cut JPEG, text called .png, and a text file."""
    for part in ("train", "val"):
        for name in ("polar_bear", "seeLöwe"):
            folder = tmp_path / "own" / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    bears = tmp_path / "own" / "train" / "polar_bear"
    (bears / "notes.txt").write_text("ignored, because of its file extension")
    (bears / "4.png").write_text("no image")
    whole = (bears / "0.jpg").read_bytes()
    (bears / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "own"


def test_broken_files_are_refused_or_skipped(own: Path) -> None:
    settings = Images(dataset=f"imagefolder:{own}")
    with refuses("image-damaged", own / "train/polar_bear", "1 more", "--broken skip"):
        load_dataset(settings)
    dataset = load_dataset(Images(dataset=f"imagefolder:{own}", broken="skip"))
    assert {*dataset.skipped} == {"train/polar_bear/4.png", "train/polar_bear/cut.jpg"}
    assert len(dataset.train) == 6 and dataset.class_names == ("polar bear", "see Löwe")
    again = load_dataset(settings, skipped=dataset.skipped)
    assert again.fingerprint == dataset.fingerprint
    for file in (own / "val" / "polar_bear").iterdir():
        file.write_bytes(b"nothing")
    with refuses("class-without-images", own / "val/polar_bear"):
        load_dataset(Images(dataset=f"imagefolder:{own}", broken="skip"))


def test_paths_are_a_sequence_of_text_without_objects(rng: np.random.Generator) -> None:
    names = ["a/b.jpg", "", "猫/bild ü.png", "a/b.jpg", "broken \udcff.gif"]
    paths = Paths.of(iter(names))
    assert [*paths] == names and len(paths) == 5 and paths[-1] == names[-1]
    assert [*paths[1:4]] == names[1:4] and "猫/bild ü.png" in paths
    order = rng.permutation(5)
    assert [*paths.take(order)] == [names[number] for number in order]
    assert [*paths.take(np.array([True, False, False, False, True]))] == [names[0], names[4]]
    with pytest.raises(IndexError):
        paths[5]
    assert [*pickle.loads(pickle.dumps(paths))] == names  # as spawned workers get them
    many = Paths.of(f"class/{number}.jpg" for number in range(10_000))
    assert many.bounds.nbytes + many.text.nbytes < 32 * 10_000


def test_every_prefix_of_a_listing_holds_the_classes_evenly(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    counts = rng.integers(1, 9, 5)
    wanted = []
    for label, count in enumerate(counts):
        (tmp_path / f"c{label}" / "below").mkdir(parents=True)
        files = [f"c{label}/{k}.png" for k in range(1, count)] + [f"c{label}/below/0.png"]
        for file in files:
            Image.new("RGB", (label + 1, 3)).save(tmp_path / file)
        wanted += [(place, label, file) for place, file in enumerate(files)]
    listing = list_images(tmp_path, "refuse")
    assert [*zip(listing.labels, listing.source.paths, strict=True)] == [
        (label, file) for _, label, file in sorted(wanted)
    ]
    assert (listing.sizes == np.stack([np.full(len(wanted), 3), listing.labels + 1], 1)).all()


class Look:
    """Remembers which files were looked at, and whether they were decoded."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.decoded: list[bool] = []

    def __call__(self, path: Path, decode: bool) -> decoding.Found:
        self.names.append(path.name)
        self.decoded.append(decode)
        return decoding.look(path, decode)


def test_what_is_known_to_be_broken_is_not_decoded_again(own: Path, kept: Path) -> None:
    found = list_images(own / "train", "skip")
    for note in kept.iterdir():
        note.unlink()
    look = Look()
    again = list_images(own / "train", "refuse", found.skipped, look=look)
    assert [*again.source.paths] == [*found.source.paths] and (again.sizes == found.sizes).all()
    assert look.decoded == [False] * 8


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where listings are kept; empty at first."""
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "listings"


def same(one: Listing, other: Listing) -> bool:
    arrays = [(one.sizes, other.sizes), (one.labels, other.labels)]
    texts = [([*one.source.paths], [*other.source.paths]), (one.skipped, other.skipped)]
    return all((a == b).all() for a, b in arrays) and all(a == b for a, b in texts)


def test_a_listing_is_remembered_until_a_file_changes(own: Path, kept: Path) -> None:
    train, bear = own / "train", own / "train" / "polar_bear"
    look = Look()
    first = list_images(train, "skip", look=look)
    assert len(look.names) == 8 and len([*kept.iterdir()]) == 1
    look = Look()
    assert same(list_images(train, "skip", look=look), first)
    with refuses("image-damaged", bear, "1 more"):
        list_images(train, "refuse", look=look)
    known = list_images(train, "refuse", first.skipped, look=look)
    assert same(known, replace(first, skipped=()))
    assert look.names == []

    def changes(change: Callable[[], object]) -> Listing:
        change()
        look = Look()
        listing = list_images(train, "skip", look=look)
        assert len(look.names) == len(listing.source.paths) + len(listing.skipped)
        return listing

    before = (bear / "0.jpg").stat()
    changes(lambda: os.utime(bear / "0.jpg", ns=(0, before.st_mtime_ns + 1)))
    changes(lambda: (bear / "new.jpg").write_bytes((bear / "1.jpg").read_bytes()))
    changes(lambda: (bear / "new.jpg").rename(bear / "newer.jpg"))
    listing = changes(lambda: (bear / "newer.jpg").write_bytes(b"shorter"))
    assert "train/polar_bear/newer.jpg" in listing.skipped
    changes((bear / "newer.jpg").unlink)
    whole = Image.new("RGB", (9, 7))
    listing = changes(lambda: whole.save(bear / "cut.jpg"))
    assert listing.sizes[[*listing.source.paths].index("polar_bear/cut.jpg")].tolist() == [7, 9]


def test_what_was_not_decoded_is_not_taken_for_intact(own: Path, kept: Path) -> None:
    """Stage two reads headers only; stage one must not reuse them to say that files are intact."""
    train = own / "train"
    text = ["train/polar_bear/4.png"]
    assert "polar_bear/cut.jpg" in list_images(train, "refuse", text).source.paths
    listing = list_images(train, "skip")
    assert {*listing.skipped} == {"train/polar_bear/cut.jpg", *text}
    look = Look()
    # decoded files are as good as headers, even where a file was cut without being noticed
    assert "polar_bear/cut.jpg" in list_images(train, "refuse", text, look=look).source.paths
    with refuses("image-damaged", train / "polar_bear/4.png", "--broken skip"):
        list_images(train, "refuse", ["train/polar_bear/cut.jpg"], look=look)
    assert look.names == []


@pytest.mark.parametrize("spoil", ["empty", "cut", "text", "pickle", "fewer", "folder", "negative"])
def test_a_damaged_or_foreign_note_is_written_anew(
    own: Path, kept: Path, spoil: str, tmp_path: Path
) -> None:
    first = list_images(own / "train", "skip")
    (note,) = kept.iterdir()
    whole = note.read_bytes()
    fields = dict(np.load(note))
    if spoil == "folder":
        note.unlink()
        note.mkdir()
    elif spoil in ("empty", "cut", "text"):
        note.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}[spoil])
    else:
        fields |= {
            "pickle": {"reasons": np.array([Touch(tmp_path / "ran"), "x"], object)},
            "fewer": {"sizes": fields["sizes"][1:]},
            "negative": {"sizes": fields["sizes"] - 60},
        }[spoil]
        np.savez(note, **fields)
    look = Look()
    assert same(list_images(own / "train", "skip", look=look), first)
    assert len(look.names) == 8 and not (tmp_path / "ran").exists()
    if spoil != "folder":  # a folder is left alone, and all files are read each time
        look = Look()
        assert same(list_images(own / "train", "skip", look=look), first)
        assert look.names == []


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_home_that_cannot_be_written_is_no_fault(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "file"))
    assert len(list_images(own / "train", "skip").source.paths) == 6


def test_the_image_size_that_most_images_have() -> None:
    sizes = np.array([[300, 400]] * 3 + [[100, 100]])
    assert suggest_image_size(sizes) == 224
    assert suggest_image_size(np.array([[30, 30]])) == 32
    assert suggest_image_size(np.array([[70, 300], [64, 64]])) == 64


OWN = {
    "polar_bear": "polar bear",
    "PolarFox": "Polar Fox",
    "n02123045": "tabby",
    "seeLöwe": "see Löwe",
    "猫": "猫",
    "aquarium-fish": "aquarium fish",
    "01.Ære": "Ære",
    "zebra": "zebra",
}
BROKEN = {"train/zebra/cut.jpg", "train/猫/text.png", "val/zebra/empty.webp"}


@pytest.fixture
def zoo(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Eight classes of odd images: sizes, modes, formats of all kinds; three broken files."""

    def picture(number: int, mode: str) -> Image.Image:
        height, width = (int(side) for side in rng.integers(33, 90, 2))
        if number % 5 == 4:
            height = 400  # a tall one
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    kinds = [
        ("RGB", "jpg"),
        ("L", "jpeg"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGB", "webp"),
        ("RGB", "JPG"),
        ("RGB", "bmp"),
        ("CMYK", "tif"),
    ]
    for part, count in (("train", 12), ("val", 5)):
        for name in OWN:
            folder = tmp_path / "zoo" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                mode, suffix = kinds[number]
                picture(number, mode).save(folder / f"bild {number} ü.{suffix}")
    train, val = tmp_path / "zoo" / "train", tmp_path / "zoo" / "val"
    whole = (train / "zebra" / "bild 0 ü.jpg").read_bytes()
    (train / "zebra" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "猫" / "text.png").write_text("no image at all")
    (val / "zebra" / "empty.webp").touch()
    (train / "zebra" / "readme.txt").write_text("ignored")
    (train / "notes.txt").write_text("ignored")
    return tmp_path / "zoo"


@pytest.mark.slow
def test_a_users_folder_through_both_stages(
    zoo: Path,
    run: Run,
    fails: Fails,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text("[train-teacher]\nepochs = 1\neval_every = 1\n")
    stage_one = (
        "precompute",
        "--dataset",
        f"imagefolder:{zoo}",
        "--clip",
        clip_dir,
        "--views",
        2,
        "--recipe",
        "one.toml",
    )
    refusal = fails(*stage_one)
    assert refusal.code == "image-damaged" and "--broken skip" in refusal
    assert not Path("cache").exists() and not Path("teachers").exists()

    done = run(*stage_one, "--broken", "skip")
    assert done.code == 0, done.err
    said = done.err
    for file in BROKEN:
        assert any(line.startswith("left out") and file in line for line in said.splitlines())
    assert "2 files that are not images: train/notes.txt, train/zebra/readme.txt" in said
    order = (
        "classes: Ære",
        "a photo of a Ære",
        "CLIP zero-shot",
        "resnet32x4",
        "is complete",
    )
    places = [said.index(text) for text in order]
    assert places == sorted(places), said
    cache = richkd.open_cache("cache/zoo.zarr")
    assert {*cache.manifest["class_names"]} == {*OWN.values()}
    assert {*cache.manifest["dataset"]["skipped"]} == BROKEN
    assert (cache.num_samples, cache.manifest["dataset"]["num_test"]) == (96, 40)
    assert cache.manifest["image_size"] == 32  # a quarter of them has no side of 48

    stage_two = ("distill", "--cache", "cache/zoo.zarr", "--epochs", 1)
    done = run(*stage_two, "--method", "richkd-l", "--json")
    assert done.code == 0, done.err
    assert done.json["student"] == "resnet8x4" and done.json["num_classes"] == 8
    samples = richkd.torch_dataset(cache, 1)
    assert samples[7]["image"].shape == (3, 32, 32)

    weights = "teachers/zoo-resnet32x4.safetensors"
    assert run("verify", "cache/zoo.zarr", "--teacher", weights).code == 0
    assert run("analyze", "cache/zoo.zarr").code == 0
    assert run("evaluate", "runs/zoo-resnet8x4-richkd-l-s0", "--shift", zoo / "train").code == 2
    shift = tmp_path / "shift"
    for name in OWN:
        (shift / name).mkdir(parents=True)
        Image.new("RGB", (50, 40)).save(shift / name / "a.png")
    assert run("evaluate", "runs/zoo-resnet8x4-richkd-l-s0", "--shift", shift).code == 0

    # a file that was intact and is damaged now is named before training
    (zoo / "val" / "zebra" / "bild 0 ü.jpg").write_bytes(b"gone")
    refusal = fails(*stage_two, "--out", "runs/other")
    assert refusal.code == "image-damaged" and "bild 0 ü.jpg" in refusal


def test_names_from_a_file_reach_the_prompts(
    zoo: Path,
    run: Run,
    fails: Fails,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "t.safetensors", "resnet8", 8)
    Path("names.txt").write_text("猫: cat\nn02123045: tabby cat\n", encoding="utf-8")
    done = run(
        "precompute",
        "--dataset",
        f"imagefolder:{zoo}",
        "--clip",
        clip_dir,
        "--views",
        1,
        "--broken",
        "skip",
        "--class-names",
        "names.txt",
        "--image-size",
        16,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        "t.safetensors",
        "--json",
    )
    assert done.code == 0, done.err
    names = richkd.open_cache("cache/zoo.zarr").manifest["class_names"]
    assert {"cat", "tabby cat", "polar bear"} < {*names} and "猫" not in names
    refusal = fails("precompute", "--dataset", "shapes", "--class-names", "names.txt")
    assert "class_names = 'names.txt'" in refusal and "shapes" in refusal

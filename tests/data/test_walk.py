"""Which files of a folder are images: files that systems leave, links, and torchvision's order."""

from __future__ import annotations

import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refuses
from PIL import Image
from torchvision.datasets import ImageFolder

from richkd.config.settings import Images
from richkd.data.datasets import load_dataset
from richkd.data.folders import EARLIER_SUFFIXES, SUFFIXES, Found, find_images
from richkd.data.walk import Kind, Tally, Walk, is_hidden


def put(root: Path, *paths: str) -> None:
    """Small images at paths below a folder."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number % 256, 0, 0)).save(root / path, "PNG")


def random_tree(root: Path, rng: np.random.Generator) -> None:
    """Class folders in folders of odd names, with files of all kinds."""
    choose = random.Random(int(rng.integers(2**32)))
    parts = ["a", "B", "a-b", "a b", "ä", "猫", "1", "10", "2", "x.jpg", "Zz", "a.b", "_", "~"]

    def fill(folder: Path, depth: int) -> None:
        folder.mkdir(parents=True)
        for number in range(choose.randrange(4)):
            suffix = choose.choice([".jpg", ".PNG", ".Jpeg", ".txt", "", ".webp", ".tar.gz"])
            (folder / f"{choose.choice(parts)}{number}{suffix}").touch()
        for name in choose.sample(parts, choose.randrange(3) if depth else 0):
            if not (folder / name).exists():  # a file by this name
                fill(folder / name, depth - 1)

    for name in choose.sample(parts, 6):
        fill(root / "train" / name, 3)
        (root / "train" / name / "one.png").touch()
    (root / "elsewhere" / "deep").mkdir(parents=True)
    (root / "elsewhere" / "deep" / "z.gif").touch()
    (root / "train" / "linked").symlink_to(root / "elsewhere")
    (root / "train" / "a file.jpg").touch()
    (root / "gone.jpg").symlink_to(root / "nowhere")
    (root / "train" / "linked" / "broken.jpg").symlink_to(root / "nowhere")


def in_torchvisions_order(found: Found) -> list[tuple[str, int]]:
    """Paths and labels sorted by label alone: within a class they keep their order."""
    order = np.argsort(found.labels, kind="stable")
    return [(found.paths[int(number)], int(found.labels[number])) for number in order]


@pytest.mark.parametrize("tree", range(8))
def test_classes_and_paths_are_in_torchvisions_order(
    tree: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    del tree  # each is different
    random_tree(tmp_path, rng)
    train = tmp_path / "train"
    theirs = ImageFolder(
        str(train),
        is_valid_file=lambda path: (
            os.path.splitext(path)[1].lower()  # noqa: PTH122
            in SUFFIXES
        ),
    )
    for earlier in (False, True):
        found = find_images(train, earlier=earlier)
        assert [*found.classes] == theirs.classes
        wanted = [(path.removeprefix(f"{train}/"), label) for path, label in theirs.samples]
        assert in_torchvisions_order(found) == wanted
        assert found.tally.counts[Kind.BESIDE] == 1 and not found.tally.counts[Kind.LINK]
        below = sum(path.count("/") > 1 for path, _ in wanted)
        assert found.tally.counts[Kind.BELOW] == below


SYSTEM = [
    ".DS_Store",
    "._0.jpg",
    ".hidden.png",
    ".ipynb_checkpoints",
    "@eaDir",
    "#recycle",
    "@Recycle",
    "__MACOSX",
    "$RECYCLE.BIN",
    "$Recycle.Bin",
    "System Volume Information",
    "lost+found",
    "__pycache__",
    "Thumbs.db",
    "thumbs.db",
    "desktop.ini",
    "Icon\r",
    ".Trash-1000",
    ".git",
    "FOUND.000",
    ".@__thumb",
]
DATA = [
    "cat",
    "recycle",
    "Recycled",
    "found",
    "icon",
    "system",
    "@home",
    "#1",
    "_",
    "a.b",
    "thumbs",
]


def test_names_that_systems_make() -> None:
    assert [name for name in SYSTEM if not is_hidden(name)] == []
    assert [name for name in DATA if is_hidden(name)] == []


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("where", ["", "cat", "cat/inner"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_systems_leave_is_no_data(name: str, where: str, kind: str, tmp_path: Path) -> None:
    put(tmp_path / "train", "cat/0.png", "cat/inner/1.png", "dog/0.png")
    clean = find_images(tmp_path / "train")
    odd = tmp_path / "train" / where / name
    if kind == "folder":
        put(odd, "0.jpg", "below/1.jpg")
    elif kind == "file":
        put(tmp_path / "train", f"{where}/{name}" if where else name)
    else:
        odd.symlink_to(tmp_path / "train" / "dog")
    found = find_images(tmp_path / "train")
    assert found.classes == clean.classes and [*found.paths] == [*clean.paths]
    assert found.tally.counts[Kind.HIDDEN] == 1
    assert found.tally.paths[Kind.HIDDEN] == ["/".join(filter(None, ["train", where, name]))]
    (line,) = (line for line in found.tally.lines() if "hidden" in line)
    assert line.startswith(f"left out 1 hidden or system file or folder: train/{where}")


def test_each_kind_of_other_file_is_one_line(tmp_path: Path) -> None:
    put(tmp_path / "train", "cat/0.png", "cat/x/1.png", "dog/0.png", "beside.png")
    for name in ("a.txt", "b.txt", "c.json", "d", "e.mp4"):
        (tmp_path / "train" / "dog" / name).touch()
    for name in ("a.tga", "b.CR2", "c.svg"):
        (tmp_path / "train" / "cat" / name).touch()
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    (tmp_path / "train" / "cat" / "broken.png").symlink_to("nowhere")
    found = find_images(tmp_path / "train")
    assert {*found.paths} == {"cat/0.png", "cat/broken.png", "cat/x/1.png", "dog/0.png"}
    assert [*found.tally.lines()] == [
        "left out 6 files that are not images: train/cat/pipe.png, train/dog/a.txt, "
        "train/dog/b.txt and 3 more",
        "left out 3 images in unsupported formats (convert them to PNG or JPEG): "
        "train/cat/a.tga, train/cat/b.CR2, train/cat/c.svg",
        "left out 1 image outside the class folders (move each into the folder of its class): "
        "train/beside.png",
        "read 1 image in a subfolder of a class folder as images of that class: train/cat/x/1.png",
    ]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_files_of_these_suffixes_are_read(suffix: str, tmp_path: Path) -> None:
    put(tmp_path, f"cat/0{suffix}", f"cat/1{suffix.upper()}", "dog/0.png")
    assert len(find_images(tmp_path).paths) == 3
    assert EARLIER_SUFFIXES < SUFFIXES
    number = 3 if suffix in EARLIER_SUFFIXES else 1
    assert len(find_images(tmp_path, earlier=True).paths) == number


# Where a link lies in train/, what it leads to, and which of it is read: a class or images below.
BACK = {
    "to the folder itself": ("cat/loop", "."),
    "to the class": ("cat/inner/loop", ".."),
    "to the split": ("cat/loop", ".."),
    "to the dataset": ("cat/loop", "../.."),
    "to the root": ("cat/loop", "/"),
    "to another class": ("cat/more", "../dog"),
    "to a folder of another class": ("cat/more", "../dog/inner"),
    "to a folder of its own class": ("cat/more", "inner"),
    "class to the split": ("loop", "."),
    "class to the dataset": ("loop", ".."),
    "class to a class": ("puma", "cat"),
    "class to a folder of a class": ("puma", "cat/inner"),
    "class of the first name": ("a", "cat"),
}


@pytest.mark.parametrize("case", BACK)
@pytest.mark.parametrize("absolute", [False, True])
def test_links_that_lead_back_are_left_out_by_name(
    case: str, absolute: bool, tmp_path: Path
) -> None:
    train = tmp_path / "train"
    put(train, "cat/0.png", "cat/inner/1.png", "dog/0.png", "dog/inner/1.png", "dog/inner/2.png")
    clean = find_images(train)
    where, target = BACK[case]
    link = train / where
    link.symlink_to(os.path.realpath(link.parent / target) if absolute else target)
    found = find_images(train)
    assert found.classes == clean.classes and [*found.paths] == [*clean.paths]
    assert found.tally.paths[Kind.LINK] == [f"train/{where}"]
    assert any(line.endswith(f": train/{where}") for line in found.tally.lines())


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    put(
        tmp_path,
        "pool/x/0.png",
        "pool/x/1.png",
        "pool/2.png",
        "train/cat/0.png",
        "train/dog/0.png",
        "train/.store/emu/0.png",
    )
    train = tmp_path / "train"
    (train / "emu").symlink_to(".store/emu")  # as data version control has them
    (train / "cat" / "x").symlink_to(tmp_path / "pool" / "x")
    found = find_images(train)
    assert found.classes == ("cat", "dog", "emu") and len(found.paths) == 5
    assert not found.tally.counts[Kind.LINK]
    (train / "dog" / "again").symlink_to(tmp_path / "pool" / "x")
    (tmp_path / "pool" / "x" / "up").symlink_to("..")
    (tmp_path / "pool" / "x" / "back").symlink_to(train)
    found = find_images(train)
    assert len(found.paths) == 5
    assert found.tally.paths[Kind.LINK] == ["train/cat/x/back", "train/cat/x/up", "train/dog/again"]
    (train / "dog" / "pool").symlink_to(tmp_path / "pool")
    assert len(find_images(train).paths) == 6  # pool/2.png, and pool/x not again


def test_two_classes_in_one_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "pool/0.png", "train/cat/0.png")
    for name in ("dog", "wolf"):
        (tmp_path / "train" / name).symlink_to(tmp_path / "pool")
    with refuses("folder-linked-twice", tmp_path / "train/wolf", tmp_path / "train/dog"):
        find_images(tmp_path / "train")


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png", "dog/0.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "cat" / "loop").symlink_to("loop")
    found = find_images(tmp_path)
    assert found.classes == ("cat", "dog") and found.tally.counts[Kind.OTHER] == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png", "cat/secret/1.png", "dog/0.png")

    def scandir(path: str) -> Any:
        if path.endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return os.scandir(path)

    walk = Walk(tmp_path, SUFFIXES, scandir=scandir)
    with refuses("folder-unreadable", tmp_path / "cat/secret", "Permission denied"):
        [*walk.images("cat", Tally())]


def test_a_class_without_images_is_named_with_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/0.png", "val/cat/0.png", "val/dog/0.png")
    for name in ("a.tga", "b.tga"):
        (tmp_path / "train" / "dog").mkdir(exist_ok=True)
        (tmp_path / "train" / "dog" / name).touch()
    (tmp_path / "train" / "emu").mkdir()
    with refuses("folder-classes", tmp_path / "train/dog", 1, "2 images", "a.tga"):
        load_dataset(Images(dataset=f"imagefolder:{tmp_path}"))


def test_examples_do_not_depend_on_the_order_of_the_disk(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    put(tmp_path, "cat/0.png", "dog/0.png")
    put(tmp_path / "pool", "x/0.png", "y/1.png")
    for name in rng.permutation([f"{number}.txt" for number in range(9)]):
        (tmp_path / "cat" / str(name)).touch()
    for name in ("k", "l", "m"):
        (tmp_path / "cat" / name).symlink_to(tmp_path.parent / tmp_path.name / "pool" / "x")
    found = [Walk(tmp_path, SUFFIXES)]

    def shuffled(path: str) -> Any:
        entries: list[Any] = [*os.scandir(path)]
        rng.shuffle(entries)
        return nullcontext(entries)

    found += [Walk(tmp_path, SUFFIXES, scandir=shuffled) for _ in range(5)]
    results = [([*walk.images("cat", walk.tally)], [*walk.tally.lines()]) for walk in found]
    assert all(one == results[0] for one in results)

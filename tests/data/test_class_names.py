"""Class names: names that collide, and files of names in all the forms that users have."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from helpers import Refusal, refuses, write_teacher
from PIL import Image
from timm.data import ImageNetInfo

import richkd
from richkd.config.recipes import load
from richkd.core.errors import RichKDError
from richkd.data.class_names import (
    check_distinct,
    choose_names,
    class_words,
    name_classes,
    read_class_names,
    text_key,
)
from richkd.data.prompts import load_prompts

Run = Callable[..., Any]
Fails = Callable[..., Refusal]

WORDS = {
    "polar_bear": "polar bear",
    "PolarBear": "Polar Bear",
    "aquarium-fish": "aquarium fish",
    "001.Black_footed_Albatross": "Black footed Albatross",
    "n02123045": "tabby",
    "n99999999": "n99999999",
    "zebra": "zebra",
    "Käfer": "Käfer",
    "HTMLPage": "HTML Page",
    "42": "42",
    "_": "_",
}


@pytest.mark.parametrize(("folder", "words"), WORDS.items())
def test_folder_names_become_words(folder: str, words: str) -> None:
    assert class_words(folder) == words


def test_names_that_differ_stay_as_they_are() -> None:
    named = name_classes([*WORDS])  # but for the two polar bears
    assert [*named.names][2:] == [*WORDS.values()][2:]
    assert name_classes(["cat", "dog", "n02012849"]).names == ("cat", "dog", "crane")
    assert name_classes(["cat", "dog", "n02012849"]).notes == ()


BIRD = "crane (large long-necked wading bird of marshes and plains in many parts of the world)"
MACHINE = "crane (lifts and moves heavy objects)"
APART = {
    ("n02012849", "n03126707"): (BIRD, MACHINE),
    ("n03710637", "n03710721"): ("maillot (tights for dancers or gymnasts)", "maillot (tank suit)"),
    ("10_euro", "20_euro"): ("10 euro", "20 euro"),
    ("001.Cat", "002.Cat", "003.Dog"): ("001 Cat", "002 Cat", "Dog"),
    ("polar_bear", "polar-bear", "PolarBear"): ("polar_bear", "polar-bear", "PolarBear"),
    ("1.Cat", "Cat"): ("1 Cat", "Cat"),
    ("crane", "n02012849", "zebra"): ("crane", BIRD, "zebra"),
}


@pytest.mark.parametrize(("folders", "names"), APART.items())
def test_names_that_collide_are_made_distinct_and_logged(
    folders: tuple[str, ...], names: tuple[str, ...]
) -> None:
    named = name_classes(folders)
    assert named.names == names
    (note,) = named.notes
    assert "--class-names" in note
    assert all(
        f"{f} → {n}" in note for f, n in zip(folders, names, strict=True) if n != class_words(f)
    )
    check_distinct(named.names)


@pytest.mark.parametrize(
    "folders",
    [
        ("cat", "Cat"),
        ("cat", "CAT", "dog"),
        ("Ka\u0308fer", "Käfer"),
        ("a  b", "a b"),
        ("cat", "dog", "Dog", "Cat"),
    ],
)
def test_names_that_are_one_text_to_clip_are_named(folders: tuple[str, ...]) -> None:
    named = name_classes(folders)
    assert len(named.notes) == 1
    assert repr(folders[0]) in named.notes[0] and "--class-names" in named.notes[0]
    with refuses("class-names-ambiguous", "--class-names", "--clip none"):
        check_distinct(named.names)


@pytest.mark.parametrize("subset", ["imagenet-1k", "imagenet-12k", "imagenet-22k"])
def test_all_of_imagenet_has_texts_that_differ(subset: str) -> None:
    synsets = ImageNetInfo(subset).label_names()
    names = name_classes(sorted(synsets)).names
    assert len({text_key(name) for name in names}) == len(synsets)
    told = [name for name in names if name.endswith(")")]
    assert all(re.fullmatch(r"[^()]+ \([^()\s][^()]+\)", name) for name in told)
    same = [class_words(synset) for synset in synsets]
    collide = (
        {key for key in map(text_key, same) if [*map(text_key, same)].count(key) > 1}
        if subset == "imagenet-1k"
        else None
    )
    if collide is not None:
        kept = dict(zip(sorted(synsets), names, strict=True))
        for synset, name in kept.items():
            assert (name == class_words(synset)) is (text_key(class_words(synset)) not in collide)


def test_curated_names_are_open_clips_in_the_order_of_the_synsets() -> None:
    synsets = sorted(ImageNetInfo().label_names())
    named = choose_names("curated", synsets)
    own = open_clip.IMAGENET_CLASSNAMES
    differ = {n: (o, s) for n, o, s in zip(named.names, own, synsets, strict=True) if n != o}
    assert differ == {  # open_clip has both names twice
        "projectile": ("missile", "n04008634"),
        "sunglass": ("sunglasses", "n04355933"),
    }
    assert len({*map(text_key, named.names)}) == 1000
    assert "1,000 of 1,000" in named.notes[0] and "n04008634 → projectile" in named.notes[1]
    texts = [ImageNetInfo().label_name_to_description(synset, detailed=True) for synset in synsets]
    words = [{*re.findall("[a-z]+", text.lower())} for text in texts]
    fits = [bool(a & {*re.findall("[a-z]+", b.lower())}) for a, b in zip(words, own, strict=True)]
    assert sum(fits) >= 975  # a vespa is a motor scooter


def test_curated_names_of_more_and_of_fewer_classes(tmp_path: Path) -> None:
    few = choose_names("curated", ["n01440764", "n99999999", "n02124272", "zoo"])
    known = dict(
        zip(sorted(ImageNetInfo().label_names()), open_clip.IMAGENET_CLASSNAMES, strict=True)
    )
    assert few.names == ("tench", "n99999999", class_words("n02124272"), "zoo")
    assert "n02124272" not in known and "1 of 4 classes" in few.notes[0]
    synsets = sorted(ImageNetInfo("imagenet-22k").label_names())
    names = choose_names("curated", synsets).names
    assert len({*map(text_key, names)}) == len(synsets) == 21_841
    kept = [known[s] == name for s, name in zip(synsets, names, strict=True) if s in known]
    assert sum(kept) > 850
    assert "curated" in name_classes(["n02012849", "n03126707"]).notes[0]
    with refuses("class-names-wrong", "'curated'", "'cat'", "2 class folders"):
        choose_names("curated", ["cat", "n99999999"])
    with refuses("class-names-unreadable", "curate"):
        choose_names("curate", synsets)


def test_curated_names_of_tables_that_name_classes_by_their_lemmas() -> None:
    info = ImageNetInfo()
    synsets = sorted(info.label_names())
    lemmas = [info.label_name_to_description(synset) for synset in synsets]
    lemmas[517] = "crane2"  # as on the Hub, where names are unique
    every = choose_names("curated", lemmas, synonyms=True)
    assert every.names == choose_names("curated", synsets).names
    few = [700, 3, 21]  # in an order of their own
    some = choose_names("curated", [lemmas[number] for number in few], synonyms=True)
    assert some.names == tuple(every.names[number] for number in few)
    for others in (["crane", lemmas[3]], [lemmas[3], "kite, toy"]):  # one of two, and of none
        with refuses("class-names-wrong", "'curated'"):
            choose_names("curated", others, synonyms=True)


def test_curated_names_load_no_open_clip() -> None:
    code = (
        "import sys; from richkd.data.class_names import choose_names; "
        "print(choose_names('curated', ['n01440764']).names, 'open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "('tench',) False\n"


def test_texts_are_one_where_clips_tokenizer_says_so() -> None:
    """The key of a name against open_clip's tokens, on names that differ in small things."""
    names = [w for pair in APART for w in pair] + [
        "cat",
        "Cat",
        "CAT",
        "a  b",
        "a b",
        "A B",
        "a_b",
        "a-b",
        "Käfer",
        "Ka\u0308fer",
        "käfer",
        "r&amp;b",
        "R&B",
        "x",
        "X ",
        "straße",
        "STRAẞE",
    ]
    tokens = [tuple(row.tolist()) for row in open_clip.tokenize([f"a {name}" for name in names])]
    for one, first in zip(names, tokens, strict=True):
        for other, second in zip(names, tokens, strict=True):
            if first == second:  # then the key must see it; it may see more than that
                assert text_key(one) == text_key(other), (one, other)


FOLDERS = ("cat", "dog", "emu")
SYNSETS = ("n01440764", "n01443537", "n02123045")
TENCH = ("tench", "goldfish", "tabby cat")
NUMBERS = tuple(sorted(map(str, range(12))))
ENGLISH = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
]
BY_NUMBER = tuple(ENGLISH[int(folder)] for folder in NUMBERS)

# A file, the folders, and the names that it gives them.
READ: dict[str, tuple[str | bytes, tuple[str, ...], tuple[str, ...]]] = {
    "a line a class": ("Katze\nHund\nEmu\n", FOLDERS, ("Katze", "Hund", "Emu")),
    "blank lines": ("\nKatze\n\n  Hund \nEmu", FOLDERS, ("Katze", "Hund", "Emu")),
    "Windows": (b"Katze\r\nHund\r\nEmu\r\n", FOLDERS, ("Katze", "Hund", "Emu")),
    "old Mac": (b"Katze\rHund\rEmu\r", FOLDERS, ("Katze", "Hund", "Emu")),
    "mark": ("Kätze\nHund\nEmu".encode("utf-8-sig"), FOLDERS, ("Kätze", "Hund", "Emu")),
    "UTF-16": ("Kätze\r\nHund\r\nEmu".encode("utf-16"), FOLDERS, ("Kätze", "Hund", "Emu")),
    "UTF-16 BE": (
        b"\xfe\xff" + "cat: Kätze\n".encode("utf-16-be"),
        FOLDERS,
        ("Kätze", "dog", "emu"),
    ),
    "quotes": ('"Katze"\n"Hund"\n"Emu"', FOLDERS, ("Katze", "Hund", "Emu")),
    "Python's commas": ('"Katze",\n"Hund",\n"Emu",', FOLDERS, ("Katze", "Hund", "Emu")),
    "heading": ("class_name\nKatze\nHund\nEmu", FOLDERS, ("Katze", "Hund", "Emu")),
    "synonyms": ("Katze, Mieze\nHund\nEmu, Vogel", FOLDERS, ("Katze", "Hund", "Emu")),
    "some folders": ("dog: Hund", FOLDERS, ("cat", "Hund", "emu")),
    "folders in another order": (
        "emu: Emu\ncat: Katze\ndog: Hund",
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "own names in another order": ("emu\nCat\ndog", FOLDERS, ("Cat", "dog", "emu")),
    "more than there are": ("emu: E\ncat: K\ndog: H\nyak: Y", FOLDERS, ("K", "H", "E")),
    "CSV": ("cat,Katze\ndog,Hund\nemu,Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "CSV with heading": (
        "folder,name\ndog,Hund\ncat,Katze\nemu,Emu",
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "CSV with quotes": (
        '"cat","Katze, Mieze"\n"dog","Hund"\n"emu","Emu"',
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "CSV reversed": (
        "name,folder\nHund,dog\nKatze,cat\nEmu,emu",
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "CSV of Excel": ("cat;Katze\ndog;Hund\nemu;Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "three columns": (
        "id,folder,name\n0,cat,Katze\n1,dog,Hund\n2,emu,Emu",
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "tabs": ("dog\tHund\ncat\tKatze\nemu\tEmu", FOLDERS, ("Katze", "Hund", "Emu")),
    "bars": ("cat|Katze\ndog|Hund\nemu|Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "equals signs": ("cat = Katze\ndog = Hund\nemu=Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "arrows": ("dog → Hund\ncat → Katze\nemu → Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "dashes": ("0 - Katze\n1 - Hund\n2 - Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "numbers": ("0 Katze\n1 der Hund\n2 Emu", FOLDERS, ("Katze", "der Hund", "Emu")),
    "numbers from 1": ("1 Katze\n2 Hund\n3 Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "numbers in another order": ("2: Emu\n0: Katze\n1: Hund", FOLDERS, ("Katze", "Hund", "Emu")),
    "numbers and commas": ("0,Katze\n1,Hund\n2,Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "numbers and tabs": ("0\tKatze\n1\tHund\n2\tEmu", FOLDERS, ("Katze", "Hund", "Emu")),
    "numbers and dots": ("0. Katze\n1. Hund\n2. Emu", FOLDERS, ("Katze", "Hund", "Emu")),
    "names that begin with numbers": (
        "10 euro\n20 euro\n5 euro",
        FOLDERS,
        ("10 euro", "20 euro", "5 euro"),
    ),
    "words.txt": (
        "n01440764\ttench, Tinca tinca\nn01443537\tgoldfish, Carassius auratus\n"
        "n00001740\tentity\nn02123045\ttabby cat",
        SYNSETS,
        TENCH,
    ),
    "LOC_synset_mapping.txt": (
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\nn02123045 tabby cat",
        SYNSETS,
        TENCH,
    ),
    "synsets and colons": ("n02123045: tabby cat", SYNSETS, TENCH),
    "numbers are folders": (
        "\n".join(f"{n} {name}" for n, name in enumerate(ENGLISH)),
        NUMBERS,
        BY_NUMBER,
    ),
    "numbers are folders, tabs": (
        "\n".join(f"{n}\t{name}" for n, name in enumerate(ENGLISH)),
        NUMBERS,
        BY_NUMBER,
    ),
    "numbers in front of folders": (
        "1 Katze\n2 Hund\n10 Emu",
        ("001.a", "002.b", "010.c"),
        ("Katze", "Hund", "Emu"),
    ),
    "classes.txt of CUB": (
        "1 001.Big_cat\n2 002.Dog",
        ("001.Big_cat", "002.Dog"),
        ("Big cat", "Dog"),
    ),
    "JSON list": ('["Katze", "Hund",\n "Emu"]', FOLDERS, ("Katze", "Hund", "Emu")),
    "JSON object": ('{"dog": "Hund", "cat": "Katze"}', FOLDERS, ("Katze", "Hund", "emu")),
    "JSON numbers": ('{"0": "Katze", "2": "Emu", "1": "Hund"}', FOLDERS, ("Katze", "Hund", "Emu")),
    "JSON names to numbers": (
        '{"Katze": 0, "Emu": 2, "Hund": 1}',
        FOLDERS,
        ("Katze", "Hund", "Emu"),
    ),
    "imagenet_class_index.json": (
        '{"0": ["n01443537", "gold_fish"], "1": ["n01440764", "tench"],'
        ' "2": ["n02123045", "tabby_cat"]}',
        SYNSETS,
        ("tench", "gold fish", "tabby cat"),
    ),
    "Python": ("{0: 'tench, Tinca tinca',\n 1: 'goldfish',\n 2: 'tabby cat'}", SYNSETS, TENCH),
    "cranes": ("n02012849 crane\nn03126707 crane", ("n02012849", "n03126707"), (BIRD, MACHINE)),
    "synonyms that tell apart": (
        "a: maillot\nb: maillot, tank suit",
        ("a", "b"),
        ("maillot", "maillot (tank suit)"),
    ),
    "names with commas in brackets": (
        "cat (big, wild)\ndog\nyak",
        ("a", "b", "c"),
        ("cat (big, wild)", "dog", "yak"),
    ),
}


@pytest.mark.parametrize("form", READ)
def test_a_file_of_names_is_read_as_what_it_is(form: str, tmp_path: Path) -> None:
    content, folders, names = READ[form]
    file = tmp_path / "names"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_class_names(file, folders).names
    assert found == names
    assert not any(char in name for name in found for char in '\t\ufeff\r"')


# A file that is refused, the folders, and values in the message.
REFUSED: dict[str, tuple[str | bytes, tuple[str, ...], tuple[str, ...]]] = {
    "too few": ("one\n", FOLDERS, ("1 names", "3 classes")),
    "empty": ("\n \n", FOLDERS, ()),
    "no folder": ("cta: x\ndog: y", FOLDERS, ("line 1", "'cta'", "cat")),
    "no folder in a table": ("cat,x\ndgo,y\nemu,z", FOLDERS, ("line 2", "'dgo'")),
    "folder twice": ("cat: x\ncat: y\ndog: z", FOLDERS, ("line 1", "line 2", "'cat'")),
    "name twice": ("heron\nstork\nheron", FOLDERS, ("line 1", "line 3", "'heron'")),
    "name twice in another case": ("a\nheron\nHeron ", FOLDERS, ("line 2", "line 3")),
    "name of another folder": ("cat: dog\n", FOLDERS, ("line 1", "folder dog")),
    "Latin-1": ("Kätze\nHund\nEmu".encode("latin-1"), FOLDERS, ("line 1", "UTF-8")),
    "UTF-16 without mark": ("a\nb\nc".encode("utf-16-le"), FOLDERS, ("UTF-16", "UTF-8")),
    "commas of no table": ("tench,Tinca\nb\nc", FOLDERS, ("line 1", "'tench,Tinca'")),
    "some tabs": ("cat\tx\ndog y\nemu\tz", FOLDERS, ("line 2", "tab")),
    "tabs of no folders": ("x\ty\nz\tw", FOLDERS, ("line 1", "'x'")),
    "broken JSON": ('["a", "b"', FOLDERS, ("JSON",)),
    "deep JSON": ("[" * 100_000, FOLDERS, ("JSON",)),
    "JSON of other things": ('[{"id": 0}]', FOLDERS, ("entry 1",)),
    "JSON key twice": ('{"cat": "a", "cat": "b"}', FOLDERS, ("'cat'", "twice")),
    "a set": ("{'a', 'b'}", ("a", "b"), ("list", "FOLDER: NAME")),
    "swapped": ("dog\ncat\nostrich", FOLDERS, ("line 1", "'dog'", "'cat'")),
    "numeric order": ("\n".join(ENGLISH), NUMBERS, ("entry 3", "'10'", "'2'")),
    "natural order": ("a\nb\nc", ("k1", "k10", "k2"), ("'k10'", "'k2'")),
    "numbers in natural order": ("0 a\n1 b\n2 c", ("k1", "k10", "k2"), ("'k10'", "'k2'")),
    "numbers of others": ("3: a\n4: b\n5: c", FOLDERS, ("3 to 5", "3 classes", "0 to 2")),
    "numbers off by one": ("0 a\n1 b\n2 c", ("1", "2", "3"), ("'0'",)),
}
CODES = {  # where it is not "class-names-wrong"
    "name twice": "class-names-ambiguous",
    "name twice in another case": "class-names-ambiguous",
    "name of another folder": "class-names-ambiguous",
    "Latin-1": "class-names-unreadable",
    "UTF-16 without mark": "class-names-unreadable",
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_file_of_names_is_refused_in_a_line(form: str, tmp_path: Path) -> None:
    content, folders, values = REFUSED[form]
    file = tmp_path / "names.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refuses(CODES.get(form, "class-names-wrong"), f"--class-names {file}", *values):
        read_class_names(file, folders)


def test_a_missing_file_of_names_is_refused(tmp_path: Path) -> None:
    with refuses("class-names-unreadable", tmp_path / "none.txt"):
        read_class_names(tmp_path / "none.txt", FOLDERS)


def test_a_permuted_list_of_names_never_permutes_classes(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Lists of some folders' own names: each class gets its own, or the list is refused."""
    choose = random.Random(int(rng.integers(2**32)))
    for _ in range(50):
        folders = sorted(choose.sample([f"k{number:02d}x" for number in range(40)], 8))
        names = [folder if choose.random() < 0.7 else f"new {folder}" for folder in folders]
        if choose.random() < 0.8:
            choose.shuffle(names)
        (tmp_path / "n").write_text("\n".join(names))
        kept = [name for name in names if name in folders]
        try:
            found = read_class_names(tmp_path / "n", folders).names
        except RichKDError as error:
            assert error.code == "class-names-wrong"
            continue
        assert all(
            name.removeprefix("new ") == folder or folder not in kept
            for name, folder in zip(found, folders, strict=True)
        )


def test_notes_say_what_was_assumed(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"

    def notes(content: str) -> str:
        file.write_text(content)
        return "\n".join(read_class_names(file, FOLDERS).notes)

    assert notes("a\nb\nc") == ""
    assert notes("emu\ndog\ncat").count("\n") == 0
    assert "'x' of 'x, y'" in notes("x, y\nb\nc")
    assert "'yak'" in notes("cat: a\ndog: b\nemu: c\nyak: d")
    told = notes("dog: b")
    assert "1 of 3 classes" in told and told.endswith(": cat, emu")


def test_the_published_names_of_imagenet_are_read(tmp_path: Path) -> None:
    """torchvision's 1,000 names, some of which occur twice, in the order of the synsets."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES as published

    synsets = sorted(ImageNetInfo().label_names())
    file = tmp_path / "imagenet_classes.txt"
    file.write_text("\n".join(published))
    found = read_class_names(file, synsets)
    assert len({*map(text_key, found.names)}) == 1000
    differ = [(name, own) for name, own in zip(found.names, published, strict=True) if name != own]
    assert differ and len(differ) < 10 and all(name.startswith(own) for name, own in differ)
    shuffled = random.Random(0).sample(published, 1000)
    file.write_text("\n".join(shuffled))
    with refuses("class-names-wrong", "FOLDER: NAME"):
        read_class_names(file, synsets)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_prompts_and_recipes_of_any_system(encoding: str, ends: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(ends.join(["# mine", "ein Bild der Größe {}", "a {}", ""]).encode(encoding))
    assert load_prompts(str(file)) == ("ein Bild der Größe {}", "a {}")
    file = tmp_path / "recipe.toml"
    file.write_bytes(ends.join(['about = "Größe"', "[distill]", "epochs = 3"]).encode(encoding))
    assert (load(str(file)).about, load(str(file)).table("distill")) == ("Größe", {"epochs": 3})


def write_images(root: Path, folders: list[str], rng: np.random.Generator) -> str:
    for split in ("train", "val"):
        for name in folders:
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return f"imagefolder:{root}"


def prepare(tmp_path: Path, folders: list[str], rng: np.random.Generator) -> tuple[object, ...]:
    """Write images and a teacher; return a command of stage one without its CLIP."""
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", len(folders))
    command = ("precompute", "--dataset", write_images(tmp_path / "d", folders, rng))
    teacher = ("--teacher", "resnet8", "--teacher-weights", weights)
    return *command, *teacher, "--image-size", 32, "--views", 1, "--out", tmp_path / "d.zarr"


def test_the_preview_shows_which_folder_each_name_went_to(
    run: Run, fails: Fails, clip_dir: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    stage_one = prepare(tmp_path, ["1", "10", "2", "zebra"], rng)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"1": "one", "2": "two", "10": "ten"}))
    done = run(*stage_one, "--clip", clip_dir, "--class-names", names)
    assert done.code == 0, done.err
    assert "classes: 1 → one, 10 → ten, 2 → two, zebra\n" in done.err
    manifest = richkd.open_cache(tmp_path / "d.zarr").manifest
    assert manifest["class_names"] == ["one", "ten", "two", "zebra"]
    names.write_text("one\ntwo\nten\nzebra")  # refused before the weights and images are read
    refusal = fails(
        *stage_one,
        "--overwrite",
        "--clip",
        clip_dir,
        "--class-names",
        names,
        "--teacher-weights",
        "none.safetensors",
    )
    assert refusal.code == "class-names-wrong" and "'10'" in refusal


def test_classes_of_one_text_need_no_clip(
    run: Run, fails: Fails, clip_dir: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    stage_one = prepare(tmp_path, ["cat", "Cat"], rng)
    assert fails(*stage_one, "--clip", clip_dir).code == "class-names-ambiguous"
    done = run(*stage_one, "--clip", "none")
    assert done.code == 0 and "'Cat' and 'cat'" in done.err, done.err

"""Hugging Face tables and WebDataset shards: the images as in folders, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
import torch
from helpers import Refusal, refuses
from optional import require
from own_data import CLASSES, Samples, drawn, rewrite, table
from PIL import Image
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Images, Precompute
from richkd.core.ranks import Ranks
from richkd.data.datasets import Dataset, ImageFiles, load_dataset
from richkd.data.hf_datasets import TableRows
from richkd.data.inputs import FileInputs
from richkd.data.shards import part_of
from richkd.precompute import load_alike

require("datasets", "webdataset")
datasets: Any = pytest.importorskip("datasets")
Fails = Callable[..., Refusal]


@pytest.fixture(autouse=True)
def tables_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture(scope="module")
def data() -> dict[str, Samples]:
    return drawn(np.random.default_rng())


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Samples]) -> dict[str, str]:
    """The same images as a folder, as Parquet, by save_to_disk and as shards."""
    root = tmp_path_factory.mktemp("forms")
    return {
        "folder": own_data.write_folder(root / "folder", data),
        "parquet": own_data.write_parquet(root / "parquet", data),
        "saved": own_data.write_saved(
            root / "saved", {own_data.SPLITS[split]: table(some) for split, some in data.items()}
        ),
        "shards": own_data.write_shards(root / "shards", data),
    }


def read(name: str, skipped: list[str] | None = None, **settings: Any) -> Dataset:
    return load_dataset(Images(dataset=name, **settings), skipped)


def files_of(dataset: Dataset, split: str = "train") -> ImageFiles:
    images = dataset.splits[split].images
    assert isinstance(images, ImageFiles)
    return images


def pixels(dataset: Dataset, split: str = "train") -> list[Any]:
    files = files_of(dataset, split)
    return [np.asarray(files.open(number)) for number in range(len(files))]


@pytest.mark.parametrize("form", ["parquet", "saved", "shards"])
def test_the_same_images_as_in_a_folder(
    forms: dict[str, str], data: dict[str, Samples], form: str
) -> None:
    folder, own = read(forms["folder"]), read(forms[form])
    assert own.class_names == ("cat", "polar bear") and own.validation is None
    assert own.decoding == folder.decoding and own.decoding is not None
    assert own.image_size == folder.image_size and own.mean == folder.mean
    assert any("validation" in note or "val" in note for note in own.notes)  # tests on it
    for split, there in (("train", "train"), ("test", "val")):
        assert torch.equal(own.splits[split].labels, folder.splits[split].labels)
        theirs, mine = pixels(folder, split), pixels(own, split)
        assert all((a == b).all() for a, b in zip(theirs, mine, strict=True))
        # independently of both: Pillow on the bytes, in the order of ranks within classes
        each = len(data[there]) // 2
        order = [label * each + rank for rank in range(each) for label in range(2)]
        for place, number in enumerate(order):
            image, label = data[there][number]
            assert own.splits[split].labels[place] == label
            opened = Image.open(io.BytesIO(image))
            if opened.format == "JPEG" and not opened.getexif():
                assert (np.asarray(opened.convert("RGB")) == mine[place]).all()
    again = pickle.loads(pickle.dumps(files_of(own)))  # as spawned workers get it
    assert (np.asarray(again.open(5)) == pixels(own)[5]).all()


def test_a_fingerprint_is_of_the_content_wherever_it_lies(
    forms: dict[str, str], data: dict[str, Samples], tmp_path: Path, rng: np.random.Generator
) -> None:
    known = read(forms["parquet"]).fingerprint
    assert read(forms["saved"]).fingerprint == read(forms["shards"]).fingerprint == known
    train = [*data["train"]]
    train[0] = own_data.encoded(rng, "BMP", 80), 0
    known = read(own_data.write_shards(tmp_path / "known", {**data, "train": train})).fingerprint
    image = bytearray(train[0][0])
    image[len(image) // 2] ^= 1  # of the same length, in a format without a checksum
    changes = {
        "label": [(train[0][0], 1), *train[1:]],
        "image": [(bytes(image), 0), *train[1:]],
        "fewer": train[1:],
    }
    for name, changed in changes.items():
        place = own_data.write_shards(tmp_path / name, {**data, "train": changed})
        assert read(place).fingerprint != known


@dataclass(frozen=True)
class Beside(Ranks):
    """A process of a job of two, which exchange bytes; the second one starts after the first."""

    sent: list[bytes] = field(default_factory=list)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        if self.first:
            self.sent.append(pickle.dumps(compute()))
        message = self.sent[-1] if self.first else self.sent.pop(0)
        return pickle.loads(message)

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("form", ["folder", "parquet", "saved", "shards", "small", "broken"])
def test_processes_read_the_same_images_and_send_none(
    form: str, forms: dict[str, str], rng: np.random.Generator, tmp_path: Path
) -> None:
    place, train = forms.get(form), drawn(rng, ["PNG"], side=20)
    if form == "broken":
        train["train"][3] = b"", 0
    place = place or own_data.write_shards(tmp_path / "s", train)
    settings = Precompute(dataset=place, broken="skip", validation=0.2)
    first = Beside(0, 2)
    own = load_alike(lambda: load_dataset(settings), None, settings, first)
    assert sum(map(len, first.sent)) < 2000
    other = load_alike(pytest.fail, None, settings, Beside(1, 2, sent=first.sent))
    assert other.fingerprint == own.fingerprint
    assert (other.decoding, other.skipped) == (own.decoding, own.skipped)
    assert isinstance(other.train.images, Tensor) == (form in ("small", "broken"))
    assert bool(own.skipped) == (form == "broken")


def test_images_are_compared_between_machines(data: dict[str, Samples], tmp_path: Path) -> None:
    settings = Precompute(dataset=own_data.write_shards(tmp_path / "s", data))
    first = Beside(0, 2)
    dataset = load_alike(lambda: load_dataset(settings), None, settings, first)
    shard = tmp_path / "s" / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(data["train"][0][0][-50:], bytes(50)))
    with refuses("rank-files-differ", "rank 1", settings.dataset):
        load_alike(pytest.fail, None, settings, Beside(1, 2, sent=first.sent))
    shard.unlink()
    with refuses("image-changed", "000000.jpg", shard):
        files_of(dataset).open(0)


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_workers_read_what_this_process_reads(forms: dict[str, str], form: str) -> None:
    files = files_of(read(forms[form], image_size=32))
    order = torch.arange(len(files))
    found = []
    for workers in (0, 2):
        inputs = FileInputs(files, torch.device("cpu"), workers=workers)
        found.append(torch.cat([images for _, images in inputs.batches(order, None, 3)]))
    assert torch.equal(*found) and found[0].shape == (12, 32, 32, 3)


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_broken_images_are_named_or_left_out(
    form: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    data = drawn(rng, ["JPEG"])
    data["train"][1] = (data["train"][1][0][:-300], 0)
    data["train"][8] = (b"no image", 1)
    write = own_data.write_parquet if form == "parquet" else own_data.write_shards
    name = write(tmp_path / "own", data)
    named = "row 1 of" if form == "parquet" else "000001.jpg in"
    with refuses("image-damaged", named, tmp_path / "own", "1 more", "--broken skip"):
        read(name)
    dataset = read(name, broken="skip")
    keys = ["train/1", "train/8"]
    if form == "shards":
        keys = ["train/00000.tar/000001.jpg", "train/00001.tar/000008.jpg"]
    assert sorted(dataset.skipped) == keys and len(dataset.train) == 10
    again = read(name, skipped=list(dataset.skipped))
    assert again.fingerprint == dataset.fingerprint
    with refuses("image-damaged", "row 8" if form == "parquet" else "000008.jpg"):
        read(name, skipped=keys[:1])


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_small_images_become_an_array(form: str, tmp_path: Path, rng: np.random.Generator) -> None:
    data = drawn(rng, ["PNG"], side=24)
    write = own_data.write_parquet if form == "parquet" else own_data.write_shards
    dataset = read(write(tmp_path / "own", data))
    assert isinstance(dataset.train.images, torch.Tensor) and dataset.image_size == 24
    wanted = [np.asarray(Image.open(io.BytesIO(image))) for image, _ in data["train"]]
    mixed = [wanted[label * 6 + rank] for rank in range(6) for label in range(2)]
    assert (dataset.train.images.numpy() == np.stack(mixed)).all()


# --- tables --------------------------------------------------------------------------------------


def test_columns_are_chosen_by_their_kinds(tmp_path: Path, rng: np.random.Generator) -> None:
    some = drawn(rng, ["JPEG"])["train"]
    number, text = datasets.Value("int64"), datasets.Value("string")

    def make(features: dict[str, Any], name: str = "t", **columns: Any) -> str:
        made = table(some, features, **columns)
        return own_data.write_saved(tmp_path / name, {"train": made, "test": made})

    images = [{"bytes": image, "path": None} for image, _ in some]
    two = make({"thumb": datasets.Image()}, "two", thumb=images)
    with refuses("column-ambiguous", "image, thumb", "--image-column"):
        read(two)
    dataset = read(two, image_column="thumb")
    assert dataset.columns == {"image": "thumb", "label": "label"}
    assert len(files_of(dataset)) == 12
    with refuses("column-missing", "image_column = 'imag'", "image"):
        read(two, image_column="imag")
    with refuses("column-no-images", "image_column = 'label'", "label (ClassLabel)"):
        read(two, image_column="label")
    with refuses("column-no-labels", "label_column = 'thumb'"):
        read(two, image_column="image", label_column="thumb")

    plain = make({"image": {"bytes": datasets.Value("binary"), "path": text}}, "plain")
    with refuses("column-no-images", "image (dict)", "--image-column"):
        read(plain)
    mine, theirs = (pixels(read(name, image_column="image")) for name in (plain, two))
    assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))

    words = make({"label": text}, "words", label=["dog" if label else "cat" for _, label in some])
    assert read(words).class_names == ("cat", "dog")
    counted = make({"label": number}, "counted", label=[3 + 7 * label for _, label in some])
    dataset = read(counted)
    assert dataset.class_folders == ("3", "10") and dataset.train.labels.unique().tolist() == [0, 1]
    assert any("numerical order" in note and "3, 10" in note for note in dataset.notes)
    lemmas = datasets.ClassLabel(names=["tench, Tinca tinca", "white_shark, man-eater"])
    assert read(make({"label": lemmas}, "lemmas")).class_names == ("tench", "white_shark")

    coarse = datasets.ClassLabel(names=["a", "b"])
    named = {"fine_label": datasets.ClassLabel(names=["x", "y"]), "coarse_label": coarse}
    made = table(some, named, fine_label=[label for _, label in some], coarse_label=[0] * 12)
    made = made.remove_columns("label")
    both = own_data.write_saved(tmp_path / "both", {"train": made, "test": made})
    assert read(both).columns["label"] == "fine_label"
    more = datasets.ClassLabel(names=["cat", "dog", "owl"])
    dataset = read(make({"label": more}, "more"))
    assert any("no training images of owl" in note for note in dataset.notes)
    with refuses("folder-one-class", "only the label 5"):
        read(make({"label": number}, "one", label=[5] * 12))
    made = made.rename_column("fine_label", "kind")
    with refuses("column-ambiguous", "kind, coarse_label", "--label-column"):
        read(own_data.write_saved(tmp_path / "neither", {"train": made, "test": made}))


def test_splits_that_number_the_classes_differently(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    some = drawn(rng, ["JPEG"])
    other = [(image, 1 - label) for image, label in some["val"]]
    turned = table(other, {"label": datasets.ClassLabel(names=[*CLASSES[::-1]])})
    alike = {"train": table(some["train"]), "test": table(some["val"])}
    known = read(own_data.write_saved(tmp_path / "alike", alike))
    dataset = read(own_data.write_saved(tmp_path / "turned", {**alike, "test": turned}))
    assert dataset.fingerprint == known.fingerprint
    assert torch.equal(dataset.test.labels, known.test.labels)
    for number, features in enumerate([datasets.ClassLabel(names=["cat", "dog"]), number_type()]):
        test = table(other, {"label": features})
        with refuses("labels-differ", "split test", "polar_bear"):
            read(own_data.write_saved(tmp_path / str(number), {**alike, "test": test}))


def number_type() -> Any:
    return datasets.Value("int64")


SPLITS = [
    ("train validation test", "", ("train", "validation", "test")),
    ("train valid", "", ("train", None, "valid")),
    ("train dev testing other", "", ("train", "dev", "testing")),
    ("few train test", "few", ("few", None, "test")),
]


@pytest.mark.parametrize(("there", "given", "used"), SPLITS)
def test_splits_are_found_by_their_names(
    there: str,
    given: str,
    used: tuple[str, str | None, str],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    some = table(drawn(rng, ["JPEG"], train=4)["train"])
    name = own_data.write_saved(tmp_path / "t", dict.fromkeys(there.split(), some))
    dataset = read(f"{name}:{given}" if given else name)
    train, validation, test = used
    wanted = {"train": train, "test": test} | ({"validation": validation} if validation else {})
    assert dataset.folders == wanted
    assert ("no separate test" in dataset.notes[0]) == (test == "valid")
    left = {*there.split()} - {*wanted.values()}
    assert all(any(each in note and "not used" in note for note in dataset.notes) for each in left)


def test_images_outside_a_table_are_looked_at_again(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    some = drawn(rng, ["JPEG"])["train"]
    outside = tmp_path / "a.jpg"
    outside.write_bytes(some[0][0])
    images = [{"bytes": image, "path": "within.jpg"} for image, _ in some]
    images[0] = {"bytes": None, "path": str(outside)}
    rows = TableRows.of(table(some, image=images), "image", "here", "train")
    known = rows.state()
    assert rows.state() == known and rows.file(0).read() == some[0][0]
    outside.write_bytes(some[0][0] + b"more")
    assert rows.state() != known


def test_a_table_that_can_no_longer_be_read(tmp_path: Path, rng: np.random.Generator) -> None:
    made = table(drawn(rng, ["JPEG"])["train"])
    files = files_of(read(own_data.write_saved(tmp_path / "t", {"train": made, "test": made})))

    class Damaged:
        def __getitem__(self, row: int) -> Any:
            raise datasets.table.pa.ArrowInvalid("bad offset")

    with refuses("image-changed", "row 3", "bad offset"):
        replace(files, source=replace(files.source, table=Damaged(), rows=np.arange(9))).open(3)


def test_what_a_table_lacks_is_named(
    tmp_path: Path, rng: np.random.Generator, fails: Fails
) -> None:
    some = drawn(rng, ["JPEG"])["train"]
    good = table(some)

    def refused(tables: dict[str, Any], name: str, given: str = "", **settings: Any) -> Any:
        place = own_data.write_saved(tmp_path / name, tables)
        with pytest.raises(Exception) as caught:
            read(f"{place}{given}", **settings)
        return caught.value

    for tables, given, code, said in [
        ({"train": good}, "", "split-missing", "train_test_split"),
        ({"a": good, "test": good}, "", "split-missing", ":SPLIT"),
        ({"train": good, "test": good}, ":trian", "split-missing", "train"),
        ({"train": good, "test": good.remove_columns("label")}, "", "labels-invalid", "row 0"),
        ({"train": good, "test": good.remove_columns("image")}, "", "column-missing", "image"),
    ]:
        error = refused(tables, f"t{len([*tmp_path.iterdir()])}", given)
        assert error.code == code and said in str(error), error
    hidden = good.map(lambda _: {"label": -1})
    dataset = read(
        own_data.write_saved(tmp_path / "h", {"train": good, "validation": good, "test": hidden})
    )
    assert dataset.folders == {"train": "train", "test": "validation"}
    assert any("no labels" in note for note in dataset.notes)
    (tmp_path / "empty").mkdir()
    error = fails("precompute", "--dataset", f"hf:{tmp_path / 'empty'}")
    assert error.code == "table-unreadable" and "Parquet" in error
    assert fails("precompute", "--dataset", f"hf:{tmp_path}/no").code == "dataset-folder-missing"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_dataset_of_the_hub_is_read_from_its_cache_without_a_network(
    data: dict[str, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = read(own_data.write_parquet(tmp_path / "things", data))
    cache = tmp_path / "hf-cache"
    (cache / "things").rename(cache / "nobody___things")  # as if it had come from the Hub
    again = read("hf:nobody/things")
    assert again.fingerprint == known.fingerprint and again.folders == known.folders
    assert read("hf:nobody/things@default").fingerprint == known.fingerprint
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    assert catalog.found("hf:nobody/Things", Path("data")) == cache / "nobody___things"
    with refuses("table-unreadable", "hf:nobody/things@other"):
        read("hf:nobody/things@other")


@pytest.mark.usefixtures("offline")
def test_a_name_that_is_not_here_and_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    error = fails("precompute", "--dataset", "hf:nobody/nothing")
    assert error.code == "table-unreadable" and "nobody/nothing" in error and "network" in error
    assert fails("plan", "--dataset", "hf:nobody/nothing").code == "dataset-folder-missing"
    with monkeypatch.context() as patch:
        patch.setattr("datasets.__version__", "3.6.0")
        error = fails("precompute", "--dataset", "hf:nobody/nothing")
        assert error.code == "extra-missing" and "3.6.0" in error and "4.0" in error
    monkeypatch.setattr("richkd.data.hf_datasets.PACKAGE", "no_such_package")
    error = fails("precompute", "--dataset", "hf:nobody/nothing")
    assert error.code == "extra-missing" and "pip install 'richkd[hf]'" in error


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["timm", "dali"])
def test_other_indexes(index: str, forms: dict[str, str], data: Any, tmp_path: Path) -> None:
    place = own_data.write_shards(tmp_path / "s", data, index)
    assert read(place).fingerprint == read(forms["shards"]).fingerprint


def test_splits_by_the_names_of_shards_and_labels_in_json(
    data: dict[str, Samples], tmp_path: Path
) -> None:
    own_data.write_shards(tmp_path / "s", data, most=100)
    shards = {"s-train-0000.tar": "train", "s-validation-0000.tar": "val"}
    for name, split in shards.items():
        (tmp_path / "s" / split / "00000.tar").rename(tmp_path / "s" / name)
        (tmp_path / "s" / split / "index.json").unlink()

        def to_json(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
            return [
                (name, content)
                if not name.endswith(".cls")
                else (
                    name.replace(".cls", ".json"),
                    json.dumps({"label": CLASSES[int(content)], "id": 1.5}).encode(),
                )
                for name, content in members
            ]

        rewrite(tmp_path / "s" / name, to_json)
    index = [{"url": n, "nsamples": len(data[s])} for n, s in shards.items()]
    (tmp_path / "s" / "index.json").write_text(json.dumps({"shardlist": index}))
    (tmp_path / "s" / "classes.txt").unlink()
    # a split that was not fetched is no fault
    info = {"test": {"name": "test", "filenames": ["s-test-0000.tar"], "shard_lengths": [9]}}
    (tmp_path / "s" / "_info.json").write_text(json.dumps({"splits": info}))
    dataset = read(f"wds:{tmp_path / 's'}")
    assert dataset.folders == {"train": "train", "test": "validation"}
    assert dataset.columns == {"label": "json:label"} and dataset.class_names[1] == "polar bear"
    assert dataset.train.labels.tolist() == [0, 1] * 6
    with refuses("column-no-labels", "1.5", "--label-column"):
        read(f"wds:{tmp_path / 's'}", label_column="id")
    with refuses("column-no-labels", "kind", "label, id"):
        read(f"wds:{tmp_path / 's'}", label_column="kind")
    with refuses("column-missing", "image_column = 'webp'"):
        read(f"wds:{tmp_path / 's'}", image_column="webp")


@pytest.mark.parametrize("extension", ["json", "jsonl"])
def test_labels_in_other_members_and_json_that_is_too_deep(
    extension: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    place = own_data.write_shards(tmp_path / "s", drawn(rng, ["JPEG"]))

    def rename(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        deep = b"[" * 200_000 if extension == "json" else b"cat"
        return [
            (name.replace(".cls", f".{extension}"), deep if name == "000000.cls" else content)
            for name, content in members
        ]

    for shard in (tmp_path / "s").glob("*/*.tar"):
        rewrite(shard, rename)
    if extension == "jsonl":  # texts, as of any other member
        (tmp_path / "s" / "classes.txt").unlink()
        assert read(place, label_column="jsonl").class_names == ("0", "1", "cat")
        return
    with refuses("shard-damaged", "000000.json in", tmp_path):
        read(place)


def test_names_of_classes_without_images_keep_their_numbers(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    place = own_data.write_shards(tmp_path / "s", drawn(rng, ["JPEG"]))
    (tmp_path / "s" / "classes.txt").write_text("cat\npolar bear\ncow\n")
    dataset = read(place)
    assert dataset.class_names == ("cat", "polar bear", "cow")
    assert any("no training images of 2" in note for note in dataset.notes)


def cut(root: Path) -> None:
    shard = root / "train" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])


def lose(extension: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        rewrite(
            root / "train" / "00001.tar",
            lambda members: [m for m in members if m[0] != f"000006.{extension}"],
        )

    return change


def relabel(text: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        rewrite(
            root / "val" / "00000.tar",
            lambda members: [(n, text if n == "000002.cls" else c) for n, c in members],
        )

    return change


def add_image(root: Path) -> None:
    rewrite(root / "train" / "00000.tar", lambda m: [m[0], ("000000.left.png", m[0][1]), *m[1:]])


def index(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "train" / "index.json").write_text(text) and None


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "no index": (
        lambda root: (root / "val" / "index.json").unlink(),
        "shards-without-index",
        ("val/00000.tar", "widsindex"),
    ),
    "nested index": (index("[" * 200_000), "shard-index-damaged", ("train/index.json",)),
    "index is a folder": (
        lambda root: [
            (root / "val" / "index.json").unlink(),
            (root / "val" / "00000.idx").mkdir(),
        ],
        "shard-index-damaged",
        ("val/00000.idx",),
    ),
    "damaged index": (index("{"), "shard-index-damaged", ("train/index.json",)),
    "wrong index": (index('{"shardlist": [{"url": "00000.tar"}]}'), "shard-index-damaged", ()),
    "other counts": (
        index(
            json.dumps(
                {"shardlist": [{"url": f"0000{n}.tar", "nsamples": (5, 5, 3)[n]} for n in range(3)]}
            )
        ),
        "shard-index-differs",
        ("00002.tar has 2", "says 3"),
    ),
    "missing shard": (
        lambda root: (root / "train" / "00002.tar").unlink(),
        "shards-missing",
        ("train/00002.tar",),
    ),
    "cut": (cut, "shard-damaged", ("train/00001.tar",)),
    "no tar": (
        lambda root: (root / "train" / "00000.tar").write_bytes(b"hello" * 500),
        "shard-damaged",
        ("train/00000.tar",),
    ),
    "no label": (lose("cls"), "labels-invalid", ("000006.", "train/00001.tar", "no label")),
    "no image": (lose("jpg"), "column-no-images", ("000006.cls",)),
    "two images": (add_image, "column-ambiguous", ("000000.left.png", "--image-column")),
    "other label": (relabel(b"7"), "labels-invalid", ("the label 7", "000002.")),
    "text label": (relabel(b"dog"), "labels-invalid", ("the label 'dog'",)),
    "binary label": (relabel(b"\xff\xfe"), "column-no-labels", ("000002.cls",)),
    "no split": (
        lambda root: (root / "train").rename(root / "parts"),
        "folder-layout",
        ("parts/00000.tar",),
    ),
    "only train": (
        lambda root: [path.unlink() for path in (root / "val").iterdir()],
        "split-missing",
        ("train",),
    ),
    "no shards": (
        lambda root: [path.unlink() for path in root.glob("*/*")],
        "shards-missing",
        ("train-*.tar",),
    ),
    "one name": (
        lambda root: (root / "classes.txt").write_text("cat\n"),
        "labels-invalid",
        ("the label 1", "0..0", "classes.txt"),
    ),
    "label beyond the names": (
        lambda root: (relabel(b"7")(root), (root / "classes.txt").write_text("cat\ndog\ncow\n")),
        "labels-invalid",
        ("the label 7", "0..2", "classes.txt"),
    ),
    "negative label": (
        lambda root: (relabel(b"-3")(root), (root / "classes.txt").unlink()),
        "labels-invalid",
        ("the label -3", "000002."),
    ),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
def test_bad_shards(fault: str, tmp_path: Path, rng: np.random.Generator) -> None:
    place = own_data.write_shards(tmp_path / "s", drawn(rng, ["JPEG"]))
    read(place)  # what was listed then is not taken for what is there now
    spoil, code, said = BAD_SHARDS[fault]
    spoil(tmp_path / "s")
    with refuses(code, *said):
        read(place)


def test_shards_are_listed_once(forms: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(forms["shards"])
    monkeypatch.setattr("tarfile.open", None)
    kept = first.folders, first.columns
    settings = Images(dataset=forms["shards"])
    from richkd.data.layouts import Layout

    again = load_dataset(settings, [], layout=Layout(kept[0], columns=kept[1]))
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("pread", [True, False])
def test_a_part_of_a_file_is_a_file(
    pread: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pread:  # as on Windows
        monkeypatch.delattr("os.pread", raising=False)
    content = rng.bytes(5000)
    (tmp_path / "f").write_bytes(content)
    part = part_of(str(tmp_path / "f"), 1000, 3000)
    assert part.read() == content[1000:4000] and part.read() == b""
    assert part.seek(-10, 2) == 2990 and part.read(99) == content[3990:4000]
    assert part.seek(7) == 7 and part.read(5) == content[1007:1012] and part.tell() == 12


# --- names ---------------------------------------------------------------------------------------


def test_names_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "hf:uoft-cs/cifar10": ("uoft-cs/cifar10", "", "", "cifar10"),
        "hf:mnist@small": ("mnist", "small", "", "mnist-small"),
        "hf:a/b@c:few": ("a/b", "c", "few", "b-c"),
    }
    for name, (base, config, train, short) in names.items():
        found = catalog.table_name(name)
        assert (found.name, found.config, found.train) == (base, config, train)
        assert catalog.short_name(name) == short and catalog.is_own(name)
        assert Precompute(dataset=name).out == f"cache/{short}.zarr"
    (tmp_path / "x@1:y").mkdir()
    assert catalog.table_name(f"hf:{tmp_path}/x@1:y").name == f"{tmp_path}/x@1:y"
    found = catalog.table_name(f"hf:{tmp_path}/x@1:y:few")
    assert (found.name, found.train) == (f"{tmp_path}/x@1:y", "few")
    monkeypatch.setenv("HOME", "/somewhere")
    assert catalog.at_home("hf:~/a") == "hf:/somewhere/a"
    assert catalog.at_home("wds:~/a") == "wds:/somewhere/a"
    with refuses("dataset-path-missing", "hf:NAME"):
        catalog.split_name("hf:")
    with refuses("value-out-of-range", "image_column", "imagefolder"):
        Images(dataset="imagefolder:x", image_column="image")

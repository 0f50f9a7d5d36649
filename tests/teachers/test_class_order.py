"""A teacher's outputs are matched to the dataset's classes, whatever their order."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Refusal, changed, refuses, tree
from PIL import Image
from scipy.stats import binom
from timm.data.readers.reader_image_folder import ReaderImageFolder

import richkd
from richkd.config.settings import Images, Precompute
from richkd.data.datasets import Dataset, Split, load_dataset
from richkd.data.inputs import make_inputs
from richkd.models import check_trainable
from richkd.models.weights import read_note, save_tensors
from richkd.precompute import precompute
from richkd.store.manifest import read_manifest
from richkd.store.reader import open_cache
from richkd.store.schema import manifest_fault
from richkd.teachers.class_order import (
    advantage,
    differing,
    given_outputs,
    least,
    natural,
    worse,
)
from richkd.teachers.cnn import CNNTeacher
from richkd.teachers.permutation import likely_order

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
CPU = torch.device("cpu")
NAMES = ("Zebra", "apple", "class1", "class10", "class2", "class20")  # sorted, as richkd has them
COLOURS = (
    (220, 30, 30),
    (30, 220, 30),
    (30, 30, 220),
    (220, 220, 30),
    (30, 220, 220),
    (220, 30, 220),
)


def write_images(root: Path, names: Sequence[str], train: int = 12, val: int = 8) -> str:
    """A colour a class, with noise; the class of a name has the colour of its place in `names`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in zip(names, COLOURS, strict=False):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-30, 31, (36, 36, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return f"imagefolder:{root}"


def fitted(dataset: Dataset) -> dict[str, torch.Tensor]:
    """A network of random weights whose classifier was solved for: it knows the colours."""
    torch.manual_seed(0)
    model: Any = richkd.create_model("resnet8", len(dataset.class_names)).eval()
    teacher = CNNTeacher("resnet8", model, "", 64, dataset.network_input, CPU)
    inputs = make_inputs(dataset.train.images, CPU, teacher.input)
    batches = [images for _, images in inputs.batches(torch.arange(len(dataset.train)), None, 64)]
    features = torch.cat([teacher.rows(images)[1] for images in batches]).clone().double()
    rows = torch.cat([features, torch.ones(len(features), 1)], 1)
    wanted = torch.nn.functional.one_hot(dataset.train.labels, len(dataset.class_names)).double()
    solved = torch.linalg.lstsq(rows.T @ rows + 1e-6 * torch.eye(65), rows.T @ wanted).solution
    model.fc.weight.data, model.fc.bias.data = solved[:-1].T.float(), solved[-1].float()
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def reordered(state: dict[str, torch.Tensor], ours: Sequence[str], theirs: Sequence[str]) -> Any:
    """The same network with its outputs in another order of classes."""
    rows = [list(ours).index(name) for name in theirs]
    return {key: value[rows] if key.startswith("fc.") else value for key, value in state.items()}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_images(tmp_path / "images", NAMES)


@pytest.fixture
def own(folder: str) -> dict[str, torch.Tensor]:
    """A teacher's weights, in the order of the sorted folders."""
    return fitted(load_dataset(Images(dataset=folder, image_size=32)))


def settings(folder: str, weights: Path, out: Path, **other: Any) -> Precompute:
    return Precompute(
        dataset=folder,
        image_size=32,
        teacher="resnet8",
        teacher_weights=str(weights),
        clip="none",
        views=2,
        device="cpu",
        dtype="float32",
        out=str(out),
        **other,
    )


def words(folder: str, weights: Path, out: Path, *other: object) -> list[object]:
    return [
        "precompute",
        "--dataset",
        folder,
        "--image-size",
        32,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        weights,
        "--clip",
        "none",
        "--views",
        2,
        "--device",
        "cpu",
        "--out",
        out,
        *other,
    ]


def saved(path: Path, state: dict[str, torch.Tensor], **note: str) -> Path:
    save_tensors(path, state, note)
    return path


def rows_of(store: Path) -> list[torch.Tensor]:
    cache = open_cache(store)
    return [
        cache.read("test/teacher_logits"),
        cache.read("train/teacher_logits"),
        cache.read("train/teacher_features"),
    ]


def lines_with(err: str, text: str) -> list[str]:
    return [line for line in err.splitlines() if text in line]


def preview(err: str) -> str:
    (line,) = lines_with(err, "CNN teacher on 48 of the test images: ")
    return line


# --- the natural order ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ("1", "10", "2", "21", "3"),
        ("apple", "Banana", "cherry"),
        ("a", "B"),
        ("x1", "x01"),
        ("²", "10", "2"),
        ("Ärger", "ähnlich", "zebra"),
    ],
)
def test_the_natural_order_is_that_of_timms_reader(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_images(tmp_path / "d", names, train=1, val=1)
    try:
        reader: Any = ReaderImageFolder(str(tmp_path / "d" / "train"))  # type: ignore[no-untyped-call]
    except ValueError:  # it cannot read ²
        assert natural(names) == sorted(names)
        return
    theirs = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if names != ("x1", "x01"):  # which are the same to it, in the order of a set
        assert natural(names) == theirs


def test_a_teacher_in_timms_order_is_put_in_the_data_sets(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    order = natural(NAMES)
    assert order == ["apple", "class1", "class2", "class10", "class20", "Zebra"]
    mine = saved(tmp_path / "own.safetensors", own)
    timms = tmp_path / "timm.pth"
    torch.save({"state_dict": reordered(own, NAMES, order)}, timms)
    for weights in (mine, timms):
        done = run(*words(folder, weights, weights.with_suffix(".zarr"), "--dtype", "float32"))
        assert done.code == 0, done.err
        assert preview(done.err).endswith("00 % (chance 16.67 %)"), done.err
        told = lines_with(done.err, "natural order")
        assert len(told) == (weights is timms)
        entry = read_manifest(weights.with_suffix(".zarr"))["teacher"]
        assert entry["accuracy"] is not None and entry["accuracy"] > 0.9
        if weights is timms:
            assert "apple, class1, class2, class10, …" in told[0] and "--teacher-classes" in told[0]
            assert done.err.index(told[0]) < done.err.index("precompute:")
            assert entry["outputs"] == [order.index(name) for name in NAMES]
        else:
            assert "outputs" not in entry
    a, b = (rows_of(weights.with_suffix(".zarr")) for weights in (mine, timms))
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_a_cache_in_another_order_is_verified_repaired_and_resumed(
    run: Run,
    fails: Fails,
    folder: str,
    own: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = natural(NAMES)
    weights = saved(tmp_path / "timm.safetensors", reordered(own, NAMES, order))
    whole = precompute(settings(folder, weights, tmp_path / "whole.zarr")).path
    shown = run("verify", whole, "--teacher", weights)
    assert shown.code == 0, shown.err
    before = tree(whole)

    def must_not(*_: object) -> Any:
        raise AssertionError("the recorded order must be used")

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    out = tmp_path / "part.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("richkd.precompute.StageOne.write", stop)
        with pytest.raises(Stopped):
            precompute(settings(folder, weights, out))
    monkeypatch.setattr("richkd.teachers.find.resolve_outputs", must_not)
    precompute(settings(folder, weights, out))
    assert read_manifest(out)["teacher"] == read_manifest(whole)["teacher"]
    for ours, theirs in zip(rows_of(whole), rows_of(out), strict=True):
        assert torch.equal(ours, theirs)

    chunk = next(whole.glob("train/teacher_logits/c/0/0/*"))
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert fails("verify", whole).code == "cache-verify-failed"
    repaired = run("repair", whole)
    assert repaired.code == 0, repaired.err
    assert changed(before, tree(whole)) == []


def test_a_cache_is_not_resumed_in_another_order(
    folder: str, own: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, natural(NAMES)))
    with monkeypatch.context() as patch:
        patch.setattr("richkd.precompute.StageOne.write", stop)
        with pytest.raises(Stopped):
            precompute(settings(folder, weights, tmp_path / "s.zarr"))
    with refuses("cache-settings-differ", "teacher.outputs"):
        precompute(settings(folder, weights, tmp_path / "s.zarr", teacher_classes="sorted"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_the_order_is_read_as_any_system_writes_it(
    folder: str, own: dict[str, torch.Tensor], tmp_path: Path, encoding: str
) -> None:
    dataset = load_dataset(Images(dataset=folder, image_size=32))
    lines = tmp_path / "order.txt"
    lines.write_text("\r\n".join(natural(NAMES)), encoding=encoding, newline="")
    given = settings(folder, tmp_path / "w.pt", tmp_path / "s", teacher_classes=str(lines))
    assert given_outputs(given, dataset) == tuple(natural(NAMES).index(n) for n in sorted(NAMES))


def test_a_useless_teacher_gets_no_order(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A network that says the same of every image is right on a class in any order."""
    state = {**own, "fc.weight": torch.zeros_like(own["fc.weight"])}
    for said in range(len(NAMES)):
        state["fc.bias"] = torch.eye(len(NAMES))[said]
        weights = saved(tmp_path / f"{said}.safetensors", state)
        done = run(*words(folder, weights, tmp_path / f"{said}.zarr"))
        assert (
            "natural order" not in done.err
            and "outputs" not in read_manifest(tmp_path / f"{said}.zarr")["teacher"]
        )


@pytest.mark.parametrize(
    ("order", "told"),
    [
        (sorted(NAMES, key=str.lower), "sorted ignoring case"),
        (
            ["Zebra", "apple", "class1", "class2", "class10", "class20"],
            "sorted with numbers as numbers",
        ),
    ],
)
def test_the_orders_of_other_loaders(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path, order: list[str], told: str
) -> None:
    assert order not in (natural(NAMES), [*NAMES])
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, order))
    done = run(*words(folder, weights, tmp_path / "s.zarr"))
    assert len(lines_with(done.err, told)) == 1, done.err
    assert read_manifest(tmp_path / "s.zarr")["teacher"]["accuracy"] == 1


# --- alarms --------------------------------------------------------------------------------------


def test_another_order_is_named_before_the_blocks(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shuffled = [NAMES[number] for number in (3, 5, 1, 0, 2, 4)]
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, shuffled))
    done = run(*words(folder, weights, tmp_path / "s.zarr"))
    line = preview(done.err)
    assert done.code == 0 and done.err.index(line) < done.err.index("precompute:")
    assert "0.00 % (chance 16.67 %)" in line and ", ".join(shuffled) in line
    assert "100.00 %" in line and "--teacher-classes FILE" in line and "--teacher-mean" not in line
    (tmp_path / "order.txt").write_text("\n".join(shuffled))
    done = run(
        *words(
            folder,
            weights,
            tmp_path / "s.zarr",
            "--overwrite",
            "--teacher-classes",
            tmp_path / "order.txt",
        )
    )
    assert "--teacher-classes" not in preview(done.err)
    assert read_manifest(tmp_path / "s.zarr")["teacher"]["accuracy"] == 1


def test_a_teacher_far_below_its_record_is_named(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Half of the classes, which is far above chance."""
    state = {**own, "fc.bias": own["fc.bias"] - torch.tensor([9.0, 9, 9, 0, 0, 0])}
    dataset = load_dataset(Images(dataset=folder, image_size=32))
    note = {**dataset.network_input.note, "fingerprint": dataset.fingerprint}
    for recorded, alarm in ((1.0, True), (0.55, False)):
        weights = saved(
            tmp_path / f"{recorded}.safetensors", state, test_accuracy=repr(recorded), **note
        )
        done = run(*words(folder, weights, tmp_path / f"{recorded}.zarr"))
        assert ("100.00 %" in preview(done.err)) == alarm, done.err


def test_two_classes_that_are_exchanged_are_named(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """In an order of nobody's, and though most images are right."""
    order = ["Zebra", "class10", "apple", "class1", "class2", "class20"]
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, order))
    done = run(*words(folder, weights, tmp_path / "s.zarr"))
    line = preview(done.err)
    assert "50.00 %" in line and "--teacher-classes FILE" in line
    assert "apple for class1, class1 for class10, class10 for apple" in line


def test_confusions_are_no_other_order() -> None:
    labels = torch.arange(5).repeat_interleave(8)

    def order(predicted: torch.Tensor, labels: torch.Tensor = labels, classes: int = 5) -> Any:
        return likely_order(predicted, labels, classes)

    assert order(labels) == {}
    wolf = torch.where(labels == 1, 2, labels)  # which is right on wolves
    assert order(wolf) == {}
    assert order(torch.full_like(labels, 3)) == {}
    swapped = torch.where(labels == 2, 1, wolf)
    assert order(swapped) == {0: 0, 1: 2, 2: 1, 3: 3, 4: 4}
    assert order(swapped[::2], labels[::2]) == {}  # four images of a class
    assert order((labels + 1) % 5) == {number: (number + 1) % 5 for number in range(5)}
    assert order(swapped, labels, 10**6) == order(swapped)  # and no matrix of so many is made
    assert order(labels[:0], labels[:0]) == {}


@pytest.mark.parametrize(
    ("classes", "kind", "known", "said"),
    [
        (10, "permuted", 0.9, True),
        (10, "permuted", 0.5, True),
        (100, "permuted", 0.8, True),  # two or three images per class
        (1000, "permuted", 1.0, False),  # one, which settles nothing
        (10, "own", 0.95, False),
        (10, "own", 0.25, False),
        (2, "own", 0.0, False),
        (10, "own", 0.0, False),
        (100, "own", 0.0, False),
        (10, "one for many", 0.9, False),
        (100, "one for many", 0.9, False),
    ],
)
def test_a_permuted_teacher_is_told_from_a_bad_one(
    classes: int, kind: str, known: float, said: bool
) -> None:
    """On 256 images that are drawn with answers of a known order, 20 times."""
    labels = torch.arange(256) % classes
    right = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        order = {
            "permuted": torch.randperm(classes, generator=g),
            "own": torch.arange(classes),
            "one for many": torch.randint(1 + classes // 3, (classes,), generator=g),
        }[kind]
        knows = torch.rand(256, generator=g) < known
        answers = torch.where(knows, order[labels], torch.randint(classes, (256,), generator=g))
        found = likely_order(answers, labels, classes)
        assert bool(found) == said, seed
        right += [int(order[one]) == output for one, output in found.items()]
    assert not said or np.mean(right) > (0.9 if classes == 100 else 0.99)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 37, 100, 1000, 21841])
def test_alarms_are_for_teachers_that_are_hardly_better_than_chance(classes: int) -> None:
    """By the binomial distribution: how often each kind of teacher is named, on 256 images."""
    chance, bound = 1 / classes, least(classes)
    named = [right for right in range(257) if worse(right, 256, bound)]
    assert named == list(range(len(named)))  # no gaps
    often = [float(binom.cdf(len(named) - 1, 256, p)) for p in (chance, 0.9, 0.6 + 0.2 / classes)]
    assert often[0] > 0.7 and often[1] < 1e-9 and often[2] < 0.05
    assert chance < bound and binom.cdf(len(named) - 1, 256, bound) < 0.01
    if classes > 2:
        assert float(binom.cdf(len(named) - 1, 256, max(2.2 * chance, 0.6))) < 0.01


def test_a_handful_of_images_names_nobody() -> None:
    for classes in (5, 10, 16, 100):
        assert not any(worse(0, count, least(classes)) for count in range(9))


# --- by --teacher-classes ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "windows", "blank lines", "names", "natural"])
def test_the_order_as_the_user_says_it(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path, form: str
) -> None:
    order = natural(NAMES)
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, order))
    file = tmp_path / "order.txt"
    names = [f"{name}: {name.replace('class', 'kind ')}\n" for name in NAMES]
    (tmp_path / "names.txt").write_text("".join(names))
    content = {
        "plain": "\n".join(order).encode(),
        "windows": b"\xef\xbb\xbf" + "\r\n".join(order).encode() + b"\r\n",
        "blank lines": ("\n\n".join(order) + "\n  \n").encode(),
        "names": "\n".join(name.replace("class", "kind ") for name in order).encode(),
    }
    if form in content:
        file.write_bytes(content[form])
    given = file if form in content else form
    flags = ["--class-names", tmp_path / "names.txt"] if form == "names" else []
    done = run(*words(folder, weights, tmp_path / "s.zarr", "--teacher-classes", given, *flags))
    assert done.code == 0, done.err
    assert len(lines_with(done.err, f"by --teacher-classes {given}")) == 1
    entry = read_manifest(tmp_path / "s.zarr")["teacher"]
    assert entry["outputs"] == [order.index(name) for name in NAMES] and entry["accuracy"] == 1


def test_sorted_keeps_the_data_sets_order(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Against what its images say; and the alarm says that it is wrong."""
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, natural(NAMES)))
    done = run(*words(folder, weights, tmp_path / "s.zarr", "--teacher-classes", "sorted"))
    assert "outputs" not in read_manifest(tmp_path / "s.zarr")["teacher"]
    line = preview(done.err)
    assert line.endswith("--teacher-classes natural") and ", ".join(natural(NAMES)) in line


UNKNOWN, WRONG = "teacher-classes-unknown", "teacher-classes-wrong"


@pytest.mark.parametrize(
    ("content", "code", "values"),
    [
        ("apple\nclass1\nclass2\nclass10\nclass20\nZebra\nclass30\n", UNKNOWN, ["'class30'"]),
        ("apple\nclass1\nclass2\nclass10\nclass20\nzebra\n", UNKNOWN, ["'zebra'", "Zebra"]),
        ("apple\nclass1\nclass2\nclass10\nclass20\napple\n", WRONG, ["'apple'"]),
        ("apple\nclass1\nclass2\nclass10\nZebra\n", WRONG, ["5 of 6", "'class20'"]),
        ("", WRONG, ["0 of 6", "'Zebra'"]),
        (b"caf\xe9", "teacher-classes-unreadable", ["order.txt"]),
        (None, "teacher-classes-unreadable", ["order.txt"]),
    ],
)
def test_orders_that_are_refused(
    fails: Fails,
    folder: str,
    own: dict[str, torch.Tensor],
    tmp_path: Path,
    content: str | bytes | None,
    code: str,
    values: list[str],
) -> None:
    weights = saved(tmp_path / "w.safetensors", own)
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "order.txt").write_bytes(data)
    given = words(folder, weights, tmp_path / "s.zarr", "--teacher-classes", tmp_path / "order.txt")
    for command in (given, ["plan", *given[1:-4], *given[-2:]]):
        refusal = fails(*command)
        assert refusal.code == code and "--teacher-classes" in refusal, refusal
        assert all(value in refusal for value in values), refusal
    assert not (tmp_path / "s.zarr").exists()


def test_an_order_is_for_weights_from_elsewhere(fails: Fails, folder: str, tmp_path: Path) -> None:
    refusal = fails(
        "precompute",
        "--dataset",
        folder,
        "--teacher-classes",
        "natural",
        "--clip",
        "none",
        "--out",
        tmp_path / "s.zarr",
    )
    assert refusal.code == "teacher-classes-not-needed" and "--teacher-classes" in refusal


def test_a_recipe_has_the_order_too(
    run: Run,
    folder: str,
    own: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, natural(NAMES)))
    (tmp_path / "r.toml").write_text(f"""
[precompute]
dataset = "{folder}"
image_size = 32
teacher = "resnet8"
teacher_weights = "{weights}"
teacher_classes = "natural"
clip = "none"
views = 2
out = "s.zarr"
[distill]
student = "resnet8"
method = "kd"
epochs = 1
""")
    for said in ("by --teacher-classes natural", "is up to date"):
        done = run("run", "r.toml", "--device", "cpu")
        assert done.code == 0 and said in done.err, done.err
    assert read_manifest(tmp_path / "s.zarr")["teacher"]["accuracy"] == 1


# --- by what weights say themselves --------------------------------------------------------------


def test_an_order_that_little_speaks_for_is_said(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A network that knows nothing: sorted is taken; one that knows the classes needs no word."""
    blind = {
        key: torch.zeros_like(value) if key.startswith("fc.") else value
        for key, value in own.items()
    }
    for name, state, said in (("blind", blind, 1), ("good", own, 0)):
        weights = saved(tmp_path / f"{name}.safetensors", state)
        done = run(*words(folder, weights, tmp_path / f"{name}.zarr"))
        assert done.code == 0, done.err
        lines = lines_with(done.err, "sorted order")
        assert len(lines) == said, done.err
        assert all("--teacher-classes natural" in line for line in lines)


def test_other_class_names_are_no_other_training(run: Run, folder: str, tmp_path: Path) -> None:
    out, names = tmp_path / "t.safetensors", tmp_path / "names.txt"
    command = (
        "train-teacher",
        "--dataset",
        folder,
        "--image-size",
        32,
        "--model",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert run(*command).code == 0
    names.write_text("".join(f"{name}: {name} of another kind\n" for name in NAMES))
    again = run(*command, "--class-names", names)
    assert again.code == 0 and "is already complete" in again.err, again.err


def test_train_teacher_records_folders_and_names(run: Run, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    done = run(
        "train-teacher",
        "--dataset",
        folder,
        "--image-size",
        32,
        "--model",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert done.code == 0, done.err
    note = read_note(out)
    assert json.loads(note["class_folders"]) == list(NAMES)
    assert json.loads(note["class_names"])[2] == "class1"


@pytest.mark.parametrize("kind", ["class_folders", "class_names"])
def test_weights_that_say_their_order(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    dataset = load_dataset(Images(dataset=folder, image_size=32))
    theirs = ["class2", "Zebra", "class10", "apple", "class20", "class1"]
    note = {**dataset.network_input.note, "fingerprint": "of other images"}
    lists = {"class_folders": json.dumps(["another"] * 6)} if kind == "class_names" else {}
    weights = saved(
        tmp_path / "w.safetensors",
        reordered(own, NAMES, theirs),
        **note,
        **lists,
        **{kind: json.dumps(theirs)},
    )
    done = run(*words(folder, weights, tmp_path / "s.zarr"))
    assert done.code == 0, done.err
    (line,) = lines_with(done.err, "the teacher's outputs are ")
    assert "class2, Zebra, class10, apple, …" in line and str(weights) in line
    assert read_manifest(tmp_path / "s.zarr")["teacher"]["accuracy"] == 1
    again = saved(tmp_path / "same.safetensors", own, **note, **{kind: json.dumps(NAMES)})
    done = run(*words(folder, again, tmp_path / "same.zarr"))
    assert not lines_with(done.err, "the teacher's outputs")
    assert "outputs" not in read_manifest(tmp_path / "same.zarr")["teacher"]


def test_weights_of_other_classes_are_refused_by_name(
    run: Run, fails: Fails, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    dataset = load_dataset(Images(dataset=folder, image_size=32))
    note = {**dataset.network_input.note, "fingerprint": "of other images"}
    theirs = [*NAMES[:-1], "class99"]
    weights = saved(tmp_path / "w.safetensors", own, **note, class_folders=json.dumps(theirs))
    refusal = fails(*words(folder, weights, tmp_path / "s.zarr"))
    assert refusal.code == "teacher-classes-differ" and "'class99'" in refusal
    assert "--teacher-classes FILE" in refusal and not (tmp_path / "s.zarr").exists()
    said = words(folder, weights, tmp_path / "s.zarr", "--teacher-classes", "sorted")
    assert run(*said).code == 0  # the user knows better
    for damaged in ("{", '{"a": 1}', "[1, 2]"):
        weights = saved(tmp_path / "damaged.safetensors", own, **note, class_names=damaged)
        refusal = fails(*words(folder, weights, tmp_path / "d.zarr"))
        assert refusal.code == "weights-metadata-damaged"
        assert str(weights) in refusal and "class_names" in refusal


def test_a_student_as_a_teacher_says_its_classes(
    run: Run, folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    store = precompute(
        settings(folder, saved(tmp_path / "w.safetensors", own), tmp_path / "s.zarr")
    ).path
    done = run(
        "distill",
        "--cache",
        store,
        "--method",
        "kd",
        "--student",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    )
    assert done.code == 0, done.err
    summary = tmp_path / "run" / "summary.json"
    about = json.loads(summary.read_text())
    about["class_names"] = about["class_names"][::-1]  # as of other images
    about["dataset"] = "imagefolder:elsewhere"
    summary.write_text(json.dumps(about))
    done = run(*words(folder, tmp_path / "run" / "last.safetensors", tmp_path / "t.zarr"))
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "t.zarr")["teacher"]["outputs"] == [5, 4, 3, 2, 1, 0]


# --- the parts -----------------------------------------------------------------------------------


def test_the_advantage_is_mcnemars_where_classes_have_as_many_images(
    rng: np.random.Generator,
) -> None:
    outputs = (1, 2, 3, 0)
    labels = torch.arange(4).repeat(50)
    predicted = torch.from_numpy(rng.integers(0, 5, 200))
    so = int((predicted == (labels + 1) % 4).sum())
    sorted_ = int((predicted == labels).sum())
    wanted = (so - sorted_) / math.sqrt(so + sorted_)
    assert advantage(predicted, labels, outputs) == pytest.approx(wanted)
    assert advantage((labels + 1) % 4, labels, outputs) == pytest.approx(math.sqrt(200))
    assert advantage(torch.full((200,), 4), labels, outputs) == 0
    # of 190 images of one class and 10 of another, one answer is right either way
    labels = torch.tensor([0] * 190 + [1] * 10)
    for said in (0, 1):
        assert abs(advantage(torch.full((200,), said), labels, (1, 0))) < 1e-9


def test_a_choice_is_made_on_few_images_evenly() -> None:
    labels = torch.arange(2000) % 8
    split = Split(torch.arange(2000).reshape(-1, 1, 1, 1), labels)
    some = differing(split, [(0, 2, 1, 3, 4, 5, 6, 7)])
    assert torch.bincount(some.labels).tolist() == [0, 128, 128]
    few = differing(Split(split.images[:40], labels[:40]), [(1, 0, 2, 3, 4, 5, 6, 7)])
    assert torch.bincount(few.labels).tolist() == [5, 5]
    many = Split(torch.zeros(3000, 1, 1, 1), torch.arange(3000) % 1000)
    apart = differing(many, [(999, *range(999)), tuple(range(1000))])
    assert 200 <= len(apart) <= 256 and int(apart.labels.max()) > 900
    assert apart.labels.unique().numel() == len(apart)


@pytest.mark.parametrize("outputs", [[0], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [], "no", [0.5]])
def test_orders_of_a_manifest_are_checked(store: Path, outputs: Any) -> None:
    manifest: Any = dict(read_manifest(store))
    assert manifest_fault(manifest) is None
    manifest["teacher"] = {**manifest["teacher"], "outputs": outputs}
    assert "teacher.outputs" in (manifest_fault(manifest) or "")
    count = len(manifest["class_names"])
    manifest["teacher"]["outputs"] = [*range(1, count), 0]
    assert manifest_fault(manifest) is None


@pytest.mark.slow
def test_ranks_take_the_order_of_the_first(
    folder: str, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weights = saved(tmp_path / "w.safetensors", reordered(own, NAMES, natural(NAMES)))
    given = [str(word) for word in words(folder, weights, tmp_path / "two.zarr")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "richkd", *given],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("natural order") == done.stderr.count("CNN teacher on 48") == 1
    one = precompute(settings(folder, weights, tmp_path / "one.zarr"))
    two = open_cache(tmp_path / "two.zarr")
    assert two.manifest["teacher"]["outputs"] == one.manifest["teacher"]["outputs"]
    torch.testing.assert_close(
        two.read("train/teacher_logits").float(),
        one.read("train/teacher_logits"),
        rtol=1e-2,
        atol=1e-2,
    )


# --- tags of pretrained weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("resnet18.a1_in1k", "resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18"),
        ("vgg13.tv_in1k", "timm/vgg13"),
        ("test_resnet.r160_in1k", "test_resnet"),
    ],
)
def test_a_tag_without_weights_is_refused_wherever_a_network_is_trained(
    fails: Fails,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    plain: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = ("--dataset", "shapes", "--limit", 32, "--device", "cpu")
    (tmp_path / "r.toml").write_text(
        f'[precompute]\ndataset = "shapes"\n[distill]\nstudent = "{name}"\n'
    )
    for command in (
        ("train-teacher", *shapes, "--model", name),
        ("distill", "--cache", store, "--student", name),
        ("sweep", "--cache", store, "--students", f"resnet8,{name}"),
        ("run", "r.toml"),
    ):
        line = fails(*command)
        assert line.code == "model-names-weights" and repr(name) in line
        assert f" {plain} " in line
    check_trainable(name, "w.safetensors")
    check_trainable(plain)

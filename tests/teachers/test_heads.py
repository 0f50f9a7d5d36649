"""Heads for the dataset's classes: probes against plain fits in float64, and matching rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from forked import interrupted
from helpers import FOLDERS, changed, published, refuses, stage_one_of, tree, write_photos
from safetensors.torch import load_file, save_file
from torch import Tensor

from richkd.config.settings import Precompute
from richkd.core.progress import Report
from richkd.data.datasets import Dataset, Split
from richkd.models import create_model
from richkd.models.weights import save_tensors
from richkd.store.reader import TeacherCache
from richkd.teachers import find
from richkd.teachers.heads import FOLDS, fit
from richkd.teachers.matching import check_head, imagenet_classes, match_rows, own_rows
from richkd.teachers.pretrained import configuration
from richkd.tools.verify import raise_faults, repair_store, verify_store

Run = Callable[..., Any]
Fails = Callable[..., Any]
QUIET = Report(quiet=True)
SMALL = {"num_classes": 1000, "input_size": [3, 48, 48]}


def fitted(x: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """A multinomial logistic regression on standardised features, by Newton's method in f64.

    Returns the weights and biases [D,C], [C] on these features.
    """
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    head = torch.zeros(x.shape[1] * classes, dtype=torch.float64)

    def loss(flat: Tensor) -> Tensor:
        logits = x @ flat.view(-1, classes)
        return F.cross_entropy(logits, labels) + penalty / 2 * flat.square().sum()

    for _ in range(30):
        head = head.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(head), head)[0]
        curvature: Any = torch.autograd.functional.hessian(loss, head.detach())
        head = head - torch.linalg.solve(curvature, gradient)
    weights = head.detach().view(-1, classes)
    return weights[:-1], weights[-1]


def drawn(features: Tensor, labels: Tensor, names: tuple[str, ...]) -> Dataset:
    """A dataset of as many images as there are features."""
    images = torch.zeros(len(features), 8, 8, 3, dtype=torch.uint8)
    split = Split(images, labels)
    return Dataset("drawn", names, split, split, (0.5,) * 3, (0.5,) * 3, 8)


def test_a_probe_is_fitted_out_of_fold(rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.integers(0, 3, 70))
    x = torch.from_numpy(rng.normal(size=(70, 6))) * 3 + 5
    x[:, 0] += 4 * labels
    dataset = drawn(x, labels, ("a", "b", "c"))
    probe = fit(x.float(), dataset, "some", QUIET)
    assert sorted(torch.bincount(probe.folds.long()).tolist()) == [14] * FOLDS
    mean, std = x.mean(0), x.std(0)
    index = torch.randperm(70)
    found, others = probe.logits(x[index].float(), index), probe.logits(x[:9].float(), None)
    heads = []
    for fold in range(FOLDS):
        seen = probe.folds != fold
        weights, bias = fitted(((x - mean) / std)[seen], labels[seen], 3, probe.penalty)
        heads.append((weights, bias))
    expected = torch.stack([((x - mean) / std) @ weights + bias for weights, bias in heads])
    own = expected[probe.folds.long(), torch.arange(70)]
    torch.testing.assert_close(found.double(), own[index], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(others.double(), expected.mean(0)[:9], rtol=1e-2, atol=1e-2)
    assert probe.accuracy == pytest.approx((own.argmax(1) == labels).double().mean().item())
    # a row does not depend on the others of its batch
    alone = torch.cat([probe.logits(x[[i]].float(), torch.tensor([i])) for i in index.tolist()])
    torch.testing.assert_close(alone, found)


def test_out_of_fold_accuracy_on_noise_is_chance(rng: np.random.Generator) -> None:
    count, classes = 400, 4
    x = torch.from_numpy(rng.normal(size=(count, 300))).float()
    labels = torch.from_numpy(rng.integers(0, classes, count))
    probe = fit(x, drawn(x, labels, ("a", "b", "c", "d")), "noise", QUIET)
    spread = (0.25 * 0.75 / count) ** 0.5
    assert abs(probe.accuracy - 0.25) < 4.5 * spread
    seen = (probe.logits(x, None).argmax(1) == labels).double().mean().item()
    assert seen > 0.25 + 10 * spread  # which heads that saw the images do not show


def photos(tmp_path: Path, rng: np.random.Generator, train: int = 4, test: int = 3) -> str:
    return f"imagefolder:{write_photos(tmp_path / 'photos', FOLDERS, rng, train=train, test=test)}"


def check_probe(cache: TeacherCache) -> None:
    """Check every row against the cache's heads and features in f64."""
    weights, folds = cache.read("probe/weights").double(), cache.read("probe/folds").long()
    assert cache.manifest["teacher"]["head"]["folds"] == len(weights) == FOLDS
    for v in range(cache.num_views):
        logits, features = (
            cache.read(f"train/teacher_{name}", v) for name in ("logits", "features")
        )
        one = torch.ones(len(folds), 1, dtype=torch.float64)
        x = torch.cat([features.double(), one], 1)
        expected = torch.einsum("nf,nfc->nc", x, weights[folds])
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    x = cache.read("test/teacher_features").double()
    expected = x @ weights.mean(0)[:-1] + weights.mean(0)[-1]
    torch.testing.assert_close(
        cache.read("test/teacher_logits").double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_teacher_of_other_classes_by_a_probe_interrupted_and_repaired(
    hub: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, name = photos(tmp_path, rng), "hf-hub:me/thousand"
    published(hub, name, "test_resnet", **SMALL)
    settings: dict[str, Any] = {"teacher_head": "probe", "dtype": "float32", "block": 16}
    whole = tmp_path / "whole.zarr"
    cache = stage_one_of(whole, dataset, name, **settings)
    check_probe(cache)
    head = cache.manifest["teacher"]["head"]
    assert head["kind"] == "probe" and head["accuracy"] > 0.25 > 1 / 8
    assert cache.manifest["teacher"]["num_features"] == 96
    raise_faults(whole, verify_store(whole, name, QUIET))
    expected = tree(whole)

    cut = tmp_path / "cut.zarr"
    with (
        interrupted("richkd.store.writer:StoreWriter.write", 4),
        pytest.raises(KeyboardInterrupt),
    ):
        stage_one_of(cut, dataset, name, **settings)
    assert (cut / "probe/weights/c/0/0/0").is_file()
    refit = find.fit
    monkeypatch.setattr(find, "fit", None)  # the heads of the cache are kept
    stage_one_of(cut, dataset, name, **settings)
    assert set(changed(expected, tree(cut))) <= {"zarr.json"}  # its recipe names `out`

    for lost in ("train/teacher_logits/c/1/0/0", "test/teacher_features/c/0/0"):
        (whole / lost).write_bytes(b"damaged")
    repair_store(whole, QUIET)
    assert tree(whole) == expected
    monkeypatch.setattr(find, "fit", refit)
    (whole / "probe/weights/c/0/0/0").unlink()
    (whole / "train/labels/c/0").unlink()
    repair_store(whole, QUIET)
    assert tree(whole) == expected


@pytest.mark.slow
def test_a_teacher_from_a_file_has_its_own_number_of_classes(
    hub: Path, tmp_path: Path, rng: np.random.Generator, fails: Fails
) -> None:
    dataset = photos(tmp_path, rng)
    # its position embeddings are those of one size
    model = timm.create_model("test_vit", num_classes=13, img_size=32)
    weights = tmp_path / "w.safetensors"
    save_tensors(weights, model.state_dict())
    given: dict[str, Any] = {"teacher_weights": str(weights), "dtype": "float32"}
    cache = stage_one_of(tmp_path / "p.zarr", dataset, "test_vit", teacher_head="probe", **given)
    assert cache.manifest["teacher"]["input"]["size"] == 32
    check_probe(cache)
    raise_faults(cache.path, verify_store(cache.path, str(weights), QUIET))
    with refuses("weights-do-not-fit", weights, "13 outputs", "8 classes", "probe", "--init"):
        stage_one_of(tmp_path / "own.zarr", dataset, "test_vit", **given)
    with refuses("teacher-rows-unknown", "13", "probe"):
        stage_one_of(tmp_path / "rows.zarr", dataset, "test_vit", teacher_head="rows", **given)
    thousand = tmp_path / "thousand.safetensors"
    save_tensors(thousand, published(hub, "hf-hub:me/k", "test_resnet", **SMALL).state_dict())
    given["teacher_weights"] = str(thousand)
    cache = stage_one_of(
        tmp_path / "r.zarr", dataset, "test_resnet", teacher_head="rows", teacher_size=48, **given
    )
    assert cache.manifest["teacher"]["outputs"] == [FOLDERS[each] for each in sorted(FOLDERS)]
    raise_faults(cache.path, verify_store(cache.path, str(thousand), QUIET))
    with refuses("weights-do-not-fit", "1,000 outputs", "--teacher-head rows"):
        stage_one_of(tmp_path / "own.zarr", dataset, "test_resnet", **given)


@pytest.mark.slow
def test_images_in_an_array_and_a_resumed_addition(hub: Path, tmp_path: Path) -> None:
    from richkd.precompute import add_teacher

    for name in ("hf-hub:me/one", "hf-hub:me/two"):
        published(hub, name, "test_resnet", **SMALL)
    out = tmp_path / "s.zarr"
    common: dict[str, Any] = {"teacher_head": "probe", "dtype": "float32", "limit": 40}
    check_probe(stage_one_of(out, "shapes", "hf-hub:me/one", **common))
    before = tree(out)
    given = {"teacher": "hf-hub:me/two", "teacher_head": "probe", "device": "cpu"}
    with (
        interrupted("richkd.store.writer:StoreWriter.write", 2),
        pytest.raises(KeyboardInterrupt),
    ):
        add_teacher(out, given, name="two")
    added = add_teacher(out, given, name="two")
    check_probe(added)
    after = tree(out)
    assert all(after[file] == content for file, content in before.items())
    for lost in ("probe/weights/c/0/0/0", "train/teacher_logits/c/1/0/0"):
        (out / "teachers/two" / lost).unlink()
    repair_store(out, QUIET)
    assert tree(out) == after
    raise_faults(out, verify_store(out, "two=hf-hub:me/two", QUIET))
    with refuses("teacher-outputs-differ", "1,000", "probe"):
        add_teacher(out, {**given, "teacher_head": "own"}, name="three")


@pytest.mark.slow
def test_what_is_logged_before_anything_long(
    hub: Path, tmp_path: Path, run: Run, rng: np.random.Generator
) -> None:
    published(hub, "hf-hub:me/k", "test_resnet", **SMALL)
    weights = next(hub.rglob("model.safetensors"))
    tensors = load_file(weights)
    tensors["fc.weight"].zero_()  # it always says the same class
    save_file(tensors, weights)
    dataset = photos(tmp_path, rng, train=5, test=12)
    common = f"precompute --dataset {dataset} --image-size 32 --clip none --views 1 --device cpu"
    for head, *expected in (
        (
            "probe",
            "a probe on 96 features of hf-hub:me/k",
            "40 training images",
            "(chance 12.50 %)",
        ),
        ("rows", "Goldfish → n01443537 goldfish", "imagenet-1k", "compare --teacher-head probe"),
    ):
        out = tmp_path / f"{head}.zarr"
        words = [*common.split(), "--teacher", "hf-hub:me/k", "--teacher-head", head, "--out", out]
        done = run(*words)
        assert done.code == 0, done.err
        before, _, _ = done.err.partition(f"{out}: ")
        assert "CNN teacher on 96 of the test images" in before
        assert all(text in before for text in expected), before
    config = next(hub.rglob("config.json"))
    for broken in ('{"architecture": "test_resnet", "num_classes": "many"}', "[]", "{"):
        config.write_text(broken)
        configuration.cache_clear()
        refused = run(*words, "--overwrite")
        assert refused.code == 2 and "[teacher-cannot-be-loaded]" in refused.err, refused.err


# --- rows ----------------------------------------------------------------------------------------


def named(*folders: str) -> Dataset:
    labels = torch.arange(len(folders))
    return drawn(torch.zeros(len(folders), 1), labels, folders)


def test_classes_match_one_row_each() -> None:
    known = imagenet_classes(1000)
    assert known is not None and imagenet_classes(999) is None
    assert match_rows(named(*FOLDERS), known) == tuple(FOLDERS.values())
    assert match_rows(named("n02012849", "n03126707"), known) == (134, 517)  # both are cranes
    for folders, code, *values in (
        (("hen", "goldfich"), "teacher-rows-unmatched", "'goldfich'", "goldfish", "probe"),
        (("hen", "crane"), "teacher-rows-ambiguous", "'crane'", "n02012849", "n03126707"),
        (("cock", "hen", "rooster"), "teacher-rows-unmatched", "'rooster'"),
        (("hen", "n01514859"), "teacher-rows-twice", "'hen'", "'n01514859'"),
    ):
        with refuses(code, *values):
            match_rows(named(*folders), known)
    for count in (11221, 11821, 21841, 21842, 21843):
        larger = imagenet_classes(count)
        assert larger is not None and len(larger.ids) == count
        (row,) = match_rows(named("n01440764"), larger)
        assert larger.ids[row] == "n01440764" and "tench" in larger.names[row]


@pytest.mark.parametrize(("theirs", "kind"), [([*"cadbe"], "class_folders"), (None, "class_names")])
def test_the_classes_that_a_file_records_come_first(
    tmp_path: Path, theirs: list[str] | None, kind: str
) -> None:
    known = imagenet_classes(1000)
    assert known is not None
    theirs = theirs or [*known.ids][::-1]
    weights = tmp_path / "w.safetensors"
    state = timm.create_model("test_resnet", num_classes=len(theirs)).state_dict()
    save_tensors(weights, state, {"fingerprint": "f", kind: json.dumps(theirs)})
    settings = Precompute(
        dataset="shapes",
        teacher="test_resnet",
        teacher_weights=str(weights),
        teacher_head="rows",
        clip="none",
    )
    dataset = named(theirs[-1], *theirs[:2])
    check_head(settings, dataset)
    assert own_rows(settings, len(theirs), dataset, QUIET) == (len(theirs) - 1, 0, 1)
    with refuses("teacher-rows-unmatched", "'goldfich'", f"recorded in {weights}"):
        own_rows(settings, len(theirs), named("goldfich"), QUIET)


def test_the_classes_that_a_configuration_names_give_the_order(
    hub: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    dataset, theirs = photos(tmp_path, rng, train=1, test=1), [*FOLDERS][::-1]
    small: dict[str, Any] = {"num_classes": 8, "input_size": [3, 32, 32]}
    published(hub, "hf-hub:me/perm", "test_resnet", label_names=theirs, **small)
    published(hub, "hf-hub:me/other", "test_resnet", label_names=[*"abcdefgh"], **small)
    cache = stage_one_of(tmp_path / "s.zarr", dataset, "hf-hub:me/perm", views=1)
    assert cache.manifest["teacher"]["outputs"] == [theirs.index(each) for each in sorted(theirs)]
    next((hub / "models--me--other").rglob("model.safetensors")).unlink()  # it is not needed
    with refuses("teacher-classes-differ", "hf-hub:me/other", "a, b, c, d", "--teacher-classes"):
        stage_one_of(tmp_path / "o.zarr", dataset, "hf-hub:me/other")


def test_wrong_requests(hub: Path, tmp_path: Path, fails: Fails, rng: np.random.Generator) -> None:
    published(hub, "hf-hub:me/k", "test_resnet", **SMALL)
    dataset = photos(tmp_path, rng, train=1, test=1)
    few = tmp_path / "few"
    for split in ("train", "test"):
        for folder in ("hen", "crane"):
            shutil.copytree(tmp_path / "photos" / split / "hen", few / split / folder)
    common = ["precompute", "--image-size", "32", "--clip", "none", "--device", "cpu", "--teacher"]
    absent = "timm/resnet50.a1_in1k"  # nothing is downloaded before these checks
    for given, images, code, *values in (
        (f"{absent} --teacher-head probe", few, "probe-too-few-samples", 5, 2, "own"),
        (f"{absent} --teacher-head rows", few, "teacher-rows-ambiguous", "'crane'"),
        ("resnet8 --teacher-head probe", few, "teacher-head-not-needed", "resnet8"),
        (
            "hf-hub:me/k --teacher-head rows --teacher-classes natural",
            few,
            "teacher-classes-not-needed",
            "--teacher-classes",
        ),
        ("hf-hub:me/k --teacher-head prob", few, "unknown-name", "prob", "probe"),
    ):
        out = tmp_path / "s.zarr"
        line = fails(*common, *given.split(), "--dataset", f"imagefolder:{images}", "--out", out)
        assert line.code == code, line
        assert all(str(value) in line for value in values), line
        assert not out.exists()
    default = [*common[:-1], *f"--teacher-head rows --dataset imagefolder:{few}".split()]
    line = fails(*default)
    assert line.code == "teacher-head-not-needed" and "train resnet32x4" in line
    weights = tmp_path / "w.safetensors"
    save_tensors(weights, create_model("resnet32x4", 1000).state_dict())
    assert fails(*default, "--teacher-weights", weights).code == "teacher-rows-ambiguous"
    assert dataset

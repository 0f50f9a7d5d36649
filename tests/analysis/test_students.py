"""`richkd evaluate`: students on clean, corrupted and other images, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_hub
import numpy as np
import optional
import pytest
import scipy.stats
import torch
from helpers import Refusal, refuses, tree, write_teacher
from PIL import Image
from safetensors.torch import load_file

import richkd
from richkd.analysis.corruptions import NAMES, MadeCorruptions, PublishedCorruptions, corrupt
from richkd.analysis.students import find_corruptions, read_evaluation, shift_classes
from richkd.config.settings import Distill
from richkd.core.seeds import derive_seed
from richkd.data.datasets import ImageFiles, Split
from richkd.data.decoding import Decoding
from richkd.data.sources import FolderFiles, Paths
from richkd.distill import distill

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two students of one store; the second chose its α on a fifth of the test images."""
    folder = tmp_path_factory.mktemp("students")
    paths = []
    for student, alpha in (("resnet8", None), ("ShuffleV2", "auto")):
        settings = Distill(
            cache=str(store),
            student=student,
            method="richkd",
            epochs=2,
            batch_size=16,
            lr=0.02,
            device="cpu",
            alpha=alpha,
            out=str(folder / student),
        )
        distill(settings)
        paths.append(folder / student)
    return paths


def logits_of(run: Path, images: torch.Tensor) -> np.ndarray:
    """By hand: weights from the file, pixels normalised by the summary."""
    summary = json.loads((run / "summary.json").read_text())
    model = richkd.create_model(summary["student"], summary["num_classes"])
    model.load_state_dict(load_file(run / "last.safetensors"))
    pixels = images.permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(summary[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model.eval()((pixels - mean) / std).double().numpy()


def test_scores_are_those_of_the_weights(run: Run, runs: list[Path], store: Path) -> None:
    done = run("evaluate", runs[0], *CPU, "--json")
    assert done.code == 0, done.err
    part = done.json["runs"][0]
    cache = richkd.open_cache(store)
    labels = cache.read("test/labels").numpy()
    logits = logits_of(runs[0], cache.read("test/images"))
    assert part["samples"] == len(labels)
    assert part["top1"] == pytest.approx(np.mean(logits.argmax(1) == labels))
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert part["top1"] == summary["top1_last"] and part["top5"] == summary["top5_last"]
    p = scipy.special.softmax(logits, axis=1)
    assert part["nll"] == pytest.approx(-np.log(p[np.arange(len(labels)), labels]).mean(), rel=1e-4)
    kept = json.loads((runs[0] / "evaluation.json").read_text())
    assert {**kept, "comparison": {}} == part
    confident = p.max(1) >= 0.8
    wrong = logits.argmax(1) != labels
    assert part["confident_wrong"] == pytest.approx(np.mean(confident & wrong))
    brier = np.mean(((p - np.eye(p.shape[1])[labels]) ** 2).sum(1))
    assert part["brier"] == pytest.approx(brier, rel=1e-4)
    best = run("evaluate", runs[0], "--weights", "best", *CPU, "--json")
    assert best.json["runs"][0]["top1"] == pytest.approx(summary["top1_best"])
    assert json.loads((runs[0] / "evaluation.json").read_text()) == kept
    assert (runs[0] / "evaluation-best.json").is_file()
    assert read_evaluation(runs[0]) is not None
    page = (runs[0] / "evaluation.html").read_text()
    assert 'id="confusions-1"' in page and 'id="corruptions"' not in page


def test_runs_are_compared_on_the_same_images(
    run: Run, runs: list[Path], store: Path, tmp_path: Path
) -> None:
    """Images that the second run held out for α count for neither; the interval is scipy's."""
    done = run("evaluate", *runs, "--out", tmp_path, *CPU, "--json")
    assert done.code == 0, done.err
    first, second = done.json["runs"]
    cache = richkd.open_cache(store)
    held_out = 40 // 5
    assert first["samples"] == second["samples"] == 40 - held_out
    order = torch.randperm(40, generator=torch.Generator().manual_seed(derive_seed(0, 40, 4)))
    tested = order[held_out:].sort().values
    images, labels = cache.read("test/images")[tested], cache.read("test/labels")[tested].numpy()
    a, b = (logits_of(path, images).argmax(1) == labels for path in runs)
    assert second["top1"] == json.loads((runs[1] / "summary.json").read_text())["top1_last"]
    interval = scipy.stats.ttest_rel(b * 1.0, a * 1.0).confidence_interval(0.95)
    found = second["comparison"]["top1"]
    assert found["n"] == len(labels) and first["comparison"] == {}
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert (tmp_path / "evaluation.html").is_file()
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["runs"] == done.json["runs"]
    shown = run("evaluate", *runs, f"{runs[0]}/", "--out", tmp_path, *CPU)
    assert max(map(len, shown.out.splitlines()[:-1])) <= 80


# --- corruptions ---------------------------------------------------------------------------------


def published(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    """CIFAR-100-C's layout: severity s darkens, so that a row tells where it came from."""
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    for place, name in enumerate((*NAMES, "saturate")):
        severities = [images.numpy() // (1 + severity) + place for severity in range(1, 6)]
        np.save(folder / f"{name}.npy", np.concatenate(severities).astype(np.uint8))
    return folder


def test_the_published_files(run: Run, runs: list[Path], store: Path, tmp_path: Path) -> None:
    cache = richkd.open_cache(store)
    images, labels = cache.read("test/images"), cache.read("test/labels")
    folder = published(tmp_path / "CIFAR-100-C", images, labels)
    done = run(
        "evaluate",
        runs[0],
        "--corruption-files",
        folder,
        "--limit",
        30,
        *CPU,
        "--out",
        tmp_path,
        "--json",
    )
    assert done.code == 0, done.err
    found = done.json["runs"][0]["corruptions"]
    assert str(folder) in found["source"] and list(found["top1"]) == list(NAMES)
    errors = []
    for name in NAMES:
        array = np.load(folder / f"{name}.npy")
        for severity in range(5):
            part = torch.from_numpy(array[40 * severity : 40 * severity + 30])
            right = np.mean(logits_of(runs[0], part).argmax(1) == labels[:30].numpy())
            assert found["top1"][name][severity] == pytest.approx(right), (name, severity)
            errors.append(1 - right)
    assert found["mean_error"] == pytest.approx(np.mean(errors))
    assert done.json["runs"][0]["comparison"]["mce"] == pytest.approx(1)
    assert 'id="corruptions"' in (tmp_path / "evaluation.html").read_text()


@pytest.mark.slow
def test_published_files_are_found_beside_the_data(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = richkd.open_cache(store)
    test = Split(cache.read("test/images"), cache.read("test/labels"))
    published(tmp_path / "CIFAR-100-C", cache.read("test/images"), test.labels)
    for dataset, make, kind in (
        ("cifar100", True, PublishedCorruptions),
        ("cifar10", True, MadeCorruptions),
        ("cifar100", False, type(None)),
    ):
        monkeypatch.setitem(cache.manifest["dataset"], "name", dataset)  # type: ignore[misc]
        assert type(find_corruptions(test, cache, str(tmp_path), make, None, 0)) is kind


@pytest.mark.slow
def test_published_files_that_are_wrong(
    fails: Fails, runs: list[Path], store: Path, tmp_path: Path
) -> None:
    cache = richkd.open_cache(store)
    images, labels = cache.read("test/images"), cache.read("test/labels")
    folder = published(tmp_path / "c", images, labels)
    words = ["evaluate", runs[0], "--corruption-files", folder, *CPU]
    fog = folder / "fog.npy"
    before = fog.read_bytes()

    def refused(code: str, *values: object) -> None:
        line = fails(*words)
        assert line.code == code and str(fog) in line, line
        assert all(str(value) in line for value in values), line

    np.save(fog, np.zeros((199, 32, 32, 3), np.uint8))
    refused("corruption-file-mismatch", "199 rows", 200, 40)
    np.save(fog, np.zeros((200, 32, 32), np.uint8))
    refused("corruption-file-mismatch", "(200, 32, 32)", "(200, 32, 32, 3)")
    np.save(fog, np.zeros((200, 16, 48, 3), np.uint8))
    refused("corruption-file-mismatch", "(200, 16, 48, 3)")
    np.savez(tmp_path / "fog.npz", np.zeros(3))
    shutil.copy(tmp_path / "fog.npz", fog)
    refused("corruption-file-unreadable")
    np.save(fog, np.array([{"a": 1}] * 200, object), allow_pickle=True)
    refused("corruption-file-unreadable")
    fog.unlink()
    refused("corruption-file-missing")
    fog.write_bytes(before)
    np.save(folder / "labels.npy", np.tile(labels.numpy()[::-1], 5))
    line = fails(*words)
    assert line.code == "corruption-labels-differ" and str(folder / "labels.npy") in line
    line = fails(*words[:3], tmp_path / "nowhere", *words[4:])
    assert line.code == "corruption-file-missing"
    assert str(tmp_path / "nowhere" / "labels.npy") in line


@pytest.mark.slow
def test_made_corruptions_are_the_same_for_a_seed(store: Path) -> None:
    """By sample, whatever the batches, the workers, and the state of numpy's own stream."""
    images = richkd.open_cache(store).read("test/images")

    def cells(seed: int, tested: list[int]) -> dict[Any, torch.Tensor]:
        made = MadeCorruptions(images, seed)
        device = torch.device("cpu")
        return {
            (name, severity): torch.cat([batch for _, batch in batches])
            for name, severity, batches in made.cells(torch.tensor(tested), device)
        }

    np.random.seed(5)
    all_of_them, some = cells(0, list(range(40))), cells(0, [3, 17, 39])
    assert len(all_of_them) == 75
    assert all(torch.equal(some[cell], all_of_them[cell][[3, 17, 39]]) for cell in some)
    other = cells(1, [3, 17, 39])
    drawn = {
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "glass_blur",
        "motion_blur",
        "snow",
        "frost",
        "fog",
        "elastic_transform",
    }
    changed = {cell[0] for cell in some if not torch.equal(some[cell], other[cell])}
    assert changed == drawn
    for cell, batch in some.items():
        assert batch.shape == (3, 32, 32, 3) and batch.dtype == torch.uint8
        assert not torch.equal(batch, images[[3, 17, 39]]), cell
    noise = [
        (some["gaussian_noise", s].float() - images[[3, 17, 39]]).abs().mean() for s in range(1, 6)
    ]
    assert noise == sorted(noise)


def test_workers_make_the_same(store: Path) -> None:
    optional.require("imagecorruptions")
    images = richkd.open_cache(store).read("test/images")
    made = MadeCorruptions(images, 3, names=("glass_blur", "snow"), workers=2)
    for name, severity, batches in made.cells(torch.arange(6), torch.device("cpu")):
        got = torch.cat([batch for _, batch in batches])
        for sample in range(6):
            seed = derive_seed(3, NAMES.index(name), severity, sample)
            own = corrupt(images[sample].numpy(), name, severity, seed)
            assert np.array_equal(got[sample].numpy(), own)


@pytest.mark.slow
def test_two_students_under_corruptions(run: Run, runs: list[Path], tmp_path: Path) -> None:
    done = run("evaluate", *runs, "--corruptions", "--limit", 20, *CPU, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    first, second = (part["corruptions"] for part in done.json["runs"])
    compared = [part["comparison"] for part in done.json["runs"]]
    assert compared[0]["mce"] == pytest.approx(1) and "imagecorruptions" in first["source"]
    errors = [
        sum(1 - a for a in second["top1"][n]) / sum(1 - a for a in first["top1"][n]) for n in NAMES
    ]
    assert compared[1]["mce"] == pytest.approx(np.mean(errors))
    difference = compared[1]["corrupted_top1"]
    assert difference["n"] == 20
    expected = first["mean_error"] - second["mean_error"]
    assert difference["mean"] == pytest.approx(expected)
    assert difference["low"] <= expected <= difference["high"]
    # another evaluation on the same images leaves the corruptions where they are
    assert run("evaluate", *runs, "--limit", 20, *CPU, "--out", tmp_path).code == 0
    kept = json.loads((runs[0] / "evaluation.json").read_text())
    assert kept["corruptions"] == first
    assert run("evaluate", runs[0], "--limit", 4, *CPU, "--out", tmp_path).code == 0
    assert "corruptions" not in json.loads((runs[0] / "evaluation.json").read_text())
    shown = run("evaluate", runs[0], "--corruptions", "--limit", 5, *CPU, "--out", tmp_path)
    assert "relative" in shown.out and max(map(len, shown.out.splitlines()[:-1])) <= 80


def test_images_that_are_too_small_for_the_library() -> None:
    optional.require("imagecorruptions")
    with refuses("corruption-images-too-small", "28 pixels", 32, "--corruption-files"):
        MadeCorruptions(torch.zeros(3, 28, 28, 3, dtype=torch.uint8), 0)


def test_without_the_library(
    fails: Fails, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    line = fails("evaluate", runs[0], "--corruptions", *CPU)
    assert line.code == "extra-missing"
    assert "'richkd[corruptions]'" in line and "--corruption-files" in line


# --- shift ---------------------------------------------------------------------------------------


def test_other_images_of_some_of_the_classes(
    run: Run, fails: Fails, runs: list[Path], store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Only the classes that there are can be guessed."""
    cache = richkd.open_cache(store)
    names = cache.manifest["class_names"]
    kept = [2, 5, 11]
    labels = []
    for label in kept:
        folder = tmp_path / "shift" / names[label].replace(" ", "_").upper()
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            labels.append(label)
    done = run(
        "evaluate", runs[0], "--shift", tmp_path / "shift", *CPU, "--json", "--out", tmp_path
    )
    assert done.code == 0, done.err
    found = done.json["runs"][0]["shift"]
    assert (found["samples"], found["classes"]) == (12, 3)
    assert found["top5"] == 1.0  # of three
    right = 0
    for label in kept:
        for number in range(4):
            name = names[label].replace(" ", "_").upper()
            with Image.open(tmp_path / "shift" / name / f"{number}.png") as image:
                box = image.crop((0, 5, 40, 45)).resize((32, 32), Image.Resampling.BILINEAR)
            logits = logits_of(runs[0], torch.from_numpy(np.array(box))[None])
            right += kept[logits[0, kept].argmax()] == label
    assert abs(found["top1"] * 12 - right) <= 1  # torchvision's resizing rounds otherwise
    assert 'id="shift"' in (tmp_path / "evaluation.html").read_text()
    clean_labels = cache.read("test/labels").numpy()
    of_kept = np.isin(clean_labels, kept)
    clean = logits_of(runs[0], cache.read("test/images"))[of_kept][:, kept].argmax(1)
    expected = np.mean(np.array(kept)[clean] == clean_labels[of_kept])
    assert found["clean_top1"] == pytest.approx(expected)

    (tmp_path / "shift" / "zeppelin").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "shift" / "zeppelin" / "1.png")
    line = fails("evaluate", runs[0], "--shift", tmp_path / "shift", *CPU)
    assert line.code == "shift-class-unknown" and str(tmp_path / "shift" / "zeppelin") in line
    line = fails("evaluate", runs[0], "--shift", tmp_path / "no", *CPU)
    assert line.code == "shift-folder-missing" and str(tmp_path / "no") in line


@pytest.mark.slow
def test_the_test_images_themselves_are_no_shift(
    run: Run, runs: list[Path], store: Path, tmp_path: Path
) -> None:
    """Written as files, in folders by number, they score as the cache's arrays do."""
    cache = richkd.open_cache(store)
    labels = cache.read("test/labels").tolist()
    for label in range(cache.num_classes):
        (tmp_path / "shift" / str(label)).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(cache.read("test/images"), labels, strict=True)):
        Image.fromarray(pixels.numpy()).save(tmp_path / "shift" / str(label) / f"{number}.png")
    done = run("evaluate", *runs, "--shift", tmp_path / "shift", *CPU, "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    alone = run("evaluate", runs[0], *CPU, "--json", "--out", tmp_path).json["runs"][0]
    part = done.json["runs"][0]
    assert part["shift"]["samples"] == len(labels)
    for score in ("top1", "nll", "ece", "brier"):
        assert part["shift"][score] == pytest.approx(alone[score], abs=1e-5)
    assert part["shift"]["clean_top1"] == pytest.approx(part["top1"])
    assert done.json["runs"][1]["comparison"]["shifted_top1"]["n"] == len(labels)


def test_the_test_folder_is_no_shift_where_classes_share_a_name(
    run: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Each of its folders belongs to the class that was read from it."""
    folders = ["10", "2", "cat", "Cat"]
    for split in ("train", "val"):
        for name in folders:
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / name / f"{number}.png")
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 4)
    done = run(
        "precompute",
        "--dataset",
        f"imagefolder:{tmp_path / 'd'}",
        "--clip",
        "none",
        "--image-size",
        32,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        weights,
        "--views",
        1,
        "--out",
        tmp_path / "d.zarr",
    )
    assert done.code == 0, done.err
    done = run(
        "distill",
        "--cache",
        tmp_path / "d.zarr",
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        *CPU,
        "--out",
        tmp_path / "r",
    )
    assert done.code == 0, done.err
    (tmp_path / "d" / "val" / "@eaDir").mkdir()
    evaluate = (
        "evaluate",
        tmp_path / "r",
        *CPU,
        "--out",
        tmp_path,
        "--shift",
        tmp_path / "d" / "val",
    )
    assert "val/@eaDir" in run(*evaluate).err
    done = run(*evaluate, "--json")
    assert done.code == 0, done.err
    part = done.json["runs"][0]
    assert part["shift"]["samples"] == 16 and part["shift"]["classes"] == 4
    assert part["shift"]["top1"] == part["top1"] == part["shift"]["clean_top1"]


# The classes of a cache, their folders, a folder of other images, and its class or the refusal.
SHIFTS = [
    (("crane", "crane"), ("n02012849", "n03126707"), "n03126707", 1),
    (("crane", "crane"), ("n02012849", "n03126707"), "crane", "0 (n02012849) and 1 (n03126707)"),
    (("Katze", "Hund"), ("cat", "dog"), "dog", 1),
    (("Katze", "Hund"), ("cat", "dog"), "hund", 1),
    (("Katze", "Hund"), ("cat", "dog"), "DOG", 1),
    (("dog", "cat"), ("cat", "dog"), "dog", 1),  # the folder counts before the name
    (("tench", "goldfish"), ("n01440764", "n01443537"), "goldfish", 1),
    (("tench", "goldfish"), ("n01440764", "n01443537"), "n01443537", 1),
    (("Cat", "cat"), ("001.Cat", "002.cat"), "002.cat", 1),
    (("Cat", "cat"), ("001.Cat", "002.cat"), "cat", "0 (001.Cat) and 1 (002.cat)"),
    (("a", "b"), None, "B", 1),
    (("a", "a"), None, "a", "0 (a) and 1 (a)"),
    (("a", "b"), None, "c", "choose from a, b"),
    (("one", "two"), ("1", "0"), "0", 1),
]


@pytest.mark.parametrize(("names", "folders", "found", "wanted"), SHIFTS)
def test_folders_are_matched_by_folder_then_by_name(
    names: tuple[str, ...], folders: tuple[str, ...] | None, found: str, wanted: int | str
) -> None:
    store: Any = SimpleNamespace(
        manifest={"class_names": [*names], "dataset": {}}, location="s.zarr"
    )
    images: Any = torch.zeros(len(names), 3, 32, 32)
    if folders is not None:
        paths = Paths.of(f"{name}/0.png" for name in folders)
        sizes, traits = np.ones((len(folders), 2), np.int64), np.zeros(len(folders), np.uint8)
        images = ImageFiles(FolderFiles(Path(), paths), sizes, traits, 32, Decoding())
    test = Split(images, torch.arange(len(names)))
    if isinstance(wanted, int):
        assert shift_classes([found], Path("x"), store, test) == [wanted]
    else:
        code = "shift-class-unknown" if found == "c" else "shift-class-ambiguous"
        with refuses(code, Path("x") / found, wanted, "s.zarr"):
            shift_classes([found], Path("x"), store, test)


@pytest.mark.parametrize("kind", ["s3", "hf"])
def test_a_run_is_evaluated_from_a_cache_elsewhere(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "home"))
    import fake_s3

    with fake_s3.serving(monkeypatch) if kind == "s3" else fake_hub.serving() as server:
        if kind == "s3":
            url = f"s3://{fake_s3.BUCKET}/evaluated/shapes.zarr"
            obstore, cloud = optional.load("obstore"), optional.load("obstore.store")
            remote = cloud.from_url(url, client_options={"allow_http": True})
            for name, content in tree(store).items():
                obstore.put(remote, name, content)
        else:
            monkeypatch.setenv("HF_ENDPOINT", server.url)
            url = "hf://datasets/me/teachers"
            server.add("dataset", "me/teachers", tree(store))
        folder = tmp_path / "run"
        words = ["--student", "resnet8", "--method", "ce", "--epochs", 1, "--device", "cpu"]
        assert run("distill", "--cache", url, *words, "--out", folder).code == 0
        done = run("evaluate", folder, "--device", "cpu", "--json")
        assert done.code == 0, done.err
        summary = json.loads((folder / "summary.json").read_text())
        assert done.json["runs"][0]["top1"] == summary["top1_last"]


# --- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated(
    fails: Fails,
    run: Run,
    runs: list[Path],
    store: Path,
    tmp_path: Path,
    make_store: Callable[..., Path],
) -> None:
    def refused(code: str, *words: object, says: tuple[object, ...] = ()) -> None:
        line = fails("evaluate", *words)
        assert line.code == code, line
        assert all(str(value) in line for value in says), line

    refused("run-missing", tmp_path, says=(tmp_path,))
    refused("value-out-of-range", runs[0], "--threshold", 0, says=("threshold = 0.0",))
    refused("value-out-of-range", runs[0], "--limit", 0, says=("limit = 0",))
    refused("value-out-of-range", runs[0], "--corruptions", "--seed", -1, says=("seed = -1",))
    refused("unknown-name", runs[0], "--weights", "all", says=("'all'", "best", "last"))
    moved = tmp_path / "moved"
    shutil.copytree(runs[0], moved)
    recipe = (moved / "recipe.toml").read_text().replace(str(store), "/gone/s.zarr")
    (moved / "recipe.toml").write_text(recipe)
    refused("run-cache-missing", moved, says=(moved, "/gone/s.zarr", "--cache"))
    assert run("evaluate", moved, "--cache", store, *CPU).code == 0
    other = make_store(limit=16, views=1)
    refused("run-of-other-data", moved, "--cache", other, says=(moved, other))
    cut = tmp_path / "cut"
    shutil.copytree(runs[0], cut)
    (cut / "summary.json").unlink()
    refused("run-incomplete", cut, says=(cut,))
    (moved / "evaluation.json").write_text('{"held_out": 0.0, "samples": 3}')
    line = fails("report", moved)
    assert line.code == "evaluation-damaged" and "evaluation.json" in line and "ece" in line
    summary = json.loads((moved / "summary.json").read_text())
    for change, code, value in (
        ({"image_size": 64}, "run-input-differs", "image_size = 64"),
        ({"class_names": ["x", *summary["class_names"][1:]]}, "run-class-differs", "'x'"),
    ):
        (moved / "summary.json").write_text(json.dumps({**summary, **change}))
        refused(code, moved, "--cache", store, says=(moved, store, value, "--cache"))
    del summary["mean"]
    (moved / "summary.json").write_text(json.dumps(summary))
    refused("run-damaged", moved, "--cache", store, says=(moved, "mean"))

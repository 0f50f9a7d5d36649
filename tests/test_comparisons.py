"""What stands between two runs that are compared: views, tested images, and choices."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses, tree, write_teacher
from PIL import Image
from safetensors.torch import load_file
from test_distill import metrics, same, train, weights

import richkd
from richkd.analysis.results import leaderboard, paired_difference
from richkd.config.settings import Distill, Images, Precompute, TrainTeacher
from richkd.core.progress import Report
from richkd.core.seeds import derive_seed
from richkd.data.datasets import hold_out, load_dataset
from richkd.losses import METHODS
from richkd.models import forward
from richkd.precompute import precompute
from richkd.store.schema import split_sizes
from richkd.teachers.cnn import train_teacher
from richkd.training.loop import epoch_order
from richkd.training.probe import fit_probe, stratified_folds
from richkd.training.run_folder import RunFolder
from richkd.training.source import Source

Make = Callable[..., Path]
Run = Callable[..., Any]
QUIET = Report(quiet=True)


# --- views ---------------------------------------------------------------------------------------


def plain_training(
    images: torch.Tensor,
    labels: torch.Tensor,
    mean: Any,
    std: Any,
    seed: int,
    rates: list[float],
    views_of: Callable[[int], Any],
) -> dict[str, torch.Tensor]:
    """Plain training as anybody writes it: a view of each image, cross-entropy, SGD, batches of 16.

    Args:
        images: [N,32,32,3] uint8.
        labels: [N].
        mean: of pixels in 0..1.
        std: likewise.
        seed: of weights and order.
        rates: the learning rate of each epoch.
        views_of: view ids [N] of an epoch, from 1.
    """
    torch.manual_seed(derive_seed(seed, 0, 2))
    model = richkd.create_model("resnet8", 16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    scale, shift = 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)
    model.train()
    for epoch, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        views = torch.from_numpy(views_of(epoch).astype(np.int64))
        for index in epoch_order(seed, epoch, len(labels)).split(16):
            shown = richkd.apply_views(images[index], views[index])
            x = torch.addcmul(shift, shown.float(), scale).permute(0, 3, 1, 2)
            loss = torch.nn.functional.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def test_ce_is_plain_training_whatever_the_store_holds(make_store: Make, tmp_path: Path) -> None:
    stores = [make_store(views=2), make_store(views=6), make_store(views=2, seed=5, clip="none")]
    for number, store in enumerate(stores):
        summary = train(store, tmp_path / f"{number}", method="ce", epochs=3, seed=4)
        assert summary["views"] == "fresh"
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))

    cache = richkd.open_cache(stores[0])
    images, labels = cache.read("train/images"), cache.read("train/labels")
    mean, std = cache.manifest["mean"], cache.manifest["std"]
    rates = [line["lr"] for line in metrics(tmp_path / "0")]
    space = Source(Distill(cache=str(stores[0])), QUIET).splits["train"].view_space
    fresh = plain_training(
        images, labels, mean, std, 4, rates, lambda epoch: space.fresh(4, epoch, 48)
    )
    assert same(weights(tmp_path / "0"), fresh)
    slabs = cache.read("train/view_ids").numpy()
    cached = plain_training(
        images, labels, mean, std, 4, rates, lambda epoch: slabs[(epoch - 1) % 2]
    )
    assert not same(weights(tmp_path / "0"), cached)

    train_teacher(
        TrainTeacher(
            dataset="shapes",
            limit=48,
            model="resnet8",
            epochs=3,
            batch_size=16,
            lr=0.02,
            seed=4,
            device="cpu",
            out=str(tmp_path / "teacher.safetensors"),
        ),
        load_dataset(Images(dataset="shapes", limit=48)),
        QUIET,
    )
    assert same(weights(tmp_path / "0"), load_file(tmp_path / "teacher.safetensors"))


def test_ce_in_a_sweep_sees_what_it_sees_alone(run: Run, store: Path, tmp_path: Path) -> None:
    common = ["--epochs", 2, "--batch-size", 16, "--device", "cpu", "--lr", 0.02]
    done = run(
        "sweep",
        "--cache",
        store,
        "--students",
        "resnet8",
        "--methods",
        "ce,kd",
        "--seeds",
        2,
        "--out",
        tmp_path / "runs",
        *common,
    )
    assert done.code == 0, done.err
    for seed in (0, 1):
        train(store, tmp_path / f"alone-{seed}", method="ce", seed=seed)
        assert same(
            weights(tmp_path / f"alone-{seed}"),
            weights(tmp_path / "runs" / f"shapes-resnet8-ce-s{seed}"),
        )


def test_fresh_views_cover_the_space_and_depend_on_seed_epoch_and_sample_only() -> None:
    space = load_dataset(Images(dataset="shapes", limit=2)).train.view_space
    views = np.stack([space.fresh(3, epoch, 4000) for epoch in range(1, 6)])
    assert views.dtype == np.uint16 and set(views.ravel()) == set(range(162))
    assert (space.fresh(3, 2, 100) == views[1, :100]).all()
    counts = np.bincount(views.ravel(), minlength=162)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 250  # 161 degrees of freedom: beyond four standard deviations
    assert abs((views[0] == views[1]).mean() - 1 / 162) < 0.01
    assert abs((space.fresh(4, 1, 4000) == views[0]).mean() - 1 / 162) < 0.01


# --- images that choices are made on -------------------------------------------------------------


def test_validation_images_are_a_share_of_each_class(rng: np.random.Generator) -> None:
    train_split = load_dataset(Images(dataset="shapes", limit=200)).train
    kept, held = hold_out(train_split, 0.25, tuple("abcdefghijklmnop"))
    assert held is not None and len(kept) + len(held) == 200
    everything = {image.tobytes() for image in train_split.images.numpy()}  # type: ignore[union-attr]
    parts = [{image.tobytes() for image in part.images.numpy()} for part in (kept, held)]  # type: ignore[union-attr]
    assert parts[0] | parts[1] == everything and not parts[0] & parts[1]
    counts = np.bincount(train_split.labels, minlength=16)
    assert (np.bincount(held.labels, minlength=16) == np.rint(counts * 0.25)).all()
    again = hold_out(train_split, 0.25, tuple("abcdefghijklmnop"))[1]
    assert again is not None and torch.equal(again.labels, held.labels)


@pytest.fixture(scope="module")
def validated(make_store: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with validation images, whose teacher is trained on the others."""
    folder = tmp_path_factory.mktemp("validated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("richkd.data.datasets.SHAPES_TEST", 40)
        plain = make_store()
        clip = richkd.open_cache(plain).manifest["recipe"]["clip"]
        settings = Precompute(
            dataset="shapes",
            limit=160,
            validation=0.25,
            teacher="resnet8",
            clip=clip,
            views=3,
            device="cpu",
            out="v.zarr",
        )
        recipe = {"epochs": 1, "batch_size": 32}
        return precompute(settings, teacher_recipe=recipe).path.absolute()


def test_a_store_keeps_validation_apart(validated: Path, run: Run) -> None:
    cache = richkd.open_cache(validated)
    sizes = split_sizes(cache.manifest)
    assert sizes["train"] + sizes["validation"] == 160 and sizes["test"] == 40
    dataset = load_dataset(Images(dataset="shapes", limit=160, validation=0.25))
    assert dataset.validation is not None
    for split, images in (("train", dataset.train), ("validation", dataset.validation)):
        assert torch.equal(cache.read(f"{split}/images"), images.images)  # type: ignore[arg-type]
        assert torch.equal(cache.read(f"{split}/labels"), images.labels)
    assert cache.read("validation/teacher_logits").shape == (sizes["validation"], 16)
    # nobody trained the teacher on them: its weights are of the other images' fingerprint
    names = [path.name for path in (validated.parent / "teachers").glob("*.safetensors")]
    assert names == ["shapes-160-val0.25-resnet8.safetensors"]
    assert run("verify", validated).code == 0
    assert run("analyze", validated, "--split", "validation", "--json").code == 0
    samples = richkd.torch_dataset(cache, split="validation")
    assert len(samples) == sizes["validation"]
    assert samples[3]["teacher_logits"].shape == (16,)


def test_validation_is_repaired_and_found_again(validated: Path, tmp_path: Path, run: Run) -> None:
    damaged = tmp_path / "v.zarr"
    shutil.copytree(validated, damaged)
    before = tree(damaged)
    chunk = damaged / "validation" / "teacher_logits" / "c" / "0" / "0"
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    assert run("verify", damaged).code == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(validated.parent)  # the teacher's weights are named relative to it
        done = run("repair", damaged)
    assert done.code == 0, done.err
    assert before.keys() == tree(damaged).keys()
    assert run("verify", damaged).code == 0


def test_a_teacher_from_elsewhere_may_know_the_validation_images(
    validated: Path, shapes_teacher: Path, tmp_path: Path, run: Run
) -> None:
    words = [
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        160,
        "--validation",
        0.25,
        "--teacher",
        "resnet8",
        "--clip",
        "none",
        "--views",
        1,
        "--device",
        "cpu",
    ]
    trained = validated.parent / "teachers" / "shapes-160-val0.25-resnet8.safetensors"
    for number, (file, doubtful) in enumerate([(shapes_teacher, True), (trained, False)]):
        done = run(*words, "--teacher-weights", file, "--out", tmp_path / f"{number}.zarr")
        assert done.code == 0, done.err
        assert ("may have been trained on the validation images" in done.err) == doubtful
        assert "123 training, 37 validation and 40 test images" in done.err
    assert "123 training, 37 validation and 40 test" in run("inspect", tmp_path / "0.zarr").out


def with_noisy_test_labels(store: Path, out: Path) -> Path:
    """The store with random test labels: whoever reads one of them gives himself away."""
    cache = richkd.open_cache(store)
    dataset = load_dataset(Images(dataset="shapes", limit=160, validation=0.25))
    labels = torch.randint(0, 16, (len(dataset.test),))
    assert not torch.equal(labels, dataset.test.labels)
    noisy = replace(dataset, test=replace(dataset.test, labels=labels))
    recipe = {**cache.manifest["recipe"], "out": str(out)}
    recipe["teacher_weights"] = str(
        store.parent / "teachers" / "shapes-160-val0.25-resnet8.safetensors"
    )
    return precompute(Precompute(**recipe), dataset=noisy).path


def test_choices_read_no_test_label(validated: Path, tmp_path: Path, run: Run) -> None:
    noisy = with_noisy_test_labels(validated, tmp_path / "noisy.zarr")
    found = {}
    for store in (validated, noisy):
        summary = train(
            store, tmp_path / store.stem, method="richkd-l", alpha="auto", epochs=6, lr=0.05
        )
        chosen = {key: summary["target"][key] for key in ("alpha", "scale", "held_out_nll")}
        lines = metrics(tmp_path / store.stem)
        assert [line["test_accuracy"] is None for line in lines] == [True] * 5 + [False]
        scores = [line["validation_accuracy"] for line in lines]
        assert summary["epoch_best"] == 1 + scores.index(max(scores))
        assert summary["best_chosen_on"] == "validation" and summary["tested"] == 40
        assert summary["choice_accuracy"] == max(scores)
        words = ["--methods", "ce,kd,dkd,richkd-l", "--seeds", 1, "--halving", 2, "--epochs", 4]
        words += ["--students", "resnet8", "--device", "cpu", "--batch-size", 16, "--json"]
        done = run("sweep", "--cache", store, *words, "--out", tmp_path / f"sweep-{store.stem}")
        assert done.code == 0, done.err
        stopped = {
            Path(each["run"]).name.removeprefix(store.stem): each["reason"]
            for each in done.json["stopped"]
        }
        found[store.stem] = (
            chosen,
            summary["epoch_best"],
            scores,
            stopped,
            load_file(tmp_path / store.stem / "best.safetensors"),
        )
    (*choices, best), (*others, other) = found["v"], found["noisy"]
    assert choices == others and len(choices[3]) == 3
    assert same(best, other)


def test_the_best_epoch_is_tested_with_its_own_weights(validated: Path, tmp_path: Path) -> None:
    summary = train(validated, tmp_path / "a", method="kd", epochs=7, lr=0.1, seed=1)
    cache = richkd.open_cache(validated)
    mean, std = (torch.tensor(cache.manifest[key]) for key in ("mean", "std"))
    x = ((cache.read("test/images").float() / 255 - mean) / std).permute(0, 3, 1, 2)
    for which in ("last", "best"):
        model = richkd.create_model("resnet8", 16).eval()
        model.load_state_dict(load_file(tmp_path / "a" / f"{which}.safetensors"))
        with torch.no_grad():
            hits = (model(x).argmax(1) == cache.read("test/labels")).float().mean().item()
        assert summary[f"top1_{which}"] == pytest.approx(hits), which


def test_held_out_test_images_choose_and_the_others_test(store: Path, tmp_path: Path) -> None:
    summary = train(store, tmp_path / "a", method="kd", holdout=0.5, epochs=4, lr=0.1)
    assert summary["tested"] == 20 and summary["best_chosen_on"] == "held-out test"
    lines = metrics(tmp_path / "a")
    scores = [line["validation_accuracy"] for line in lines]
    assert summary["epoch_best"] == 1 + scores.index(max(scores))
    assert sum(line["test_accuracy"] is not None for line in lines) == 1
    plain = train(store, tmp_path / "b", method="kd", epochs=4, lr=0.1)
    assert plain["best_chosen_on"] == "test" and plain["tested"] == 40
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    ("limit", "share", "message"),
    [
        (
            48,
            0.1,
            r"validation = 0.1: of the [1-9] training images of class '.*' .* none to validate",
        ),
        (48, 0.9, r"= 0.9: of the [1-9] training images of class '.*' .* none to train on"),
        (48, 1.0, r"validation = 1.0: must be in \[0, 1\)"),
        (48, -0.1, r"validation = -0.1: must be in \[0, 1\)"),
    ],
)
def test_bad_shares(fails: Run, tmp_path: Path, limit: int, share: float, message: str) -> None:
    line = fails(
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        limit,
        "--validation",
        share,
        "--clip",
        "none",
        "--out",
        tmp_path / "x.zarr",
    )
    assert re.search(message, line), line
    assert not (tmp_path / "x.zarr").exists()


def test_photographs_are_validated_alike(
    tmp_path: Path, run: Run, rng: np.random.Generator
) -> None:
    for split, count in (("train", 8), ("val", 3)):
        for name, level in (("dark", 60), ("light", 190)):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                side = 40 + 3 * number
                pixels = rng.integers(level - 40, level + 40, (side, side + 5, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    common = ["--device", "cpu", "--batch-size", 4]
    done = run(
        "precompute",
        "--dataset",
        f"imagefolder:{tmp_path / 'photos'}",
        "--image-size",
        32,
        "--teacher",
        "resnet8",
        "--validation",
        0.25,
        "--clip",
        "none",
        "--views",
        2,
        "--teacher-weights",
        write_teacher(tmp_path / "t.safetensors", "resnet8", 2),
        "--out",
        tmp_path / "p.zarr",
        *common,
    )
    assert done.code == 0, done.err
    cache = richkd.open_cache(tmp_path / "p.zarr")
    assert split_sizes(cache.manifest) == {"train": 12, "test": 6, "validation": 4}
    assert run("verify", tmp_path / "p.zarr").code == 0
    done = run(
        "sweep",
        "--cache",
        tmp_path / "p.zarr",
        "--students",
        "resnet8",
        "--methods",
        "ce,kd,pkt",
        "--seeds",
        1,
        "--epochs",
        2,
        "--halving",
        2,
        "--out",
        tmp_path / "r",
        "--json",
        *common,
    )
    assert done.code == 0, done.err
    assert [one["best_chosen_on"] for one in done.json["runs"]] == ["validation"] * 2
    assert len(done.json["stopped"]) == 1


def test_validation_belongs_to_the_store(fails: Run, store: Path, tmp_path: Path) -> None:
    for command in (["distill"], ["sweep", "--students", "resnet8"]):
        line = fails(*command, "--cache", store, "--validation", 0.1, "--out", tmp_path / "x")
        assert "richkd precompute --validation 0.1" in line and "--holdout" in line
    assert not (tmp_path / "x").exists()


def as_an_earlier_version_began_it(run: Path) -> None:
    """Take away what recipes did not say before."""
    recipe = run / "recipe.toml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("holdout")]
    recipe.write_text("\n".join(lines) + "\n")


def test_runs_that_were_begun_otherwise_are_not_resumed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutOff(BaseException):
        pass

    saved = RunFolder.save_epoch

    def cut(self: RunFolder, *arguments: Any) -> None:
        saved(self, *arguments)
        raise CutOff

    methods = {"ce": {}, "dist": {}, "mlkd": {}, "kd": {}, "richkd-l": {"alpha": "auto"}}
    for method, settings in methods.items():
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_epoch", cut)
            with pytest.raises(CutOff):
                train(store, tmp_path / method, method=method, **settings)
        as_an_earlier_version_began_it(tmp_path / method)
        if method == "kd":  # which is what it was
            assert train(store, tmp_path / method, method=method, resume=True)["tested"] == 40
            continue
        before = tree(tmp_path / method)
        with refuses("run-of-earlier-version", tmp_path / method, "--out"):
            train(store, tmp_path / method, method=method, resume=True, **settings)
        assert tree(tmp_path / method) == before


# --- reports -------------------------------------------------------------------------------------


def test_runs_of_different_tested_images_are_not_compared(
    store: Path, tmp_path: Path, run: Run
) -> None:
    for seed in (0, 1):
        common: dict[str, Any] = {"seed": seed, "epochs": 1}
        train(store, tmp_path / "r" / f"kd-{seed}", method="kd", **common)
        train(store, tmp_path / "r" / f"ce-{seed}", method="ce", **common)
        train(store, tmp_path / "r" / f"auto-{seed}", method="richkd-l", alpha="auto", **common)
    done = run("report", tmp_path / "r", "--out", tmp_path)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "report.json").read_text())["leaderboard"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["richkd-l"]["holdout"] == 0.2 and by_method["kd"]["holdout"] == 0.0
    assert by_method["richkd-l"]["minus_kd_mean"] is None
    assert by_method["ce"]["minus_kd_mean"] is not None
    page = (tmp_path / "report.html").read_text()
    assert "all test images" in page and "without the 20.00 % held out" in page
    assert "which flatters it" in page and "on test images that were held out" in page
    # with KD on the same images, there is a difference
    for seed in (0, 1):
        train(
            store, tmp_path / "r" / f"kd-held-{seed}", method="kd", holdout=0.2, seed=seed, epochs=1
        )
    assert run("report", tmp_path / "r", "--out", tmp_path).code == 0
    rows = json.loads((tmp_path / "report.json").read_text())["leaderboard"]
    found = {(row["method"], row["holdout"]): row["minus_kd_mean"] for row in rows}
    assert found["richkd-l", 0.2] is not None and found["ce", 0.0] is not None


def test_runs_of_before_hold_out_what_their_recipes_imply() -> None:
    def run_of(method: str, seed: int, **settings: Any) -> Any:
        own = {"student": "s", "method": method, "epochs": 9, **settings}
        return own, {"seed": seed, "top1_last": 0.5 + 0.1 * seed, "top1_best": 0.6}

    rows = leaderboard(
        [
            run_of("kd", 0),
            run_of("kd", 1),
            run_of("richkd", 0, alpha="auto"),
            run_of("richkd", 1, alpha="auto"),
            run_of("dkd", 0, holdout=0.0),
            run_of("dkd", 1),
        ]
    )
    found = {row.method: (row.holdout, row.minus_kd is None, len(row.runs)) for row in rows}
    assert found == {"kd": (0.0, True, 2), "richkd": (0.2, True, 2), "dkd": (0.0, False, 2)}

    # nor are they pooled with those of this version, which may have trained a method otherwise
    old, new = run_of("kd", 0), run_of("kd", 1)
    new[1]["tested"] = 40
    rows = leaderboard([old, new, run_of("dist", 0)])
    assert len(rows) == 3
    assert {row.method: row.minus_kd is None for row in rows if row.method == "dist"} == {
        "dist": False
    }


# --- rows that are not what a loss assumes -------------------------------------------------------


@pytest.mark.parametrize("method", ["kd-ls", "dkd-ls", "mlkd-ls", "richkd-ls"])
def test_kept_rows_are_refused_where_whole_ones_are_needed(
    make_store: Make, tmp_path: Path, method: str, fails: Run
) -> None:
    kept = make_store(keep="top-4")
    line = fails("distill", "--cache", kept, "--method", method, "--out", tmp_path / "x")
    assert f"method {method} standardises whole rows" in line and "keeps the 4 largest" in line
    line = fails(
        "sweep",
        "--cache",
        kept,
        "--students",
        "resnet8",
        "--methods",
        f"kd,{method}",
        "--out",
        tmp_path / "y",
    )
    assert "standardises whole rows" in line
    line = fails(
        "distill",
        "--cache",
        kept,
        "--method",
        method.removesuffix("-ls"),
        "--set",
        "standardize=true",
        "--out",
        tmp_path / "x",
    )
    assert "standardises whole rows" in line
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_temperature_that_overflows_is_refused(fails: Run, store: Path, tmp_path: Path) -> None:
    for method in ("crd", "richkd"):
        line = fails(
            "distill",
            "--cache",
            store,
            "--method",
            method,
            "--set",
            "crd_temperature=0.011",
            "--out",
            tmp_path / "x",
        )
        assert "crd_temperature = 0.011" in line and "overflows float32" in line
    assert not (tmp_path / "x").exists()
    summary = train(
        store, tmp_path / "y", method="crd", epochs=1, options={"crd": {"crd_temperature": 0.014}}
    )
    assert np.isfinite(metrics(tmp_path / "y")[0]["loss"]) and summary["tested"] == 40


def test_logits_are_of_f32_under_autocast(rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.normal(size=(256, 3, 32, 32)).astype(np.float32))
    for name, side in (
        ("resnet8", 32),
        ("timm/test_vit", 32),
        ("timm/test_efficientnet", 32),
        ("timm/crossvit_tiny_240", 240),  # its feature maps are a list
    ):
        model = richkd.create_model(name, 100, image_size=side).eval()
        shown = images if side == 32 else torch.randn(2, 3, side, side)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            logits, _ = forward(model, shown)
        assert logits.dtype == torch.float32
        top2 = logits.topk(2).values
        assert (top2[:, 0] == top2[:, 1]).float().mean() < 0.002


def test_the_folds_of_a_probe_are_stratified(rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(6), [50, 5, 7, 31, 2, 11])))
    fold = stratified_folds(labels, 5, seed=3)
    assert np.ptp(np.bincount(fold)) <= 1
    for number in range(6):
        assert np.ptp(np.bincount(fold[labels == number], minlength=5)) <= 1
    features = torch.from_numpy(rng.normal(size=(len(labels), 8)).astype(np.float32))
    assert fit_probe(features, labels, features[:3], 6).too_small == [4]


def test_classes_too_small_for_the_probe_are_named(
    make_store: Make, tmp_path: Path, run: Run
) -> None:
    few = make_store(limit=48)
    cache = richkd.open_cache(few)
    counts = np.bincount(cache.read("train/labels"), minlength=16)
    names = [name for name, n in zip(cache.manifest["class_names"], counts, strict=True) if n < 5]
    assert 8 < len(names) < 16
    words = ["--student", "resnet8", "--method", "richkd-l", "--clip-head", "probe"]
    done = run(
        "distill", "--cache", few, *words, "--epochs", 1, "--device", "cpu", "--out", tmp_path / "x"
    )
    assert done.code == 0, done.err
    shown = f"{', '.join(names[:8])} and {len(names) - 8} more"
    assert f"fewer training images than the probe has folds: {shown}" in done.err


def test_few_views_are_said_with_what_they_cost(
    make_store: Make, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(views=2)

    def said(*words: Any) -> list[str]:
        done = run(*words, "--cache", store, "--device", "cpu", "--batch-size", 48)
        assert done.code == 0, done.err
        return [line for line in done.err.splitlines() if "views of each image" in line]

    short = ["--student", "resnet8", "--epochs", 2]
    assert not said("distill", "--method", "kd", *short, "--out", tmp_path / "a")
    long = ["--student", "resnet8", "--epochs", 3]
    (line,) = said("distill", "--method", "kd", *long, "--out", tmp_path / "b")
    assert line.startswith("kd learns from 2 views of each image and wants 3: in 120 epochs")
    assert "8 views cost kd 0." in line and "fewer cost more" in line
    assert line.endswith("richkd precompute --views 3 makes them")
    assert not said("distill", "--method", "ce", *long, "--out", tmp_path / "c")
    lines = said(
        "sweep",
        "--students",
        "resnet8",
        "--methods",
        "ce,kd,crd,richkd",
        "--seeds",
        2,
        "--epochs",
        40,
        "--dry-run",
        "--out",
        tmp_path / "d",
    )
    assert [line.split()[0] for line in lines] == ["kd", "crd", "richkd"]


def test_what_few_views_cost_is_what_was_measured() -> None:
    """The figures in the code are those of the published measurement."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "views.json"
    runs = json.loads(results.read_text())["runs"]
    top1 = {(r["method"], r["views"], r["seed"]): r["top1"] for r in runs}
    seeds = {seed for _, _, seed in top1}
    assert len(seeds) >= 5
    for name in ("kd", "pkt"):
        few = METHODS[name][0].few_views
        assert few.measured_with == name
        behind = {}
        for count in (8, 16, 32, 64, 162):
            pairs = [top1[name, str(count), s] - top1[name, "online", s] for s in seeds]
            difference = paired_difference(pairs)
            assert difference is not None and difference.n == len(seeds)
            if difference.high < 0:
                behind[count] = round(-100 * difference.mean, 2)
        assert few.points == behind and few.enough == 16

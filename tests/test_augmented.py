"""Augmented and mixed views through both stages: rows, replays, labels, targets and refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from helpers import refuses, stage_one_of, tree, write_photos, write_teacher

import richkd
from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.data.datasets import ImageFiles
from richkd.data.decoding import Photograph
from richkd.data.inputs import ArrayInputs, FileInputs, Normalize
from richkd.data.mixing import Mix, joined
from richkd.distill import distill
from richkd.losses import METHODS, Batch, Task, method_class
from richkd.models.weights import read_weights
from richkd.store.checksums import take_checksums, write_sealed
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.schema import array_specs
from richkd.training.images import load_images
from richkd.training.source import Source

Make = Callable[..., Path]
EVERY = "jitter+rand+erase+mix"
CPU = torch.device("cpu")
QUIET = Report(quiet=True)
THERE = """
import hashlib, sys
import richkd
for path in sys.argv[1:]:
    images = richkd.view_images(path, 1, network="teacher")
    print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def mixed(make_store: Make) -> Path:
    """A cache of drawn images whose teacher takes them at another size than the students."""
    return make_store(augment=EVERY, limit=24, views=2, teacher_size=40)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise of photographs, of a teacher alone."""
    root = tmp_path_factory.mktemp("photos")
    folder = write_photos(root / "p", ["cat", "dog"], np.random.default_rng(0), train=6, test=2)
    weights = write_teacher(root / "t.safetensors", "resnet8", 2)
    stage_one_of(
        root / "p.zarr",
        f"imagefolder:{folder}",
        "resnet8",
        teacher_weights=str(weights),
        augment="trivial+erase+cutmix",
        teacher_size=40,
    )
    return root


def fresh_rows(cache: Any, weights: Path, view: int, images: torch.Tensor) -> Any:
    """Run a teacher on images, apart from both stages."""
    teacher = richkd.create_model("resnet8", cache.num_classes)
    teacher.load_state_dict(read_weights(weights))
    seen = cache.manifest["teacher"]["input"]
    mean, std = (torch.tensor(seen[name]) for name in ("mean", "std"))
    with torch.no_grad():
        pixels = (images / 255 - mean) / std
        return richkd.forward(teacher.eval(), pixels.permute(0, 3, 1, 2))


def assert_rows(cache: Any, weights: Path) -> None:
    for view in range(cache.num_views):
        images = richkd.view_images(cache, view, network="teacher")
        assert images.shape == (cache.num_samples, 40, 40, 3)
        slab = cache.slab(view)
        for row, expected in zip(
            (slab.teacher_logits, slab.teacher_features),
            fresh_rows(cache, weights, view, images),
            strict=True,
        ):
            torch.testing.assert_close(row.float(), expected, rtol=2**-10, atol=2e-3)


def test_rows_of_an_array_are_a_forward_pass_on_the_replayed_images(
    mixed: Path, shapes_teacher: Path
) -> None:
    cache = richkd.open_cache(mixed)
    entry = cache.manifest["views"]
    assert entry["augment"] == EVERY and entry["columns"] == list(cache.augment.columns)  # type: ignore[union-attr]
    assert cache.manifest["recipe"]["augment"] == EVERY
    assert "pillow" in cache.manifest["versions"]
    assert cache.slab(0).view_params.shape == (24, 21)  # type: ignore[union-attr]
    assert_rows(cache, shapes_teacher)


def test_rows_of_photographs_are_a_forward_pass_on_the_replayed_images(photos: Path) -> None:
    cache = richkd.open_cache(photos / "p.zarr")
    assert cache.slab(0).view_params.shape == (12, 5 + 2 + 4 + 7)  # type: ignore[union-attr]
    assert_rows(cache, photos / "t.safetensors")
    student = richkd.view_images(cache, 0, [3, 1])
    assert student.shape == (2, 32, 32, 3)
    one, *_ = richkd.torch_dataset(cache, 0)
    assert one["partner_label"] in (0, 1) and 0 <= one["share"] <= 1


def test_a_row_is_read_by_its_columns_alone(photos: Path) -> None:
    """The partner's own crop and changes, pasted in a box: read here from the manifest's names."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    cache = richkd.open_cache(photos / "p.zarr")
    names = cache.manifest["views"]["columns"]
    files = load_images(cache)["train"].images
    assert isinstance(files, ImageFiles)
    rows = [dict(zip(names, row, strict=True)) for row in cache.slab(1).views.tolist()]
    policy = v2.TrivialAugmentWide()

    def alone(sample: int) -> np.ndarray[Any, Any]:
        row = rows[sample]
        box = [int(row[name]) for name in ("top", "left", "height", "width")]
        image = functional.resized_crop(files.open(sample), *box, [32, 32])
        image = functional.hflip(image) if row["flip"] else image
        op = [*policy._AUGMENTATION_SPACE][int(row["op"])]
        size = row["magnitude"]
        size = round(32 * size, 3) if op.startswith("Translate") else size
        image = policy._apply_image_or_video_transform(
            image, op, size, policy.interpolation, policy._fill
        )
        pixels = np.array(image)
        top, left, height, width = (
            round(32 * row[f"erase_{part}"]) for part in ("top", "left", "height", "width")
        )
        pixels[top : top + height, left : left + width] = 0
        return pixels

    images = richkd.view_images(cache, 1)
    for sample, row in enumerate(rows):
        expected, other = alone(sample), alone(int(row["partner"]))
        top, left, height, width = (
            round(32 * row[f"mix_{part}"]) for part in ("top", "left", "height", "width")
        )
        here = slice(top, top + height), slice(left, left + width)
        expected[here] = other[here]
        assert np.array_equal(images[sample], expected)
        assert row["share"] == pytest.approx(1 - height * width / 32**2)


@pytest.mark.slow
def test_another_process_replays_the_same_bytes(mixed: Path, photos: Path) -> None:
    paths = str(mixed), str(photos / "p.zarr")
    images = [richkd.view_images(path, 1, network="teacher") for path in paths]
    expected = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in images]
    command = [sys.executable, "-c", THERE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_replay_the_same_bytes_in_any_order(
    mixed: Path, photos: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RICHKD_WORKERS", str(workers))
    for path in (mixed, photos / "p.zarr"):
        cache = richkd.open_cache(path)
        images, views = load_images(cache)["train"].images, cache.slab(1).views
        inputs: Any = (
            FileInputs(images, CPU, augment=cache.augment)
            if isinstance(images, ImageFiles)
            else ArrayInputs(images, CPU, augment=cache.augment)
        )
        assert not inputs.gathers
        order = torch.randperm(cache.num_samples)
        batches = [*inputs.batches(order, views, 2)]
        assert torch.equal(torch.cat([index for index, _ in batches]), order)
        expected = richkd.view_images(cache, 1, order)
        assert torch.equal(torch.cat([part for _, part in batches]), expected)
        # entries of some samples, each with its partner's row
        some = torch.tensor([5, 2, 5, 7, 0, 1, 3, 3, 3])
        rows = joined(cache.augment, views, some)
        found = inputs.batches(torch.arange(9), rows, 2, some)
        again = torch.cat([part for _, part in found])
        assert torch.equal(again, richkd.view_images(cache, 1, some))


def test_partners_are_decoded_once_more_a_view(photos: Path) -> None:
    cache = richkd.open_cache(photos / "p.zarr")
    files = load_images(cache)["train"].images
    assert isinstance(files, ImageFiles)
    opened: list[int] = []

    class Recorded(ImageFiles):
        def photograph(self, index: int, most: float = 1.0) -> Photograph:
            opened.append(index)
            return super().photograph(index, most)

    inputs = FileInputs(Recorded(**vars(files)), CPU, workers=0, augment=cache.augment)
    views = torch.stack([cache.slab(view).views for view in range(2)])
    [*inputs.decode_once([range(12)], views, 4, None)]
    partners = views[..., cache.augment.at["partner"]].int()  # type: ignore[union-attr]
    assert sorted(opened) == sorted([*range(12), *partners.flatten().tolist()])


def test_crops_alone_leave_no_trace(store: Path, make_store: Make, tmp_path: Path) -> None:
    manifest = richkd.open_cache(store).manifest
    assert manifest["views"].keys() == {"space", "count", "seed"}
    assert "augment" not in manifest["recipe"] and "pillow" not in manifest["versions"]
    again = make_store(augment="crop", out=str(tmp_path / "s.zarr"))
    same = {name for name, content in tree(store).items() if tree(again)[name] == content}
    assert {name for name in tree(store) if "/c/" in name} <= same


def test_mixed_rows_are_resumed_repaired_added_to_and_checked(
    make_store: Make, run: Callable[..., Any], fails: Callable[..., Any], shapes_teacher: Path
) -> None:
    path = make_store(augment="rand+mix", limit=24, views=2, block=8)
    whole = tree(path)
    assert run("verify", path, "--teacher", shapes_teacher).code == 0
    (path / "train/teacher_logits/c/1/1/0").unlink()
    (path / "train/teacher_features/c/0/2/0").write_bytes(b"")
    assert run("repair", path).code == 0
    assert {n for n, content in tree(path).items() if "/c/" in n and content != whole[n]} == set()
    arguments = f"--teacher resnet8 --teacher-weights {shapes_teacher} --device cpu".split()
    assert run("add-teacher", path, "--name", "two", *arguments).code == 0
    cache = richkd.open_cache(path)
    assert torch.equal(
        cache.read("train/teacher_logits"), cache.read("teachers/two/train/teacher_logits")
    )
    assert "with rand+mix" in run("inspect", path).out
    assert fails("analyze", path, "--split", "train").code == "split-mixed"


def test_the_manifest_is_held_to_its_components(mixed: Path, tmp_path: Path) -> None:
    from richkd.store.schema import manifest_fault

    entry = richkd.open_cache(mixed).manifest
    assert manifest_fault(entry) is None
    for change in ({"augment": "mix+rand"}, {"augment": "zoom"}, {"columns": ["top"]}):
        damaged: Any = {**entry, "views": {**entry["views"], **change}}
        assert "views." in str(manifest_fault(damaged))


# --- labels and targets --------------------------------------------------------------------------


def test_the_label_term_of_mixed_images_is_the_formula(rng: np.random.Generator) -> None:
    batch, classes = 7, 5
    logits, share = torch.randn(batch, classes), torch.rand(batch)
    own, other = (torch.from_numpy(rng.integers(0, classes, batch)) for _ in range(2))
    task = Task(labels=own, student_dim=3, teacher_dim=3, clip_dim=0, alpha=1, label_smoothing=0.1)
    kind, options = method_class("ce", {"ce_weight": 0.7})
    mixed = Batch(logits, torch.randn(batch, 3), own, own, partner=other, share=share)
    found = kind(options, task)(mixed)["ce"]
    log_p = logits.double() - logits.double().logsumexp(1, keepdim=True)
    target = torch.full((batch, classes), 0.1 / classes, dtype=torch.float64)
    for labels, weight in ((own, share.double()), (other, 1 - share.double())):
        target += 0.9 * weight[:, None] * F.one_hot(labels, classes)
    expected = -0.7 * (target * log_p).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_method_states_whether_it_takes_mixed_images() -> None:
    refusing = {name for name, (kind, _) in METHODS.items() if kind.needs_one_label}
    assert refusing == {"dkd", "dkd-ls", "ca-mkd"}


def test_clips_rows_are_mixed_as_the_images_are(mixed: Path) -> None:
    cache = richkd.open_cache(mixed)
    assert not cache.has("train/fused_logits") and cache.has("test/fused_logits")
    source = Source(Distill(cache=str(mixed), device="cpu"), QUIET, cache)
    _, target = source.target(Distill(cache=str(mixed)), "fused")
    names = ["teacher_features", "clip_features", *source._targets]
    (epoch, _), (second, _) = source.epochs(names, 1, 2)
    assert target.kind == "fused"
    cosines = cache.read("train/clip_similarity").double()
    features = cache.read("train/clip_features").double()
    scale = cache.manifest["clip"]["logit_scale"]  # type: ignore[index]
    for view, rows in enumerate((epoch, second)):
        views = cache.slab(view).views.double()
        at = cache.augment.at  # type: ignore[union-attr]
        partner, share = views[:, at["partner"]].long(), views[:, at["share"], None]
        both = share * cosines + (1 - share) * cosines[partner]
        expected = 0.7 * cache.read("train/teacher_logits", view).double() + 0.3 * scale * both
        name = next(iter(source._targets))
        torch.testing.assert_close(rows.rows[name].double(), expected, rtol=2e-3, atol=2e-3)  # type: ignore[union-attr]
        torch.testing.assert_close(cache.fuse(view).double(), expected, rtol=1e-5, atol=1e-5)
        seen = share * features + (1 - share) * features[partner]
        torch.testing.assert_close(rows.rows["clip_features"].double(), seen, rtol=2e-3, atol=1e-3)  # type: ignore[union-attr]
    mix = Mix.of(cache.augment, epoch.views, torch.arange(24))
    assert mix is not None and torch.equal(mix.rows(cosines), mix.rows(cosines, torch.arange(24)))


def test_negatives_of_mixed_images_are_all_other_samples() -> None:
    kind, options = method_class("crd", {"negatives": 500})
    labels = torch.zeros(8, dtype=torch.int64)
    labels[0] = 1
    task = Task(labels=labels, student_dim=3, teacher_dim=3, clip_dim=0, alpha=1, mixed=True)
    drawn = kind(options, task).contrast.draw_negatives(torch.arange(8))  # type: ignore[operator, union-attr]
    for sample in range(8):
        assert {*drawn[sample].tolist()} == {*range(8)} - {sample}


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [("partner", 12, "partner are not in 0..11"), ("magnitude", 300, "op"), ("left", 900, "boxes")],
)
def test_forged_rows_are_refused_where_they_are_read(
    photos: Path, tmp_path: Path, column: str, value: float, said: str
) -> None:
    """Whatever is wrong with them, every checksum is right."""
    forged = Path(shutil.copytree(photos / "p.zarr", tmp_path / "p.zarr"))
    at = richkd.open_cache(forged).augment.at  # type: ignore[union-attr]
    zarr.open_group(forged)["train/view_params"][1, 3, at[column]] = value  # type: ignore[index]
    manifest: Any = read_manifest(forged)
    manifest["checksums"] = take_checksums(open_location(forged), array_specs(manifest))
    write_sealed(open_location(forged), manifest)
    run = Distill(cache=str(forged), method="kd", student="resnet8", out=str(tmp_path / "run"))
    with refuses("cache-damaged", "train/view_params, view 1", said):
        distill(replace(run, epochs=2, device="cpu", batch_size=6), report=QUIET)
    if column != "left":  # the images are not known there
        with refuses("cache-damaged", "view 1", said):
            richkd.open_cache(forged).slab(1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ce", "kd", "richkd"])
def test_students_train_on_mixed_images_and_resume(
    mixed: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of two workers, against one of none that is stopped and resumed."""
    settings: dict[str, Any] = {
        "cache": str(mixed),
        "student": "resnet8",
        "method": method,
        "epochs": 2,
        "batch_size": 5,
        "device": "cpu",
        "lr": 0.01,
    }
    logged: list[str] = []

    class Logged(Report):
        def log(self, message: str) -> None:
            logged.append(message)

    monkeypatch.setenv("RICHKD_WORKERS", "2")
    distill(Distill(**settings, out=str(tmp_path / "a")), report=Logged(quiet=True))
    assert any("first label" in line for line in logged)
    monkeypatch.setenv("RICHKD_WORKERS", "0")
    with pytest.MonkeyPatch.context() as patch:
        stop_after_one_epoch(patch)
        with pytest.raises(KeyboardInterrupt):
            distill(Distill(**settings, out=str(tmp_path / "b")), report=QUIET)
    distill(Distill(**settings, out=str(tmp_path / "b")), report=QUIET)
    one, two = (read_weights(tmp_path / name / "last.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def stop_after_one_epoch(patch: pytest.MonkeyPatch) -> None:
    from richkd.training.loop import Trainer

    steps = Trainer.steps

    def stopping(self: Trainer, epoch: int, source: Any) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return steps(self, epoch, source)

    patch.setattr(Trainer, "steps", stopping)


def test_a_sweep_estimates_the_memory_of_methods_on_mixed_images(
    mixed: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    words = f"sweep --cache {mixed} --students resnet8 --methods crd,richkd --epochs 1"
    done = run(*f"{words} --seeds 1 --device cpu --dry-run --out {tmp_path}".split())
    assert done.code == 0, done.err


def test_the_label_loss_of_a_step_is_that_of_the_replayed_images(mixed: Path) -> None:
    cache = richkd.open_cache(mixed)
    settings = Distill(cache=str(mixed), student="resnet8", method="kd", device="cpu", lr=0.01)
    source = Source(settings, QUIET, cache)
    trainer, rows, _ = source.trainer(settings)
    ((shared, _),) = source.epochs([*rows.values()], 1, 1)
    own = source.own(shared, rows, 0, 1)
    order = torch.randperm(24)[:9]
    index, images, batch = next(trainer.batches(order, own))
    assert torch.equal(images, richkd.view_images(cache, 0, order))
    views, at = cache.slab(0).views[order].double(), cache.augment.at  # type: ignore[union-attr]
    labels = cache.read("train/labels")
    trainer.model.train()
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    *_, terms = trainer.objective(images, labels[index], index, batch, trainer.epoch)
    trainer.model.load_state_dict(trained)
    normalize = Normalize(cache.manifest["mean"], cache.manifest["std"], CPU)  # type: ignore[arg-type]
    log_p = F.log_softmax(trainer.model(normalize(images)).double(), dim=1)
    share, partner = views[:, at["share"]], views[:, at["partner"]].long()
    each = [-log_p.gather(1, labels[which][:, None])[:, 0] for which in (order, partner)]
    expected = 0.1 * (share * each[0] + (1 - share) * each[1]).mean()
    assert terms["ce"].item() == pytest.approx(expected.item(), rel=1e-5)
    # a method that reads no rows draws and mixes fresh views
    fresh = source.own(shared, {}, 0, 1)
    assert {*fresh.rows} == {"partner_label", "share"}
    assert not torch.equal(fresh.views, own.views) and fresh.views.shape == own.views.shape


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_counts_the_decodes_of_partners(photos: Path) -> None:
    from richkd.config.settings import Precompute
    from richkd.tools import plan

    logged: list[str] = []

    class Logged(Report):
        def log(self, message: str) -> None:
            logged.append(message)

    folder = richkd.open_cache(photos / "p.zarr").manifest["dataset"]["name"]
    settings = Precompute(
        dataset=folder, image_size=32, teacher="resnet8", clip="none", views=2, augment="mix"
    )
    result = plan.plan(settings, QUIET, enough=0.01, most=16)
    plan.show(result, Logged(quiet=True))
    assert result["pace"]["augment"] == "mix"
    assert any(line.startswith("36 decodes") for line in logged)
    assert result["raw_bytes"] > 2 * 12 * 4 * (5 + 7)


def test_what_mixed_images_do_not_fit_is_refused(
    mixed: Path, make_store: Make, fails: Callable[..., Any], tmp_path: Path
) -> None:
    for method in ("dkd", "ca-mkd"):
        options = f"--cache {mixed} --student resnet8 --epochs 1 --out {tmp_path / 'r'}".split()
        error = fails("distill", *options, "--method", method)
        assert error.code == "method-needs-one-label" and "mix" in error
    error = fails("precompute", "--dataset", "shapes", "--augment", "rand+zoom")
    assert error.code == "augment-components" and "'zoom'" in error and "cutmix" in error
    out = tmp_path / "s.zarr"
    with refuses("augment-samples", "mixup", 1):
        make_store(augment="mixup", limit=1, out=str(out))
    with refuses("value-out-of-range", "fused_logits", "mixup"):
        make_store(augment="mixup", rows=("teacher_logits", "fused_logits"), out=str(out))
    with refuses("value-out-of-range", "probe", "rand+mixup"):
        make_store(augment="mixup+rand", teacher_head="probe", out=str(out))
    with refuses("cache-settings-differ", "augment", EVERY):
        make_store(augment="rand", limit=24, views=2, teacher_size=40, out=str(mixed))
    assert not out.exists() and not (tmp_path / "r").exists()

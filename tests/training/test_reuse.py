"""Several views of one decode: `distill --crops-per-decode`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Refusal,
    assert_same_run,
    refuses,
    slow,
    stage_one_of,
    write_photos,
    write_teacher,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.data import reuse
from richkd.data.datasets import ImageFiles
from richkd.data.inputs import FileInputs
from richkd.data.reuse import Reuse, buffer_bytes, choose_lag, spread
from richkd.distill import distill
from richkd.store.reader import TeacherCache, open_cache
from richkd.training.data import part_of
from richkd.training.source import Source
from richkd.training.student import StudentRun

Fails = Callable[..., Refusal]
VIEWS, IMAGES = 5, 26


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, clip_dir: Path) -> Path:
    """A cache of a folder of 26 photographs, with 5 views of each."""
    root = tmp_path_factory.mktemp("reuse")
    folder = write_photos(root / "f", ["cat", "dog"], np.random.default_rng(5), train=13, test=3)
    weights = write_teacher(root / "t.safetensors", "resnet8", 2)
    cache = stage_one_of(
        root / "c.zarr",
        f"imagefolder:{folder}",
        "resnet8",
        teacher_weights=str(weights),
        clip=str(clip_dir),
        views=VIEWS,
        block=8,
    )
    return cache.path


def settings_of(cache: Path, out: Path, **given: Any) -> Distill:
    common: dict[str, Any] = {"student": "resnet8", "method": "kd", "batch_size": 4, "epochs": 2}
    common |= {"cache": str(cache), "device": "cpu", "out": str(out)}
    return Distill(**{**common, **given})


def source_of(cache: Path, each: int, **given: Any) -> Source:
    return Source(settings_of(cache, Path("run"), crops_per_decode=each, **given), Report(True))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 20), st.integers(0, 70), st.randoms())
def test_the_order_and_the_plan(count: int, views: int, size: int, lag: int, draw: Any) -> None:
    """Every entry comes once; the buffer has each crop when its batch comes, and stays small."""
    torch.manual_seed(draw.randrange(2**31))
    order = spread(torch.randperm(count), views, lag)
    assert torch.equal(order.sort().values, torch.arange(count * views))
    if draw.random() < 0.5:  # as one of several processes
        order = order[torch.rand(len(order)) < 0.5]
    samples = (10 + 3 * torch.randperm(count)).repeat(views)
    plan = Reuse.of(order, samples, size)
    if plan is None:
        assert len(samples[order].unique()) == len(order)
        return
    assert len(plan.samples.unique()) == len(plan.samples) == len(samples[order].unique())
    assert torch.equal(samples[plan.entries], plan.samples[:, None].expand_as(plan.entries))
    most, done = plan.entries.shape[1], 0
    buffer = torch.full((plan.buffer_rows,), -1)
    for needed, place, index in zip(
        plan.loaded, plan.rows.split(size), order.split(size), strict=True
    ):
        for chunk in range(done, needed):
            crops = plan.entries[chunk * plan.chunk : (chunk + 1) * plan.chunk].flatten()
            first = plan.slots[chunk] * plan.chunk * most
            buffer[first : first + len(crops)] = crops
        done = needed
        assert torch.equal(buffer[place], index)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("far", [1, 4])
def test_the_buffer_is_bounded_and_no_image_is_twice_in_a_batch(
    views: int, far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "FAR", far)
    for count, size in ((1000, 64), (300, 48), (70, 64), (640, 10)):
        lag = choose_lag(count, views, size, 12)
        order = spread(torch.randperm(count), views, lag)
        samples = torch.arange(count).repeat(views)
        plan = Reuse.of(order, samples, size)
        assert plan is not None
        assert plan.buffer_rows * 12 <= buffer_bytes(count, views, size, 12)
        assert all(len(batch.unique()) == len(batch) for batch in samples[order].split(size))
    room = views * (views - 1) * 64 * 12
    monkeypatch.setattr(reuse, "BUFFER_BYTES", 2 * room)
    assert choose_lag(10_000, views, 64, 12) == 64 * min(2, far)
    monkeypatch.setattr(reuse, "BUFFER_BYTES", 0)
    assert choose_lag(10_000, views, 64, 12) == 64  # at least a batch


@given(st.integers(2, 200), st.integers(1, 6), st.integers(0, 50))
def test_a_group_of_epochs_shows_the_views_that_it_would_have_shown(
    count: int, each: int, group: int
) -> None:
    """Every pair of a sample and a view once in M epochs, but for the rest of the division."""
    parts = [part_of(group, number, each, count) for number in range(each)]
    together = torch.cat(parts)
    assert len(together) == len(together.unique()) == count // each * each
    assert {len(part) for part in parts} == {count // each}


def test_pieces_and_rows(photos: Path) -> None:
    """Rows and views of every entry are those of the cache; a group has each pair once."""
    cache, names = open_cache(photos), ("teacher_logits", "clip_features")
    clip = cache.read("train/clip_features")
    for each in (2, 3):
        source = source_of(photos, each)
        seen: Counter[tuple[int, int]] = Counter()
        for epoch, (rows, _) in enumerate(source.epochs(names, 1, 2 * each), 1):
            assert rows.samples is not None and len(rows) == source.entries == IMAGES // each * each
            group = (epoch - 1) // each
            for number, samples in enumerate(rows.samples.chunk(each)):
                view, part = (group * each + number) % VIEWS, slice(number * len(samples), None)
                at = slice(part.start, part.start + len(samples))
                assert torch.equal(rows.views[at], cache.slab(view).views[samples])
                logits = cache.read("train/teacher_logits", view)
                assert torch.equal(rows.rows["teacher_logits"][at], logits[samples])
                entries = torch.arange(at.start, at.stop)
                batch = rows.batch(entries, entries)
                assert torch.equal(batch["clip_features"], clip[samples].float())
                seen.update((group, view, sample) for sample in samples.tolist())  # type: ignore[misc]
        assert set(seen.values()) == {1}
        assert len(seen) == 2 * each * (IMAGES // each * each)


def test_fresh_views_of_a_group_are_those_without_reuse(photos: Path) -> None:
    """CE reads no rows: over three epochs every image has the same fresh views as before."""

    def shown(each: int) -> set[tuple[float, ...]]:
        source = source_of(photos, each, method="ce")
        found = set()
        for epoch, (rows, _) in enumerate(source.epochs([], 1, 2), 1):
            own = source.own(rows, {}, seed=7, epoch=epoch)
            samples = torch.arange(len(own)) if own.samples is None else own.samples
            found |= {
                (float(sample), *view)
                for sample, view in zip(samples.tolist(), own.views.tolist(), strict=True)
            }
        return found

    assert shown(1) == shown(2) and len(shown(2)) == 2 * IMAGES


def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count how often each image is opened in this process."""
    opened: Counter[int] = Counter()
    before = ImageFiles.photograph

    def count(self: ImageFiles, index: int, most: float = 1.0) -> Any:
        opened[index] += 1
        return before(self, index, most)

    monkeypatch.setattr(ImageFiles, "photograph", count)
    return opened


def batches(cache: Path, each: int, workers: int) -> tuple[list[Tensor], Source, list[Tensor]]:
    """Images, and the same computed entry by entry, of an epoch."""
    source = source_of(cache, each)
    trainer, names, _ = source.trainer(
        settings_of(cache, Path("run"), crops_per_decode=each, lr=0.1)
    )
    shared, _ = next(source.epochs(names.values(), 1, 1))
    rows = source.own(shared, names, 0, 1)
    inputs = source.data.train
    assert isinstance(inputs, FileInputs) and rows.samples is not None
    inputs.workers = workers
    order = trainer.order(1, rows)
    found = [images for _, images, _ in trainer.batches(order, rows)]
    plain = [
        torch.cat(
            [
                images
                for entry in ids
                for _, images in inputs.batches(entry[None], rows.views, 1, rows.samples)
            ]
        )
        for ids in order.split(4)
    ]
    return found, source, plain


@pytest.mark.parametrize("each", [2, 3])
def test_each_image_is_decoded_once(
    photos: Path, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = decoded(monkeypatch)
    found, source, plain = batches(photos, each, workers=0)
    opened.subtract(  # by the plain computation
        dict.fromkeys(opened, each)
    )
    assert set(opened.values()) == {1} and len(opened) == source.entries // each
    assert all(map(torch.equal, found, plain))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(photos: Path, workers: int) -> None:
    found, _, plain = batches(photos, 2, workers)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


@pytest.mark.slow
def test_augmented_and_mixed_views(photos: Path, tmp_path: Path) -> None:
    """They are replayed as they are without reuse; the partners are decoded besides."""
    cache = stage_one_of(
        tmp_path / "c.zarr",
        open_cache(photos).manifest["dataset"]["name"],
        "resnet8",
        teacher_weights=str(photos.parent / "t.safetensors"),
        views=2,
        augment="trivial+mix",
    )
    found, _, plain = batches(cache.path, 2, workers=0)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


@pytest.mark.parametrize("method", ["richkd", *slow("ce")])
def test_resumed_is_uninterrupted(photos: Path, tmp_path: Path, method: str) -> None:
    """After the first of three epochs, in the middle of a group."""
    whole, halves = (
        settings_of(photos, tmp_path / name, method=method, epochs=3, crops_per_decode=2)
        for name in ("whole", "halves")
    )
    distill(whole)
    source = Source(halves, Report(quiet=True))
    with StudentRun(source, halves) as run:
        rows, waited = next(source.epochs(run.rows.values(), 1, 1))
        run.train_epoch(rows, waited)
    distill(halves)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
def test_a_sweep_trains_as_one_run(
    photos: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of methods that read rows and of one that does not; and the wait for images is shown."""
    monkeypatch.chdir(tmp_path)
    shared = f"--cache {photos} --epochs 2 --batch-size 4 --crops-per-decode 2 --device cpu"
    done = run(*f"sweep {shared} --students resnet8 --methods ce,kd --seeds 2 --out s".split())
    assert done.code == 0, done.err
    for method in ("ce", "kd"):
        command = f"distill {shared} --student resnet8 --method {method} --seed 1 --out {method}"
        alone = run(*command.split())
        assert alone.code == 0, alone.err
        assert " for rows, " in alone.err and f"distill: {2 * IMAGES} images" in alone.err
        summary = json.loads(Path(method, "summary.json").read_text())
        assert summary["slab_wait_s"] >= 0 and summary["image_wait_s"] > 0
        lines = map(json.loads, Path(method, "metrics.jsonl").read_text().splitlines())
        total = sum(line["image_wait_s"] for line in lines)
        assert total == pytest.approx(summary["image_wait_s"])
        folder = next(Path("s").glob(f"*{method}-s1"))
        assert_same_run(folder, Path(method))


def test_refusals(photos: Path, store: Path, fails: Fails, tmp_path: Path) -> None:
    def distilled(cache: Path, each: int, method: str = "kd") -> Refusal:
        out = tmp_path / "refused"
        error = fails(
            *f"distill --cache {cache} --student resnet8 --method {method} --epochs 99 --out {out} "
            f"--crops-per-decode {each}".split()
        )
        assert not out.exists()
        return error

    error = distilled(photos, VIEWS + 1)
    assert error.code == "crops-beyond-views" and f"{VIEWS} views" in error
    assert distilled(store, 2).code == "crops-without-files"
    assert distilled(photos, IMAGES // 2 + 1, "ce").code == "crops-beyond-images"
    assert distilled(photos, 0).code == "value-out-of-range"
    with refuses("run-settings-differ"):
        distill(settings_of(photos, tmp_path / "run", crops_per_decode=2))
        distill(settings_of(photos, tmp_path / "run"))
    with refuses("crops-beyond-epochs", "epochs = 2"):
        distill(settings_of(photos, tmp_path / "few", crops_per_decode=3))


def test_rows_of_several_pieces(photos: Path) -> None:
    cache: TeacherCache = open_cache(photos)
    some = torch.tensor([25, 3, 3, 9])
    rows = cache.rows_of("train/teacher_logits", [(1, None), (4, some), (0, some[:1])])
    parts = [cache.read("train/teacher_logits", view) for view in (1, 4, 0)]
    assert isinstance(rows, Tensor)
    assert torch.equal(rows, torch.cat([parts[0], parts[1][some], parts[2][some[:1]]]))
    with refuses("view-out-of-range", VIEWS):
        cache.rows_of("train/teacher_logits", [(0, some), (VIEWS, some)])

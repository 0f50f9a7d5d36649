"""Stage two: the online teacher's numbers, the same bits again, resuming, and nothing loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_run, refuses, slow, tree
from safetensors.torch import load_file

import richkd
from richkd.config.settings import Distill
from richkd.core import fusion
from richkd.core.progress import Report
from richkd.data.inputs import Normalize
from richkd.distill import distill
from richkd.losses import METHODS, Batch, Task, method_class
from richkd.models.weights import load_into, read_weights
from richkd.store import pages
from richkd.training import loop
from richkd.training.run_folder import RunFolder
from richkd.training.source import Placement, Source
from richkd.training.student import with_defaults

Make = Callable[..., Path]


def train(store: Path, out: Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    given = {"student": "resnet8", "epochs": 2, "batch_size": 16, "device": "cpu", "lr": 0.02}
    return distill(Distill(cache=str(store), out=str(out), **{**given, **settings}), resume=resume)


def new_trainer(store: Path, **settings: Any) -> tuple[loop.Trainer, Any]:
    """A trainer and the rows of its first epoch."""
    given = {"student": "resnet8", "batch_size": 16, "lr": 0.02, "device": "cpu", "epochs": 2}
    chosen = Distill(cache=str(store), out="unused", **{**given, **settings})
    source = Source(chosen, Report(quiet=True))
    chosen = with_defaults(chosen, source.cache)
    trainer, rows, _ = source.trainer(chosen)
    shared, _ = next(source.epochs(rows.values(), 1, 1))
    return trainer, source.own(shared, rows, 0, 1)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BY_DEFAULT = ("ce", "crd", "kd", "richkd")


@pytest.mark.parametrize("method", [*BY_DEFAULT, *slow(*sorted({*METHODS} - {*BY_DEFAULT}))])
def test_same_command_same_bits_and_a_whole_run_folder(
    store: Path, tmp_path: Path, method: str
) -> None:
    first = train(store, tmp_path / "a", method=method)
    train(store, tmp_path / "b", method=method)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    train(store, tmp_path / "c", method=method, seed=1)
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "recipe.toml",
        "metrics.jsonl",
        "summary.json",
        "last.safetensors",
        "best.safetensors",
    }
    recipe = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert recipe["method"] == method and recipe["momentum"] == 0.9
    lines = metrics(tmp_path / "a")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(
        math.isclose(sum(line["terms"].values()), line["loss"], rel_tol=1e-6) for line in lines
    )
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == first


def test_summary_is_what_the_saved_weights_give(store: Path, tmp_path: Path) -> None:
    summary = train(store, tmp_path / "a", method="kd", epochs=4, lr=0.1)
    cache = richkd.open_cache(store)
    images, labels = cache.read("test/images"), cache.read("test/labels")
    mean, std = (torch.tensor(cache.manifest[key]) for key in ("mean", "std"))
    x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    for which in ("last", "best"):
        model = richkd.create_model("resnet8", cache.num_classes).eval()
        model.load_state_dict(load_file(tmp_path / "a" / f"{which}.safetensors"))
        with torch.no_grad():
            logits = model(x)
        top1 = (logits.argmax(1) == labels).float().mean().item()
        assert summary[f"top1_{which}"] == pytest.approx(top1)
        if which == "last":
            top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
            assert summary["top5_last"] == pytest.approx(top5)
    assert summary["top1_best"] == max(line["test_accuracy"] for line in metrics(tmp_path / "a"))
    assert summary["teacher"]["cnn"] == cache.manifest["teacher"]["accuracy"]


class CutOff(BaseException):
    pass


def interrupted(store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Train one epoch and stop."""
    saved = RunFolder.save_epoch

    def cut(self: Any, *arguments: Any) -> None:
        saved(self, *arguments)
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunFolder, "save_epoch", cut)
        train(store, out, **settings)


@pytest.mark.parametrize("method", [*slow("kd"), "richkd"])
@pytest.mark.parametrize(
    "where",
    ["in an epoch", "before the first checkpoint", "before a checkpoint", "before the summary"],
)
def test_resumed_run_ends_in_the_same_weights(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, where: str
) -> None:
    whole = train(store, tmp_path / "whole", method=method, epochs=4)
    target, after = {
        "in an epoch": ("richkd.training.loop.Trainer.end_epoch", 2),
        "before the first checkpoint": ("richkd.training.checkpoint.save_tensors", 0),
        "before a checkpoint": ("richkd.training.checkpoint.save_tensors", 2),
        "before the summary": ("richkd.training.run_folder.RunFolder.finish", 0),
    }[where]
    module, _, name = target.rpartition(".")
    original = getattr(sys.modules.get(module) or _resolve(module), name)
    count = 0

    def cut(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        if count == after:
            raise CutOff
        count += 1
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(target, cut)
        with pytest.raises(CutOff):
            train(store, tmp_path / "cut", method=method, epochs=4)
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = train(store, tmp_path / "cut", method=method, epochs=4)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(
        load_file(tmp_path / "whole" / "best.safetensors"),
        load_file(tmp_path / "cut" / "best.safetensors"),
    )
    for key in ("top1_last", "top5_last", "top1_best", "epoch_best"):
        assert resumed[key] == whole[key]
    timed = {"seconds": 0, "images_per_second": 0, "slab_wait_s": 0}
    exact = [[line | timed for line in metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert exact[0] == exact[1]


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


def in_the_loop(
    cache: Any,
    teacher: torch.nn.Module,
    method_name: str,
    steps: int,
    settings: Distill,
    similarity: torch.Tensor,
    clip_features: torch.Tensor,
) -> list[float]:
    """Plain training with the teacher run on every batch: the losses of its steps."""
    images, labels = cache.read("train/images"), cache.read("train/labels")
    view_ids = cache.read("train/view_ids")
    normalize = Normalize(cache.manifest["mean"], cache.manifest["std"], torch.device("cpu"))
    torch.manual_seed(loop.derive_seed(settings.seed, 0, 2))
    student = richkd.create_model("resnet8", cache.num_classes)
    kind, options = method_class(method_name, settings.options.get(method_name, {}))
    method = kind(
        options,
        Task(
            labels=labels,
            student_dim=64,
            teacher_dim=64,
            clip_dim=clip_features.shape[1],
            alpha=0.7,
        ),
    )
    student = student.to(memory_format=torch.channels_last)
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for epoch in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / steps))
        order = loop.epoch_order(settings.seed, epoch, len(labels))
        torch.manual_seed(loop.derive_seed(settings.seed, epoch, 1))
        x = normalize(richkd.apply_views(images[order], view_ids[epoch - 1][order]))
        with torch.no_grad():
            logits, features = richkd.forward(teacher, x)
        fused = fusion.fuse_logits(
            logits, similarity[order], 0.7, cache.manifest["clip"]["logit_scale"]
        )
        rows = {
            "target_logits": logits if method_name == "kd" else fused,
            "teacher_features": features,
            "clip_features": clip_features[order],
        }
        student.train()
        out, pooled = richkd.forward(student, x)
        loss = torch.stack(
            list(method(Batch(out, pooled, labels[order], order, rows)).values())
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.update()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("method", ["kd", "richkd"])
def test_all_views_cached_equal_the_teacher_in_the_loop(
    make_store: Make,
    shapes_teacher: Path,
    clip_dir: Path,
    tmp_path: Path,
    dtype: str,
    tolerance: float,
    method: str,
) -> None:
    """Idea 3 of the design: 50 steps, one an epoch, the same order of samples and views.

    The learning rate is one at which training is no chaos: at larger ones, a difference in the
    last bit of f32 grows as well, whether a store is involved or not.
    """
    from richkd.teachers.clip import load_clip

    path = make_store(views=162, limit=48, dtype=dtype)
    cache = richkd.open_cache(path)
    settings: dict[str, Any] = {
        "method": method,
        "epochs": 50,
        "batch_size": 48,
        "lr": 0.002,
        "schedule": "cosine",
        "options": {},
    }
    if method == "richkd":
        settings["options"] = {"richkd": {"negatives": 64}}
    train(path, tmp_path / "run", eval_every=50, **settings)
    cached = [line["loss"] for line in metrics(tmp_path / "run")]

    teacher = richkd.create_model("resnet8", cache.num_classes).eval()
    load_into(teacher, read_weights(shapes_teacher), "resnet8", shapes_teacher)
    clip = load_clip(str(clip_dir), torch.device("cpu"))
    with torch.no_grad():
        encoded = clip.model.encode_image(clip.preprocess(cache.read("train/images")))
    clip_features = torch.nn.functional.normalize(encoded, dim=-1)
    text = clip.text_embeddings(cache.manifest["class_names"], cache.manifest["prompts"])
    similarity = fusion.clip_similarity(clip_features, fusion.class_embeddings(text))
    online = in_the_loop(
        cache, teacher, method, 50, Distill(cache=str(path), **settings), similarity, clip_features
    )
    assert len(cached) == len(online) == 50
    relative = [abs(a - b) / abs(b) for a, b in zip(cached, online, strict=True)]
    print(f"largest relative difference, {method}, {dtype}: {max(relative):.2e}")
    assert max(relative) <= tolerance
    assert online[-1] < 0.95 * online[0]  # and there was something to learn


def test_another_blend_in_stage_two_trains_like_a_store_of_that_blend(
    store: Path, make_store: Make, tmp_path: Path
) -> None:
    other = make_store(alpha=0.3, scale=40.0)
    train(store, tmp_path / "derived", method="richkd-l", alpha=0.3, scale=40.0)
    train(other, tmp_path / "stored", method="richkd-l")
    for a, b in zip(metrics(tmp_path / "derived"), metrics(tmp_path / "stored"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
    train(store, tmp_path / "own", method="richkd-l")
    own = metrics(tmp_path / "own")[0]["loss"]
    assert abs(own - metrics(tmp_path / "stored")[0]["loss"]) > 0.02 * own
    with refuses("prompts-out-of-range", "[12]", 11):
        train(store, tmp_path / "x", method="richkd-l", prompts=(12,))


def test_students_see_the_cached_views_in_an_order_that_methods_share(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from richkd.data.inputs import ArrayInputs

    seen: dict[str, list[Any]] = {}
    batches = ArrayInputs.batches

    def spy(self: ArrayInputs, order: torch.Tensor, views: torch.Tensor, *rest: Any) -> Any:
        if len(order) == 48:
            seen[current].append((order.tolist(), views.tolist()))
        return batches(self, order, views, *rest)

    monkeypatch.setattr(ArrayInputs, "batches", spy)
    for current in ("ce", "kd", "richkd"):
        seen[current] = []
        train(store, tmp_path / current, method=current, epochs=4)
    assert seen["kd"] == seen["richkd"] and len(seen["kd"]) == 4
    ids = richkd.open_cache(store).read("train/view_ids").tolist()
    assert [views for _, views in seen["kd"]] == [ids[0], ids[1], ids[2], ids[0]]
    assert len({tuple(order) for order, _ in seen["kd"]}) == 4
    # ce reads no rows: the same order, and fresh views
    assert [order for order, _ in seen["ce"]] == [order for order, _ in seen["kd"]]
    assert len({tuple(views) for _, views in seen["ce"]}) == 4


def test_half_precision_is_of_the_network_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    forward = loop.forward

    def spy(model: Any, images: torch.Tensor) -> Any:
        logits, features = forward(model, images)
        seen.append((logits.dtype, features.dtype))
        return logits, features

    monkeypatch.setattr(loop, "forward", spy)
    losses = {}
    for precision in ("float32", "auto", "bfloat16"):
        train(store, tmp_path / precision, method="richkd-l", precision=precision)
        losses[precision] = metrics(tmp_path / precision)[0]["loss"]
        assert all(
            w.dtype in (torch.float32, torch.int64) for w in weights(tmp_path / precision).values()
        )
    assert seen[0] == (torch.float32, torch.float32)
    assert seen[-1] == (torch.float32, torch.bfloat16)  # the classifier computes in f32
    assert losses["auto"] == losses["float32"]  # on the CPU
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_the_wait_for_slabs_is_recorded(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = richkd.TeacherCache.rows_of

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(0.5)
        return read(self, *arguments)

    monkeypatch.setattr(richkd.TeacherCache, "rows_of", slow)
    train(store, tmp_path / "a", method="kd", epochs=3)
    waits = [line["slab_wait_s"] for line in metrics(tmp_path / "a")]
    assert waits[0] > 0.4 and all(0 <= wait < 30 for wait in waits)


def test_training_descends(make_store: Make, tmp_path: Path) -> None:
    path = make_store(limit=120)
    train(path, tmp_path / "a", method="ce", epochs=12, lr=0.05, eval_every=12)
    lines = metrics(tmp_path / "a")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert [line["test_accuracy"] is not None for line in lines] == [False] * 11 + [True]


def test_step_schedule_divides_by_ten_at_the_published_shares(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "a", method="ce", epochs=16, lr=0.05, eval_every=16)
    rates = [line["lr"] for line in metrics(tmp_path / "a")]
    expected = [0.05] * 10 + [0.005] * 2 + [0.0005] * 2 + [0.00005] * 2
    assert rates == pytest.approx(expected)


def test_milestones_say_when_the_step_schedule_divides(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "a", method="ce", epochs=5, lr=0.2, milestones=(1, 3), eval_every=5)
    rates = [line["lr"] for line in metrics(tmp_path / "a")]
    assert rates == pytest.approx([0.2, 0.02, 0.02, 0.002, 0.002])
    recorded = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert recorded["milestones"] == [1, 3]
    with refuses("run-settings-differ", "milestones was [1, 3] and is now None"):
        train(store, tmp_path / "a", method="ce", epochs=5, lr=0.2, resume=True, eval_every=5)


@pytest.mark.parametrize(("student", "lr"), [("ShuffleV2", 0.01), ("resnet8", 0.05)])
def test_the_default_learning_rate_is_the_students_and_recorded(
    store: Path, tmp_path: Path, student: str, lr: float
) -> None:
    train(store, tmp_path / "a", student=student, method="ce", lr=None, epochs=1)
    assert tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())["lr"] == lr
    assert metrics(tmp_path / "a")[0]["lr"] == lr
    train(store, tmp_path / "b", student=student, method="ce", lr=0.03, epochs=1)
    assert metrics(tmp_path / "b")[0]["lr"] == 0.03


def test_a_diverging_student_stops_with_the_epoch_and_the_setting(
    store: Path, tmp_path: Path
) -> None:
    with refuses("student-diverged", "epoch", "--lr", "1e+20"):
        train(store, tmp_path / "a", method="kd", lr=1e20, epochs=5)


def test_a_last_batch_of_one_is_dropped() -> None:
    assert len(loop.drop_lone_last(torch.arange(33), 16)) == 32
    assert len(loop.drop_lone_last(torch.arange(34), 16)) == 34
    assert len(loop.drop_lone_last(torch.arange(1), 16)) == 1


def test_bad_settings_leave_nothing(store: Path, make_store: Make, tmp_path: Path) -> None:
    for settings, code, value in (
        ({"student": "resnet9"}, "unknown-model", "resnet9"),
        ({"student": "inception_v3"}, "model-does-not-fit", "32×32"),
        ({"method": "richkdd"}, "unknown-name", "richkdd"),
        ({"options": {"richkd": {"tau": 3}}}, "unknown-option", "tau"),
        ({"device": "cuda:77"}, "device-unusable", "cuda:77"),
        ({"device": "warp"}, "device-unusable", "warp"),
        ({"prompts": (99,)}, "prompts-out-of-range", 99),
    ):
        with refuses(code, value):
            train(store, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists(), settings
    with refuses("array-absent", "--clip none"):
        train(make_store(clip="none"), tmp_path / "run", method="richkd-f")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_replaced_or_mixed(store: Path, make_store: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(store, run, method="ce", epochs=1)
    before = tree(run)
    for settings, difference in (
        ({}, "epochs was 1 and is now"),
        ({"resume": True, "method": "kd", "epochs": 1}, "method was 'ce' and is now 'kd'"),
        ({"method": "ce", "epochs": 2}, "epochs was 1 and is now 2"),
    ):
        with refuses("run-settings-differ", run, difference, "--overwrite"):
            train(store, run, **settings)
    other = make_store(seed=3)
    with refuses("run-cache-differs", run, "view_seed"):
        train(other, run, method="ce", epochs=1, resume=True)
    assert tree(run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with refuses("foreign-file", tmp_path / "mine", "--out"):
        train(store, tmp_path / "mine")
    assert tree(tmp_path / "mine") == {"notes.txt": b"precious"}


def test_an_image_folder_is_checked_against_the_store(tmp_path: Path, make_store: Make) -> None:
    import numpy as np
    from helpers import write_teacher
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "p" / part / name / f"{number}.png")
    path = make_store(
        dataset=f"imagefolder:{tmp_path / 'p'}",
        image_size=32,
        limit=None,
        teacher_weights=str(write_teacher(tmp_path / "t.safetensors", "resnet8", 2)),
    )
    options = {"richkd": {"negatives": 4}}
    train(path, tmp_path / "a", options=options)
    train(path, tmp_path / "b", options=options)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    (tmp_path / "p").rename(tmp_path / "q")
    with refuses("dataset-folder-missing", tmp_path / "p"):
        train(path, tmp_path / "c")
    train(path, tmp_path / "c", dataset=f"imagefolder:{tmp_path / 'q'}", options=options)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    (tmp_path / "q/train/cat/0.png").write_bytes(
        (tmp_path / "q/train/dog/1.png").read_bytes() + b"x"
    )
    with refuses("images-differ", path):
        train(path, tmp_path / "d", dataset=f"imagefolder:{tmp_path / 'q'}")
    for part in ("train", "val"):
        (tmp_path / "q" / part / "dog").rename(tmp_path / "q" / part / "wolf")
    with refuses("images-differ", path):
        train(path, tmp_path / "d", dataset=f"imagefolder:{tmp_path / 'q'}")


NO_TEACHER = """
import json, sys
from richkd.config.settings import Distill
from richkd.distill import distill
distill(Distill(**json.loads(sys.argv[1])))
for name in sys.modules:
    if name.split(".")[0] == "open_clip" or name.startswith("richkd.teachers"):
        sys.exit(f"{name} is loaded")
    if name in ("richkd.store.writer", "richkd.precompute"):
        sys.exit(f"{name} is loaded")
"""


def test_stage_two_loads_no_teacher(store: Path, tmp_path: Path) -> None:
    settings = {"cache": str(store), "student": "resnet8", "method": "richkd", "epochs": 1}
    settings |= {"device": "cpu", "out": str(tmp_path / "run"), "batch_size": 16}
    words = [sys.executable, "-W", "error", "-c", NO_TEACHER, json.dumps(settings)]
    subprocess.run(words, check=True)


def test_rows_on_the_disk_or_on_the_host_change_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {
        "cache": str(store),
        "student": "resnet8",
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
        "options": {"richkd": {"negatives": 8}},
    }
    mapped: list[int] = []
    plain = pages._mapped_file
    monkeypatch.setattr(pages, "_mapped_file", lambda n: mapped.append(n) or plain(n))
    cases = [("richkd", {}), ("richkd", {"alpha": 0.4}), ("kd", {"target": "clip"})]
    for number, (method, own) in enumerate(cases):
        settings = {**common, "method": method, **own}

        def run(where: str, settings: dict[str, Any] = settings, number: int = number) -> Path:
            out = tmp_path / f"{where}{number}"
            distill(Distill(**settings, out=str(tmp_path / "run")))
            return (tmp_path / "run").rename(out)

        memory = run("memory")
        assert mapped == []
        with monkeypatch.context() as patch:
            patch.setattr(pages, "available_memory", lambda: 0)
            patch.setattr("richkd.core.memory.ROWS_AT_ONCE", 7)
            assert_same_run(run("disk"), memory)
        slab = 48 * 64 * 2 if method == "richkd" else 0  # resnet8's features
        assert slab in mapped or not slab
        assert len(mapped) > 2
        mapped.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Source, "_place", lambda *_: Placement(on_disk=False, on_host=True))
            assert_same_run(run("host"), memory)


def test_where_rows_lie_depends_on_what_is_free(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(Distill(cache=str(store), device="cpu", alpha=0.4), Report(quiet=True))
    n, c, f = 48, source.cache.num_classes, 64
    blend, _ = source.target(source.settings, "fused")
    slab, fixed = 2 * n * (c + f) + 4 * n * c, 2 * n * 24  # logits, features, blend; CLIP's
    memory, gpu = [0], [0]
    monkeypatch.setattr(pages, "available_memory", lambda: memory[0])
    monkeypatch.setattr("richkd.training.source.free_memory", lambda _: gpu[0])

    def place(free: int, free_on_gpu: int | None = None) -> tuple[bool, bool]:
        memory[0], gpu[0] = free, free_on_gpu or 0
        source.device = torch.device("cpu" if free_on_gpu is None else "cuda")
        found = source._place([blend, "teacher_features"], ["clip_features"])
        return found.on_disk, found.on_host

    assert place(4 * slab) == (False, False)
    assert place(4 * slab - 1) == (True, False)
    assert place(4 * slab, 2 * (slab + fixed)) == (False, False)
    assert place(4 * slab, 2 * (slab + fixed) - 1) == (False, True)
    assert place(4 * slab - 1, 2 * (slab + fixed)) == (True, True)

"""Stage one: every stored row is right, and an interrupted run resumes to the same cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses, tree, write_clip, write_teacher

import richkd
from richkd.config.settings import Images
from richkd.core import fusion
from richkd.core.errors import RichKDError
from richkd.data.datasets import load_dataset
from richkd.data.prompts import load_prompts
from richkd.data.shapes import CLASS_NAMES
from richkd.models.weights import file_sha256, load_into, read_weights
from richkd.store import schema
from richkd.store.writer import StoreWriter
from richkd.teachers.clip import load_clip

Make = Callable[..., Path]


def test_every_training_row_is_the_teachers_forward_pass(store: Path, shapes_teacher: Path) -> None:
    cache = richkd.open_cache(store)
    dataset = load_dataset(Images(dataset="shapes", limit=48))
    model = richkd.create_model("resnet8", cache.num_classes).eval()
    load_into(model, read_weights(shapes_teacher), "resnet8", shapes_teacher)
    mean, std = (torch.tensor(cache.manifest[key]) for key in ("mean", "std"))
    images = dataset.train.images
    assert isinstance(images, torch.Tensor)
    assert torch.equal(cache.read("train/images"), images)
    for v in range(cache.num_views):
        slab = cache.slab(v)
        assert slab.view_ids is not None
        assert slab.teacher_logits is not None and slab.teacher_features is not None
        for i in range(0, 48, 5):
            view = richkd.apply_views(images[i : i + 1], slab.view_ids[i : i + 1])
            x = ((view.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            with torch.no_grad():
                logits, features = richkd.forward(model, x)
            # half a unit in the last place of f16, and the noise of f32 arithmetic
            for stored, true in (
                (slab.teacher_logits[i], logits[0]),
                (slab.teacher_features[i], features[0]),
            ):
                torch.testing.assert_close(stored.float(), true, rtol=2**-11, atol=2e-5)


@pytest.mark.slow
def test_view_ids_never_repeat(make_store: Make) -> None:
    cache = richkd.open_cache(make_store(views=162, limit=20))
    ids = cache.read("train/view_ids")
    assert all(sorted(ids[:, i].tolist()) == list(range(162)) for i in range(20))


def test_clip_parts_and_blend(store: Path, clip_dir: Path) -> None:
    cache = richkd.open_cache(store)
    clip = load_clip(str(clip_dir), torch.device("cpu"))
    text = clip.text_embeddings(cache.manifest["class_names"], load_prompts("richkd"))
    torch.testing.assert_close(cache.text_embeddings, text)
    for split in ("train", "test"):
        pixels = clip.preprocess(cache.read(f"{split}/images"))
        with torch.no_grad():
            features = F.normalize(clip.model.encode_image(pixels), dim=-1)
        stored = cache.read(f"{split}/clip_features")
        torch.testing.assert_close(stored.float(), features, rtol=2**-11, atol=1e-5)
        cosines = (features.double() @ fusion.class_embeddings(text).double().T).float()
        torch.testing.assert_close(
            cache.read(f"{split}/clip_similarity"), cosines, rtol=0, atol=1e-5
        )
    for v in range(3):
        slab = cache.slab(v)
        assert slab.teacher_logits is not None and slab.fused_logits is not None
        blend = (
            0.7 * slab.teacher_logits.double()
            + 0.3 * clip.logit_scale * cache.read("train/clip_similarity").double()
        )
        torch.testing.assert_close(slab.fused_logits.double(), blend, rtol=2e-3, atol=2e-3)


def test_stored_accuracies_match_a_recount(store: Path, shapes_teacher: Path) -> None:
    cache = richkd.open_cache(store)
    labels = cache.read("test/labels").numpy()

    def recount(name: str) -> float:
        return float((cache.read(f"test/{name}").numpy().argmax(1) == labels).mean())

    manifest = cache.manifest
    assert manifest["clip"] is not None
    assert manifest["teacher"]["accuracy"] == pytest.approx(recount("teacher_logits"))
    assert manifest["clip"]["accuracy"] == pytest.approx(recount("clip_similarity"))
    assert manifest["fused_accuracy"] == pytest.approx(recount("fused_logits"))
    assert manifest["teacher"]["sha256"] == file_sha256(shapes_teacher)
    assert manifest["recipe"]["views"] == 3 and manifest["versions"]["torch"]


@pytest.mark.parametrize(
    "blend",
    [
        {"alpha": 0.25},
        {"scale": "raw"},
        {"scale": 3.5, "alpha": 0.5},
        {"alpha": 0.0},
        {"prompts": [0, 7, 4]},
    ],
)
def test_another_blend_equals_stage_one_with_those_settings(
    store: Path, make_store: Make, tmp_path: Path, blend: dict[str, Any]
) -> None:
    settings = dict(blend)
    if "prompts" in blend:
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(load_prompts("richkd")[p] for p in blend["prompts"]))
        settings["prompts"] = str(file)
    other = richkd.open_cache(make_store(**settings))
    cache = richkd.open_cache(store)
    for v in range(3):
        derived, stored = cache.fuse(v, **blend), other.slab(v).fused_logits
        assert stored is not None
        # f16: half a unit for the stored blend, and for each of its two parts
        torch.testing.assert_close(derived, stored.float(), rtol=2**-9, atol=5e-3)
        assert (derived - cache.fuse(v)).abs().max() > 0.01  # and it is another blend


def test_fuse_with_the_stores_own_settings(store: Path) -> None:
    cache = richkd.open_cache(store)
    stored = cache.slab(1).fused_logits
    assert stored is not None
    torch.testing.assert_close(cache.fuse(1), stored.float(), rtol=2**-9, atol=5e-3)
    for bad in ({"alpha": 1.5}, {"scale": 0.0}, {"prompts": [12]}, {"prompts": []}):
        with pytest.raises(RichKDError, match=next(iter(bad))):
            cache.fuse(1, **bad)  # type: ignore[arg-type]


def test_dtype_float32_stores_what_was_computed(make_store: Make) -> None:
    cache = richkd.open_cache(make_store(dtype="float32"))
    slab = cache.slab(0)
    assert slab.teacher_logits is not None and slab.teacher_logits.dtype == torch.float32
    torch.testing.assert_close(cache.fuse(0), slab.fused_logits, rtol=1e-6, atol=1e-5)


def test_without_clip(make_store: Make) -> None:
    cache = richkd.open_cache(make_store(clip="none"))
    slab = cache.slab(0)
    assert slab.teacher_logits is not None and slab.fused_logits is None
    assert cache.manifest["clip"] is None and cache.manifest["prompts"] == []
    with refuses("array-absent", "clip_similarity", "--clip none"):
        cache.fuse(0)
    with refuses("array-absent", "fused_logits", "--clip none"):
        cache.slab(0, ["fused_logits"])


class CutOff(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_interrupted_and_resumed_is_the_same_cache(
    make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = tree(make_store(block=16, out=str(tmp_path / "whole.zarr")))
    out = str(tmp_path / "cut.zarr")
    write, count = StoreWriter.write, 0

    def cut(self: StoreWriter, *arguments: Any) -> None:
        nonlocal count
        if count == after:
            raise CutOff
        count += 1
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", cut)
        with pytest.raises(CutOff):
            make_store(block=16, out=out)
    with refuses("cache-incomplete", out, "richkd precompute"):
        richkd.open_cache(out)
    written: list[str] = []

    def spy(self: StoreWriter, block: schema.Block, rows: Any) -> None:
        written.append(block.name)
        write(self, block, rows)

    monkeypatch.setattr(StoreWriter, "write", spy)
    make_store(block=16, out=out)
    assert len(written) == len(set(written)) == 3 + 3 * 4 - after  # nothing twice
    resumed = tree(Path(out))
    different = {name for name in whole if whole[name] != resumed.get(name)}
    assert whole.keys() == resumed.keys() and different <= {"zarr.json"}  # its recipe names `out`


def test_resuming_with_other_settings_is_refused(
    make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "cut.zarr")

    def cut(*_: object) -> None:
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", cut)
        with pytest.raises(CutOff):
            make_store(out=out)
    before = tree(Path(out))
    other_teacher = write_teacher(tmp_path / "t.safetensors", "resnet8", len(CLASS_NAMES), seed=9)
    for settings, values in (
        ({"views": 4}, ("views.count", "3", "4")),
        ({"alpha": 0.5}, ("alpha", "0.7", "0.5")),
        ({"limit": 40}, ("dataset.fingerprint",)),
        ({"seed": 1}, ("views.seed", "0", "1")),
        ({"teacher_weights": str(other_teacher)}, ("teacher.sha256",)),
        ({"clip": str(write_clip(tmp_path / "clip", seed=5))}, ("clip.",)),
    ):
        with refuses("cache-settings-differ", out, *values):
            make_store(out=out, **settings)
        assert tree(Path(out)) == before
    assert richkd.open_cache(make_store(out=out)).num_views == 3


def test_what_is_there_is_not_replaced_unasked(
    make_store: Make, store: Path, tmp_path: Path
) -> None:
    before = tree(store)
    make_store(out=str(store))
    with refuses("cache-settings-differ", store, "views", "3", "2", "--overwrite"):
        make_store(out=str(store), views=2)
    assert tree(store) == before
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "a.jpg").write_text("precious")
    from richkd.config.settings import Precompute
    from richkd.precompute import precompute

    for overwrite in (False, True):
        with refuses("foreign-file", mine, "--out"):
            precompute(Precompute(dataset="shapes", out=str(mine)), overwrite=overwrite)
    assert tree(mine) == {"a.jpg": b"precious"}


def test_a_disk_with_too_little_room(
    make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with refuses("disk-too-small", "KiB", "1000 bytes", "--views"):
        make_store(out=str(tmp_path / "s.zarr"))
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_gives_nan_stops_stage_one(
    make_store: Make, shapes_teacher: Path, tmp_path: Path
) -> None:
    from richkd.models.weights import save_tensors

    weights = read_weights(shapes_teacher)
    weights["fc.bias"][2] = float("nan")
    save_tensors(tmp_path / "nan.safetensors", weights)
    with refuses("rows-not-finite", "teacher_logits of test"):
        make_store(out=str(tmp_path / "s.zarr"), teacher_weights=str(tmp_path / "nan.safetensors"))
    with refuses("cache-incomplete"):
        richkd.open_cache(tmp_path / "s.zarr")


def test_an_image_folder_goes_through_stage_one(
    tmp_path: Path, clip_dir: Path, make_store: Make
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(40, 80, 2), 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "p" / part / name / f"{number}.jpg")
    weights = write_teacher(tmp_path / "t.safetensors", "resnet8", 2)
    path = make_store(
        dataset=f"imagefolder:{tmp_path / 'p'}",
        image_size=32,
        limit=None,
        teacher_weights=str(weights),
        out=str(tmp_path / "s.zarr"),
    )
    cache = richkd.open_cache(path)
    assert cache.manifest["dataset"]["embedded"] is False
    assert cache.manifest["class_names"] == ["cat", "dog"]
    slab = cache.slab(0)
    assert slab.view_params is not None and slab.view_params.shape == (10, 5)
    clip = load_clip(str(clip_dir), torch.device("cpu"))
    files = load_dataset(Images(dataset=f"imagefolder:{tmp_path / 'p'}", image_size=32)).train
    from richkd.data.datasets import ImageFiles

    assert isinstance(files.images, ImageFiles)
    with torch.no_grad():
        one = clip.model.encode_image(clip.transform(files.images.open(3))[None])
    stored = cache.read("train/clip_features")[3].float()
    torch.testing.assert_close(stored, F.normalize(one, dim=-1)[0], atol=1e-3, rtol=1e-2)


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gigabytes", "batches"),
    [(80, [2048, 512, 256, 256]), (16, [1024, 256, 256, 256]), (2, [256, 256, 256, 256])],
)
def test_batches_are_larger_on_a_gpu_where_images_are_small(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, batches: list[int]
) -> None:
    from richkd.teachers.rows import forward_batch

    found = type("Properties", (), {"total_memory": gigabytes * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert [forward_batch(cpu, side) for side in (8, 32, 224)] == [256, 256, 256]
    assert [forward_batch(cuda, side) for side in (32, 64, 96, 224)] == batches


def test_the_batch_that_was_taken_is_recorded_and_told_ones_count(
    make_store: Make, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from richkd.teachers.cnn import CNNTeacher

    asked: list[int] = []
    rows = CNNTeacher.rows
    monkeypatch.setattr(CNNTeacher, "rows", lambda *a: asked.append(len(a[1])) or rows(*a))
    chosen = make_store(views=1)
    assert asked == [40, 48]  # the preview's batch is the test split's, and not asked for again
    asked.clear()
    told = make_store(views=1, batch_size=20)
    assert asked == [20, 20, 20, 20, 8]
    recorded = [richkd.open_cache(path).manifest["recipe"]["batch_size"] for path in (chosen, told)]
    assert recorded == [256, 20]
    # one store goes on, is complete and is mended with other batches
    (chosen / "train/teacher_logits/c/0/0/0").unlink()
    assert run("repair", chosen).code == 0
    assert run("verify", chosen).code == 0


@pytest.mark.parametrize("batch_size", [None, 8, 16, 17, 40, 64])
def test_what_the_preview_computed_is_what_the_split_would_have(
    make_store: Make, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    """With and without it the bytes are the same, whatever the blocks and batches are."""
    from richkd.teachers.rows import Preview

    stores = [make_store(views=1, batch_size=batch_size, block=32)]
    monkeypatch.setattr(Preview, "of", lambda self, block, batch: Preview())
    stores.append(make_store(views=1, batch_size=batch_size, block=32))
    kept, anew = (
        {name: content for name, content in tree(path).items() if name != "zarr.json"}
        for path in stores
    )
    assert kept == anew


# --- CLIP's precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_clip_in_less_precision_with_its_error(
    store: Path, make_store: Make, clip_dir: Path, run: Callable[..., Any], precision: str
) -> None:
    path = make_store(clip_precision=precision)
    manifest = richkd.open_cache(path).manifest
    assert manifest["clip"] is not None and manifest["clip"]["precision"] == precision
    assert manifest["recipe"]["clip_precision"] == precision
    # the error by another reading: in double, from weights and images
    clip = load_clip(str(clip_dir), torch.device("cpu"))
    exact, cache = richkd.open_cache(store), richkd.open_cache(path)
    classes = fusion.class_embeddings(cache.text_embeddings).double()
    assert torch.equal(cache.text_embeddings, exact.text_embeddings)  # texts are in float32
    with torch.no_grad():
        pixels = clip.preprocess(cache.read("test/images"))
        features = F.normalize(clip.model.encode_image(pixels).double(), dim=-1)
    right, found = features @ classes.T, cache.read("test/clip_similarity").double()
    error = manifest["clip"]["precision_error"]
    assert error["images"] == len(found) == 40
    assert error["cosine_max"] == pytest.approx((found - right).abs().max().item(), abs=1e-6)
    assert error["cosine_mean"] == pytest.approx((found - right).abs().mean().item(), abs=1e-6)
    same = (found.argmax(1) == right.argmax(1)).double().mean().item()
    assert error["same_class"] == pytest.approx(same, abs=1e-6)
    assert 0 < error["cosine_mean"] < error["cosine_max"] < 0.05
    assert not torch.equal(found, exact.read("test/clip_similarity").double())
    for name in ("train/teacher_logits", "test/teacher_features"):
        assert torch.equal(cache.read(name), exact.read(name))  # the CNN teacher is as before
    said = f"{precision}: on 40 test images cosines are within {error['cosine_max']:.1e} of float32"
    for command in ("verify", "inspect"):
        shown = " ".join(run(command, path).out.split())
        assert f"{precision}: on 40 test images" in shown and said[:40] in shown, shown
    # what is damaged is computed again in the same precision
    before = tree(path)
    (path / "train/clip_features/c/0/0").unlink()
    assert run("repair", path).code == 0
    assert tree(path) == before


def test_stores_in_float32_say_nothing_of_precision(store: Path, run: Callable[..., Any]) -> None:
    manifest = richkd.open_cache(store).manifest
    assert manifest["clip"] is not None
    assert not {"precision", "precision_error"} & manifest["clip"].keys()
    assert "clip_precision" not in manifest["recipe"]
    assert "float32" in run("inspect", store).out


def test_another_clip_precision_is_another_store(
    make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise CutOff

    for first, second in (("float32", "bfloat16"), ("bfloat16", "float32")):
        out = str(tmp_path / f"{first}.zarr")
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write", cut)
            with pytest.raises(CutOff):
                make_store(out=out, clip_precision=first)
        with refuses("cache-settings-differ", "clip.precision", first, second):
            make_store(out=out, clip_precision=second)
        make_store(out=out, clip_precision=first)  # it goes on
        make_store(out=out, clip_precision=first)  # it is complete
        with refuses("cache-settings-differ", "clip_precision", first, second):
            make_store(out=out, clip_precision=second)


def test_precisions_that_do_not_exist_or_are_not_there(
    fails: Callable[..., str], make_store: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fails("precompute", "--dataset", "shapes", "--clip-precision", "float8")
    assert "'float8'" in line
    assert all(name in line for name in ("float32", "bfloat16", "float16"))

    def lacks(device: str, dtype: torch.dtype) -> None:
        raise RuntimeError(f"{device} does not support {dtype}.\nAt all.")

    monkeypatch.setattr(torch, "autocast", lacks)
    with refuses(
        "clip-precision-unsupported", "bfloat16", "cpu does not support torch.bfloat16", "float32"
    ):
        make_store(clip_precision="bfloat16")

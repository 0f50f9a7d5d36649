"""The teacher sees images as it was trained: against plain timm pipelines, and who says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import changed, refuses, slow, tree
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import functional as pil

import richkd
from richkd.config.settings import Distill, Images, Precompute
from richkd.core.progress import Report
from richkd.data.datasets import Dataset, load_dataset
from richkd.data.framing import Framing, NetworkInput, input_fault
from richkd.data.inputs import FileInputs
from richkd.distill import distill
from richkd.models import pretrained_input
from richkd.models.weights import read_note, read_weights, save_tensors
from richkd.precompute import QUIET, StageOne, precompute
from richkd.store import schema
from richkd.store.checksums import write_sealed
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.writer import ALONE
from richkd.teachers.find import Finder, training_settings
from richkd.teachers.framing import resolve_input
from richkd.training.identity import RunIdentity

Run = Callable[..., Any]
Fails = Callable[..., str]
CPU = torch.device("cpu")
CLASSES, SIDE = 4, 32
# families and constants: a transformer of 160 px (0.5), a ResNet (0.5, bilinear), an EfficientNet
# (ImageNet's), a MobileViT of 256 px (0 and 1)
NETWORKS = ("test_vit", "test_resnet", "test_efficientnet", "mobilevit_xxs")


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> str:
    """A folder of photographs in odd sizes: smooth fields of colour, with some noise."""
    for split, count in (("train", 5), ("val", 8)):
        for c in range(CLASSES):
            folder = tmp_path / "photos" / split / f"c{c}"
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = map(int, rng.integers(40, 300, 2))
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
                field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), int)
                pixels = (field + rng.integers(-20, 21, field.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    return f"imagefolder:{tmp_path / 'photos'}"


def photo_set(name: str, size: int = SIDE) -> Dataset:
    return load_dataset(Images(dataset=name, image_size=size))


def opened(dataset: Dataset, split: str, index: int) -> Image.Image:
    files: Any = getattr(dataset, split).images
    return Image.open(files.name(index)).convert("RGB")


def from_elsewhere(name: str, path: Path, **settings: Any) -> tuple[nn.Module, Path]:
    """A timm network as somebody else would have trained it, and its weights."""
    model = timm.create_model(name, num_classes=CLASSES, **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
        for parameter in model.get_classifier().parameters():
            parameter.normal_()
    save_tensors(path, model.state_dict())
    return model.eval(), path


def plain(model: nn.Module, image: Image.Image, **other: Any) -> Tensor:
    """Logits by a plain timm pipeline of the network's own configuration."""
    config = {**resolve_data_config({}, model=model), **other}  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits: Tensor = model(create_transform(**config)(image)[None])[0]
    return logits


def stage_one(out: Path, dataset: str, teacher: str, weights: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "clip": "none",
        "views": 2,
        "device": "cpu",
        "dtype": "float32",
        **({} if dataset == "shapes" else {"image_size": SIDE}),
    }
    return precompute(
        Precompute(
            dataset=dataset,
            teacher=teacher,
            teacher_weights=str(weights),
            out=str(out),
            **{**given, **settings},
        )
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("name", [*NETWORKS[:1], *slow(*NETWORKS[1:])])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_of_a_plain_timm_pipeline(
    photos: str, tmp_path: Path, name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RICHKD_WORKERS", str(workers))
    model, weights = from_elsewhere(name, tmp_path / "w.safetensors")
    dtype = "float16" if workers else "float32"
    cache = stage_one(tmp_path / "s.zarr", photos, name, weights, dtype=dtype)
    dataset, entry = photo_set(photos), cache.manifest["teacher"]["input"]
    config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    assert entry["size"] == config["input_size"][1] > SIDE == cache.manifest["image_size"]
    assert tuple(entry["mean"]) == config["mean"] and tuple(entry["std"]) == config["std"]
    assert tuple(cache.manifest["mean"]) == dataset.mean  # the students'

    true = torch.stack([plain(model, opened(dataset, "test", i)) for i in range(len(dataset.test))])
    close(cache.read("test/teacher_logits"), true)
    accuracy = (true.argmax(1) == dataset.test.labels).float().mean().item()
    if not workers:  # f16 may decide a tie
        assert cache.manifest["teacher"]["accuracy"] == pytest.approx(accuracy, abs=1e-3)

    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    resample = Image.Resampling[config["interpolation"].upper()]
    size = config["input_size"][1:]
    for v in range(cache.num_views):
        slab = cache.slab(v)
        for i in range(0, len(dataset.train), 7):
            top, left, height, width, flip = slab.views[i].int().tolist()
            crop = opened(dataset, "train", i).crop((left, top, left + width, top + height))
            crop = crop.resize(size, resample)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
            with torch.no_grad():
                logits, features = richkd.forward(model, ((pil.to_tensor(crop) - mean) / std)[None])
            close(slab.teacher_logits[i], logits[0])
            close(slab.teacher_features[i], features[0])


def test_clip_and_the_teacher_each_see_their_own(
    photos: str, tmp_path: Path, clip_dir: Path
) -> None:
    """One decode gives both; CLIP's rows are those of a store by another teacher."""
    _, weights = from_elsewhere("test_vit", tmp_path / "vit.safetensors")
    _, other = from_elsewhere("resnet8", tmp_path / "resnet8.safetensors")
    caches = [
        stage_one(tmp_path / f"{name}.zarr", photos, name, file, clip=str(clip_dir))
        for name, file in (("test_vit", weights), ("resnet8", other))
    ]
    for name in ("train/clip_features", "test/clip_features", "train/view_params"):
        assert torch.equal(*(cache.read(name) for cache in caches))
    alone = stage_one(tmp_path / "alone.zarr", photos, "test_vit", weights)
    for name in ("train/teacher_logits", "test/teacher_logits"):
        close(caches[0].read(name), alone.read(name))


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("crop", [1.0, 0.95, 0.875, 1.15])
def test_the_evaluation_view_is_timms_to_the_bit(
    rng: np.random.Generator, mode: str, interpolation: str, crop: float
) -> None:
    height, width = map(int, rng.integers(20, 200, 2))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    framing = Framing(size=57, crop=crop, interpolation=interpolation, crop_mode=mode)
    transform: Any = create_transform(
        (3, 57, 57),
        crop_pct=crop,
        crop_mode=mode,
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    assert torch.equal(framing.clean(image)[0].permute(2, 0, 1) / 255, transform(image))
    if interpolation == "nearest":
        return  # which of two pixels is nearer is decided by the last bit
    # images of an array are resized in batches, without PIL's rounding after the rows
    square = Image.fromarray(rng.integers(40, 216, (4, 4, 3), np.uint8)).resize((32, 32))
    batch = torch.from_numpy(np.array(square))[None]
    found = framing.of_array(batch, clean=True)[0].permute(2, 0, 1) / 255
    assert (found - transform(square)).abs().max() <= 1.5 / 255
    whole = pil.to_tensor(square.resize((57, 57), Image.Resampling[interpolation.upper()]))
    found = framing.of_array(batch, clean=False)[0].permute(2, 0, 1) / 255
    assert (found - whole).abs().max() <= 1.5 / 255


def test_own_framing_of_an_array_and_of_a_file_are_alike(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
    for size, crop in ((40, 1.0), (24, 0.875), (64, 0.5)):
        framing = Framing(size=size, crop=crop)
        of_file = framing.clean(Image.fromarray(pixels)).int()
        of_array = framing.of_array(torch.from_numpy(pixels)[None], clean=True).int()
        assert (of_file - of_array).abs().max() <= 1
        if crop == 1.0:
            assert torch.equal(of_array[0], torch.from_numpy(pixels).int())


# --- who says so ---------------------------------------------------------------------------------


@pytest.fixture
def shapes_folder(tmp_path: Path) -> str:
    """The images of `shapes` as files."""
    dataset = load_dataset(Images(dataset="shapes", limit=48))
    for name, split in (("train", dataset.train), ("val", dataset.test)):
        images: Any = split.images
        for number, (image, label) in enumerate(zip(images.numpy(), split.labels, strict=True)):
            folder = tmp_path / "shapes" / name / f"c{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:04}.png")
    for c in range(16):  # few test images may leave out a class
        for name in ("train", "val"):
            (tmp_path / "shapes" / name / f"c{c:02}").mkdir(parents=True, exist_ok=True)
    return f"imagefolder:{tmp_path / 'shapes'}"


def test_a_teacher_of_arrays_keeps_its_accuracy_on_the_same_images_in_a_folder(
    run: Run, shapes_folder: str, tmp_path: Path
) -> None:
    """Whether its file says how it was trained, earlier versions wrote it, or the flags say it."""
    own = tmp_path / "own.safetensors"
    assert (
        run(
            "train-teacher",
            "--dataset",
            "shapes",
            "--limit",
            48,
            "--model",
            "resnet8",
            "--epochs",
            2,
            "--device",
            "cpu",
            "--out",
            own,
        ).code
        == 0
    )
    note, tensors = read_note(own), read_weights(own)
    assert json.loads(note["class_names"])[0] == "solid circle"
    shapes = load_dataset(Images(dataset="shapes", limit=48))
    assert NetworkInput.of_note(note) == shapes.network_input
    earlier = tmp_path / "earlier.safetensors"
    kept = {key: note[key] for key in ("model", "dataset", "fingerprint", "epochs", "seed")}
    save_tensors(earlier, tensors, kept)
    elsewhere = tmp_path / "elsewhere.pth"
    torch.save(tensors, elsewhere)

    on_arrays = stage_one(tmp_path / "arrays.zarr", "shapes", "resnet8", own, limit=48)
    found = load_dataset(Images(dataset=shapes_folder, image_size=SIDE), decoded=False)
    files: Any = found.test.images
    true = on_arrays.read("test/teacher_logits")[
        [int(Path(files.name(i)).stem) for i in range(len(files))]
    ]
    flags = {"teacher_mean": shapes.mean, "teacher_std": shapes.std, "teacher_crop": 1}
    for name, weights, given in (
        ("own", own, {"teacher_classes": "sorted"}),  # whose classes have other names
        ("earlier", earlier, {}),
        ("elsewhere", elsewhere, flags),
    ):
        cache = stage_one(tmp_path / f"{name}.zarr", shapes_folder, "resnet8", weights, **given)
        torch.testing.assert_close(cache.read("test/teacher_logits"), true)
        accuracies = [each.manifest["teacher"]["accuracy"] for each in (cache, on_arrays)]
        assert accuracies[0] == accuracies[1]
        assert cache.manifest["mean"] != list(shapes.mean)  # the students'
    unsaid = stage_one(tmp_path / "unsaid.zarr", shapes_folder, "resnet8", elsewhere)
    far = (unsaid.read("test/teacher_logits") - true).abs().max()
    assert far > 0.1, "constants and crop make no difference to this network"


def test_who_is_asked_first(photos: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its file, then a tag, then flags over timm's configuration or the dataset's."""
    photographs = photo_set(photos)
    arrays = load_dataset(Images(dataset="shapes", limit=8))
    weights = tmp_path / "w.safetensors"

    def asked(dataset: Dataset, teacher: str, **given: Any) -> tuple[NetworkInput, str]:
        settings = Precompute(dataset="shapes", teacher=teacher, **given)
        capfd.readouterr()
        found = resolve_input(settings, weights, dataset, Report())
        return found, capfd.readouterr().err

    from_elsewhere("test_resnet", weights)
    timms = pretrained_input("test_resnet")
    assert timms is not None and timms.size == 160
    found, said = asked(photographs, "test_resnet")
    assert found == timms
    flags = [f"--teacher-{name}" for name in ("size", "mean", "std", "crop", "interpolation")]
    for value in (timms, "timm", "test_resnet", "32", *flags):
        assert str(value) in said
    assert (
        str(timms) == ("160×160, crop 95 %, bilinear, mean 0.5,0.5,0.5, std 0.5,0.5,0.5")
        and said.count("\n") == 1
    )
    assert asked(arrays, "test_resnet")[0] == arrays.network_input
    for dataset in (photographs, arrays):
        found, said = asked(dataset, "test_resnet.r160_in1k")
        assert found == timms and "--teacher-size" not in said
    given: dict[str, Any] = {
        "teacher_size": 48,
        "teacher_mean": 0,
        "teacher_std": (1,),
        "teacher_crop": 0.5,
        "teacher_interpolation": "nearest",
    }
    wanted = {
        "size": 48,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "crop": 0.5,
        "interpolation": "nearest",
    }
    found, said = asked(photographs, "test_resnet", **given)
    assert found == replace(timms, **wanted)  # type: ignore[arg-type]
    assert str(found) in said
    found, _ = asked(arrays, "resnet8", **given)
    assert found == replace(arrays.network_input, **wanted)  # type: ignore[arg-type]
    assert asked(photographs, "resnet8")[0] == photographs.network_input

    # position embeddings tell the size that a transformer was trained at
    for size in (160, SIDE):
        from_elsewhere("test_vit", weights, img_size=size)
        assert asked(photographs, "test_vit")[0].size == size
        four = replace(arrays, class_names=photographs.class_names)
        assert asked(four, "test_vit")[0].size == size


def test_a_student_of_a_run_is_a_teacher_that_says_itself_what_it_takes(
    photos: str, store: Path, tmp_path: Path
) -> None:
    """And runs of stores that differ in what the teacher sees are not compared."""
    run = tmp_path / "run"
    distill(
        Distill(
            cache=str(store), student="resnet8", method="kd", epochs=1, device="cpu", out=str(run)
        )
    )
    shapes = load_dataset(Images(dataset="shapes", limit=4))
    settings = Precompute(dataset=photos, teacher="resnet8")
    for name in ("last", "best"):
        weights = run / f"{name}.safetensors"
        assert resolve_input(settings, weights, photo_set(photos), QUIET) == shapes.network_input
    with refuses("teacher-input-known", "--teacher-size", weights):
        resolve_input(replace(settings, teacher_size=64), weights, photo_set(photos), QUIET)
    (run / "summary.json").write_text("{}")
    with refuses("summary-damaged", run / "summary.json"):
        resolve_input(settings, weights, photo_set(photos), QUIET)

    cache = richkd.open_cache(store)
    was = RunIdentity.of(cache)
    del cache.manifest["teacher"]["input"]
    assert RunIdentity.of(cache) == was
    cache.manifest["teacher"]["input"] = replace(shapes.network_input, crop=0.5).entry
    assert RunIdentity.of(cache) != was


def test_bad_input(photos: str, run: Run, fails: Fails, tmp_path: Path) -> None:
    _, weights = from_elsewhere("test_resnet", tmp_path / "w.safetensors")
    own = tmp_path / "own.safetensors"
    note = photo_set(photos).network_input.note
    save_tensors(own, read_weights(weights), {"fingerprint": "0", **note})
    damaged = tmp_path / "damaged.safetensors"
    save_tensors(damaged, read_weights(weights), {"fingerprint": "0", **note, "std": "[0, 1]"})
    common = (
        "precompute",
        "--dataset",
        photos,
        "--image-size",
        SIDE,
        "--clip",
        "none",
        "--device",
        "cpu",
        "--out",
        tmp_path / "s.zarr",
    )
    named = (*common, "--teacher", "test_resnet")
    given = (*named, "--teacher-weights", weights)
    malformed, limits = "value-malformed", "value-out-of-range"
    for arguments, code, *values in (
        (
            (*named, "--teacher-weights", own, "--teacher-mean", "0.5"),
            "teacher-input-known",
            "--teacher-mean",
            own,
        ),
        (
            (
                *common,
                "--teacher",
                "test_resnet.r160_in1k",
                "--teacher-weights",
                weights,
                "--teacher-crop",
                "1",
            ),
            "teacher-input-known",
            "--teacher-crop",
            "test_resnet.r160_in1k",
        ),
        ((*named, "--teacher-size", "64"), "teacher-input-not-needed", "--teacher-size"),
        ((*named, "--teacher-weights", damaged), "weights-metadata-damaged", damaged),
        ((*given, "--teacher-mean", "123.7,116.3,103.5"), limits, "teacher_mean", "0..1"),
        ((*given, "--teacher-mean", "0.5,0.5"), limits, "teacher_mean"),
        ((*given, "--teacher-mean", "grey"), malformed, "'grey'"),
        ((*given, "--teacher-std", "0.2,0,0.2"), limits, "teacher_std"),
        ((*given, "--teacher-crop", "0"), limits, "teacher_crop", "0.0"),
        ((*given, "--teacher-crop", "87.5"), limits, "teacher_crop", "87.5"),
        ((*given, "--teacher-size", "4"), limits, "teacher_size", "4", "8"),
        ((*given, "--teacher-interpolation", "cubic"), "unknown-name", "'cubic'", "bicubic"),
        (
            (*common, "--teacher", "test_resnet.r161", "--teacher-weights", weights),
            "teacher-input-unsupported",
            "r161",
        ),
        (
            (*common, "--teacher", "vit_5b_patch16_sapiens2", "--teacher-weights", weights),
            "teacher-input-unsupported",
            "1024×768",
        ),
    ):
        refusal = fails(*arguments)
        assert refusal.code == code, refusal
        assert all(str(value) in refusal for value in values), refusal
        assert not (tmp_path / "s.zarr").exists()


def test_settings_of_a_recipe_are_those_of_flags(tmp_path: Path, run: Run, photos: str) -> None:
    """Lists and numbers in TOML; the store's own recipe says the same again."""
    _, weights = from_elsewhere("resnet8", tmp_path / "w.safetensors")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"[precompute]\ndataset = '{photos}'\nimage_size = {SIDE}\nteacher = 'resnet8'\n"
        f"teacher_weights = '{weights}'\nteacher_mean = [0.1, 0.2, 0.3]\nteacher_std = 1\n"
        f"clip = 'none'\nviews = 1\ndevice = 'cpu'\n"
    )
    by_recipe, by_flags = tmp_path / "recipe.zarr", tmp_path / "flags.zarr"
    assert run("precompute", "--recipe", recipe, "--out", by_recipe).code == 0
    assert (
        run(
            "precompute",
            "--dataset",
            photos,
            "--image-size",
            SIDE,
            "--teacher",
            "resnet8",
            "--teacher-weights",
            weights,
            "--teacher-mean",
            "0.1,0.2,0.3",
            "--teacher-std",
            "1",
            "--clip",
            "none",
            "--views",
            1,
            "--device",
            "cpu",
            "--out",
            by_flags,
        ).code
        == 0
    )
    assert changed(tree(by_recipe / "train"), tree(by_flags / "train")) == []
    manifests = [read_manifest(path) for path in (by_recipe, by_flags)]
    assert manifests[0]["teacher"] == manifests[1]["teacher"]
    assert manifests[0]["teacher"]["input"]["mean"] == [0.1, 0.2, 0.3]
    for path in (by_recipe, by_flags):
        assert run("verify", path, "--teacher", weights).code == 0
        (path / "train/teacher_logits/c/0/0/0").write_bytes(b"")
        assert run("repair", path).code == 0
        assert run("verify", path).code == 0


# --- stores of before ----------------------------------------------------------------------------


def as_before(path: Path) -> Path:
    """A store whose manifest says nothing of what the teacher takes."""
    manifest: Any = {**read_manifest(path)}
    del manifest["teacher"]["input"]
    write_sealed(open_location(path), manifest)
    return path


@pytest.mark.parametrize("files", [True, False], ids=["folder", "arrays"])
def test_a_store_of_before_is_verified_and_repaired_by_what_it_meant(
    files: bool, photos: str, run: Run, tmp_path: Path
) -> None:
    """Even where its teacher would be shown other images today."""
    name = photos if files else "shapes"
    dataset = photo_set(photos) if files else load_dataset(Images(dataset="shapes", limit=24))
    model = richkd.create_model("test_resnet", len(dataset.class_names))
    weights = tmp_path / "w.safetensors"
    save_tensors(weights, model.state_dict())
    settings = Precompute(
        dataset=name,
        teacher="test_resnet",
        teacher_weights=str(weights),
        clip="none",
        views=2,
        device="cpu",
        out=str(tmp_path / "s.zarr"),
        limit=None if files else 24,
        image_size=SIDE if files else None,
    )
    finder = Finder(
        settings, dataset, training_settings(settings, {}), torch.device("cpu"), ALONE, QUIET
    )
    found = finder.find(recorded={"input": dataset.network_input.entry})  # type: ignore[typeddict-item]
    StageOne.of(dataset, *found).run(open_location(settings.out), ALONE, QUIET)
    path = as_before(Path(settings.out))
    was = read_manifest(path)
    assert "input" not in was["teacher"]
    assert schema.teacher_input(was) == dataset.network_input.entry
    shown = run("verify", path, "--teacher", weights)
    assert shown.code == 0, shown.out + shown.err
    assert "crop 87.5 %" in run("inspect", path).out or not files

    before = tree(path)
    chunk = path / "train/teacher_logits/c/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert run("verify", path).code == 2
    assert run("repair", path).code == 0
    assert changed(before, tree(path)) == ["zarr.json"]
    assert run("verify", path, "--teacher", weights).code == 0
    now = read_manifest(path)
    assert now["teacher"]["input"] == dataset.network_input.entry
    assert schema.difference(was, now) is schema.difference(now, was) is None


def test_rows_of_another_input_are_another_store(photos: str, tmp_path: Path) -> None:
    _, weights = from_elsewhere("resnet8", tmp_path / "w.safetensors")
    was = stage_one(as_path := tmp_path / "s.zarr", photos, "resnet8", weights).manifest
    now = {**was, "teacher": {**was["teacher"], "input": {**was["teacher"]["input"], "crop": 0.5}}}
    old = {**was, "teacher": {k: v for k, v in was["teacher"].items() if k != "input"}}
    assert schema.difference(was, now) == "teacher.input.crop was 0.875 and is now 0.5"
    assert schema.difference(old, now) == "teacher.input.crop was 0.875 and is now 0.5"
    assert schema.difference(old, was) is None
    assert as_path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": "32"},
        {"mean": [0.5]},
        {"std": [0.2, 0.0, 0.2]},
        {"crop": 0.0},
        {"crop": 1.01},
        {"crop": float("nan")},
        {"mean": [0.5, 0.5, float("inf")]},
        {"interpolation": "cubic"},
        {"crop_mode": "border"},
        {"std": None},
    ],
    ids=str,
)
def test_entries_out_of_range_are_found(store: Path, change: dict[str, Any]) -> None:
    manifest: Any = {**read_manifest(store)}
    assert schema.manifest_fault(manifest) is None
    entry = {**manifest["teacher"]["input"], **change}
    assert input_fault(entry) is not None
    manifest["teacher"] = {**manifest["teacher"], "input": entry}
    assert schema.manifest_fault(manifest) is not None


# --- beside stage one ----------------------------------------------------------------------------


def test_plan_tries_the_teacher_at_its_own_size(photos: str, run: Run, tmp_path: Path) -> None:
    _, weights = from_elsewhere("test_resnet", tmp_path / "w.safetensors")
    common = (
        "plan",
        "--dataset",
        photos,
        "--image-size",
        SIDE,
        "--clip",
        "none",
        "--views",
        1,
        "--device",
        "cpu",
        "--teacher",
        "test_resnet",
        "--teacher-weights",
        weights,
        "--json",
    )
    done = run(*common)
    assert done.code == 0, done.err
    assert done.json["pace"]["teacher_size"] == 160 and done.json["image_size"] == SIDE
    assert "test_resnet (160×160)" in done.json["about"]
    assert run(*common, "--teacher-size", 64).json["pace"]["teacher_size"] == 64


def test_fewer_files_are_under_way_at_a_larger_size(
    photos: str,
) -> None:
    files: Any = photo_set(photos).train.images
    for size, most in ((64, 4), (128, 1)):
        loader = FileInputs(files, CPU, Framing(size=size), workers=0)
        memory = 17 * 3 * 64 * 64 * 4
        batches = loader.decode_once([range(8)], None, 16, None, memory)
        assert {len(index) for index, *_ in batches} == {most}

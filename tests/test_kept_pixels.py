"""Tests of kept pixels through both stages: `precompute --keep-pixels` and what reads them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import Refusal, changed, refuses, stage_one_of, tree, write_photos, write_teacher
from PIL import Image

import richkd
from richkd.analysis.students import evaluate
from richkd.config.settings import Distill, Images, Precompute, resolve
from richkd.core.progress import Report
from richkd.data.datasets import ImageFiles, load_dataset
from richkd.data.decoding import Decoding
from richkd.data.framing import Framing
from richkd.data.inputs import FileInputs
from richkd.data.kept import KeptImages
from richkd.data.on_device import check_device, decode_jpegs, plain_jpeg
from richkd.data.sources import FolderFiles, Paths
from richkd.data.views import ResizedCropFlip
from richkd.distill import distill
from richkd.store.schema import Block
from richkd.store.writer import StoreWriter
from richkd.teachers.cnn import CNNTeacher
from richkd.tools.hub_cards import store_card
from richkd.tools.plan import plan
from richkd.training.images import kept_images, student_images

CPU = torch.device("cpu")
SIDE = 48


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("richkd.data.kept.CHUNK_BYTES", 8 * 3 * SIDE * SIDE * 3 // 2)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "p"
    return write_photos(folder, ["cat", "dog"], np.random.default_rng(5), train=11, test=3)


@pytest.fixture(scope="module")
def kept(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with kept pixels, in two blocks of two chunks."""
    out = tmp_path_factory.mktemp("store") / "kept.zarr"
    return cache_of(photos, out, keep_pixels=SIDE)


def cache_of(photos: Path, out: Path, **settings: Any) -> Path:
    given = {"teacher_weights": str(teacher_of(photos.parent)), "block": 16, **settings}
    return stage_one_of(out, f"imagefolder:{photos}", "resnet8", **given).path


def teacher_of(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    return path if path.exists() else write_teacher(path, "resnet8", 2)


def test_kept_pixels_are_those_of_pillow_and_plain_zarr(photos: Path, kept: Path) -> None:
    group: Any = zarr.open_group(kept, mode="r")
    entry = group.attrs["pixels"]
    assert entry["side"] == SIDE and 16 % entry["images"] == 0 and entry["images"] < 16
    dataset = load_dataset(Images(dataset=f"imagefolder:{photos}", image_size=32))
    for split, images in (("train", dataset.train.images), ("test", dataset.test.images)):
        files = [photos / split / path for path in images.source.paths]
        sizes, pixel_sizes = group[f"{split}/sizes"][:], group[f"{split}/pixel_sizes"][:]
        pixels, start = group[f"{split}/pixels"], 0
        for number, file in enumerate(files):
            image = Image.open(file).convert("RGB")
            assert tuple(sizes[number]) == (image.height, image.width)
            shorter = min(image.size)
            scale = min(1, SIDE / shorter)
            size = tuple(int(np.floor(each * scale + 0.5)) for each in image.size)
            assert tuple(pixel_sizes[number]) == size[::-1]
            expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS)).ravel()
            start = start if number % entry["images"] else 0
            found = pixels[number // entry["images"], start : start + len(expected)]
            np.testing.assert_array_equal(found, expected)
            start += len(expected)


def test_all_else_is_the_same_without_them(photos: Path, kept: Path, tmp_path: Path) -> None:
    plain = tree(cache_of(photos, tmp_path / "plain.zarr"))
    found = tree(kept)
    own = {name for name in found if name not in plain}
    assert {name.split("/")[1] for name in own if "/" in name} == {
        "pixels",
        "sizes",
        "pixel_sizes",
        "c",  # flags of the blocks of pixels
    }
    differ = {name for name in plain if plain[name] != found[name]}
    assert differ <= {"zarr.json", "complete/zarr.json"}


def test_interrupted_three_times_the_bytes_are_the_same(
    photos: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "kept.zarr", StoreWriter.write

    for _ in range(3):
        left = iter(range(2))

        def cut(self: StoreWriter, block: Block, rows: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(self, block, rows)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StoreWriter, "write", cut)
            cache_of(photos, out, keep_pixels=SIDE)
    cache_of(photos, out, keep_pixels=SIDE)
    assert changed(tree(kept), tree(out)) == ["zarr.json"]  # which names the place


def test_damaged_pixels_are_found_and_computed_again_without_a_teacher(
    kept: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kept.zarr"
    shutil.copytree(kept, out)
    before = tree(out)
    chunk = out / "train/pixels/c/1/0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    (out / "test/pixels/c/0/0").unlink()
    outcome = run("verify", out)
    assert outcome.code == 2 and "train/pixels/c/1/0: damaged" in outcome.out
    monkeypatch.setattr(CNNTeacher, "rows", None)  # is not called
    assert run("repair", out).code == 0
    assert changed(before, tree(out)) == ["zarr.json"]  # which names the place
    assert run("verify", out).code == 0


@pytest.mark.slow
def test_two_ranks_write_the_same_pixels(photos: Path, kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.zarr"
    words = (
        f"precompute --dataset imagefolder:{photos} --teacher resnet8 --clip none --views 2 "
        f"--image-size 32 --device cpu --keep-pixels {SIDE} --out {out} "
        f"--teacher-weights {teacher_of(photos.parent)}"
    )
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m richkd " + words
    done = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone, pixels = richkd.open_cache(kept), richkd.open_cache(out)
    for split in ("train", "test"):
        mine = kept_images(pixels, Report(quiet=True))[split].images
        other = kept_images(alone, Report(quiet=True))[split].images
        assert isinstance(mine, KeptImages) and isinstance(other, KeptImages)
        for number in range(len(mine)):
            a, b = mine.photograph(number), other.photograph(number)
            assert a.image.tobytes() == b.image.tobytes() and a.scale == b.scale


# --- stage two -----------------------------------------------------------------------------------


def test_students_see_the_boxes_of_the_whole_photographs(photos: Path, kept: Path) -> None:
    cache = richkd.open_cache(kept)
    images = student_images(cache)["train"].images
    assert isinstance(images, KeptImages)
    files = load_dataset(Images(dataset=f"imagefolder:{photos}", image_size=32)).train.images
    views = cache.slab(1, ()).views
    batches = FileInputs(images, CPU, workers=0).batches(torch.arange(len(images)), views, 1)
    loaded = [crops[0].numpy() for _, crops in batches]
    reduced = 0
    for number in range(len(images)):
        whole = files.open(number)
        top, left, height, width, flip = views[number].tolist()
        scale = min(1, SIDE / min(whole.size))
        size = tuple(int(np.floor(each * scale + 0.5)) for each in whole.size)
        small = whole.resize(size, Image.Resampling.LANCZOS)
        across, down = size[0] / whole.width, size[1] / whole.height
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        expected = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR, box=box))
        expected = expected[:, ::-1] if flip else expected
        if scale < 1:
            np.testing.assert_array_equal(loaded[number], expected)
            reduced += 1
    assert reduced > 4


def test_a_student_trains_and_is_evaluated_without_the_folder(
    photos: Path, kept: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    hidden = photos.rename(photos.with_name("hidden"))
    try:
        words = (
            f"distill --cache {kept} --student resnet8 --method kd --epochs 2 --batch-size 8 "
            f"--device cpu --out {tmp_path / 'run'}"
        ).split()
        outcome = run(*words)
        assert outcome.code == 0, outcome
        assert "no image file is read" in outcome.err
        assert run("evaluate", tmp_path / "run", "--device", "cpu").code == 0
        again = [*words[:-1], tmp_path / "exact", "--decode", "exact"]
        assert run(*again).code == 2  # the folder is missing
    finally:
        hidden.rename(photos)
    assert run(*again).code == 0
    runs = [tmp_path / "run", tmp_path / "exact"]
    apart = [evaluate([each], device="cpu")["runs"][0] for each in runs]
    for first in (0, 1):  # each on the images that it was trained on
        together = evaluate([runs[first], runs[1 - first]], device="cpu")["runs"]
        for mine, alone in zip(together, (apart[first], apart[1 - first]), strict=True):
            assert {**mine, "comparison": None} == {**alone, "comparison": None}
    with refuses("run-decode-differs", *runs, "--decode"):
        evaluate(runs, device="cpu", corruptions=True)
    recipe = (tmp_path / "exact" / "recipe.toml").read_text()
    assert (
        'decode = "exact"' in recipe and "decode" not in (tmp_path / "run/recipe.toml").read_text()
    )


@pytest.mark.parametrize("change", ["missing", "other", "truncated later"])
def test_pixels_that_are_not_those_written_are_refused(
    kept: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "kept.zarr"
    shutil.copytree(kept, out)
    chunk = out / "train/pixels/c/1/0"
    if change == "missing":
        chunk.unlink()
    elif change == "other":
        shutil.copy(out / "train/pixels/c/0/0", chunk)
    else:
        images = student_images(richkd.open_cache(out))["train"].images
        os.truncate(chunk, 5)
    with refuses("cache-damaged"):
        if change == "truncated later":
            images.photograph(len(images) - 1)
        student_images(richkd.open_cache(out))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flipped_byte_is_found_before_an_epoch_is_saved(
    kept: Path, tmp_path: Path, split: str
) -> None:
    """Images are read apart from their chunk, so no read checks its CRC."""
    out = Path(shutil.copytree(kept, tmp_path / "kept.zarr"))
    settings = Distill(cache=str(out), method="kd", student="resnet8", out=str(tmp_path / "run"))
    settings = replace(settings, epochs=1, device="cpu", batch_size=8)
    if split == "test":
        distill(settings)
    chunk = out / split / "pixels/c/0/0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with refuses("cache-damaged", f"{split}/pixels/c/0/0", "richkd repair"):
        evaluate([tmp_path / "run"], device="cpu") if split == "test" else distill(settings)
    assert (tmp_path / "run/last.safetensors").exists() == (split == "test")


def test_what_cannot_be_kept_or_decoded_is_refused(
    photos: Path, store: Path, tmp_path: Path, fails: Callable[..., Refusal]
) -> None:
    words = [
        "precompute",
        "--clip",
        "none",
        "--teacher",
        "resnet8",
        "--device",
        "cpu",
        "--limit",
        "8",
    ]
    line = fails(*words, "--dataset", "shapes", "--keep-pixels", 64, "--out", tmp_path / "a")
    assert line.code == "pixels-of-small-images" and "64" in line
    here = ["--dataset", f"imagefolder:{photos}", "--out", tmp_path / "b", "--image-size", 32]
    line = fails(*words, *here, "--keep-pixels", 24)
    assert line.code == "pixels-too-few" and "24" in line and "32" in line
    assert not list(tmp_path.iterdir())
    given = ["--student", "resnet8", "--epochs", 1, "--out", tmp_path / "run"]
    line = fails("distill", "--cache", store, *given, "--decode", "draft")
    assert line.code == "decode-of-arrays" and "draft" in line
    assert not list(tmp_path.iterdir())


def test_the_plan_knows_the_bytes_of_kept_pixels(photos: Path, kept: Path) -> None:
    manifest = richkd.open_cache(kept).manifest
    settings = resolve(Precompute, manifest["recipe"], {})
    planned = plan(settings, Report(quiet=True), enough=0, most=8)
    cache = richkd.open_cache(kept)
    for split in ("train", "test"):
        assert planned["arrays"][f"{split}/pixels"] == pytest.approx(
            cache.specs[f"{split}/pixels"].nbytes, rel=0.3
        )


# --- JPEG drafts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("orientation", "size"), [(1, (301, 403)), (6, (400, 304))])
def test_a_draft_is_the_next_larger_fraction_of_a_jpeg(
    tmp_path: Path, rng: np.random.Generator, orientation: int, size: tuple[int, int]
) -> None:
    file = jpeg(tmp_path, rng, size if orientation == 1 else size[::-1], orientation)
    whole = Decoding().photograph(file)
    assert whole.size == size and not whole.reduced
    for most, factor in ((1.9, 1), (2, 2), (3.9, 2), (5, 4), (100, 8)):
        found = Decoding().photograph(file, most=most)
        assert found.size == size and found.scale == (1 / factor, 1 / factor)
        assert (found.image.height, found.image.width) == tuple(-(-each // factor) for each in size)
        views = torch.tensor([[0.0, 0, *size, 0], [10, 20, 200, 150, 1]])
        a, b = (Framing(size=16).views(photo, views).float() for photo in (whole, found))
        assert (a - b).abs().mean() < 2.5


def test_only_whole_blocks_of_a_turned_jpeg_are_drafted(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The last, incomplete block would come first."""
    file = jpeg(tmp_path, rng, (304, 404), 3)
    assert Decoding().photograph(file, most=8).scale == (1 / 4, 1 / 4)
    assert not Decoding().photograph(png(tmp_path), most=8).reduced


def jpeg(folder: Path, rng: np.random.Generator, size: tuple[int, int], orientation: int) -> Path:
    """A smooth image, given its stored height and width."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / "a.jpg", exif=exif)
    return folder / "a.jpg"


def png(folder: Path) -> Path:
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return folder / "a.png"


def test_drafts_leave_every_view_the_students_pixels(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(file)
    sizes, traits = np.array([[300, 400]]), np.zeros(1, np.uint8)
    source = FolderFiles(tmp_path, Paths.of(["a.jpg"]))
    files = ImageFiles(source, sizes, traits, 32, Decoding())
    asked: list[float] = []
    photograph = Decoding.photograph
    monkeypatch.setattr(Decoding, "photograph", lambda *a: asked.append(a[3]) or photograph(*a))
    for decode, height, most in (
        ("exact", 300, 1),
        ("draft", 100, 100 / 32),
        ("draft", 20, 20 / 32),
    ):
        views = torch.tensor([[0.0, 0, height, 300, 0]])
        inputs = FileInputs(replace(files, decode=decode), CPU, workers=0)
        list(inputs.batches(torch.arange(1), views, 1))
        assert asked.pop() == most


# --- decoding on the device ----------------------------------------------------------------------


def test_the_device_decodes_plain_jpegs_and_pillow_the_others(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """On a CPU, which has the same decoder, the pixels are Pillow's."""
    names = [f"{number}.jpg" for number in range(6)] + ["a.png"]
    sizes = rng.integers(40, 90, (7, 2))
    exif = Image.Exif()
    exif[274] = 6
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        pixels = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        pixels = pixels.convert({1: "L", 2: "CMYK"}.get(number, "RGB"))
        pixels.save(tmp_path / name, **({"exif": exif} if number == 3 else {}))
    sizes[3] = sizes[3, ::-1]
    source = FolderFiles(tmp_path, Paths.of(names))
    files = ImageFiles(source, sizes, np.zeros(7, np.uint8), 24, Decoding())
    views = torch.from_numpy(ResizedCropFlip(sizes, 24).draw(0, 7, 1)[0])
    order = torch.tensor([3, 1, 0, 6, 2, 5, 4])
    plain = [plain_jpeg(files, number) is not None for number in range(7)]
    assert plain == [True, False, False, False, True, True, False]
    exact, device = (
        [*FileInputs(replace(files, decode=decode), CPU, workers=0).batches(order, views, 3)]
        for decode in ("exact", "gpu")
    )
    for (index, images), (number, others) in zip(exact, device, strict=True):
        assert torch.equal(index, number) and torch.equal(images, others)


def test_what_the_device_cannot_decode_is_left_to_pillow(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = jpeg(tmp_path, rng, (40, 50), 1).read_bytes()
    parts = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (good, good[:99])]
    whole, broken = decode_jpegs(parts, CPU)
    assert whole is not None and whole.shape == (3, 40, 50) and broken is None
    for device, augmented, code in (
        (CPU, False, "decode-gpu-unavailable"),
        (CPU, True, "decode-gpu-augmented"),
        (torch.device("cuda"), False, "decode-gpu-unavailable"),  # without one
    ):
        if device.type == "cpu" or not torch.cuda.is_available():
            with refuses(code, "gpu"):
                check_device(device, augmented)


def test_the_card_says_that_images_are_inside(kept: Path) -> None:
    card = store_card(kept, "me/kept")
    assert f"reduced to {SIDE} pixels" in card and "images_inside: true" in card
    assert "not inside" not in card


def test_the_teachers_view_is_of_whole_files(kept: Path, tmp_path: Path) -> None:
    """Though the student's is of kept pixels, and those of a cache without them."""
    plain = tmp_path / "plain.zarr"
    cache_of(Path(richkd.open_cache(kept).manifest["dataset"]["name"].partition(":")[2]), plain)
    for_teacher = [richkd.view_images(each, 1, network="teacher") for each in (kept, plain)]
    assert torch.equal(*for_teacher)
    for_student = [richkd.view_images(each, 1) for each in (kept, plain)]
    assert not torch.equal(*for_student)

"""A folder as users have them: some sixty odd files, each of which is used correctly or named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_teacher
from numpy.typing import NDArray
from PIL import Image, ImageOps

import richkd

pytestmark = pytest.mark.slow

Run = Callable[..., Any]
Array = NDArray[Any]
SIDE = 32
TURN = {  # what `exif_transpose` undoes
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def blocks(rng: np.random.Generator, height: int = 40, width: int = 56) -> Array:
    """Coarse coloured blocks, which survive lossy formats: [H,W,3] uint8."""
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


def grey(rgb: Array) -> Array:
    return np.asarray(Image.fromarray(rgb).convert("L"))


def thrice(one: Array) -> Array:
    return np.dstack([one] * 3)


def on_white(rgb: Array, mask: Array) -> Array:
    return np.where(mask[..., None], rgb, 255).astype(np.uint8)


def write_used(folder: Path, rng: np.random.Generator) -> dict[str, Array]:
    """Write files that are images; return what a viewer shows of each: [H,W,3] uint8."""
    shown: dict[str, Array] = {}

    def put(name: str, image: Image.Image | Array, as_shown: Array, **options: Any) -> None:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(folder / name, **options)
        shown[name] = as_shown

    for orientation, turn in TURN.items():
        for suffix in ("jpg", "png", "webp", "tif"):
            if suffix != "jpg" and orientation not in (3, 6):
                continue
            rgb, exif = blocks(rng), Image.Exif()
            exif[0x0112] = orientation
            stored = Image.fromarray(rgb).transpose(turn)
            put(f"turned-{orientation}.{suffix}", stored, rgb, exif=exif, quality=95)
            undone = ImageOps.exif_transpose(Image.open(folder / f"turned-{orientation}.{suffix}"))
            assert np.abs(np.asarray(undone.convert("RGB")).astype(int) - rgb).mean() < 12
    one = grey(blocks(rng))
    put("deep 16.png", (one.astype(np.uint16) * 257), thrice(one))
    put("deep 16.tif", (one.astype(np.uint16) * 257), thrice(one))
    put("deep 32.tif", (one.astype(np.int32) * 8421504), thrice(one))
    put("float.tiff", (one / 255).astype(np.float32), thrice(one))
    (folder / "deep.pgm").write_bytes(
        b"P5 56 40 4080\n" + (one * np.uint16(16)).astype(">u2").tobytes()
    )
    shown["deep.pgm"] = thrice(one)
    rgb = blocks(rng)
    mask = np.zeros((40, 56), bool)
    mask[6:30, 10:44] = True
    alpha = (255 * mask).astype(np.uint8)
    clear = on_white(rgb, mask)
    put("clear.png", np.dstack([rgb, alpha]), clear)
    put("clear.webp", np.dstack([rgb, alpha]), clear, lossless=True, exact=True)
    put("clear.tif", np.dstack([rgb, alpha]), clear)
    put("clear grey.png", Image.fromarray(np.dstack([one, alpha])), on_white(thrice(one), mask))
    black = Image.frombytes("P", (56, 40), mask.astype(np.uint8).tobytes())
    black.putpalette([0] * 6)
    put("icon.gif", black, on_white(np.zeros_like(rgb), mask), transparency=0)
    put("icon.png", black, on_white(np.zeros_like(rgb), mask), transparency=0)
    put(
        "key.png",
        np.where(mask, 0, 77).astype(np.uint8),
        on_white(np.zeros_like(rgb), mask),
        transparency=77,
    )
    for name in (
        "Upper.JPG",
        "a.jpeg",
        "a.jpe",
        "a.jfif",
        "b.avif",
        "c.jp2",
        "d.bmp",
        "e.ppm",
        "f.webp",
        "g.dib",
        "h.pnm",
        "white space.jpg",
        "-dash.jpg",
        "quarter%.jpg",
        "é.jpg",
        "日本.jpg",
        "🙂.png",
        "two\nlines.png",
        "a" * 200 + ".png",
    ):
        suffix = Path(name).suffix.lower()
        put(
            name,
            rgb,
            rgb,
            **({"quality": 95} if suffix not in (".bmp", ".dib", ".png") else {}),
            **({"format": "JPEG"} if suffix in (".jpe", ".jfif") else {}),
        )
    printed = Image.fromarray(rgb).convert("CMYK")
    put("cmyk.jpg", printed, np.asarray(printed.convert("RGB")), quality=95)
    put("bits.png", Image.fromarray(mask), thrice(alpha))
    put("small.png", rgb[:1, :1], rgb[:1, :1])
    put("slender.png", np.tile(rgb[:2], (1, 3, 1)), np.tile(rgb[:2], (1, 3, 1)))
    frames = [Image.fromarray(blocks(rng)) for _ in range(2)]
    put("pages.tif", Image.fromarray(rgb), rgb, save_all=True, append_images=frames)
    put(
        "phone.jpg",
        Image.fromarray(rgb),
        rgb,
        format="MPO",
        save_all=True,
        append_images=frames,
        quality=95,
    )
    (folder.parent.parent / "elsewhere.png").unlink(missing_ok=True)
    Image.fromarray(rgb).save(folder.parent.parent / "elsewhere.png")
    (folder / "link.png").symlink_to(folder.parent.parent / "elsewhere.png")
    shown["link.png"] = rgb
    return shown


def write_left_out(folder: Path, whole: bytes) -> list[str]:
    """Write files that are no images; return those named one by one, while others are counted."""
    broken = {
        "cut.jpg": whole[: len(whole) // 2],
        "text.png": b"hello",
        "empty.jpg": b"",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "page.jpg": b"<html></html>",
        "zeros.png": bytes(500),
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    Image.new("L", (4000, 1)).save(folder / "absurd.png")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")  # counted as a file that is no image
    counted = [
        ".DS_Store",
        "._clear.png",
        ".hidden.png",
        "Thumbs.db",
        "desktop.ini",
        "@eaDir/a.jpg/THUMB.jpg",
        ".ipynb_checkpoints/a.jpg",
        "__MACOSX/._a.jpg",
        "notes.txt",
        "layers.psd",
    ]
    for name in counted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)
    return [*broken, "absurd.png", "dangling.jpg"]


def test_every_odd_file_is_used_rightly_or_named(
    tmp_path: Path, rng: np.random.Generator, run: Run, clip_dir: Path
) -> None:
    odd, plain = tmp_path / "odd", tmp_path / "plain"
    for root in (odd, plain):
        for part in ("train", "val"):
            (root / part / "cat").mkdir(parents=True)
            (root / part / "dog").mkdir()
    shown = write_used(odd / "train" / "cat", rng)
    names = sorted(shown)  # as a listing has them
    whole = (odd / "train/cat/a.jpeg").read_bytes()
    broken = write_left_out(odd / "train" / "cat", whole)
    for number, name in enumerate(names):  # the same images as plain PNG files
        Image.fromarray(shown[name]).save(plain / "train" / "cat" / f"{number:03}.png")
    for part, name in (("train", "dog"), ("val", "cat"), ("val", "dog")):
        for number in range(6):
            rgb = blocks(rng)
            for root in (odd, plain):
                Image.fromarray(rgb).save(root / part / name / f"{number}.png")
    write_teacher(tmp_path / "t.safetensors", "resnet8", 2)
    stores = {}
    for root in (odd, plain):
        stores[root] = tmp_path / f"{root.name}.zarr"
        made = run(
            "precompute",
            "--dataset",
            f"imagefolder:{root}",
            "--image-size",
            SIDE,
            "--teacher",
            "resnet8",
            "--teacher-weights",
            tmp_path / "t.safetensors",
            "--clip",
            clip_dir,
            "--prompts",
            "single",
            "--views",
            2,
            "--broken",
            "skip",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--out",
            stores[root],
        )
        assert made.code == 0, made.err
        if root == odd:
            said = made.err
    for name in broken:
        assert f"train/cat/{name}" in said
    assert "left out 8 hidden or system files or folders" in said
    assert "left out 2 files that are not images" in said and "notes.txt" in said
    assert "left out 1 image in an unsupported format" in said and "layers.psd" in said
    for words in (
        "EXIF orientation",
        "transparency",
        "16-bit PNG",
        "16-bit TIFF",
        "float TIFF",
        "first frame",
    ):
        assert words in said

    rows = {root: richkd.open_cache(store) for root, store in stores.items()}
    assert rows[odd].num_samples == rows[plain].num_samples == len(names) + 6
    for array in ("train/teacher_logits", "train/clip_features"):
        one, other = (torch.as_tensor(cache.read(array)).float() for cache in rows.values())
        one, other = (rows[0] if rows.ndim == 3 else rows for rows in (one, other))
        spread = (other - other.mean(0)).norm(dim=1).mean()
        apart = (one - other).norm(dim=1) / spread
        labels = rows[odd].read("train/labels")
        worst = {
            names[place]: float(gap) for place, gap in enumerate(apart[labels == 0]) if gap > 0.5
        }
        assert not worst, f"{array}: {worst}"

    store = stores[odd]
    assert run("verify", store).code == 0
    chunk = max((store / "train/teacher_logits").rglob("c/**/*"), key=lambda file: file.is_file())
    chunk.write_bytes(b"damaged")
    assert run("verify", store).code == 2
    repaired = run("repair", store)
    assert repaired.code == 0, repaired.err
    assert run("verify", store).code == 0
    student = run(
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--epochs",
        1,
        "--method",
        "kd",
        "--device",
        "cpu",
        "--out",
        tmp_path / "runs/a",
    )
    assert student.code == 0, student.err
    shift = tmp_path / "shift"
    shutil.copytree(odd / "val", shift)
    checked = run("evaluate", tmp_path / "runs/a", "--device", "cpu", "--shift", shift)
    assert checked.code == 0, checked.err
    assert run("report", tmp_path / "runs").code == 0

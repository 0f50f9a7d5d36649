"""Image files become what a viewer shows: upright, on a background, at full brightness."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from helpers import Refusal, refuses
from numpy.typing import NDArray
from PIL import Image, ImageOps

import richkd
from richkd.config.settings import Images
from richkd.data import decoding
from richkd.data.datasets import Dataset, ImageFiles, load_dataset
from richkd.data.decoding import FRAMES, ROTATED, TRANSPARENT, Decoding, Values
from richkd.data.folders import list_images
from richkd.data.sources import FolderFiles
from richkd.store.checksums import write_sealed
from richkd.store.folder import Folder
from richkd.store.schema import manifest_fault

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
Array = NDArray[Any]
Write = Callable[[Path, Array], object]  # of values in 0..1, [40,60]
WHITE = (255, 255, 255)


def found(path: Path) -> decoding.Found:
    look = decoding.look(path, decode=True)
    assert not look.fault, look.fault
    return look


def values(*files: Path) -> Values:
    """Return the values as in a listing of these files."""
    looks = [found(file) for file in files]
    kinds = sorted({look.kind for look in looks if look.kind})
    return Values(
        kinds,
        np.array([1 + kinds.index(look.kind) if look.kind else 0 for look in looks], np.uint8),
        np.array([look.low for look in looks]),
        np.array([look.high for look in looks]),
    )


def read(path: Path, background: str = "white") -> Array:
    """Read a file as a dataset of this file alone: [H,W,3]."""
    image = Decoding.of(background, None, [values(path)]).read(path)
    assert image.mode == "RGB" and image.size[::-1] == found(path).size
    return np.asarray(image).astype(int)


# --- depth ---------------------------------------------------------------------------------------


def save(array: Array, path: Path, **options: Any) -> None:
    Image.fromarray(array).save(path, **options)


def tiff(path: Path, pixels: Array, sample_format: int = 1, photometric: int = 1) -> None:
    """A baseline TIFF of one channel, written by hand."""
    height, width = pixels.shape
    begin = 8 + 2 + 12 * 10 + 4
    tags = {
        256: width,
        257: height,
        258: 8 * pixels.itemsize,
        259: 1,
        262: photometric,
        273: begin,
        277: 1,
        278: height,
        279: pixels.nbytes,
        339: sample_format,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + pixels.tobytes())


def netpbm(path: Path, magic: str, largest: int, pixels: Array) -> None:
    height, width = pixels.shape[:2]
    head = f"{magic} {width} {height} {largest}\n".encode()
    path.write_bytes(head + pixels.astype(">u2").tobytes())


def pfm(path: Path, v: Array) -> None:
    path.write_bytes(b"Pf\n60 40\n-1.0\n" + v[::-1].astype("<f4").tobytes())


def whole(v: Array, top: int, dtype: type = np.uint16) -> Array:
    return (top * v).round().astype(dtype)


def colours(v: Array) -> Array:
    return np.dstack([v, 1 - v, v / 2])


DEEP: dict[str, Write] = {  # of one channel
    "16.png": lambda path, v: save(whole(v, 65535), path),
    "12-in-16.png": lambda path, v: save(whole(v, 4095), path),
    "10-in-16.png": lambda path, v: save(whole(v, 1023), path),
    "8-in-16.png": lambda path, v: save(whole(v, 255), path),
    "16.pgm": lambda path, v: netpbm(path, "P5", 65535, whole(v, 65535)),
    "12.pgm": lambda path, v: netpbm(path, "P5", 4095, whole(v, 4095)),
    "odd.pgm": lambda path, v: netpbm(path, "P5", 1000, whole(v, 1000)),
    "float.pfm": pfm,
    "16.jp2": lambda path, v: save(whole(v, 65535), path, irreversible=False),
    "16.tif": lambda path, v: save(whole(v, 65535), path),
    "16-lzw.tif": lambda path, v: save(whole(v, 65535), path, compression="tiff_lzw"),
    "12-in-16.tif": lambda path, v: save(whole(v, 4095), path),
    "14-in-16.tiff": lambda path, v: save(whole(v, 16383), path),
    "32.tif": lambda path, v: save(whole(v, 2**31 - 1, np.int32), path),
    "16-in-32.tif": lambda path, v: save(whole(v, 65535, np.int32), path),
    "unsigned-32.tif": lambda path, v: tiff(path, whole(v, 2**32 - 1, np.uint32)),
    "signed-16.tif": lambda path, v: tiff(path, whole(v, 32767, np.int16), 2),
    "hounsfield.tif": lambda path, v: tiff(path, (4000 * v - 1000).astype(np.int16), 2),
    "white-is-zero.tif": lambda path, v: tiff(path, whole(1 - v, 65535), 1, 0),
    "white-is-zero-float.tif": lambda path, v: tiff(path, (1 - v).astype(np.float32), 3, 0),
    "float-1.tif": lambda path, v: save(v.astype(np.float32), path),
    "float-255.tif": lambda path, v: save((255 * v).astype(np.float32), path),
    "float-65535.tif": lambda path, v: save((65535 * v).astype(np.float32), path),
    "float-signed.tif": lambda path, v: save((2 * v - 1).astype(np.float32), path),
    "float-nan.tif": lambda path, v: save(np.where(v < 0.003, np.nan, v).astype(np.float32), path),
    "float-inf.tif": lambda path, v: save(np.where(v > 0.997, np.inf, v).astype(np.float32), path),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_depth_is_as_bright_as_it_is(name: str, tmp_path: Path) -> None:
    v = np.linspace(0, 1, 2400).reshape(40, 60)
    path = tmp_path / name
    DEEP[name](path, v)
    got = read(path)
    assert np.abs(got - 255 * v[..., None]).max() < 1.6, got[::13, ::13, 0]
    assert found(path).kind


def png16(path: Path, pixels: Array) -> None:
    """A PNG of 16-bit colours, with or without alpha, written by hand."""
    import zlib

    height, width, channels = pixels.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    kind = {2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)


@pytest.mark.parametrize(("top", "near"), [(65535, 1.6), (4095, 18), (1023, 80)])
def test_deep_colours_are_as_bright_as_they_are(top: int, near: float, tmp_path: Path) -> None:
    """Pillow keeps only the upper byte of each colour, so fewer bits lose more."""
    v = np.linspace(0, 1, 2400).reshape(40, 60)
    png16(tmp_path / "c.png", whole(colours(v), top))
    netpbm(tmp_path / "c.ppm", "P6", top, whole(colours(v), top))
    assert np.abs(read(tmp_path / "c.png") - 255 * colours(v)).max() < near
    assert np.abs(read(tmp_path / "c.ppm") - 255 * colours(v)).max() < 1.6


def test_deep_alpha_lets_the_background_through(tmp_path: Path) -> None:
    v = np.linspace(0, 1, 2400).reshape(40, 60)
    alpha = np.where(np.arange(60) < 30, 0, 65535) * np.ones((40, 1))
    png16(tmp_path / "grey.png", np.dstack([whole(v, 65535), alpha]))
    png16(tmp_path / "colour.png", np.dstack([whole(colours(v), 65535), alpha]))
    save(whole(v, 65535), tmp_path / "key.png", transparency=0)
    for name, wanted in (("grey.png", np.dstack([v] * 3)), ("colour.png", colours(v))):
        got = read(tmp_path / name, "#ff0000")
        assert (got[:, :30] == (255, 0, 0)).all()
        assert np.abs(got[:, 30:] - 255 * wanted[:, 30:]).max() < 1.6
    assert read(tmp_path / "key.png", "#ff0000")[0, 0].tolist() == [255, 0, 0]
    assert read(tmp_path / "key.png", "#ff0000")[0, 9].tolist() != [255, 0, 0]


def test_a_range_is_that_of_all_training_images(tmp_path: Path) -> None:
    """A dark image stays dark next to a bright one, and test images use the same range."""
    for name, top in (("dark", 0.2), ("bright", 1.0), ("test", 0.1)):
        save(whole(top * np.linspace(0, 1, 2400).reshape(40, 60), 4095), tmp_path / f"{name}.tif")
    train = values(tmp_path / "dark.tif", tmp_path / "bright.tif")
    test = values(tmp_path / "test.tif")
    whole_set = Decoding.of("white", None, [train, test])
    assert whole_set.ranges == {"16-bit TIFF": (0, 4095)}
    assert np.asarray(whole_set.read(tmp_path / "test.tif")).max() == 26
    alone = Decoding.of("white", None, [values(), test])
    assert alone.ranges == {"16-bit TIFF": (0, 1023)}
    given = Decoding.of("white", (0, 8190), [train, test])
    assert np.asarray(given.read(tmp_path / "bright.tif")).max() == 128
    again = Decoding.from_entry(given.entry)
    assert again == given


def test_images_that_may_be_of_another_depth_are_counted(tmp_path: Path) -> None:
    """Pillow sees one kind; one image may be too dark and one is cut off at white."""
    v = np.linspace(0, 1, 2400).reshape(40, 60)
    for name, top in (("a", 4095), ("b", 60), ("c", 65535)):
        save(whole(v, top), tmp_path / f"{name}.png")
    train, test = values(tmp_path / "a.png", tmp_path / "b.png"), values(tmp_path / "c.png")
    reading = Decoding.of("white", None, [train, test])
    (line,) = decoding.describe_decoding(reading, [train, test], np.zeros(3, np.uint8))
    assert "3 16-bit PNG images" in line and "4,095" in line and "--pixel-range" in line
    assert line.count("; 1 ") == 2


# --- orientation ---------------------------------------------------------------------------------

# How an upright image is stored in each orientation (EXIF 2.32, 4.6.4, tag 274), in NumPy.
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1)[::-1, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "jfif"])
def test_images_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30], upright[:20, 30:], upright[20:, :30] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 is invalid
    path = tmp_path / f"a.{suffix}"
    stored = STORED.get(orientation, STORED[1])(upright)
    save(np.ascontiguousarray(stored), path, exif=exif)
    assert np.abs(read(path) - upright).mean() < 12
    assert found(path).size == decoding.look(path, decode=False).size == (40, 60)
    assert bool(found(path).traits & ROTATED) == (orientation > 1)
    with Image.open(path) as image:
        image.load()
        shown = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(read(path), np.asarray(shown))


# --- transparency --------------------------------------------------------------------------------


def palette(mask: Array, **options: Any) -> Callable[[Path], None]:
    """Black everywhere, of two colours in the palette, one of them transparent."""
    image = Image.frombytes("P", (60, 40), mask.astype(np.uint8).tobytes())
    image.putpalette([0, 0, 0] * 2)
    return lambda path: image.save(path, **options)


def icons(mask: Array) -> dict[str, Callable[[Path], object]]:
    """A black icon on nothing, in all the ways that formats have."""
    black, alpha = np.zeros((40, 60), np.uint8), (255 * mask).astype(np.uint8)
    rgba = np.dstack([black, black, black, alpha])
    key = np.where(mask, 0, 77).astype(np.uint8)
    both = palette(mask, transparency=bytes([0, 255]))
    return {
        "rgba.png": lambda path: save(rgba, path),
        "la.png": lambda path: Image.fromarray(np.dstack([black, alpha])).save(path),
        "index.png": palette(mask, transparency=0),
        "several.png": both,
        "key.png": lambda path: save(key, path, transparency=77),
        "rgb-key.png": lambda path: save(np.dstack([key] * 3), path, transparency=(77, 77, 77)),
        "bit-key.png": lambda path: Image.fromarray(~mask).save(path, transparency=255),
        "index.gif": palette(mask, transparency=0),
        "rgba.webp": lambda path: save(rgba, path, lossless=True, exact=True),
        "rgba.tif": lambda path: save(rgba, path),
        "la.tif": lambda path: Image.fromarray(np.dstack([black, alpha])).save(path),
        "rgba.avif": lambda path: save(rgba, path, quality=100),
        "rgba.jp2": lambda path: save(rgba, path),
        "rgba.bmp": lambda path: bmp(path, rgba),
    }


def bmp(path: Path, rgba: Array) -> None:
    """A BMP of version 4, whose masks name an alpha channel."""
    height, width = rgba.shape[:2]
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, rgba.nbytes, 2835, 2835, 0, 0)
    rest = masks + bytes(108 - len(head) - len(masks))
    begin = 14 + 108
    pixels = rgba[..., [2, 1, 0, 3]].tobytes()
    path.write_bytes(
        b"BM" + struct.pack("<IHHI", begin + len(pixels), 0, 0, begin) + head + rest + pixels
    )


@pytest.mark.parametrize("background", [WHITE, (255, 0, 255), (0, 0, 0)])
@pytest.mark.parametrize("name", icons(np.ones((40, 60), bool)))
def test_what_is_transparent_shows_the_background(
    name: str, background: tuple[int, int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    mask = np.zeros((40, 60), bool)
    top, left = rng.integers(1, 20, 2)
    mask[top : top + 20, left : left + 30] = True
    path = tmp_path / name
    icons(mask)[name](path)
    wanted = np.where(mask[..., None], 0, background)
    near = 12 if name.endswith("avif") else 0
    edge = 2 * (name.endswith("avif"))
    got = np.abs(read(path, "#{:02x}{:02x}{:02x}".format(*background)) - wanted)
    assert got.mean() <= near / 4 and (edge or got.max() == 0)
    assert found(path).traits & TRANSPARENT


def test_an_opaque_image_is_as_without_alpha(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
    save(np.dstack([pixels, np.full((40, 60), 255, np.uint8)]), tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", "red"), pixels)


def test_half_transparent_is_half_the_background(tmp_path: Path) -> None:
    save(np.full((8, 8, 4), (0, 0, 0, 128), np.uint8), tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str, tmp_path: Path) -> None:
    image = (
        Image.radial_gradient("L").convert("RGB").convert(mode)
        if mode != "LAB"
        else (Image.merge("LAB", [Image.radial_gradient("L")] * 3))
    )
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif")
    image.save(path)
    with Image.open(path) as stored:
        wanted = np.asarray(stored.convert("RGB")).astype(int)
    assert np.array_equal(read(path), wanted)
    assert found(path).traits == 0


# --- formats -------------------------------------------------------------------------------------

DISGUISED: dict[str, tuple[bytes, str]] = {
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n", "EPS"),
    "EPS with a preview": (b"\xc5\xd0\xd3\xc6" + bytes(60), "EPS"),
    "PDF": (b"%PDF-1.7\n", "PDF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "a page": (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "nothing": (b"", "empty"),
    "zeros": (bytes(2000), "only zeros"),
    "text": (b"hello", "unknown"),
    "PSD": (b"8BPS\0\1" + bytes(60), "PSD"),
    "ICO": (b"\0\0\1\0\1\0" + bytes(60), "ICO"),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(60), "WMF"),
    "FITS": (b"SIMPLE  =                    T" + bytes(60), "FITS"),
    "ZIP": (b"PK\3\4" + bytes(60), "a ZIP archive"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100), "unknown"),
    "cut TIFF": (b"II*\0\x08\0\0\0", "Corrupt"),
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_a_file_in_disguise_is_named_by_its_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    """No decoder runs but the promised ones, so none that starts a program."""
    for name, (factory, accepts) in Image.OPEN.items():
        if name not in decoding.FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (forbidden, accepts))
        assert factory is not forbidden
    content, named = DISGUISED[kind]
    folder(tmp_path, np.random.default_rng(0))
    (tmp_path / "D/train/cat/1.jpg").write_bytes(content)
    refusal = fails(*train_teacher(tmp_path / "D", tmp_path / "t.safetensors"))
    assert refusal.code == "image-damaged"
    assert named in refusal and "cat/1.jpg" in refusal and "--broken skip" in refusal


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("started")


def images(root: Path) -> tuple[object, ...]:
    return "--dataset", f"imagefolder:{root}", "--image-size", 32, "--device", "cpu"


def train_teacher(root: Path, out: Path) -> tuple[object, ...]:
    return "train-teacher", *images(root), "--model", "resnet8", "--epochs", 1, "--out", out


def precompute(root: Path, teacher: Path, out: Path) -> tuple[object, ...]:
    weights = ("--teacher", "resnet8", "--teacher-weights", teacher)
    return "precompute", *images(root), *weights, "--clip", "none", "--views", 2, "--out", out


def distill(cache: Path, out: Path) -> tuple[object, ...]:
    student = ("--student", "resnet8", "--method", "kd", "--epochs", 1, "--device", "cpu")
    return "distill", "--cache", cache, *student, "--out", out


def folder(root: Path, rng: np.random.Generator) -> Path:
    """Two classes of six and two images, of 8 bits."""
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / "D" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
                save(pixels, root / "D" / split / name / f"{number}.png")
    return root / "D"


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (2, 201)])
def test_images_of_absurd_sides_are_refused_before_they_are_resized(
    height: int, width: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    root = folder(tmp_path, rng)
    save(np.zeros((height, width), np.uint8), root / "train/cat/1.png")
    with refuses("image-damaged", f"{width:,} × {height:,}", root / "train/cat/1.png"):
        load_dataset(Images(dataset=f"imagefolder:{root}"))
    left = load_dataset(Images(dataset=f"imagefolder:{root}", broken="skip"))
    assert left.skipped == ("train/cat/1.png",) and len(left.train) == 11


def test_a_slender_image_that_is_not_absurd_is_read(tmp_path: Path) -> None:
    save(np.zeros((2, 200), np.uint8), tmp_path / "a.png")
    assert found(tmp_path / "a.png").size == (2, 200)


def test_heic_is_read_with_its_package_and_named_without(tmp_path: Path) -> None:
    pillow_heif = optional.load("pillow_heif")
    path = tmp_path / "a.heic"
    pixels = np.full((40, 60, 3), (200, 30, 30), np.uint8)
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path)
    assert np.abs(read(path) - pixels).mean() < 8
    fault = decoding.look(path, decode=False, formats=("JPEG", "PNG")).fault
    assert "pip install pillow-heif" in fault


# --- datasets ------------------------------------------------------------------------------------


def mixed(root: Path, rng: np.random.Generator) -> Path:
    """Add one file of each kind that is not read as it is stored."""
    folder(root, rng)
    v = rng.random((40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(whole(v, 255, np.uint8), root / "D/train/cat/turned.jpg", exif=exif)
    save(np.dstack([whole(v, 255, np.uint8)] * 4), root / "D/train/dog/clear.png")
    save(whole(v, 4095), root / "D/train/dog/deep.tif")
    frames = [Image.fromarray(whole(v, 255, np.uint8)) for _ in range(3)]
    frames[1].putpixel((3, 3), 0)
    frames[0].save(root / "D/val/dog/film.gif", save_all=True, append_images=frames[1:])
    return root / "D"


def test_assumptions_are_logged_and_recorded(
    tmp_path: Path, rng: np.random.Generator, run: Run
) -> None:
    root = mixed(tmp_path, rng)
    cache, teacher = tmp_path / "s.zarr", tmp_path / "t.safetensors"
    for command in (train_teacher(root, teacher), precompute(root, teacher, cache)):
        outcome = run(*command)
        assert outcome.code == 0, outcome.err
        assert "rotated 1 image upright" in outcome.err and "EXIF" in outcome.err
        assert "placed 1 image with transparency on #ffffff (--background)" in outcome.err
        assert "read 1 16-bit TIFF image with 0 as black and 4,095 as white (" in outcome.err
        assert "first frame of 1 image" in outcome.err
    entry = richkd.open_cache(cache).manifest["dataset"]
    assert entry["decoding"] == {"background": "#ffffff", "ranges": {"16-bit TIFF": [0, 4095]}}
    student = run(*distill(cache, tmp_path / "r"))
    assert student.code == 0, student.err
    shift = tmp_path / "shift"
    shutil.copytree(root / "val", shift)
    (shift / "cat/broken.png").write_bytes(b"hello")
    evaluate = ("evaluate", tmp_path / "r", "--device", "cpu", "--shift", shift)
    refused = run(*evaluate)
    assert refused.code == 2 and "[image-damaged]" in refused.err
    assert "--broken" not in refused.err  # which evaluate does not have
    (shift / "cat/broken.png").unlink()
    save(whole(rng.random((40, 60)), 255), shift / "cat/dark.tif")
    outcome = run(*evaluate)
    assert outcome.code == 0, outcome.err
    assert "read 1 16-bit TIFF image with 0 as black and 4,095 as white (as in" in outcome.err
    assert "; 1 use" in outcome.err


def test_stage_two_decodes_as_stage_one_did(
    tmp_path: Path, rng: np.random.Generator, run: Run
) -> None:
    """Whatever the files of another kind on this machine would suggest by themselves."""
    root = mixed(tmp_path, rng)
    settings = Images(dataset=f"imagefolder:{root}", background="red", pixel_range=(0, 9000))
    first = load_dataset(settings)
    assert first.decoding is not None
    plain = Images(dataset=f"imagefolder:{root}")
    again = load_dataset(plain, skipped=[], decoding=first.decoding)
    assert again.fingerprint == first.fingerprint != load_dataset(plain).fingerprint
    for one, other in zip(first.splits.values(), again.splits.values(), strict=True):
        assert isinstance(one.images, ImageFiles) and isinstance(other.images, ImageFiles)
        for index in range(len(one)):
            assert one.images.open(index).tobytes() == other.images.open(index).tobytes()


def test_a_scan_is_remembered_with_all_it_found(tmp_path: Path, rng: np.random.Generator) -> None:
    root = mixed(tmp_path, rng)
    first = list_images(root / "train", "refuse")
    again = list_images(root / "train", "refuse", look=forbidden)
    assert np.array_equal(first.traits, again.traits) and np.array_equal(first.sizes, again.sizes)
    assert first.values.kinds == again.values.kinds == ["16-bit TIFF"]
    for name in ("kind", "low", "high"):
        one, other = getattr(first.values, name), getattr(again.values, name)
        assert np.array_equal(one, other, equal_nan=name != "kind")
    assert np.count_nonzero(list_images(root / "val", "refuse").traits & FRAMES) == 1


def first_fingerprint(dataset: Dataset) -> str:
    """The fingerprint that the first version gave: of names, sizes and labels."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        assert isinstance(split.images, ImageFiles)
        assert isinstance(split.images.source, FolderFiles)
        root, paths = split.images.source.root, split.images.source.paths
        for path in paths:
            digest.update(f"{path}\0{(root / path).stat().st_size}\0".encode())
        digest.update(split.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def test_plain_files_keep_their_fingerprint(tmp_path: Path, rng: np.random.Generator) -> None:
    dataset = load_dataset(Images(dataset=f"imagefolder:{folder(tmp_path, rng)}"))
    assert dataset.fingerprint == first_fingerprint(dataset) and dataset.decoding is None


def test_an_earlier_cache_whose_files_are_read_differently_now_is_refused(
    tmp_path: Path, rng: np.random.Generator, run: Run, fails: Fails
) -> None:
    root = mixed(tmp_path, rng)
    cache, teacher = tmp_path / "s.zarr", tmp_path / "t.safetensors"
    run(*train_teacher(root, teacher))
    made = run(*precompute(root, teacher, cache))
    assert made.code == 0, made.err
    manifest = richkd.open_cache(cache).manifest
    del manifest["dataset"]["decoding"]
    dataset = load_dataset(Images(dataset=f"imagefolder:{root}", image_size=32))
    manifest["dataset"]["fingerprint"] = first_fingerprint(dataset)
    write_sealed(Folder(cache), manifest)
    refusal = fails(*distill(cache, tmp_path / "r"))
    assert refusal.code == "images-read-otherwise" and "EXIF" in refusal


def test_an_image_that_became_unreadable_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    dataset = load_dataset(Images(dataset=f"imagefolder:{folder(tmp_path, rng)}"))
    files = dataset.train.images
    assert isinstance(files, ImageFiles)
    path = Path(files.name(3))
    size = path.stat().st_size
    for content in (bytes(size), path.read_bytes()[:40], b""):
        path.write_bytes(content)
        with refuses("image-changed", path):
            files.open(3)
    save(np.zeros((32, 40), np.uint16), path)
    with refuses("image-changed", path, "16-bit PNG"):
        files.open(3)
    path.unlink()
    with refuses("image-changed", path):
        files.open(3)


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"background": "sky"}, "value-malformed", "background = 'sky'"),
        ({"background": "#12"}, "value-malformed", "background = '#12'"),
        ({"pixel_range": (1, 1)}, "value-out-of-range", "pixel_range"),
        ({"pixel_range": (1, 2, 3)}, "value-out-of-range", "pixel_range"),
        ({"dataset": "shapes", "background": "black"}, "value-out-of-range", "shapes"),
        ({"dataset": "cifar10", "pixel_range": (0, 1)}, "value-out-of-range", "cifar10"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], code: str, named: str) -> None:
    with refuses(code, named):
        Images(**{"dataset": "imagefolder:D", **settings})


@pytest.mark.parametrize(
    "entry",
    [
        {"background": "sky", "ranges": {}},
        {"background": "#ffffff", "ranges": {"16-bit PNG": [4095, 0]}},
        {"background": "#ffffff", "ranges": {"16-bit PNG": [0]}},
        {"background": "#ffffff", "ranges": {"16-bit PNG": [0, float("inf")]}},
        {"background": "#ffffff", "ranges": {"16-bit PNG": [0, "x"]}},
        {"background": "#ffffff"},
        "white",
    ],
)
def test_a_manifest_that_says_nonsense_is_refused(entry: Any, store: Path) -> None:
    manifest = dict(richkd.open_cache(store).manifest)
    assert manifest_fault(manifest) is None
    manifest["dataset"] = {**manifest["dataset"], "decoding": entry}
    assert "decoding" in str(manifest_fault(manifest))

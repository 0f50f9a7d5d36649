"""Image files as a viewer shows them: upright, on a background, as bright as they are.

Three things are not in the pixels as they are stored. The EXIF orientation says how to turn them;
an alpha channel says where the background shows; and values of 16 bits, 32 bits or floats need
to be told which of them are black and white. That range is decided once for a data set
(`Decoding.of`), recorded in the manifest, and the same in every later reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from richkd.core.colours import read_colour
from richkd.core.errors import RichKDError
from richkd.data.entries import DecodingEntry

# What is read: Pillow's name of a format, and what its files are called. No other decoder ever
# runs, whatever a file's name and content say.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx"),
    "HEIF": (".heic", ".heif", ".hif"),  # with pillow-heif
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MOST_SLENDER = 100  # the longer side by the shorter one; a resized crop of more takes gigabytes
TAIL = 0.01  # per cent of an image's values that may lie outside the range at either end

# What a file needs besides its stored pixels, as bits.
TURNED, TRANSPARENT, DEEP, FRAMES = 1, 2, 4, 8
CHANGED = TURNED | TRANSPARENT | DEEP  # what earlier versions of richkd read otherwise
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 274
_WHITE_IS_ZERO, _SIGNED = 0, 2
_DECLARED = {"16-bit PGM", "16-bit JPEG2000"}  # their files name the largest value; Pillow scales

# Images may have up to twice Pillow's MAX_IMAGE_PIXELS (179 million); it refuses more itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Depth:
    """How an image's values are stored, where that is not in 8 bits."""

    kind: str  # for people, e.g. "16-bit PNG"
    upper_byte: bool = False  # of three channels, Pillow keeps the upper 8 of 16 bits
    inverted: bool = False  # the lowest value is white


@dataclass(frozen=True)
class Found:
    """What a file says of itself."""

    size: tuple[int, int] = (0, 0)  # height and width, upright; 0 where it cannot be opened
    traits: int = 0  # of TURNED, TRANSPARENT, …
    kind: str = ""  # of its depth; empty for 8 bits
    low: float = np.nan  # its lowest and highest value but for `TAIL`, where it was decoded
    high: float = np.nan
    fault: str = ""  # why it cannot be used


@dataclass(frozen=True)
class Values:
    """The values of the files of one split that are deeper than 8 bits."""

    kinds: Sequence[str]
    kind: NDArray[np.uint8]  # [N]: 0 for 8 bits, else one more than a place in kinds
    low: NDArray[np.float64]  # [N]
    high: NDArray[np.float64]  # [N]


@dataclass(frozen=True)
class Decoding:
    """How the files of one data set become RGB."""

    background: tuple[int, int, int] = (255, 255, 255)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # kind: black, white

    @classmethod
    def of(
        cls,
        background: str,
        pixel_range: tuple[float, ...] | None,
        splits: Sequence[Values],
    ) -> Decoding:
        """Decide the ranges of all kinds of files that there are.

        A kind's range is the one given, or the one that its format defines, or comes from the
        values of the training images (of the first split that has files of the kind):

        - whole numbers: 0 to 2^b − 1 for the fewest bits b of 8, 10, 12, … 32 that hold them all
          (15 and 31, too, of types with a sign);
        - floats: 0 to 1, to 255 or to 65,535, whichever they fill to more than a quarter;
        - other floats, and whatever has values below 0: from the lowest to the highest.

        Of every image, `TAIL` per cent at either end do not count.

        Args:
            background: a colour as of `read_colour`.
            pixel_range: black and white of all files deeper than 8 bits, where that is known.
            splits: the values in them, training images first.
        """
        ranges: dict[str, tuple[float, float]] = {}
        for values in splits:
            for number, kind in enumerate(values.kinds, 1):
                these = values.kind == number
                if kind in ranges or not these.any():
                    continue
                low, high = float(values.low[these].min()), float(values.high[these].max())
                if pixel_range is not None:
                    ranges[kind] = pixel_range[0], pixel_range[1]
                elif not np.isnan(low):  # else the files were not decoded
                    ranges[kind] = _range(kind, low, high)
        return cls(read_colour(background), ranges)

    @property
    def entry(self) -> DecodingEntry:
        """For a manifest."""
        ranges = {kind: list(ends) for kind, ends in sorted(self.ranges.items())}
        return {"background": "#{:02x}{:02x}{:02x}".format(*self.background), "ranges": ranges}

    @classmethod
    def from_entry(cls, entry: DecodingEntry) -> Decoding:
        """What `entry` gave."""
        ranges = {kind: (float(low), float(high)) for kind, (low, high) in entry["ranges"].items()}
        return cls(read_colour(entry["background"]), ranges)

    def read(self, path: Path) -> Image.Image:
        """The image in RGB, whatever it is stored as.

        Raises:
            RichKDError: the file was an image once, and is not, or not of that depth.
        """
        try:
            with _opened(path) as image:
                depth = depth_of(image)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return self._rgb(image if depth is None else self._in_bytes(image, depth))
        except RichKDError:
            raise
        except Exception as error:  # decoders raise errors of every kind
            raise RichKDError(
                f"{path} cannot be read any more ({reason_of(error, path)}); restore it, or make "
                f"the store again with --broken skip",
                code="image-changed",
            ) from None

    def _in_bytes(self, image: Image.Image, depth: Depth) -> Image.Image:
        """Values of any depth as 8 bits; transparency stays."""
        if depth.kind not in self.ranges:
            raise RichKDError(
                f"{image.filename} is a {depth.kind} image, as none was when the folder was looked "  # type: ignore[attr-defined]
                f"at; restore it, or make the store again",
                code="image-changed",
            )
        low, high = self.ranges[depth.kind]
        values = values_of(image, depth)
        shares = (np.nan_to_num(values, nan=low) - low) / (high - low)
        shares = shares.clip(0, 1)
        if depth.inverted:
            shares = 1 - shares
        grey = Image.fromarray((255 * shares).round().astype(np.uint8))
        if depth.upper_byte and image.mode in ("RGBA", "LA"):
            grey.putalpha(image.getchannel("A"))
        elif "transparency" in image.info and values.ndim == 2:
            alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
            grey.putalpha(Image.fromarray(alpha))
        return grey

    def _rgb(self, image: Image.Image) -> Image.Image:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, self.background)
            return Image.alpha_composite(ground, _rgba(image)).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _rgba(image: Image.Image) -> Image.Image:
    """With straight alpha, from every mode that has some."""
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return (image.convert(straight) if straight else image).convert("RGBA")


def _range(kind: str, low: float, high: float) -> tuple[float, float]:
    """Black and white of a kind of files whose values lie in low..high."""
    if kind in _DECLARED:
        return 0.0, 65535.0
    if low < 0:
        return low, max(high, low + 1e-6 * -low)
    if kind.startswith("float"):
        usual = (top for top in (1.0, 255.0, 65535.0) if top / 4 < high <= top)
        return 0.0, next(usual, high or 1.0)
    usual_bits = [*range(8, 33, 2), *([15, 31] if kind.startswith("signed") else [])]
    bits = next(bits for bits in sorted(usual_bits) if high < 2**bits)
    return 0.0, float(2**bits - 1)


def values_of(image: Image.Image, depth: Depth) -> NDArray[np.floating[Any]]:
    """The values of a decoded image: [H,W], or [H,W,3] of colours, to their upper byte."""
    if depth.upper_byte:
        plain = (
            image
            if image.mode in ("L", "RGB")
            else image.convert("L" if image.mode == "LA" else "RGB")
        )
        return np.asarray(plain, np.float32) * 257
    stored = np.asarray(image)
    if depth.kind.startswith("32-bit") and stored.dtype == np.int32:
        stored = stored.view(np.uint32)  # Pillow has no mode for them
    return stored.astype(np.float32 if stored.itemsize < 4 else np.float64)


def depth_of(image: Image.Image) -> Depth | None:
    """How a file that is opened and not loaded stores its values; None for 8 bits or fewer."""
    name, tags = image.format or "", getattr(image, "tag_v2", {})
    bits = int(tags[_TIFF_BITS][0]) if _TIFF_BITS in tags else 16
    inverted = name == "TIFF" and tags.get(_TIFF_PHOTOMETRIC, 1) == _WHITE_IS_ZERO
    if image.mode == "F":
        return Depth(f"float {name}", inverted=inverted)
    if name == "PPM" and image.mode == "I":
        return Depth("16-bit PGM")
    if image.mode.startswith("I"):
        signed = _SIGNED in tags.get(_TIFF_SAMPLE_FORMAT, ())
        return Depth(f"{'signed ' * signed}{bits}-bit {name}", inverted=inverted)
    coded = [part for tile in getattr(image, "tile", ()) for part in _strings(tile[-1])]
    if name in ("PNG", "TIFF") and any(";16" in part for part in coded):
        return Depth(f"16-bit colour {name}", upper_byte=True)
    return None


def _strings(arguments: object) -> list[str]:
    parts = arguments if isinstance(arguments, tuple | list) else (arguments,)
    return [part for part in parts if isinstance(part, str)]


def look(path: Path, decode: bool) -> Found:
    """What a file says of itself; `decode` reads it to its end, to find whether it is whole."""
    found = Found()
    try:
        with _opened(path) as image:
            depth = depth_of(image)
            found = _header(image, depth)
            return _decoded(image, depth, found) if decode else found
    except Exception as error:  # decoders raise errors of every kind
        return replace(found, fault=reason_of(error, path))


def _header(image: Image.Image, depth: Depth | None) -> Found:
    width, height = image.size
    traits = TRANSPARENT * image.has_transparency_data | DEEP * (depth is not None)
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        traits |= TURNED
        if orientation > 4 and image.format != "TIFF":  # whose sides Pillow swaps itself
            width, height = height, width
    fault = ""
    if max(width, height) > MOST_SLENDER * min(width, height):
        fault = f"one of its sides, {width:,} × {height:,}, is over {MOST_SLENDER} times the other"
    return Found((height, width), traits, depth.kind if depth else "", fault=fault)


def _decoded(image: Image.Image, depth: Depth | None, found: Found) -> Found:
    """The same with what only the pixels tell."""
    image.load()
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo, its preview
        found = replace(found, traits=found.traits | FRAMES)
    if depth is None:
        return found
    values = values_of(image, depth)
    values = values[np.isfinite(values)]
    if not values.size:
        return replace(found, fault="none of its values is a number")
    low, high = np.percentile(values, (TAIL, 100 - TAIL)).tolist()
    return replace(found, low=low, high=high)


def reason_of(error: Exception, path: Path) -> str:
    """Why a file cannot be read, for people: by its true format where that is another one."""
    if isinstance(error, UnidentifiedImageError):
        return true_format(path)
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
    return text.replace(str(path), "it")


def true_format(path: Path) -> str:
    """What a file is that is none of the formats which are read; no decoder runs."""
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "it is empty"
    if not begin.strip(b"\0"):
        return "it holds nothing but zeros"
    brand = begin[8:12] if begin[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "it is HEIC, which pip install pillow-heif makes readable"
    text = begin.lstrip().lower()
    starts = {
        b"%pdf": "PDF",
        b"<svg": "SVG",
        b"<?xml": "XML",
        b"<!doctype html": "an HTML page",
        b"<html": "an HTML page",
        b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched",
        b"pk\3\4": "a ZIP archive",
    }
    named = next((name for start, name in starts.items() if text.startswith(start)), None)
    if named is None:
        Image.init()
        begin = begin.ljust(64, b"\0")
        named = next(
            (
                name
                for name, (_, accepts) in Image.OPEN.items()
                if accepts is not None and accepts(begin) is True
            ),
            None,
        )
    if named in FORMATS:
        return f"it is {named} of a kind that Pillow does not decode"
    return f"it is {named}" if named else "it is in no format that is known"


def _opened(path: Path) -> Image.Image:
    """The file, opened by the decoders of `FORMATS` and no others."""
    return Image.open(path, formats=readable())


@cache
def readable() -> tuple[str, ...]:
    """The formats that this installation reads."""
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def describe_decoding(
    decoding: Decoding, values: Sequence[Values], traits: NDArray[np.uint8], origin: str = ""
) -> list[str]:
    """What was assumed in reading some of the files, a line each.

    Args:
        decoding: how they are read.
        values: of the files, split by split.
        traits: of all files.
        origin: where the ranges of values come from, if not from the values or the format.
    """

    def count(trait: int) -> int:
        return int(np.count_nonzero(traits & trait))

    lines = []
    if count(TURNED):
        lines.append(f"images turned upright, by their EXIF orientation: {count(TURNED):,}")
    if count(TRANSPARENT):
        colour = decoding.entry["background"]
        lines.append(
            f"images with transparency, laid on {colour} (--background): {count(TRANSPARENT):,}"
        )
    if count(FRAMES):
        lines.append(f"files of several images, of which the first is read: {count(FRAMES):,}")
    for kind, (low, high) in sorted(decoding.ranges.items()):
        places = [[*each.kinds, kind].index(kind) + 1 for each in values]
        highs = np.concatenate(
            [each.high[each.kind == place] for each, place in zip(values, places, strict=True)]
        )
        if not highs.size:
            continue
        dark = int(np.count_nonzero(highs < low + (high - low) / 8))
        beyond = int(np.count_nonzero(highs > high))
        source = "their format" if kind in _DECLARED else "their values"
        how = origin or f"by {source}; --pixel-range says otherwise"
        lines.append(
            f"{kind} images, from {low:,.6g} (black) to {high:,.6g} (white; {how}): {len(highs):,}"
            + (f", {dark:,} of them below an eighth of that" if dark else "")
            + (f", {beyond:,} of them with values above it" if beyond else "")
        )
    return lines

"""Decode image files as a viewer shows them: upright, on a background, and at full brightness.

The stored pixels lack three things. The EXIF orientation tells how to rotate them, an alpha channel
where the background is visible, and values of 16 bits, 32 bits or floats need a range from
black to white. That range is chosen once per dataset (`Decoding.of`), recorded in the manifest and
used whenever the files are read again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from richkd.data.sources import Encoded

# The supported formats by Pillow's names, with their file extensions. No other decoder ever runs,
# whatever a file's name and content are.
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
MAX_ASPECT_RATIO = 100  # a resized crop of a longer image takes gigabytes
TAIL = 0.01  # percentage of an image's values that are ignored at either end of the range

# Flags of a file: what matters besides its stored pixels.
ROTATED, TRANSPARENT, DEEP, FRAMES = 1, 2, 4, 8
CHANGED = ROTATED | TRANSPARENT | DEEP  # read differently by earlier versions of richkd
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 274
_WHITE_IS_ZERO, _SIGNED = 0, 2
_DECLARED = {"16-bit PGM", "16-bit JPEG2000"}  # files state their largest value; Pillow scales

# Pillow warns above MAX_IMAGE_PIXELS and refuses more than twice as many (179 million) itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Depth:
    """How an image stores values that do not have 8 bits."""

    kind: str  # for people, e.g. "16-bit PNG"
    upper_byte: bool = False  # of colours, Pillow keeps only the upper 8 of 16 bits
    inverted: bool = False  # the lowest value is white


@dataclass(frozen=True)
class Photograph:
    """An opened photograph, upright and in RGB, whole or reduced."""

    image: Image.Image
    size: tuple[int, int]  # height and width of the whole photograph, in which boxes are given
    scale: tuple[float, float] = (1.0, 1.0)  # pixels of the image per pixel of it, down and across

    @classmethod
    def of(cls, image: Image.Image | Photograph) -> Photograph:
        """Return an image that is not reduced as a photograph."""
        if isinstance(image, Photograph):
            return image
        return cls(image, (image.height, image.width))

    @property
    def reduced(self) -> bool:
        """Whether there are fewer pixels than those of the photograph."""
        return self.scale != (1.0, 1.0)


@dataclass(frozen=True)
class Found:
    """The properties of an image file."""

    size: tuple[int, int] = (0, 0)  # height and width when upright; 0 if it cannot be opened
    traits: int = 0  # flags: ROTATED, TRANSPARENT, …
    kind: str = ""  # `Depth.kind`; empty for 8 bits
    low: float = np.nan  # its lowest and highest value, without `TAIL`, if it was decoded
    high: float = np.nan
    fault: str = ""  # why it cannot be used


@dataclass(frozen=True)
class Values:
    """The values in files of one split that are deeper than 8 bits."""

    kinds: Sequence[str]
    kind: NDArray[np.uint8]  # [N]: 0 for 8 bits, else 1 + position in kinds
    low: NDArray[np.float64]  # [N]
    high: NDArray[np.float64]  # [N]

    def take(self, which: NDArray[np.bool_]) -> Values:
        """Select files by a mask."""
        return replace(self, kind=self.kind[which], low=self.low[which], high=self.high[which])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """Return a mask [N] of the files of one kind."""
        mask: NDArray[np.bool_] = self.kind == 1 + [*self.kinds, kind].index(kind)
        return mask


@dataclass(frozen=True)
class Decoding:
    """How the files of one dataset become RGB images."""

    background: tuple[int, int, int] = (255, 255, 255)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # kind: black, white

    @classmethod
    def of(
        cls,
        background: str,
        pixel_range: tuple[float, ...] | None,
        splits: Sequence[Values],
    ) -> Decoding:
        """Choose a range from black to white for every kind of file.

        The range is the given one, or the one that the format defines, or is derived from the
        values of the training images (or of the first split that has files of this kind):

        - integers: 0 to 2^b − 1 for the smallest b of 8, 10, 12, … 32 that holds all of them
          (also 15 and 31 for signed types);
        - floats: 0 to 1, 255 or 65,535, if they fill more than a quarter of it;
        - other floats, and all values below 0: from the lowest to the highest.

        `TAIL` per cent of every image are ignored at either end.

        Args:
            background: a colour that `read_colour` accepts.
            pixel_range: black and white of all files deeper than 8 bits; None to derive them.
            splits: the values in each split, training images first.
        """
        ranges: dict[str, tuple[float, float]] = {}
        for values in splits:
            for kind in values.kinds:
                these = values.of_kind(kind)
                if kind in ranges or not these.any():
                    continue
                low, high = float(values.low[these].min()), float(values.high[these].max())
                if pixel_range is not None:
                    ranges[kind] = pixel_range[0], pixel_range[1]
                elif not np.isnan(low):  # NaN: the files were not decoded
                    ranges[kind] = _range(kind, low, high)
        return cls(read_colour(background), ranges)

    @property
    def entry(self) -> DecodingEntry:
        """The entry of the manifest."""
        ranges = {kind: list(ends) for kind, ends in sorted(self.ranges.items())}
        return {"background": "#{:02x}{:02x}{:02x}".format(*self.background), "ranges": ranges}

    @classmethod
    def from_entry(cls, entry: DecodingEntry) -> Decoding:
        """Restore from an entry of a manifest."""
        ranges = {kind: (float(low), float(high)) for kind, (low, high) in entry["ranges"].items()}
        return cls(read_colour(entry["background"]), ranges)

    def read(self, file: Encoded, name: str = "") -> Image.Image:
        """Read an image file as RGB, with all of its pixels; as `photograph`."""
        return self.photograph(file, name).image

    def photograph(self, file: Encoded, name: str = "", most: float = 1.0) -> Photograph:
        """Read an image file as RGB.

        Args:
            file: the path, or the open file.
            name: what messages call the image; its path by default.
            most: by how much its sides may be reduced; a JPEG is then decoded at the next larger
                of 1/8, 1/4 and 1/2 of its size, which takes less time.

        Raises:
            RichKDError: the file has changed: it cannot be read, or its kind has no range.
        """
        try:
            with Image.open(file, formats=readable()) as image:
                depth = depth_of(image)
                size, factor = image.size, _draft(image, most)
                image.load()
                before = image.size
                ImageOps.exif_transpose(image, in_place=True)
                if image.size != before:
                    size = size[::-1]
                found = self._rgb(
                    image if depth is None else self._in_bytes(image, depth, name or str(file))
                )
                if factor == 1:
                    return Photograph.of(found)
                return Photograph(found, size[::-1], (1 / factor, 1 / factor))
        except RichKDError:
            raise
        except Exception as error:  # decoders raise errors of every kind
            raise RichKDError(
                f"{name or file} can no longer be read ({reason_of(error, file)}); restore it, or "
                f"write the cache again with richkd precompute --broken skip --overwrite",
                code="image-changed",
            ) from None

    def _in_bytes(self, image: Image.Image, depth: Depth, name: str) -> Image.Image:
        """Scale values of any depth to 8 bits and keep the transparency."""
        if depth.kind not in self.ranges:
            raise RichKDError(
                f"{name} is a {depth.kind} image, but there was none when the dataset was first "
                f"read; restore the file, or write the cache again with richkd precompute "
                f"--overwrite",
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
        return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies


def _draft(image: Image.Image, most: float) -> int:
    """Let the decoder of an opened JPEG reduce it by a power of two; return by how much.

    The last row and column of blocks may be incomplete. In an image that is still to be turned they
    would come first and shift it, so then they must be whole.
    """
    if most < 2 or image.format != "JPEG":
        return 1
    still = upright(image)
    width, height = image.size
    factors = [each for each in (8, 4, 2) if each <= most]
    factor = next((e for e in factors if still or not (width % e or height % e)), 1)
    if factor == 1:
        return 1
    drafted = image.draft(image.mode, (max(1, width // factor), max(1, height // factor)))
    return 1 if drafted is None else round(width / drafted[1][2])


def upright(image: Image.Image) -> bool:
    """Return whether an opened image is stored as it is shown."""
    return bool(image.getexif().get(_ORIENTATION, 1) == 1)


def _rgba(image: Image.Image) -> Image.Image:
    """Convert an image with any kind of alpha to straight alpha."""
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return (image.convert(straight) if straight else image).convert("RGBA")


def _range(kind: str, low: float, high: float) -> tuple[float, float]:
    """Return black and white for a kind of files with values from low to high."""
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
    """Return the values of a decoded image: [H,W], or [H,W,3] for colours (upper bytes only)."""
    if depth.upper_byte:
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode == "LA" else "RGB")
        return np.asarray(image, np.float32) * 257
    stored = np.asarray(image)
    if depth.kind.startswith("32-bit") and stored.dtype == np.int32:
        stored = stored.view(np.uint32)  # Pillow has no unsigned mode
    return stored.astype(np.float32 if stored.itemsize < 4 else np.float64)


def depth_of(image: Image.Image) -> Depth | None:
    """Return how an opened, not yet loaded file stores its values; None for up to 8 bits."""
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


def look(file: Encoded, decode: bool, formats: tuple[str, ...] = ()) -> Found:
    """Return the properties of an image file.

    Args:
        file: the path, or the open file.
        decode: read the pixels too, and so check that the file is intact.
        formats: the formats that may be read; empty for all readable ones.
    """
    found = Found()
    try:
        with Image.open(file, formats=formats or readable()) as image:
            depth = depth_of(image)
            found = _header(image, depth)
            return _decoded(image, depth, found) if decode else found
    except Exception as error:  # decoders raise errors of every kind
        return replace(found, fault=reason_of(error, file))


def _header(image: Image.Image, depth: Depth | None) -> Found:
    width, height = image.size
    traits = TRANSPARENT * image.has_transparency_data | DEEP * (depth is not None)
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        traits |= ROTATED
        if orientation > 4 and image.format != "TIFF":  # Pillow swaps the sides of TIFFs itself
            width, height = height, width
    fault = ""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        fault = f"one side is more than {MAX_ASPECT_RATIO} times the other: {width:,} × {height:,}"
    return Found((height, width), traits, depth.kind if depth else "", fault=fault)


def _decoded(image: Image.Image, depth: Depth | None, found: Found) -> Found:
    """Add the properties that only the decoded pixels reveal."""
    image.load()
    # an MPO file is a photograph with its preview
    if image.format != "MPO" and getattr(image, "is_animated", False):
        found = replace(found, traits=found.traits | FRAMES)
    if depth is None:
        return found
    values = values_of(image, depth)
    values = values[np.isfinite(values)]
    if not values.size:
        return replace(found, fault="none of its values is a finite number")
    low, high = np.percentile(values, (TAIL, 100 - TAIL)).tolist()
    return replace(found, low=low, high=high)


def reason_of(error: Exception, file: Encoded) -> str:
    """Describe why a file cannot be read, by its true format if it is not a supported image."""
    if isinstance(error, UnidentifiedImageError):
        return true_format(file)
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
    return text.replace(str(file), "it")


def true_format(file: Encoded) -> str:
    """Describe the content of a file in no supported format, without running a decoder."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        opened.seek(0)
        begin = opened.read(64)
    if not begin:
        return "it is empty"
    if not begin.strip(b"\0"):
        return "it contains only zeros"
    brand = begin[8:12] if begin[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "it is HEIC; to read such files, pip install pillow-heif"
    text = begin.lstrip().lower()
    starts = {
        b"%pdf": "PDF",
        b"<svg": "SVG",
        b"<?xml": "XML",
        b"<!doctype html": "an HTML page",
        b"<html": "an HTML page",
        b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
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
        return f"it is {named} of a kind that Pillow cannot decode"
    return f"it is {named}" if named else "its format is unknown"


@cache
def readable() -> tuple[str, ...]:
    """Return the formats that this installation can read."""
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def describe_decoding(
    decoding: Decoding, values: Sequence[Values], traits: NDArray[np.uint8], origin: str = ""
) -> list[str]:
    """Describe the assumptions made in reading some of the files, one line each.

    Args:
        decoding: how the files are read.
        values: of the files, split by split.
        traits: of all files.
        origin: where the ranges of values come from, if not from the values or the format.
    """

    def images(trait: int) -> str:
        count = int(np.count_nonzero(traits & trait))
        return f"{count:,} image{'s' * (count != 1)}" if count else ""

    lines = []
    if rotated := images(ROTATED):
        lines.append(f"rotated {rotated} upright, by their EXIF orientation")
    if transparent := images(TRANSPARENT):
        colour = decoding.entry["background"]
        lines.append(f"placed {transparent} with transparency on {colour} (--background)")
    if animated := images(FRAMES):
        lines.append(f"read only the first frame of {animated} with several frames")
    for kind, (low, high) in sorted(decoding.ranges.items()):
        highs = np.concatenate([each.high[each.of_kind(kind)] for each in values])
        if not highs.size:
            continue
        dark = int(np.count_nonzero(highs < low + (high - low) / 8))
        beyond = int(np.count_nonzero(highs > high))
        source = "the format" if kind in _DECLARED else "the values"
        how = origin or f"chosen by {source}; to set it, use --pixel-range"
        lines.append(
            f"read {len(highs):,} {kind} image{'s' * (len(highs) != 1)} with {low:,.6g} as black "
            f"and {high:,.6g} as white ({how})"
            + (f"; {dark:,} use less than an eighth of this range" if dark else "")
            + (f"; {beyond:,} have values above it" if beyond else "")
        )
    return lines

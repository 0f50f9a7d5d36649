"""How the arrays of a cache are created and encoded: codecs, rounding, and files without chunks."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import zarr
from numcodecs import BitRound
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from richkd.store import schema
from richkd.store.location import METADATA
from richkd.store.schema import ArraySpec, Manifest

# No chunk may be absent: an absent chunk reads as zeros, which would pass for data.
CONFIG: Any = {"write_empty_chunks": True}
ROUNDED = {
    "teacher_logits",
    "teacher_features",
    "fused_logits",
    "clip_features",
    "teacher_logits_top",
    "fused_logits_top",
}


def blank_files(manifest: Manifest) -> dict[str, bytes]:
    """Return the metadata files of a cache by name, the manifest's first."""
    files: dict[str, Any] = {}
    group = zarr.create_group(
        MemoryStore(files), zarr_format=3, attributes=cast(dict[str, Any], manifest)
    )
    for name, spec in schema.array_specs(manifest).items():
        group.create_array(
            name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=spec.chunks,
            compressors=_codecs(spec),
            fill_value=0,
            config=CONFIG,
            dimension_names=spec.dimensions,
        )
    return {file: files[file].to_bytes() for file in [METADATA, *sorted({*files} - {METADATA})]}


def encoded_bytes(values: np.ndarray[Any, Any]) -> int:
    """Return the bytes that values take in a cache, as one chunk."""
    files: dict[str, Any] = {}
    spec = ArraySpec(values.shape, str(values.dtype), values.shape, ())
    array = zarr.create_array(
        MemoryStore(files),
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunks,
        compressors=_codecs(spec),
        fill_value=0,
        config=CONFIG,
    )
    array[...] = values
    return sum(len(content) for file, content in files.items() if file != METADATA)


def round_bits(values: np.ndarray[Any, Any], bits: int | None) -> np.ndarray[Any, Any]:
    """Round f16 or f32 values to `bits` mantissa bits, which compress better; None keeps them all.

    The trailing bits become zeros, so decoding needs nothing more.
    """
    if bits is None or bits >= np.finfo(values.dtype).nmant:
        return values
    encoded = BitRound(keepbits=bits).encode(np.ascontiguousarray(values))
    rounded: np.ndarray[Any, Any] = encoded.view(values.dtype).reshape(values.shape)
    return rounded


def _codecs(spec: ArraySpec) -> list[Any]:
    if not spec.compressed:
        return [Crc32cCodec()]
    width = spec.nbytes // max(1, int(np.prod(spec.shape)))
    shuffle: Any = "bitshuffle" if spec.dtype.startswith("float") else "shuffle"
    return [BloscCodec(typesize=width, cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()]

"""Checksums of a complete cache, which detect any change to any of its bytes.

zarr appends a CRC-32C to every chunk and checks it when it reads. This detects damaged chunks, but
not missing or swapped ones. So the manifest has a digest of the CRCs of each array (of each view,
if it has views), a digest of each metadata file, and a seal over the manifest's own file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from richkd.store.folder import Folder
from richkd.store.location import ATTEMPTS, METADATA, Location
from richkd.store.schema import (
    ArraySpec,
    Block,
    Checksums,
    Manifest,
    array_specs,
    block_arrays,
)

_CRC = 4  # bytes at the end of a chunk
_PIECE = 2**20
_SEAL = re.compile(rb'("seal": ?")([0-9a-f]{64})(?=")')


def metadata_files(specs: Mapping[str, ArraySpec]) -> list[str]:
    """Return the metadata file of each array and each group but the root, relative to the cache."""
    groups = {name.rpartition("/")[0] for name in specs} - {""}
    return [f"{name}/{METADATA}" for name in [*sorted(groups), *specs]]


def chunk_files(name: str, spec: ArraySpec, view: int | None = None) -> Iterator[str]:
    """Yield the files of an array's chunks, or of one view's, in order, relative to the cache."""
    grid = [range(-(-size // chunk)) for size, chunk in zip(spec.shape, spec.chunks, strict=True)]
    if view is not None:
        grid[0] = range(view, view + 1)
    for indices in itertools.product(*grid):
        yield "/".join([name, "c", *map(str, indices)])


def block_files(manifest: Manifest, block: Block) -> list[str]:
    """Return the chunk of each array that a block is written to."""
    if block.pixels:
        number = block.start // manifest["pixels"]["images"]
        return [f"{name}/c/{number}/0" for name in block_arrays(manifest, block)]
    specs = array_specs(manifest)
    view = [] if block.view is None else [block.view]
    return [
        "/".join(
            [
                name,
                "c",
                *map(str, view),
                str(block.start // manifest["block"]),
                *("0" for _ in specs[name].shape[len(view) + 1 :]),
            ]
        )
        for name in block_arrays(manifest, block)
    ]


def num_chunks(spec: ArraySpec) -> int:
    """Return the number of chunks without listing them: a manifest may claim absurd sizes."""
    return math.prod(-(-size // n) for size, n in zip(spec.shape, spec.chunks, strict=True))


def views_of(spec: ArraySpec) -> list[int | None]:
    """Return the views of an array; a single None if it has no view axis."""
    return [*range(spec.shape[0])] if spec.dimensions[0] == "view" else [None]


def num_digests(spec: ArraySpec) -> int:
    """Return the number of an array's digests without listing its views."""
    return spec.shape[0] if spec.dimensions[0] == "view" else 1


def intact(chunk: bytes) -> bool:
    """Return whether a chunk matches the CRC at its end."""
    body, crc = chunk[:-_CRC], chunk[-_CRC:]
    return len(crc) == _CRC and google_crc32c.value(body) == int.from_bytes(crc, "little")


def intact_file(path: Path) -> bool:
    """Return the same of a chunk on this disk, which is read piece by piece.

    The CRC is computed under Python's lock, so the pieces are small: other threads go on.
    """
    with path.open("rb", buffering=0) as file:
        left, crc = os.fstat(file.fileno()).st_size - _CRC, 0
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            crc = google_crc32c.extend(crc, piece)
            left -= len(piece)
        return left == 0 and file.read() == crc.to_bytes(_CRC, "little")


def read_chunk(location: Location, file: str) -> bytes:
    """Return a chunk's bytes, intact or not; raise FileNotFoundError if it does not exist.

    A chunk that arrives damaged from elsewhere is requested again: it may be intact there.
    """
    content = location.read(file)
    for _ in range(0 if isinstance(location, Folder) else ATTEMPTS - 1):
        if intact(content):
            break
        content = location.read(file)
    return content


def is_intact(location: Location, file: str) -> bool:
    """Return whether a chunk exists and is intact."""
    try:
        return intact(read_chunk(location, file))
    except OSError:
        return False


def chunks_digest(location: Location, name: str, spec: ArraySpec, view: int | None = None) -> str:
    """Return a digest of the CRCs of an array's chunks, or of one view's, in order.

    Raises:
        OSError: a chunk is missing.
    """
    files = list(chunk_files(name, spec, view))
    return _digest(b"".join(location.map(lambda file: location.tail(file, _CRC), files)))


def metadata_digest(location: Location, file: str) -> str:
    """Return a digest of a metadata file's bytes; raise OSError if it is missing."""
    return _digest(location.read(file))


def take_checksums(location: Location, specs: Mapping[str, ArraySpec]) -> Checksums:
    """Compute the digests of a cache, from 4 bytes per chunk."""
    return {
        "metadata": {file: metadata_digest(location, file) for file in metadata_files(specs)},
        "chunks": {
            name: [chunks_digest(location, name, spec, view) for view in views_of(spec)]
            for name, spec in specs.items()
        },
    }


def write_sealed(location: Location, manifest: Manifest) -> None:
    """Write the manifest with its seal, as the attributes of the group, atomically."""
    group: dict[str, Any] = json.loads(location.read(METADATA))
    group["attributes"] = {**manifest, "seal": "0" * 64}
    unsealed = json.dumps(group, indent=2).encode()
    location.write(METADATA, _SEAL.sub(rb"\g<1>" + _seal_of(unsealed).encode(), unsealed))


def sealed(location: Location) -> bool:
    """Return whether the manifest's file matches its seal, byte by byte."""
    content = location.read(METADATA)
    seals = _SEAL.findall(content)
    return len(seals) == 1 and seals[0][1].decode() == _seal_of(content)


def _seal_of(content: bytes) -> str:
    """Return the SHA-256 of the file with zeros in place of the seal."""
    return hashlib.sha256(_SEAL.sub(rb"\g<1>" + b"0" * 64, content)).hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()

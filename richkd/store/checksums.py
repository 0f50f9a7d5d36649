"""What a complete store is sealed with, so that no byte of it changes unseen.

zarr puts a CRC-32C behind every chunk and checks it when it reads. That finds a chunk that was
damaged, not one that is gone or lies in the place of another. So the manifest keeps a digest of
the CRCs of each array (of each view, where it has views) and one of each metadata file, and last
of all a seal over the file that the manifest is in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
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

_CRC = 4  # bytes behind a chunk
_SEAL = re.compile(rb'("seal": ?")([0-9a-f]{64})(?=")')


def metadata_files(specs: Mapping[str, ArraySpec]) -> list[str]:
    """The metadata file of each array and of each group but the root, relative to the store."""
    groups = {name.rpartition("/")[0] for name in specs} - {""}
    return [f"{name}/{METADATA}" for name in [*sorted(groups), *specs]]


def chunk_files(name: str, spec: ArraySpec, view: int | None = None) -> Iterator[str]:
    """The files of an array's chunks, or of one view's, in order, relative to the store."""
    grid = [range(-(-size // chunk)) for size, chunk in zip(spec.shape, spec.chunks, strict=True)]
    if view is not None:
        grid[0] = range(view, view + 1)
    for indices in itertools.product(*grid):
        yield "/".join([name, "c", *map(str, indices)])


def block_files(manifest: Manifest, block: Block) -> list[str]:
    """The chunk of each array that a block is written to."""
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
    """How many chunks an array has, without listing them: a manifest may claim absurd sizes."""
    return math.prod(-(-size // n) for size, n in zip(spec.shape, spec.chunks, strict=True))


def views_of(spec: ArraySpec) -> list[int | None]:
    """The views of an array; one None where it has none."""
    return [*range(spec.shape[0])] if spec.dimensions[0] == "view" else [None]


def num_digests(spec: ArraySpec) -> int:
    """How many digests an array has, without listing its views."""
    return spec.shape[0] if spec.dimensions[0] == "view" else 1


def intact(chunk: bytes) -> bool:
    """Whether a chunk's bytes are those that the CRC behind them was computed of."""
    body, crc = chunk[:-_CRC], chunk[-_CRC:]
    return len(crc) == _CRC and google_crc32c.value(body) == int.from_bytes(crc, "little")


def read_chunk(place: Location, file: str) -> bytes:
    """A chunk's bytes, whole or not; FileNotFoundError where there is none.

    What arrives damaged from elsewhere is asked for again: it may lie there whole.
    """
    content = place.read(file)
    for _ in range(0 if isinstance(place, Folder) else ATTEMPTS - 1):
        if intact(content):
            break
        content = place.read(file)
    return content


def is_intact(place: Location, file: str) -> bool:
    """Whether a chunk is there, and whole."""
    try:
        return intact(read_chunk(place, file))
    except OSError:
        return False


def chunks_digest(place: Location, name: str, spec: ArraySpec, view: int | None = None) -> str:
    """A digest of the CRCs of an array's chunks, or of one view's, as they lie in their places.

    Raises:
        OSError: a chunk is missing.
    """
    files = list(chunk_files(name, spec, view))
    return _digest(b"".join(place.map(lambda file: place.tail(file, _CRC), files)))


def metadata_digest(place: Location, file: str) -> str:
    """A digest of a metadata file's bytes; OSError where it is missing."""
    return _digest(place.read(file))


def take_checksums(place: Location, specs: Mapping[str, ArraySpec]) -> Checksums:
    """The digests of a store as it lies there; reads 4 bytes a chunk."""
    return {
        "metadata": {file: metadata_digest(place, file) for file in metadata_files(specs)},
        "chunks": {
            name: [chunks_digest(place, name, spec, view) for view in views_of(spec)]
            for name, spec in specs.items()
        },
    }


def write_sealed(place: Location, manifest: Manifest) -> None:
    """Put the manifest, with the seal, where the group's attributes are; whole or not at all."""
    group: dict[str, Any] = json.loads(place.read(METADATA))
    group["attributes"] = {**manifest, "seal": "0" * 64}
    unsealed = json.dumps(group, indent=2).encode()
    place.write(METADATA, _SEAL.sub(rb"\g<1>" + _seal_of(unsealed).encode(), unsealed))


def sealed(place: Location) -> bool:
    """Whether the manifest's file is, to the byte, what was sealed."""
    content = place.read(METADATA)
    seals = _SEAL.findall(content)
    return len(seals) == 1 and seals[0][1].decode() == _seal_of(content)


def _seal_of(content: bytes) -> str:
    """The SHA-256 of the file with zeros in place of the seal."""
    return hashlib.sha256(_SEAL.sub(rb"\g<1>" + b"0" * 64, content)).hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()

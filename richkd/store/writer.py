"""Writing a store, block by block, in threads beside the computing.

Whoever computes never waits for the device: rows are converted and checked there, and copied from
it, in the order of its work, while threads encode what has arrived.

A store that is not complete carries `complete: false` in its manifest and one flag a finished
block, so the same command goes on where it was cut off. A block's flag is written after its rows;
after a crash of the machine either may be lost, so whoever goes on checks what is there.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import torch
import zarr
from numcodecs import BitRound
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError, first_line, machine_fault
from richkd.core.files import is_temporary
from richkd.store import schema
from richkd.store.checksums import (
    block_files,
    chunk_files,
    is_intact,
    take_checksums,
    write_sealed,
)
from richkd.store.location import METADATA, Location
from richkd.store.schema import Block, Manifest

# No chunk may be absent: an absent chunk reads as zeros, which would pass for data.
_CONFIG: Any = {"write_empty_chunks": True}
ROUNDED = {
    "teacher_logits",
    "teacher_features",
    "fused_logits",
    "clip_features",
    "teacher_logits_top",
    "fused_logits_top",
}
SPLITS = ("train", "test", "validation")
_ROOM = 5  # blocks that may be on their way to the disk; bounds memory
_MOST_ENCODERS = 8  # threads, which is more than one device keeps busy


@dataclass(eq=False)
class PendingBlock:
    """The rows of a block between the device that computed them and the store."""

    block: Block
    rows: dict[str, Tensor]  # on the host, in the dtype of the store
    finite: dict[str, Tensor]  # [2] bool: whether all values were, and whether they still are
    copied: torch.cuda.Event | None  # after which they are there; None where they are at once
    left: int = 0  # arrays to be written
    failed: bool = False

    @classmethod
    def of(
        cls, block: Block, rows: Mapping[str, Tensor], dtypes: Mapping[str, Any]
    ) -> PendingBlock:
        """Converted and checked where they are, and on their way to the host."""
        stored = {name: _stored(tensor, dtypes[name]) for name, tensor in rows.items()}
        finite = {
            name: torch.stack([torch.isfinite(each).all() for each in (rows[name], stored[name])])
            for name in rows
            if rows[name].is_floating_point()
        }
        host = {name: to_host(tensor) for name, tensor in stored.items()}
        flags = {name: to_host(tensor) for name, tensor in finite.items()}
        device = next((tensor.device for tensor in rows.values() if tensor.is_cuda), None)
        copied = None
        if device is not None:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(device))
        return cls(block, host, flags, copied)

    def arrive(self) -> None:
        """Wait until the rows are on the host.

        Raises:
            RichKDError: the device could not compute them.
        """
        if self.copied is not None:
            try:
                self.copied.synchronize()
            except RuntimeError as error:
                raise RichKDError(
                    f"the device failed at {self.block.name}: {first_line(error)}; run the same "
                    f"command to go on",
                    code="device-failed",
                ) from error

    def check(self) -> None:
        """Refuse rows that are not finite, or that rounding to f16 made infinite."""
        for name, (before, after) in self.finite.items():
            if not before:
                raise RichKDError(
                    f"{name} of {self.block.name} holds NaN or infinity; check the teacher's "
                    f"weights",
                    code="rows-not-finite",
                )
            if not after:
                raise RichKDError(
                    f"{name} of {self.block.name} holds values beyond "
                    f"{self.rows[name].numpy().dtype}; store wider rows with --dtype float32",
                    code="rows-overflow",
                )


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which from a CUDA device arrives there later."""
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


class StoreWriter:
    """One process's hand on a store. Use as a context manager; `write` returns at once."""

    def __init__(self, place: Location, manifest: Manifest, done: Sequence[bool]) -> None:
        self._place = place
        with place.explained("write to"):
            self._arrays = _open_arrays(place, schema.array_specs(manifest))
        self._manifest = manifest
        self.blocks = schema.blocks(manifest)
        self._numbers = {block: number for number, block in enumerate(self.blocks)}
        self.done = list(done)  # of the blocks
        self._error: BaseException | None = None  # the first
        self._under_way = 0  # blocks
        self._moved = threading.Condition()  # they did
        self._at_once = max(place.at_once, min(usable_cpus(), _MOST_ENCODERS))
        self._arrivals = ThreadPoolExecutor(1, "arrivals")  # they come in order
        self._encoders = ThreadPoolExecutor(self._at_once, "store-writer")

    @classmethod
    def open(
        cls,
        place: Location,
        manifest: Manifest,
        overwrite: bool,
        redo: Collection[Block] | None = None,
    ) -> StoreWriter:
        """A new store, or the rest of one that was cut off or damaged.

        Args:
            place: where it is or will be.
            manifest: what is to be in it.
            overwrite: replace a store that is there.
            redo: the store is complete but for these blocks, which are damaged.

        Raises:
            RichKDError: the place holds a complete store, one of other settings, or something
                else, and `overwrite` was not asked for (or what is there is no store).
        """
        old = check_target(place, overwrite)
        if old is None:
            place.create(blank_files(manifest))
            return cls(place, manifest, [False] * schema.num_blocks(manifest))
        if old.get("complete") and redo is None:  # by another process, since that was looked at
            raise RichKDError(
                f"{place} is complete already; use it (richkd distill --cache {place}), choose "
                f"another --out, or replace it with --overwrite",
                code="cache-complete",
            )
        changed = schema.difference(old, manifest)
        if changed is not None:
            raise RichKDError(
                f"{place} is a store begun with other settings ({changed}); go on with those, "
                f"choose another --out, or begin anew with --overwrite",
                code="cache-settings-differ",
            )
        place.remove_temporary()
        if redo is not None:
            unseal(place, manifest, redo)
        else:
            complete_metadata(place, manifest)
        return cls(place, manifest, written(place, manifest))

    def __enter__(self) -> StoreWriter:
        """Start all threads, so that a system that allows no more says so now."""
        started = threading.Event()
        try:
            self._arrivals.submit(started.wait)
            for _ in range(self._at_once):
                self._encoders.submit(started.wait)
        except RuntimeError as error:
            raise RichKDError(machine_fault(error) or str(error), code="machine") from None
        finally:
            started.set()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait(0)
        self._arrivals.shutdown()
        self._encoders.shutdown()
        if exception[0] is None:
            self._check()

    def put(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Write a whole array now; for what is small and known before the first block."""
        with self._place.explained("write to"):
            self._arrays[name][...] = values

    def write(self, block: Block, rows: Mapping[str, Tensor]) -> None:
        """Hand over the rows of one block; names are relative to its split.

        Raises:
            RichKDError: a row holds NaN or infinity, or an earlier block could not be written.
        """
        self._check()
        handed = PendingBlock.of(block, rows, {name: self._dtype(block, name) for name in rows})
        if handed.copied is None:
            handed.check()
        self._wait(_ROOM - 1)
        handed.left = len(handed.rows)
        with self._moved:
            self._under_way += 1
        self._arrivals.submit(self._arrived, handed)

    def flush(self) -> None:
        """Wait until everything handed over is written; errors are those of `write`."""
        self._wait(0)
        self._check()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that an earlier run wrote: [stop − start, …]."""
        array, block = self._arrays[name], self._manifest["block"]
        rest = "/0" * (len(array.shape) - 1)
        for number in range(start // block, -(-stop // block)):
            # an absent chunk would read as zeros
            if not is_intact(self._place, f"{name}/c/{number}{rest}"):
                raise RichKDError(
                    f"{self._place}: {name} lacks a chunk that was written", code="cache-damaged"
                )
        with self._place.explained("read"):
            return torch.from_numpy(np.asarray(array[start:stop]))

    def finish(self, teacher: float, clip: float | None, fused: float | None) -> Manifest:
        """Mark the store complete, with the accuracies; call after the `with` block."""
        if not self._place.sizes("complete").keys() >= {*flag_files(self._manifest)}:
            raise RuntimeError("finish() before every block was written")
        manifest = self._manifest
        manifest["teacher"]["accuracy"] = teacher
        if manifest["clip"] is not None:
            manifest["clip"]["accuracy"] = clip
        manifest["fused_accuracy"] = fused
        manifest["complete"] = True
        if hasattr(os, "sync"):
            os.sync()  # what the manifest calls complete is on the disk, whatever happens next
        manifest["checksums"] = take_checksums(self._place, schema.array_specs(manifest))
        self._place.check_still_locked()
        write_sealed(self._place, manifest)
        return manifest

    def _dtype(self, block: Block, name: str) -> Any:
        return self._arrays[f"{block.split}/{name}"].dtype

    def _check(self) -> None:
        self._place.check_still_locked()
        if isinstance(self._error, RichKDError):
            raise self._error
        if self._error is not None:
            raise RichKDError(
                f"cannot write to {self._place}: {self._place.explain(self._error)}, then run the "
                f"same command to go on",
                code="write-failed",
            ) from self._error

    def _wait(self, most: int) -> None:
        """Until no more than so many blocks are under way."""
        with self._moved:
            self._moved.wait_for(lambda: self._under_way <= most)

    def _arrived(self, handed: PendingBlock) -> None:
        """Check a block once it is on the host, and have each of its arrays written."""
        with self._told(handed):
            handed.arrive()
            handed.check()
        for name in handed.rows:
            self._encoders.submit(self._write, handed, name)

    def _write(self, handed: PendingBlock, name: str) -> None:
        """Encode and write one array of a block, and after the last of them the block's flag."""
        block = handed.block
        span = slice(block.start, block.stop)
        with self._told(handed):
            if self._error is None:  # else nothing is written any more
                self._place.check_still_locked()
                array = self._arrays[f"{block.split}/{name}"]
                values = handed.rows[name].numpy().astype(array.dtype, copy=False)
                if name in ROUNDED:
                    values = round_bits(values, self._manifest["keep_bits"])
                array[span if block.view is None else (block.view, span)] = values
            else:
                handed.failed = True
        with self._moved:
            handed.left -= 1
            if handed.left:
                return
        with self._told(handed):
            if not handed.failed:
                number = self._numbers[block]
                self._arrays["complete"][number] = True
                self.done[number] = True
        with self._moved:
            self._under_way -= 1
            self._moved.notify_all()

    @contextmanager
    def _told(self, handed: PendingBlock) -> Iterator[None]:
        """What fails in a thread is told to the main one by `_check`."""
        try:
            yield
        except BaseException as error:
            handed.failed = True
            with self._moved:
                self._error = self._error or error


def blank_files(manifest: Manifest) -> dict[str, bytes]:
    """The files of a store without chunks, the manifest first."""
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
            config=_CONFIG,
            dimension_names=spec.dimensions,
        )
    return {file: files[file].to_bytes() for file in [METADATA, *sorted({*files} - {METADATA})]}


def unseal(place: Location, manifest: Manifest, redo: Collection[Block]) -> None:
    """Mark a store incomplete but for what `redo` leaves; metadata files are as they were new."""
    for file, content in blank_files(manifest).items():  # incomplete, from the first on
        place.write(file, content)
    for block, flag in zip(schema.blocks(manifest), flag_files(manifest), strict=True):
        if block in redo:
            place.delete(flag)


def complete_metadata(place: Location, manifest: Manifest) -> None:
    """Write what a store lacks that was cut off while it was made."""
    there = place.sizes()
    for file, content in blank_files(manifest).items():
        if file not in there:
            place.write(file, content)


def written(place: Location, manifest: Manifest) -> list[bool]:
    """Which blocks have their flag and all their rows.

    On a disk either may be lost or torn where the machine went down, so every byte is read.
    """
    there = place.sizes()

    def right(file: str) -> bool:
        return file in there and (place.durable or is_intact(place, file))

    return [
        right(flag) and all(map(right, block_files(manifest, block)))
        for block, flag in zip(schema.blocks(manifest), flag_files(manifest), strict=True)
    ]


def flag_files(manifest: Manifest) -> list[str]:
    """The chunk of `complete` of each block; it is there once the block is written."""
    return list(chunk_files("complete", schema.array_specs(manifest)["complete"]))


def check_target(place: Location, overwrite: bool) -> Mapping[str, Any] | None:
    """The manifest of a store that is there; None where a new one may be made.

    Raises:
        RichKDError: something is there that must not be replaced.
    """
    if not place.exists:
        if place.vacant:
            return None
        raise RichKDError(
            f"{place} exists and is no richkd store; choose another --out", code="foreign-file"
        )
    try:
        attributes = dict(json.loads(place.read(METADATA))["attributes"])
    except (ValueError, TypeError, KeyError):  # no group that can be read
        attributes = {}
    if attributes.get("format") != schema.FORMAT:
        raise RichKDError(
            f"{place} exists and is no richkd store; choose another --out", code="foreign-file"
        )
    if not overwrite:
        return attributes
    own = files_of_a_store(attributes)
    foreign = sorted(file for file in place.sizes() if not own(file))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise RichKDError(
            f"{place} holds files that are not of the store ({foreign[0]}{more}); move them away, "
            f"or choose another --out",
            code="foreign-file",
        )
    return None


def files_of_a_store(attributes: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether richkd wrote a file, by its name in a store; by its manifest, where that is whole."""
    arrays: set[str] | None = None
    if schema.manifest_fault(attributes) is None:
        specs = schema.array_specs(cast(Manifest, attributes))
        arrays = {"", *specs, *(name.partition("/")[0] for name in specs)}

    def own(file: str) -> bool:
        array, is_chunk, chunk = file.rpartition("/c/")
        if is_temporary(PurePosixPath(file)):
            return True
        if not is_chunk:
            array, _, name = file.rpartition("/")
            if name != METADATA:
                return False
        elif not set(chunk) <= set("0123456789/"):
            return False
        if arrays is None:
            return array in ("", "complete") or array.partition("/")[0] in (*SPLITS, "text")
        return array in arrays

    return own


def _codecs(spec: schema.ArraySpec) -> list[Any]:
    width = spec.nbytes // max(1, int(np.prod(spec.shape)))
    shuffle: Any = "bitshuffle" if spec.dtype.startswith("float") else "shuffle"
    return [BloscCodec(typesize=width, cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()]


def encoded_bytes(values: np.ndarray[Any, Any]) -> int:
    """The bytes that values take in a store, as one chunk."""
    files: dict[str, Any] = {}
    spec = schema.ArraySpec(values.shape, str(values.dtype), values.shape, ())
    array = zarr.create_array(
        MemoryStore(files),
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunks,
        compressors=_codecs(spec),
        fill_value=0,
        config=_CONFIG,
    )
    array[...] = values
    return sum(len(content) for file, content in files.items() if file != METADATA)


def round_bits(values: np.ndarray[Any, Any], bits: int | None) -> np.ndarray[Any, Any]:
    """f16 or f32 values rounded to so many mantissa bits, which compress better; all for None.

    The trailing bits become zeros, so nothing is needed to read them back.
    """
    if bits is None or bits >= np.finfo(values.dtype).nmant:
        return values
    encoded = BitRound(keepbits=bits).encode(np.ascontiguousarray(values))
    rounded: np.ndarray[Any, Any] = encoded.view(values.dtype).reshape(values.shape)
    return rounded


def _open_arrays(place: Location, names: Iterable[str]) -> dict[str, zarr.Array[Any]]:
    """Arrays of a store by name, to be written to."""
    group = zarr.open_group(place.zarr(read_only=False), mode="r+", use_consolidated=False)
    return {name: cast("zarr.Array[Any]", group[name]).with_config(_CONFIG) for name in names}


def _stored(tensor: Tensor, dtype: Any) -> Tensor:
    """Rows in the dtype in which they are stored, where they are; torch has no u16 everywhere."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float16 if dtype == np.float16 else torch.float32)

"""Writing a store, block by block, in a thread beside the computing.

A store that is not complete carries `complete: false` in its manifest and one flag a finished
block, so the same command goes on where it was cut off. A block's flag is written after its rows;
after a crash of the machine either may be lost, so whoever goes on checks what is there.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zarr
from numcodecs import BitRound
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from richkd.errors import RichKDError
from richkd.files import remove_temporary
from richkd.store import schema
from richkd.store.checksums import (
    METADATA,
    block_files,
    chunk_files,
    metadata_files,
    take_checksums,
    whole,
    write_sealed,
)
from richkd.store.schema import Block, Manifest

# No chunk may be absent: an absent chunk reads as zeros, which would pass for data.
_CONFIG: Any = {"write_empty_chunks": True}
_ROUNDED = {"teacher_logits", "teacher_features", "fused_logits", "clip_features"}
_ROOM = 4  # blocks that may wait for the disk; bounds memory


class StoreWriter:
    """One process's hand on a store. Use as a context manager; `write` returns at once."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._group = group = zarr.open_group(path, mode="r+", use_consolidated=False)
        self._manifest = manifest
        self.blocks = schema.blocks(manifest)
        self.done: list[bool] = np.asarray(_array(group, "complete")[:]).tolist()
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(_ROOM)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name="store-writer", daemon=True)

    @classmethod
    def open(
        cls, path: Path, manifest: Manifest, overwrite: bool, redo: Collection[Block] | None = None
    ) -> StoreWriter:
        """A new store, or the rest of one that was cut off or damaged.

        Args:
            path: where it is or will be.
            manifest: what is to be in it.
            overwrite: replace a store that is there.
            redo: the store is complete but for these blocks, which are damaged.

        Raises:
            RichKDError: the path holds a complete store, one of other settings, or something
                else, and `overwrite` was not asked for (or what is there is no store).
        """
        if not check_target(path, overwrite, repairing=redo is not None):
            create_store(path, manifest)
            return cls(path, manifest)
        old = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
        changed = schema.difference(old, manifest)
        if changed is not None:
            raise RichKDError(
                f"{path} is a store begun with other settings ({changed}); go on with those, "
                f"choose another --out, or begin anew with --overwrite"
            )
        remove_temporary(path)
        if redo is not None:
            unseal(path, manifest, redo)
        else:
            mend_flags(path, manifest)
        writer = cls(path, manifest)
        for number, block in enumerate(writer.blocks):
            files = block_files(manifest, block)
            if writer.done[number] and not all(whole(path / file) for file in files):
                writer.done[number] = False  # the machine went down before it was on the disk
        return writer

    def __enter__(self) -> StoreWriter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if exception[0] is None:
            self._check()

    def put(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Write a whole array now; for what is small and known before the first block."""
        _array(self._group, name)[...] = values

    def write(self, block: Block, rows: Mapping[str, Tensor]) -> None:
        """Hand over the rows of one block; names are relative to its split.

        Raises:
            RichKDError: a row holds NaN or infinity, or an earlier block could not be written.
        """
        self._check()
        values = {name: _stored(name, tensor, block, self._dtype(block, name))
                  for name, tensor in rows.items()}  # fmt: skip
        for name in _ROUNDED & values.keys():
            values[name] = round_bits(values[name], self._manifest["keep_bits"])
        self._queue.put((self.blocks.index(block), values))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that an earlier run wrote: [stop − start, …]."""
        return torch.from_numpy(np.asarray(_array(self._group, name)[start:stop]))

    def finish(self, teacher: float, clip: float | None, fused: float | None) -> Manifest:
        """Mark the store complete, with the accuracies; call after the `with` block."""
        flags = np.asarray(_array(self._group, "complete")[:])
        if not flags.all():
            raise RuntimeError("finish() before every block was written")
        manifest = self._manifest
        manifest["teacher"]["accuracy"] = teacher
        if manifest["clip"] is not None:
            manifest["clip"]["accuracy"] = clip
        manifest["fused_accuracy"] = fused
        manifest["complete"] = True
        if hasattr(os, "sync"):
            os.sync()  # what the manifest calls complete is on the disk, whatever happens next
        manifest["checksums"] = take_checksums(self._path, schema.array_specs(manifest))
        write_sealed(self._path, manifest)
        return manifest

    def _dtype(self, block: Block, name: str) -> Any:
        return _array(self._group, f"{block.split}/{name}").dtype

    def _check(self) -> None:
        if self._error is not None:
            raise RichKDError(
                f"cannot write to {self._path}: {self._error}; make room or mend the disk, "
                f"then run the same command to go on"
            ) from self._error

    def _drain(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that write() never waits for a dead thread
            try:
                index, values = item
                block = self.blocks[index]
                for name, rows in values.items():
                    array = _array(self._group, f"{block.split}/{name}")
                    if block.view is None:
                        array[block.start : block.stop] = rows
                    else:
                        array[block.view, block.start : block.stop] = rows
                _array(self._group, "complete")[index] = True
                self.done[index] = True
            except BaseException as error:  # told to the main thread by _check
                self._error = error


def create_store(path: Path, manifest: Manifest) -> None:
    """Arrays without chunks, and the manifest; replaces what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unborn = path.with_name(f".{path.name}.new")
    shutil.rmtree(unborn, ignore_errors=True)
    group = zarr.create_group(unborn, zarr_format=3, attributes=cast(dict[str, Any], manifest))
    for name, spec in schema.array_specs(manifest).items():
        group.create_array(
            name, shape=spec.shape, dtype=spec.dtype, chunks=spec.chunks,
            compressors=_codecs(spec), fill_value=0, config=_CONFIG,
            dimension_names=spec.dimensions,
        )  # fmt: skip
    if path.exists():
        shutil.rmtree(path)
    unborn.rename(path)


def unseal(path: Path, manifest: Manifest, redo: Collection[Block]) -> None:
    """Mark a store incomplete but for what `redo` leaves; metadata files are as they were new."""
    fresh = path.with_name(f".{path.name}.metadata")
    create_store(fresh, manifest)
    shutil.copyfile(fresh / METADATA, path / METADATA)  # incomplete, from here on
    for file in metadata_files(schema.array_specs(manifest)):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / file, path / file)
    shutil.rmtree(fresh)
    flags = _array(zarr.open_group(path, mode="r+", use_consolidated=False), "complete")
    flags[...] = np.array([block not in redo for block in schema.blocks(manifest)])


def mend_flags(path: Path, manifest: Manifest) -> None:
    """Flags that a crash of the machine left torn are of blocks that are not done."""
    flags = _array(zarr.open_group(path, mode="r+", use_consolidated=False), "complete")
    files = chunk_files("complete", schema.array_specs(manifest)["complete"])
    for number, file in enumerate(files):
        if (path / file).is_file() and not whole(path / file):
            flags[number] = False


def check_target(path: Path, overwrite: bool, repairing: bool = False) -> bool:
    """Whether `path` holds a store to go on with; False where a new one may be made.

    Raises:
        RichKDError: something is there that must not be replaced.
    """
    if not path.exists():
        return False
    try:
        attributes = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
    except Exception:  # whatever zarr says: it is no group that can be read
        attributes = {}
    if attributes.get("format") != schema.FORMAT:
        raise RichKDError(f"{path} exists and is no richkd store; choose another --out")
    if overwrite:
        return False
    if attributes.get("complete") and not repairing:
        raise RichKDError(
            f"{path} exists and is complete; use it (richkd distill --cache {path}), choose "
            f"another --out, or replace it with --overwrite"
        )
    return True


def _codecs(spec: schema.ArraySpec) -> list[Any]:
    width = spec.nbytes // max(1, int(np.prod(spec.shape)))
    shuffle: Any = "bitshuffle" if spec.dtype.startswith("float") else "shuffle"
    return [BloscCodec(typesize=width, cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()]


def round_bits(values: np.ndarray[Any, Any], bits: int | None) -> np.ndarray[Any, Any]:
    """f16 or f32 values rounded to so many mantissa bits, which compress better; all for None.

    The trailing bits become zeros, so nothing is needed to read them back.
    """
    if bits is None or bits >= np.finfo(values.dtype).nmant:
        return values
    encoded = BitRound(keepbits=bits).encode(np.ascontiguousarray(values))
    rounded: np.ndarray[Any, Any] = encoded.view(values.dtype).reshape(values.shape)
    return rounded


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    return cast("zarr.Array[Any]", group[name])


def _stored(name: str, tensor: Tensor, block: Block, dtype: Any) -> np.ndarray[Any, Any]:
    """The rows as they are stored, on the CPU; rounding to f16 must not make infinities."""
    if tensor.is_floating_point():
        if not torch.isfinite(tensor).all():
            raise RichKDError(
                f"{name} of {block.name} holds NaN or infinity; check the teacher's weights"
            )
        tensor = tensor.to(torch.float16 if dtype == np.float16 else torch.float32)
        if not torch.isfinite(tensor).all():
            raise RichKDError(
                f"{name} of {block.name} holds values beyond {dtype}; store wider rows with "
                f"--dtype float32"
            )
    return tensor.cpu().numpy().astype(dtype, copy=False)

"""Writing a store, block by block, in a thread beside the computing.

A store that is not complete carries `complete: false` in its manifest and one flag a finished
block, so the same command goes on where it was cut off. A block's flag is written after its rows.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zarr
from numcodecs import BitRound
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from richkd.errors import RichKDError
from richkd.store import schema
from richkd.store.schema import Block, Manifest

# No chunk may be absent: an absent chunk reads as zeros, which would pass for data.
_CONFIG: Any = {"write_empty_chunks": True}
_ROUNDED = {"teacher_logits", "teacher_features", "fused_logits", "clip_features"}
_ROOM = 4  # blocks that may wait for the disk; bounds memory


class StoreWriter:
    """One process's hand on a store. Use as a context manager; `write` returns at once."""

    def __init__(self, group: zarr.Group, manifest: Manifest) -> None:
        self._group = group
        self._manifest = manifest
        self.blocks = schema.blocks(manifest)
        self.done: list[bool] = np.asarray(_array(group, "complete")[:]).tolist()
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(_ROOM)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name="store-writer", daemon=True)

    @classmethod
    def open(cls, path: Path, manifest: Manifest, overwrite: bool) -> StoreWriter:
        """A new store, or the rest of one that was cut off.

        Raises:
            RichKDError: the path holds a complete store, one of other settings, or something
                else, and `overwrite` was not asked for (or what is there is no store).
        """
        if check_target(path, overwrite):
            old = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
            changed = schema.difference(old, manifest)
            if changed is not None:
                raise RichKDError(
                    f"{path} is a store begun with other settings ({changed}); go on with those, "
                    f"choose another --out, or begin anew with --overwrite"
                )
            return cls(zarr.open_group(path, mode="r+", use_consolidated=False), manifest)
        if path.exists():
            shutil.rmtree(path)
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
        unborn.rename(path)
        return cls(zarr.open_group(path, mode="r+", use_consolidated=False), manifest)

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
        self._group.attrs.put(cast(dict[str, Any], manifest))
        return manifest

    def _dtype(self, block: Block, name: str) -> Any:
        return _array(self._group, f"{block.split}/{name}").dtype

    def _check(self) -> None:
        if self._error is not None:
            raise RichKDError(
                f"cannot write to {self._group.store}: {self._error}; make room or mend the "
                f"disk, then run the same command to go on"
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


def check_target(path: Path, overwrite: bool) -> bool:
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
    if attributes.get("complete"):
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
        tensor = tensor.to(torch.float16 if dtype == np.float16 else torch.float32)
        if not torch.isfinite(tensor).all():
            raise RichKDError(
                f"{name} of {block.name} holds NaN, infinity or values beyond {dtype}; check the "
                f"teacher's weights, or store wider rows with --dtype float32"
            )
    return tensor.cpu().numpy().astype(dtype, copy=False)

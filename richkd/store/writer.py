"""Write a cache, block by block, in threads beside the computation.

The thread that computes never waits for the device: rows are converted and checked on the device
and copied from it in the order of its work, while other threads encode what has arrived.

An incomplete cache has `complete: false` in its manifest and one flag per finished block, so the
same command resumes it. A block's flag is written after its rows. After a crash of the machine
either may be lost, so `open_writer` checks both before it trusts them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import zarr
from torch import Tensor

from richkd.core.cpus import usable_cpus
from richkd.core.errors import RichKDError, first_line, machine_fault
from richkd.core.interrupts import uninterrupted
from richkd.core.ranks import ALONE, Ranks
from richkd.store import schema
from richkd.store.checksums import (
    block_files,
    chunk_files,
    is_intact,
    take_checksums,
    write_sealed,
)
from richkd.store.encoding import CONFIG, ROUNDED, blank_files, round_bits
from richkd.store.location import Location
from richkd.store.schema import Block, Manifest
from richkd.store.target import check_target

BLOCKS_IN_FLIGHT = 5  # between the computation and the disk; bounds memory
MAX_ENCODERS = 8  # threads; more than one device keeps busy


@contextmanager
def open_writer(
    location: Location,
    manifest: Manifest,
    known: Mapping[str, np.ndarray[Any, Any]],
    *,
    overwrite: bool = False,
    damaged: Collection[Block] | None = None,
    ranks: Ranks = ALONE,
    cpus: int | None = None,
) -> Iterator[StoreWriter]:
    """Open a cache for writing and keep it locked until the `with` block ends.

    The first process of a job creates the cache, resumes an interrupted one, or, given `damaged`,
    reopens a complete one to repair it. The other processes follow the first.

    Args:
        location: where the cache is or will be.
        manifest: what it will hold.
        known: whole arrays by name that are known before the first block.
        overwrite: replace a cache that exists.
        damaged: the blocks of a complete cache to compute again; all others are kept.
        ranks: the processes that write together.
        cpus: the number of cores to encode on; None means all usable ones.

    Raises:
        RichKDError: another process has the lock; or the location holds a complete cache, a cache
            of other settings, or anything else.
    """

    def prepare() -> tuple[list[bool], str | None]:
        with uninterrupted():
            return _prepare(location, manifest, overwrite, damaged), location.token

    with location.locked() if ranks.first else nullcontext():
        done, token = ranks.from_first(prepare)
        if not ranks.first:
            _follow(location, token, ranks)
        with StoreWriter(location, manifest, done, cpus or usable_cpus()) as writer:
            for name, values in known.items() if ranks.first else ():
                writer.put(name, values)
            yield writer


def _prepare(
    location: Location, manifest: Manifest, overwrite: bool, damaged: Collection[Block] | None
) -> list[bool]:
    """Make a cache ready for the blocks that it lacks; return which blocks it has."""
    old = check_target(location, overwrite)
    if old is None:
        location.create(blank_files(manifest))
        return [False] * schema.num_blocks(manifest)
    if old.get("complete") and damaged is None:  # by another process, since the first check
        raise RichKDError(
            f"{location} is already complete; use it (richkd distill --cache {location}), choose "
            f"another --out, or replace it with --overwrite",
            code="cache-complete",
        )
    changed = schema.difference(old, manifest)
    if changed is not None:
        raise RichKDError(
            f"the cache at {location} was started with other settings ({changed}); resume it with "
            f"those, choose another --out, or replace it with --overwrite",
            code="cache-settings-differ",
        )
    location.remove_temporary()
    reopen(location, manifest, damaged)
    return written(location, manifest)


def reopen(location: Location, manifest: Manifest, damaged: Collection[Block] | None) -> None:
    """Write the metadata files that an interrupted cache lacks, or mark damaged blocks missing.

    To repair a complete cache, all metadata files are rewritten. The manifest goes first, so that
    the cache is marked incomplete before anything else changes.
    """
    present = location.sizes()
    for file, content in blank_files(manifest).items():
        if damaged is not None or file not in present:
            location.write(file, content)
    for block, flag in zip(schema.blocks(manifest), flag_files(manifest), strict=True):
        if damaged is not None and block in damaged:
            location.delete(flag)


def _follow(location: Location, token: str | None, ranks: Ranks) -> None:
    """Write under the lock of the job's first process."""
    if not location.exists:
        raise RichKDError(
            f"rank {ranks.rank} sees no cache at {location}, where rank 0 created it; use a folder "
            f"that all machines share, or object storage (s3://…)",
            code="rank-cache-missing",
        )
    location.follow(token)


@dataclass(eq=False)
class PendingBlock:
    """The rows of a block on their way from the device that computed them to the cache."""

    block: Block
    rows: dict[str, Tensor]  # on the host, in the stored dtype
    finite: dict[str, Tensor]  # [2] bool: all finite as computed, and as stored
    copied: torch.cuda.Event | None  # set once the rows are on the host; None if they already are
    left: int = 0  # arrays still to be written
    failed: bool = False

    @classmethod
    def of(
        cls, block: Block, rows: Mapping[str, Tensor], dtypes: Mapping[str, Any]
    ) -> PendingBlock:
        """Convert and check rows on their device, and start to copy them to the host."""
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
            RichKDError: the device failed to compute them.
        """
        if self.copied is not None:
            try:
                self.copied.synchronize()
            except RuntimeError as error:
                raise RichKDError(
                    f"the device failed at {self.block.name}: {first_line(error)}; run the same "
                    f"command again to resume",
                    code="device-failed",
                ) from error

    def check(self) -> None:
        """Raise RichKDError if rows are not finite, or if rounding to f16 made them infinite."""
        for name, (before, after) in self.finite.items():
            if not before:
                raise RichKDError(
                    f"{name} of {self.block.name} contains NaN or infinity; check the teacher's "
                    f"weights",
                    code="rows-not-finite",
                )
            if not after:
                raise RichKDError(
                    f"{name} of {self.block.name} contains values beyond the range of "
                    f"{self.rows[name].numpy().dtype}; cache wider rows with --dtype float32",
                    code="rows-overflow",
                )


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU; from a CUDA device it arrives asynchronously."""
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


class StoreWriter:
    """An open cache that this process writes to, from `open_writer`; `write` returns at once."""

    def __init__(
        self, location: Location, manifest: Manifest, done: Sequence[bool], cpus: int
    ) -> None:
        self._location = location
        with location.explained("write to"):
            self._arrays = _open_arrays(location, schema.array_specs(manifest))
        self.manifest = manifest
        self.blocks = schema.blocks(manifest)
        self._numbers = {block: number for number, block in enumerate(self.blocks)}
        self.done = list(done)  # one flag per block
        self._error: BaseException | None = None  # the first one
        self._in_flight = 0  # blocks
        self._changed = threading.Condition()  # notified when `_in_flight` changes
        self._num_encoders = max(location.at_once, min(cpus, MAX_ENCODERS))
        self._arrivals = ThreadPoolExecutor(1, "arrivals")  # blocks arrive in order
        self._encoders = ThreadPoolExecutor(self._num_encoders, "store-writer")

    def __enter__(self) -> StoreWriter:
        """Start all threads, so that a system that allows no more of them fails here."""
        started = threading.Event()
        try:
            self._arrivals.submit(started.wait)
            for _ in range(self._num_encoders):
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
        """Write a whole small array synchronously."""
        with self._location.explained("write to"):
            self._arrays[name][...] = values

    def write(self, block: Block, rows: Mapping[str, Tensor]) -> None:
        """Queue the rows of one block; names are relative to its split.

        Raises:
            RichKDError: a row contains NaN or infinity, or an earlier block could not be written.
        """
        self._check()
        pending = PendingBlock.of(block, rows, {name: self._dtype(block, name) for name in rows})
        if pending.copied is None:
            pending.check()
        self._wait(BLOCKS_IN_FLIGHT - 1)
        pending.left = len(pending.rows)
        with self._changed:
            self._in_flight += 1
        self._arrivals.submit(self._arrived, pending)

    def flush(self) -> None:
        """Wait until every queued block is written; raises as `write`."""
        self._wait(0)
        self._check()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start..stop of an array, which must have been written: [stop − start, …]."""
        array, block = self._arrays[name], self.manifest["block"]
        rest = "/0" * (len(array.shape) - 1)
        for number in range(start // block, -(-stop // block)):
            # an absent chunk would read as zeros
            if not is_intact(self._location, f"{name}/c/{number}{rest}"):
                raise RichKDError(
                    f"{self._location}: a chunk of {name} that was written is missing or damaged; "
                    f"run the same command again to resume",
                    code="cache-damaged",
                )
        with self._location.explained("read"):
            return torch.from_numpy(np.asarray(array[start:stop]))

    def finish(self, teacher: float | None, clip: float | None, fused: float | None) -> Manifest:
        """Record the accuracies, seal the cache and mark it complete, once all is written."""
        self.flush()
        if not self._location.sizes("complete").keys() >= {*flag_files(self.manifest)}:
            raise RuntimeError("finish() before every block was written")
        manifest = self.manifest
        if "teacher" in manifest:
            manifest["teacher"]["accuracy"] = teacher
        if manifest["clip"] is not None:
            manifest["clip"]["accuracy"] = clip
        manifest["fused_accuracy"] = fused
        manifest["complete"] = True
        if hasattr(os, "sync"):
            os.sync()  # rows are on disk before the manifest calls them complete
        manifest["checksums"] = take_checksums(self._location, schema.array_specs(manifest))
        self._location.check_still_locked()
        write_sealed(self._location, manifest)
        return manifest

    def _dtype(self, block: Block, name: str) -> Any:
        return self._arrays[f"{block.split}/{name}"].dtype

    def _check(self) -> None:
        """Raise the first error of the threads, if there is one."""
        self._location.check_still_locked()
        if isinstance(self._error, RichKDError):
            raise self._error
        if self._error is not None:
            raise RichKDError(
                f"cannot write to {self._location}: {self._location.explain(self._error)}, then "
                f"run the same command again to resume",
                code="write-failed",
            ) from self._error

    def _wait(self, most: int) -> None:
        """Wait until at most `most` blocks are in flight."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight <= most)

    def _arrived(self, pending: PendingBlock) -> None:
        """Check a block once it is on the host, and queue each of its arrays."""
        with self._errors_kept(pending):
            pending.arrive()
            pending.check()
        for name in pending.rows:
            self._encoders.submit(self._write, pending, name)

    def _write(self, pending: PendingBlock, name: str) -> None:
        """Encode and write one array of a block; after the last one, write the block's flag."""
        block = pending.block
        span: Any = slice(block.start, block.stop)
        if block.pixels:
            span = block.start // self.manifest["pixels"]["images"]
        with self._errors_kept(pending):
            if self._error is None:  # after an error nothing more is written
                self._location.check_still_locked()
                array = self._arrays[f"{block.split}/{name}"]
                values = pending.rows[name].numpy().astype(array.dtype, copy=False)
                if name in ROUNDED:
                    values = round_bits(values, self.manifest["keep_bits"])
                array[span if block.view is None else (block.view, span)] = values
            else:
                pending.failed = True
        with self._changed:
            pending.left -= 1
            if pending.left:
                return
        with self._errors_kept(pending):
            if not pending.failed:
                number = self._numbers[block]
                self._arrays["complete"][number] = True
                self.done[number] = True
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    @contextmanager
    def _errors_kept(self, pending: PendingBlock) -> Iterator[None]:
        """Keep the error of a thread, for `_check` to raise in the main thread."""
        try:
            yield
        except BaseException as error:
            pending.failed = True
            with self._changed:
                self._error = self._error or error


def written(location: Location, manifest: Manifest) -> list[bool]:
    """Return, for each block, whether its flag and all its rows are there.

    On a disk either may be lost or torn if the machine crashed, so every byte is read.
    """
    present = location.sizes()

    def good(file: str) -> bool:
        return file in present and (location.durable or is_intact(location, file))

    return [
        good(flag) and all(map(good, block_files(manifest, block)))
        for block, flag in zip(schema.blocks(manifest), flag_files(manifest), strict=True)
    ]


def flag_files(manifest: Manifest) -> list[str]:
    """Return the chunk of `complete` of each block; it exists once the block is written."""
    return list(chunk_files("complete", schema.array_specs(manifest)["complete"]))


def _open_arrays(location: Location, names: Iterable[str]) -> dict[str, zarr.Array[Any]]:
    """Open arrays of a cache for writing, by name."""
    group = zarr.open_group(location.zarr(read_only=False), mode="r+", use_consolidated=False)
    return {name: cast("zarr.Array[Any]", group[name]).with_config(CONFIG) for name in names}


def _stored(tensor: Tensor, dtype: Any) -> Tensor:
    """Convert rows to their stored dtype; integers later, as not every device has u16."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float16 if dtype == np.float16 else torch.float32)

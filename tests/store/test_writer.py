"""Writing beside the computation: in parallel, in bounded memory, and never flagged too early."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import changed, refuses, slow, tree
from torch import Tensor
from zarr.storage import LocalStore

import richkd
from richkd.store import schema
from richkd.store.checksums import block_files, is_intact
from richkd.store.folder import Folder
from richkd.store.schema import Block
from richkd.store.writer import (
    BLOCKS_IN_FLIGHT,
    PendingBlock,
    StoreWriter,
    flag_files,
    open_writer,
    written,
)

Open = Callable[..., AbstractContextManager[StoreWriter]]
pytestmark = pytest.mark.filterwarnings("error")


class HookedStore(LocalStore):
    """A folder for zarr that calls a function, in a thread, before each file it writes."""

    hook: Callable[[str], None]
    threads: ThreadPoolExecutor

    async def set(self, key: str, value: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self.threads, self.hook, key)
        await super().set(key, value)


class HookedFolder(Folder):
    """A folder that is written through a `HookedStore`."""

    hook: Callable[[str], None] | None = None  # none: as any folder

    def zarr(self, *, read_only: bool) -> Any:
        if self.hook is None:
            return super().zarr(read_only=read_only)
        store = HookedStore(self.path, read_only=read_only)
        store.hook, store.threads = self.hook, ThreadPoolExecutor(16)
        return store


@pytest.fixture
def manifest(store: Path) -> Any:
    """The manifest of a cache of many small blocks."""
    found: Any = {**richkd.open_cache(store).manifest, "complete": False, "block": 8}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> HookedFolder:
    return HookedFolder(tmp_path / "new.zarr")


@pytest.fixture
def opened(manifest: Any, folder: HookedFolder) -> Open:
    """A function that creates the cache or resumes it; its argument is called before each file."""
    text = schema.array_specs(manifest)["text/embeddings"].shape
    known: dict[str, Any] = {
        "train/view_ids": np.zeros((3, 48), np.uint16),
        "text/embeddings": np.ones(text, np.float32),
    }

    def begin(
        hook: Callable[[str], None] | None = None, cpus: int = 2
    ) -> AbstractContextManager[StoreWriter]:
        def known_files_apart(file: str) -> None:
            assert hook is not None
            if file.partition("/c/")[0] not in known:
                hook(file)

        folder.hook = hook and known_files_apart
        return open_writer(folder, manifest, known, cpus=cpus)

    return begin


def rows_of(manifest: Any, block: Block) -> dict[str, Tensor]:
    """Random rows of a block, the same each time."""
    rng = np.random.default_rng(
        [block.start, 99 if block.view is None else block.view, len(block.split)]
    )
    specs, rows = schema.array_specs(manifest), {}
    for name in schema.block_arrays(manifest, block):
        spec = specs[name]
        shape = (block.stop - block.start, *spec.shape[1 + (block.view is not None) :])
        values: Any = rng.normal(size=shape).astype(np.float32)
        if not spec.dtype.startswith("float"):
            values = rng.integers(0, 16, shape).astype(spec.dtype)
        rows[name.partition("/")[2]] = torch.from_numpy(values)
    return rows


def write_all(opened: AbstractContextManager[StoreWriter], manifest: Any) -> StoreWriter:
    """Write the blocks that a cache lacks."""
    with opened as writer:
        for block, done in zip(writer.blocks, writer.done, strict=True):
            if not done:
                writer.write(block, rows_of(manifest, block))
    return writer


def test_what_is_read_is_what_was_handed_over(opened: Open, manifest: Any, tmp_path: Path) -> None:
    write_all(opened(), manifest)
    group = zarr.open_group(tmp_path / "new.zarr", mode="r")
    for block in schema.blocks(manifest):
        for name, rows in rows_of(manifest, block).items():
            array: Any = group[f"{block.split}/{name}"]
            found = (
                array[block.start : block.stop]
                if block.view is None
                else (array[block.view, block.start : block.stop])
            )
            assert np.array_equal(found, rows.numpy().astype(array.dtype)), (block.name, name)


def test_arrays_of_several_blocks_are_encoded_together(opened: Open, manifest: Any) -> None:
    meet, met = threading.Barrier(6, timeout=20), [0]  # nobody passes before six are there

    def slow(file: str) -> None:
        if file.startswith("train/teacher_") and met[0] < 6:
            meet.wait()
            met[0] = 6

    with opened(slow, cpus=6) as writer:
        for block in [block for block in writer.blocks if block.view is not None][:4]:
            writer.write(block, rows_of(manifest, block))
    assert met == [6]


def test_memory_is_bounded(opened: Open, manifest: Any) -> None:
    gate, handed = threading.Event(), []

    def locked(file: str) -> None:
        assert gate.wait(20)

    with ThreadPoolExecutor(1) as computing:

        def compute() -> StoreWriter:
            with opened(locked) as writer:
                for block in writer.blocks:
                    writer.write(block, rows_of(manifest, block))
                    handed.append(block)
            return writer

        done = computing.submit(compute)
        time.sleep(0.5)
        assert len(handed) == BLOCKS_IN_FLIGHT < len(schema.blocks(manifest))
        gate.set()
        assert all(done.result().done)


def test_a_flag_comes_after_its_rows(
    opened: Open, manifest: Any, folder: Folder, rng: np.random.Generator
) -> None:
    blocks = dict(zip(flag_files(manifest), schema.blocks(manifest), strict=True))
    late: list[str] = []

    def jittery(file: str) -> None:
        if file in blocks:
            rows = block_files(manifest, blocks[file])
            late.extend(each for each in rows if not is_intact(folder, each))
        else:
            time.sleep(float(rng.uniform(0, 0.01)))

    write_all(opened(jittery, cpus=8), manifest)
    assert late == []


class Fault(BaseException):
    pass


def failing_from(last: int, kind: BaseException) -> Callable[[str], None]:
    """Writing of files that works so many times and then no more."""
    numbers = itertools.count()

    def write(file: str) -> None:
        if next(numbers) >= last:
            raise kind

    return write


@pytest.mark.fault
@pytest.mark.parametrize(
    "kind", [OSError(28, "No space left on device"), *slow(ValueError("x"), Fault())]
)
def test_errors_of_threads_are_raised_and_the_cache_can_be_resumed(
    opened: Open,
    manifest: Any,
    folder: HookedFolder,
    rng: np.random.Generator,
    kind: BaseException,
    tmp_path: Path,
) -> None:
    """Wherever an array or a flag cannot be written, no block is flagged that is not whole."""
    write_all(opened(), manifest)
    whole = tree(folder.path)
    count = sum(len(schema.block_arrays(manifest, block)) + 1 for block in schema.blocks(manifest))
    for failing in (0, 1, count - 1, *rng.integers(2, count - 1, 3)):
        folder.path.rename(tmp_path / f"before-{failing}-{rng.integers(2**32)}")
        writers: list[StoreWriter] = []
        with (
            refuses("write-failed", folder.path, "same command"),
            opened(failing_from(int(failing), kind)) as writer,
        ):
            writers.append(writer)
            for block in writer.blocks:
                writer.write(block, rows_of(manifest, block))
        flags = [file in folder.sizes() for file in flag_files(manifest)]
        assert flags == written(folder, manifest) == writers[0].done  # flagged means whole
        assert not all(flags)
        write_all(opened(), manifest)
        assert changed(whole, tree(folder.path)) == []


class Copied:
    """An event of a device: the rows arrive when it is waited for."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        self.synchronize = arrive


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function after which rows arrive as from a GPU, when threads wait for them.

    Its argument is called with each block before its rows arrive.
    """

    def pretend(befalls: Callable[[Block], None] = lambda block: None) -> None:
        hand_over = PendingBlock.of.__func__  # type: ignore[attr-defined]

        def of(cls: Any, block: Block, rows: Any, dtypes: Any) -> PendingBlock:
            right: PendingBlock = hand_over(cls, block, rows, dtypes)
            late = {name: torch.zeros_like(tensor) for name, tensor in right.rows.items()}
            flags = {name: torch.zeros_like(tensor) for name, tensor in right.finite.items()}

            def arrive() -> None:
                time.sleep(0.005)
                befalls(block)
                for now, then in ((late, right.rows), (flags, right.finite)):
                    for name, tensor in now.items():
                        tensor.copy_(then[name])

            copied: Any = Copied(arrive)
            return PendingBlock(block, late, flags, copied)

        monkeypatch.setattr(PendingBlock, "of", classmethod(of))

    return pretend


def test_rows_that_arrive_later_are_the_same(
    opened: Open, manifest: Any, folder: Folder, device: Callable[..., None], tmp_path: Path
) -> None:
    write_all(opened(), manifest)
    folder.path.rename(tmp_path / "at-once")
    device()
    write_all(opened(), manifest)
    assert changed(tree(tmp_path / "at-once"), tree(folder.path)) == []


@pytest.mark.parametrize(
    ("value", "code", "remedy"),
    [
        (float("nan"), "rows-not-finite", "weights"),
        (-float("inf"), "rows-not-finite", "weights"),
        (1e6, "rows-overflow", "--dtype float32"),
    ],
)
def test_bad_rows_that_arrive_later_are_named(
    opened: Open,
    manifest: Any,
    folder: Folder,
    device: Callable[..., None],
    value: float,
    code: str,
    remedy: str,
    rng: np.random.Generator,
) -> None:
    device()
    blocks = schema.blocks(manifest)
    bad = blocks[int(rng.integers(len(blocks)))]
    with refuses(code, bad.name, remedy), opened() as writer:
        for block in blocks:
            rows = rows_of(manifest, block)
            if block == bad:
                logits = rows["teacher_logits" if "teacher_logits" in rows else "clip_features"]
                logits[-1, 3] = value
            writer.write(block, rows)
    assert not writer.done[blocks.index(bad)]
    assert writer.done == written(folder, manifest)


def test_blocks_are_written_while_later_ones_are_computed(
    opened: Open, manifest: Any, device: Callable[..., None]
) -> None:
    """Also with one CPU: nobody who could encode waits for the device."""
    handed: list[Block] = []
    with opened(cpus=1) as writer:

        def befalls(block: Block) -> None:
            number = writer.blocks.index(block)
            end = time.monotonic() + 10
            while (number == 0 and len(handed) <= BLOCKS_IN_FLIGHT) or (
                number >= 2 and not writer.done[number - 2]
            ):
                assert time.monotonic() < end
                time.sleep(0.001)

        device(befalls)
        for block in writer.blocks:
            handed.append(block)
            writer.write(block, rows_of(manifest, block))
    assert all(writer.done)


def test_a_device_that_fails_is_no_full_disk(
    opened: Open, manifest: Any, device: Callable[..., None]
) -> None:
    def befalls(block: Block) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    device(befalls)
    with refuses(
        "device-failed", "test samples 0..7", "CUDA error: an illegal memory access", "same command"
    ):
        write_all(opened(), manifest)


def test_an_error_outside_leaves_what_was_handed_over(opened: Open, manifest: Any) -> None:
    with pytest.raises(Fault), opened() as writer:
        for block in writer.blocks[:7]:
            writer.write(block, rows_of(manifest, block))
        raise Fault
    assert writer.done == [True] * 7 + [False] * (len(writer.blocks) - 7)

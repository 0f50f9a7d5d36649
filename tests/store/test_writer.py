"""Writing beside the computing: in parallel, in bounded memory, and never more told than done."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import changed, tree
from torch import Tensor

import richkd
from richkd.core.errors import RichKDError
from richkd.store import schema, writer
from richkd.store.checksums import block_files, is_intact
from richkd.store.locations import open_location
from richkd.store.schema import Block
from richkd.store.writer import PendingBlock, StoreWriter, flag_files, written

Open = Callable[[], StoreWriter]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def manifest(store: Path) -> Any:
    """Of a store of many small blocks."""
    found: Any = {**richkd.open_cache(store).manifest, "complete": False, "block": 8}
    return found


@pytest.fixture
def opened(manifest: Any, tmp_path: Path) -> Open:
    """A function that begins a store, or goes on with it."""
    place = open_location(tmp_path / "new.zarr")

    def begin() -> StoreWriter:
        made = StoreWriter.open(place, manifest, overwrite=False)
        made.put("train/view_ids", np.zeros((3, 48), np.uint16))
        made.put("text/embeddings", np.ones(made._arrays["text/embeddings"].shape, np.float32))
        return made

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


def write_all(opened: StoreWriter, manifest: Any) -> None:
    with opened:
        for block, done in zip(opened.blocks, opened.done, strict=True):
            if not done:
                opened.write(block, rows_of(manifest, block))


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


def test_arrays_of_several_blocks_are_encoded_together(
    opened: Open, manifest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "usable_cpus", lambda: 6)
    meet = threading.Barrier(6, timeout=20)  # none goes on before six are there
    put, met = zarr.Array.__setitem__, [0]

    def slow(self: Any, at: Any, values: Any) -> None:
        if self.name.startswith("/train/teacher_") and met[0] < 6:
            meet.wait()
            met[0] = 6
        put(self, at, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", slow)
    begun = opened()
    with begun:
        for block in [block for block in begun.blocks if block.view is not None][:4]:
            begun.write(block, rows_of(manifest, block))
    assert met == [6]


def test_memory_is_bounded(opened: Open, manifest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, put = threading.Event(), zarr.Array.__setitem__

    def locked(self: Any, at: Any, values: Any) -> None:
        assert gate.wait(20)
        put(self, at, values)

    begun, handed = opened(), []
    monkeypatch.setattr(zarr.Array, "__setitem__", locked)

    def compute() -> None:
        with begun:
            for block in begun.blocks:
                begun.write(block, rows_of(manifest, block))
                handed.append(block)

    computing = threading.Thread(target=compute)
    computing.start()
    time.sleep(0.5)
    assert len(handed) == writer._ROOM < len(begun.blocks)
    gate.set()
    computing.join()
    assert all(begun.done)


def test_a_flag_comes_after_its_rows(
    opened: Open,
    manifest: Any,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(writer, "usable_cpus", lambda: 8)
    place = open_location(tmp_path / "new.zarr")
    files = dict(zip(flag_files(manifest), schema.blocks(manifest), strict=True))
    put, late = zarr.Array.__setitem__, []

    def jittery(self: Any, at: Any, values: Any) -> None:
        if self.name == "/complete":
            block = files[f"complete/c/{at}"]
            late.extend(f for f in block_files(manifest, block) if not is_intact(place, f))
        else:
            time.sleep(float(rng.uniform(0, 0.01)))
        put(self, at, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", jittery)
    write_all(opened(), manifest)
    assert late == []


class Fault(BaseException):
    pass


def failing_from(last: int, kind: BaseException) -> Callable[..., None]:
    """Writing of arrays that works so many times and then no more."""
    put, numbers = zarr.Array.__setitem__, itertools.count()

    def write(self: Any, at: Any, values: Any) -> None:
        if next(numbers) >= last:
            raise kind
        put(self, at, values)

    return write


@pytest.mark.fault
@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), ValueError("x"), Fault()])
def test_errors_of_threads_are_told_and_it_goes_on(
    opened: Open,
    manifest: Any,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    kind: BaseException,
    tmp_path: Path,
) -> None:
    """Wherever an array or a flag cannot be written, no block is flagged that is not whole."""
    write_all(opened(), manifest)
    path = tmp_path / "new.zarr"
    whole = tree(path)
    count = sum(len(schema.block_arrays(manifest, block)) + 1 for block in schema.blocks(manifest))
    for failing in (0, 1, count - 1, *rng.integers(2, count - 1, 3)):
        path.rename(tmp_path / f"before-{failing}-{rng.integers(2**32)}")
        begun = opened()
        with monkeypatch.context() as patch:
            patch.setattr(zarr.Array, "__setitem__", failing_from(int(failing), kind))
            with pytest.raises(RichKDError, match="cannot write to .*run the same command"):
                write_all(begun, manifest)
        place = open_location(path)
        flags = [file in place.sizes() for file in flag_files(manifest)]
        assert flags == written(place, manifest) == begun.done  # flagged means whole
        assert not all(flags)
        write_all(opened(), manifest)
        assert changed(whole, tree(path)) == []


class Copied:
    """An event of a device: the rows arrive when it is waited for."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        self.synchronize = arrive


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function after which rows arrive as from a GPU, when threads wait for them.

    Its argument is called with the block before they do.
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
    opened: Open, manifest: Any, device: Callable[..., None], tmp_path: Path
) -> None:
    write_all(opened(), manifest)
    path = tmp_path / "new.zarr"
    path.rename(tmp_path / "at-once")
    device()
    write_all(opened(), manifest)
    assert changed(tree(tmp_path / "at-once"), tree(path)) == []


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (float("nan"), "holds NaN or infinity; check the teacher's weights"),
        (-float("inf"), "holds NaN or infinity; check the teacher's weights"),
        (1e6, "holds values beyond float16; store wider rows with --dtype float32"),
    ],
)
def test_bad_rows_that_arrive_later_are_told_by_their_name(
    opened: Open,
    manifest: Any,
    device: Callable[..., None],
    value: float,
    remedy: str,
    rng: np.random.Generator,
) -> None:
    device()
    begun = opened()
    bad = begun.blocks[int(rng.integers(len(begun.blocks)))]

    def write() -> None:
        with begun:
            for block in begun.blocks:
                rows = rows_of(manifest, block)
                if block == bad:
                    logits = rows["teacher_logits" if "teacher_logits" in rows else "clip_features"]
                    logits[-1, 3] = value
                begun.write(block, rows)

    with pytest.raises(RichKDError, match=f"of {bad.name} {remedy}"):
        write()
    place = open_location(begun._place.name)
    assert not begun.done[begun.blocks.index(bad)]
    assert begun.done == written(place, manifest)


def test_blocks_are_written_while_later_ones_are_computed(
    opened: Open, manifest: Any, device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with one CPU: nobody who could encode waits for the device."""
    monkeypatch.setattr(writer, "usable_cpus", lambda: 1)
    begun = opened()

    def befalls(block: Block) -> None:
        number = begun.blocks.index(block)
        end = time.monotonic() + 10
        while (number == 0 and begun._under_way < writer._ROOM) or (
            number >= 2 and not begun.done[number - 2]
        ):
            assert time.monotonic() < end
            time.sleep(0.001)

    device(befalls)
    write_all(begun, manifest)
    assert all(begun.done)


def test_a_device_that_fails_is_no_full_disk(
    opened: Open, manifest: Any, device: Callable[..., None]
) -> None:
    def befalls(block: Block) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    device(befalls)
    message = "device failed at test samples 0..7: CUDA error: an illegal memory access.*; run the"
    with pytest.raises(RichKDError, match=message):
        write_all(opened(), manifest)


def test_an_error_outside_leaves_what_was_handed_over(opened: Open, manifest: Any) -> None:
    begun = opened()
    with pytest.raises(Fault), begun:
        for block in begun.blocks[:7]:
            begun.write(block, rows_of(manifest, block))
        raise Fault
    assert begun.done == [True] * 7 + [False] * (len(begun.blocks) - 7)

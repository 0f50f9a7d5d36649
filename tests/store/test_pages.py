"""Memory for arrays: anonymous pages, or pages of a file without a name."""

from __future__ import annotations

import gc
import mmap
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses

import richkd
from richkd.core.memory import _free_in_container, available_memory
from richkd.store import pages

Usage = namedtuple("Usage", "total used free")


def mapped(folder: Path) -> list[int]:
    """The lengths in bytes of the deleted files of a folder that are mapped into memory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ends = [line.split()[0].split("-") for line in lines if f" {folder}/" in line]
    return sorted(int(end, 16) - int(start, 16) for start, end in ends)


def pages_of(count: int) -> int:
    """Bytes, rounded up to whole pages."""
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_an_array_on_the_disk_takes_no_memory_of_its_own(
    temporary: Path, rng: np.random.Generator
) -> None:
    count = 32 * 2**20
    values = rng.integers(0, 2**16, 1000, np.uint16)
    gc.collect()
    free = shutil.disk_usage(temporary).free
    anonymous = status("RssAnon")
    array = pages.empty((count // 2000, 1000), np.dtype(np.uint16), on_disk=True)
    assert not [*temporary.iterdir()]  # it has no name
    assert not array.any()
    array[:] = values
    assert (array[-1] == values).all() and (array[0] == values).all()
    assert status("RssAnon") - anonymous < count / 4
    assert free - shutil.disk_usage(temporary).free > count / 2  # other processes write, too
    in_memory = pages.empty(array.shape, array.dtype, on_disk=False)
    in_memory[:] = values
    assert status("RssAnon") - anonymous > count / 2  # the measurement sees such an array
    del array, in_memory
    gc.collect()
    assert free - shutil.disk_usage(temporary).free < count / 2


def test_the_first_folder_with_room_is_taken(
    temporary: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    full: set[Path] = set()

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(0, 0, 10 if folder in full else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    shape, dtype = (100,), np.dtype(np.float32)
    assert pages.empty(shape, dtype, on_disk=True).nbytes == 400 and {*asked} == {temporary}
    full.add(temporary)
    assert pages.empty(shape, dtype, on_disk=True).nbytes == 400 and own_home in asked
    full.add(own_home)
    with refuses("disk-too-small", "400 bytes", temporary, "10 bytes", own_home, "TMPDIR"):
        pages.empty(shape, dtype, on_disk=True)
    full.clear()
    monkeypatch.setenv("TMPDIR", str(temporary / "missing" / "x"))
    (temporary / "missing").write_text("a file")
    assert pages.empty(shape, dtype, on_disk=True).nbytes == 400


@pytest.mark.fault
def test_more_than_the_disk_holds_is_refused_and_not_found_out_later(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2**62))
    with refuses("disk-too-small", temporary, "TMPDIR"):
        pages.empty((2**50,), np.dtype(np.uint8), on_disk=True)


def test_reading_chooses_by_the_memory_that_is_available(store: Path, temporary: Path) -> None:
    spec = richkd.open_cache(store).specs["train/teacher_features"]
    one = spec.nbytes // spec.shape[0]
    wanted = richkd.open_cache(store, memory=4 * one).read("train/teacher_features", 1)
    assert mapped(temporary) == []
    cache = richkd.open_cache(store, memory=4 * one - 1)
    found = cache.read("train/teacher_features", 1)
    assert torch.equal(found, wanted) and mapped(temporary) == [pages_of(one)]
    slab = cache.slab(1)
    on_disk = mapped(temporary)
    assert len(on_disk) == 4 and torch.equal(slab.teacher_features, wanted)  # type: ignore[arg-type]
    kept = cache.read("train/teacher_features", 1, on_disk=False)
    assert torch.equal(kept, wanted) and mapped(temporary) == on_disk


def test_cosines_of_some_prompts_may_be_placed_on_disk(
    store: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = richkd.open_cache(store, memory=0)
    monkeypatch.setattr("richkd.core.memory.ROWS_AT_ONCE", 7)
    cosines = cache.similarity("train", [0, 2])
    assert pages_of(4 * cache.num_samples * cache.num_classes) in mapped(temporary)
    text = cache.text_embeddings[:, [0, 2]].double()
    text = text / text.norm(dim=2, keepdim=True)
    mean = text.sum(1)
    classes = mean / mean.norm(dim=1, keepdim=True)
    wanted = cache.read("train/clip_features").double() @ classes.T
    torch.testing.assert_close(cosines.double(), wanted, rtol=0, atol=1e-6)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    free = available_memory()
    assert free > 2**27
    assert _free_in_container(123, tmp_path) == 123  # none
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 500\nactive_file 1\n")
    assert _free_in_container(123, tmp_path) == 123
    (tmp_path / "memory.max").write_text("10000\n")
    assert _free_in_container(123, tmp_path) == 3500

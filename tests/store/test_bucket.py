"""Caches in object storage: the same bytes as on a disk, whatever the server does meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import fake_s3
import numpy as np
import obstore
import pytest
import zarr
from fake_hub import serving as hub_serving
from fake_s3 import BUCKET, FakeS3
from forked import Forks
from helpers import Refusal, assert_same_run, changed, refuses, tree
from obstore.store import from_url
from zarr.storage import ObjectStore

import richkd
from richkd.store import lease, locations
from richkd.store.bucket import Bucket
from richkd.store.lease import Lease
from richkd.store.locations import open_location
from richkd.store.schema import Block
from richkd.store.writer import StoreWriter

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
Hurry = Callable[..., None]
STUDENT = [
    "--student",
    "resnet8",
    "--epochs",
    2,
    "--batch-size",
    16,
    "--lr",
    0.02,
    "--device",
    "cpu",
]
names = (f"s3://{BUCKET}/{number}/shapes.zarr" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with pytest.MonkeyPatch.context() as patch, fake_s3.serving(patch) as server:
        yield server


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Hurry:
    """A function that gives the buckets of commands other timings, as arguments of `Bucket`."""
    original = Bucket.__init__

    def change(**seconds: float) -> None:
        monkeypatch.setattr(Bucket, "__init__", partialmethod(original, **seconds))

    return change


@pytest.fixture
def s3(
    server: FakeS3, hurry: Hurry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeS3]:
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "home"))
    hurry(first_patience=1.0)
    server.asked.clear()
    server.faults = 0
    yield server
    server.fault = None


@pytest.fixture
def url(s3: FakeS3) -> str:
    """A URL with no cache yet."""
    return next(names)


@pytest.fixture
def stage_one(shapes_teacher: Path, clip_dir: Path) -> list[Any]:
    return [
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        48,
        "--views",
        3,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--device",
        "cpu",
    ]


def remote_tree(url: str) -> dict[str, bytes]:
    store: Any = from_url(url, client_options={"allow_http": True})
    return {
        entry["path"]: bytes(obstore.get(store, entry["path"]).bytes())
        for entries in obstore.list(store)
        for entry in entries
    }


def arrays(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the manifest, which names its own path."""
    return {name: content for name, content in files.items() if name != "zarr.json"}


def copy_to(url: str, store: Path) -> None:
    remote: Any = from_url(url, client_options={"allow_http": True})
    for name, content in tree(store).items():
        obstore.put(remote, name, content)


def test_the_same_store_as_on_a_disk(
    run: Run, s3: FakeS3, url: str, store: Path, stage_one: list[Any], tmp_path: Path
) -> None:
    done = run(*stage_one, "--out", url)
    assert done.code == 0, done.err
    assert f"next: richkd distill --cache {url}" in done.out
    assert changed(arrays(remote_tree(url)), arrays(tree(store))) == []
    # complete comes last: after the manifest's last writing, only the lock goes
    written = [line for line in s3.asked if line.split()[0] in ("PUT", "DELETE", "POST")]
    assert written[-2].endswith("shapes.zarr/zarr.json") and written[-1].split()[0] != "PUT"

    plain = zarr.open_group(
        ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True), mode="r"
    )
    rows: Any = plain["train/fused_logits"]
    assert np.array_equal(rows[1], richkd.open_cache(store).slab(1).fused_logits)  # type: ignore[arg-type]

    for cache, out in ((url, "remote"), (store, "local")):
        assert run("distill", "--cache", cache, *STUDENT, "--out", tmp_path / out).code == 0
    assert_same_run(tmp_path / "remote", tmp_path / "local")
    for command in (["verify", url], ["inspect", url], ["analyze", url, "--out", tmp_path]):
        done = run(*command)
        assert done.code == 0 and url in done.out, done.err


def test_what_was_read_is_not_read_again(s3: FakeS3, url: str, store: Path) -> None:
    copy_to(url, store)
    cache = richkd.open_cache(url)
    assert not s3.got("/c/")  # nothing but metadata, until something is asked for
    cache.slab(1, ["teacher_logits"])
    assert len(s3.got("/c/1/0")) == 2 and len(s3.got("/c/")) == 2  # view ids and logits of view 1
    cache.slab(1, ["teacher_logits"])
    other = richkd.open_cache(url)
    other.slab(1, ["teacher_logits"])
    assert len(s3.got("/c/")) == 2
    (cache.path / "train/labels/zarr.json").write_bytes(b"torn")
    other = richkd.open_cache(url)
    (cache.path / "train/teacher_logits/c/1/0/0").write_bytes(b"torn")
    again = other.slab(1, ["teacher_logits"]).teacher_logits
    assert again is not None
    assert np.array_equal(again, richkd.open_cache(store).slab(1).teacher_logits)  # type: ignore[arg-type]
    assert len(s3.got("/c/")) == 3  # that one, once more


def test_a_store_made_anew_has_a_copy_of_its_own(
    run: Run, s3: FakeS3, url: str, stage_one: list[Any]
) -> None:
    assert run(*stage_one, "--out", url).code == 0
    old = richkd.open_cache(url)
    rows = old.slab(0).fused_logits
    assert run(*stage_one, "--out", url, "--alpha", 0.2, "--overwrite").code == 0
    new = richkd.open_cache(url)
    assert new.manifest["alpha"] == 0.2 and new.path != old.path
    assert not np.array_equal(new.slab(0).fused_logits, rows)  # type: ignore[arg-type]
    # the old one can be read as far as it was; what else it had is gone
    assert np.array_equal(old.slab(0).fused_logits, rows)  # type: ignore[arg-type]
    with refuses("cache-damaged", url, "view 1"):
        old.slab(1)
    os.utime(old.path / "zarr.json", (0, 0))  # nobody has opened it for long
    richkd.open_cache(url)
    assert new.path.exists() and not old.path.exists()
    with refuses("cache-damaged", url, "view 0"):
        old.slab(0)


@pytest.mark.fault
def test_interrupted_it_resumes(
    run: Run,
    fails: Fails,
    s3: FakeS3,
    url: str,
    store: Path,
    stage_one: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = StoreWriter.write

    def write(self: StoreWriter, block: Block, rows: Any) -> None:
        if block.view == 1:
            raise KeyboardInterrupt
        original(self, block, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", write)
        assert run(*stage_one, "--out", url).code == 130
    line = fails("distill", "--cache", url, *STUDENT, "--out", tmp_path / "run")
    assert line.code == "cache-incomplete" and url in line
    line = fails(*stage_one, "--out", url, "--alpha", 0.1)
    assert line.code == "cache-settings-differ" and "alpha" in line
    remote: Any = from_url(url, client_options={"allow_http": True})
    for lost in ("train/labels/c/0", "text/zarr.json"):  # as if interrupted while it was created
        obstore.delete(remote, lost)
    done = run(*stage_one, "--out", url)
    assert done.code == 0 and "resuming: 2 of 5 blocks" in done.err, done.err
    assert changed(arrays(remote_tree(url)), arrays(tree(store))) == []


@pytest.mark.slow
@pytest.mark.fault
def test_killed_it_resumes(
    s3: FakeS3, url: str, stage_one: list[Any], run: Run, forks: Forks, tmp_path: Path
) -> None:
    words = [*stage_one, "--views", 60, "--out"]
    for _ in range(3):
        s3.asked.clear()
        process = forks.start(*words, url)
        while (
            process.poll() is None
            and sum(line.startswith("PUT") and "/complete/c/" in line for line in s3.asked) < 12
        ):
            time.sleep(0.005)
        process.kill()
        # its lock stays, and stops nobody here
        assert process.wait() == -signal.SIGKILL, process.err
    resumed, whole = (forks.run(*words, out) for out in (url, tmp_path / "whole.zarr"))
    assert resumed.code == whole.code == 0, resumed.err + whole.err
    assert "resuming: " in resumed.err
    assert changed(arrays(remote_tree(url)), arrays(tree(tmp_path / "whole.zarr"))) == []
    assert run("verify", url).code == 0


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("wrong", ["fail", "slow", "cut", "flip"])
def test_a_bad_server_costs_time_and_nothing_else(
    run: Run,
    s3: FakeS3,
    url: str,
    store: Path,
    stage_one: list[Any],
    tmp_path: Path,
    wrong: str,
    rng: np.random.Generator,
    hurry: Hurry,
) -> None:
    hurry(timeout=0.5, first_patience=20.0)
    dice = iter(rng.random(10**6).tolist())
    due = [True]

    def fault(method: str, path: str) -> str | None:
        if path.endswith("/.lock"):
            return None  # its requests have conditions and are sent but once
        if wrong in ("cut", "flip") and (
            method != "GET" or (wrong == "flip" and "/c/" not in path)
        ):
            return None  # flipped metadata has no CRC of its own: it is found later, and refused
        if due or next(dice) < 0.15:
            due.clear()  # one at least in each stage
            return wrong
        return None

    s3.fault = fault
    done = run(*stage_one, "--out", url)
    assert done.code == 0, done.err
    before = s3.faults
    due.append(True)
    assert run("distill", "--cache", url, *STUDENT, "--out", tmp_path / "remote").code == 0
    s3.fault = None
    assert before and s3.faults > before
    assert changed(arrays(remote_tree(url)), arrays(tree(store))) == []
    assert run("distill", "--cache", store, *STUDENT, "--out", tmp_path / "local").code == 0
    assert_same_run(tmp_path / "remote", tmp_path / "local")


@pytest.mark.slow
@pytest.mark.fault
def test_a_server_that_is_gone_is_said_in_a_line(
    run: Run,
    fails: Fails,
    s3: FakeS3,
    url: str,
    store: Path,
    stage_one: list[Any],
    tmp_path: Path,
    hurry: Hurry,
) -> None:
    hurry(patience=1.0, first_patience=1.0)
    # all of a sudden, in view 1
    s3.fault = lambda method, path: "fail" if "_logits/c/1/" in path else None
    line = fails(*stage_one, "--out", url)
    assert line.code == "write-failed" and "503" in line and "same command" in line
    s3.fault = lambda method, path: "fail"
    distill = ["distill", "--cache", url, *STUDENT, "--out", tmp_path]
    for words in (distill, [*stage_one, "--out", url], ["inspect", url], ["verify", url]):
        line = fails(*words)
        assert line.code == "location-failed" and url in line
        assert "503" in line and len(line) < 400
    s3.fault = None
    assert run(*stage_one, "--out", url).code == 0
    assert changed(arrays(remote_tree(url)), arrays(tree(store))) == []

    s3.fault = lambda method, path: "fail" if "/c/1/" in path else None
    line = fails("distill", "--cache", url, *STUDENT, "--out", tmp_path / "run")
    assert line.code == "location-failed" and url in line and "503" in line


@pytest.mark.slow
@pytest.mark.fault
def test_damage_there_is_found_and_mended(
    run: Run, fails: Fails, s3: FakeS3, url: str, stage_one: list[Any], tmp_path: Path
) -> None:
    assert run(*stage_one, "--out", url).code == 0
    right = remote_tree(url)
    remote: Any = from_url(url, client_options={"allow_http": True})
    name, other = "train/fused_logits/c/1/0/0", "train/fused_logits/c/2/0/0"
    content = bytearray(right[name])
    content[len(content) // 2] ^= 16
    for bad in (bytes(content), right[other]):  # damaged; whole, in the place of another
        obstore.put(remote, name, bad)
        line = fails("distill", "--cache", url, *STUDENT, "--out", tmp_path / str(len(bad)))
        assert line.code == "cache-damaged" and "train/fused_logits" in line
        assert fails("verify", url).code == "cache-verify-failed"
        assert run("repair", url).code == 0
        assert changed(arrays(remote_tree(url)), arrays(right)) == []
    obstore.delete(remote, name)
    line = fails("distill", "--cache", url)
    assert line.code == "cache-damaged" and "1 of 3 chunks of train/fused_logits" in line
    obstore.put(remote, name, right[name])
    manifest = bytearray(right["zarr.json"])
    manifest[manifest.index(b"0.7")] += 1
    obstore.put(remote, "zarr.json", bytes(manifest))
    assert fails("distill", "--cache", url).code == "cache-unsealed"


@pytest.mark.fault
def test_two_writers_at_once(
    fails: Fails, s3: FakeS3, url: str, stage_one: list[Any], hurry: Hurry
) -> None:
    hurry(beat=0.3)
    with open_location(url).locked():
        line = fails(*stage_one, "--out", url)
        assert line.code == "locked" and url in line and f"process {os.getpid()} on " in line
    assert not remote_tree(url)
    remote: Any = from_url(url, client_options={"allow_http": True})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note = {"holder": "process 1 on elsewhere", "token": "0", "pid": gone.pid, "beat": "0"}
    # left by a process of this system, of another with the same numbers, and by anything else
    for system, content in ((lease.this_system(), None), ("another", None), (None, b"[1, 2]")):
        left = content or json.dumps({**note, "system": system}).encode()
        obstore.put(remote, ".lock", left)
        began = time.perf_counter()
        with open_location(url).locked():
            waited = time.perf_counter() - began
        assert (waited > 0.7) == (system != lease.this_system())
        assert not remote_tree(url)


@pytest.mark.fault
def test_a_late_delete_takes_nothing(
    run: Run, s3: FakeS3, url: str, stage_one: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[Any] = []
    original = obstore.delete

    def delete(store: Any, paths: Any) -> None:
        deleted.extend([paths] if isinstance(paths, str) else paths)
        original(store, paths)

    monkeypatch.setattr(obstore, "delete", delete)
    assert run(*stage_one, "--out", url).code == 0
    assert set(deleted) == {".lock"}  # nothing that is not there: it might be carried out later
    assert run(*stage_one, "--out", url, "--overwrite").code == 0
    assert "zarr.json" in deleted

    remote: Any = from_url(url, client_options={"allow_http": True})
    lock = Lease(remote, url, beat=0.2)
    with lock.locked():
        for _ in range(3):
            original(remote, ".lock")  # as if it were the lock before this one
            time.sleep(0.3)  # it is renewed meanwhile
            lock.check()
            assert lock.token is not None and lock.token.encode() in remote_tree(url)[".lock"]
    assert ".lock" not in remote_tree(url)
    lock = Lease(remote, url, beat=60.0)  # so that its thread does not renew it
    with lock.locked():
        original(remote, ".lock")
        lock.beat = 0.01
        time.sleep(0.05)  # long enough for others to have taken it
        with refuses("lock-lost", url):
            lock.check()


@pytest.mark.slow
@pytest.mark.fault
def test_a_writer_that_was_delayed_stops(
    fails: Fails,
    s3: FakeS3,
    url: str,
    stage_one: list[Any],
    hurry: Hurry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote: Any = from_url(url, client_options={"allow_http": True})
    others = json.dumps(
        {"holder": "process 1 on elsewhere", "token": "0", "pid": 1, "beat": "0", "system": None}
    ).encode()
    first, second = Lease(remote, url, beat=0.2), Lease(remote, url, beat=0.2)  # of one job
    with first.locked():
        assert first.token is not None
        second.follow(first.token)
        time.sleep(0.9)  # the first renews the lock, and the second sees it
        for each in (first, second):
            each.check()
            each.beat = 60.0  # asleep, from the next beat on
        time.sleep(0.3)
        obstore.put(remote, ".lock", others)
        for each in (first, second):
            each.beat = 0.01  # awake after a long time
        time.sleep(0.05)
        for each in (first, second):
            with refuses("lock-lost", url):
                each.check()
    assert remote_tree(url) == {".lock": others}  # the other one's stays

    original = StoreWriter.write

    def write(self: StoreWriter, block: Block, rows: Any) -> None:
        original(self, block, rows)
        if block.view == 0:
            self.flush()
            obstore.put(remote, ".lock", others)
            time.sleep(0.05)

    obstore.delete(remote, ".lock")
    monkeypatch.setattr(StoreWriter, "write", write)
    hurry(beat=0.01, first_patience=1.0)
    assert fails(*stage_one, "--out", url).code == "lock-lost"
    assert not json.loads(remote_tree(url)["zarr.json"])["attributes"]["complete"]


@pytest.mark.slow
@pytest.mark.fault
def test_patience_is_what_it_says(s3: FakeS3, url: str) -> None:
    s3.fault = lambda method, path: "fail"
    place = Bucket(url, patience=1.0)
    for request in (
        lambda: place.read("x"),
        lambda: place.tail("x", 4),
        place.sizes,
        lambda: place.write("x", b""),
        lambda: place.zarr(read_only=True),
    ):
        began = time.perf_counter()
        with refuses("location-failed", url, "503"):
            store = request()
            with place.explained("read"):
                zarr.open_group(store, mode="r")  # type: ignore[arg-type]
        assert time.perf_counter() - began < 3.0


def test_mistakes(
    fails: Fails,
    s3: FakeS3,
    url: str,
    stage_one: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert fails(*stage_one, "--out", "http://x/y.zarr").code == "unknown-name"
    for bad in (
        "s3://bucket",
        "s3://bucket/",
        "s3:///x.zarr",
        "s3://bucket/..",
        "s3://bucket/a//b",
        "s3://bucket/run#1.zarr",
        "s3://bucket/run?x",
        "s3://bucket/a%20b",
    ):
        line = fails(*stage_one, "--out", bad)
        assert line.code == "url-malformed" and bad in line and "s3://BUCKET/PATH.zarr" in line
    assert fails(*stage_one, "--out", "s3://nobody/s.zarr").code == "bucket-missing"
    line = fails("distill", "--cache", url)
    assert line.code == "cache-missing" and url in line
    line = fails(*stage_one, "--out", "hf://datasets/me/teachers")
    assert line.code == "location-read-only" and "me/teachers" in line
    remote: Any = from_url(url, client_options={"allow_http": True})
    obstore.put(remote, "notes.txt", b"mine")
    assert fails(*stage_one, "--out", url).code == "foreign-file"
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "file").write_text("")
    obstore.put(remote, "zarr.json", b"{}")
    line = fails("distill", "--cache", url)
    assert line.code == "local-copy-failed" and "RICHKD_HOME" in line

    with monkeypatch.context() as patch:
        patch.setattr(locations, "find_spec", lambda name: None)
        line = fails("distill", "--cache", url)
        assert line.code == "extra-missing" and "richkd[cloud]" in line


def test_many_threads_read_one_place(s3: FakeS3, url: str, store: Path) -> None:
    copy_to(url, store)
    caches = [richkd.open_cache(url) for _ in range(4)]
    right = richkd.open_cache(store)
    wrong: list[int] = []

    def read(cache: Any) -> None:
        for view in range(3):
            rows = cache.slab(view).fused_logits
            if not np.array_equal(rows, right.slab(view).fused_logits):  # type: ignore[arg-type]
                wrong.append(view)

    threads = [threading.Thread(target=read, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (
        changed(
            tree(caches[0].path),
            {k: v for k, v in tree(store).items() if k in tree(caches[0].path)},
        )
        == []
    )


@pytest.mark.slow
def test_a_store_on_the_hub_is_read_in_place(
    run: Run, fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "home"))
    with hub_serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("dataset", "me/teachers", {**tree(store), "README.md": b"a card"})
        url = "hf://datasets/me/teachers"
        for cache, out in ((url, "remote"), (store, "local")):
            done = run("distill", "--cache", cache, *STUDENT, "--out", tmp_path / out)
            assert done.code == 0, done.err
        assert_same_run(tmp_path / "remote", tmp_path / "local")
        line = fails("distill", "--cache", "hf://datasets/me/nothing")
        assert line.code == "cache-missing" and "hf://datasets/me/nothing" in line
        hub.damaged.add("train/labels/c/0")
        monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "other-home"))
        line = fails("distill", "--cache", url)
        assert line.code == "cache-damaged" and "train/labels/c/0" in line

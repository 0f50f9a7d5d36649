"""Stage one under torchrun: several processes write the same cache as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from helpers import changed, tree, write_teacher
from PIL import Image

from richkd.core.errors import RichKDError
from richkd.core.ranks import Ranks, of_others

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it: sums in one order


def start(words: list[Any], ranks: int) -> subprocess.Popen[str]:
    """A job of so many processes; one is started without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "richkd", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **_aws()},
    )


def _aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def finish(words: list[Any], ranks: int) -> str:
    process = start(words, ranks)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("next: ") == 1
    return err


def comparable(store: dict[str, bytes]) -> dict[str, bytes]:
    """Every file; of the manifest all but where the store lies, and the seal over that."""
    group = json.loads(store["zarr.json"])
    manifest = group["attributes"]
    del manifest["seal"], manifest["recipe"]["out"]
    return {**store, "zarr.json": json.dumps(group).encode()}


@pytest.fixture
def drawings(shapes_teacher: Path, clip_dir: Path) -> list[Any]:
    return [
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        64,
        "--views",
        30,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--device",
        "cpu",
    ]


@pytest.fixture
def photographs(tmp_path: Path, clip_dir: Path, rng: np.random.Generator) -> list[Any]:
    for part, count in (("train", 40), ("val", 12)):
        for number in range(count):
            folder = tmp_path / "images" / part / ("cat", "dog", "owl")[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*rng.integers(30, 60, 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    weights = write_teacher(tmp_path / "teacher.safetensors", "resnet8", 3)
    return [
        "precompute",
        "--dataset",
        f"imagefolder:{tmp_path / 'images'}",
        "--image-size",
        32,
        "--views",
        4,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        weights,
        "--clip",
        clip_dir,
        "--device",
        "cpu",
    ]


def test_shares_are_disjoint_and_all_of_it() -> None:
    work = list(range(23))
    shares = [Ranks(rank, 5).own(work) for rank in range(5)]
    assert sorted(item for share in shares for item in share) == work
    assert {len(share) for share in shares} == {4, 5}


def test_an_error_that_names_an_igloo_is_of_this_process() -> None:
    assert of_others(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] closed"))
    assert not of_others(RichKDError("no such folder: /data/igloo; check it", code="any"))


@pytest.mark.slow
@pytest.mark.parametrize("images", ["drawings", "photographs"])
def test_two_ranks_write_the_store_of_one(
    images: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = request.getfixturevalue(images)
    finish([*words, "--out", tmp_path / "one.zarr"], 1)
    said = finish([*words, "--out", tmp_path / "two.zarr"], 2)
    one, two = (comparable(tree(tmp_path / name)) for name in ("one.zarr", "two.zarr"))
    assert changed(one, two) == []
    assert "precompute, rank 0 of 2" in said and said.count("is complete") == 1


@pytest.mark.slow
@pytest.mark.fault
def test_a_rank_that_dies_costs_what_it_had_in_hand(drawings: list[Any], tmp_path: Path) -> None:
    drawings = [*drawings, "--views", 162]
    path = tmp_path / "two.zarr"
    process = start([*drawings, "--out", path], 2)
    while process.poll() is None and len(list(path.glob("complete/c/*"))) < 20:
        time.sleep(0.005)
    second = next(pid for pid in children(process.pid) if rank_of(pid) == "1")
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate()
    flags = len(list(path.glob("complete/c/*")))
    assert process.returncode != 0 and 20 <= flags < 164, err
    assert not json.loads((path / "zarr.json").read_text())["attributes"]["complete"]
    # of all files of the blocks that are marked, and of no others, is anything done again
    before = {file: file.stat().st_mtime_ns for file in path.rglob("complete/c/*")}
    said = finish([*drawings, "--out", path], 2)
    assert f"{flags} of 164 blocks" in said
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in before.items())
    finish([*drawings, "--out", tmp_path / "one.zarr"], 1)
    one, two = (comparable(tree(tmp_path / name)) for name in ("one.zarr", "two.zarr"))
    assert changed(one, two) == []


def children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(line) for line in listed.stdout.split()]


def rank_of(pid: int) -> str | None:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode()
    values = dict(entry.partition("=")[::2] for entry in content.split("\0"))
    return values.get("RANK")


@pytest.mark.slow
def test_a_mistake_is_said_by_one(drawings: list[Any], tmp_path: Path) -> None:
    process = start([*drawings, "--teacher-weights", "nowhere.pt", "--out", tmp_path / "s.zarr"], 2)
    _, err = process.communicate()
    assert process.returncode != 0
    assert err.count("[weights-missing]") == 1


@pytest.mark.slow
def test_a_machine_with_other_weights_writes_nothing(
    clip_dir: Path, shapes_teacher: Path, tmp_path: Path
) -> None:
    """Two machines, which have a folder each under the same name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    out = tmp_path / "s.zarr"
    processes = []
    for rank in (0, 1):
        folder = tmp_path / f"machine-{rank}"
        folder.mkdir()
        if rank == 0:
            shutil.copyfile(shapes_teacher, folder / "teacher.safetensors")
        else:
            write_teacher(folder / "teacher.safetensors", "resnet8", 16, seed=1)
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "richkd",
                    "precompute",
                    "--dataset",
                    "shapes",
                    "--limit",
                    "64",
                    "--teacher",
                    "resnet8",
                    "--teacher-weights",
                    "teacher.safetensors",
                    "--clip",
                    clip_dir,
                    "--device",
                    "cpu",
                    "--out",
                    out,
                ],
                cwd=folder,
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **ENVIRONMENT,
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
        )
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "[rank-teachers-differ]" in said[1] and "teacher.sha256" in said[1]
    assert "[rank-lost]" in said[0]
    assert not list(out.glob("complete/c/*"))


@pytest.mark.slow
@pytest.mark.fault
def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom richkd.core.interrupts import interruptible\n"
        "from richkd.core.ranks import joined\n"
        "with interruptible(), joined() as ranks:\n"
        "    print('here', flush=True)\n"
        "    ranks.from_first(lambda: time.sleep(60))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.PIPE,
            env={
                **ENVIRONMENT,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        time.sleep(0.5)
        began = time.perf_counter()
        ranks[1].send_signal(signal.SIGTERM)
        _, err = ranks[1].communicate(timeout=20)
        assert time.perf_counter() - began < 10 and "Interrupted" in err
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fake_s3

    with fake_s3.serving(monkeypatch):
        yield fake_s3.BUCKET


@pytest.mark.slow
def test_two_ranks_write_to_one_bucket(bucket: str, drawings: list[Any], tmp_path: Path) -> None:
    url = f"s3://{bucket}/two.zarr"
    finish([*drawings, "--out", url], 2)
    finish([*drawings, "--out", tmp_path / "one.zarr"], 1)
    obstore, store = optional.load("obstore"), optional.load("obstore.store")
    remote: Any = store.from_url(url, client_options={"allow_http": True})
    two = {
        entry["path"]: bytes(obstore.get(remote, entry["path"]).bytes())
        for entries in obstore.list(remote)
        for entry in entries
    }
    assert changed(comparable(tree(tmp_path / "one.zarr")), comparable(two)) == []

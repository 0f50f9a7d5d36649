"""The texts of many classes: in batches, shared among processes, and embedded once a cache."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from forked import Forks, Kill
from helpers import changed, tree

import richkd
from richkd.core.fusion import class_embeddings
from richkd.core.progress import Report
from richkd.store import schema
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.teachers.clip import TEXT_BATCH, ClipTeacher, load_clip
from richkd.teachers.find import kept_text

Run = Callable[..., Any]
CPU = torch.device("cpu")
WRITE = "richkd.store.writer:StoreWriter.write"
EMBEDDED = "richkd.teachers.clip:ClipTeacher.text_embeddings"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of every call of a CLIP's text encoder."""
    counts: list[int] = []
    encode = open_clip.CLIP.encode_text

    def counting(self: Any, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        counts.append(len(tokens))
        found: torch.Tensor = encode(self, tokens, normalize)
        return found

    monkeypatch.setattr(open_clip.CLIP, "encode_text", counting)
    return counts


@pytest.fixture
def stage_one(clip_dir: Path, shapes_teacher: Path, tmp_path: Path) -> list[str]:
    """A command whose texts fill several batches, without `--out`."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"photo {number} of a {{}}" for number in range(40)))
    command = "precompute --dataset shapes --limit 64 --views 2 --teacher resnet8 --device cpu"
    teachers = f"--teacher-weights {shapes_teacher} --clip {clip_dir} --prompts {prompts}"
    return f"{command} {teachers} --out".split()


def test_texts_in_batches_are_the_texts_in_order(
    clip_dir: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    clip, count = load_clip(str(clip_dir), CPU), int(rng.integers(200, 300))
    names = [f"thing {number}" for number in rng.permutation(count)]
    templates = ["a {}", "no {} at all", "{}"]
    found = clip.text_embeddings(names, templates, report=Report())
    texts = [template.replace("{}", name) for name in names for template in templates]
    with torch.no_grad():
        expected = F.normalize(
            clip.model.encode_text(open_clip.tokenize(texts, 16)).double(), dim=1
        )
    assert found.shape == (count, 3, 24) and count * 3 > 2 * TEXT_BATCH
    torch.testing.assert_close(found.double().flatten(0, 1), expected, rtol=0, atol=1e-6)
    assert f"embedding the prompts: {3 * count} texts" in capfd.readouterr().err


def test_class_embeddings_do_not_depend_on_the_slices(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = F.normalize(torch.from_numpy(rng.normal(size=(50, 3, 8))).float(), dim=-1)
    whole = class_embeddings(embeddings, [2, 0])
    monkeypatch.setattr("richkd.core.memory.ROWS_AT_ONCE", 7)
    assert torch.equal(class_embeddings(embeddings, [2, 0]), whole)


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_stage_one_resumes_with_its_texts(
    forks: Forks, run: Run, stage_one: list[str], encoded: list[int], tmp_path: Path
) -> None:
    few = {"richkd.data.datasets:SHAPES_TEST": 40}
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    assert run(*stage_one, whole).code == 0
    texts = len(richkd.open_cache(whole).manifest["class_names"]) * 40
    assert sum(encoded) - 1 == texts > 2 * TEXT_BATCH and max(encoded) == TEXT_BATCH
    killed = forks.run(*stage_one, cut, kill=Kill(WRITE, 1), values=few)
    assert killed.code == -signal.SIGKILL and "texts in" in killed.err
    encoded.clear()
    done = run(*stage_one, cut)
    assert done.code == 0 and f"{texts} texts are already embedded" in done.err
    assert encoded == []
    arrays = [{**tree(path), "zarr.json": b""} for path in (whole, cut)]
    assert changed(*arrays) == []
    # killed before the cache is there, it starts again
    again = tmp_path / "again.zarr"
    assert forks.run(*stage_one, again, kill=Kill(EMBEDDED), values=few).code == -signal.SIGKILL
    assert not again.exists() and run(*stage_one, again).code == 0 and sum(encoded) - 1 == texts


def test_texts_are_kept_only_where_nothing_differs(
    run: Run, stage_one: list[str], store: Path, clip_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    assert run(*stage_one, out).code == 0
    location, manifest = open_location(out), read_manifest(out)
    clip, names = load_clip(str(clip_dir), CPU), manifest["class_names"]
    prompts = manifest["prompts"]

    def kept(
        clip: Any = clip, names: Any = names, prompts: Any = prompts, of: Any = manifest
    ) -> Any:
        return kept_text(location, of, clip, names, prompts)

    assert torch.equal(kept(), richkd.open_cache(out).text_embeddings)
    assert kept(names=[*names[1:], names[0]]) is None
    assert kept(prompts=prompts[:-1]) is None
    assert kept(clip=ClipTeacher(**{**vars(clip), "sha256": "0" * 64})) is None
    assert kept(of=None) is None and kept(of={**manifest, "clip": None}) is None
    other = open_location(store)  # intact, but of fewer prompts
    assert kept_text(other, manifest, clip, names, prompts) is None
    chunk = next((out / schema.TEXT_ARRAY / "c").rglob("0"))
    for path in (out / schema.TEXT_ARRAY / "c").rglob("*"):
        chunk = path if path.is_file() else chunk
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert kept() is None


def test_texts_beyond_what_a_chunk_takes_are_split(
    run: Run, stage_one: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.zarr", tmp_path / "parts.zarr"
    assert run(*stage_one, whole).code == 0
    spec = schema.array_specs(read_manifest(whole))[schema.TEXT_ARRAY]
    texts = richkd.open_cache(whole).text_embeddings
    assert spec.chunks == spec.shape
    monkeypatch.setattr(schema, "MOST_CHUNK_BYTES", spec.nbytes - 1)
    monkeypatch.setattr(schema, "PART_BYTES", spec.nbytes // 3)
    assert run(*stage_one, parts).code == 0
    assert len([*(parts / schema.TEXT_ARRAY / "c").iterdir()]) in (3, 4)
    assert run("verify", parts).code == 0
    assert torch.equal(richkd.open_cache(parts).text_embeddings, texts)
    manifest: Any = {**read_manifest(parts), "class_names": ["x"] * 21_841, "prompts": ["{}"] * 80}
    manifest["clip"] = {**manifest["clip"], "num_features": 1024}
    monkeypatch.undo()
    spec = schema.array_specs(manifest)[schema.TEXT_ARRAY]
    assert 0 < np.prod(spec.chunks) * 4 <= schema.PART_BYTES < spec.nbytes


@pytest.mark.slow
def test_two_processes_share_the_texts(forks: Forks, stage_one: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    few = {"richkd.data.datasets:SHAPES_TEST": 40}
    ranks = [
        forks.start(
            *stage_one,
            tmp_path / "two.zarr",
            values=few,
            env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    ends = [rank.outcome() for rank in ranks]
    assert [end.code for end in ends] == [0, 0], ends
    share = re.search(r"embedding the prompts, rank 0 of 2: (\d+) texts", ends[0].err)
    assert share and TEXT_BATCH < int(share[1]) < 40 * 16
    assert forks.run(*stage_one, tmp_path / "one.zarr", values=few).code == 0
    texts = [
        richkd.open_cache(tmp_path / f"{name}.zarr").text_embeddings for name in ("one", "two")
    ]
    assert torch.equal(*texts)

"""The cache as a file format: what plain zarr sees, what is refused, what is rounded."""

import functools
import json
import operator
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import refuses

import richkd
from richkd.store import schema
from richkd.store.checksums import metadata_digest, write_sealed
from richkd.store.encoding import round_bits
from richkd.store.folder import Folder
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.schema import Block
from richkd.store.writer import open_writer


def test_plain_zarr_reads_everything(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    assert group.metadata.zarr_format == 3 and group.metadata.consolidated_metadata is None
    attributes = dict(group.attrs)
    specs = schema.array_specs(attributes)  # type: ignore[arg-type]
    for name, spec in specs.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.shape, str(array.dtype)) == (spec.shape, spec.dtype)
        assert array.metadata.dimension_names == spec.dimensions
        assert np.asarray(array[...]).shape == spec.shape
        codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]  # type: ignore[union-attr,index,call-overload]
        assert codecs[-1] == "crc32c" and not any("numcodecs" in codec for codec in codecs)
    assert np.asarray(group["complete"][:]).all()  # type: ignore[index]


def test_documented_names(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    documented = {
        "train/images",
        "test/images",
        "train/labels",
        "test/labels",
        "train/view_ids",
        "train/teacher_logits",
        "train/fused_logits",
        "train/teacher_features",
        "train/clip_features",
        "test/clip_features",
        "train/clip_similarity",
        "test/clip_similarity",
        "test/teacher_logits",
        "test/teacher_features",
        "test/fused_logits",
        "text/embeddings",
        "complete",
    }
    found = {
        path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)
    }
    assert found == documented
    readme = (Path(__file__).parents[2] / "cache" / "README.md").read_text()
    for name in documented:
        assert (
            f"`{name}`" in readme
            or f"`{name.replace('train/', '*/').replace('test/', '*/')}`" in readme
        ), name


def test_slabs(store: Path) -> None:
    cache = richkd.open_cache(store)
    group = zarr.open_group(store, mode="r")
    assert cache.num_views == 3 and cache.num_samples == 48
    slab = cache.slab(2)
    for name in ("teacher_logits", "teacher_features", "fused_logits"):
        stored = np.asarray(group[f"train/{name}"][2])  # type: ignore[index]
        assert (getattr(slab, name).numpy() == stored).all() and stored.dtype == np.float16
    assert slab.view_ids is not None
    assert (slab.view_ids.numpy() == np.asarray(group["train/view_ids"][2])).all()  # type: ignore[index]
    only = cache.slab(0, ["fused_logits"])
    assert only.teacher_logits is None and only.fused_logits is not None
    with refuses("view-out-of-range", "view 3", "0..2"):
        cache.slab(3)


GONE = object()


def copy(store: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy.zarr"
    shutil.copytree(store, target)
    return target


def edit(store: Path, change: Callable[[dict[str, Any]], object], file: str = "zarr.json") -> None:
    path = store / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda store: edit(store, lambda content: change(content["attributes"]))


def attribute(name: str, value: object) -> Callable[[Path], None]:
    return edited(lambda manifest: manifest.update({name: value}))


def nested(entry: str, name: str, value: object) -> Callable[[Path], None]:
    return edited(lambda manifest: manifest[entry].update({name: value}))


def forged(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage by somebody who knows how stores are sealed."""

    def forge(store: Path) -> None:
        damage(store)
        manifest = json.loads((store / "zarr.json").read_text())["attributes"]
        for file in manifest["checksums"]["metadata"]:
            if (store / file).is_file():
                manifest["checksums"]["metadata"][file] = metadata_digest(
                    open_location(store), file
                )
        write_sealed(open_location(store), manifest)

    return forge


Damage = Callable[[Path], object]
DAMAGE: list[tuple[Damage, str, str]] = [
    (lambda s: shutil.rmtree(s), "cache-missing", "richkd precompute"),
    (lambda s: (s / "zarr.json").unlink(), "not-a-cache", "zarr.json"),
    (lambda s: (s / "zarr.json").write_text("{"), "not-a-cache", ""),
    (attribute("format", "other"), "not-a-cache", ""),
    (attribute("schema", 99), "cache-schema", "99"),
    (attribute("complete", False), "cache-incomplete", "richkd precompute"),
    (attribute("class_names", 7), "manifest-damaged", "class_names"),
    (attribute("class_names", ["a"]), "cache-unsealed", "zarr.json"),
    (nested("dataset", "num_train", 10**15), "manifest-damaged", "num_train"),
    (nested("dataset", "num_train", 47), "cache-unsealed", ""),
    (forged(nested("dataset", "num_train", 47)), "cache-damaged", "47"),
    (forged(nested("dataset", "num_train", 10**12)), "cache-damaged", f"{10**12}"),
    (nested("views", "count", -1), "manifest-damaged", "views.count is -1"),
    (nested("clip", "logit_scale", float("nan")), "manifest-damaged", "logit_scale"),
    (nested("dataset", "embedded", None), "manifest-damaged", "dataset.embedded is None"),
    (edited(lambda m: m["clip"].pop("logit_scale")), "manifest-damaged", "clip.logit_scale"),
    (edited(lambda m: m.pop("checksums")), "manifest-damaged", "checksums"),
    (
        edited(lambda m: m["checksums"]["chunks"].update(complete=[7])),
        "manifest-damaged",
        "chunks.complete[0] is 7",
    ),
    (forged(edited(lambda m: m["checksums"]["chunks"].update(complete=[]))), "cache-unsealed", ""),
    (
        edited(lambda m: m["class_names"].append(None)),
        "manifest-damaged",
        "class_names[16] is None",
    ),
    (attribute("std", [1.0, 0.0, 1.0]), "manifest-damaged", "std"),
    (nested("views", "space", "all"), "manifest-damaged", "views.space is 'all'"),
    (nested("teacher", "num_features", True), "manifest-damaged", "teacher.num_features is True"),
    (lambda s: shutil.rmtree(s / "train/labels"), "cache-damaged", "train/labels/zarr.json"),
    (
        lambda s: (s / "train/fused_logits/zarr.json").write_text("[]"),
        "cache-damaged",
        "train/fused_logits",
    ),
    (
        forged(lambda s: (s / "train/fused_logits/zarr.json").write_text("[]")),
        "cache-damaged",
        "train/fused_logits",
    ),
    (
        lambda s: (s / "train/teacher_logits/c/1/0/0").unlink(),
        "cache-damaged",
        "1 of 3 chunks of train/teacher_logits",
    ),
    (lambda s: edit(s, lambda c: c, "test/labels/zarr.json"), "cache-damaged", "test/labels"),
]


@pytest.mark.parametrize(("damage", "code", "value"), DAMAGE)
def test_damaged_caches_are_refused(
    store: Path, tmp_path: Path, damage: Damage, code: str, value: str
) -> None:
    target = copy(store, tmp_path)
    damage(target)
    with refuses(code, target, value):
        richkd.open_cache(target)


def test_no_entry_of_a_manifest_can_be_missing_or_of_another_type(
    store: Path, tmp_path: Path
) -> None:
    """Whoever knows how to seal a store cannot make its reader stumble either."""
    target = copy(store, tmp_path)
    original: Any = read_manifest(target)

    def entries(table: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
        for name, value in table.items():
            yield (*above, name)
            if isinstance(value, dict):
                yield from entries(value, *above, name)

    refused, tried = 0, 0
    for *above, name in entries({**original, "recipe": {}, "versions": {}, "checksums": None}):
        for value in (GONE, None, True, -1, 2**70, 1e400, "", [], {}, [[]]):
            manifest = deepcopy(original)
            inner = functools.reduce(operator.getitem, above, manifest)
            del inner[name]
            inner |= {} if value is GONE else {name: value}
            write_sealed(open_location(target), manifest)
            tried += 1
            try:
                cache = richkd.open_cache(target)
                cache.slab(0)
                cache.fuse(1)
            except richkd.RichKDError:
                refused += 1
    print(f"{refused} of {tried} manifests refused")
    assert refused > 0.8 * tried


def test_a_flipped_byte_in_what_is_read_is_found(store: Path, tmp_path: Path) -> None:
    target = copy(store, tmp_path)
    chunk = target / "train/fused_logits/c/1/0/0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    cache = richkd.open_cache(target)
    cache.slab(0)
    with refuses("cache-damaged", "train/fused_logits", "richkd repair"):
        cache.slab(1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train/fused_logits", "train/teacher_logits"),
        ("train/fused_logits/c/0", "train/fused_logits/c/2"),
    ],
)
def test_chunks_in_the_place_of_others_are_found(
    store: Path, tmp_path: Path, one: str, other: str
) -> None:
    target = copy(store, tmp_path)
    (target / one).rename(target / "aside")
    (target / other).rename(target / one)
    (target / "aside").rename(target / other)
    cache = richkd.open_cache(target)
    cache.slab(1, ["teacher_features"])
    with refuses("cache-damaged", "_logits, view 0"):
        cache.slab(0)


@pytest.fixture
def manifest(store: Path) -> Any:
    return {**richkd.open_cache(store).manifest, "complete": False}


@pytest.fixture
def known(manifest: Any) -> dict[str, Any]:
    text = schema.array_specs(manifest)["text/embeddings"].shape
    return {
        "train/view_ids": np.zeros((3, 48), np.uint16),
        "text/embeddings": np.zeros(text, np.float32),
    }


@pytest.mark.parametrize(
    ("value", "code", "remedy"),
    [
        (float("nan"), "rows-not-finite", "weights"),
        (float("inf"), "rows-not-finite", "weights"),
        (1e6, "rows-overflow", "--dtype float32"),
    ],
)
def test_rows_that_f16_cannot_hold_stop_stage_one(
    manifest: Any, known: dict[str, Any], tmp_path: Path, value: float, code: str, remedy: str
) -> None:
    rows = torch.zeros(48, 15)
    rows[3, 2] = value
    with open_writer(Folder(tmp_path / "new.zarr"), manifest, known) as writer:
        block = next(b for b in writer.blocks if b.view == 1)
        with refuses(code, "teacher_logits of train view 1", remedy):
            writer.write(block, {"teacher_logits": rows})
    assert not any(writer.done)


def test_rows_of_zeros_are_chunks_like_others(
    manifest: Any, known: dict[str, Any], tmp_path: Path
) -> None:
    specs = schema.array_specs(manifest)
    with open_writer(Folder(tmp_path / "new.zarr"), manifest, known) as writer:
        for block in writer.blocks:
            rows = {}
            for name in schema.block_arrays(manifest, block):
                spec = specs[name]
                shape = (block.stop - block.start, *spec.shape[1 + (block.view is not None) :])
                rows[name.partition("/")[2]] = torch.from_numpy(np.zeros(shape, spec.dtype))
            writer.write(block, rows)
        writer.finish(0.0, 0.0, 0.0)
    cache = richkd.open_cache(tmp_path / "new.zarr")
    assert not cache.slab(2).fused_logits.any()  # type: ignore[union-attr]


def test_finish_needs_every_block(manifest: Any, known: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="before every block"),
        open_writer(Folder(tmp_path / "new.zarr"), manifest, known) as writer,
    ):
        writer.finish(0.5, None, None)


def test_blocks_cover_every_row_once() -> None:
    manifest: Any = {
        "dataset": {"num_train": 100, "num_test": 33},
        "views": {"count": 2},
        "block": 32,
        "teacher": {},
    }
    blocks = schema.blocks(manifest)
    seen = [(b.split, b.view, i) for b in blocks for i in range(b.start, b.stop)]
    wanted = {("test", None, i) for i in range(33)}
    wanted |= {("train", view, i) for view in (None, 0, 1) for i in range(100)}
    assert len(seen) == len(set(seen)) and set(seen) == wanted
    assert Block("train", 1, 0, 32).name == "train view 1 samples 0..31"


@pytest.mark.parametrize(
    ("widest", "dtype"), [(100, "float16"), (2048, "float32"), (10**6, "float16")]
)
def test_blocks_are_a_few_mib(widest: int, dtype: str) -> None:
    block = schema.choose_block(widest, dtype)
    size = block * widest * (2 if dtype == "float16" else 4)
    assert block & (block - 1) == 0
    assert size <= schema.CHUNK_BYTES or block == 16
    assert size > schema.CHUNK_BYTES / 2 or block in {schema.MAX_BLOCK, 16}


def test_rounded_bits_are_the_nearest_values(rng: np.random.Generator) -> None:
    for dtype, unsigned, mantissa in ((np.float16, np.uint16, 10), (np.float32, np.uint32, 23)):
        values = (rng.normal(size=(40, 7)) * 10).astype(dtype)
        assert round_bits(values, None) is values and round_bits(values, mantissa) is values
        for bits in (8, 5):
            rounded = round_bits(values, bits)
            assert rounded.dtype == dtype and rounded.shape == values.shape
            trailing = (1 << (mantissa - bits)) - 1
            assert (rounded.view(unsigned) & trailing == 0).all()
            relative = np.abs(rounded.astype(float) - values) / np.abs(values.astype(float))
            assert relative.max() <= 2.0 ** -(bits + 1)


def test_fewer_bits_make_a_smaller_store_of_nearly_the_same_rows(
    store: Path, make_store: Callable[..., Path]
) -> None:
    from richkd.tools.inspect import summarize

    coarse = make_store(keep_bits=6)
    exact, rounded = richkd.open_cache(store), richkd.open_cache(coarse)
    assert rounded.manifest["keep_bits"] == 6 and exact.manifest["keep_bits"] is None
    for name in (
        "train/teacher_logits",
        "train/teacher_features",
        "train/fused_logits",
        "train/clip_features",
        "test/teacher_logits",
    ):
        a, b = exact.read(name).float(), rounded.read(name).float()
        assert not torch.equal(a, b)
        assert ((a - b).abs() <= 2.0**-7 * a.abs() * 1.01).all()
    for name in ("train/labels", "train/view_ids", "train/clip_similarity"):
        assert torch.equal(exact.read(name), rounded.read(name))
    assert summarize(coarse)["stored_bytes"] < summarize(store)["stored_bytes"]

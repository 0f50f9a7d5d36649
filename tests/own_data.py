"""Writers of the same images as a folder, as Parquet, by save_to_disk and as WebDataset shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optional import load
from PIL import Image

CLASSES = ("cat", "polar_bear")
Samples = list[tuple[bytes, int]]  # encoded images and their labels
SPLITS = {"train": "train", "val": "validation"}  # folder: split of the table


def encoded(rng: np.random.Generator, kind: str = "JPEG", side: int | None = None) -> bytes:
    """Encode random pixels; of kind `rotated`, `transparent` and `deep`, ones that need more."""
    height, width = (side, side) if side else map(int, rng.integers(40, 90, 2))
    buffer = io.BytesIO()
    if kind == "deep":
        deep = rng.integers(0, 4096, (height, width)).astype(np.uint16)
        Image.fromarray(deep).save(buffer, "PNG")
        return buffer.getvalue()
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if kind == "transparent":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)))
    exif = Image.Exif()
    if kind == "rotated":
        exif[274] = 6
    format = {"rotated": "JPEG", "transparent": "PNG"}.get(kind, kind)
    image.save(buffer, format, exif=exif)
    return buffer.getvalue()


def drawn(
    rng: np.random.Generator,
    kinds: Sequence[str] = ("JPEG", "rotated", "transparent", "deep", "CMYK", "JPEG"),
    train: int = 12,
    val: int = 6,
    side: int | None = None,
) -> dict[str, Samples]:
    """Draw samples, class by class."""

    def one(kind: str) -> bytes:
        if kind != "CMYK":
            return encoded(rng, kind, side)
        buffer = io.BytesIO()
        Image.open(io.BytesIO(encoded(rng))).convert("CMYK").save(buffer, "JPEG")
        return buffer.getvalue()

    return {
        split: [
            (one(kinds[number % len(kinds)]), label)
            for label in range(len(CLASSES))
            for number in range(count // 2)
        ]
        for split, count in (("train", train), ("val", val))
    }


def suffix(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def write_folder(root: Path, data: Mapping[str, Samples]) -> str:
    for split, samples in data.items():
        for number, (image, label) in enumerate(samples):
            place = root / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04}.{suffix(image)}").write_bytes(image)
    return f"imagefolder:{root}"


def table(samples: Samples, features: Mapping[str, Any] | None = None, **columns: Any) -> Any:
    """Make a table of images and labels; `features` and columns replace or add some."""
    datasets = load("datasets")
    given = {
        "image": [{"bytes": image, "path": None} for image, _ in samples],
        "label": [label for _, label in samples],
        **columns,
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    kinds |= features or {}
    given = {name: column for name, column in given.items() if name in kinds}
    return datasets.Dataset.from_dict(given, features=datasets.Features(kinds))


def write_parquet(root: Path, data: Mapping[str, Samples]) -> str:
    (root / "data").mkdir(parents=True)
    for split, samples in data.items():
        table(samples).to_parquet(root / f"data/{SPLITS[split]}-00000-of-00001.parquet")
    return f"hf:{root}"


def write_saved(root: Path, tables: Mapping[str, Any]) -> str:
    load("datasets").DatasetDict(tables).save_to_disk(str(root))
    return f"hf:{root}"


def write_shards(
    root: Path, data: Mapping[str, Samples], index: str = "wids", most: int = 5
) -> str:
    """Write shards with webdataset's own writer, and an index of a kind."""
    writer = load("webdataset").ShardWriter
    info: dict[str, Any] = {"splits": {}}
    for split, samples in data.items():
        (root / split).mkdir(parents=True)
        with writer(str(root / split / "%05d.tar"), maxcount=most, verbose=0) as sink:
            for number, (image, label) in enumerate(samples):
                sink.write({"__key__": f"{number:06}", suffix(image): image, "cls": label})
        shards = sorted((root / split).glob("*.tar"))
        counts = [min(most, len(samples) - most * number) for number in range(len(shards))]
        names = [f"{split}/{shard.name}" for shard in shards]
        info["splits"][split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": counts,
            "num_samples": len(samples),
        }
        if index == "wids":
            listed = [{"url": s.name, "nsamples": n} for s, n in zip(shards, counts, strict=True)]
            content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
            (root / split / "index.json").write_text(json.dumps(content))
        elif index == "dali":
            for shard, count in zip(shards, counts, strict=True):
                lines = [f"v1.2 {count}", *["jpg 512 9 a.jpg cls 2048 1 a.cls"] * count]
                shard.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    if index == "timm":
        (root / "_info.json").write_text(json.dumps(info))
    (root / "classes.txt").write_text("cat\npolar bear\n")
    return f"wds:{root}"


def rewrite(shard: Path, change: Any) -> None:
    """Write a shard again with its members, name and content, as `change` returns them."""
    with tarfile.open(shard) as archive:
        members = [(each.name, archive.extractfile(each).read()) for each in archive]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as archive:
        for name, content in change(members):
            found = tarfile.TarInfo(name)
            found.size = len(content)
            archive.addfile(found, io.BytesIO(content))

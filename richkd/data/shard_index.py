"""Find WebDataset shards, how many samples an index gives each of them, and their splits.

Three kinds of index are read: that of wids (index.json), that of timm (_info.json), and that of
DALI's wds2idx beside every shard (NAME.idx).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from richkd.core.errors import RichKDError
from richkd.data.layouts import NAMES
from richkd.data.walk import listed

INDEX_REMEDY = (
    "write one with wids (widsindex create --output index.json *.tar) or with DALI's wds2idx"
)
_WORDS = {word: split for split, words in NAMES.items() for word in words}
_WIDS = "wids-shard-index-v1"


@dataclass(frozen=True)
class Shard:
    """A tar file, and what the index says of it."""

    path: str  # relative to the folder
    samples: int | None  # None without an index
    index: str  # the file that says so
    split: str  # the dataset's own name of its split; empty if unknown


def find_shards(folder: Path) -> dict[str, list[Shard]]:
    """Find the shards of a folder, by the dataset's own name of their split.

    The split is given by an index, by the folder in which a shard is, or by a word of its name.

    Raises:
        RichKDError: there are no shards, some lie in no split, or an index is damaged.
    """
    try:
        paths = sorted(
            str(path.relative_to(folder))
            for pattern in ("*.tar", "*/*.tar")
            for path in folder.glob(pattern)
            if not (path.name.startswith(".") or path.is_dir())
        )
        counts = _indexed(folder)
    except OSError as error:
        raise RichKDError(
            f"cannot read the folder {folder} ({error.strerror}); make it readable",
            code="folder-unreadable",
        ) from None
    if not paths:
        packed = [path.name for path in folder.rglob("*.tar.*")][:1]
        hint = f"; {packed[0]} is compressed: unpack it to a plain .tar first" if packed else ""
        raise RichKDError(
            f"wds:{folder} has no shards, neither {folder}/train/*.tar nor {folder}/train-*.tar"
            f"{hint or '; check the path'}",
            code="shards-missing",
        )
    found: dict[str, list[Shard]] = {}
    for path in paths:
        shard = counts.get(path) or Shard(path, *_dali(folder, path), "")
        split = shard.split or _split_of(path)
        if not split:
            raise RichKDError(
                f"{folder / path} belongs to no split; move it into {folder}/train, val or test, "
                f"or begin its name with train-, val- or test-",
                code="folder-layout",
            )
        if shard.samples is None:
            raise RichKDError(
                f"{folder / path} is in no index (index.json, _info.json, or "
                f"{Path(path).with_suffix('.idx').name}); {INDEX_REMEDY}",
                code="shards-without-index",
            )
        found.setdefault(split, []).append(shard)
    for path, shard in counts.items():
        if path not in paths and (shard.split or _split_of(path)) in found:
            raise RichKDError(
                f"{folder / shard.index} lists the shard {path}, which is not in {folder}; fetch "
                f"it, or write the index again",
                code="shards-missing",
            )
    return found


def _split_of(path: str) -> str:
    """Return the first word of a path that names a split; its folder counts before its name."""
    parts = path.removesuffix(".tar").split("/")
    for part in (*parts[:-1], *re.split(r"[^A-Za-z]+", parts[-1])):
        if part.lower() in _WORDS:
            return part
    return ""


def _dali(folder: Path, path: str) -> tuple[int | None, str]:
    """Return the number of samples by an index of wds2idx, and the name of the index."""
    name = str(Path(path).with_suffix(".idx"))
    try:
        with (folder / name).open(encoding="utf-8") as file:
            version, count = file.readline().split()
            if not version.startswith("v1.") or sum(1 for _ in file) != int(count):
                raise ValueError
            return int(count), name
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError):
        raise RichKDError(
            f"{folder / name} is damaged or not an index of wds2idx; write it again",
            code="shard-index-damaged",
        ) from None


def _indexed(folder: Path) -> dict[str, Shard]:
    """Return the shards in the indexes of wids and timm by their path."""
    found: dict[str, Shard] = {}
    files = sorted((*folder.glob("*.json"), *folder.glob("*/*.json")))
    for file in files:
        if file.name.startswith(".") or not file.is_file():
            continue
        index = str(file.relative_to(folder))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            shards = [*_listed(content, file.parent.relative_to(folder), index)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if file.stem not in ("index", "_info"):
                continue  # other notes
            raise RichKDError(
                f"{file} is damaged or not an index of shards ({error}); {INDEX_REMEDY}",
                code="shard-index-damaged",
            ) from None
        found |= {shard.path: shard for shard in shards if shard.path not in found}
    return found


def _listed(content: Any, where: Path, index: str) -> Iterator[Shard]:
    """Yield the shards of an index; `where` is its folder relative to that of the dataset."""
    if not isinstance(content, Mapping):
        raise TypeError("not an object")
    if "splits" in content:  # timm
        for name, each in content["splits"].items():
            for file, count in zip(each["filenames"], each["shard_lengths"], strict=True):
                yield Shard(str(where / file), _count(count), index, name)
    elif "shardlist" in content or content.get("__kind__") == _WIDS:
        for each in content["shardlist"]:
            url = str(each["url"])
            name = url.rsplit("/", 1)[-1] if "://" in url or url.startswith("/") else url
            yield Shard(str(where / name), _count(each["nsamples"]), index, "")
    elif Path(index).stem in ("index", "_info"):
        raise KeyError("shardlist")


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of samples")
    return value


def describe_index(shards: Mapping[str, list[Shard]]) -> str:
    """Describe which indexes were used."""
    names = sorted({shard.index for each in shards.values() for shard in each})
    count = sum(map(len, shards.values()))
    return f"{count:,} shard{'s' * (count != 1)}, indexed by {listed(names)}"

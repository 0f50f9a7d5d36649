"""List the samples of WebDataset shards: where each image lies in them, and its label.

A sample is a run of members of a tar file with one key. What was listed is kept in the user's home
folder until a shard changes.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from richkd.core.cpus import threads, usable_cpus
from richkd.core.errors import RichKDError
from richkd.core.files import atomic_write, home
from richkd.core.progress import Report
from richkd.data.decoding import SUFFIXES
from richkd.data.labels import Raw, Value
from richkd.data.shard_index import Shard
from richkd.data.sources import Paths
from richkd.data.walk import listed

_NAME = re.compile(
    r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL
)  # webdataset's: key, dot, extensions
_LABELS = ("cls", "label", "class", "target", "json", "txt")  # extensions, in order of preference
_JSON_LABELS = ("label", "cls", "class", "target", "label_name", "class_name")  # keys in JSON
_VERSION = 1  # increase it whenever a listing finds something else in the same shards


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    extension: str
    start: int
    size: int


@dataclass(frozen=True)
class Samples:
    """The samples of the shards of a split."""

    shards: Paths  # relative to the folder
    shard: NDArray[np.int64]  # [N], positions in shards
    spans: NDArray[np.int64]  # [N,2]: where an image begins, and its size
    members: Paths  # [N], names of the images in the shards
    raw: Raw


def version_of(folder: Path, shards: Iterable[str]) -> str:
    """Return a digest of the names, sizes and modification times of shards."""
    digest = hashlib.sha256()
    for shard in shards:
        found = (folder / shard).stat()
        digest.update(f"{shard}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def choose_members(path: Path, image: str, label: str) -> dict[str, str]:
    """Choose which members are images and labels, by the first sample of a shard.

    Args:
        path: of the shard.
        image: the extension of images; empty for any of a supported format.
        label: the extension of labels, or their key in the member with the extension json; empty
            to choose it.

    Returns:
        `image`, if it is given, and `label`: an extension, or json:KEY.

    Raises:
        RichKDError: there is no such member or key.
    """
    first = {member.extension: member for member in next(samples_of(path), [])}
    for setting, name in (("image_column", image), ("label_column", label)):
        in_json = setting == "label_column" and "json" in first
        if name and name not in first and not in_json:
            raise RichKDError(
                f"{setting} = {name!r}: the first sample in {path} has no such member, only "
                f"{listed([*first])}",
                code="column-missing",
            )
    if label and label not in first:
        label = f"json:{label}"
    label = label or next((name for name in _LABELS if name in first), "")
    if label.partition(":")[0] == "json":
        with path.open("rb") as file:
            content = _json(file, first["json"], path)
        keys = [label.partition(":")[2]] if ":" in label else _JSON_LABELS
        if isinstance(content, dict):
            key = next((key for key in keys if key in content), None)
            if key is None:
                raise RichKDError(
                    f"{first['json'].name} in {path} has no {' or '.join(keys)}, only "
                    f"{listed([*content])}; name the key of the label with --label-column",
                    code="column-no-labels",
                )
            label = f"json:{key}"
    if not label:
        raise RichKDError(
            f"the first sample in {path} has no label, only {listed([*first])}; add a member "
            f"KEY.cls with the number of the class, or name its extension with --label-column",
            code="column-no-labels",
        )
    return {**({"image": image} if image else {}), "label": label}


def list_samples(
    folder: Path, split: str, shards: Sequence[Shard], columns: Mapping[str, str], report: Report
) -> Samples:
    """List the samples of a split.

    Args:
        folder: of the dataset.
        split: the dataset's own name of it.
        shards: those of the split.
        columns: as `choose_members` returns them.
        report: shows the progress.

    Raises:
        RichKDError: a shard is damaged or has another number of samples than its index says, or a
            sample has no image or several, or a label that cannot be read.
    """
    names = [shard.path for shard in shards]
    place = hashlib.sha256(f"wds:{folder.resolve()}:{split}".encode()).hexdigest()
    note = home() / "listings" / f"{place[:32]}.npz"
    state = f"{_VERSION} {json.dumps(columns, sort_keys=True)} {version_of(folder, names)}"
    kept = _load(note, state, names)
    if kept is None:
        kept = _list(folder, names, columns, report)
        with suppress(OSError), atomic_write(note) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                state=state,
                shard=kept.shard,
                spans=kept.spans,
                text=kept.members.text,
                bounds=kept.members.bounds,
                codes=kept.raw.codes,
                values=json.dumps(kept.raw.values),
            )
    counts = np.bincount(kept.shard, minlength=len(names)).tolist()
    for shard, count in zip(shards, counts, strict=True):
        if count != shard.samples:
            raise RichKDError(
                f"{folder / shard.path} has {count:,} samples, but {shard.index} says "
                f"{shard.samples:,}; if the shard is complete, write the index again",
                code="shard-index-differs",
            )
    return kept


def _load(note: Path, state: str, names: Sequence[str]) -> Samples | None:
    """Load the listing of this state; return None if it is missing, foreign or damaged."""
    try:
        with note.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if saved["state"] != state:
                return None
            values = json.loads(str(saved["values"]))
            members = Paths(saved["text"], saved["bounds"])
            shard, spans, codes = saved["shard"], saved["spans"], saved["codes"]
    except Exception:  # numpy and zipfile raise errors of many kinds
        return None
    count = len(members)
    valid = (
        shard.shape == codes.shape == (count,)
        and spans.shape == members.bounds.shape == (count, 2)
        and all(each.dtype == np.int64 for each in (shard, spans, codes, members.bounds))
        and 0 <= shard.min(initial=0) <= shard.max(initial=0) < len(names)
        and -1 <= codes.min(initial=0) <= codes.max(initial=-1) < len(values)
    )
    if not valid:
        return None
    return Samples(Paths.of(names), shard, spans, members, Raw(tuple(values), codes))


def _list(
    folder: Path, names: Sequence[str], columns: Mapping[str, str], report: Report
) -> Samples:
    spans: list[tuple[int, int]] = []
    members: list[str] = []
    labels: list[Value | None] = []
    counts = []
    with (
        threads(usable_cpus()) as pool,
        report.track(f"listing the samples in {folder}", len(names), "shards") as tick,
    ):
        for images, own in pool.map(lambda name: _read(folder / name, columns), names):
            spans += [(image.start, image.size) for image in images]
            members += [image.name for image in images]
            labels += own
            counts.append(len(images))
            tick(1)
    place = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    codes = np.array([place[label] for label in labels], np.int64)
    return Samples(
        Paths.of(names),
        np.repeat(np.arange(len(names)), counts),
        np.array(spans, np.int64).reshape(-1, 2),
        Paths.of(members),
        Raw.of([*place], codes),
    )


def samples_of(path: Path) -> Iterator[list[Member]]:
    """Yield the members of each sample in a shard.

    Raises:
        RichKDError: it cannot be read, is no tar file, or ends too early.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            found = (_member(each) for each in archive if each.isreg())
            named = (each for each in found if each is not None)
            for _, members in groupby(named, lambda pair: pair[0]):
                yield [member for _, member in members]
    except OSError as error:
        raise RichKDError(
            f"{path} cannot be read ({error.strerror}); restore it", code="shard-damaged"
        ) from None
    except tarfile.TarError as error:
        what = "is compressed or no tar file" if "header" in str(error) else "ends too early"
        raise RichKDError(f"{path} {what} ({error}); restore it", code="shard-damaged") from None


def _member(found: tarfile.TarInfo) -> tuple[str, Member] | None:
    """Return a member and the key of its sample; None for what is no part of a sample."""
    match = _NAME.fullmatch(found.name)
    if match is None or match[1].rsplit("/", 1)[-1].startswith("__"):
        return None
    return match[1], Member(found.name, match[2].lower(), found.offset_data, found.size)


def _read(path: Path, columns: Mapping[str, str]) -> tuple[list[Member], list[Value | None]]:
    """Return the images in a shard and their labels."""
    images, labels = [], []
    label, _, key = columns["label"].partition(":")
    samples = [*samples_of(path)]
    with path.open("rb") as file:
        for members in samples:
            images.append(_image(members, columns.get("image", ""), path))
            own = next((member for member in members if member.extension == label), None)
            labels.append(None if own is None else _label(file, own, key, path))
    return images, labels


def _image(members: Sequence[Member], asked: str, path: Path) -> Member:
    """Return the image of a sample."""
    found = [
        member
        for member in members
        if (member.extension == asked if asked else Path(member.name).suffix.lower() in SUFFIXES)
    ]
    if len(found) == 1:
        return found[0]
    names = listed([member.name for member in found or members])
    if found:
        raise RichKDError(
            f"a sample in {path} has several images, {names}; choose one with --image-column",
            code="column-ambiguous",
        )
    raise RichKDError(
        f"a sample in {path} has no image, only {names}; name the extension of the images with "
        f"--image-column, or remove the sample",
        code="column-no-images",
    )


def _label(file: BinaryIO, member: Member, key: str, path: Path) -> Value | None:
    """Return the label in a member: an integer, or a text."""
    value: object
    if member.extension.endswith("json"):
        content = _json(file, member, path)
        value = content.get(key) if key and isinstance(content, dict) else content
    else:
        text = _text(file, member, path).strip()
        value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text or None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise RichKDError(
            f"{member.name} in {path}: the label {str(value)[:80]} is neither an integer nor a "
            f"text; choose another with --label-column",
            code="column-no-labels",
        )
    return value


def _json(file: BinaryIO, member: Member, path: Path) -> object:
    try:
        found: object = json.loads(_text(file, member, path))
        return found
    except (ValueError, RecursionError):  # the latter for lists in lists in lists
        raise RichKDError(
            f"{member.name} in {path} is not valid JSON; restore the shard", code="shard-damaged"
        ) from None


def _text(file: BinaryIO, member: Member, path: Path) -> str:
    file.seek(member.start)
    try:
        return file.read(member.size).decode()
    except UnicodeDecodeError:
        raise RichKDError(
            f"{member.name} in {path} holds no text, so it is no label; name another with "
            f"--label-column",
            code="column-no-labels",
        ) from None

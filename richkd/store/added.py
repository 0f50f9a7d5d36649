"""The teachers that were added to a cache, each a group below `teachers/`.

Such a group has a manifest, flags, checksums and a seal of its own, and holds only the rows of its
teacher. So adding one changes no byte of the cache or of another teacher, and everything that
writes, checks, repairs or reads a cache works for it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from richkd.core.choices import CNN_ROWS
from richkd.core.errors import RichKDError, nearest
from richkd.store import schema
from richkd.store.location import METADATA, Location
from richkd.store.locations import open_location
from richkd.store.schema import ADDED, TEACHER_NAME, Manifest

FIRST = ("cnn", "clip")  # names of the teachers that a cache was made with
RESERVED = (*FIRST, "teacher", "fused", "raw", "native", "auto")
# what the rows of an added teacher depend on, and have in common with the cache
_SHARED = ("class_names", "image_size", "views", "dtype")
_IMAGES = ("fingerprint", "num_train", "num_test", "num_validation")


def added_names(files: Iterable[str]) -> list[str]:
    """Return the names of a cache's added teachers, complete or not, from the cache's files."""
    parts = [file.split("/") for file in files if file.startswith(f"{ADDED}/")]
    return sorted(
        name for _, name, *rest in parts if rest == [METADATA] and TEACHER_NAME.fullmatch(name)
    )


def place_of(location: Location, name: str) -> Location:
    """Return the location of an added teacher."""
    return open_location(f"{location.name.rstrip('/')}/{ADDED}/{name}")


def array_of(split: str, row: str) -> str:
    """Return the array of a split's rows: of `NAME/rows` if an added teacher gave them."""
    teacher, added, own = row.rpartition("/")
    return f"{ADDED}/{teacher}/{split}/{own}" if added else f"{split}/{own}"


def is_complete(location: Location) -> bool:
    """Return whether an added teacher has all of its rows, as far as its manifest says."""
    try:
        attributes = json.loads(location.read(METADATA))["attributes"]
        return attributes.get("complete") is not False  # a damaged one is reported when it is read
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True


def remedy(location: Location) -> str:
    """Return what mends a damaged cache or added teacher."""
    return f"fix it with richkd repair, or {write_again(location)}"


def write_again(location: Location) -> str:
    """Return how a cache, or one of its added teachers, is written again."""
    path = PurePosixPath(location.name.rstrip("/"))
    if path.parent.name == ADDED and TEACHER_NAME.fullmatch(path.name):
        return (
            f"add the teacher again with richkd add-teacher --overwrite, or delete {location.name}"
        )
    return "write the cache again with richkd precompute --overwrite"


def check_new_name(name: str) -> None:
    """Raise RichKDError if a teacher must not have a name."""
    if not TEACHER_NAME.fullmatch(name) or name.lower() in RESERVED:
        raise RichKDError(
            f"--name {name!r}: must be up to 40 letters, digits, - and _, and not "
            f"{', '.join(RESERVED[:-1])} or {RESERVED[-1]}",
            code="teacher-name",
        )


def unknown_teacher(location: Location, name: str, known: Iterable[str]) -> RichKDError:
    """Return the error for a teacher that a cache does not have."""
    hint = nearest(name, list(known))
    return RichKDError(
        f"{location} has no teacher {name!r}; {hint}; richkd add-teacher adds one",
        code="unknown-teacher",
    )


def belongs(addition: Manifest, cache: Manifest) -> str | None:
    """Return the first thing by which an added teacher is of other images or views, or None."""
    for name in _SHARED:
        if addition[name] != cache[name]:  # type: ignore[literal-required]
            return name
    mine, theirs = addition["dataset"], cache["dataset"]
    return next((f"dataset.{name}" for name in _IMAGES if mine.get(name) != theirs.get(name)), None)


def shared_part(cache: Manifest, *, rows: bool) -> Mapping[str, Any]:
    """Return what an added teacher's manifest takes over from the cache's.

    Args:
        cache: the manifest of the cache.
        rows: the teacher has a row a view, of which only the largest logits may be kept.
    """
    shared = {"format", "schema", "dataset", "mean", "std", "keep_bits", "rows", *_SHARED}
    if rows:
        shared |= {"keep", "keep_temperature"}
    part: dict[str, Any] = {name: value for name, value in cache.items() if name in shared}
    if rows and "rows" in part:  # it has no blend of its own
        part["rows"] = [name for name in part["rows"] if name in CNN_ROWS]
    return part


def is_added_file(file: str) -> bool:
    """Return whether a file of a cache belongs to its added teachers, or to one half-written."""
    top, _, rest = file.partition("/")
    name, _, inner = rest.partition("/")
    if top != ADDED or not rest:
        return False
    name = name.removeprefix(".").removesuffix(".new").removesuffix(".old").removesuffix(".lock")
    if name == METADATA and not inner:
        return True
    if not TEACHER_NAME.fullmatch(name):
        return False
    array, is_chunk, chunk = inner.rpartition("/c/")
    if is_chunk:
        return set(chunk) <= set("0123456789/") and _is_array(array)
    return not inner or inner == METADATA or _is_array(inner.removesuffix(f"/{METADATA}"))


def _is_array(name: str) -> bool:
    return name == "complete" or name.partition("/")[0] in (*schema.SPLITS, "text", "probe")

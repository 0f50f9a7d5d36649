"""Decide what a new cache may replace: only another cache, and only with `overwrite`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, cast

from richkd.core.errors import RichKDError
from richkd.core.files import is_temporary
from richkd.store import schema
from richkd.store.added import is_added_file
from richkd.store.location import METADATA, Location
from richkd.store.schema import SPLITS, Manifest


def check_target(location: Location, overwrite: bool) -> Mapping[str, Any] | None:
    """Return the manifest of the cache at a location; None if a new one may be created there.

    Raises:
        RichKDError: the location holds something that must not be replaced.
    """
    if not location.exists:
        if location.vacant:
            return None
        raise _not_a_cache(location)
    try:
        attributes = dict(json.loads(location.read(METADATA))["attributes"])
    except (ValueError, TypeError, KeyError):  # not a readable group
        attributes = {}
    if attributes.get("format") != schema.FORMAT:
        raise _not_a_cache(location)
    if not overwrite:
        return attributes
    own = files_of_a_cache(attributes)
    foreign = sorted(file for file in location.sizes() if not own(file))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise RichKDError(
            f"{location} contains files that are not part of the cache ({foreign[0]}{more}); move "
            f"them away, or choose another --out",
            code="foreign-file",
        )
    return None


def _not_a_cache(location: Location) -> RichKDError:
    return RichKDError(
        f"{location} exists and is not a richkd cache; choose another --out", code="foreign-file"
    )


def files_of_a_cache(attributes: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that tells whether richkd wrote a file, given its name in the cache.

    Names are compared with the arrays of the manifest if it is sound, else with all known names.
    """
    arrays: set[str] | None = None
    if schema.manifest_fault(attributes) is None:
        specs = schema.array_specs(cast(Manifest, attributes))
        arrays = {"", *specs, *(name.partition("/")[0] for name in specs)}

    def own(file: str) -> bool:
        array, is_chunk, chunk = file.rpartition("/c/")
        if is_temporary(PurePosixPath(file)) or is_added_file(file):
            return True
        if not is_chunk:
            array, _, name = file.rpartition("/")
            if name != METADATA:
                return False
        elif not set(chunk) <= set("0123456789/"):
            return False
        if arrays is None:
            return array in ("", "complete") or array.partition("/")[0] in (
                *SPLITS,
                "text",
                "probe",
            )
        return array in arrays

    return own

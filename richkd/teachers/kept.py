"""Whole arrays of a cache to resume or repair, which need not be computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import zarr
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.store import schema
from richkd.store.checksums import chunk_files, chunks_digest, is_intact
from richkd.store.location import Location
from richkd.store.schema import Manifest


def known_manifest(manifest: Mapping[str, Any] | None) -> Manifest | None:
    """Return the manifest of a cache to resume or repair, unless it is damaged."""
    if manifest is None or schema.manifest_fault(manifest) is not None:
        return None
    return cast(Manifest, manifest)


def kept_arrays(
    location: Location, manifest: Manifest, names: Sequence[str]
) -> list[Tensor] | None:
    """Return arrays of a cache, or None unless all their chunks are there and intact.

    In a complete cache, they must be those that it was sealed with.
    """
    specs, checksums = schema.array_specs(manifest), manifest["checksums"]
    for name in names:
        if not all(is_intact(location, file) for file in chunk_files(name, specs[name])):
            return None
        if checksums and checksums["chunks"][name] != [chunks_digest(location, name, specs[name])]:
            return None
    try:
        with location.explained("read"):
            group = zarr.open_group(location.zarr(read_only=True), mode="r", use_consolidated=False)
            found = [np.asarray(group[name][...]) for name in names]  # type: ignore[index]
    except RichKDError:
        raise
    except Exception:  # metadata may be damaged in any way
        return None
    expected = [(specs[name].shape, specs[name].dtype) for name in names]
    if [(each.shape, str(each.dtype)) for each in found] != expected:
        return None
    return [torch.from_numpy(each) for each in found]

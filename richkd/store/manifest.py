"""The manifest of a store, read and checked: all that can be known without its arrays.

That takes no PyTorch, so it is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from richkd.core.errors import RichKDError
from richkd.store import schema
from richkd.store.checksums import metadata_digest, metadata_files, num_digests, sealed
from richkd.store.copy import LocalCopy, open_copy
from richkd.store.folder import Folder
from richkd.store.location import Location
from richkd.store.locations import open_location
from richkd.store.schema import Manifest

if TYPE_CHECKING:
    import zarr

REMEDY = "mend it with richkd repair, or make it again with richkd precompute --overwrite"


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a store, complete or not.

    Raises:
        RichKDError: nothing there, not a richkd store, or of another schema.
    """
    copy = copy_of(open_location(path))
    return check_manifest(copy.location, dict(_open_group(copy).attrs))


def copy_of(place: Location) -> LocalCopy:
    """What `open_copy` gives; RichKDError where nothing is there."""
    try:
        if place.exists:
            return open_copy(place)
    except FileNotFoundError:
        pass
    if isinstance(place, Folder) and place.path.exists():
        raise RichKDError(
            f"{place} is no richkd store that can be read (no zarr.json in it)", code="not-a-cache"
        )
    raise RichKDError(
        f"no store at {place}; make one: richkd precompute --out {place}", code="cache-missing"
    )


def open_store(copy: LocalCopy) -> tuple[zarr.Group, Manifest]:
    """The group and the manifest of a complete store; errors as of `open_cache`."""
    group = _open_group(copy)
    manifest = check_manifest(copy.location, dict(group.attrs))
    if not manifest["complete"]:
        raise RichKDError(
            f"{copy.location} is incomplete: stage one was cut off; run the same richkd precompute "
            f"command again, it goes on where it stopped",
            code="cache-incomplete",
        )
    return group, manifest


def check_sealed(copy: LocalCopy, manifest: Manifest) -> None:
    """Raise RichKDError where the manifest or another metadata file was changed."""
    checksums, here = manifest["checksums"], Folder(copy.path)
    specs = schema.array_specs(manifest)
    digests = {name: num_digests(spec) for name, spec in specs.items()}
    if (
        not sealed(here)
        or checksums is None
        or {name: len(each) for name, each in checksums["chunks"].items()} != digests
    ):
        raise RichKDError(
            f"{copy.location}: the manifest is not what was sealed (zarr.json was changed); make "
            f"the store again with richkd precompute --overwrite",
            code="cache-unsealed",
        )
    files = metadata_files(specs)
    copy.fetch(files)

    def right(file: str) -> bool:
        try:
            return metadata_digest(here, file) == checksums["metadata"].get(file)
        except OSError:
            return False

    for file in files:
        if right(file):
            continue
        if copy.drop([file]):
            copy.fetch([file])  # once more: what was kept here may have been damaged here
        if not right(file):
            raise RichKDError(
                f"{copy.location}: {file} is missing or was changed; {REMEDY}", code="cache-damaged"
            )


def _open_group(copy: LocalCopy) -> zarr.Group:
    import zarr

    try:
        return zarr.open_group(copy.path, mode="r", use_consolidated=False)
    except Exception as error:  # not a group, damaged JSON, no permission, …
        reason = f"{type(error).__name__}: {error}"
        raise RichKDError(
            f"{copy.location} is no richkd store that can be read ({reason})", code="not-a-cache"
        ) from None


def check_manifest(place: Location, attributes: Mapping[str, Any]) -> Manifest:
    """The attributes of a group as a manifest; RichKDError where they are none that is sound."""
    if attributes.get("format") != schema.FORMAT:
        raise RichKDError(
            f"{place} is a Zarr group but no richkd store; richkd precompute makes one",
            code="not-a-cache",
        )
    if attributes.get("schema") != schema.SCHEMA:
        raise RichKDError(
            f"{place} has schema {attributes.get('schema')!r}, this richkd reads "
            f"{schema.SCHEMA}; make the store again with richkd precompute --overwrite",
            code="cache-schema",
        )
    fault = schema.manifest_fault(attributes)
    if fault is not None:
        raise RichKDError(
            f"{place}: the manifest is damaged ({fault}); make the store again with richkd "
            f"precompute --overwrite",
            code="manifest-damaged",
        )
    return cast(Manifest, dict(attributes))

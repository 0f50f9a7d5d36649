"""Read and check the manifest of a cache, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from richkd.core.errors import RichKDError
from richkd.store import schema
from richkd.store.added import remedy, write_again
from richkd.store.checksums import metadata_digest, metadata_files, num_digests, sealed
from richkd.store.copy import LocalCopy, open_copy
from richkd.store.folder import Folder
from richkd.store.location import Location
from richkd.store.locations import open_location
from richkd.store.schema import Manifest

if TYPE_CHECKING:
    import zarr


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of a cache, complete or not.

    Raises:
        RichKDError: there is nothing, not a richkd cache, or one of another schema.
    """
    copy = copy_of(open_location(path))
    return check_manifest(copy.location, dict(_open_group(copy).attrs))


def copy_of(location: Location) -> LocalCopy:
    """Return a cache's copy on this disk; raise RichKDError if there is no cache."""
    try:
        if location.exists:
            return open_copy(location)
    except FileNotFoundError:
        pass
    if isinstance(location, Folder) and location.path.exists():
        raise RichKDError(
            f"{location} is not a richkd cache: it has no zarr.json; check the path",
            code="not-a-cache",
        )
    raise RichKDError(
        f"no cache at {location}; create it: richkd precompute --out {location}",
        code="cache-missing",
    )


def open_store(copy: LocalCopy) -> tuple[zarr.Group, Manifest]:
    """Return the group and the manifest of a complete cache; raise as `open_cache`."""
    group = _open_group(copy)
    manifest = check_manifest(copy.location, dict(group.attrs))
    if not manifest["complete"]:
        what, command = "cache", "precompute"
        if "addition" in manifest:
            what, command = f"teacher {manifest['addition']}", "add-teacher"
        raise RichKDError(
            f"the {what} at {copy.location} is incomplete: {command} was interrupted; run the same "
            f"richkd {command} command again to resume it",
            code="cache-incomplete",
        )
    return group, manifest


def check_sealed(copy: LocalCopy, manifest: Manifest) -> None:
    """Raise RichKDError if the manifest or another metadata file was changed."""
    checksums, here = manifest["checksums"], Folder(copy.path)
    specs = schema.array_specs(manifest)
    digests = {name: num_digests(spec) for name, spec in specs.items()}
    if (
        not sealed(here)
        or checksums is None
        or {name: len(each) for name, each in checksums["chunks"].items()} != digests
    ):
        raise RichKDError(
            f"{copy.location}: the manifest does not match its seal (zarr.json was changed); "
            f"{write_again(copy.location)}",
            code="cache-unsealed",
        )
    files = metadata_files(specs)
    copy.fetch(files)

    def good(file: str) -> bool:
        try:
            return metadata_digest(here, file) == checksums["metadata"].get(file)
        except OSError:
            return False

    for file in files:
        if good(file):
            continue
        if copy.drop([file]):
            copy.fetch([file])  # once more: only the copy may be damaged
        if not good(file):
            raise RichKDError(
                f"{copy.location}: {file} is missing or was changed; {remedy(copy.location)}",
                code="cache-damaged",
            )


def _open_group(copy: LocalCopy) -> zarr.Group:
    import zarr

    try:
        return zarr.open_group(copy.path, mode="r", use_consolidated=False)
    except Exception as error:  # not a group, damaged JSON, no permission, …
        reason = f"{type(error).__name__}: {error}"
        raise RichKDError(
            f"{copy.location} is not a readable richkd cache ({reason}); check the path",
            code="not-a-cache",
        ) from None


def check_manifest(location: Location, attributes: Mapping[str, Any]) -> Manifest:
    """Return the attributes of a group as a manifest; raise RichKDError if it is not sound."""
    if attributes.get("format") != schema.FORMAT:
        raise RichKDError(
            f"{location} is a Zarr group, but not a richkd cache; richkd precompute creates one",
            code="not-a-cache",
        )
    if attributes.get("schema") != schema.SCHEMA:
        raise RichKDError(
            f"{location} has schema {attributes.get('schema')!r}, but this version of richkd "
            f"reads {schema.SCHEMA}; {write_again(location)}",
            code="cache-schema",
        )
    fault = schema.manifest_fault(attributes)
    if fault is not None:
        raise RichKDError(
            f"{location}: the manifest is damaged ({fault}); {write_again(location)}",
            code="manifest-damaged",
        )
    return cast(Manifest, dict(attributes))

"""Open a location: a path or a URL becomes a folder, a bucket or a repository."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from richkd.core.errors import RichKDError, unknown
from richkd.store.folder import Folder
from richkd.store.location import Location

SCHEMES = ("s3", "gs", "az", "hf")


def open_location(name: str | Path) -> Location:
    """Return the location of a path or a URL.

    Raises:
        RichKDError: the URL is of an unknown kind, or the package that reads it is missing.
    """
    scheme, separator, rest = str(name).partition("://")
    if not separator:
        return Folder(Path(name))
    if scheme not in SCHEMES:
        raise unknown("kind of URL:", str(name), [f"{scheme}://" for scheme in SCHEMES])
    parts = rest.rstrip("/").split("/")
    if len(parts) < 2 or {"", ".", ".."} & {*parts} or set("#?%*\\") & {*rest}:
        raise RichKDError(
            f"{name}: must be {scheme}://BUCKET/PATH.zarr, with plain names", code="url-malformed"
        )
    if scheme == "hf":
        from richkd.store.hf import Hub

        return Hub(str(name))
    if find_spec("obstore") is None:
        raise RichKDError(
            f"{name}: caches in object storage need obstore; pip install 'richkd[cloud]'",
            code="extra-missing",
        )
    from richkd.store.bucket import Bucket

    return Bucket(str(name))

"""A cache in a dataset repository of the Hugging Face hub: hf://datasets/OWNER/NAME[@REVISION].

Files are read through HfFileSystem rather than `hf_hub_download`, which would ask twice for every
chunk, could not read the end of a file alone, and would keep a second copy beside richkd's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from richkd.core.errors import RichKDError, first_line
from richkd.store.location import AT_ONCE, Location

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Hub(Location):
    """A read-only cache on the Hugging Face hub: hf://datasets/OWNER/NAME[/PATH]."""

    durable = True
    at_once = AT_ONCE

    def __init__(self, url: str) -> None:
        self._name = url

    @property
    def name(self) -> str:
        return self._name

    @cached_property
    def _files(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT") or None)

    @property
    def _root(self) -> str:
        return self.name.removeprefix("hf://").rstrip("/")

    def zarr(self, *, read_only: bool) -> Store:
        from zarr.storage import FsspecStore

        return FsspecStore(self._files, path=self._root, read_only=read_only)

    def read(self, file: str) -> bytes:
        with self.explained("read"):
            return bytes(self._files.cat_file(f"{self._root}/{file}"))

    def tail(self, file: str, count: int) -> bytes:
        with self.explained("read"):
            return bytes(self._files.cat_file(f"{self._root}/{file}", start=-count))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self.explained("read"):
            where = self._files.resolve_path(f"{self._root}/{prefix}")
            root = self._files.resolve_path(self._root).path_in_repo
            entries = HfApi(endpoint=self._files.endpoint).list_repo_tree(
                where.repo_id,
                where.path_in_repo or None,
                recursive=True,
                revision=where.revision,
                repo_type=where.repo_type,
            )
            return {
                entry.path.removeprefix(root).lstrip("/"): entry.size
                for entry in entries
                if isinstance(entry, RepoFile)
            }

    @contextmanager
    def explained(self, do: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # of the hub, of its HTTP library, of fsspec
            raise RichKDError(
                f"cannot {do} {self.name}: {first_line(error)}; check the network, the name and "
                f"HF_TOKEN",
                code="location-failed",
            ) from None

    def write(self, file: str, content: bytes) -> None:
        raise self._read_only

    def delete(self, file: str) -> None:
        raise self._read_only

    def create(self, content: Mapping[str, bytes]) -> None:
        raise self._read_only

    def check_writable(self) -> None:
        raise self._read_only

    def locked(self) -> AbstractContextManager[None]:
        raise self._read_only

    def check_unlocked(self) -> None:
        """Do nothing: nobody writes here."""

    def check_still_locked(self) -> None:
        """Do nothing: nobody writes here."""

    def remove_temporary(self) -> None:
        """Do nothing: nobody writes here."""

    @property
    def _read_only(self) -> RichKDError:
        repo = self._root.removeprefix("datasets/")
        return RichKDError(
            f"{self.name}: caches on the hub cannot be written file by file; write one to a local "
            f"path and upload it with richkd push CACHE {repo}",
            code="location-read-only",
        )

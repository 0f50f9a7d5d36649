"""Retry requests where obstore does not: after a truncated or damaged body."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from obstore.exceptions import GenericError
from zarr.storage import ObjectStore

from richkd.store.checksums import intact
from richkd.store.location import ATTEMPTS, PATIENCE_S

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


T = TypeVar("T")


def again(request: Callable[[], T], patience: float = PATIENCE_S) -> T:
    """Return the result of a request, which is repeated after errors that came quickly."""
    end = time.monotonic() + patience
    for _ in range(ATTEMPTS - 1):
        try:
            return request()
        except GenericError:
            if time.monotonic() > end:  # obstore has retried for long enough
                raise
    return request()


class PatientStore(ObjectStore[Any]):
    """A store that repeats reads until a chunk's checksum is right.

    obstore itself retries only until a response begins.
    """

    patience = PATIENCE_S

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        end = time.monotonic() + self.patience
        for _ in range(ATTEMPTS - 1):
            try:
                found = await super().get(key, prototype, byte_range)
            except GenericError:
                if time.monotonic() > end:
                    raise
                continue
            if found is None or "/c/" not in key or byte_range or intact(found.to_bytes()):
                return found
        return await super().get(key, prototype, byte_range)

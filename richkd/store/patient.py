"""Asking obstore again where it gives up at once: after a body cut short or damaged on its way."""

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


def again(request: Callable[[], T]) -> T:
    """What a request gives, asked for again after errors that came soon."""
    patience = time.monotonic() + PATIENCE_S
    for _ in range(ATTEMPTS - 1):
        try:
            return request()
        except GenericError:
            if time.monotonic() > patience:  # obstore did not give up at once
                raise
    return request()


class PatientStore(ObjectStore[Any]):
    """obstore tries again by itself until an answer begins; this, until it is right."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As of every store of zarr's."""
        patience = time.monotonic() + PATIENCE_S
        for _ in range(ATTEMPTS - 1):
            try:
                found = await super().get(key, prototype, byte_range)
            except GenericError:
                if time.monotonic() > patience:
                    raise
                continue
            if found is None or "/c/" not in key or byte_range or intact(found.to_bytes()):
                return found
        return await super().get(key, prototype, byte_range)

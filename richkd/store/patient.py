"""zarr's store over obstore, to which a body cut short or damaged on its way is no error."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from obstore.exceptions import GenericError
from zarr.storage import ObjectStore

from richkd.store.checksums import whole
from richkd.store.place import ATTEMPTS, PATIENCE_S

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


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
            if found is None or "/c/" not in key or byte_range or whole(found.to_bytes()):
                return found
        return await super().get(key, prototype, byte_range)

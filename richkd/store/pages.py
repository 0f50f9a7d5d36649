"""Memory for arrays that are read from a cache: anonymous pages, or pages of a temporary file.

Arrays larger than memory are placed in a temporary file that is mapped into memory. They are read
and indexed like any other, and the system pages them out and in as needed.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from richkd.core.errors import RichKDError
from richkd.core.files import home
from richkd.core.memory import available_memory
from richkd.core.progress import size


def beyond_memory(count: int, available: int | None = None) -> bool:
    """Return whether twice as many bytes exceed half of the available memory (None: measure it)."""
    return 2 * count > (available_memory() if available is None else available) / 2


def empty(
    shape: tuple[int, ...], dtype: np.dtype[Any], on_disk: bool | None = None
) -> np.ndarray[Any, Any]:
    """Return an array whose memory returns to the system once it is freed.

    Args:
        shape: of the array.
        dtype: of the array.
        on_disk: whether it is placed in a temporary file; None decides by `beyond_memory`.

    Raises:
        RichKDError: it belongs on disk, and no folder has room for it.
    """
    count = math.prod(shape)
    length = max(count * dtype.itemsize, 1)
    if on_disk is None:
        on_disk = beyond_memory(length)
    if on_disk:
        pages = _mapped_file(length)
    elif sys.platform == "win32":
        pages = mmap.mmap(-1, length)
    else:
        pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _mapped_file(length: int) -> mmap.mmap:
    """Map a file without a name, with its blocks reserved; it is gone with the last array in it."""
    refusals = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if shutil.disk_usage(folder).free < length:
                    raise OSError(f"{size(shutil.disk_usage(folder).free)} are free")
                if hasattr(os, "posix_fallocate"):  # a full disk would kill the process later
                    os.posix_fallocate(file.fileno(), 0, length)
                else:
                    file.truncate(length)
                return mmap.mmap(file.fileno(), length)
        except OSError as error:
            refusals.append(f"{folder} ({error.strerror or error})")
    raise RichKDError(
        f"an array of {size(length)} does not fit in memory, and there is no room for it in "
        f"{' or '.join(refusals)}; free some space, or set TMPDIR to a folder on a larger disk",
        code="disk-too-small",
    )


def _folders() -> list[Path]:
    """Return TMPDIR if it is set, and the user's cache folder; /tmp is often in memory itself."""
    given = os.environ.get("TMPDIR")
    return [*([Path(given)] if given else []), home()]

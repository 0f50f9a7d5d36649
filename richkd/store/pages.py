"""Memory for what is read from a store: pages of the machine's, or of a file on its disk.

Rows larger than memory lie in a temporary file that is mapped into memory: they are read and
indexed like any other, and the system writes pages out and reads them back as it sees fit.
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


def beyond_memory(count: int) -> bool:
    """Whether two times so many bytes are more than half of the memory that is available."""
    return 2 * count > available_memory() / 2


def empty(
    shape: tuple[int, ...], dtype: np.dtype[Any], on_disk: bool | None = None
) -> np.ndarray[Any, Any]:
    """An array whose memory goes back to the system when it is freed, whatever malloc keeps.

    `on_disk` None: where it is beyond memory.

    Raises:
        RichKDError: it is to lie on the disk, and no folder for it has room.
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
    """A file without a name, gone with the last array in it, whose blocks are reserved already."""
    refusals = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if shutil.disk_usage(folder).free < length:
                    raise OSError(f"{size(shutil.disk_usage(folder).free)} are free")
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
                    os.posix_fallocate(file.fileno(), 0, length)
                else:
                    file.truncate(length)
                return mmap.mmap(file.fileno(), length)
        except OSError as error:
            refusals.append(f"{folder} ({error.strerror or error})")
    raise RichKDError(
        f"rows of {size(length)} are more than memory holds, and there is no room for them in "
        f"{' or '.join(refusals)}; make room, or set TMPDIR to a folder on a disk that has it",
        code="disk-too-small",
    )


def _folders() -> list[Path]:
    """TMPDIR where it is set; /tmp is often memory itself, the user's cache folder is not."""
    given = os.environ.get("TMPDIR")
    return [*([Path(given)] if given else []), home()]

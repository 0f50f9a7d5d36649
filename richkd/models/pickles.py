"""What a file of `torch.save` may contain besides tensors: plain values, and no code.

Checkpoints also hold arguments, paths, times and an accuracy. torch's own reader refuses every
class and function that is not named here, and these only hold data. NumPy's are read by stand-ins:
its own can be made to treat bytes as pointers.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
import types
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

# numbers and text of a fixed width; not objects, records or dates
_PLAIN = re.compile(r"[<>|=]?([biufcSU][0-9]{1,9}|[?bBhHiIlLqQefdFD])")


class _DType:
    """Stand in for numpy.dtype."""

    def __init__(self, kind: object, *_: object) -> None:
        if not isinstance(kind, str) or _PLAIN.fullmatch(kind) is None:
            raise pickle.UnpicklingError(f"array for 'numpy.dtype.{kind}'")
        self.plain = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):  # all else follows from the kind
            self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """Stand in for numpy.ndarray, and for the function that pickles call to make one."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("array for 'numpy.ndarray'")
        plain: Any = (1, shape, dtype.plain, bool(fortran), data)
        super().__setstate__(plain)


def _scalar(dtype: _DType, data: bytes) -> Any:
    """Stand in for the function that pickles call to make a NumPy scalar."""
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("scalar for 'numpy.generic'")
    return np.frombuffer(data, dtype.plain, count=1)[0]


def _plain_dict(_: object = None) -> dict[Any, Any]:
    """Stand in for a defaultdict, without the factory that it would call for missing keys."""
    return {}


def _plain_list(items: Iterable[Any] = (), _: object = None) -> list[Any]:
    """Stand in for a deque."""
    return [*items]


HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *(
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for stand_in, name in ((_scalar, "scalar"), (_Array, "_reconstruct"))
    ),
    (_plain_dict, "collections.defaultdict"),
    (_plain_list, "collections.deque"),
    list,
    dict,
    set,
    frozenset,
    int,
    float,
    str,
    range,
    slice,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    TorchVersion,
    *(
        (pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
]


def foreign(path: Path, reason: str) -> str:
    """Return the names of the classes and functions that a `torch.save` file must not load.

    Args:
        path: the file.
        reason: the message of the error that reading it raised.
    """
    names: list[str] = []
    with suppress(Exception), torch.serialization.safe_globals(HARMLESS):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    names = sorted(names, key=lambda name: (name.startswith("torch."), name))
    if not names:  # the format before PyTorch 1.6
        names = re.findall(r"(?:GLOBAL|class|for) '?([A-Za-z_]\w*(?:\.\w+)+)", reason)[:1]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "a pickle that torch.save did not write"

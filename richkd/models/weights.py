"""Reading and writing weights. Nothing here ever runs code from a file."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from richkd.errors import RichKDError
from richkd.files import replacing

_SHA256 = "richkd-sha256"

# What the published checkpoints hold besides tensors: their arguments and an accuracy. These
# are plain containers of data; every other class in a file is refused.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS = [
    argparse.Namespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64")),
]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a file of `torch.save`, bare or under a usual key.

    `{"model": …}` (RepDistiller, mdistiller) and `{"state_dict": …}` are unwrapped, and a
    `module.` before every name is dropped.

    Raises:
        RichKDError: no such file, not a file of weights, or one with pickled code.
    """
    if not path.is_file():
        raise RichKDError(f"no weights at {path}")
    content: Any = (
        read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_pickle(path)
    )
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise RichKDError(f"{path} holds no state dict")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise RichKDError(f"{path} holds no state dict: not all of its entries are tensors")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; RichKDError where it is damaged.

    The format has no checksum; files of richkd's own carry one in their metadata.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RichKDError(f"{path} is damaged or no safetensors file: {error}") from None
    if note.get(_SHA256, "") not in ("", tensors_sha256(tensors)):
        raise RichKDError(f"{path} is damaged: its tensors are not those that were written")
    return tensors, note


def read_note(path: Path) -> dict[str, str]:
    """The metadata of a file, without its tensors; RichKDError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RichKDError(f"{path} is damaged or no safetensors file: {error}") from None


def _read_pickle(path: Path) -> object:
    try:
        with (
            torch.serialization.safe_globals(_HARMLESS),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # about pickles that are refused anyway
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:120]
        raise RichKDError(
            f"refused to read {path}: it holds more than tensors, which could run code "
            f"({reason}); save its state_dict() as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RichKDError(f"{path} is damaged or no file of weights: {error}") from None


def load_into(model: nn.Module, weights: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Load strictly, or say what differs in one line.

    Raises:
        RichKDError: keys or shapes differ from the model's.
    """
    own = model.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or extra:
        example = min(missing or extra)
        raise RichKDError(
            f"{path} is of another architecture than {name}: {len(missing)} entries missing, "
            f"{len(extra)} unexpected, e.g. {example!r}"
        )
    for key, tensor in own.items():
        if weights[key].shape != tensor.shape:
            raise RichKDError(
                f"{path} does not fit {name}: {key} is {tuple(weights[key].shape)}, the model's "
                f"is {tuple(tensor.shape)} (another number of classes, width or image size?)"
            )
    model.load_state_dict(dict(weights))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(model: nn.Module) -> str:
    """The SHA-256 of a model's state dict, wherever that came from."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors whole or not at all; OSError where there is no room."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    note = {**(metadata or {}), _SHA256: tensors_sha256(plain)}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, note)
        except SafetensorError as error:  # the library's name for the system's errors
            raise OSError(f"cannot write {path}: {error}") from None

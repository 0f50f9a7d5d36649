"""Reading and writing weights. Nothing here ever runs code from a file.

A file of weights is read in two steps: `read_weights` gives what the file holds, and `load_into`
finds the network's state dict in it, whatever trainers have wrapped around that.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from richkd.core.errors import RichKDError, first_line
from richkd.core.files import atomic_write

_SHA256 = "richkd-sha256"
Content = Mapping[str, Any]

# What checkpoints hold besides tensors: arguments, paths, times, an accuracy. These are plain
# containers of data; every other class in a file is refused.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]


def _plain_dict(_: object = None) -> dict[Any, Any]:
    """What a defaultdict is read as, whatever it makes of missing keys."""
    return {}


_HARMLESS = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?efdbhilqBHILQ"},
    (_plain_dict, "collections.defaultdict"),
    list,
    dict,
    set,
    int,
    float,
    str,
    datetime.datetime,
    datetime.timedelta,
    TorchVersion,
    *(
        (pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
]

# The beginnings of files that are taken for weights, and what to do about them.
_NO_WEIGHTS = (
    (
        re.compile(rb"version https://git-lfs"),
        "is a pointer of Git LFS, not the file itself: fetch that with git lfs pull",
    ),
    (
        re.compile(rb"\s*(<!doctype|<html|<\?xml)", re.IGNORECASE),
        "is a web page: download the file itself, not the page about it",
    ),
    (re.compile(rb"\x89HDF"), "is an HDF5 file, as Keras writes them: PyTorch's are needed"),
    (
        re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
        "is compressed: unpack it first",
    ),
    (re.compile(rb"\x93NUMPY"), "is a NumPy array: the state dict of a network is needed"),
    # the first two fields of its protocol buffer: a small version, and the producer's name
    (
        re.compile(rb"\x08[\x01-\x1f]\x12[\x01-\x7f][\x20-\x7e]"),
        "is an ONNX file, whose weights have no names of PyTorch's: save the network's "
        "state_dict() instead",
    ),
)
# Members of ZIP files that are no weights. torch.save writes a ZIP file, too.
_NO_WEIGHTS_ZIPPED = (
    (
        re.compile(r"^[^/]+/(constants\.pkl$|code/)"),
        "is a TorchScript archive: save the network's state_dict() instead",
    ),
    (
        re.compile(r"^([^/]+/)?(archive_format|serialized_exported_program\.json)$"),
        "is an exported program: save the network's state_dict() instead",
    ),
    (re.compile(r"\.npy$"), "is an archive of NumPy arrays: the state dict of a network is needed"),
)

# --- what trainers wrap around a state dict ------------------------------------------------------

# Parts of names that stand for a module around another: DataParallel and DDP, torch.compile, FSDP,
# activation checkpointing, DeepSpeed and Lightning.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# Entries that no prediction depends on: counters of thop and of AveragedModel, constants that a
# network computes itself, and what losses and metrics keep.
_IDLE = re.compile(
    r"(.*\.)?(total_ops|total_params|n_averaged|relative_position_index|relative_coords_table"
    r"|attn_mask)|(criterion|loss|metric|(train|val|valid|test)_(acc|loss|metric))[^.]*\..*"
)
_TRACKED = "num_batches_tracked"  # which PyTorch before 0.4.1 did not have
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])", re.IGNORECASE)
# Keys of the weights themselves, where others are beside them.
_USUAL = {
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "weights",
    "params",
    "module",
}
_DEEPEST = 4  # mappings in mappings


@dataclass(frozen=True)
class _Candidate:
    """Tensors somewhere in a file, named as a network names them."""

    keys: tuple[str, ...]  # that lead to the mapping they are in
    prefix: str  # of their names there
    unwrapped: bool  # parts such as `module` were taken out of the names
    tensors: dict[str, Tensor]
    missing: frozenset[str]  # of the network's entries
    extra: frozenset[str]  # and entries that the network has not
    outside: tuple[str, ...]  # the other entries of the mapping

    @property
    def fits(self) -> bool:
        return not self.missing and not self.extra

    @property
    def averaged(self) -> bool:
        return any(map(_AVERAGED.search, (*self.keys, *self.prefix.split("."))))

    @property
    def usual(self) -> bool:
        return not self.keys or self.keys[-1] in _USUAL

    @property
    def where(self) -> str:
        """Its keys, as one; empty at the top of the file."""
        names = f"{self.prefix}*" if self.prefix else ""
        keys = ".".join(self.keys)
        return f"{names} in {keys}" if names and keys else names or keys


def read_weights(path: Path) -> Content:
    """What a file of weights holds, of safetensors or `torch.save`; the content says which.

    Raises:
        RichKDError: no such file, not a file of weights, or one with pickled code.
    """
    check_weights(path)
    content: Any = read_safetensors(path)[0] if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, Mapping) or not content:
        raise RichKDError(
            f"{path} holds no state dict, but {type(content).__name__}; save "
            f"torch.save(model.state_dict(), FILE) where it was made",
            code="weights-no-state-dict",
        )
    return content


def check_weights(path: Path) -> None:
    """Refuse what is no file of weights by its beginning, before anything is read.

    Raises:
        RichKDError: that is so, or there is no such file.
    """
    if path.is_dir():
        suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
        inside = sorted(file.name for file in path.iterdir() if file.suffix in suffixes)
        hint = f"name a file in it, such as {path / inside[0]}" if inside else "name a file"
        raise RichKDError(
            f"{path} is a directory, not a file of weights: {hint}", code="weights-is-directory"
        )
    if not path.is_file():
        raise RichKDError(f"no weights at {path}", code="weights-missing")
    with path.open("rb") as file:
        head = file.read(512)
    fault = "is empty: copy or download it again" if not head else None
    fault = fault or next((why for shape, why in _NO_WEIGHTS if shape.match(head)), None)
    if head[257:262] == b"ustar":
        fault = "is a tar archive: unpack it first"
    if fault is None and head.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            fault = next(
                (why for shape, why in _NO_WEIGHTS_ZIPPED if any(map(shape.search, names))), None
            )
            if fault is None and not any(name.endswith("data.pkl") for name in names):
                fault = "is a ZIP archive that torch.save did not write: unpack it first"
    if fault is not None:
        raise RichKDError(f"{path} {fault}", code="weights-format")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; RichKDError where it is damaged.

    The format has no checksum; files of richkd's own carry one in their metadata.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RichKDError(
            f"{path} is damaged or no safetensors file: {error}", code="weights-damaged"
        ) from None
    if note.get(_SHA256, "") not in ("", tensors_sha256(tensors)):
        raise RichKDError(
            f"{path} is damaged: its tensors are not those that were written",
            code="weights-damaged",
        )
    return tensors, note


def read_note(path: Path) -> dict[str, str]:
    """The metadata of a file, without its tensors; RichKDError where it is damaged.

    Files of other formats than safetensors have none.
    """
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RichKDError(
            f"{path} is damaged or no safetensors file: {error}", code="weights-damaged"
        ) from None


def _is_safetensors(path: Path) -> bool:
    """By the content, for names may say something else; what is neither goes by its name."""
    with path.open("rb") as file:
        head = file.read(9)
    by_content = head[7:9] == b"\0{"  # the length of a header in JSON, and its beginning
    return by_content or (
        path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80\x02"))
    )


def _read_pickle(path: Path) -> object:
    try:
        with (
            torch.serialization.safe_globals(_HARMLESS),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # about pickles that are refused anyway
            path.open("rb") as file,  # by its name, torch would take it for something else
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if not file.read(4).startswith((b"PK\x03\x04", b"\x80")):
                raise RichKDError(
                    f"{path} is damaged or no file of weights: it is neither of safetensors nor of "
                    f"torch.save",
                    code="weights-damaged",
                ) from None
        found = _foreign(path, str(error))
        raise RichKDError(
            f"refused to read {path}: it holds more than tensors and plain values, which could "
            f"run code ({found}); save its weights alone, where it was made: "
            f"torch.save(model.state_dict(), FILE)",
            code="weights-unsafe",
        ) from None
    except Exception as error:  # damage shows in errors of many kinds
        raise RichKDError(
            f"{path} is damaged or no file of weights: {first_line(error)}", code="weights-damaged"
        ) from None


def _foreign(path: Path, reason: str) -> str:
    """The classes and functions that a file of `torch.save` asks for and that are not read."""
    names: list[str] = []
    with suppress(Exception), torch.serialization.safe_globals(_HARMLESS):  # type: ignore[arg-type]
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    names = sorted(names, key=lambda name: (name.startswith("torch."), name))
    if not names:  # of the format before PyTorch 1.6
        names = re.findall(r"(?:GLOBAL|class|for) '?([A-Za-z_]\w*(?:\.\w+)+)", reason)[:1]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "a pickle that torch.save did not write"


# --- finding a network's state dict --------------------------------------------------------------


def find_state(
    own: Mapping[str, Tensor], content: Content, name: str, path: Path
) -> tuple[dict[str, Tensor], str]:
    """The entries of a network in what a file holds, by the network's own names.

    A state dict may lie at any key (`{"state_dict": …}`), under any prefix (`model.fc.weight`), and
    its names may have parts that stand for wrappers (`module`, `_orig_mod`): they are taken out
    where the names are the network's then, every one. Averaged weights (EMA, SWA) go before those
    beside them.

    Args:
        own: the network's state dict, whose names count.
        content: of the file.
        name: the network's, for messages.
        path: the file's, for messages.

    Returns:
        The entries, and one line on what was unwrapped and left out; empty where nothing was.

    Raises:
        RichKDError: no entries have these names, or several and none is the usual one.
    """
    found = [
        one
        for keys, tensors in _mappings(content, (), set())
        for one in _candidates(own, keys, tensors)
    ]
    if not found:
        keys = ", ".join(repr(key) for key in list(content)[:4])
        raise RichKDError(
            f"{path} holds no state dict: no tensors by names, at {keys} and below",
            code="weights-no-state-dict",
        )
    fitting = [one for one in found if one.fits]
    if not fitting:
        raise _other_architecture(found, own, name, path)
    chosen = _choose(fitting, name, path)
    beside = [one for one in fitting if one is not chosen]
    state = {
        key: chosen.tensors[key] if key in chosen.tensors else torch.zeros_like(tensor)
        for key, tensor in own.items()
    }
    return state, _what_was_read(chosen, beside, own, path)


def _mappings(
    content: Content, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping from names to tensors in what a file holds, with the keys that lead to it."""
    if id(content) in seen or len(keys) > _DEEPEST:  # many keys may lead to one
        return
    seen.add(id(content))
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield keys, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _mappings(value, (*keys, key), seen)


def _candidates(
    own: Mapping[str, Tensor], keys: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> list[_Candidate]:
    """A mapping's tensors as a network's, by the prefixes that most names are the network's with.

    Names as they are come first: parts that look like wrappers may be the network's own.
    """
    found = [
        _under(own, keys, prefix, tensors, unwrapped=False) for prefix in _prefixes(own, tensors)
    ]
    if any(one.fits for one in found):
        return found
    wrappers = _WRAPPERS - {part for key in own for part in key.split(".")}
    bare = {
        ".".join(part for part in key.split(".") if part not in wrappers): tensor
        for key, tensor in tensors.items()
    }
    if bare.keys() != tensors.keys() and len(bare) == len(tensors):
        unwrapped = [
            _under(own, keys, prefix, bare, unwrapped=True) for prefix in _prefixes(own, bare)
        ]
        return unwrapped or found
    return found


def _prefixes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Those with which at least half as many names are the network's as with the best; or none."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in own:
                counts[key[: len(key) - len(rest)]] += 1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if 2 * count >= most] or [""]


def _under(
    own: Mapping[str, Tensor],
    keys: tuple[str, ...],
    prefix: str,
    tensors: Mapping[str, Tensor],
    *,
    unwrapped: bool,
) -> _Candidate:
    """The tensors whose names have a prefix, as a network's."""
    inside = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    missing = {key for key in own.keys() - inside.keys() if not key.endswith(_TRACKED)}
    extra = {key for key in inside.keys() - own.keys() if not _IDLE.fullmatch(key)}
    return _Candidate(
        keys,
        prefix,
        unwrapped,
        inside,
        frozenset(missing),
        frozenset(extra),
        tuple(key for key in tensors if not key.startswith(prefix)),
    )


def _choose(fitting: list[_Candidate], name: str, path: Path) -> _Candidate:
    """Of those that fit, the averaged one, else the one at a usual key.

    Raises:
        RichKDError: there are several.
    """
    for rank in (
        [one for one in fitting if one.averaged],
        [one for one in fitting if one.usual],
        fitting,
    ):
        if rank:
            break
    if all(_same(rank[0].tensors, one.tensors) for one in rank[1:]):
        return rank[0]
    places = ", ".join(one.where or "the top" for one in rank)
    raise RichKDError(
        f"{path} holds several networks that could be {name} ({places}); save the one that is "
        f"meant alone",
        code="weights-ambiguous",
    )


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def _what_was_read(
    chosen: _Candidate, beside: list[_Candidate], own: Mapping[str, Tensor], path: Path
) -> str:
    """In one line; empty where the file is the state dict and nothing else."""
    left = [*chosen.outside, *(chosen.tensors.keys() - own.keys())]
    notes = []
    if chosen.averaged:
        notes.append("its averaged weights")
    if beside:
        places = ", ".join(one.where or "the top" for one in beside)
        notes.append(f"{places} {'is' if len(beside) == 1 else 'are'} beside it")
    if chosen.unwrapped:
        notes.append("wrappers such as module taken out of the names")
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out {', '.join(sorted(left)[:3])}{more}")
    if not notes and not chosen.where:
        return ""
    return f"read {chosen.where or 'the weights'} of {path}" + f" ({'; '.join(notes)})" * bool(
        notes
    )


def _other_architecture(
    found: list[_Candidate], own: Mapping[str, Tensor], name: str, path: Path
) -> RichKDError:
    """What differs between a network and those tensors of a file that are nearest to it."""
    near = min(found, key=lambda one: (len(one.missing), len(one.extra)))
    missing = len(own.keys() - near.tensors.keys())
    examples = [
        f"{what} {min(keys)!r}"
        for what, keys in (("missing", near.missing), ("unexpected", near.extra or near.outside))
        if keys
    ]
    where = f" in {near.where}" if near.where else ""
    return RichKDError(
        f"{path} is of another architecture than {name}: {missing} entries missing, "
        f"{len(near.extra)} unexpected{where}, e.g. {', '.join(examples)}",
        code="weights-other-architecture",
    )


def load_into(model: nn.Module, content: Content, name: str, path: Path) -> str:
    """Load every entry of a network, or say what differs in one line.

    Args:
        model: the network.
        content: as `read_weights` gave it.
        name: the network's, for messages.
        path: the file's, for messages.

    Returns:
        One line on what was unwrapped and left out (`find_state`); empty where nothing was.

    Raises:
        RichKDError: names or shapes differ from the network's, or tensors hold no floats.
    """
    own = model.state_dict()
    state, said = find_state(own, content, name, path)
    misfits = {key: state[key] for key, tensor in own.items() if state[key].shape != tensor.shape}
    if misfits:
        raise _other_shapes(misfits, own, name, path)
    for key, tensor in own.items():
        given = state[key]
        if tensor.is_floating_point() and (given.is_quantized or not given.is_floating_point()):
            raise RichKDError(
                f"{path}: {key} is {str(given.dtype).removeprefix('torch.')}, as in quantized "
                f"networks; the weights as they were before that are needed",
                code="weights-quantized",
            )
    model.load_state_dict(state)
    return said


def _other_shapes(
    misfits: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, path: Path
) -> RichKDError:
    key, tensor = next(iter(misfits.items()))
    theirs, ours = tuple(tensor.shape), tuple(own[key].shape)
    first = {(tuple(given.shape[:1]), tuple(own[key].shape[:1])) for key, given in misfits.items()}
    rest = all(given.shape[1:] == own[key].shape[1:] for key, given in misfits.items())
    if rest and len(first) == 1 and theirs and ours and [*own][-1] in misfits:
        why = f"it has {theirs[0]} classes and the data have {ours[0]}: another number of classes"
    else:
        why = "another number of classes, width or image size?"
    return RichKDError(
        f"{path} does not fit {name}: {key} is {theirs}, the model's is {ours} ({why})",
        code="weights-do-not-fit",
    )


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
    with atomic_write(path) as temporary:
        # `save_file` writes to a temporary file of its own, which a killed process leaves behind
        temporary.write_bytes(save(plain, note))

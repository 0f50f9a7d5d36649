"""Read and write weights; code in a file is never run.

Loading takes two steps: `read_weights` returns the content of a file, and `load_into` finds the
network's state dict in it, whatever a trainer has wrapped around it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

# Checkpoints hold more than tensors: arguments, paths, times, an accuracy. These classes only
# contain data; a file with any other class is refused.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]


def _plain_dict(_: object = None) -> dict[Any, Any]:
    """Stand in for a defaultdict, without the factory that it would call for missing keys."""
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

# Files that are often mistaken for weights, by their first bytes, and what to do instead.
_NO_WEIGHTS = (
    (
        re.compile(rb"version https://git-lfs"),
        "is a Git LFS pointer, not the file itself; fetch the file with git lfs pull",
    ),
    (
        re.compile(rb"\s*(<!doctype|<html|<\?xml)", re.IGNORECASE),
        "is a web page; download the file itself, not the page about it",
    ),
    (re.compile(rb"\x89HDF"), "is an HDF5 file, as written by Keras; PyTorch weights are needed"),
    (
        re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
        "is compressed; unpack it first",
    ),
    (re.compile(rb"\x93NUMPY"), "is a NumPy array; a network's state dict is needed"),
    # the first two fields of its protocol buffer: a small version number and the producer's name
    (
        re.compile(rb"\x08[\x01-\x1f]\x12[\x01-\x7f][\x20-\x7e]"),
        "is an ONNX file, which lacks PyTorch's names of weights; save the network's "
        "state_dict() instead",
    ),
)
# The same for ZIP archives, by the names of their members; torch.save writes ZIP archives too.
_NO_WEIGHTS_ZIPPED = (
    (
        re.compile(r"^[^/]+/(constants\.pkl$|code/)"),
        "is a TorchScript archive; save the network's state_dict() instead",
    ),
    (
        re.compile(r"^([^/]+/)?(archive_format|serialized_exported_program\.json)$"),
        "is an exported program; save the network's state_dict() instead",
    ),
    (re.compile(r"\.npy$"), "is an archive of NumPy arrays; a network's state dict is needed"),
)

# --- what trainers wrap around a state dict ------------------------------------------------------

# Parts of names that wrapper modules add: DataParallel and DDP, torch.compile, FSDP, activation
# checkpointing, DeepSpeed and Lightning.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# Entries that do not affect predictions: counters of thop and AveragedModel, constants that the
# network computes itself, and the state of losses and metrics.
_IDLE = re.compile(
    r"(.*\.)?(total_ops|total_params|n_averaged|relative_position_index|relative_coords_table"
    r"|attn_mask)|(criterion|loss|metric|(train|val|valid|test)_(acc|loss|metric))[^.]*\..*"
)
_TRACKED = "num_batches_tracked"  # missing in files of PyTorch before 0.4.1
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])", re.IGNORECASE)
# The usual keys of a network's weights; they win over weights at other keys.
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
_DEEPEST = 4  # levels of nested mappings


@dataclass(frozen=True)
class _Candidate:
    """Tensors in a file that may be a network's state dict."""

    keys: tuple[str, ...]  # that lead to their mapping
    prefix: str  # that all their names have there
    unwrapped: bool  # whether parts such as `module` were removed from the names
    tensors: dict[str, Tensor]  # by name, without the prefix
    missing: frozenset[str]  # entries of the network that are not among them
    extra: frozenset[str]  # entries among them that the network does not have
    outside: tuple[str, ...]  # entries of the mapping without the prefix

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
        """Their position in the file, e.g. `module.* in state_dict`; empty for the whole file."""
        names = f"{self.prefix}*" if self.prefix else ""
        return " in ".join(filter(None, (names, ".".join(self.keys))))


def read_weights(path: Path) -> Content:
    """Return the content of a weights file in the format of safetensors or `torch.save`.

    The file's content, not its name, decides the format.

    Raises:
        RichKDError: the file is missing, holds no weights, or holds pickled code.
    """
    check_weights(path)
    content: Any = read_safetensors(path)[0] if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, Mapping) or not content:
        raise RichKDError(
            f"{path} holds {type(content).__name__}, not a state dict; save it with "
            f"torch.save(model.state_dict(), FILE)",
            code="weights-no-state-dict",
        )
    return content


def check_weights(path: Path) -> None:
    """Check that a file starts like weights, without reading it; raise RichKDError if not."""
    if path.is_dir():
        suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
        inside = sorted(file.name for file in path.iterdir() if file.suffix in suffixes)
        hint = f"name a file in it, e.g. {path / inside[0]}" if inside else "name a file"
        raise RichKDError(
            f"{path} is a directory, not a weights file; {hint}", code="weights-is-directory"
        )
    if not path.is_file():
        raise RichKDError(f"no weights file at {path}; check the path", code="weights-missing")
    with path.open("rb") as file:
        head = file.read(512)
    fault = "is empty; copy or download it again" if not head else None
    fault = fault or next((why for shape, why in _NO_WEIGHTS if shape.match(head)), None)
    if head[257:262] == b"ustar":
        fault = "is a tar archive; unpack it first"
    if fault is None and head.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            fault = next(
                (why for shape, why in _NO_WEIGHTS_ZIPPED if any(map(shape.search, names))), None
            )
            if fault is None and not any(name.endswith("data.pkl") for name in names):
                fault = "is a ZIP archive that torch.save did not write; unpack it first"
    if fault is not None:
        raise RichKDError(f"{path} {fault}", code="weights-format")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; raise RichKDError if damaged.

    The format has no checksum; files that richkd wrote carry one in their metadata.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note = file.metadata() or {}
    if note.get(_SHA256, "") not in ("", tensors_sha256(tensors)):
        raise RichKDError(
            f"{path} is damaged: its tensors are not what was written; copy or download it again",
            code="weights-damaged",
        )
    return tensors, note


def read_note(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, or none of another file, without its tensors.

    Raises:
        RichKDError: the file is damaged.
    """
    if not _is_safetensors(path):
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RichKDError(
            f"{path} is damaged or not a safetensors file ({error}); copy or download it again",
            code="weights-damaged",
        ) from None


def _is_safetensors(path: Path) -> bool:
    """Decide by the content, since names may mislead; by the name if the content is unclear."""
    with path.open("rb") as file:
        head = file.read(9)
    by_content = head[7:9] == b"\0{"  # the length of a JSON header, and its start
    return by_content or (
        path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80\x02"))
    )


def _read_pickle(path: Path) -> object:
    try:
        with (
            torch.serialization.safe_globals(_HARMLESS),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # about pickles that are refused anyway
            path.open("rb") as file,  # torch would go by the name of a path
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if not file.read(4).startswith((b"PK\x03\x04", b"\x80")):
                raise RichKDError(
                    f"{path} is damaged or not a weights file (neither safetensors nor "
                    f"torch.save wrote it); copy or download it again",
                    code="weights-damaged",
                ) from None
        found = _foreign(path, str(error))
        raise RichKDError(
            f"refused to read {path}: it holds more than tensors and plain values and could run "
            f"code ({found}); save its weights alone with torch.save(model.state_dict(), FILE)",
            code="weights-unsafe",
        ) from None
    except Exception as error:  # damage raises errors of many kinds
        raise RichKDError(
            f"{path} is damaged or not a weights file ({first_line(error)}); copy or download "
            f"it again",
            code="weights-damaged",
        ) from None


def _foreign(path: Path, reason: str) -> str:
    """Return the names of the classes and functions that a `torch.save` file must not load."""
    names: list[str] = []
    with suppress(Exception), torch.serialization.safe_globals(_HARMLESS):  # type: ignore[arg-type]
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    names = sorted(names, key=lambda name: (name.startswith("torch."), name))
    if not names:  # the format before PyTorch 1.6
        names = re.findall(r"(?:GLOBAL|class|for) '?([A-Za-z_]\w*(?:\.\w+)+)", reason)[:1]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "a pickle that torch.save did not write"


# --- finding a network's state dict --------------------------------------------------------------


def find_state(
    own: Mapping[str, Tensor], content: Content, name: str, path: Path
) -> tuple[dict[str, Tensor], str]:
    """Find a network's state dict in the content of a file.

    It may lie at any key (`{"state_dict": …}`) and under any prefix (`model.fc.weight`), and its
    names may contain parts that wrappers added (`module`, `_orig_mod`), which are removed if every
    name then is one of the network's. Averaged weights (EMA, SWA) take precedence over others.

    Args:
        own: the network's state dict, whose names count.
        content: the content of the file.
        name: the network's name, for messages.
        path: the file's path, for messages.

    Returns:
        The entries by the network's own names, and one line on what was unwrapped and ignored,
        which is empty if nothing was.

    Raises:
        RichKDError: no entries have these names, or several sets do and none is the usual one.
    """
    found = [
        one
        for keys, tensors in _mappings(content, (), set())
        for one in _candidates(own, keys, tensors)
    ]
    if not found:
        keys = ", ".join(repr(key) for key in list(content)[:4])
        raise RichKDError(
            f"{path} holds no state dict (no named tensors at {keys} or below); save it with "
            f"torch.save(model.state_dict(), FILE)",
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
    return state, _describe(chosen, beside, own, path)


def _mappings(
    content: Content, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping from names to tensors in `content`, with the keys that lead to it."""
    if id(content) in seen or len(keys) > _DEEPEST:  # a mapping may occur at many keys
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
    """Return the candidates in a mapping, one for each prefix that many of the names share.

    Wrappers are removed only if the names as they are do not fit: what looks like a wrapper may be
    part of the network.
    """
    found = _under_prefixes(own, keys, tensors, unwrapped=False)
    if any(one.fits for one in found):
        return found
    wrappers = _WRAPPERS - {part for key in own for part in key.split(".")}
    bare = {
        ".".join(part for part in key.split(".") if part not in wrappers): tensor
        for key, tensor in tensors.items()
    }
    if bare.keys() != tensors.keys() and len(bare) == len(tensors):
        return _under_prefixes(own, keys, bare, unwrapped=True)
    return found


def _under_prefixes(
    own: Mapping[str, Tensor],
    keys: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    *,
    unwrapped: bool,
) -> list[_Candidate]:
    candidates = []
    for prefix in _prefixes(own, tensors):
        inside = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        missing = {key for key in own.keys() - inside.keys() if not key.endswith(_TRACKED)}
        extra = {key for key in inside.keys() - own.keys() if not _IDLE.fullmatch(key)}
        outside = tuple(key for key in tensors if not key.startswith(prefix))
        candidates.append(
            _Candidate(
                keys, prefix, unwrapped, inside, frozenset(missing), frozenset(extra), outside
            )
        )
    return candidates


def _prefixes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes that give at least half as many of the network's names as the best."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in own:
                counts[key[: len(key) - len(rest)]] += 1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if 2 * count >= most] or [""]


def _choose(fitting: list[_Candidate], name: str, path: Path) -> _Candidate:
    """Return the averaged candidate, else the one at a usual key, else the only one.

    Raises:
        RichKDError: several different candidates are left.
    """
    averaged = [one for one in fitting if one.averaged]
    usual = [one for one in fitting if one.usual]
    rank = averaged or usual or fitting
    if all(_same(rank[0].tensors, one.tensors) for one in rank[1:]):
        return rank[0]
    raise RichKDError(
        f"{path} holds several networks that could be {name} ({_places(rank)}); save the intended "
        f"one in a file of its own",
        code="weights-ambiguous",
    )


def _places(candidates: list[_Candidate]) -> str:
    return ", ".join(one.where or "the top level" for one in candidates)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def _describe(
    chosen: _Candidate, beside: list[_Candidate], own: Mapping[str, Tensor], path: Path
) -> str:
    """Return one line on what was loaded; empty if the file is the state dict and nothing else."""
    ignored = sorted([*chosen.outside, *(chosen.tensors.keys() - own.keys())])
    notes = []
    if chosen.averaged:
        notes.append("averaged weights")
    if beside:
        notes.append(f"rather than {_places(beside)}")
    if chosen.unwrapped:
        notes.append("without wrappers such as module in the names")
    if ignored:
        more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
        notes.append(f"ignored {', '.join(ignored[:3])}{more}")
    if not notes and not chosen.where:
        return ""
    loaded = f"loaded {chosen.where or 'the weights'} from {path}"
    return f"{loaded} ({'; '.join(notes)})" if notes else loaded


def _other_architecture(
    found: list[_Candidate], own: Mapping[str, Tensor], name: str, path: Path
) -> RichKDError:
    """Return the error that names what differs from the nearest candidate in the file."""
    near = min(found, key=lambda one: (len(one.missing), len(one.extra)))
    missing = len(own.keys() - near.tensors.keys())
    examples = [
        f"{what} {min(keys)!r}"
        for what, keys in (("missing", near.missing), ("unexpected", near.extra or near.outside))
        if keys
    ]
    where = f" in {near.where}" if near.where else ""
    return RichKDError(
        f"{path} holds another architecture than {name}: {missing} entries missing, "
        f"{len(near.extra)} unexpected{where}, e.g. {', '.join(examples)}; choose the network "
        f"that the weights belong to",
        code="weights-other-architecture",
    )


def load_into(model: nn.Module, content: Content, name: str, path: Path) -> str:
    """Load every entry of a network from the content of a file.

    Args:
        model: the network.
        content: the content, as `read_weights` returns it.
        name: the network's name, for messages.
        path: the file's path, for messages.

    Returns:
        One line on what was unwrapped and ignored (see `find_state`); empty if nothing was.

    Raises:
        RichKDError: names or shapes differ from the network's, or weights are not floats.
    """
    own = model.state_dict()
    state, summary = find_state(own, content, name, path)
    misfits = {key: state[key] for key, tensor in own.items() if state[key].shape != tensor.shape}
    if misfits:
        raise _other_shapes(misfits, own, name, path)
    for key, tensor in own.items():
        given = state[key]
        if tensor.is_floating_point() and (given.is_quantized or not given.is_floating_point()):
            raise RichKDError(
                f"{path}: {key} is {str(given.dtype).removeprefix('torch.')}, as in quantized "
                f"networks; use the weights from before quantization",
                code="weights-quantized",
            )
    model.load_state_dict(state)
    return summary


def _other_shapes(
    misfits: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, path: Path
) -> RichKDError:
    key, tensor = next(iter(misfits.items()))
    theirs, ours = tuple(tensor.shape), tuple(own[key].shape)
    first = {(tuple(given.shape[:1]), tuple(own[key].shape[:1])) for key, given in misfits.items()}
    rest = all(given.shape[1:] == own[key].shape[1:] for key, given in misfits.items())
    if rest and len(first) == 1 and theirs and ours and [*own][-1] in misfits:
        why = f"it has {theirs[0]} classes, the dataset has {ours[0]}"
    else:
        why = "the number of classes, the width or the image size may differ"
    return RichKDError(
        f"{path} does not fit {name}: {key} is {theirs}, the model's is {ours} ({why}); "
        f"choose weights that fit",
        code="weights-do-not-fit",
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; raise OSError if the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    note = {**(metadata or {}), _SHA256: tensors_sha256(plain)}
    with atomic_write(path) as temporary:
        # `save_file` would write a temporary file of its own, which a killed process leaves behind
        temporary.write_bytes(_sorted_metadata(save(plain, note)))


def _sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with sorted metadata, which safetensors writes in random order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]

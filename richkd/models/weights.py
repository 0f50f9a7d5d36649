"""Read and write weights; code in a file is never run.

Loading takes two steps: `read_weights` returns the content of a file, and `load_into` finds the
network's state dict in it, whatever a trainer has wrapped around it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from richkd.core.errors import RichKDError, first_line
from richkd.core.files import atomic_write
from richkd.models.candidates import Candidate, find_candidates
from richkd.models.layouts import describe_layout
from richkd.models.pickles import HARMLESS, foreign

KEY_FLAG = "--teacher-weights-key"
_SHA256 = "richkd-sha256"
Content = Mapping[str, Any]

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


def read_weights(path: Path) -> Content:
    """Return the content of a weights file in the format of safetensors or `torch.save`.

    The file's content, not its name, decides the format.

    Raises:
        RichKDError: the file is missing, holds no weights, or holds pickled code.
    """
    check_weights(path)
    content: Any = read_safetensors(path)[0] if _is_safetensors(path) else _read_pickle(path)
    if isinstance(content, list | tuple):  # such as (weights, optimizer)
        parts = {str(n): part for n, part in enumerate(content) if isinstance(part, Mapping)}
        content = parts or content
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
            torch.serialization.safe_globals(HARMLESS),
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
        found = foreign(path, str(error))
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


# --- finding a network's state dict --------------------------------------------------------------


def find_state(
    own: Mapping[str, Tensor],
    content: Content,
    name: str,
    path: Path,
    key: str = "",
    *,
    flag: str = KEY_FLAG,
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
        key: the key or prefix at which the state dict lies; empty to look for it everywhere.
        flag: by which the user gives the key, for messages.

    Returns:
        The entries by the network's own names, and one line on what was unwrapped and ignored,
        which is empty if nothing was.

    Raises:
        RichKDError: no entries have these names; or several sets do, and none is the usual one; or
            there are none at `key`.
    """
    found = find_candidates(own, content)
    if not found:
        keys = ", ".join(repr(key) for key in list(content)[:4])
        raise RichKDError(
            f"{path} holds no state dict (no named tensors at {keys} or below); save it with "
            f"torch.save(model.state_dict(), FILE)",
            code="weights-no-state-dict",
        )
    there = [one for one in found if not key or one.is_at(key)]
    if not there:
        raise _unknown_key(key, found, path, flag)
    fitting = [one for one in there if one.fits]
    if not fitting:
        layout = describe_layout(name, content, _note(path))
        raise _other_architecture(there, own, name, path, layout)
    chosen = _choose(fitting, name, path, flag)
    beside = [one for one in fitting if one is not chosen]
    return chosen.state(own), _describe(chosen, beside, own, path, key, flag)


def _unknown_key(key: str, found: list[Candidate], path: Path, flag: str) -> RichKDError:
    """Return the error that names the keys that there are, those of the network first."""
    fitting = [one.key for one in found if one.fits]
    keys = [*filter(None, dict.fromkeys(fitting or [one.key for one in found]))]
    remedy = (
        f"choose from {', '.join(keys[:8])}"
        if keys
        else f"its weights are at the top level: leave {flag} out"
    )
    return RichKDError(
        f"{path} has no weights at key {key!r}; {remedy}", code="weights-key-unknown"
    )


def _note(path: Path) -> dict[str, str]:
    return read_note(path) if path.is_file() else {}


def _choose(fitting: list[Candidate], name: str, path: Path, flag: str) -> Candidate:
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
        f"{path} holds several networks that could be {name} ({_places(rank)}); choose one with "
        f"{flag} {next(filter(None, (one.key for one in rank)))}, or save it in a file of its own",
        code="weights-ambiguous",
    )


def _places(candidates: list[Candidate]) -> str:
    return ", ".join(one.where or "the top level" for one in candidates)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def _describe(
    chosen: Candidate,
    beside: list[Candidate],
    own: Mapping[str, Tensor],
    path: Path,
    key: str,
    flag: str,
) -> str:
    """Return one line on what was loaded; empty if the file is the state dict and nothing else."""
    ignored = sorted([*chosen.outside, *(chosen.tensors.keys() - own.keys())])
    notes = []
    if chosen.averaged:
        notes.append("averaged weights")
    if beside:
        other = next((f"; {flag} {one.key} takes those" for one in beside if one.key), "")
        notes.append(f"rather than {_places(beside)}{other}")
    if key:
        notes.append(f"by {flag}")
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
    found: list[Candidate], own: Mapping[str, Tensor], name: str, path: Path, layout: str
) -> RichKDError:
    """Return the error that names what differs from the nearest candidate in the file.

    Args:
        found: the candidates.
        own: the network's state dict.
        name: the network's name.
        path: the file's path.
        layout: the network that the weights belong to, if known.
    """
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
        f"{len(near.extra)} unexpected{where}, e.g. {', '.join(examples)}; "
        f"{layout and f'{layout}: '}choose the network that the weights belong to",
        code="weights-other-architecture",
    )


def load_into(
    model: nn.Module,
    content: Content,
    name: str,
    path: Path,
    key: str = "",
    *,
    flag: str = KEY_FLAG,
) -> str:
    """Load every entry of a network from the content of a file.

    Args:
        model: the network.
        content: the content, as `read_weights` returns it.
        name: the network's name, for messages.
        path: the file's path, for messages.
        key: as in `find_state`.
        flag: likewise.

    Returns:
        One line on what was unwrapped and ignored (see `find_state`); empty if nothing was.

    Raises:
        RichKDError: names or shapes differ from the network's, or weights are not floats.
    """
    own = model.state_dict()
    state, summary = find_state(own, content, name, path, key, flag=flag)
    misfits = {each: state[each] for each in own if state[each].shape != own[each].shape}
    if misfits:
        raise _other_shapes(misfits, own, name, path, content)
    for entry, tensor in own.items():
        given = state[entry]
        if tensor.is_floating_point() and (given.is_quantized or not given.is_floating_point()):
            raise RichKDError(
                f"{path}: {entry} is {str(given.dtype).removeprefix('torch.')}, as in quantized "
                f"networks; use the weights from before quantization",
                code="weights-quantized",
            )
    model.load_state_dict({entry: tensor.to_dense() for entry, tensor in state.items()})
    return summary


def _other_shapes(
    misfits: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    name: str,
    path: Path,
    content: Content,
) -> RichKDError:
    key, tensor = next(iter(misfits.items()))
    theirs, ours = tuple(tensor.shape), tuple(own[key].shape)
    first = {(tuple(given.shape[:1]), tuple(own[key].shape[:1])) for key, given in misfits.items()}
    rest = all(given.shape[1:] == own[key].shape[1:] for key, given in misfits.items())
    if rest and len(first) == 1 and theirs and ours and [*own][-1] in misfits:
        why = f"it has {theirs[0]} classes, the dataset has {ours[0]}"
    else:
        why = describe_layout(name, content, _note(path))
        why = why or "the number of classes, the width or the image size may differ"
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

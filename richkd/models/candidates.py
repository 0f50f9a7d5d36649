"""Find what may be a network's state dict in a file, whatever trainers have wrapped around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
class Candidate:
    """Tensors in a file that may be a network's state dict."""

    keys: tuple[str, ...]  # that lead to their mapping
    prefix: str  # that their names have there
    head: str  # that the names of the others have, e.g. `head.` beside `backbone.`; mostly empty
    unwrapped: bool  # whether parts such as `module` were removed from the names
    tensors: dict[str, Tensor] = field(repr=False)  # by name, without the prefix
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
        names = " and ".join(f"{prefix}*" for prefix in (self.prefix, self.head) if prefix)
        return " in ".join(filter(None, (names, ".".join(self.keys))))

    @property
    def key(self) -> str:
        """The keys, and the prefix of the names, that lead to them; empty for the whole file."""
        return ".".join((*self.keys, self.prefix)).rstrip(".")

    def is_at(self, key: str) -> bool:
        """Return whether they lie at a key, or below it."""
        return f"{self.key}.".startswith(f"{key}.")

    def state(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the network's entries; counters that are missing are zero.

        A number may have the shape [1] or none.
        """
        found = {
            key: self.tensors[key] if key in self.tensors else torch.zeros_like(tensor)
            for key, tensor in own.items()
        }
        return {
            key: tensor.reshape(own[key].shape)
            if tensor.numel() == own[key].numel() == 1
            else tensor
            for key, tensor in found.items()
        }


def find_candidates(own: Mapping[str, Tensor], content: Mapping[str, Any]) -> list[Candidate]:
    """Return everything in the content of a file that may be a network's state dict.

    Args:
        own: the network's state dict, whose names count.
        content: the content of the file.
    """
    return [
        one
        for keys, tensors in _mappings(content, own, (), set())
        for one in _candidates(own, keys, tensors)
    ]


def _mappings(
    content: Mapping[Any, Any],
    own: Mapping[str, Tensor],
    keys: tuple[str, ...],
    seen: set[int],
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping from names to tensors in `content`, with the keys that lead to it."""
    if id(content) in seen or len(keys) > _DEEPEST:  # a mapping may occur at many keys
        return
    seen.add(id(content))
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    found = {key: _tensor(key, value, own) for key, value in named.items()}
    if tensors := {key: tensor for key, tensor in found.items() if tensor is not None}:
        yield keys, tensors
    for key, value in named.items():
        if isinstance(value, Mapping):
            yield from _mappings(value, own, (*keys, key), seen)


def _tensor(name: str, value: object, own: Mapping[str, Tensor]) -> Tensor | None:
    """Return a value as a tensor, or None if it is none.

    A number counts if the network has an entry of its name; others are an epoch or an accuracy.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float | np.generic):
        if not any(rest in own for _, rest in _splits(name)):
            return None
    elif not isinstance(value, np.ndarray):
        return None
    array = np.asarray(value)
    native = array.astype(array.dtype.newbyteorder("="), order="C")  # a copy, as torch may write
    return torch.from_numpy(native) if native.dtype.kind in "biufc" else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield every prefix of a name, and what follows it."""
    parts = name.split(".")
    for start in range(len(parts)):
        rest = ".".join(parts[start:])
        yield name[: len(name) - len(rest)], rest


def _candidates(
    own: Mapping[str, Tensor], keys: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> list[Candidate]:
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
) -> list[Candidate]:
    candidates = []
    for prefix in _prefixes(own, tensors):
        inside = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        outside = [key for key in tensors if not key.startswith(prefix)]
        missing = {key for key in own.keys() - inside.keys() if not key.endswith(_TRACKED)}
        head, apart = _apart({key: own[key] for key in missing}, outside, tensors)
        if apart:
            inside |= {key: tensors[there] for key, there in apart.items()}
            outside = [key for key in outside if key not in apart.values()]
            missing = set()
        extra = {key for key in inside.keys() - own.keys() if not _IDLE.fullmatch(key)}
        candidates.append(
            Candidate(
                keys,
                prefix,
                head,
                unwrapped,
                inside,
                frozenset(missing),
                frozenset(extra),
                tuple(outside),
            )
        )
    return candidates


def _prefixes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes that give at least half as many of the network's names as the best."""
    counts: Counter[str] = Counter()
    for key in tensors:
        counts.update(prefix for prefix, rest in _splits(key) if rest in own)
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if 2 * count >= most] or [""]


def _apart(
    missing: Mapping[str, Tensor], outside: Sequence[str], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, str]]:
    """Find a classifier that is kept apart from the rest of its network, if there is no doubt.

    Its names may follow another prefix (MMPretrain: `backbone.conv1.weight`, `head.fc.weight`), or
    it may be the only other layer, of any name (`backbone.conv1.weight`, `linear.weight`).

    Args:
        missing: entries of the network that have no tensor.
        outside: names of tensors that are none of its other entries.
        tensors: the tensors by name.

    Returns:
        The prefix, and the name of each missing entry's tensor; empty if they were not found.
    """
    ours, theirs = sorted(missing), sorted(key for key in outside if not _IDLE.fullmatch(key))
    if not ours or len(ours) != len(theirs):
        return "", {}
    names = dict(zip(ours, theirs, strict=True))
    prefix = theirs[0].removesuffix(ours[0])
    if prefix.endswith(".") and all(there == prefix + key for key, there in names.items()):
        return prefix, names
    layers = {(key.rpartition(".")[0], there.rpartition(".")[0]) for key, there in names.items()}
    alike = all(
        key.rpartition(".")[2] == there.rpartition(".")[2]
        and missing[key].shape[1:] == tensors[there].shape[1:]
        for key, there in names.items()
    )
    return (f"{layers.pop()[1]}.", names) if len(layers) == 1 and alike else ("", {})

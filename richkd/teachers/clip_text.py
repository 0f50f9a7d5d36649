"""The tokenizer and text model that some CLIPs take from Hugging Face, through transformers.

Both are read from a CLIP's directory, or from the hub and its cache, before any weights. Code that
comes with them is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from richkd.core.errors import RichKDError, first_line

INSTALL = "pip install 'richkd[tokenizers]'"
FindSpec = Callable[[str], object]  # as importlib.util.find_spec
# in errors of open_clip and transformers about files that could not be downloaded
NOT_FETCHED = ("Failed to download", "Failed initial config", "Required pretrained", "connect")
_PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_PIECES)
_FOR_PIECES = ("sentencepiece", "google.protobuf")
_ONLY_PIECES = "mt5"  # tokenizers whose repositories have no tokenizer.json
_FILES = "tokenizer.json or spiece.model, and tokenizer_config.json"


def text_of(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return the text part of a CLIP's configuration.

    A text model whose config.json is in the CLIP's directory is named by that directory, so
    nothing of it is looked for on the hub.
    """
    text = dict(config.get("text_cfg", {}))
    if folder is not None and text.get("hf_model_name"):
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, TypeError, KeyError):
            kind = None
        if kind in open_clip.hf_configs.arch_dict:  # else the whole CLIP's, for transformers
            text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return text


def check_text(
    name: str,
    config: Mapping[str, Any],
    folder: Path | None = None,
    find: FindSpec = find_spec,
) -> None:
    """Check that a CLIP's tokenizer and text model can be loaded, by its configuration alone.

    If the configuration names one from Hugging Face, open_clip loads it through transformers, and
    looks for a directory's tokenizer in the directory.

    Args:
        name: the CLIP's name.
        config: open_clip's configuration of it.
        folder: its directory, if it is a local one.
        find: finds a package, or returns None.

    Raises:
        RichKDError: packages are not installed, or the directory lacks the tokenizer's files.
    """
    text = config.get("text_cfg", {})
    tokenizer, tower = text.get("hf_tokenizer_name"), text.get("hf_model_name")
    if not tokenizer and not tower and (folder or "siglip" not in name.lower()):
        return
    what = f"the text model {tower}" if tower else f"the tokenizer {tokenizer or 'of SigLIP'}"
    there = [file for file in _VOCABULARIES if folder and (folder / file).is_file()]
    pieces = {*there} <= {*_PIECES} if there else _ONLY_PIECES in f"{tokenizer}"
    remedies = []
    if absent := _absent(["transformers", *(_FOR_PIECES if pieces else ())], find):
        remedies.append(f"install {' and '.join(absent)}: {INSTALL}")
    if folder is not None and tokenizer and not there:
        remedies.append(f"copy the tokenizer's files ({_FILES}) from {tokenizer} to {folder}")
    if remedies:
        raise RichKDError(
            f"CLIP {name} needs {what} from Hugging Face; {', and '.join(remedies)}",
            code="clip-tokenizer-missing",
        )


def _absent(packages: Iterable[str], find: FindSpec) -> list[str]:
    """Return which packages are not installed, by the names that pip knows."""

    def found(package: str) -> bool:
        outer = package.partition(".")[0]  # importing it is how an inner one is found
        return find(outer) is not None and find(package) is not None

    return [package.removeprefix("google.") for package in packages if not found(package)]


def load_tokenizer(
    name: str, source: str, text: Mapping[str, Any], folder: Path | None, unreachable: str | None
) -> Any:
    """Return a CLIP's tokenizer, having checked that its text model is at hand too.

    Args:
        name: the CLIP's name.
        source: what open_clip calls it.
        text: the text part of its configuration (`text_of`).
        folder: its directory, if it is a local one.
        unreachable: why the hub cannot be reached, if it cannot.

    Raises:
        RichKDError: one of them is missing, damaged, or consists of code.
    """
    own, tower = text.get("hf_tokenizer_name"), text.get("hf_model_name")
    if tower:
        part = _Part(name, "text model", tower, folder, tower == str(folder), unreachable)
        part.read(partial(import_module("transformers").AutoConfig.from_pretrained, tower))
    if not own:
        return open_clip.get_tokenizer(source)
    part = _Part(name, "tokenizer", own, folder, folder is not None, unreachable)

    def read(**options: Any) -> Any:
        tokenizer = open_clip.get_tokenizer(source, **options)
        tokenizer(["a"])  # some lack what only this needs, as a padding token
        code = tokenizer.tokenizer.init_kwargs.get("auto_map", {})
        if not isinstance(code, dict) or "AutoTokenizer" in code:
            raise ValueError("custom code")  # which transformers replaced by a class of its own
        return tokenizer

    return part.read(read)


@dataclass(frozen=True)
class _Part:
    """A tokenizer or text model that a CLIP takes from Hugging Face."""

    clip: str
    kind: str
    repository: str
    folder: Path | None  # the CLIP's
    here: bool  # whether it is read from that directory
    unreachable: str | None  # why the hub cannot be reached, if it cannot

    def read(self, read: Callable[..., Any]) -> Any:
        """Return what is read from the directory, the hub, or only its cache; raise RichKDError."""
        offline = self.here or self.unreachable is not None
        try:
            return read(local_files_only=offline, trust_remote_code=False)
        except Exception as error:  # transformers raises errors of many kinds
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> RichKDError:
        what = f"its {self.kind} {self.repository}"
        if "custom code" in str(error):
            return RichKDError(
                f"CLIP {self.clip}: {what} consists of custom code, which richkd never runs; "
                f"choose a CLIP whose tokenizer is data (tokenizer.json)",
                code="clip-tokenizer-code",
            )
        reason = first_line(error)
        if self.unreachable is not None and not self.here and isinstance(error, OSError):
            reason = f"it is not in the hub's cache, and {self.unreachable}"
        return RichKDError(
            f"cannot load CLIP {self.clip}: {what}: {reason}; {self._remedy(error)}",
            code="clip-cannot-be-loaded",
        )

    def _remedy(self, error: Exception) -> str:
        unread = re.search("sentencepiece|tiktoken|protobuf|google", str(error))
        if unread and (absent := _absent(_FOR_PIECES, find_spec)):
            return f"install {' and '.join(absent)}: {INSTALL}"
        if isinstance(error, ImportError):
            return INSTALL
        files = _FILES if self.kind == "tokenizer" else "config.json"
        if self.repository == str(self.folder):
            return f"restore its files ({files})"
        origin = f"huggingface.co/{self.repository}"
        if self.folder is not None:
            return f"copy its files ({files}) from {origin} to {self.folder}"
        from huggingface_hub import constants

        return (
            f"copy {origin} to the cache ({constants.HF_HUB_CACHE}), or its files ({files}) to a "
            f"directory with the CLIP's open_clip_config.json and open_clip_model.safetensors, "
            f"and pass --clip DIRECTORY"
        )


def check_tokens(name: str, model: Any, tokenizer: Any, tokens: Tensor) -> None:
    """Check that tokens [N,L] are ones that a CLIP's text model was trained with.

    Raises:
        RichKDError: they are of another tokenizer.
    """
    tower = getattr(model, "text", model)
    size = getattr(model, "vocab_size", None)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    end: Any = getattr(tower, "eos_id", getattr(tower, "text_eos_id", None))
    pad = getattr(getattr(tower, "config", None), "pad_token_id", None)
    pads = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None)
    if size and int(tokens.max()) >= size:
        fault = f"gives token {int(tokens.max())}, the text model knows {size}"
    elif pool == "eos" and not tokens.eq(end).any(1).all():
        fault = f"does not end texts with token {end}, where the text model reads them"
    elif pad is not None and pads is not None and pad != pads:
        fault = f"pads with token {pads}, the text model with {pad}"
    else:
        return
    raise RichKDError(
        f"CLIP {name}: its tokenizer {fault}; copy the files of the tokenizer that it was trained "
        f"with",
        code="clip-tokenizer-mismatch",
    )

"""Networks with the weights that timm names for them, found in its caches or downloaded.

`resnet50.a1_in1k` names a network of timm and the tag of its weights; without a tag, timm has a
default. Most weights are in the cache of the Hugging Face hub, those that are published by an
address alone in torch hub's. timm's own loader adapts them to the number of classes and the size of
the images. Pickled code in them is never run.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from richkd.core.errors import RichKDError, first_line
from richkd.models import ZOO, check_names, create_pretrained
from richkd.models.hub_access import Fault, hub_fault, offline, planning, quiet
from richkd.models.registry import import_timm

_ABSENT = {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}  # of the hub's client
_SAFE_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch refuses both at once


def pretrained_config(name: str, flag: str) -> Any:
    """Return timm's configuration of a network's pretrained weights, without a download.

    Args:
        name: the network's name.
        flag: that asks for them, for the message.

    Raises:
        RichKDError: there is no such network, or timm names no weights of it.
    """
    check_names([name])
    timm, config = import_timm(), None
    plain = name.removeprefix("timm/").partition(".")[0]
    if name not in ZOO:
        try:
            config = timm.models.get_pretrained_cfg(name.removeprefix("timm/"))
        except RuntimeError:  # an unknown tag
            config = None
    if config is None or not config.has_weights:
        known = [] if name in ZOO else timm.list_pretrained(f"{plain}.*")
        hint = f"choose from {', '.join(known)}, or" if known else "leave it out, or"
        raise RichKDError(
            f"{flag} pretrained: timm names no published weights of {name}; {hint} give a file "
            f"({flag} FILE)",
            code="pretrained-weights-unknown",
        )
    return config


def load_pretrained(
    name: str,
    num_classes: int,
    image_size: int,
    settings: Mapping[str, Any],
    flag: str,
    fault: Fault = hub_fault,
) -> nn.Module:
    """Create a network with its pretrained weights; its classifier too, if it has as many classes.

    Args:
        name: the network's name.
        num_classes: the number of logits.
        image_size: the side of the images in pixels.
        settings: further arguments of timm's constructor.
        flag: that asks for the weights, for messages.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: there are no such weights, they are not in the cache and cannot be downloaded,
            do not fit, or are pickled code.
    """
    source, code = Source.of(pretrained_config(name, flag)), "pretrained-cannot-be-loaded"
    with loading(f"the pretrained weights of {name}", source, flag, code, fault):
        return create_pretrained(name, num_classes, image_size, settings)


@dataclass(frozen=True)
class Source:
    """Where weights are published: a repository on the hub, or an address."""

    repository: str  # OWNER/NAME, or OWNER/NAME@REVISION; empty for an address
    file: str = ""  # by which torch hub knows what is at the address

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the source that a configuration of timm names."""
        if config.hf_hub_id:
            return cls(config.hf_hub_id)
        address, file = (config.url, "") if isinstance(config.url, str) else config.url
        return cls("", file or Path(urllib.parse.urlsplit(address).path).name)

    @property
    def download(self) -> str:
        """The command that downloads a repository's configuration."""
        plain, _, revision = self.repository.partition("@")
        return f"hf download {plain} config.json" + f" --revision {revision}" * bool(revision)

    @property
    def place(self) -> Path:
        """The folder, or the file, in the cache."""
        from huggingface_hub import constants

        if not self.repository:
            return Path(torch.hub.get_dir()) / "checkpoints" / self.file
        plain = self.repository.partition("@")[0]
        return Path(constants.HF_HUB_CACHE) / f"models--{plain.replace('/', '--')}"


@contextmanager
def loading(what: str, source: Source, flag: str, code: str, fault: Fault) -> Iterator[None]:
    """Load from the caches alone if the hub is out of reach; explain every error in one line.

    Args:
        what: is loaded, for the message.
        source: where it is published.
        flag: by which the user gives a file instead.
        code: of the error.
        fault: returns why the hub cannot be reached.
    """
    unreachable = fault()
    try:
        with offline(unreachable is not None), quiet(), _weights_only():
            if not source.repository and unreachable and not source.place.is_file():
                # torch hub would wait for the network
                raise FileNotFoundError(f"{source.place} is missing, and {unreachable}")
            yield
    except RichKDError:
        raise
    except Exception as error:  # timm, torch and the hub raise errors of many kinds
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason, remedy = first_line(error), "download it again, or choose another network"
        if unreachable is not None and kinds & _ABSENT:
            reason = f"it is not in the cache, and {unreachable}"
        if "weights_only" in str(error) or "UnpicklingError" in kinds:
            reason = "its weights are a pickle that could run code"
            remedy = "choose a repository with model.safetensors"
        elif kinds & {*_ABSENT, "FileNotFoundError", "URLError", "ConnectError"}:
            remedy = f"without a network, copy {source.place} from a machine that has it"
            if fault is planning:
                remedy = f"get it first, e.g. by {source.download}"
            remedy += f", or pass {flag} FILE"
        raise RichKDError(f"cannot load {what}: {reason}; {remedy}", code=code) from None


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` refuse code, as timm's versions differ in what they ask for."""
    was = {name: os.environ.pop(name) for name in (_SAFE_ONLY, _UNSAFE) if name in os.environ}
    os.environ[_SAFE_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_SAFE_ONLY]
        os.environ.update(was)

"""Networks with the weights that timm names for them, found in the hub's cache or downloaded.

`resnet50.a1_in1k` names a network of timm and the tag of its weights; without a tag, timm has a
default. Its own loader adapts them to the number of classes and the size of the images. It reads
safetensors, or `torch.load` with `weights_only`.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from richkd.core.errors import RichKDError, first_line
from richkd.models import ZOO, check_names, create_pretrained
from richkd.models.hub_access import hub_fault, offline, quiet
from richkd.models.registry import import_timm


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
    fault: Callable[[], str | None] = hub_fault,
) -> nn.Module:
    """Create a network with its pretrained weights; its classifier too, if it has as many classes.

    Args:
        name: the network's name.
        num_classes: the number of logits.
        image_size: the side of the images in pixels.
        settings: further arguments of timm's constructor.
        flag: that asks for the weights, for messages.
        fault: returns why the hub cannot be reached, or None.

    Raises:
        RichKDError: there are no such weights, they are not in the cache and cannot be downloaded,
            or they do not fit.
    """
    config = pretrained_config(name, flag)
    unreachable = fault()
    try:
        with offline(unreachable is not None), quiet():
            return create_pretrained(name, num_classes, image_size, settings)
    except Exception as error:  # timm, torch and the hub raise errors of many kinds
        absent = isinstance(error, OSError)
        reason, remedy = first_line(error), f"give other weights ({flag} FILE)"
        if absent:
            place, told = _place(config), unreachable or reason
            reason = f"they are not in the cache, and {told}"
            remedy = f"copy {place} from a machine that has it, or give a file ({flag} FILE)"
        raise RichKDError(
            f"cannot load the pretrained weights of {name}: {reason}; {remedy}",
            code="pretrained-cannot-be-loaded",
        ) from None


def _place(config: Any) -> Path:
    """Return where the hub's cache, or torch's, keeps weights."""
    from huggingface_hub import constants

    if config.hf_hub_id:
        return Path(constants.HF_HUB_CACHE) / f"models--{config.hf_hub_id.replace('/', '--')}"
    file = Path(urllib.parse.urlsplit(config.url).path).name
    return Path(torch.hub.get_dir()) / "checkpoints" / file

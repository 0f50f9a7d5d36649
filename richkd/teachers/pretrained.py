"""Pretrained teachers by name: weights that timm finds in its caches, or downloads.

`resnet50.a1_in1k` and `timm/resnet50.a1_in1k` are a network of timm with the tag of its weights;
`hf-hub:OWNER/NAME` is a repository on the Hugging Face hub in timm's layout. Most weights are in
the hub's cache, those that are published by an address alone in torch hub's. Pickled code in them
is never run.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import nn

from richkd.config.settings import Precompute
from richkd.core.errors import RichKDError
from richkd.data.framing import NetworkInput
from richkd.models import check_names, hub_name, input_of, names_weights, timm_config
from richkd.models.hub_access import Fault, hub_fault, offline, planning, quiet
from richkd.models.pretrained import Source, loading
from richkd.models.registry import import_timm

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
_OF_A_FILE = "--teacher timm/NETWORK --teacher-weights"


def by_name(settings: Precompute) -> bool:
    """Return whether the teacher's weights are those that its name means."""
    return not settings.teacher_weights and names_weights(settings.teacher)


def check_teacher_name(settings: Precompute) -> None:
    """Check the name of pretrained weights; raise RichKDError if they cannot be meant."""
    name = settings.teacher
    if by_name(settings):
        check_name(name)
    elif hub_name(name) is not None:
        raise RichKDError(
            f"teacher {name} is a repository, which has its own weights; leave --teacher-weights "
            f"out, or name the network of that file, e.g. --teacher timm/resnet50",
            code="teacher-named-twice",
        )


def check_name(name: str) -> None:
    """Check that timm knows weights of this name, without a download.

    Of a repository on the hub, only the spelling is checked.

    Raises:
        RichKDError: there is no such network or tag, or nobody published its weights.
    """
    repository = hub_name(name)
    if repository is not None:
        if not _REPOSITORY.fullmatch(repository):
            raise RichKDError(
                f"teacher {name!r}: name a repository as hf-hub:OWNER/NAME",
                code="teacher-name-malformed",
            )
        return
    check_names([name])
    config = timm_config(name)
    if config is None or not config.has_weights:
        raise RichKDError(
            f"teacher {name!r}: timm names no published weights of it; choose another tag, or pass "
            f"--teacher-weights FILE",
            code="teacher-without-weights",
        )


@cache
def configuration(name: str, fault: Fault = hub_fault) -> Any:
    """Return timm's configuration of pretrained weights: input, classes and where they are.

    A repository's config.json, a few hundred bytes, is downloaded unless it is in the hub's cache.

    Args:
        name: a name that `check_name` accepts.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: the repository has no configuration that timm can read, or is out of reach.
    """
    repository = hub_name(name)
    if repository is None:
        return timm_config(name)
    models = import_timm().models
    with _loading(name, Source(repository), fault):
        found, architecture, _ = models.load_model_config_from_hf(repository)
        config = models.resolve_pretrained_cfg(architecture, pretrained_cfg=found)
        if not isinstance(config.num_classes, int):
            raise ValueError(f"num_classes in its config.json is {config.num_classes!r}")
        return config


def named_input(name: str, fault: Fault = hub_fault) -> NetworkInput:
    """Return the images that a pretrained teacher takes; raises as `configuration`, `input_of`."""
    return input_of(name, configuration(name, fault))


def load_named(name: str, fault: Fault = hub_fault) -> nn.Module:
    """Return a network with its pretrained weights and its own classifier, by timm's own loader.

    Args:
        name: a name that `check_name` accepts.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: the weights are not in the cache and cannot be downloaded, do not fit, or are
            pickled code.
    """
    config = configuration(name)
    with _loading(name, Source.of(config), fault):
        model: nn.Module = import_timm().create_model(_source(name), pretrained=True)
        return model


def blank_named(name: str) -> nn.Module:
    """Create the network with random weights, as costly as the real one; nothing is downloaded.

    Raises:
        RichKDError: a repository's configuration is not in the hub's cache.
    """
    configuration(name, planning)
    with quiet(), offline(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = import_timm().create_model(_source(name), pretrained=False)
        return model


def _source(name: str) -> str:
    """Return the name as timm's constructor takes it."""
    repository = hub_name(name)
    return name.removeprefix("timm/") if repository is None else f"hf-hub:{repository}"


def _loading(name: str, source: Source, fault: Fault) -> AbstractContextManager[None]:
    # a repository has no further name that a file of its weights could be given for
    flag = "--teacher-weights" if hub_name(name) is None else _OF_A_FILE
    return loading(f"teacher {name}", source, flag, "teacher-cannot-be-loaded", fault)

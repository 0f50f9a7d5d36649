"""The weights that a network starts from, if they are not drawn from the seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from richkd.data.framing import NetworkInput
from richkd.models import create_model, has_tag
from richkd.models.pretrained import load_pretrained, pretrained_config
from richkd.models.weights import (
    check_weights,
    file_sha256,
    find_state,
    load_into,
    read_note,
    read_weights,
    tensors_sha256,
)
from richkd.training.identity import DIGITS

PRETRAINED = "pretrained"

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of pixels


def describe_constants(constants: Constants) -> str:
    """Return mean and standard deviation as a message shows them."""
    mean, std = (",".join(f"{number:g}" for number in each) for each in constants)
    return f"mean {mean}, std {std}"


def recorded_constants(note: Mapping[str, str]) -> Constants | None:
    """Return mean and standard deviation that the metadata of weights record, or None."""
    if not {"mean", "std"} <= note.keys():
        return None
    try:
        seen = NetworkInput.of_note(note)
    except ValueError:  # another program's
        return None
    return seen.mean, seen.std


@dataclass(frozen=True, kw_only=True)
class Initial:
    """Weights in a file, or those that timm names for a network (`pretrained`).

    If the network they belong to has another number of classes, its classifier is left out.
    """

    weights: str  # a file, or `pretrained`
    name: str  # of the network, as in `create_model`
    num_classes: int
    image_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)  # likewise
    key: str = ""  # which weights of the file, as in `find_state`
    flag: str = "--student-weights"  # that names the weights, for messages
    key_flag: str = "--student-weights-key"  # likewise the key
    recorded: Constants | None = None  # `constants` of a file that is missing, if known

    def check(self) -> None:
        """Check, without reading or downloading them, that there may be such weights.

        Raises:
            RichKDError: timm names none, or the file is missing or something else.
        """
        if self.weights == PRETRAINED:
            pretrained_config(self.name, self.flag)
        else:
            check_weights(Path(self.weights))

    @cached_property
    def constants(self) -> Constants | None:
        """Mean and standard deviation of the images that the weights expect, if they are known.

        A file written by train-teacher records them; otherwise the tag in the network's name tells.
        """
        path, found = Path(self.weights), self.recorded
        if self.weights != PRETRAINED and path.is_file():
            found = recorded_constants(read_note(path))
        if found is not None:
            return found
        if self.weights != PRETRAINED and not has_tag(self.name):
            return None
        config = pretrained_config(self.name, self.flag)
        return tuple(config.mean), tuple(config.std)

    def digest(self, recorded: str | None) -> str:
        """Return the first digits of the SHA-256 of the weights, once they are known to fit.

        Args:
            recorded: of a training that goes on without them, because it has a checkpoint. Nothing
                is loaded or downloaded for it, but a file that exists is compared.

        Raises:
            RichKDError: the weights are needed, and cannot be read or do not fit.
        """
        path, is_file = Path(self.weights), self.weights != PRETRAINED
        if recorded is not None and not (is_file and path.exists()):
            return recorded
        if is_file:
            check_weights(path)
        tensors = self._found[0] if recorded is None else {}
        return file_sha256(path)[:DIGITS] if is_file else tensors_sha256(tensors)[:DIGITS]

    def load(self, model: nn.Module, seen: Constants, log: Callable[[str], None]) -> None:
        """Load the weights into a network that `create_model` returned, and log what was done.

        Args:
            model: the network.
            seen: mean and standard deviation by which its images are normalised.
            log: called with a line.

        Raises:
            RichKDError: they do not fit it, apart from its classifier.
        """
        tensors, what = self._found
        own = model.state_dict()
        model.load_state_dict({name: tensors.get(name, tensor) for name, tensor in own.items()})
        log(f"{what}; {self._describe_input(seen)}")

    @cached_property
    def _found(self) -> tuple[dict[str, Tensor], str]:
        """The weights by the network's own names, and a line that describes them."""
        with torch.random.fork_rng(devices=[]):  # networks are created, and their weights replaced
            return self._of_timm() if self.weights == PRETRAINED else self._of_file()

    def _of_file(self) -> tuple[dict[str, Tensor], str]:
        path = Path(self.weights)
        content = read_weights(path)
        own = self._new(self.num_classes).state_dict()
        where = {"key": self.key, "flag": self.key_flag}
        state, _ = find_state(own, content, self.name, path, **where)
        misfits = {name for name, tensor in own.items() if state[name].shape != tensor.shape}
        classes = self.num_classes
        counts = {int(state[name].shape[0]) for name in misfits if state[name].ndim}
        if misfits and misfits <= self._head and len(counts) == 1:
            classes = counts.pop()
        donor = self._new(classes)
        unwrapped = load_into(donor, content, self.name, path, **where)
        tensors = donor.state_dict()
        loaded = unwrapped or f"loaded the weights from {path}"
        return self._without_head(tensors, classes), f"{loaded}; {self._describe_head(classes)}"

    def _of_timm(self) -> tuple[dict[str, Tensor], str]:
        config = pretrained_config(self.name, self.flag)
        found = _load_pretrained(
            self.name, self.num_classes, self.image_size, json.dumps(self.settings), self.flag
        )
        tensors = self._without_head(found, config.num_classes)
        where = f"loaded timm's weights {config.architecture}.{config.tag}"
        return tensors, f"{where}; {self._describe_head(config.num_classes)}"

    def _without_head(self, tensors: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
        if classes == self.num_classes:
            return tensors
        return {name: tensor for name, tensor in tensors.items() if name not in self._head}

    def _describe_head(self, classes: int) -> str:
        if classes == self.num_classes:
            return f"with its classifier, whose {classes} classes are taken to be these in order"
        return (
            f"its classifier has {classes} classes and not {self.num_classes}, so a new one is "
            f"drawn from the seed"
        )

    def _describe_input(self, seen: Constants) -> str:
        if self.constants is None:
            return f"what they expect is unknown; images have {describe_constants(seen)}"
        if self.constants == seen:
            return f"images have {describe_constants(seen)}, as they expect"
        return (
            f"they expect images of {describe_constants(self.constants)}, but the student sees "
            f"those of the cache, {describe_constants(seen)}"
        )

    @cached_property
    def _head(self) -> set[str]:
        """The names of the classifier's entries: those whose shape follows the classes."""
        ours, others = (self._new(self.num_classes + more).state_dict() for more in (0, 1))
        return {name for name, tensor in ours.items() if tensor.shape != others[name].shape}

    def _new(self, classes: int) -> nn.Module:
        return create_model(self.name, classes, image_size=self.image_size, **self.settings)


@lru_cache(2)  # the runs of a sweep share them
def _load_pretrained(
    name: str, num_classes: int, image_size: int, settings: str, flag: str
) -> dict[str, Tensor]:
    model = load_pretrained(name, num_classes, image_size, json.loads(settings), flag)
    return dict(model.state_dict())

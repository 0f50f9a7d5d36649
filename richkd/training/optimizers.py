"""Optimizers by name, and everything that their steps change as tensors by name.

`sgd` is PyTorch's and applies weight decay to every parameter, as in the published code. All others
come from timm's factory, which spares biases, norms and what a network names itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from richkd.config.settings import Training
from richkd.core.errors import RichKDError, first_line, nearest, unknown
from richkd.training.device import cuda

SGD = "sgd"
CAPTURABLE = {SGD, "adam", "adamw"}  # as CUDA graphs: their state and rate lie on the device
# Arguments that are settings, or that follow from the device.
_OWN = {"self", "params", "lr", "momentum", "weight_decay", "capturable", "fused", "differentiable"}
_MOMENTUM = 0.9  # the default, which says nothing about optimizers that have none


def check_optimizer(settings: Training) -> None:
    """Check that there is such an optimizer, and that it takes the settings.

    Raises:
        RichKDError: an unknown name or option, or a value that the optimizer refuses.
    """
    if settings.optimizer == SGD and not settings.optimizer_options:
        return
    timm, name, known = _timm(), settings.optimizer, optimizer_names()
    if name not in known:
        raise unknown("optimizer", name, known)
    takes = {
        *inspect.signature(timm.get_optimizer_class(name, bind_defaults=False)).parameters
    } - _OWN
    takes -= {"nesterov"} if name == SGD else set()
    for option in settings.optimizer_options:
        if option not in takes:
            raise RichKDError(
                f"optimizer {name} has no option {option!r}; {nearest(option, takes)}",
                code="unknown-option",
            )
    if settings.momentum != _MOMENTUM and not timm.get_optimizer_info(name).has_momentum:
        raise RichKDError(
            f"momentum = {settings.momentum}: optimizer {name} has none; leave it out, or see its "
            f"options ({', '.join(sorted(takes))}) for --optimizer-set",
            code="value-out-of-range",
        )
    try:
        _create(nn.Linear(2, 2), nn.Module(), settings, settings.lr or 1.0)
    except Exception as error:  # of whichever kind the optimizer raises
        given = ", ".join(f"{key} = {value!r}" for key, value in settings.optimizer_options.items())
        raise RichKDError(
            f"optimizer {name} refuses {given or 'its settings'}: {first_line(error)}; correct "
            f"--optimizer-set",
            code="option-out-of-range",
        ) from None


def optimizer_names() -> list[str]:
    """Return the names of the optimizers, without those that cannot be used here.

    These need packages of their own (Apex, bitsandbytes) or second derivatives, or draw random
    numbers that no checkpoint holds (Kron).
    """
    timm = _timm()
    infos = {name: timm.get_optimizer_info(name) for name in timm.list_optimizers()}
    return [
        name
        for name, info in infos.items()
        if not isinstance(info.opt_class, str)
        and not info.second_order
        and not name.startswith("kron")
    ]


def make_optimizer(
    model: nn.Module, method: nn.Module, settings: Training, device: torch.device
) -> tuple[torch.optim.Optimizer, Tensor | None]:
    """Create the optimizer of a student and its method.

    Returns:
        The optimizer. On a GPU, if its steps can be captured: its learning rate on the device.
    """
    assert settings.lr is not None  # resolved before, since it depends on the network
    captured = cuda(device) and settings.optimizer in CAPTURABLE
    if not captured or settings.optimizer_options.get("amsgrad"):
        return _create(model, method, settings, settings.lr), None
    on_device = (
        {"fused": True} if settings.optimizer == SGD else {"fused": True, "capturable": True}
    )
    optimizer = _create(model, method, settings, settings.lr, **on_device)
    # as the first step would, but before the graphs are captured, which keep the addresses
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].update(_initial_state(settings.optimizer, parameter))
    rate = torch.tensor(settings.lr, device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer, rate


def _initial_state(name: str, parameter: Tensor) -> dict[str, Tensor]:
    if name == SGD:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _create(
    model: nn.Module, method: nn.Module, settings: Training, lr: float, **on_device: bool
) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        **settings.optimizer_options,
        **on_device,
    }
    if settings.optimizer == SGD:
        parameters = [*model.parameters(), *method.parameters()]
        return torch.optim.SGD(parameters, nesterov=settings.nesterov, **arguments)
    timm, groups = _timm(), []
    for module in (model, method):
        spared: Any = getattr(module, "no_weight_decay", set)
        groups += timm.param_groups_weight_decay(
            module, settings.weight_decay, no_weight_decay_list=spared()
        )
    optimizer: torch.optim.Optimizer = timm.create_optimizer_v2(
        groups, settings.optimizer, **arguments
    )
    return optimizer


def _timm() -> Any:
    """Import timm's optimizers, which takes about a second."""
    import timm.optim

    return timm.optim


# --- its state in checkpoints --------------------------------------------------------------------

# `momentum.N` is the momentum of parameter N, as earlier versions wrote it; `optimizer.N.KEY` is
# any other tensor, and `number.N.KEY` a Python number. N is `groupM` for the group of parameters M.
_NAME = re.compile(r"momentum\.(\d+)|(?:optimizer|number)\.(\d+|group\d+)\.(.+)")
_MOMENTUM_BUFFER, _STEP = "momentum_buffer", "step"
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def state_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return everything that steps change in an optimizer, by name; numbers become scalars.

    Args:
        optimizer: the optimizer.
        parameters: in the order that numbers them in the names.
    """
    found = {}
    for label, table in _tables(optimizer, parameters).items():
        for key in _changing(label, table):
            value = table[key]
            if not isinstance(value, Tensor):
                found[f"number.{label}.{key}"] = torch.tensor(value, dtype=_DTYPES[type(value)])
            elif key == _MOMENTUM_BUFFER:
                found[f"momentum.{label}"] = value
            else:
                found[f"optimizer.{label}.{key}"] = value
    return found


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Load what `state_of` returned; tensors that exist are filled in place.

    Args:
        optimizer: as in `state_of`.
        parameters: likewise.
        tensors: by name; those of other things are ignored.

    Raises:
        KeyError: there is no such parameter.
    """
    tables = _tables(optimizer, parameters)
    wanted = {}
    for name, tensor in tensors.items():
        if found := _NAME.fullmatch(name):
            label, key = found[1] or found[2], found[3] or _MOMENTUM_BUFFER
            wanted[label, key] = tensor.item() if name.startswith("number.") else tensor
    for label, table in tables.items():
        for key in _changing(label, table):
            if (label, key) not in wanted:  # the first step created it
                del table[key]
    for (label, key), value in wanted.items():
        table = tables[label]
        now = table.get(key)
        if not isinstance(value, Tensor):
            table[key] = value
        elif isinstance(now, Tensor) and now.shape == value.shape:
            now.copy_(value)
        elif label.isdigit():
            table[key] = _placed(key, value, parameters[int(label)])
        else:
            table[key] = value.clone()


def _tables(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Return what an optimizer keeps of each parameter, by its number, and its groups."""
    groups = enumerate(optimizer.param_groups)
    return {
        **{str(number): optimizer.state[each] for number, each in enumerate(parameters)},
        **{f"group{number}": group for number, group in groups},
    }


def _changing(label: str, table: Mapping[str, Any]) -> list[str]:
    """Return the keys of what steps change; of a group, all but its number of steps is settings."""
    kept = [key for key, value in table.items() if value is not None]
    return kept if label.isdigit() else [key for key in kept if key == _STEP]


def _placed(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    """Copy a tensor to where an optimizer keeps it: with its parameter, but steps on the host."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to("cpu" if key == _STEP else parameter.device, copy=True)

"""Batch norm over several processes: PyTorch's own over the whole batch, in f64."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import Tensor, nn

from richkd.config.settings import Distill
from richkd.core.ranks import Ranks
from richkd.training.batch_norm import local_layers, synchronized, whole_batch
from richkd.training.parallel import Parallel

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = (5, 2)  # of two processes' slices


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Run a function as each of two processes, which are threads here; their sums are taken."""
    own, met, sent = threading.local(), threading.Barrier(2, timeout=60), [Tensor(), Tensor()]

    def all_reduce(tensor: Tensor) -> None:
        sent[own.rank] = tensor.clone()
        met.wait()
        tensor.copy_(sum(sent))
        met.wait()

    def as_rank(compute: Callable[[int], Any], rank: int) -> Any:
        own.rank = rank
        return compute(rank)

    def run(compute: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(as_rank, [compute] * 2, range(2))]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return run


def ends(layer: nn.Module, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """The output of a step, the gradients of x and of the parameters, and the buffers."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(slope)
    assert x.grad is not None
    gradients = [each.grad for each in layer.parameters()]
    return y.detach(), x.grad, *gradients, *layer.buffers()  # type: ignore[return-value]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm1d(3),
        BatchNormAct2d(3),
    ],
    ids=["2d", "plain", "untracked", "cumulative", "1d", "timm"],
)
def test_two_processes_normalise_the_whole_batch(
    layer: nn.Module, together: Callable[[Callable[[int], Any]], list[Any]]
) -> None:
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    shape = (sum(SIZES), 3) if isinstance(layer, nn.BatchNorm1d) else (sum(SIZES), 3, 4, 5)
    x, slope = (3 + torch.randn(shape, dtype=torch.float64) for _ in range(2))
    layers = [synchronized(copy.deepcopy(layer), CPU) for _ in SIZES]
    parts = [*zip(x.split(SIZES), slope.split(SIZES), strict=True)]
    own = together(lambda rank: ends(layers[rank], *parts[rank]))
    count = len([*layer.parameters()])
    whole = ends(layer, x, slope)
    for number, (expected, *found) in enumerate(zip(whole, *own, strict=True)):
        if number < 2:  # of samples
            joined = torch.cat(found)
        elif number < 2 + count:  # gradients that are added up by DistributedDataParallel
            joined = found[0] + found[1]
        else:  # running statistics
            assert torch.equal(*found)
            joined = found[0]
        torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    evaluated = [each.eval()(x) for each in (layer, *layers)]
    torch.testing.assert_close(evaluated[1], evaluated[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), BatchNormAct2d(3)], ids=["2d", "timm"])
def test_a_batch_that_all_have_is_normalised_by_each(
    layer: nn.Module, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is exchanged; the layers for GPUs are on a CPU here, and would refuse its tensors."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    expected, own = copy.deepcopy(layer), synchronized(copy.deepcopy(layer), device)
    x, slope = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with whole_batch():
        found = ends(own, x, slope)
    assert all(map(torch.equal, ends(expected, x, slope), found))
    assert own.state_dict().keys() == layer.state_dict().keys()


def parallel(rank: int, **given: Any) -> Parallel:
    settings = Distill(cache="c.zarr", batch_size=4, **given)
    return Parallel(Ranks(rank, 2), settings, CPU, 5)


def test_layers_that_cannot_span_processes_are_averaged_and_named(
    together: Callable[[Callable[[int], Any]], list[Any]],
) -> None:
    said: list[str] = []

    def averaged(rank: int) -> nn.Module:
        torch.manual_seed(rank)
        model = nn.Sequential(EvoNorm2dB0(3), nn.BatchNorm2d(3))
        own = parallel(rank)
        model = own.network(model, said.append)
        model[0](torch.randn(4, 3, 2, 2))
        model[1].running_var.fill_(rank)
        assert [*local_layers(model)] == [model[0]]
        own.average_statistics([model])
        return model

    first, second = together(averaged)
    assert torch.equal(first[0].running_var, second[0].running_var)
    assert not torch.equal(first[1].running_var, second[1].running_var)  # it needs no average
    assert len(said) == 2 and all("EvoNorm2dB0" in line for line in said)
    with_local = parallel(0, batch_norm="local").network(nn.BatchNorm2d(3), said.append)
    assert len(local_layers(with_local)) == 1 and len(said) == 2


class Dropped(nn.Module):
    """A network whose logits are its images after dropout."""

    def forward_features(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x

    def get_classifier(self) -> nn.Module:
        return nn.Sequential()


def test_masks_differ_except_in_a_batch_that_all_have() -> None:
    """A last batch of one image cannot be shared by two processes."""

    def epoch(rank: int) -> list[Tensor]:
        own, images = parallel(rank), torch.ones(2, 64)
        torch.manual_seed(0)
        own.seed(0, 1)
        batches = own.steps([images, images], 5)
        return [own.forward(Dropped(), batch)[0] for batch in batches] + [torch.rand(3)]

    (shared, last, drawn), (other, other_last, other_drawn) = epoch(0), epoch(1)
    assert not torch.equal(shared, other)
    assert torch.equal(last, other_last) and torch.equal(drawn, other_drawn)

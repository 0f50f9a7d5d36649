"""Batch norm over the samples of all processes (Ioffe & Szegedy 2015, arXiv 1502.03167).

On GPUs it is PyTorch's SyncBatchNorm, which takes no tensors on a CPU. There, the layers of the
network compute the same from sums over all processes. A batch that all processes have in whole is
no sum of theirs: each normalises it as one process would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from richkd.training.device import cuda


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a network whose batch norms span all processes; its parameters and names stay."""
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    if cuda(device):
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    known = {_BatchNorm.forward, BatchNormAct2d.forward}
    for module in model.modules():
        own = type(module)
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = type(own.__name__, (_OnGpus, own), {})
        elif isinstance(module, _BatchNorm) and own.forward in known:
            module.__class__ = type(f"Synchronized{own.__name__}", (_OnCpus, own), {})
    return model


@contextmanager
def whole_batch() -> Iterator[None]:
    """Let all processes have the same batch: each normalises it for itself."""
    _Synchronized.whole = True
    try:
        yield
    finally:
        _Synchronized.whole = False


def local_layers(model: nn.Module) -> dict[nn.Module, list[Tensor]]:
    """Return the layers that see the samples of one process, each with its running statistics."""
    layers = {
        module: [
            buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name.startswith("running_") and buffer.is_floating_point()
        ]
        for module in model.modules()
        if not isinstance(module, _Synchronized)
    }
    return {module: running for module, running in layers.items() if running}


class _Synchronized(_BatchNorm):
    """The part of a synchronised layer that differs from the layer itself."""

    whole = False  # in `whole_batch`

    def _finish(self, y: Tensor) -> Tensor:
        """Return y after what timm's layers do with it."""
        for name in ("drop", "act"):
            y = getattr(self, name, _same)(y)
        return y


class _OnGpus(_Synchronized):
    def forward(self, x: Tensor) -> Tensor:
        return self._finish(_BatchNorm.forward(self, x)) if self.whole else super().forward(x)


class _OnCpus(_Synchronized):
    def forward(self, x: Tensor) -> Tensor:
        if self.whole or not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, variance, count)
        return self._finish(y)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics, as nn.BatchNorm does."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def _same(x: Tensor) -> Tensor:
    return x


class _Normalize(torch.autograd.Function):
    """Normalises by mean and variance over all processes, then scales and shifts.

    As in SyncBatchNorm, scale and shift get the gradient of a process's own samples.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y [B,C,…], and mean [C], biased variance [C] and count over all processes, f64."""
        axes = [0, *range(2, x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()
        own, center = (each.double() for each in torch.var_mean(wide, axes, correction=0))
        count = own.new_full((1,), x.numel() // x.shape[1])
        sums = torch.cat([count, count * center, count * (own + center.square())])
        dist.all_reduce(sums)
        count, mean, square = torch.split(sums, [1, len(own), len(own)])
        mean, square = mean / count, square / count
        variance = (square - mean.square()).clamp_min(0)
        inverse = (variance + eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = torch.addcmul(_along(shift, wide), wide, _along(scale, wide)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, scale and shift; that of x reaches all processes."""
        x, weight, mean, inverse, count = ctx.saved_tensors
        axes = [0, *range(2, x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()
        slope = gradients[0].to(wide.dtype)
        normal = (wide - _along(mean, wide)) * _along(inverse, wide)
        of_shift, of_scale = slope.sum(axes), (slope * normal).sum(axes)
        sums = torch.cat([of_shift, of_scale]).double()
        dist.all_reduce(sums)
        shift, scale = (sums / count).split(len(mean))
        slope = slope - _along(shift, wide) - normal * _along(scale, wide)
        factor = inverse if weight is None else inverse * weight
        dx = (slope * _along(factor, wide)).to(x.dtype)
        if weight is None:
            return dx, None, None, None
        return dx, of_scale.to(weight.dtype), of_shift.to(weight.dtype), None


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Return a number per channel [C] in the dtype of x [B,C,…], shaped to broadcast over it."""
    return values.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))

"""One student on several processes: each runs the network on its slice of every batch.

The network is parallel, the loss is not: logits, features, labels and rows are gathered in the
order of the whole batch, and every process computes the whole loss with the same random numbers. A
method is thus as in one process, whatever relations of samples or memory banks it has, and metrics
need no reduction. DistributedDataParallel averages the gradients. Those of the method are the same
everywhere, and stay so; those of the student are of one slice each, so `_Gather` multiplies them by
the number of processes, and the average is their sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from richkd.config.settings import Distill
from richkd.core.errors import RichKDError
from richkd.core.ranks import Ranks
from richkd.core.seeds import derive_seed
from richkd.losses.method import Batch
from richkd.models import forward
from richkd.training.batch_norm import local_layers, synchronized, whole_batch
from richkd.training.device import cuda, default_generator

T = TypeVar("T")


@dataclass(frozen=True)
class Slices:
    """The slice of every batch that is one process's.

    A last batch with fewer than `least` samples a process is computed in whole by each of them:
    some layers cannot take an empty batch.
    """

    ranks: Ranks
    batch_size: int
    least: int = 1

    def each(self, size: int) -> list[int]:
        """Return the sizes of all processes' slices of a batch; empty if each takes the whole."""
        world = self.ranks.world
        if size < self.least * world:
            return []
        return [size // world + (rank < size % world) for rank in range(world)]

    def own(self, size: int) -> slice:
        """Return where in a batch this process's samples are."""
        each, rank = self.each(size), self.ranks.rank
        return slice(sum(each[:rank]), sum(each[: rank + 1])) if each else slice(0, size)

    def own_sizes(self, count: int) -> list[int]:
        """Return the sizes of this process's slices of the batches of `count` entries."""
        slices = map(self.own, batch_sizes(count, self.batch_size))
        return [own.stop - own.start for own in slices]

    def of(self, order: Tensor) -> Tensor:
        """Return the part of an epoch's order that is this process's."""
        batches = torch.split(order, self.batch_size)
        return torch.cat([batch[self.own(len(batch))] for batch in batches])


class Parallel:
    """What a trainer needs to train with the other processes of its job."""

    def __init__(self, ranks: Ranks, settings: Distill, device: torch.device, count: int) -> None:
        """Check the settings; nothing is exchanged.

        Args:
            ranks: of the job.
            settings: how to train.
            device: of this process.
            count: number of training samples.

        Raises:
            RichKDError: there are too few samples, or the runner does not take several processes.
        """
        check_ranks(ranks, settings, count)
        self.ranks = ranks
        self.device = device
        self.slices = slices_of(ranks, settings)
        self.local_norms = settings.batch_norm == "local"
        self._whole = 0  # size of the batch of the current step
        self._drawn: Tensor | None = None  # the state of the student's own random numbers

    def network(self, model: nn.Module, log: Callable[[str], None]) -> nn.Module:
        """Return the network with the batch norms that the settings ask for; log what differs."""
        if self.local_norms:
            return model
        model = synchronized(model, self.device)
        if kinds := sorted({type(layer).__name__ for layer in local_layers(model)}):
            log(
                f"{', '.join(kinds)} cannot span processes: each sees the samples of one process, "
                f"and its running statistics are averaged after every epoch"
            )
        return model

    def wrap(self, model: nn.Module, method: nn.Module, objective: Callable[..., Any]) -> nn.Module:
        """Return the objective as a module that averages gradients; all processes must call it.

        Parameters without a gradient are found in the first step, and buffers are not sent: all
        processes change them in the same way, or `average_statistics` does.
        """
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # new names
            return DistributedDataParallel(
                _Objective(model, method, objective),
                broadcast_buffers=False,
                init_sync=False,
                gradient_as_bucket_view=True,
                static_graph=True,
            )

    def seed(self, seed: int, epoch: int) -> None:
        """Seed the student's own random numbers of an epoch: each process has other ones."""
        own = torch.Generator(self.device).manual_seed(derive_seed(seed, epoch, 3, self.ranks.rank))
        self._drawn = own.get_state()

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features; masks of dropout are drawn from the student's own numbers.

        The numbers that the method draws stay the same in all processes. So does all that they
        compute of a batch that each of them has in whole.
        """
        if not self.slices.each(self._whole):
            with whole_batch():
                return forward(model, images)
        generator = default_generator(self.device) if cuda(self.device) else torch.default_generator
        shared = generator.get_state()
        if self._drawn is not None:
            generator.set_state(self._drawn)
        result = forward(model, images)
        self._drawn = generator.get_state()
        generator.set_state(shared)
        return result

    def steps(self, slices: Iterable[T], count: int) -> Iterator[T]:
        """Yield this process's slices of an epoch of `count` entries, each for a step."""
        sizes = batch_sizes(count, self.slices.batch_size)
        for batch, self._whole in zip(slices, sizes, strict=True):
            yield batch

    def share(self, ids: Tensor) -> Tensor:
        """Return this process's share of some ids, which may be empty."""
        return torch.tensor_split(ids, self.ranks.world)[self.ranks.rank]

    def gather(self, batch: Batch) -> Batch:
        """Return the whole batch, from the slices of all processes."""
        each = self.slices.each(self._whole)
        if not each:
            return batch
        own = {field.name: getattr(batch, field.name) for field in fields(batch)}
        own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        own = {name: value for name, value in own.items() if value.ndim}  # not the epoch
        values = _Gather.apply(each, self.ranks.rank, *own.values(), *batch.rows.values())
        whole = dict(zip(own, values, strict=False))
        rows = dict(zip(batch.rows, values[len(own) :], strict=True))
        return replace(batch, **whole, rows=rows)

    @torch.no_grad()
    def average_statistics(self, models: Iterable[nn.Module]) -> None:
        """Average the running statistics of layers that saw only the samples of a process."""
        for model in models:
            for buffer in chain(*local_layers(model).values()):
                dist.all_reduce(buffer)
                buffer.div_(self.ranks.world)

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of counts over all processes."""
        dist.all_reduce(counts)
        return counts

    def of_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of rank 0, on the CPU, in all processes."""
        about = self.ranks.from_first(
            lambda: [(name, each.shape, each.dtype) for name, each in tensors.items()]
        )
        received = {}
        for name, shape, dtype in about:
            first = self.ranks.first
            tensor = tensors[name].cpu().contiguous() if first else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
            received[name] = tensor
        return received


class _Objective(nn.Module):
    """Holds the parameters whose gradients are averaged; its call is the objective."""

    def __init__(self, model: nn.Module, method: nn.Module, objective: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.method, self.forward = model, method, objective


class _Gather(torch.autograd.Function):
    """Concatenates tensors [b,…] of all processes to [B,…], in one exchange of bytes.

    The gradient of a process's slice is multiplied by their number; see above.
    """

    @staticmethod
    def forward(ctx: Any, each: list[int], rank: int, *own: Tensor) -> tuple[Tensor, ...]:
        """Gather; `each` has the number b of every process."""
        ctx.set_materialize_grads(False)
        ctx.each, ctx.rank = each, rank
        count = each[rank]
        columns = [part.reshape(count, -1).contiguous().view(torch.uint8) for part in own]
        packed = F.pad(torch.cat(columns, 1), (0, 0, 0, max(each) - count))
        slices = [torch.empty_like(packed) for _ in each]
        dist.all_gather(slices, packed)
        whole = torch.cat([part[:count] for part, count in zip(slices, each, strict=True)])
        parts = torch.split(whole, [column.shape[1] for column in columns], 1)
        gathered = tuple(
            column.clone(memory_format=torch.contiguous_format)
            .view(part.dtype)
            .view(-1, *part.shape[1:])
            for column, part in zip(parts, own, strict=True)
        )
        constant = [
            whole for whole, part in zip(gathered, own, strict=True) if not part.requires_grad
        ]
        ctx.mark_non_differentiable(*constant)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of this process's slices."""
        start, world = sum(ctx.each[: ctx.rank]), len(ctx.each)
        own = slice(start, start + ctx.each[ctx.rank])
        return None, None, *(None if each is None else each[own] * world for each in gradients)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Return the sizes of the batches of `count` entries."""
    full, rest = divmod(count, batch_size)
    return [batch_size] * full + [rest] * (rest > 0)


def slices_of(ranks: Ranks, settings: Distill) -> Slices:
    """Return the slices of a training's batches that are one process's."""
    # over one sample, batch norm has no variance
    return Slices(ranks, settings.batch_size, least=2 if settings.batch_norm == "local" else 1)


def check_ranks(ranks: Ranks, settings: Distill, count: int) -> None:
    """Check that a training of `count` samples can be shared; raise RichKDError if not."""
    least = slices_of(ranks, settings).least
    available = min(settings.batch_size, count)
    if available < least * ranks.world:
        what = f"batches of {available}" if available < count else f"{count} training samples"
        need = " (--batch-norm local needs two for each)" if least > 1 else ""
        raise RichKDError(
            f"{ranks.world} processes cannot share {what}{need}; start fewer with torchrun "
            f"--nproc-per-node, or raise --batch-size",
            code="more-ranks-than-samples",
        )
    if settings.step not in ("auto", "eager"):
        raise RichKDError(
            f"step = {settings.step!r}: the steps of {ranks.world} processes are eager; remove "
            f"--step, or train in one process",
            code="ranks-step",
        )


def device_of(ranks: Ranks, device: str) -> str:
    """Return the name of a process's own device; raise RichKDError if it cannot have one."""
    if ranks.world == 1 or device == "cpu":
        return device
    if device not in ("auto", "cuda"):
        raise RichKDError(
            f"device = {device!r}: each of {ranks.world} processes takes its own GPU; give cpu, "
            f"cuda or auto",
            code="ranks-device",
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and ranks.here > gpus:
        raise RichKDError(
            f"{ranks.here} processes on this machine cannot share {gpus} GPU{'s' * (gpus > 1)}; "
            f"start one for each GPU, or pass --device cpu",
            code="more-ranks-than-gpus",
        )
    return f"cuda:{ranks.local}" if gpus else device

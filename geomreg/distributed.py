"""The one convention for several processes.

The gradient that DDP averages over ranks with equal batches equals the single-process gradient on the concatenated
batch. A loss that is a mean over samples is taken over the rank's own batch (unequal batches weigh each rank alike). A
loss over pairs of samples is taken, on every rank, over the rows of all ranks (:func:`gathered_rows`), whose backward pass
sums what the ranks send back. Statistics that a term keeps (running means) are reduced over all ranks before they are
committed, so they are identical everywhere; these reductions carry no gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["all_reduce_max", "all_reduce_sum", "gathered_rows", "world_size"]


def world_size() -> int:
    """Number of processes of the default group; 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum of ``value`` over all processes, without gradient; ``value`` itself in a single process."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(value: int, device: torch.device) -> int:
    """Largest ``value`` of all processes; waits for the device."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def gathered_rows(value: Tensor, training: bool = True) -> Tensor:
    """Rows of all processes in order of rank, with gradient; their numbers may differ. ``value`` itself in a single
    process, and outside of training, where not every process need take part."""
    if world_size() == 1 or not training:
        return value
    count = torch.tensor([len(value)], device=value.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    rows: Tensor = _Gathered.apply(value, torch.cat(counts).tolist())
    return rows


class _Gathered(torch.autograd.Function):
    """All rows; the gradient is the sum of what every process sends back to them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, counts: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(counts[: dist.get_rank()]), len(value)
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None

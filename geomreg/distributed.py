"""The one convention for several processes.

The gradient that DDP averages over ranks equals the single-process gradient on the concatenated batch, also where the
ranks' batches differ in size. A loss that is a mean over samples is taken over the rank's own batch and weighted by its
number of rows (:func:`weighted_by_rows`), so that the mean over ranks is the mean over all rows. A loss over pairs of
samples is taken, on every rank, over the rows of all ranks (:func:`gathered_rows`), whose backward pass sums what the ranks
send back. Both are collective in training mode: every rank calls the same terms in the same order. In evaluation mode a term
looks at its own rank alone and may be called by one. Statistics that a term keeps (running means) are reduced over all
ranks before they are committed, so they are identical everywhere; these reductions carry no gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from geomreg.chunks import current_pass

__all__ = ["all_reduce_max", "all_reduce_sum", "gathered_rows", "wait_for_step", "weighted_by_rows", "world_size"]


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


def weighted_by_rows(means: Iterable[tuple[Tensor, int]], training: bool = True) -> Tensor:
    """Sum of at most two means over rows of this process, each given with its number of rows and weighted by it.

    Over all processes the mean of what is returned is the mean over all their rows; with equal batches, in a single process and
    outside of training it is the plain sum. The chunks of a separable pass share the weight of their whole batch, so that processes
    may have different numbers of chunks.

    Args:
        means: 0-d tensors with the number of rows each is over.
        training: whether every process takes part.
    """
    values, rows = zip(*means, strict=True)
    if world_size() > 1 and training:
        one_pass = current_pass()
        if one_pass is None:
            weights = _weights(list(rows), values[0].device)
            values = tuple(weight.to(value.dtype) * value for weight, value in zip(weights, values, strict=True))
        else:
            if one_pass.weight is None:
                one_pass.weight = _weights([one_pass.rows], values[0].device)[0]
            values = tuple(one_pass.weight.to(value.dtype) * value for value in values)
    total: Tensor = sum(values[1:], start=values[0])
    return total


def _weights(rows: list[int], device: torch.device) -> Tensor:
    """Rows of this process by the mean number of rows of a process: exactly 1 where all are equal."""
    total = _counted(0, rows, device)[1 : 1 + len(rows)]
    return torch.tensor(rows, device=device) * world_size() / total.double()


def _counted(waiting: int, rows: list[int], device: torch.device) -> Tensor:
    """Over all processes: those that wait in :func:`wait_for_step`, and rows of each modality."""
    total = torch.tensor([waiting, *rows, *[0] * (2 - len(rows))], device=device)
    dist.all_reduce(total)
    return total


def wait_for_step(device: torch.device) -> None:
    """Return when all processes have called this; until then, answer with no rows wherever another weights its batch.

    A process may so have fewer training forwards than the others before a step, or none. Waits for the device.
    """
    if world_size() > 1:
        while int(_counted(1, [], device)[0]) < world_size():
            pass


def gathered_rows(value: Tensor, training: bool = True) -> Tensor:
    """Rows of all processes in order of rank, with gradient; their numbers may differ. ``value`` itself in a single
    process, and outside of training, where not every process need take part. A chunk of a separable pass is refused."""
    if training and current_pass() is not None:
        raise ValueError(
            "gathered_rows: expected the rows of a whole batch, got those of a chunk in backward(separable=True). Leave separable out."
        )
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

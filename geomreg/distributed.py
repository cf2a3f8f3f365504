"""The one convention for several processes.

The gradient that DDP averages over ranks with equal batches equals the single-process gradient on the concatenated
batch. A loss that is a mean over samples is taken over the rank's own batch. A loss over pairs of samples is taken, on
every rank, over the rows of all ranks (:func:`gathered_rows`), whose backward pass sums what the ranks send back.
Statistics that a term keeps (running means) are reduced over all ranks before they are committed, so they are identical
everywhere; these reductions carry no gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

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
    """Rows of all processes in order of rank, with gradient; every process has as many. ``value`` itself in a single
    process, and outside of training, where not every process need take part."""
    if world_size() == 1 or not training:
        return value
    return torch.cat(all_gather(value.contiguous()))  # type: ignore[no-untyped-call]

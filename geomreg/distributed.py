"""The one convention for several processes.

Every loss is a mean over the rank's own batch, so the gradient that DDP averages over ranks with equal batches
equals the single-process gradient on the concatenated batch. Statistics that a term keeps (running means) are
reduced over all ranks before they are committed, so they are identical everywhere. Reductions of statistics
carry no gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_max", "all_reduce_sum", "world_size"]


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

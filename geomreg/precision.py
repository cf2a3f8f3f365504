"""Loss mathematics in fp32 or wider, whatever autocast or the inputs' dtype say."""

import torch
from torch import Tensor

__all__ = ["at_least_fp32", "full_precision"]


def at_least_fp32(value: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def full_precision(value: Tensor) -> torch.autocast:
    """Context in which autocast is off for ``value``'s device."""
    return torch.autocast(value.device.type, enabled=False)

"""Loss mathematics in fp32 or wider, whatever autocast or the inputs' dtype say."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["apply_keeping_fp32", "at_least_fp32", "full_precision"]


def at_least_fp32(value: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def full_precision(value: Tensor) -> torch.autocast:
    """Context in which autocast is off for ``value``'s device."""
    return torch.autocast(value.device.type, enabled=False)


def apply_keeping_fp32(module: nn.Module, apply: Callable[[], object]) -> None:
    """Run ``apply``, an ``_apply`` of ``module``; its own floating-point buffers move with it but stay the fp32 values they were."""
    exact = dict(module._buffers)
    apply()
    for key, value in exact.items():
        moved = module._buffers[key]
        if value is not None and moved is not None and value.is_floating_point() and moved.dtype != torch.float32:
            module._buffers[key] = value.to(moved.device)  # the values themselves, not a round trip

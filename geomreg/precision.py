"""Loss mathematics in fp32 or wider, whatever autocast or the inputs' dtype say."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["apply_keeping_fp32", "at_least_fp32", "common_precision", "full_precision", "one_number"]


def at_least_fp32(value: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def common_precision(*values: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes, fp32 at least."""
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return tuple(value.to(dtype) for value in values)


def one_number(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or the only entry of a tensor with its gradient, as a 0-d tensor of the dtype and on the device of ``like``."""
    return value.to(like).reshape(()) if isinstance(value, Tensor) else like.new_full((), value)


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

"""Sums over rows of a similarity matrix that is never there as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TILE", "row_blocked"]

TILE = 2**22  # entries of the similarity matrix at a time: 16 MB in fp32


def row_blocked(function: Callable[..., Tensor], rows: tuple[Tensor, ...], shared: tuple[Tensor, ...], *, columns: int) -> Tensor:
    """``function(*rows, *shared)`` for a function that is a sum over rows, a block of rows at a time.

    A block has at most :data:`TILE` entries of ``columns`` each (one row at least). In one block this is the function
    itself; in several, each block's gradient is computed and added up right after its value, so peak memory is that of one block
    and the cost that of one forward and one backward pass. A second derivative then raises, and ``torch.compile`` breaks the
    graph there (``fullgraph=True`` refuses): gradients are taken inside the forward pass.

    Args:
        function: ``(rows..., shared...) -> 0-d``; a sum over rows.
        rows: tensors of equally many rows.
        shared: tensors that every block needs.
        columns: entries of a row of the intermediate matrix.
    """
    block = max(1, TILE // columns)
    if len(rows[0]) <= block:
        return function(*rows, *shared)
    tensors = (*rows, *shared)
    needed = tuple(torch.is_grad_enabled() and value.requires_grad for value in tensors)
    value: Tensor = _RowBlocked.apply(function, block, len(rows), needed, *tensors)[0]
    return value


class _RowBlocked(torch.autograd.Function):
    """Outputs the value, and the gradients as further outputs that carry none."""

    @staticmethod
    def forward(function: Callable[..., Tensor], block: int, count: int, needed: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        total: Tensor | None = None
        gradients = [torch.zeros_like(value) if need else value.new_zeros(()) for value, need in zip(tensors, needed, strict=True)]
        for start in range(0, len(tensors[0]), block):
            part = slice(start, start + block)
            pieces = [value[part] if k < count else value for k, value in enumerate(tensors)]
            with torch.enable_grad():
                leaves = [value.detach().requires_grad_(need) for value, need in zip(pieces, needed, strict=True)]
                value = function(*leaves)
                wanted = [k for k, need in enumerate(needed) if need]
                found = torch.autograd.grad(value, [leaves[k] for k in wanted]) if wanted else ()
            for k, gradient in zip(wanted, found, strict=True):
                if k < count:
                    gradients[k][part] = gradient
                else:
                    gradients[k] += gradient
            total = value.detach() if total is None else total + value.detach()
        if total is None:
            raise ValueError("row_blocked: expected at least one row, got none. Pass a batch.")
        return (total, *gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needed = inputs[3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *inputs[4:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needed)
        gradients, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        scaled = (
            _NoSecondDerivative.apply(cotangent * gradient, value) if need else None
            for gradient, value, need in zip(gradients, tensors, ctx.needed, strict=True)
        )
        return (None, None, None, None, *scaled)


class _NoSecondDerivative(torch.autograd.Function):
    """The gradient as it is, tied to what it depends on, so that a second derivative raises and is not silently zero."""

    @staticmethod
    def forward(gradient: Tensor, value: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "row_blocked: expected one derivative of a loss in several row blocks, got a request for the second. "
            "Use a batch whose similarity matrix fits into one block."
        )

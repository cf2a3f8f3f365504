"""Whether a loss may be taken chunk by chunk: terms that say they may not are refused, any other function is tried once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from geomreg.checks import check_scalar
from geomreg.chunks import SeparablePass, separable_pass
from geomreg.precision import at_least_fp32
from geomreg.random_state import random_state, same_random_state, set_random_state
from geomreg.regularizers.common import unit_rows
from geomreg.types import Embeddings

__all__ = ["check_arguments", "refuse_unseparable", "refusing_unseparable", "try_once"]

_NARROW = (torch.bfloat16, torch.float16)
_tried: set[Any] = set()


def check_arguments(loss_fn: Callable[..., Tensor], separable: bool) -> None:
    """``loss_fn`` takes the embeddings, with ``separable`` also the rows, and then is no term that says it is no mean over samples."""
    if separable:
        refuse_unseparable(getattr(loss_fn, "__self__", loss_fn))
    try:
        taken = signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # of built-in functions nothing is known
        return
    try:
        taken.bind(*([None, None] if separable else [None]))
    except TypeError:
        wanted, advice = (
            ("loss_fn(Embeddings, index) with separable=True", "Take the rows of the batch that the chunk holds as second argument.")
            if separable
            else ("loss_fn(Embeddings) without separable=True", "Take the embeddings of the whole batch alone.")
        )
        raise TypeError(f"backward: expected {wanted}, got one with the arguments {taken}. {advice}") from None


def refuse_unseparable(term: object) -> None:
    """A regularizer, or a sum of them, whose value is no mean over samples."""
    if isinstance(term, nn.Module) and hasattr(term, "step") and not getattr(term, "separable", False) and _takes_student(term):
        raise ValueError(
            f"backward: expected a loss that is a mean over samples with separable=True, got {type(term).__name__}, which is none. "
            "Leave separable out; separable=term.separable always fits."
        )


def _takes_student(module: nn.Module) -> bool:
    """A regularizer; others have a ``step`` too, such as teachers."""
    inner = getattr(module, "_orig_mod", module)  # of torch.compile
    return next(iter(signature(inner.forward).parameters), None) == "student"


@contextmanager
def refusing_unseparable() -> Iterator[None]:
    """Within, every term is looked at before it runs."""
    handle = register_module_forward_pre_hook(lambda module, _: refuse_unseparable(module))
    try:
        yield
    finally:
        handle.remove()


def try_once(loss_fn: Callable[..., Tensor], embeddings: Embeddings, index: Tensor, of: SeparablePass, devices: list[torch.device]) -> None:
    """Once for each function: the value of some rows is the mean of those of their two halves, each weighted by its rows.

    The rows are embeddings of the batch moved at random, since those of a student that still equals its teacher make most losses
    0. Neither random numbers nor what terms collect are changed; a loss that draws random numbers itself cannot be tried.

    Args:
        loss_fn: ``loss_fn(Embeddings, index) -> 0-d``.
        embeddings: at least two rows of the batch; nothing flows back to them.
        index: the rows of the batch that they are.
        of: the pass in which they were encoded.
        devices: whose random numbers ``loss_fn`` may draw.

    Raises:
        ValueError: the loss is no mean over samples.
    """
    key = _kind(loss_fn)
    if key in _tried:
        return
    moved = Embeddings(*(None if value is None else _moved(value, seed) for seed, value in enumerate(embeddings)))
    half = len(index) // 2
    before = random_state(devices)
    try:
        with torch.enable_grad(), separable_pass(of, trial=True):
            whole, first, second = (
                check_scalar("backward", loss_fn(_rows(moved, rows), index[rows])).detach()
                for rows in (slice(None), slice(half), slice(half, None))
            )
        drawn = not same_random_state(before, random_state(devices))
    finally:
        set_random_state(before, devices)
    if drawn:
        _tried.add(key)
        return
    tolerance = 0.05 if whole.dtype in _NARROW else 1e-3
    value, *parts = (float(one) for one in (whole, first, second))
    mean = (half * parts[0] + (len(index) - half) * parts[1]) / len(index)
    size = max(abs(value), *(abs(part) for part in parts))
    if abs(value - mean) > tolerance * size:
        raise ValueError(
            f"backward: expected a loss that is a mean over samples with separable=True, got one whose value for {len(index)} samples is "
            f"{value:.4g} and whose mean over two halves of them is {mean:.4g}. Leave separable out."
        )
    if 0 < size < float("inf"):
        _tried.add(key)


def _moved(value: Tensor, seed: int) -> Tensor:
    """Each embedding turned at random, as long as before."""
    exact = at_least_fp32(value.detach())
    norm = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(exact)
    moved: Tensor = norm * unit_rows(unit_rows(exact) + unit_rows(noise))
    return moved.to(value.dtype)


def _rows(embeddings: Embeddings, rows: slice) -> Embeddings:
    return Embeddings(*(None if value is None else value[rows].clone().requires_grad_() for value in embeddings))


def _kind(loss: Any, depth: int = 4) -> Any:
    """What tells one loss from another: code of functions and of those that they hold, names and switches, types of all else."""
    if isinstance(loss, (str, bool)):
        return loss
    if depth and isinstance(loss, partial):
        held = [loss.func, *loss.args, *loss.keywords.values()]
        return partial, tuple(_kind(one, depth - 1) for one in held)
    if depth and isinstance(loss, MethodType):
        return _kind(loss.__func__, depth - 1), type(loss.__self__)
    if depth and isinstance(loss, FunctionType):
        held = [cell.cell_contents for cell in loss.__closure__ or () if _filled(cell)]
        held += [*(loss.__defaults__ or ()), *(loss.__kwdefaults__ or {}).values()]
        return loss.__code__, tuple(_kind(one, depth - 1) for one in held)
    return type(loss)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

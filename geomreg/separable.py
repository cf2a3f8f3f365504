"""Whether a loss may be taken chunk by chunk: terms that say they may not are refused, any other function is tried once."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from geomreg.checks import check_scalar
from geomreg.chunks import SeparablePass, current_pass, separable_pass
from geomreg.kinds import kind
from geomreg.precision import at_least_fp32
from geomreg.random_state import random_state, same_random_state, set_random_state
from geomreg.regularizers.common import unit_rows
from geomreg.types import Embeddings, have_values

__all__ = ["check_arguments", "refuse_unseparable", "refusing_unseparable", "try_once"]

_NARROW = (torch.bfloat16, torch.float16)
_ROWS = 4096  # of a batch that are looked at, if they are more than two chunks; where the loss runs modules two chunks in any case
_TRIALS = 16  # of functions that differ in numbers, strings and what containers hold alone, or in objects of one type
_tried: dict[Any, "_Record"] = {}


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
    """Within, every term is looked at before it runs, and what modules the loss runs."""
    handle = register_module_forward_pre_hook(lambda module, _: _look_at(module))
    try:
        yield
    finally:
        handle.remove()


def _look_at(module: nn.Module) -> None:
    refuse_unseparable(module)
    of = current_pass()
    if of is None:
        return
    if of.trial and any(hasattr(module, name) for name in ("no_sync", "set_requires_gradient_sync")):
        raise _UntriableError(f"{type(module).__name__} counts its passes over all processes")
    of.runs_modules = of.runs_modules or (not hasattr(module, "step") and next(module.parameters(), None) is not None)


class _UntriableError(RuntimeError):
    """The loss cannot be called for the sake of a trial."""


@dataclass
class _Record:
    """Of functions of one coarse kind: those that were tried, how many trials there were, how many calls, and the next that is tried."""

    known: set[Any] = field(default_factory=set)
    trials: int = 0
    calls: int = 0
    due: int = 10

    def asks(self, exact: Any) -> bool:
        """Whether this call is tried: a new function's, if there were not many, and in any case the 10th, 100th, 1,000th call."""
        self.calls += 1
        if self.calls == self.due:
            self.due *= 10
            return True
        if exact in self.known or self.trials >= _TRIALS:
            return False
        self.trials += 1
        return True


def try_once(loss_fn: Callable[..., Tensor], sample: Embeddings, chunks: list[int], of: SeparablePass, devices: list[torch.device]) -> None:
    """Once for each function: value and gradient of the whole batch are the means of those of its parts, each weighted by its rows.

    It is tried again at its 10th, 100th and 1,000th call: a weight that is 0 at first may hide what is no mean.

    The embeddings are those of a chunk, repeated and turned at random, since those of a student that still equals its teacher make most
    losses 0. The parts are the chunks of the batch, and then two of unequal length. Neither random numbers nor what terms collect are
    changed. A loss that draws random numbers, whose value changes from call to call, or that works for its own chunk alone cannot be
    tried, which is said in a warning.

    Args:
        loss_fn: ``loss_fn(Embeddings, index) -> 0-d``.
        sample: embeddings of some rows of the batch; nothing flows back to them.
        chunks: rows of each chunk, at least two in all. Of a large batch only the first chunks are looked at.
        of: the pass in which they were encoded.
        devices: whose random numbers ``loss_fn`` may draw.

    Raises:
        ValueError: the loss is no mean over samples.
    """
    if not have_values(sample):
        return
    exact, record = kind(loss_fn), _tried.setdefault(kind(loss_fn, coarse=True), _Record())
    if not record.asks(exact):
        return
    while len(chunks) > 2 and (of.runs_modules or sum(chunks) > _ROWS):
        chunks = chunks[:-1]
    rows = sum(chunks)
    moved = Embeddings(*(None if value is None else _moved(value, rows, seed) for seed, value in enumerate(sample)))
    device = next(value.device for value in moved if value is not None)
    index = torch.arange(rows, device=device)
    third = max(1, rows // 3)
    before = random_state(devices)
    try:
        with torch.enable_grad(), separable_pass(of, trial=True):
            whole = _taken(loss_fn, moved, index)
            partitions = [_taken_apart(loss_fn, moved, index, parts) for parts in (chunks, [third, rows - third])]
            drawn = not same_random_state(before, random_state(devices)) or not _equal(whole, _taken(loss_fn, moved, index))
    except Exception as error:  # it has just worked for its chunk, so it is no more than the trial that fails
        record.known.add(exact)
        _warn_untried(f"fails for other rows than those of its chunk ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return
    finally:
        set_random_state(before, devices)
    if drawn:
        record.known.add(exact)
        _warn_untried("draws random numbers or changes from call to call")
        return
    dtypes = {whole.value.dtype, *(one.dtype for one in moved if one is not None)}
    if dtypes & set(_NARROW) or torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest":
        tolerance, noise = 0.05, 0.05
    else:
        tolerance, noise = 1e-3, 32 * max(torch.finfo(one).eps for one in dtypes)
    try:
        tried = [_compare(whole, apart, tolerance, noise, rows) for apart in partitions]
    except ValueError:
        record.trials -= 1  # one that is refused is refused again
        raise
    if all(tried):
        record.known.add(exact)


def _warn_untried(what: str) -> None:
    warnings.warn(
        f"backward: expected a loss that is a mean over samples with separable=True, got one that {what}, so that it cannot be tried. "
        "Leave separable out, or pass separable='unchecked' if it is such a mean.",
        stacklevel=5,
    )


class _Taken(NamedTuple):
    """Value of a loss for some rows, its gradient in their embeddings, the largest value of a part, and the length of the embeddings."""

    value: Tensor
    gradient: Tensor
    largest: float
    length: float


def _taken(loss_fn: Callable[..., Tensor], embeddings: Embeddings, index: Tensor) -> _Taken:
    """Value and gradient for the rows ``index``, which are one after the other."""
    first, stop = int(index[0]), int(index[-1]) + 1
    leaves = Embeddings(*(None if value is None else value[first:stop].clone().requires_grad_() for value in embeddings))
    given = [value for value in leaves if value is not None]
    loss = check_scalar("backward", loss_fn(leaves, index))
    found = torch.autograd.grad(loss, given, allow_unused=True) if loss.requires_grad else [None] * len(given)
    gradient = [torch.zeros_like(value) if one is None else one for value, one in zip(given, found, strict=True)]
    wide = [torch.cat([at_least_fp32(one.detach()) for one in several], dim=1) for several in (gradient, given)]
    return _Taken(loss.detach(), wide[0], abs(float(loss.detach())), float(wide[1].norm()))


def _taken_apart(loss_fn: Callable[..., Tensor], embeddings: Embeddings, index: Tensor, parts: list[int]) -> _Taken:
    """The same as the mean over parts of the rows."""
    found = [(len(rows) / len(index), _taken(loss_fn, embeddings, rows)) for rows in torch.split(index, parts)]
    value = torch.stack([share * one.value.double() for share, one in found]).sum()
    gradient = torch.cat([share * one.gradient for share, one in found])
    return _Taken(value, gradient, max(one.largest for _, one in found), sum(one.length for _, one in found))


def _equal(one: _Taken, other: _Taken) -> bool:
    """But for the order of sums, which a device may change."""
    tolerance = 4 * torch.finfo(one.value.dtype).eps
    return torch.allclose(one.value.double(), other.value.double(), rtol=tolerance, atol=0, equal_nan=True)


def _compare(whole: _Taken, apart: _Taken, tolerance: float, noise: float, rows: int) -> bool:
    """Raise if value or gradient are others than the mean of the parts; False where there is nothing but rounding to see."""
    value, mean = float(whole.value), float(apart.value)
    if not math.isfinite(value) or not whole.gradient.isfinite().all():
        return False
    steep = max(float(one.gradient.norm()) for one in (whole, apart))
    size = max(whole.largest, apart.largest, steep * whole.length)
    if size <= noise:
        return False
    error = float((whole.gradient - apart.gradient).norm())
    if not abs(value - mean) <= max(tolerance * max(whole.largest, apart.largest), noise * size):
        got = f"whose value for {rows} samples is {value:.4g} and whose mean over parts of them is {mean:.4g}"
    elif not error <= max(tolerance * steep, noise * size / max(whole.length, 1e-30)):
        got = f"whose gradient for {rows} samples is not the mean over parts of them, by {error / steep:.0%}"
    else:
        return True
    raise ValueError(f"backward: expected a loss that is a mean over samples with separable=True, got one {got}. Leave separable out.")


def _moved(value: Tensor, rows: int, seed: int) -> Tensor:
    """So many embeddings, each one of those given, turned at random and as long as before."""
    exact, generator = at_least_fp32(value.detach()), torch.Generator().manual_seed(seed)
    exact = exact[torch.randint(len(exact), (rows,), generator=torch.Generator().manual_seed(0)).to(exact.device)]
    norm = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    noise = torch.randn(exact.shape, generator=generator).to(exact)
    moved: Tensor = norm * unit_rows(unit_rows(exact) + unit_rows(noise))
    return moved.to(value.dtype)

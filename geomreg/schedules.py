"""Weights that change over training, for :class:`geomreg.WeightedSum`: functions of the step number, or of gradient norms."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.checks import check_count, check_fraction, check_positive, check_student, check_weight
from geomreg.chunks import current_pass
from geomreg.distributed import all_reduce_sum
from geomreg.precision import apply_keeping_fp32
from geomreg.types import Embeddings

__all__ = ["BalancedWeight", "Cosine", "Linear", "Schedule", "Warmup"]

Schedule = Callable[[int], float]
_IDLE = 100  # steps without both gradients before the warning


@dataclass(frozen=True)
class Linear:
    """From ``start`` at step 0 in a straight line to ``end`` at step ``steps``, constant from then on.

    StarFT (IJCAI 2025) lets its weight fall to zero this way.

    Example:
        >>> [Linear(1.0, 0.0, steps=4)(step) for step in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(type(self).__name__, self.start, self.end, self.steps)

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True)
class Cosine:
    """From ``start`` at step 0 along half a cosine to ``end`` at step ``steps``, constant from then on.

    Example:
        >>> [round(Cosine(1.0, 0.0, steps=4)(step), 3) for step in (0, 1, 2, 4)]
        [1.0, 0.854, 0.5, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(type(self).__name__, self.start, self.end, self.steps)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2


@dataclass(frozen=True)
class Warmup:
    """A weight, or a schedule, times a factor that rises in a straight line from 0 at step 0 to 1 at step ``steps``.

    Example:
        >>> [Warmup(10.0, steps=4)(step) for step in (0, 1, 4, 9)]
        [0.0, 2.5, 10.0, 10.0]
    """

    then: float | Schedule
    steps: int

    def __post_init__(self) -> None:
        if not callable(self.then):
            check_weight("Warmup", "then", self.then)
        check_count("Warmup", "steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        value = self.then(step) if callable(self.then) else self.then
        return value * min(1.0, step / self.steps)


def _check(name: str, start: float, end: float, steps: int) -> None:
    check_weight(name, "start", start)
    check_weight(name, "end", end)
    check_count(name, "steps", steps, 1)


class BalancedWeight(nn.Module):
    r"""Weight that holds the term's gradient at a ratio to the task's, both with respect to the embeddings.

    .. math:: w = \min\Big( w_{\max},\; \rho\, \frac{\overline{\lVert \partial L_{task} / \partial z \rVert}}
              {\overline{\lVert \partial L_{term} / \partial z \rVert}} \Big)

    The backward passes record the squared norms, :meth:`step` reduces them over all processes, averages the norms over steps and
    moves the weight; ``forward`` of the sum only reads it. The averages matter: the gradient of a squared distance is 0 at the
    first step and small near the teacher, and exact balancing would turn it into a force of constant size that chatters around 0.

    Used as ``keep = WeightedSum(dive=(BalancedWeight(0.5), DiVE()))``; the task's embeddings pass through ``keep.watch_task``::

        loss = task(keep.watch_task(encode(model, target))) + keep(encode(model, reference), teacher(reference))

    Eager mode only: the norms are recorded by autograd. A loss scale that both losses share cancels.

    Args:
        ratio: of the norms, rho.
        initial: weight during warm-up.
        warmup: steps in which the weight stands still while the averages fill.
        cap: largest weight.
        decay: of the averages of the norms, which are bias-corrected.

    Attributes:
        weight: 0-d fp32 tensor. Weight, averages and number of steps are part of ``state_dict``.
    """

    weight: Tensor
    norms: Tensor
    steps: Tensor

    def __init__(self, ratio: float, *, initial: float = 1.0, warmup: int = 100, cap: float = 1e4, decay: float = 0.99) -> None:
        super().__init__()
        for option, value in (("ratio", ratio), ("initial", initial), ("cap", cap)):
            check_positive("BalancedWeight", option, value)
        check_count("BalancedWeight", "warmup", warmup, 1)
        check_fraction("BalancedWeight", "decay", decay, below_one=True)
        self.ratio, self.initial, self.warmup, self.cap, self.decay = ratio, initial, warmup, cap, decay
        self.register_buffer("weight", torch.tensor(float(initial)))
        self.register_buffer("norms", torch.zeros(2))  # averages of the task's and the term's norm, not yet bias-corrected
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.pending = torch.zeros(2)  # squared norms since the last step; no buffer: DDP copies those of rank 0 to the others
        self.recorded: set[int] = set()  # which of the two came in since the last step
        self._idle, self._warned = 0, False

    def watch(self, embeddings: Embeddings, role: str) -> Embeddings:
        """The embeddings, whose gradient's squared norm is recorded for ``"task"`` or ``"term"``."""
        check_student("BalancedWeight", embeddings)
        one_pass = current_pass()
        if one_pass is not None and one_pass.trial:
            return embeddings
        index = ("task", "term").index(role)
        return Embeddings(*(None if value is None else _Recorded.apply(value, self, index) for value in embeddings))

    @torch.no_grad()
    def step(self) -> None:
        """Average the norms of this step and move the weight; a step without both gradients, or with one not finite, counts for nothing."""
        self._idle = 0 if len(self.recorded) == 2 else self._idle + 1
        if self._idle >= _IDLE and not self._warned:
            self._warned = True
            lacking = (
                "the task's: pass its embeddings through keep.watch_task" if 0 not in self.recorded else "the term's: it sees no embeddings"
            )
            warnings.warn(f"BalancedWeight: {_IDLE} steps without a gradient of {lacking}; the weight stands still.", stacklevel=4)
        task, term = all_reduce_sum(self.pending).sqrt().unbind()
        norms = torch.stack([task, term / self.weight])
        valid = norms.isfinite().all() & (norms > 0).all()
        self.norms = torch.where(valid, self.decay * self.norms + (1 - self.decay) * norms, self.norms)
        self.steps = self.steps + valid
        balanced = (self.ratio * self.norms[0] / self.norms[1]).clamp(max=self.cap)  # the bias correction cancels
        self.weight = torch.where(self.steps >= self.warmup, balanced, self.weight)
        self.discard()

    def discard(self) -> None:
        """Drop what was recorded since the last step."""
        self.pending = torch.zeros_like(self.pending)
        self.recorded.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BalancedWeight":
        apply_keeping_fp32(self, partial(super()._apply, fn, recurse))
        self.pending = self.pending.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, initial={self.initial}, warmup={self.warmup}, cap={self.cap}, decay={self.decay}"


class _Recorded(torch.autograd.Function):
    """Identity; adds the squared norm of its gradient to an entry of a buffer."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, owner: BalancedWeight, index: int) -> Tensor:
        ctx.owner, ctx.index = owner, index
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        owner = ctx.owner
        if owner.pending.device != gradient.device:
            owner.to(gradient.device)
        owner.pending[ctx.index] += gradient.detach().float().square().sum()
        owner.recorded.add(ctx.index)
        return gradient, None, None

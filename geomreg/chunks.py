"""What a term must know of a separable pass: that it is called for a chunk, whether the call counts, and what the batch weighs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["SeparablePass", "current_pass", "separable_pass"]


class SeparablePass:
    """One call of ``backward(separable=True)``.

    Attributes:
        rows: samples of this process's whole batch.
        held: which of them the chunk has for which the loss is called.
        weight: what a mean over these weighs beside those of the other processes; None until a term asks for it.
        runs_modules: the loss has called a module with parameters, so that it has activations of its own.
        trial: the loss is called to look at its value alone: nothing that a term collects may count it.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.trial, self.runs_modules = rows, False, False
        self.held = slice(0, rows)
        self.weight: Tensor | None = None


_CURRENT: ContextVar[SeparablePass | None] = ContextVar("geomreg_separable_pass", default=None)


def current_pass() -> SeparablePass | None:
    """The separable pass in which a loss is being called; None outside."""
    return _CURRENT.get()


@contextmanager
def separable_pass(of: SeparablePass, *, trial: bool = False) -> Iterator[None]:
    """Within, losses are called for chunks of a batch."""
    token = _CURRENT.set(of)
    of.trial = trial
    try:
        yield
    finally:
        _CURRENT.reset(token)

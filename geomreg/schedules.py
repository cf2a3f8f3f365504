"""Weights that change over training: functions of the step number, for :class:`geomreg.WeightedSum`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from geomreg.checks import check_count, check_weight

__all__ = ["Cosine", "Linear", "Schedule", "Warmup"]

Schedule = Callable[[int], float]


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

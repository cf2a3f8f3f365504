"""Several terms as one regularizer."""

from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.checks import check_inputs, check_weight, describe
from geomreg.chunks import current_pass
from geomreg.schedules import BalancedWeight, Schedule
from geomreg.separable import refuse_unseparable
from geomreg.types import Embeddings, Terms

__all__ = ["WeightedSum"]


class WeightedSum(nn.Module):
    """Weighted sum of named regularizers; itself a regularizer. Use one per data source.

    Inputs beyond student and teacher are given by name, ``keep(student, teacher, logit_scale=...)``, and each term gets those
    that it takes. Embed the student's batch without dropout and in the teacher's view, as :class:`geomreg.Teacher` explains.

    Args:
        terms: ``name=(weight, regularizer)``; the weight is a finite number >= 0, a schedule (a function of the step number such as
            :class:`geomreg.schedules.Cosine`), or a :class:`geomreg.schedules.BalancedWeight`. The number of steps so far and the
            balanced weights are part of ``state_dict``.

    Example:
        >>> from geomreg import AverageVectorLoss, PairwiseVectorLoss, WeightedSum
        >>> from geomreg.schedules import Linear
        >>> keep = WeightedSum(avl=(1000.0, AverageVectorLoss()), pvl=(Linear(1000.0, 0.0, steps=100), PairwiseVectorLoss()))
        >>> keep.step()
        >>> keep.weights
        {'avl': 1000.0, 'pvl': 990.0}
    """

    def __init__(self, *unnamed: object, **terms: tuple[float | Schedule | BalancedWeight, nn.Module]) -> None:
        super().__init__()
        if unnamed:
            raise TypeError(
                f"WeightedSum: expected name=(weight, regularizer), got {describe(unnamed[0])} without a name. "
                "Write WeightedSum(dive=(1000.0, DiVE())), say."
            )
        if not terms:
            raise ValueError("WeightedSum: expected at least one name=(weight, regularizer), got none. Add a term.")
        self.numbers: dict[str, float] = {}  # weights in force of terms with a number or a schedule
        self.schedules: dict[str, Schedule] = {}
        self.balanced = nn.ModuleDict()
        self.regularizers = nn.ModuleDict()
        self._steps = 0
        for name, entry in terms.items():
            if not name.isidentifier() or hasattr(self.regularizers, name):
                raise ValueError(
                    f"WeightedSum: expected a plain name for a term, got {name!r}. Choose another: it is taken or no identifier."
                )
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise TypeError(f"WeightedSum: expected {name}=(weight, regularizer), got {describe(entry)}. Write {name}=(1.0, term).")
            weight, regularizer = entry
            if isinstance(weight, nn.Module) and not isinstance(weight, BalancedWeight):
                raise TypeError(
                    f"WeightedSum: expected {name}=(weight, regularizer), got {describe(weight)} first. Write the weight first."
                )
            if isinstance(weight, BalancedWeight):
                self.balanced[name] = weight
            elif callable(weight) and not isinstance(weight, Tensor):
                self.schedules[name] = weight
            else:
                check_weight("WeightedSum", f"the weight of {name}", weight)
                self.numbers[name] = float(weight)
            if not isinstance(regularizer, nn.Module) or not hasattr(regularizer, "step"):
                hint = "Call it to build one." if isinstance(regularizer, type) else "Use a geomreg term."
                raise TypeError(f"WeightedSum: expected {name} as an nn.Module with step(), got {describe(regularizer)}. {hint}")
            if any(regularizer is one for one in self.regularizers.values()) or any(
                weight is one for one in list(self.balanced.values())[:-1]
            ):
                raise ValueError(
                    f"WeightedSum: expected a term and a balanced weight of its own for {name}, got one that another name has: it would "
                    "step twice. Build a second one."
                )
            self.regularizers[name] = regularizer
        self._schedule()

    def _schedule(self) -> None:
        """Weights of the present step."""
        for name, schedule in self.schedules.items():
            value = schedule(self._steps)
            check_weight("WeightedSum", f"the weight of {name} at step {self._steps}", value)
            self.numbers[name] = float(value)

    @property
    def weights(self) -> dict[str, float]:
        """Name to the weight in force; waits for the device where a weight is balanced."""
        return {name: float(self._weight(name)) for name in self.regularizers}

    def _weight(self, name: str) -> float | Tensor:
        if name in self.balanced:
            weight: Tensor = self.balanced[name].weight  # type: ignore[assignment]
            return weight
        return self.numbers[name]

    @property
    def needs_teacher(self) -> bool:
        """Whether some term compares with a teacher; the others give it a default in their ``forward``."""
        return any(signature(term.forward).parameters["teacher"].default is Parameter.empty for term in self.regularizers.values())

    @property
    def separable(self) -> bool:
        """Whether the value is a mean over samples, so that chunks weighted by their share of the batch give it."""
        return not self.balanced and all(getattr(term, "separable", False) for term in self.regularizers.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that some term needs."""
        return _union(_takes(term)[0] for term in self.regularizers.values())

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Further names that some term takes."""
        return tuple(name for name in _union(_takes(term)[1] for term in self.regularizers.values()) if name not in self.inputs)

    def forward(self, student: Embeddings, teacher: Embeddings | None = None, **inputs: Any) -> Tensor:
        return self.terms(student, teacher, **inputs).total

    def terms(self, student: Embeddings, teacher: Embeddings | None = None, **inputs: Any) -> Terms:
        """The total with graph, and each term's detached, unweighted value."""
        check_inputs("WeightedSum", inputs, self.inputs, self.optional_inputs)
        if current_pass() is not None:
            refuse_unseparable(self)
        values = {}
        for name, regularizer in self.regularizers.items():
            needed, optional = _takes(regularizer)
            seen = self.balanced[name].watch(student, "term") if name in self.balanced else student  # type: ignore[operator]
            values[name] = regularizer(seen, teacher, **{key: inputs[key] for key in (*needed, *optional) if key in inputs})
        total: Tensor = sum(self._weight(name) * value for name, value in values.items())
        return Terms(total, {name: value.detach() for name, value in values.items()})

    def watch_task(self, embeddings: Embeddings) -> Embeddings:
        """The embeddings that the task loss sees, with its gradient recorded for the balanced weights."""
        for balanced in self.balanced.values():
            embeddings = balanced.watch(embeddings, "task")  # type: ignore[operator]
        return embeddings

    def step(self) -> None:
        """Commit the state of every term and move the weights; once after each optimizer step that was not skipped."""
        for part in (*self.regularizers.values(), *self.balanced.values()):
            part.step()  # type: ignore[operator]
        self._steps += 1
        self._schedule()

    def discard(self) -> None:
        """Drop what the terms collected since the last step; instead of :meth:`step` after a skipped optimizer step."""
        for part in (*self.regularizers.values(), *self.balanced.values()):
            if hasattr(part, "discard"):
                part.discard()  # type: ignore[operator]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        self._steps = int(state)
        self._schedule()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())


def _takes(regularizer: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs that a term needs, and of those that it may be given."""
    return tuple(getattr(regularizer, "inputs", ())), tuple(getattr(regularizer, "optional_inputs", ()))


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for several in names for name in several))

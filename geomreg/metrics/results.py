"""Several numbers as the result of one metric: a dictionary, as loggers and torchmetrics' wrappers want it, whose entries have names."""

from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Results"]


class Results(dict[str, Tensor]):
    """Name to 0-d tensor; ``results.name`` is ``results["name"]``.

    A dictionary is what ``MetricCollection`` flattens, ``MetricTracker`` stacks, ``metric["name"] / other`` composes, and Lightning's
    ``log_dict`` takes; a tuple is none of these.

    Attributes:
        parts: the named tuple that the function of the same mathematics returns. Its properties can be asked for here too.
    """

    parts: ClassVar[type[Any]]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name.startswith("_") or not isinstance(getattr(self.parts, name, None), property):
            raise AttributeError(f"{type(self).__name__}: expected one of {', '.join(self)}, got {name!r}. Ask for one of these.")
        return getattr(self.as_parts(), name)

    def as_parts(self) -> Any:
        """The named tuple."""
        return self.parts(**self)

    @classmethod
    def undefined(cls, device: torch.device) -> "Results":
        """NaN for every name."""
        return cls({name: torch.full((), torch.nan, dtype=torch.float64, device=device) for name in cls.parts._fields})

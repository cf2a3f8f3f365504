"""Options of a class that are misspelled, missing or given without a name are refused in words that say which it has."""

import functools
import inspect
from typing import Any

from geomreg.checks import check_call

__all__ = ["check_options_of"]


def check_options_of(*kinds: type) -> None:
    """From now on each class checks the arguments of its constructor against its signature before it runs.

    The signature stays what it was for ``help``, ``inspect`` and command lines.
    """
    for kind in kinds:
        setattr(kind, "__init__", _checked(kind))  # noqa: B010


def _checked(kind: type) -> Any:
    init: Any = kind.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(init).parameters.values())[1:]  # without self

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_call(kind.__name__, parameters, args, kwargs)
        init(self, *args, **kwargs)

    return checked

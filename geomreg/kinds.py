"""What tells one function from another that may do something else: code, what it holds, and what that holds."""

import weakref
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor

__all__ = ["kind"]

_NUMBERS = (int, float, complex, type(None))
_MOST = 16  # entries of a container, and attributes of an object


def kind(value: Any, *, coarse: bool = False, depth: int = 4, through: bool = True) -> Any:
    """Equal for functions that do the same, as far as can be seen cheaply; hashable.

    Of a function: its code, and the kinds of what it holds, of its defaults and of the globals that it names. Of strings and switches their
    values, of containers the kinds of their entries, of tensors their type. Of any other object who it is and its
    attributes that are strings or switches; its numbers may count something.

    Args:
        value: to look at.
        coarse: numbers and strings do not count, and of containers and objects the type alone.
        depth: how far to follow what holds what.
        through: follow the globals of functions.
    """

    def held(values: Any, through: bool = through) -> tuple[Any, ...]:
        return tuple(kind(one, coarse=coarse, depth=depth - 1, through=through) for one in values)

    if isinstance(value, (bool, type)):
        return value
    if isinstance(value, str):
        return str if coarse else value
    if isinstance(value, _NUMBERS):
        return type(value) if coarse else (type(value), value)
    if not depth or isinstance(value, Tensor):
        return type(value)
    if isinstance(value, partial):
        return partial, held([value.func, *value.args, *value.keywords.values()])
    if isinstance(value, MethodType):
        return held([value.__func__, value.__self__])
    if isinstance(value, FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        closed += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        named = [value.__globals__[name] for name in value.__code__.co_names if through and name in value.__globals__]
        return value.__code__, held(closed), held(named, through=False)
    if isinstance(value, tuple):
        return type(value), held(value[:_MOST])
    if isinstance(value, (list, dict)):  # numbers and tensors in them come and go, as in a record of losses
        if coarse:
            return type(value)
        entries = list(islice(value.items() if isinstance(value, dict) else enumerate(value), _MOST))
        return type(value), held(one for one in entries if not isinstance(one[1], (Tensor, *_NUMBERS)) or isinstance(one[1], bool))
    if coarse:
        return type(value)
    plain = [(name, one) for name, one in getattr(value, "__dict__", {}).items() if isinstance(one, (str, bool))]
    return type(value), _identity(value), held(plain[:_MOST])


def _identity(value: Any) -> Any:
    """Equal for the same object as long as it lives, without keeping it alive; None where an object has no such."""
    try:
        found = weakref.ref(value)
        hash(found)
    except TypeError:  # of objects without a place for it, and of those that have no hash
        return None
    return found


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

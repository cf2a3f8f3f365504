"""Whether a value from a file has the type that a constructor's option has: YAML reads 2024 as a number, and "false" as a text."""

import collections.abc
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["check_names", "typed"]

_SEQUENCES = (tuple, list, collections.abc.Sequence)
_PLAIN: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def check_names(what: str, names: Iterable[object]) -> None:
    """Names of entries are texts.

    Raises:
        ValueError: the first that is none.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of {what} as text, got {name!r}, which is none in YAML. Put it in quotes.")


def typed(name: str, options: Mapping[str, Any], owner: type[Any]) -> dict[str, Any]:
    """The options, each of the type that the constructor of ``owner`` declares; messages begin with ``name``.

    A number where a text belongs is that text: options of entries reach this as YAML reads them, whether they were in quotes or not. Types
    that no file can give, such as functions and modules, are not looked at.

    Raises:
        ValueError: the first option whose value is of another type.
    """
    hints = get_type_hints(owner.__init__)  # type: ignore[misc]
    found = dict(options)
    for key, value in options.items():
        if key not in hints or _fits(value, hints[key]):
            continue
        wanted = list(dict.fromkeys(_words(hints[key])))
        if "text" in wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = str(value)
            continue
        advice = f"a value of type {type(value).__name__}. Mend it"
        if "text" in wanted and isinstance(value, bool):
            advice = "which YAML makes of yes, no, on and off, here in quotes too. Rename it; a path may begin with ./"
        raise ValueError(f"{name}: expected {key} as {' or '.join(wanted)}, got {value!r}, {advice}.")
    return found


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, one) for one in _choices(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if kind in _SEQUENCES:
        return isinstance(value, (tuple, list)) and all(_fits(one, get_args(hint)[0]) for one in value)
    if kind is collections.abc.Mapping:
        return isinstance(value, Mapping)
    if kind is os.PathLike:
        return isinstance(value, os.PathLike)
    if kind not in _PLAIN:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _words(hint: Any) -> list[str]:
    """What a reader of a file would write."""
    found = []
    for one in _choices(hint):
        kind = get_origin(one) or one
        if kind in _SEQUENCES:
            found.append("a list of " + " or ".join(dict.fromkeys(f"{word}s" for word in _words(get_args(one)[0]))))
        elif kind is collections.abc.Mapping:
            found.append("names with values")
        else:
            found.append(_PLAIN.get(kind, "text"))
    return found

"""Golden numbers from ``tests/golden``: recorded from the official implementations, read only."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
_ATOL = 1e-12


@functools.cache
def _read(file: str) -> Any:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def cases(family: str, *, containing: str = "") -> list[dict[str, Any]]:
    """The cases of a family whose name contains a string; at least one."""
    found = [case for case in _read(f"{family}.json")["cases"] if containing in case["name"]]
    if not found:
        raise LookupError(f"no case of {family} contains {containing!r}")
    return found


def case(family: str, name: str) -> dict[str, Any]:
    """The case of exactly this name, without family and input set."""
    (found,) = [one for one in cases(family) if one["name"].split("/")[1] == name]
    return found


def name_of(case: dict[str, Any]) -> str:
    """Identifier for pytest."""
    return case["name"].split("/", 1)[1]


def tensor(value: Any) -> Tensor:
    """A literal array or ``{"ref": "inputs.json#set/key"}`` as a new float64 tensor."""
    if isinstance(value, dict) and "ref" in value:
        file, place = value["ref"].split("#")
        group, key = place.split("/")
        value = _read(file)[group][key]
    return torch.tensor(value, dtype=torch.float64)


def inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    """All inputs of a case; those with a recorded gradient require grad."""
    return {key: tensor(value).requires_grad_(key in case["grads"]) for key, value in case["inputs"].items()}


def assert_value(case: dict[str, Any], actual: Tensor, expected: Any) -> None:
    """Equal to the recorded value at the case's tolerance."""
    torch.testing.assert_close(actual.detach().double(), tensor(expected), rtol=case["suggested_rtol"], atol=_ATOL)


def assert_gradients(case: dict[str, Any], arguments: dict[str, Tensor]) -> None:
    """Every recorded gradient within suggested_rtol of its largest entry."""
    assert case["grads"], "the case records no gradient"
    for key, recorded in case["grads"].items():
        expected, actual = tensor(recorded), arguments[key].grad
        assert actual is not None, f"no gradient reached {key}"
        error = (actual - expected).abs().max()
        assert error <= case["suggested_rtol"] * expected.abs().max() + _ATOL, f"{key}: {error}"


def check(case: dict[str, Any], value: Tensor, arguments: dict[str, Tensor], *, output: str = "loss", prefix: str = "") -> None:
    """Value and every recorded gradient, whose keys may carry a prefix for this output."""
    assert_value(case, value, case["outputs"][output])
    keys = {key.removeprefix(prefix) for key in case["grads"] if key.startswith(prefix)} & set(arguments)
    assert keys or not case["grads"], f"none of the recorded gradients {list(case['grads'])} is among {list(arguments)}"
    if keys:
        value.backward()
        recorded = {key: case["grads"][prefix + key] for key in keys}
        assert_gradients({**case, "grads": recorded}, arguments)


def leaves(case: dict[str, Any], **more: float) -> dict[str, Tensor]:
    """Inputs and some hyper-parameters as new float64 leaves that require grad."""
    found = {key: tensor(value).requires_grad_() for key, value in case["inputs"].items() if key != "labels"}
    return found | {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in more.items()}

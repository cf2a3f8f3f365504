"""Alignment and uniformity against loops, closed forms, invariances and errors."""

import math
import re

import pytest
import torch
from batches import rotation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import alignment, tiles, uniformity


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_of(values: Tensor, normalize: bool) -> list[list[float]]:
    return [[value / (math.hypot(*row) if normalize else 1) for value in row] for row in values.detach().double().tolist()]


def alignment_oracle(image: Tensor, text: Tensor, alpha: float = 2.0, normalize: bool = True) -> float:
    pairs = zip(rows_of(image, normalize), rows_of(text, normalize), strict=True)
    return math.fsum(math.dist(one, two) ** alpha for one, two in pairs) / len(image)


def uniformity_oracle(x: Tensor, y: Tensor | None = None, t: float = 2.0, normalize: bool = True) -> float:
    one, two = rows_of(x, normalize), rows_of(x if y is None else y, normalize)
    values = [math.exp(-t * math.dist(a, b) ** 2) for i, a in enumerate(one) for j, b in enumerate(two) if i != j]
    return math.log(math.fsum(values) / len(values))


def check(actual: Tensor, expected: float) -> None:
    assert actual.ndim == 0
    assert actual.dtype == torch.float64
    assert float(actual) == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
@pytest.mark.parametrize(("samples", "width"), [(2, 1), (7, 3), (13, 33)])
def test_equals_oracle(samples, width, power, normalize):
    x, y = randn(samples, width, seed=1) + 0.3, 0.7 * randn(samples, width, seed=2)
    check(alignment(x, y, alpha=power, normalize=normalize), alignment_oracle(x, y, power, normalize))
    check(uniformity(x, t=power, normalize=normalize), uniformity_oracle(x, None, power, normalize))
    check(uniformity(x, y, t=power, normalize=normalize), uniformity_oracle(x, y, power, normalize))


def test_defaults_are_the_papers():
    x, y = 3 * randn(6, 4, seed=1), randn(6, 4, seed=2)
    check(alignment(x, y), alignment_oracle(x, y, 2.0, True))
    check(uniformity(x), uniformity_oracle(x, None, 2.0, True))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_tiles_equal_one(monkeypatch, rows):
    x, y = randn(11, 5, seed=1), randn(11, 5, seed=2)
    monkeypatch.setattr(tiles, "ROWS", rows)
    check(uniformity(x), uniformity_oracle(x))
    check(uniformity(x, y), uniformity_oracle(x, y))


def test_closed_forms():
    axes = torch.eye(6, dtype=torch.float64)
    check(uniformity(axes), -4.0)  # all distances are sqrt(2)
    check(uniformity(axes.repeat(1, 2)[:1].repeat(5, 1)), 0.0)  # equal embeddings
    check(uniformity(torch.cat([axes[:1], -axes[:1]])), -8.0)  # the least there is
    check(uniformity(axes, axes), -4.0)  # the pairs themselves are left out
    check(alignment(axes, -3 * axes, alpha=1), 2.0)
    x, y = randn(9, 5, seed=1), randn(9, 5, seed=2)
    check(alignment(x, y), float(2 - 2 * torch.cosine_similarity(x, y).mean()))


def test_nothing_vanishes():
    """Every single potential is below the least positive float."""
    x = 100 * torch.eye(4, dtype=torch.float64)
    check(uniformity(x, normalize=False), -40_000.0)


def test_large_common_offset_costs_no_digits():
    x, y = (torch.randint(-3, 3, (9, 4), generator=torch.Generator().manual_seed(seed)).double() / 2 for seed in (1, 2))
    check(uniformity(x + 2.0**30, normalize=False), uniformity_oracle(x, normalize=False))
    check(uniformity(x + 2.0**30, y + 2.0**30, normalize=False), uniformity_oracle(x, y, normalize=False))


@given(seed=st.integers(0, 99), normalize=st.booleans())
def test_invariances(seed, normalize):
    x, y = randn(7, 4, seed=seed), randn(7, 4, seed=seed + 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    more = torch.rand(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    turn = rotation(4, seed)
    one, two = ((value[order] * more if normalize else value[order] + 3) @ turn for value in (x, y))
    check(alignment(two, one, normalize=normalize), float(alignment(x, y, normalize=normalize)))
    check(uniformity(one, normalize=normalize), float(uniformity(x, normalize=normalize)))
    check(uniformity(two, one, normalize=normalize), float(uniformity(x, y, normalize=normalize)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_and_strided_inputs_that_require_grad(dtype):
    x, y = randn(5, 12, seed=1).to(dtype).T, randn(12, 10, seed=2).to(dtype)[:, ::2].requires_grad_()
    for value, expected in ((alignment(x, y), alignment_oracle(x, y)), (uniformity(y, x), uniformity_oracle(y, x))):
        check(value, expected)
        assert not value.requires_grad


GOOD = randn(5, 4, seed=3)
ZERO = GOOD.clone()
ZERO[2] = 0


@pytest.mark.parametrize(
    ("call", "name", "expected", "got"),
    [
        (lambda: uniformity(GOOD[:1]), "uniformity", "at least 2 samples", "1"),
        (lambda: uniformity(GOOD, GOOD[:4]), "uniformity", "x and y embeddings of the same samples", r"shapes \(5, 4\) and \(4, 4\)"),
        (lambda: uniformity(GOOD, GOOD[:, :3]), "uniformity", "x and y embeddings of one width", r"shapes \(5, 4\) and \(5, 3\)"),
        (lambda: uniformity(GOOD / 0), "uniformity", "finite x embeddings", "NaN or infinity"),
        (lambda: uniformity(GOOD, ZERO), "uniformity", "y embeddings with a direction", "a zero vector"),
        (lambda: uniformity(GOOD, t=0), "uniformity", "t as a finite number > 0", "0"),
        (lambda: alignment(GOOD, GOOD[:4]), "alignment", "image and text embeddings of the same samples", r"shapes \(5, 4\) and \(4, 4\)"),
        (lambda: alignment(GOOD, GOOD / 0), "alignment", "finite text embeddings", "NaN or infinity"),
        (lambda: alignment(ZERO, GOOD), "alignment", "image embeddings with a direction", "a zero vector"),
        (lambda: alignment(GOOD, GOOD, alpha=-1), "alignment", "alpha as a finite number > 0", "-1"),
    ],
)
def test_value_errors(call, name, expected, got):
    with pytest.raises(ValueError, match=rf"^{name}: expected {expected}, got {got}\. .+\.$"):
        call()


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("uniformity: expected floating-point x embeddings, got int64 tensor of shape (5, 4).")):
        uniformity(GOOD.long())

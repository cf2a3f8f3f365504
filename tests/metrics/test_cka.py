"""Linear CKA against golden numbers and loops over the Gram matrices, its invariances, its errors."""

import itertools
import math
import re

import pytest
import torch
from batches import rotation
from golden_cases import cases, inputs, name_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import linear_cka
from geomreg.metrics.moments import Moments

both_forms = pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(rows: list[list[float]]) -> list[list[float]]:
    return [[math.fsum(a * b for a, b in zip(one, two, strict=True)) for two in rows] for one in rows]


def biased_hsic(k: list[list[float]], other: list[list[float]]) -> float:
    """tr(K H L H), with H K H written out."""
    n = len(k)
    rows, total = [math.fsum(row) / n for row in k], math.fsum(map(math.fsum, k)) / n**2
    return math.fsum((k[i][j] - rows[i] - rows[j] + total) * other[i][j] for i in range(n) for j in range(n))


def unbiased_hsic(k: list[list[float]], other: list[list[float]]) -> float:
    """Song et al. 2012, eq. 4: (tr(KL) + 1'K1 1'L1 / (n - 1) / (n - 2) - 2 1'KL1 / (n - 2)) / n / (n - 3), diagonals 0."""
    n = len(k)
    k, other = ([[0.0 if i == j else value[i][j] for j in range(n)] for i in range(n)] for value in (k, other))
    trace = math.fsum(k[i][j] * other[j][i] for i in range(n) for j in range(n))
    sums = math.fsum(map(math.fsum, k)) * math.fsum(map(math.fsum, other))
    chain = math.fsum(k[i][j] * other[j][m] for i, j, m in itertools.product(range(n), repeat=3))
    return (trace + sums / (n - 1) / (n - 2) - 2 * chain / (n - 2)) / n / (n - 3)


def hsics(x: Tensor, y: Tensor, unbiased: bool) -> tuple[float, float, float]:
    one, two = gram(x.tolist()), gram(y.tolist())
    hsic = unbiased_hsic if unbiased else biased_hsic
    return hsic(one, two), hsic(one, one), hsic(two, two)


def oracle(x: Tensor, y: Tensor, unbiased: bool) -> float:
    cross, one, two = hsics(x, y, unbiased)
    return cross / math.sqrt(one * two)


def close(actual: Tensor, expected: float, tolerance: float = 1e-10) -> None:
    assert actual.ndim == 0
    assert actual.dtype == torch.float64
    assert float(actual) == pytest.approx(expected, rel=tolerance, abs=tolerance)


@both_forms
@pytest.mark.parametrize(("samples", "width", "other"), [(4, 1, 1), (4, 8, 3), (9, 3, 5), (15, 2, 33)])
def test_equals_oracle(samples, width, other, unbiased):
    x = randn(samples, width, seed=1) * torch.linspace(0.1, 3, samples, dtype=torch.float64)[:, None] + 2
    y = randn(samples, other, seed=2) + x[:, :1]
    close(linear_cka(x, y, unbiased=unbiased), oracle(x, y, unbiased))


def test_three_samples():
    x, y = randn(3, 4, seed=1), randn(3, 2, seed=2)
    close(linear_cka(x, y), oracle(x, y, False))


@both_forms
def test_rows_in_several_blocks_equal_one(monkeypatch, unbiased):
    x, y = randn(23, 4, seed=1) + 1, randn(23, 3, seed=2) * 5
    monkeypatch.setattr("geomreg.metrics.moments.ENTRIES", 7 * 5)
    close(linear_cka(x, y, unbiased=unbiased), oracle(x, y, unbiased))


@pytest.mark.parametrize("golden", cases("linear_cka"), ids=name_of)
def test_equals_official_and_rsatoolbox(golden):
    given = inputs(golden)
    value = float(linear_cka(given["A"], given["B"]))
    for expected in (golden["outputs"]["linear_cka"], golden["outputs"]["rsatoolbox_cosine_cov_of_sq_euclidean_rdm"]):
        assert value == pytest.approx(expected, rel=golden["suggested_rtol"])


@both_forms
@pytest.mark.parametrize("golden", cases("similarity_metrics_torch"), ids=name_of)
def test_equals_platonic_rep_without_its_constant(golden, unbiased):
    """Official: H(x, y) / (sqrt(H(x, x) H(y, y)) + 1e-6)."""
    x, y = inputs(golden)["A"], inputs(golden)["B"]
    cross, one, two = hsics(x, y, unbiased)
    root = math.sqrt(one * two)
    expected = golden["outputs"]["cka_linear_unbiased" if unbiased else "cka_linear_biased"]
    assert cross / (root + 1e-6) == pytest.approx(expected, rel=1e-9)
    assert float(linear_cka(x, y, unbiased=unbiased)) * root / (root + 1e-6) == pytest.approx(expected, rel=1e-9)


def test_unbiased_is_near_zero_for_independent_spaces_where_biased_is_not():
    values = [[float(linear_cka(randn(30, 60, seed=s), randn(30, 60, seed=99 + s), unbiased=u)) for s in range(20)] for u in (False, True)]
    biased, unbiased = (sum(value) / len(value) for value in values)
    assert biased > 0.6
    assert abs(unbiased) < 0.02
    assert min(values[1]) < 0


@both_forms
@given(seed=st.integers(0, 99), scale=st.sampled_from((-3.0, 0.01, 50.0)), length=st.sampled_from((0.0, 1.0, 1e6)))
def test_invariances(unbiased, seed, scale, length):
    x, y = randn(8, 5, seed=seed), randn(8, 3, seed=seed + 1)
    expected = float(linear_cka(x, y, unbiased=unbiased))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    moved = scale * x[order] @ rotation(5, seed) + length * randn(5, seed=seed + 2)
    close(linear_cka(moved, y[order], unbiased=unbiased), expected, 1e-7 if length > 1e3 else 1e-10)  # the input itself is rounded there
    close(linear_cka(y, x, unbiased=unbiased), expected)
    close(linear_cka(moved, x[order], unbiased=unbiased), 1, 1e-7 if length > 1e3 else 1e-10)


@both_forms
def test_large_common_offset_costs_no_digits(unbiased):
    """Integers: the offset changes no input by rounding, so neither may the value."""
    x, y = (torch.randint(-9, 9, (40, 6), generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    expected = float(linear_cka(x, y, unbiased=unbiased))
    assert float(linear_cka(x + 1e9, y - 3e8, unbiased=unbiased)) == pytest.approx(expected, rel=1e-10)
    batches = (Moments.of(x[start : start + 7] + 1e9, y[start : start + 7]) for start in range(0, 40, 7))
    total = next(batches)
    for batch in batches:
        total = total.merged(batch)
    for one, two in zip(total[3:], Moments.of(x, y)[3:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-3)  # the mean of 1e9 has a last digit of 1e-7


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_and_strided_inputs_that_require_grad(dtype, unbiased):
    x, y = (5 * randn(6, 10, seed=1)).to(dtype).requires_grad_(), randn(3, 10, seed=2).to(dtype).T
    value = linear_cka(x.T, y, unbiased=unbiased)
    close(value, oracle(x.detach().double().T, y.double(), unbiased))
    assert not value.requires_grad


@both_forms
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_float32(unbiased, scale):
    x, y = randn(7, 4, seed=1).float(), randn(7, 4, seed=2).float()
    expected = float(linear_cka(x, y, unbiased=unbiased))
    assert float(linear_cka(x * scale, y, unbiased=unbiased)) == pytest.approx(expected, rel=1e-6)


GOOD = randn(5, 4, seed=3)
NAN = GOOD.clone()
NAN[1, 2] = math.nan


@pytest.mark.parametrize(
    ("x", "y", "unbiased", "expected", "got"),
    [
        (GOOD[:2], GOOD[:2], False, "at least 3 samples", "2"),
        (GOOD[:3], GOOD[:3], True, "at least 4 samples", "3"),
        (GOOD[:4], GOOD, False, "x and y embeddings of the same samples", r"shapes \(4, 4\) and \(5, 4\)"),
        (NAN, GOOD, False, "finite x embeddings", "NaN or infinity"),
        (GOOD, GOOD / 0, True, "finite y embeddings", "NaN or infinity"),
        (torch.full((5, 4), 0.1), GOOD, False, "x embeddings that differ", "equal ones alone"),
        (GOOD, torch.zeros(5, 4), True, "y embeddings that differ", "equal ones alone"),
        (torch.eye(5), GOOD, True, "x embeddings of different distances for the unbiased estimate", "equidistant ones"),
        (GOOD, GOOD.to("meta"), False, "x and y embeddings on one device", "cpu and meta"),
        (GOOD * 1e70, GOOD, False, "x embeddings below 1e60", "larger ones"),
    ],
)
def test_value_errors(x, y, unbiased, expected, got):
    with pytest.raises(ValueError, match=rf"^linear_cka: expected {expected}, got {got}\. .+\.$"):
        linear_cka(x, y, unbiased=unbiased)


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("linear_cka: expected floating-point y embeddings, got int64 tensor of shape (5, 4).")):
        linear_cka(GOOD, GOOD.long())


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("size", [1e-59, 1e-30, 1e30, 1e59])
def test_embeddings_of_every_size(size, unbiased):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = linear_cka(x, y, unbiased=unbiased)
    assert 0.1 < expected < 0.999
    for one, other in ((size * x, size * y), (x, size * y), (size * x, y)):
        torch.testing.assert_close(linear_cka(one, other, unbiased=unbiased), expected, rtol=1e-9, atol=0.0)
    for beyond, what in ((1e-100, "above 1e-60, got smaller ones alone"), (1e100, "below 1e60, got larger ones")):
        with pytest.raises(ValueError, match=rf"^linear_cka: expected y embeddings {what}"):
            linear_cka(x, beyond * y, unbiased=unbiased)

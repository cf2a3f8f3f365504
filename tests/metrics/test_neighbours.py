"""Mutual nearest neighbours against loops, golden numbers, ties, invariances and errors."""

import math
import re

import numpy as np
import pytest
import torch
from batches import rotation
from golden_cases import cases, inputs, name_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import mutual_knn, neighbours

METRICS = ("inner", "cosine", "euclidean")
every_metric = pytest.mark.parametrize("metric", METRICS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nearness(one: list[float], two: list[float], metric: str) -> float:
    if metric == "euclidean":
        return -math.dist(one, two)
    inner = math.fsum(a * b for a, b in zip(one, two, strict=True))
    return inner if metric == "inner" else inner / math.hypot(*one) / math.hypot(*two)


def nearest(values: Tensor, k: int, metric: str) -> list[set[int]]:
    """A sort of all others by nearness, then by place."""
    rows = values.tolist()
    found = []
    for i, row in enumerate(rows):
        others = [(-round(nearness(row, other, metric), 9), j) for j, other in enumerate(rows) if j != i]
        found.append({j for _, j in sorted(others)[:k]})
    return found


def oracle(x: Tensor, y: Tensor, k: int, metric: str) -> list[float]:
    return [len(one & two) / k for one, two in zip(nearest(x, k, metric), nearest(y, k, metric), strict=True)]


def check(x: Tensor, y: Tensor, k: int, metric: str) -> None:
    expected = oracle(x.detach().double(), y.double(), k, metric)
    shares = mutual_knn(x, y, k=k, metric=metric, per_sample=True)
    assert shares.dtype == torch.float64
    assert shares.tolist() == pytest.approx(expected, abs=1e-12)
    value = mutual_knn(x, y, k=k, metric=metric)
    assert value.ndim == 0
    assert float(value) == pytest.approx(math.fsum(expected) / len(expected), abs=1e-12)


@every_metric
@pytest.mark.parametrize(("samples", "width", "other", "k"), [(3, 1, 2, 1), (8, 4, 4, 3), (25, 63, 5, 1), (25, 6, 7, 10), (9, 3, 3, 8)])
def test_equals_oracle(samples, width, other, k, metric):
    x = randn(samples, width, seed=1) * torch.linspace(0.2, 2, samples, dtype=torch.float64)[:, None] + 0.3
    check(x, randn(samples, other, seed=2) + x[:, :1], k, metric)


@every_metric
@given(seed=st.integers(0, 999), k=st.integers(1, 6))
def test_ties_go_to_the_first(metric, seed, k):
    """Small integers: many equal similarities and duplicate rows."""
    x, y = (torch.randint(1, 3, (8, 2), generator=torch.Generator().manual_seed(seed + part)).double() for part in (0, 1))
    check(x, y, k, metric)


@every_metric
def test_ties_of_duplicates_survive_rounding(metric):
    """A rotation turns equal similarities into some that differ in the last digit."""
    x = randn(5, 6, seed=1).repeat(4, 1)
    y = randn(20, 6, seed=2)
    turned = x @ rotation(6, seed=3)
    for k in (1, 2, 3, 4, 7):
        one, two = (mutual_knn(value, y, k=k, metric=metric, per_sample=True) for value in (x, turned))
        assert torch.equal(one, two)


@every_metric
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_tiles_equal_one(monkeypatch, metric, rows):
    x, y = randn(14, 5, seed=1), randn(14, 5, seed=2)
    monkeypatch.setattr(neighbours, "ROWS", rows)
    check(x, y, 4, metric)


@pytest.mark.parametrize("golden", cases("similarity_metrics_torch"), ids=name_of)
def test_equals_platonic_rep(golden):
    given = inputs(golden)
    for k in (1, 3):
        assert float(mutual_knn(given["A"], given["B"], k=k)) == pytest.approx(golden["outputs"][f"mutual_knn_top{k}"], abs=1e-12)


@every_metric
def test_extremes(metric):
    x, y = randn(300, 8, seed=1), randn(300, 8, seed=2)
    assert float(mutual_knn(x, x, k=10, metric=metric)) == 1
    assert float(mutual_knn(x, y, k=299, metric=metric)) == 1
    assert float(mutual_knn(x, y, k=10, metric=metric)) == pytest.approx(10 / 299, abs=0.02)


@every_metric
@given(seed=st.integers(0, 99))
def test_invariances(metric, seed):
    x, y = randn(12, 5, seed=seed), randn(12, 4, seed=seed + 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    expected = mutual_knn(x, y, k=3, metric=metric, per_sample=True)
    moved = 3 * x @ rotation(5, seed)
    if metric == "euclidean":
        moved = moved + 1e3 * randn(5, seed=seed)
    if metric == "cosine":
        moved = moved * torch.rand(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).add(0.1)
    assert torch.equal(mutual_knn(moved[order], y[order], k=3, metric=metric, per_sample=True), expected[order])
    assert torch.equal(mutual_knn(y, x, k=3, metric=metric, per_sample=True), expected)


def test_metrics_differ_and_inner_is_the_default():
    x, y = randn(40, 3, seed=1) + 1, randn(40, 3, seed=2)
    values = {metric: float(mutual_knn(x, y, k=3, metric=metric)) for metric in METRICS}
    assert len(set(values.values())) == 3
    assert float(mutual_knn(x, y, k=3)) == values["inner"]


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_and_strided_inputs_that_require_grad(metric, dtype):
    x, y = randn(5, 12, seed=1).to(dtype).T.requires_grad_(), randn(12, 6, seed=2).to(dtype)[:, ::2]
    check(x, y, 3, metric)


GOOD = randn(5, 4, seed=3)
NAN = GOOD.clone()
NAN[1, 2] = math.nan
ZERO = GOOD.clone()
ZERO[2] = 0

COLLAPSED = "x or y embeddings that differ"


@pytest.mark.parametrize(
    ("x", "y", "options", "expected", "got"),
    [
        (GOOD[:2], GOOD[:2], {}, "at least 3 samples", "2"),
        (GOOD[:4], GOOD, {}, "x and y embeddings of the same samples", r"shapes \(4, 4\) and \(5, 4\)"),
        (NAN, GOOD, {}, "finite x embeddings", "NaN or infinity"),
        (GOOD, GOOD, {"k": 5}, "k below the number of samples, 5", "5"),
        (GOOD, GOOD, {"k": 0}, "k as a whole number >= 1", "0"),
        (GOOD, GOOD, {"k": 1.5}, "k as a whole number >= 1", r"1\.5"),
        (GOOD, ZERO, {"metric": "cosine"}, "y embeddings with a direction", "a zero vector"),
        *(
            (GOOD[:1].expand(5, 4), 2 * GOOD[:1].expand(5, 4) + 1e-14 * GOOD, {"metric": metric}, COLLAPSED, "equal ones alone")
            for metric in ("inner", "cosine", "euclidean")
        ),
        (0 * GOOD, 0 * GOOD, {}, COLLAPSED, "equal ones alone"),
        (GOOD, GOOD, {"metric": "l1"}, "metric to be one of 'inner', 'cosine', 'euclidean'", "'l1'"),
    ],
)
def test_value_errors(x, y, options, expected, got):
    with pytest.raises(ValueError, match=rf"^mutual_knn: expected {expected}, got {got}\. .+\.$"):
        mutual_knn(x, y, **{"k": 2, **options})


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("mutual_knn: expected x embeddings as a tensor of shape (B, D), got list.")):
        mutual_knn([[1.0]], GOOD, k=1)


@pytest.mark.parametrize("metric", ["inner", "cosine", "euclidean"])
@pytest.mark.parametrize("size", [1e4, 1e7, 1e12])
def test_an_outlier_makes_no_ties(metric, size):
    """Each sample's neighbours by a loop in extended precision."""
    one, two = randn(60, 6, seed=1), randn(60, 6, seed=2)
    one[0] *= size
    two[7] *= size
    neighbours = []
    for rows in (one, two):
        x = rows.numpy().astype(np.longdouble)
        if metric == "cosine":
            x = x / np.sqrt((x * x).sum(axis=1, keepdims=True))
        far = ((x[:, None] - x[None]) ** 2).sum(axis=2) if metric == "euclidean" else -(x @ x.T)
        np.fill_diagonal(far, np.inf)
        neighbours.append(np.argsort(far, axis=1)[:, :5])
    shares = [len(set(p) & set(q)) / 5 for p, q in zip(*neighbours, strict=True)]
    found = mutual_knn(one, two, k=5, metric=metric, per_sample=True).tolist()
    ordinary = [row for row in range(60) if row not in (0, 7)]  # seen from an outlier all others are alike
    assert [found[row] for row in ordinary] == [shares[row] for row in ordinary]


def test_neighbours_of_rows_that_differ_in_the_seventh_digit():
    rows = randn(40, 6, seed=1).round(decimals=3)
    far = 2.0**20 + rows
    assert float(mutual_knn(far, far - 2.0**20, k=5, metric="euclidean")) == 1

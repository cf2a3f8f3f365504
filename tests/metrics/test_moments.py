"""Moments of batches put together equal loops over all rows."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics.moments import Moments, collected


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(*blocks: Tensor) -> list[Tensor]:
    """Number, mean, scatter, cubic, quartic, entry by entry."""
    rows = torch.cat(blocks, dim=1).tolist()
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]
    ends = list(itertools.accumulate((value.shape[1] for value in blocks), initial=0))
    squares = [[math.fsum(value**2 for value in row[a:b]) for a, b in itertools.pairwise(ends)] for row in centred]

    def sums(one: list[list[float]], two: list[list[float]]) -> list[list[float]]:
        return [[math.fsum(a[i] * b[j] for a, b in zip(one, two, strict=True)) for j in range(len(two[0]))] for i in range(len(one[0]))]

    values = (len(rows), means, sums(centred, centred), sums(squares, centred), sums(squares, squares))
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def check(actual: Moments, *blocks: Tensor) -> None:
    assert actual.widths == tuple(value.shape[1] for value in blocks)
    for one, two in zip(actual[1:], oracle(*blocks), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-9)


@given(cuts=st.lists(st.integers(1, 11), max_size=4), widths=st.sampled_from(((1,), (3,), (2, 4), (1, 2, 3))), seed=st.integers(0, 99))
def test_batches_equal_all_rows(cuts, widths, seed):
    blocks = [(1 + k) * randn(12, width, seed=seed + k) + 10 * k for k, width in enumerate(widths)]
    edges = sorted({0, 12, *cuts})
    state: list[Tensor] = []
    for start, stop in itertools.pairwise(edges):
        batch = Moments.of(*(value[start:stop] for value in blocks))
        state = [collected("test", [*state, batch.record()], 1).record()]
    check(collected("test", state, 1), *blocks)


def test_records_of_processes_one_behind_the_other():
    blocks = [randn(12, 3, seed=1), randn(12, 2, seed=2)]
    records = [Moments.of(*(value[part] for value in blocks)).record() for part in (slice(0, 5), slice(5, 12))]
    check(collected("test", torch.cat([torch.zeros(0, dtype=torch.float64), *records]), 12), *blocks)
    with pytest.raises(ValueError, match=r"^test: expected at least 13 samples, got 12\. Take more samples\.$"):
        collected("test", records, 13)
    with pytest.raises(
        ValueError, match=r"^test: expected embeddings of width 3 and 2 as before, got 3\. Call reset\(\) between models\.$"
    ):
        collected("test", [*records, Moments.of(blocks[0]).record()], 1)


def test_blocks_and_spread():
    x, y = randn(9, 3, seed=1) + 5, randn(9, 2, seed=2)
    moments = Moments.of(x, y)
    centred = x - x.mean(dim=0)
    torch.testing.assert_close(moments.block(0, 1), centred.T @ (y - y.mean(dim=0)))
    torch.testing.assert_close(moments.centre(1), y.mean(dim=0))
    torch.testing.assert_close(moments.spread(0), centred.square().sum() / 9)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, True), (1e-6, False)])
def test_collapse(noise, expected):
    rows = torch.full((50, 3), 0.1, dtype=torch.float64) + noise * randn(50, 3)
    moments = Moments.of(rows, randn(50, 2))
    assert moments.collapsed(0) == expected
    assert not moments.collapsed(1)
    assert Moments.of(0 * rows).collapsed(0)


def test_rows_that_differ_in_the_last_digit_are_collapsed():
    rows = torch.full((50, 3), 0.1, dtype=torch.float64)
    rows[::2] = torch.nextafter(rows[::2], torch.ones_like(rows[::2]))
    assert Moments.of(rows).spread(0) > 0
    assert Moments.of(rows).collapsed(0)

"""Sums over samples against loops over pairs: weights, merging, two sets, and where digits go."""

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from geomreg.metrics import rsa, rsa_moments
from geomreg.metrics.rsa_moments import CLOSED, Moments, closed_sums, precise
from geomreg.metrics.rsa_pairs import Space, Sums


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop(pairs, student: Tensor, teacher: Tensor, weights: Tensor) -> Sums:
    """``pairs``: two rows and the weight of each pair."""
    p = torch.stack([(student[i] - student[j]).square().sum() for i, j in pairs])
    q = torch.stack([(teacher[i] - teacher[j]).square().sum() for i, j in pairs])
    n = weights.sum()
    mean_p, mean_q = weights @ p / n, weights @ q / n
    p, q = p - mean_p, q - mean_q
    return Sums(n, mean_p, mean_q, weights @ (p * p), weights @ (q * q), weights @ (p * q))


def assert_sums(actual: Sums, expected: Sums) -> None:
    torch.testing.assert_close(torch.stack(list(actual)), torch.stack(list(expected)), rtol=1e-10, atol=0)


WEIGHTS = {"none": None, "counts": torch.tensor([0, 1, 1, 3, 2, 0, 1, 1, 0, 1, 4], dtype=torch.float64), "reals": randn(11, seed=9).exp()}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("offset", [0, 50])
def test_within_equals_a_loop(weights, offset):
    """A weighted sample has no pairs with itself, whatever its weight."""
    x, y, w = offset + randn(11, 3, seed=1), offset + randn(11, 5, seed=2), WEIGHTS[weights]
    x[:, :2] += y[:, :2]
    known = torch.ones(11, dtype=torch.float64) if w is None else w
    pairs = list(itertools.permutations(range(11), 2))
    expected = loop(pairs, x, y, torch.stack([known[i] * known[j] for i, j in pairs]))
    assert_sums(Moments.of(x, y, w).within(), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_between_equals_a_loop(weights):
    x, y, w = randn(22, 3, seed=1), randn(22, 5, seed=2), WEIGHTS[weights]
    x[:11] += 2  # a gap between images and texts
    y[11:] *= 3
    known = torch.ones(11, dtype=torch.float64) if w is None else w
    pairs = list(itertools.product(range(11), range(11, 22)))
    expected = loop(pairs, x, y, torch.stack([known[i] * known[j - 11] for i, j in pairs]))
    assert_sums(Moments.of(x[:11], y[:11], w).between(Moments.of(x[11:], y[11:], w)), expected)


@pytest.mark.parametrize("cuts", [(0, 4, 11), (0, 1, 2, 3, 11), tuple(range(12))])
def test_merged_moments_equal_those_of_all(cuts):
    x, y = randn(11, 3, seed=1) + torch.arange(11.0)[:, None], randn(11, 5, seed=2)
    total = None
    for start, stop in itertools.pairwise(cuts):
        one = Moments.of(x[start:stop], y[start:stop])
        total = one if total is None else total.plus(one)
    expected = Moments.of(x, y)
    for field in Moments._fields[6:]:
        torch.testing.assert_close(getattr(total, field), getattr(expected, field), rtol=1e-11, atol=1e-9)
    for one in "xy":
        means = [getattr(value, f"origin_{one}") + getattr(value, f"mean_{one}") for value in (total, expected)]
        torch.testing.assert_close(*means)


def test_packed_moments():
    sets = [Moments.of(randn(4, 3, seed=seed), randn(4, 2, seed=seed)) for seed in (1, 2)]
    found = Moments.unpacked(torch.cat([one.packed() for one in sets]))
    assert len(found) == 2
    for one, two in zip(sets, found, strict=True):
        for field in Moments._fields:
            assert torch.equal(getattr(one, field), getattr(two, field)), field


# precision ------------------------------------------------------------------------------------------------------------

N, D = 200, 24
BASE, NOISE = randn(N, D, seed=1), randn(N, D, seed=2)
CENTRES = randn(5, D, seed=3).repeat(N // 5, 1)
SCALES = torch.arange(D, dtype=torch.float64)
HARD = {
    "plain": (BASE + 0.5 * NOISE, BASE),
    "far from zero": (1e6 + BASE + 0.5 * NOISE, 1e3 + BASE),
    "far and small": (1e3 + 1e-7 * BASE, BASE + 0.1 * NOISE),
    "narrow cone": (1 + 1e-6 * (BASE + 0.5 * NOISE) * SCALES, 1 + 1e-6 * BASE * SCALES),
    "drift of 1e-6": (BASE + 1e-6 * NOISE, BASE),
    "tight clusters": (CENTRES + 1e-6 * BASE, CENTRES + 1e-6 * NOISE),
    "duplicates": (CENTRES, CENTRES + NOISE),
    "an outlier": (torch.cat([BASE[:-1], 1e6 * BASE[-1:]]), BASE + 0.1 * NOISE),
    "heavy tails": (BASE * (4 * randn(N, 1, seed=4)).exp(), BASE + 0.1 * NOISE),
    "tiny": (1e-100 * BASE, BASE + NOISE),
    "huge": (1e100 * BASE, BASE + NOISE),
}


def by_differences(student: Tensor, teacher: Tensor, dissimilarity: str) -> float:
    values = []
    for rows in (student, teacher):
        x = rows.numpy().astype("longdouble")
        if dissimilarity == "correlation":
            x = x - x.mean(axis=1, keepdims=True)
        if dissimilarity != "sqeuclidean":
            x = x / abs(x).max(axis=1, keepdims=True)
            x = x / ((x * x).sum(axis=1, keepdims=True)) ** 0.5
        d = ((x[:, None] - x[None]) ** 2).sum(axis=2)[torch.triu_indices(len(x), len(x), 1).unbind()]
        d = d - d.mean()
        values.append(d / (d @ d) ** 0.5)
    return float(values[0] @ values[1])


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dissimilarity", CLOSED)
@pytest.mark.parametrize("chunk", [2048, 17])
def test_twelve_digits_on_hard_data(name, dissimilarity, chunk, monkeypatch):
    monkeypatch.setattr(rsa_moments, "CHUNK", chunk)
    student, teacher = HARD[name]
    expected = by_differences(student, teacher, dissimilarity)
    tolerance = 1e-8 if (name, dissimilarity) == ("far and small", "cosine") else 2e-12  # unit vectors that differ by 1e-10
    assert float(rsa(student, teacher, dissimilarity=dissimilarity)) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dissimilarity", CLOSED)
def test_the_closed_form_needs_no_pairs(dissimilarity, monkeypatch):
    monkeypatch.delattr(Space, "of")
    for name in ("plain", "far from zero", "narrow cone", "tight clusters", "drift of 1e-6", "heavy tails"):
        assert rsa(*HARD[name], dissimilarity=dissimilarity).isfinite()
    with pytest.raises(AttributeError):
        rsa(*HARD["plain"], dissimilarity=dissimilarity, method="exact")


@pytest.mark.parametrize("dissimilarity", CLOSED)
@pytest.mark.parametrize("spread", [0.1, 0.03, 0.01, 1e-3, 1e-5, 1e-7])
def test_nearly_equal_distances(spread, dissimilarity):
    """A simplex with noise: sums are precise as far as they say so, and what is returned is precise always."""
    simplex = torch.eye(N, dtype=torch.float64)
    student, teacher = (simplex + spread * randn(N, N, seed=seed) / 4 for seed in (1, 2))
    expected = by_differences(student, teacher, dissimilarity)
    sums = closed_sums("test", student, teacher, dissimilarity, cross=False)
    condition = max(float(1 + sums.number * mean**2 / square) for mean, square in ((sums.mean_p, sums.pp), (sums.mean_q, sums.qq)))
    assert precise(sums) == (condition <= 1e5)
    assert precise(sums) == (spread > 0.005)
    if precise(sums):
        assert abs(float(sums.correlation()) - expected) <= 30 * 2.0**-53 * condition
    tolerance = 3e-10 if precise(sums) else 1e-15 / spread  # of numbers near 1 that differ by the spread
    assert float(rsa(student, teacher, dissimilarity=dissimilarity)) == pytest.approx(expected, abs=tolerance)


def test_few_samples_of_many_dimensions_need_no_square_of_them(monkeypatch):
    monkeypatch.delattr(importlib.import_module("geomreg.metrics.rsa"), "closed_sums")
    assert rsa(randn(10, 11), randn(10, 3, seed=1), dissimilarity="cosine").isfinite()
    with pytest.raises(NameError):
        rsa(randn(11, 11), randn(11, 3, seed=1), dissimilarity="cosine")


def test_nothing_but_numbers_is_precise():
    good = Sums(*(torch.tensor(value, dtype=torch.float64) for value in (10.0, 0.0, 0.0, 2.0, 2.0, 1.0)))
    assert precise(good)
    for value in (math.nan, math.inf, -1.0, 0.0, 1e-300):
        assert not precise(good._replace(pp=torch.tensor(value, dtype=torch.float64)))
        assert not precise(good._replace(qq=torch.tensor(value, dtype=torch.float64)))

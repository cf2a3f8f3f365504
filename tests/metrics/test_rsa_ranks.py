"""Ranks by histogram: the bound holds with ties and on any data, and is tight where it can be; exact ranks against scipy."""

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from geomreg import Embeddings
from geomreg.metrics import bounded_rsa, rsa, rsa_ranks
from geomreg.metrics.rsa_pairs import Pairs, Space
from geomreg.metrics.rsa_ranks import ROUNDING, Bins, by_histogram, ranks

rsa_module = importlib.import_module("geomreg.metrics.rsa")  # the package's attribute of this name is the function


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given_pairs(p: Tensor, q: Tensor, parts: int = 3) -> SimpleNamespace:
    """In the place of Pairs: any dissimilarities, in some tiles."""
    pairs = SimpleNamespace(number=len(p), cross=False, student=SimpleNamespace(rows=torch.zeros(3, 1, dtype=torch.float64)))
    pairs.tiles = lambda: zip(p.chunk(parts), q.chunk(parts), strict=True)
    pairs.sampled = lambda least: iter([(p[::7], q[::7])])
    return pairs


def exact(p: Tensor, q: Tensor) -> float:
    return float(spearmanr(p.numpy(), q.numpy()).statistic)


# exact ranks ----------------------------------------------------------------------------------------------------------


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_ranks_equal_scipys(values):
    np.testing.assert_array_equal(ranks(torch.tensor(values, dtype=torch.float64)).numpy(), rankdata(values))


def test_ranks_of_values_that_rounding_separates():
    values = torch.tensor([3.0, 1.0, 1.0 + 1e-12, 2.0, 0.0, 0.0, 1e-15, 3.0 * (1 - 2.0**-52)], dtype=torch.float64)
    assert ranks(values).tolist() == [7.5, 4.5, 4.5, 6.0, 1.5, 1.5, 3.0, 7.5]


def test_few_of_many_values_tie_by_chance():
    values = 1 + torch.rand(300_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (torch.from_numpy(rankdata(values)) != ranks(values)).sum() <= 10


# the bound ------------------------------------------------------------------------------------------------------------

few = st.integers(0, 6).map(float)
spread_out = st.floats(0, 1e6).map(lambda value: round(value, 6))
tailed = st.floats(-12, 12).map(lambda power: 10.0**power)


@given(data=st.data(), values=st.sampled_from([few, spread_out, tailed]), bins=st.sampled_from([8, 11, 64, 1 << 12]))
def test_the_bound_holds(data, values, bins):
    size = data.draw(st.integers(3, 60))
    p, q = (torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64) for _ in range(2))
    assume(all(float(value.max() - value.min()) > 1e-9 * float(value.max()) for value in (p, q)))
    assume(all(np.diff(np.unique(value.numpy()), prepend=-1).min() > 1e-9 * float(value.max()) for value in (p, q)))
    value, bound = by_histogram("test", given_pairs(p, q), bins)
    assert -1 <= value <= 1
    assert 0 < bound < 2.001
    assert abs(float(value) - exact(p, q)) <= bound


@pytest.mark.parametrize("bins", [8, 32, 256])
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_the_bound_holds_in_few_bins_and_falls_with_their_number(bins, noise):
    p = randn(4000).exp()
    q = p + noise * randn(4000, seed=1).abs()
    value, bound = by_histogram("test", given_pairs(p, q), bins)
    _, finer = by_histogram("test", given_pairs(p, q), 8 * bins)
    assert abs(float(value) - exact(p, q)) <= bound
    assert finer < 0.35 * bound


def test_the_bound_is_attained():
    """Where order within bins is as unlike as it can be: of two bins each, one with all the disorder."""
    p = torch.cat([torch.zeros(10), torch.linspace(0.95, 1, 20)]).double()
    q = torch.cat([torch.zeros(10), torch.linspace(1, 0.95, 20)]).double()
    value, bound = by_histogram("test", given_pairs(p, q), 8)
    error = float(value) - exact(p, q)
    assert float(value) == pytest.approx(1, abs=1e-12)  # no disorder between bins
    angle = 2 * np.arctan(np.sqrt((20**3 - 20) / 12 / (10 * 10**2 + 20 * 5**2)))
    assert float(bound) == pytest.approx(1 - np.cos(angle + np.arccos(1 - 1e-12)), abs=1e-9)  # zeros are one value, and add nothing
    assert error == pytest.approx(float(bound), rel=1e-5)


def test_one_more_pass_for_heavy_ties():
    """Of a tenth of the pairs at one distance the bin is full, and their ranks are known all the same."""
    p, q = torch.randint(12, (2, 3000), generator=torch.Generator().manual_seed(0)).double()
    q = torch.maximum(p, q)
    value, bound = by_histogram("test", given_pairs(p, q), 1 << 12)
    assert float(bound) < 1e-9
    assert float(value) == pytest.approx(exact(p, q), abs=1e-12)
    value, bound = by_histogram("test", given_pairs(p + 1e-5 * randn(3000).abs(), q), 1 << 12)  # near, not tied
    assert float(bound) > 0.01


def test_ties_that_rounding_moves_over_an_edge():
    """Values at an edge, rounded to either side of it in an order that misleads. The bins hold one value each: only the edges tell."""
    bins = Bins.of(0.0, 1.0, 64)
    levels = torch.tensor([0.0, *((np.array([10, 20, 30]) - 0.5) / bins.scale), 1.0], dtype=torch.float64)
    p, q = levels[torch.arange(40) // 8], levels[torch.arange(40) % 5]
    jitter = 1 + 2.0**-50 * (q - q.median()).sign()
    value, bound = by_histogram("test", given_pairs(p * jitter, q), 64)
    assert 1e-3 < abs(float(value) - exact(p, q)) <= bound
    levels = torch.tensor([0.0, *((np.array([10, 20, 30]) - 0.25) / bins.scale), 1.0], dtype=torch.float64)
    p, q = levels[torch.arange(40) // 8], levels[torch.arange(40) % 5]
    value, bound = by_histogram("test", given_pairs(p * jitter, q), 64)  # away from the edges the same jitter does nothing
    assert abs(float(value) - exact(p, q)) <= bound <= 1e-11
    levels = torch.tensor([0.0, *((np.array([10, 20, 30]) - 0.5) / bins.scale), 1.0], dtype=torch.float64)
    assert int(bins.at_edges(bins.positions(levels * (1 + 0.5 * ROUNDING)))) == 3
    assert int(bins.at_edges(bins.positions(levels * (1 - 0.5 * ROUNDING)))) == 3
    assert int(bins.at_edges(bins.positions(levels * (1 + 1e-9)))) == 0


def test_few_far_outliers_leave_bins_for_the_rest():
    p = randn(100_000).abs()
    q = p + 0.3 * randn(100_000, seed=1).abs()
    _, plain = by_histogram("test", given_pairs(p, q), 1 << 14)
    p[::5000] = 1e7
    value, bound = by_histogram("test", given_pairs(p, q), 1 << 14)
    assert bound < 2 * plain < 2e-3
    assert abs(float(value) - exact(p, q)) <= bound


@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean", "cosine", "correlation"])
@pytest.mark.parametrize("rounded", [False, True])
def test_of_embeddings(dissimilarity, rounded):
    teacher = randn(150, 6, seed=1)
    student = teacher + 0.5 * randn(150, 6, seed=2)
    if rounded:
        teacher, student = (value.round() + 0.1 * torch.arange(6) for value in (teacher, student))  # duplicates and ties
    expected = rsa(student, teacher, dissimilarity=dissimilarity, correlation="spearman", method="exact")
    value, bound = bounded_rsa(student, teacher, dissimilarity=dissimilarity)
    assert abs(value - expected) <= bound
    assert bound < 1e-3
    assert torch.equal(rsa(student, teacher, dissimilarity=dissimilarity, correlation="spearman", method="histogram"), value)
    again, none = bounded_rsa(student, teacher, dissimilarity=dissimilarity, method="exact")
    assert (again, none) == (expected, 0)


def test_auto_sorts_few_pairs_and_counts_many(monkeypatch):
    student, teacher = randn(20, 4, seed=1), randn(20, 4, seed=2)
    assert bounded_rsa(student, teacher, method="auto").bound == 0
    monkeypatch.setattr(rsa_module, "SORTED", 190)
    assert bounded_rsa(student, teacher, method="auto").bound == 0
    monkeypatch.setattr(rsa_module, "SORTED", 189)
    assert bounded_rsa(student, teacher, method="auto").bound > 0


def test_a_loose_bound_warns():
    """Half of the distances are a billion times smaller: no bin tells them apart."""
    teacher = torch.cat([1e-9 * randn(20, 3), 1 + 1e-9 * randn(20, 3, seed=1)])
    student = torch.cat([1e-9 * randn(20, 3, seed=2), 1 + 1e-9 * randn(20, 3, seed=3)])
    with pytest.warns(UserWarning, match=r'^rsa: the histogram leaves an error of up to 0\.\d+ in \d\.\d+\. Pass method="exact"'):
        rsa(student, teacher, correlation="spearman", method="histogram")
    value, bound = bounded_rsa(student, teacher)
    assert abs(value - rsa(student, teacher, correlation="spearman", method="exact")) <= bound


def test_a_sample_that_says_nothing(monkeypatch):
    """The distances that choose the bins are all equal, the others are not."""
    monkeypatch.setattr(rsa_ranks, "SAMPLE", 2)
    p, q = randn(300).abs(), randn(300, seed=1).abs()
    p[::7] = 1.0
    value, bound = by_histogram("test", given_pairs(p, q), 1 << 20)
    assert abs(float(value) - exact(p, q)) <= bound


@pytest.mark.parametrize("size", [40, 4000])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_ranks_guessed_from_a_sample(size, noise, monkeypatch):
    """A worse guess is in the bound."""
    p = randn(size).exp()
    q = p + noise * randn(size, seed=1).abs()
    _, known = by_histogram("test", given_pairs(p, q), 1 << 16)
    monkeypatch.setattr(rsa_ranks, "SAMPLE", 1)
    value, guessed = by_histogram("test", given_pairs(p, q), 1 << 16)
    assert 1e-9 < abs(float(value) - exact(p, q)) <= guessed
    assert known < guessed < 40 / size


@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean", "cosine", "correlation"])
@pytest.mark.parametrize("modality", ["stacked", "cross-modal"])
def test_a_sample_of_embeddings(dissimilarity, modality, monkeypatch):
    """Guesses from one pair in four are good to a few per cent, and what they leave is of second order."""
    teacher = Embeddings(randn(120, 6, seed=1), 1 + randn(120, 6, seed=2))
    student = Embeddings(*(value + randn(120, 6, seed=3) for value in teacher))
    expected = rsa(student, teacher, modality=modality, dissimilarity=dissimilarity, correlation="spearman")
    monkeypatch.setattr(rsa_ranks, "SAMPLE", 4000)
    value, bound = bounded_rsa(student, teacher, modality=modality, dissimilarity=dissimilarity)
    assert abs(value - expected) <= bound
    assert 1e-5 < bound < 4e-3


@pytest.mark.parametrize(("cross", "rows"), [(False, 6), (False, 7), (False, 300), (True, 6), (True, 300)])
def test_a_sample_has_every_row_alike(cross, rows):
    space = Space(torch.zeros(rows, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), True)
    seen = torch.zeros(rows, rows, dtype=torch.int64)

    class Seen(Space):
        def chosen(self, left, right):
            seen[left[:, None], right] += 1
            return torch.ones(len(left), len(right), dtype=torch.float64)

    pairs = Pairs(Seen(*space), Space(*space), cross)
    found = sum(len(p) for p, _ in pairs.sampled(20_000))
    assert 20_000 <= found == seen.sum() <= 20_000 + rows * 64
    assert seen.diagonal().sum() == 0
    if cross:
        assert seen[: rows // 2, rows // 2 :].sum() == found
    times = seen.sum(dim=0) + seen.sum(dim=1)
    assert times.min() > 0.3 * times.double().mean()  # those of the last patch meet fewer


@pytest.mark.parametrize("rows", [torch.eye(6), torch.ones(6, 4)])
def test_equal_distances_raise(rows):
    with pytest.raises(ValueError, match=re.escape("bounded_rsa: expected distances that differ, got 15 equal ones.")):
        bounded_rsa(rows, randn(6, 3))


@pytest.mark.parametrize("bins", [7, 2.5, True])
def test_bins(bins):
    with pytest.raises(ValueError, match=r"^bounded_rsa: expected bins as a whole number >= 8, got"):
        bounded_rsa(randn(5, 3), randn(5, 3), bins=bins)


# data of many scales --------------------------------------------------------------------------------------------------


def many_scales(kind: str, rows: int) -> tuple[Tensor, Tensor]:
    student = randn(rows, 8)
    teacher = student + 0.3 * randn(rows, 8, seed=1)
    if kind == "an outlier":
        student[0] *= 1e6
        teacher[0] *= 1e6
    elif kind == "norms of many sizes":
        student, teacher = student * (3 * randn(rows, 1, seed=2)).exp(), teacher * (3 * randn(rows, 1, seed=3)).exp()
    else:
        centres = randn(5, 8, seed=4).repeat(rows // 5, 1)
        student, teacher = centres + 1e-6 * student, centres + 1e-6 * teacher
    return student, teacher


@pytest.mark.parametrize("kind", ["an outlier", "norms of many sizes", "tight clusters"])
@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("rows", [60, 300])  # among few the outlier's pairs are no small tail
def test_far_pairs_do_not_tie_near_ones(kind, dissimilarity, rows):
    student, teacher = many_scales(kind, rows)
    expected = spearmanr(*(tied(pdist(rows, dissimilarity)) for rows in (student, teacher))).statistic
    options = {"dissimilarity": dissimilarity}
    assert float(rsa(student, teacher, correlation="spearman", **options)) == pytest.approx(expected, abs=1e-9)
    for bins in (64, 1 << 12, 1 << 17):
        value, bound = bounded_rsa(student, teacher, bins=bins, **options)
        assert abs(float(value) - expected) <= bound


def test_a_monotone_dissimilarity_has_the_same_ranks():
    student, teacher = many_scales("norms of many sizes", 120)
    one, two = (rsa(student, teacher, correlation="spearman", dissimilarity=name) for name in ("euclidean", "sqeuclidean"))
    assert float(one) == pytest.approx(float(two), abs=1e-12)


@pytest.mark.parametrize("dissimilarity", ["euclidean", "cosine"])
def test_copies_tie_after_a_rotation(dissimilarity):
    """Distances of 0 that rounding makes 1e-16."""
    student = randn(6, 8).repeat(4, 1) * (1 if dissimilarity == "euclidean" else randn(24, 1, seed=1).exp())
    turn = torch.linalg.qr(randn(8, 8, seed=2)).Q
    assert float(rsa(student @ turn, student, correlation="spearman", dissimilarity=dissimilarity)) == pytest.approx(1, abs=1e-12)


def pdist(rows: Tensor, dissimilarity: str) -> np.ndarray:
    """From differences, of unit vectors in extended precision for cosine."""
    x = rows.numpy().astype(np.longdouble)
    if dissimilarity == "cosine":
        x = x / np.sqrt((x * x).sum(axis=1, keepdims=True))
    one, two = np.triu_indices(len(x), 1)
    squares = ((x[one] - x[two]) ** 2).sum(axis=1)
    return np.sqrt(squares) if dissimilarity == "euclidean" else squares


def tied(values: np.ndarray) -> np.ndarray:
    """One number for neighbours within 1e-11: where clusters are tight, there are some."""
    order = np.argsort(values)
    steps = np.diff(values[order]) > 1e-11 * values[order][1:]
    group = np.empty(len(values))
    group[order] = np.concatenate([[0], np.cumsum(steps)])
    return group

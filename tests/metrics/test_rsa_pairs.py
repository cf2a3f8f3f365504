"""Tiles of dissimilarities: accurate where a matrix product is not, complete, and each pair once."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor

from geomreg.metrics import rsa_pairs, tiles
from geomreg.metrics.rsa_pairs import Pairs, Space, Sums


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop(rows: Tensor, dissimilarity: str) -> np.ndarray:
    """``(N, N)`` in extended precision, from differences."""
    x = rows.numpy().astype(np.longdouble)
    if dissimilarity == "correlation":
        x = x - x.mean(axis=1, keepdims=True)
    if dissimilarity in ("cosine", "correlation"):
        x = x / np.sqrt((x * x).sum(axis=1, keepdims=True))
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    return np.sqrt(squares) if dissimilarity == "euclidean" else squares


CENTRES = randn(5, 48, seed=1).repeat(14, 1)
HARD = {
    "plain": randn(70, 48),
    "one dimension": randn(70, 1),
    "far from zero": 1e6 + randn(70, 48),
    "tight clusters": CENTRES + 2.0**-26 * randn(70, 48).round(decimals=1),
    "some near": torch.cat([randn(66, 48), randn(66, 48)[:4] + 1e-7]),
    "duplicates": CENTRES,
    "an outlier": torch.cat([randn(69, 48), 1e8 * randn(1, 48, seed=2)]),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("tile", [512, 16])
def test_tiles_keep_eleven_digits(name, dissimilarity, tile, monkeypatch):
    """Relative to each distance, however small: what ``ROUNDING`` of the ranks relies on."""
    monkeypatch.setattr(rsa_pairs, "TILE", tile)
    space = Space.of("test", HARD[name], dissimilarity)
    pairs = Pairs(space, space, cross=False)
    expected = loop(HARD[name], dissimilarity)
    found = np.zeros_like(expected)
    for left, right in pairs.slices():
        found[left, right] = space.tile(left, right).numpy()
    found = np.triu(found, 1)
    expected = np.triu(expected, 1)
    scale = found.max() / float(expected.max())
    error = np.abs(found / scale - expected)
    assert (error <= 1e-11 * expected).all()


@pytest.mark.parametrize("dissimilarity", ["cosine", "correlation"])
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_directions_of_any_magnitude(dissimilarity, size):
    rows = randn(9, 5)
    space = Space.of("test", rows * size * randn(9, 1, seed=1).exp(), dissimilarity)
    found, expected = space.tile(slice(0, 4), slice(4, 9)), loop(rows, dissimilarity)[:4, 4:]
    assert np.ptp(found.numpy() / expected.astype(float)) <= 1e-12 * found.numpy().max()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tile", [1, 3, 8, 512])
def test_every_pair_once_in_one_order(cross, tile, monkeypatch):
    monkeypatch.setattr(rsa_pairs, "TILE", tile)
    student, teacher = randn(16, 3, seed=1), randn(16, 2, seed=2)
    pairs = Pairs(*(Space.of("test", rows, "euclidean") for rows in (student, teacher)), cross)
    one, two = pairs.gathered()
    chosen = itertools.product(range(8), range(8, 16)) if cross else itertools.combinations(range(16), 2)
    expected = sorted((float((teacher[i] - teacher[j]).norm()), float((student[i] - student[j]).norm())) for i, j in chosen)
    assert pairs.number == len(one) == len(two) == len(expected)
    found = sorted(zip((two / two.max()).tolist(), (one / one.max()).tolist(), strict=True))
    largest = [max(pair[k] for pair in expected) for k in range(2)]
    np.testing.assert_allclose(found, np.array(expected) / largest, rtol=1e-12)
    sums = pairs.sums("test")
    assert float(sums.correlation()) == pytest.approx(pearsonr(one, two).statistic, rel=1e-12)
    assert float(sums.number) == len(expected)


def test_sums_of_unequal_parts_equal_the_whole():
    """Also where the parts have other means than the whole, and far from zero."""
    p, q = 1e4 + randn(40).sort().values, randn(40, seed=1) ** 2
    total = None
    for part in (slice(0, 1), slice(1, 4), slice(4, 40)):
        x, y = p[part], q[part]
        dx, dy = x - x.mean(), y - y.mean()
        one = Sums(torch.tensor(len(x)).double(), x.mean(), y.mean(), dx @ dx, dy @ dy, dx @ dy)
        total = one if total is None else total.plus(one)
    dx, dy = p - p.mean(), q - q.mean()
    expected = torch.stack([torch.tensor(40.0).double(), p.mean(), q.mean(), dx @ dx, dy @ dy, dx @ dy])
    torch.testing.assert_close(torch.stack(list(total)), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("left", "right"), [([0, 3], [5, 9]), ([1], [1])])
def test_distances_one_by_one(left, right):
    rows = randn(10, 4)
    space = Space.of("test", rows, "euclidean")
    scale = space.tile(slice(0, 1), slice(9, 10))[0, 0] / (rows[0] - rows[9]).norm()
    expected = (rows[left] - rows[right]).norm(dim=1) * scale
    torch.testing.assert_close(space.between(torch.tensor(left), torch.tensor(right)), expected)


@pytest.mark.parametrize("dissimilarity", ["euclidean", "cosine"])
def test_a_common_offset_makes_no_pair_near(dissimilarity, monkeypatch):
    """Which would be right, and slow."""
    monkeypatch.delattr(tiles, "_renew_near")
    space = Space.of("test", 1e3 + randn(70, 48), dissimilarity)
    assert space.tile(slice(0, 30), slice(30, 70)).isfinite().all()

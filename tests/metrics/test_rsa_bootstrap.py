"""The bootstrap interval against resamples drawn, embedded in distances and scored one by one."""

import importlib
import re

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from geomreg import Embeddings
from geomreg.metrics import rsa, rsa_bootstrap, rsa_interval
from geomreg.metrics.rsa_bootstrap import drawn, in_order

rsa_module = importlib.import_module("geomreg.metrics.rsa")  # the package's attribute of this name is the function


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


N = 14
TEACHER = Embeddings(randn(N, 5, seed=1), randn(N, 5, seed=2))
STUDENT = Embeddings(TEACHER.image + 0.4 * randn(N, 5, seed=3), TEACHER.text + 0.4 * randn(N, 5, seed=4))


def distances(embeddings: Embeddings, draws: list[int], modality: str, dissimilarity: str) -> np.ndarray:
    """Of a resample: every pair of draws, but not of two draws of one sample."""
    found = []
    image, text = (None if value is None else value.numpy()[draws] for value in embeddings)
    size = len(draws)
    for one, kinds in ((image, ("image", "stacked")), (text, ("text", "stacked"))):
        if modality in kinds:
            d = cdist(one, one, dissimilarity)
            found += [d[a, b] for a in range(size) for b in range(a + 1, size) if draws[a] != draws[b]]
    if modality in ("stacked", "cross-modal"):
        d = cdist(image, text, dissimilarity)
        found += [d[a, b] for a in range(size) for b in range(size) if a == b or draws[a] != draws[b]]
    return np.array(found).round(12)


@pytest.mark.parametrize("modality", ["image", "text", "stacked", "cross-modal"])
@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean", "cosine", "correlation"])
@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
@pytest.mark.parametrize("samples", [N, 5])  # of 5 some resamples have fewer than 3 different ones
def test_interval_equals_drawing(modality, dissimilarity, correlation, samples):
    student, teacher = (Embeddings(*(value[:samples] for value in embeddings)) for embeddings in (STUDENT, TEACHER))
    kept = {"image": (0,), "text": (1,)}.get(modality, (0, 1))
    order = in_order(torch.cat([value[part] for value in (student, teacher) for part in kept], dim=1))
    scores = []
    for counts in drawn(samples, 40, seed=5).long():
        draws = order.repeat_interleave(counts).tolist()
        if len(set(draws)) < 3:
            continue
        one, two = (distances(value, draws, modality, dissimilarity) for value in (student, teacher))
        scores.append((pearsonr if correlation == "pearson" else spearmanr)(one, two).statistic)
    assert (len(scores) < 40) == (samples == 5)
    options = {"dissimilarity": dissimilarity, "correlation": correlation, "modality": modality}
    value, low, high = rsa_interval(student, teacher, **options, level=0.8, resamples=40, seed=5)
    np.testing.assert_allclose([low, high], np.quantile(scores, [0.1, 0.9]), rtol=1e-9)
    assert value == rsa(student, teacher, **options)
    assert (value.dtype, low.dtype, high.dtype) == (torch.float64,) * 3


@pytest.mark.parametrize("dissimilarity", ["sqeuclidean", "cosine", "correlation"])
def test_sums_over_samples_equal_products_over_tiles(dissimilarity, monkeypatch):
    teacher = 3 + randn(60, 4, seed=1)
    student = teacher + randn(60, 4, seed=2)
    calls = []
    closed = rsa_bootstrap._closed
    monkeypatch.setattr(rsa_bootstrap, "_closed", lambda *given: calls.append(1) or closed(*given))
    one = rsa_interval(student, teacher, dissimilarity=dissimilarity, resamples=30)
    assert calls
    monkeypatch.setattr(rsa_bootstrap, "_cheaper", lambda *given: False)
    two = rsa_interval(student, teacher, dissimilarity=dissimilarity, resamples=30)
    np.testing.assert_allclose(one, two, rtol=1e-11)
    assert len(calls) == 1


def test_sums_that_rounding_spoils_are_not_used(monkeypatch):
    rows = torch.eye(40, dtype=torch.float64)
    student, teacher = (rows + 1e-4 * randn(40, 40, seed=seed) for seed in (1, 2))
    expected = rsa_interval(student, teacher, dissimilarity="sqeuclidean", resamples=30)
    monkeypatch.setattr(rsa_bootstrap, "_cheaper", lambda *given: True)
    np.testing.assert_array_equal(rsa_interval(student, teacher, dissimilarity="sqeuclidean", resamples=30), expected)


def test_tensors_and_more_than_one_tile(monkeypatch):
    expected = {kind: rsa_interval(STUDENT, TEACHER, modality="stacked", correlation=kind) for kind in ("pearson", "spearman")}
    monkeypatch.setattr("geomreg.metrics.rsa_pairs.TILE", 5)
    for kind, interval in expected.items():
        np.testing.assert_allclose(rsa_interval(STUDENT, TEACHER, modality="stacked", correlation=kind), interval, rtol=1e-10)
    one = rsa_interval(STUDENT.image, TEACHER.image)
    assert one == rsa_interval(STUDENT, TEACHER, modality="image")


def test_many_pairs_are_ranked_in_classes(monkeypatch):
    teacher = randn(60, 6, seed=1)
    student = teacher + randn(60, 6, seed=2)
    exact = rsa_interval(student, teacher, correlation="spearman", resamples=50)
    monkeypatch.setattr(rsa_bootstrap, "CLASSES", 256)
    rounded = rsa_interval(student, teacher, correlation="spearman", resamples=50)
    assert exact.value == rounded.value
    assert 0 < max(abs(one - two) for one, two in zip(exact, rounded, strict=True)) < 1 / 256


def test_seed_level_and_resamples():
    intervals = [rsa_interval(STUDENT.image, TEACHER.image, seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1]
    assert intervals[0].low != intervals[2].low
    wide, narrow = (rsa_interval(STUDENT.image, TEACHER.image, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert drawn(9, 5, seed=0).sum(dim=1).tolist() == [9] * 5
    assert drawn(9, 5, seed=0).shape == (5, 9)
    mean = drawn(50, 4000, seed=0).double().mean(dim=0)
    assert (mean - 1).abs().max() < 0.1  # each sample is drawn once on average


def test_interval_covers_the_score_of_the_population():
    """Of 40 samples of one population, about 95 % of intervals; rsatoolbox's authors find it somewhat wide."""
    population = randn(4000, 6, seed=1)
    other = population + 0.7 * randn(4000, 6, seed=2)
    truth = rsa(other, population)
    covered = 0
    for part in torch.randperm(4000, generator=torch.Generator().manual_seed(3))[:2400].chunk(60):
        _, low, high = rsa_interval(other[part], population[part], resamples=300)
        covered += bool(low <= truth <= high)
    assert 51 <= covered <= 60


def test_collapsed_resamples_are_left_out():
    """Few samples: many resamples have fewer than 3 different ones, and yet the score is defined."""
    rows = randn(5, 3, seed=1)
    interval = rsa_interval(rows + 0.1 * randn(5, 3, seed=2), rows, resamples=200)
    assert all(value.isfinite() for value in interval)
    with pytest.raises(ValueError, match=r"^rsa_interval: expected most resamples to have a score, got \d+ of 100\. Take more samples"):
        rsa_interval(rows[:3] + 0.1 * randn(3, 3), rows[:3], resamples=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "rsa_interval: expected level between 0 and 1, got 1.0."),
        ({"resamples": 0}, "rsa_interval: expected resamples as a whole number >= 1, got 0."),
        ({"dissimilarity": "l1"}, "rsa_interval: expected dissimilarity to be one of"),
        ({"correlation": "kendall"}, "rsa_interval: expected correlation to be one of"),
        ({"modality": "both"}, "rsa_interval: expected modality to be one of"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rsa_interval(STUDENT, TEACHER, **{"modality": "image", **options})


def test_too_many_pairs_for_ranks(monkeypatch):
    monkeypatch.setattr(rsa_module, "SORTED", N * (N - 1) // 2 - 1)
    with pytest.raises(ValueError, match=r"^rsa_interval: expected at most 90 pairs for a Spearman interval, got 91\. Take a subset"):
        rsa_interval(STUDENT.image, TEACHER.image, correlation="spearman")
    assert rsa_interval(STUDENT.image, TEACHER.image).low.isfinite()


@pytest.mark.parametrize("modality", ["image", "cross-modal"])
@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
def test_order_of_samples_is_nothing(modality, correlation):
    """As batches, processes and merges bring them; equal samples, equal first numbers and single precision among them."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(7))
    student, teacher = (Embeddings(*(value.float().round(decimals=1) for value in embeddings)) for embeddings in (STUDENT, TEACHER))
    for value in (*student, *teacher):
        value[3] = value[5]
        value[:, 0] = 0.5
    moved = [Embeddings(*(value[order] for value in embeddings)) for embeddings in (student, teacher)]
    options = {"modality": modality, "correlation": correlation, "resamples": 30}
    one, two = rsa_interval(student, teacher, **options), rsa_interval(*moved, **options)
    assert (one.low, one.high) == (two.low, two.high)
    assert one.value == pytest.approx(float(two.value), rel=1e-12)


def test_in_order():
    rows = torch.tensor([[1.0, 2.0, 0.0], [0.0, 5.0, 1.0], [1.0, 2.0, -1.0], [1.0, 0.0, 9.0]], dtype=torch.float64)
    assert in_order(rows).tolist() == [1, 3, 2, 0]
    many = randn(200, 3, seed=9).round()  # many ties
    keys = [tuple(row) for row in many.tolist()]
    assert [keys[k] for k in in_order(many).tolist()] == sorted(keys)
    assert in_order(rows[:1]).tolist() == [0]

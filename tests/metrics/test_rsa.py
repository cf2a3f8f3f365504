"""RSA against rsatoolbox's and scipy's numbers, its invariances, its errors, and the collecting metric."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_cases import assert_value, case, cases, inputs, name_of
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from geomreg import Embeddings
from geomreg.metrics import RSA, rsa, rsa_interval

DISSIMILARITIES = ("euclidean", "sqeuclidean", "cosine", "correlation")
CORRELATIONS = ("pearson", "spearman")
every_dissimilarity = pytest.mark.parametrize("dissimilarity", DISSIMILARITIES)
every_correlation = pytest.mark.parametrize("correlation", CORRELATIONS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(width, width, seed=seed)).Q


def message(name: str, expected: str, got: str) -> str:
    return rf"^{re.escape(name)}: expected {expected}, got {got}\. .+\.$"


def check(actual: Tensor, expected: float | Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    assert actual.ndim == 0
    assert actual.dtype == torch.float64
    assert float(actual) == pytest.approx(float(expected), rel=rtol, abs=atol)


# rsatoolbox -----------------------------------------------------------------------------------------------------------

GOLDEN = cases("rsatoolbox")
every_comparison = pytest.mark.parametrize(("correlation", "comparison"), [("pearson", "corr"), ("spearman", "spearman")])


def test_golden_cases_are_complete():
    names = {name_of(one) for one in GOLDEN}
    assert len(names) == len(GOLDEN)
    assert {"image_raw/b4d8", "text_unit/b4d8", "joint_image_text_raw/b4d8", "n12d8", "n12d8_ties"} <= names


@pytest.mark.parametrize("golden", GOLDEN, ids=name_of)
@pytest.mark.parametrize(("dissimilarity", "official"), [("sqeuclidean", "euclidean"), ("correlation", "correlation")])
@every_comparison
def test_rsa_equals_rsatoolbox(golden, dissimilarity, official, correlation, comparison):
    arguments, recorded = inputs(golden), golden["outputs"][official]
    expected = recorded["compare"][comparison]
    if (name_of(golden), official, comparison) == ("n12d8_ties", "correlation", "spearman"):
        # rsatoolbox ranks tied dissimilarities by their rounding errors (1e-16): rank its RDMs without them
        one, two = (np.round(recorded[name], 12) for name in ("rdm_A", "rdm_B"))
        assert len(np.unique(one)) < len(np.unique(recorded["rdm_A"]))
        expected = spearmanr(one, two).statistic
    value = rsa(arguments["B"], arguments["A"], dissimilarity=dissimilarity, correlation=correlation)
    assert_value(golden, value, expected)


@pytest.mark.parametrize("golden", cases("rsatoolbox", containing="unit"), ids=name_of)
@every_comparison
def test_cosine_equals_rsatoolbox_euclidean_of_unit_vectors(golden, correlation, comparison):
    arguments = inputs(golden)
    value = rsa(arguments["B"] / 7, 3 * arguments["A"], dissimilarity="cosine", correlation=correlation)
    assert_value(golden, value, golden["outputs"]["euclidean"]["compare"][comparison])


@pytest.mark.parametrize("kind", ["raw", "unit"])
@every_comparison
def test_stacked_metric_equals_rsatoolbox_joint_rdm(kind, correlation, comparison):
    image, text = (inputs(case("rsatoolbox", f"{name}_{kind}")) for name in ("image", "text"))
    joint = case("rsatoolbox", f"joint_image_text_{kind}")
    metric = RSA(modality="stacked", dissimilarity="sqeuclidean", correlation=correlation)
    metric.update(Embeddings(image["B"], text["B"]), Embeddings(image["A"], text["A"]))
    assert_value(joint, metric.compute(), joint["outputs"]["euclidean"]["compare"][comparison])


# scipy ----------------------------------------------------------------------------------------------------------------


def scipy_rsa(student: Tensor, teacher: Tensor, dissimilarity: str, correlation: str) -> float:
    one, two = (pdist(value.double().numpy(), dissimilarity) for value in (student, teacher))
    return (pearsonr if correlation == "pearson" else spearmanr)(one, two).statistic


@every_dissimilarity
@every_correlation
@pytest.mark.parametrize(("samples", "widths"), [(3, (2, 2)), (4, (63, 63)), (7, (3, 8)), (33, (129, 5))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rsa_equals_scipy(dissimilarity, correlation, samples, widths, dtype):
    if dissimilarity == "correlation" and widths[0] == 2:
        widths = (3, 4)  # two numbers correlate by +1 or -1 only
    teacher = randn(samples, widths[1], seed=1)
    student = randn(samples, widths[0], seed=2)
    shared = min(widths)
    student[:, :shared] += 2 * teacher[:, :shared]
    student, teacher = student.to(dtype), teacher.to(dtype)
    value = rsa(student, teacher, dissimilarity=dissimilarity, correlation=correlation)
    check(value, scipy_rsa(student, teacher, dissimilarity, correlation))


@every_dissimilarity
def test_rsa_of_non_contiguous_inputs_with_graph(dissimilarity):
    student, teacher = randn(6, 9, seed=1).T.requires_grad_(), randn(9, 12, seed=2)[:, ::2]
    value = rsa(student, teacher, dissimilarity=dissimilarity)
    assert not value.requires_grad
    check(value, scipy_rsa(student.detach().contiguous(), teacher.contiguous(), dissimilarity, "pearson"))


def test_rsa_of_neighbours_that_nearly_coincide():
    """Differences of inner products would leave nothing of distances of 1e-7 at norm 1e3."""
    base, offset = randn(40, 4, seed=1), randn(40, 4, seed=2)
    student = 1e3 + 1e-7 * base
    exact = student - 1e3  # what rounding left of base, without error
    check(rsa(student, offset, dissimilarity="sqeuclidean"), scipy_rsa(exact, offset, "sqeuclidean", "pearson"))


@every_dissimilarity
@every_correlation
@pytest.mark.parametrize("samples", [3, 9, 40])
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_cross_modal_equals_scipy(dissimilarity, correlation, samples, method):
    """Every image with every text, its own among them."""
    teacher = Embeddings(randn(samples, 5, seed=1) + 1, randn(samples, 5, seed=2))
    student = Embeddings(*(torch.cat([value, randn(samples, 2, seed=3)], dim=1) + randn(samples, 7, seed=4) for value in teacher))
    one, two = (cdist(value.image.numpy(), value.text.numpy(), dissimilarity).reshape(-1) for value in (student, teacher))
    expected = (pearsonr if correlation == "pearson" else spearmanr)(one, two).statistic
    options = {"dissimilarity": dissimilarity, "correlation": correlation, "method": method}
    check(rsa(student, teacher, modality="cross-modal", **options), expected)


@every_correlation
def test_modalities_of_embeddings(correlation):
    teacher = Embeddings(randn(9, 4, seed=1), randn(9, 4, seed=2))
    student = Embeddings(randn(9, 3, seed=3), randn(9, 3, seed=4))
    for modality in ("image", "text"):
        expected = rsa(getattr(student, modality), getattr(teacher, modality), correlation=correlation)
        assert rsa(student, teacher, modality=modality, correlation=correlation) == expected
    expected = rsa(torch.cat(list(student)), torch.cat(list(teacher)), correlation=correlation)
    assert rsa(student, teacher, modality="stacked", correlation=correlation) == expected


@every_dissimilarity
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-75, 1e75, 1e160, 1e300])
def test_rsa_of_any_magnitude(dissimilarity, size):
    teacher = randn(20, 4, seed=1)
    student = teacher + randn(20, 4, seed=2)
    for correlation in CORRELATIONS:
        options = {"dissimilarity": dissimilarity, "correlation": correlation}
        check(rsa(student * size, teacher, **options), rsa(student, teacher, **options), atol=1e-12)


# properties -----------------------------------------------------------------------------------------------------------


@st.composite
def spaces(draw, dissimilarity: str) -> tuple[Tensor, Tensor]:
    """Student and teacher on a coarse grid: ties, duplicates, parallel and collinear vectors are frequent."""
    samples, least = draw(st.integers(3, 8)), 3 if dissimilarity == "correlation" else 1
    values = []
    for width in (draw(st.integers(least, 5)), draw(st.integers(least, 5))):
        rows = st.lists(st.integers(-4, 4), min_size=width, max_size=width)
        value = torch.tensor(draw(st.lists(rows, min_size=samples, max_size=samples)), dtype=torch.float64)
        centred = value - value.mean(dim=1, keepdim=True) if dissimilarity == "correlation" else value
        if dissimilarity in ("cosine", "correlation"):
            assume(bool((centred.norm(dim=1) > 1e-9).all()))
            centred = centred / centred.norm(dim=1, keepdim=True)
        assume(float(np.ptp(pdist(centred.numpy()))) > 1e-9)
        values.append(value)
    return values[0], values[1]


def invariant(data, dissimilarity: str, transform) -> None:
    """The transform, applied to one space or to both, changes nothing."""
    student, teacher = data.draw(spaces(dissimilarity))
    seed = data.draw(st.integers(0, 99))
    for correlation in CORRELATIONS:
        options = {"dissimilarity": dissimilarity, "correlation": correlation}
        expected = rsa(student, teacher, **options)
        for one, two in ((transform(student, seed), teacher), (student, transform(teacher, seed))):
            check(rsa(one, two, **options), expected, atol=1e-9)


@every_dissimilarity
@given(data=st.data())
def test_rsa_permutation(dissimilarity, data):
    student, teacher = data.draw(spaces(dissimilarity))
    order = torch.tensor(data.draw(st.permutations(range(len(student)))))
    for correlation in CORRELATIONS:
        options = {"dissimilarity": dissimilarity, "correlation": correlation}
        check(rsa(student[order], teacher[order], **options), rsa(student, teacher, **options), atol=1e-9)


@every_dissimilarity
@given(data=st.data(), scale=st.floats(1e-3, 1e3))
def test_rsa_scale(dissimilarity, data, scale):
    invariant(data, dissimilarity, lambda value, seed: value * scale)


@pytest.mark.parametrize("dissimilarity", ["cosine", "correlation"])
@given(data=st.data())
def test_rsa_scale_of_each_vector(dissimilarity, data):
    invariant(data, dissimilarity, lambda value, seed: value * randn(len(value), 1, seed=seed).exp())


@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean", "cosine"])
@given(data=st.data())
def test_rsa_orthogonal_map(dissimilarity, data):
    invariant(data, dissimilarity, lambda value, seed: value @ orthogonal(value.shape[1], seed))


def test_rsa_of_correlation_changes_under_rotation():
    """Correlation subtracts the mean over the width, which a rotation moves."""
    teacher = randn(12, 6, seed=1)
    assert rsa(teacher @ orthogonal(6, seed=2), teacher, dissimilarity="correlation") < 0.99


@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean"])
@given(data=st.data())
def test_rsa_translation(dissimilarity, data):
    invariant(data, dissimilarity, lambda value, seed: value + 10 * randn(value.shape[1], seed=seed))


@given(data=st.data())
def test_rsa_of_correlation_offset_of_each_vector(data):
    invariant(data, "correlation", lambda value, seed: value + randn(len(value), 1, seed=seed))


@every_correlation
@pytest.mark.parametrize("samples", [3, 10, 40])
def test_rsa_of_a_translated_copy(samples, correlation):
    teacher = randn(samples, 16, seed=1)
    student = teacher + 2 * randn(16, seed=2)
    for dissimilarity in ("euclidean", "sqeuclidean"):
        check(rsa(student, teacher, dissimilarity=dissimilarity, correlation=correlation), 1.0)
    for dissimilarity in ("cosine", "correlation"):
        if samples > 3:
            assert rsa(student, teacher, dissimilarity=dissimilarity, correlation=correlation) < 0.95


@every_dissimilarity
@given(data=st.data())
def test_rsa_is_symmetric_in_range_and_one_on_itself(dissimilarity, data):
    student, teacher = data.draw(spaces(dissimilarity))
    for correlation in CORRELATIONS:
        options = {"dissimilarity": dissimilarity, "correlation": correlation}
        value = rsa(student, teacher, **options)
        assert -1 <= value <= 1
        check(rsa(teacher, student, **options), value)
        check(rsa(student, student, **options), 1.0)


def test_rsa_never_leaves_its_range_by_rounding():
    values = [float(rsa(randn(5, 4, seed=seed), randn(5, 4, seed=seed))) for seed in range(200)]
    assert max(values) <= 1.0


def test_rsa_of_opposite_orders_is_minus_one():
    """Sides 3, 4, 5 against 5, 4, 3."""
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # distances 3, 4, 5
    check(rsa(points[[2, 1, 0]], points), -1.0)  # distances 5, 4, 3


def test_spearman_ignores_monotone_change_and_pearson_does_not():
    teacher = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    student = torch.tensor([[0.0], [1.0], [4.0], [20.0]])  # the same order of all six distances
    check(rsa(student, teacher, correlation="spearman"), 1.0)
    assert rsa(student, teacher, correlation="pearson") < 0.99


@pytest.mark.parametrize("dissimilarity", ["cosine", "correlation"])
def test_spearman_ties_of_parallel_vectors(dissimilarity):
    """All dissimilarities of parallel vectors are 0 and tie, whatever rounding makes of them."""
    directions = randn(3, 5, seed=1).repeat(3, 1)
    lengths = torch.tensor([1, 3, 0.7, 0.1, 11, 1.7, 5, 1 / 3, 1 / 7], dtype=torch.float64)
    teacher = randn(9, 5, seed=2)
    options = {"dissimilarity": dissimilarity, "correlation": "spearman"}
    check(rsa(directions * lengths[:, None], teacher, **options), rsa(directions, teacher, **options))


@pytest.mark.parametrize("dissimilarity", ["euclidean", "sqeuclidean"])
def test_spearman_ties_of_duplicates(dissimilarity):
    """Duplicates that a matrix product or a shift rounds differently still tie at distance 0."""
    exact = randn(4, 5, seed=1).repeat_interleave(3, dim=0)
    rounded = exact * (1 + 2.0**-52 * torch.arange(12, dtype=torch.float64).remainder(3)[:, None])
    assert not torch.equal(rounded, exact)
    teacher = randn(12, 5, seed=2)
    options = {"dissimilarity": dissimilarity, "correlation": "spearman"}
    check(rsa(rounded, teacher, **options), rsa(exact, teacher, **options))


# errors ---------------------------------------------------------------------------------------------------------------

GOOD = randn(5, 4, seed=3)


def changed(value: float) -> Tensor:
    bad = GOOD.clone()
    bad[2, 1] = value
    return bad


def with_row(value: float) -> Tensor:
    bad = GOOD.clone()
    bad[2] = value
    return bad


@pytest.mark.parametrize(
    ("student", "teacher", "options", "expected", "got"),
    [
        (GOOD[:2], GOOD[:2], {}, "at least 3 samples", "2"),
        (GOOD[:1], GOOD[:1], {}, "at least 3 samples", "1"),
        (GOOD[:4], GOOD, {}, "as many student as teacher embeddings", r"\(4, 4\) and \(5, 4\)"),
        (changed(float("nan")), GOOD, {}, "finite student embeddings", "NaN or infinity"),
        (GOOD, changed(float("nan")), {}, "finite teacher embeddings", "NaN or infinity"),
        (changed(float("-inf")), GOOD, {}, "finite student embeddings", "NaN or infinity"),
        (torch.ones(5, 4), GOOD, {}, "distances that differ", "10 equal ones"),
        (GOOD, torch.zeros(5, 4), {}, "distances that differ", "10 equal ones"),
        (torch.eye(5), GOOD, {}, "distances that differ", "10 equal ones"),
        (torch.eye(5), GOOD, {"correlation": "spearman"}, "distances that differ", "10 equal ones"),
        (with_row(0.0), GOOD, {"dissimilarity": "cosine"}, 'vectors with a direction for "cosine"', "a zero or constant one"),
        (GOOD, with_row(0.0), {"dissimilarity": "cosine"}, 'vectors with a direction for "cosine"', "a zero or constant one"),
        (with_row(0.1), GOOD, {"dissimilarity": "correlation"}, 'vectors with a direction for "correlation"', "a zero or constant one"),
        (GOOD, with_row(0.0), {"dissimilarity": "correlation"}, 'vectors with a direction for "correlation"', "a zero or constant one"),
        (GOOD, GOOD, {"dissimilarity": "cosin"}, "dissimilarity to be one of 'euclidean', .*'correlation'", "'cosin'"),
        (GOOD, GOOD, {"correlation": "kendall"}, "correlation to be one of 'pearson', 'spearman'", "'kendall'"),
        (GOOD[0], GOOD, {}, r"student embeddings of shape \(B, D\) with B, D >= 1", r"float64 tensor of shape \(4,\)"),
        (GOOD, GOOD[:, :0], {}, r"teacher embeddings of shape \(B, D\) with B, D >= 1", r"float64 tensor of shape \(5, 0\)"),
    ],
)
def test_rsa_value_errors(student, teacher, options, expected, got):
    with pytest.raises(ValueError, match=message("rsa", expected, got)):
        rsa(student, teacher, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "got"),
    [
        (GOOD.long(), GOOD, "floating-point student embeddings", r"int64 tensor of shape \(5, 4\)"),
        (GOOD, GOOD.to(torch.complex128), "floating-point teacher embeddings", r"complex128 tensor of shape \(5, 4\)"),
    ],
)
def test_rsa_type_errors(student, teacher, expected, got):
    with pytest.raises(TypeError, match=message("rsa", expected, got)):
        rsa(student, teacher)


PAIRED = Embeddings(GOOD, GOOD.flip(0))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "expected", "got"),
    [
        (PAIRED, PAIRED, {"modality": "both"}, "modality to be one of None, 'image', 'text', 'stacked', 'cross-modal'", "'both'"),
        (PAIRED, PAIRED, {"method": "fast", "correlation": "spearman"}, "method to be one of 'auto', 'exact', 'histogram'", "'fast'"),
        (PAIRED, PAIRED, {"method": "histogram"}, "method to be one of 'auto', 'exact'", "'histogram'"),
        (Embeddings(GOOD), PAIRED, {"modality": "cross-modal"}, 'text embeddings for modality="cross-modal"', "None"),
        (Embeddings(GOOD, with_row(float("nan"))), PAIRED, {"modality": "cross-modal"}, "finite student embeddings", "NaN or infinity"),
        (
            Embeddings(GOOD[:2], GOOD[2:4]), Embeddings(GOOD[:2], GOOD[2:4]), {"modality": "cross-modal"}, "at least 3 samples", "2",
        ),
        (
            Embeddings(GOOD[:1].expand(5, 4), GOOD[1:2].expand(5, 4)), PAIRED, {"modality": "cross-modal"}, "distances that differ",
            "25 equal ones",
        ),
    ],
)  # fmt: skip
def test_rsa_of_embeddings_errors(student, teacher, options, expected, got):
    with pytest.raises(ValueError, match=message("rsa", expected, got)):
        rsa(student, teacher, **{"modality": "image", **options})


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        (PAIRED, {}, r'^rsa: expected tensors without modality, got Embeddings\. Pass modality="image", say\.$'),
        (GOOD, {"modality": "image"}, r"^rsa: expected geomreg\.Embeddings\(image=, text=\), got float64 tensor of shape \(5, 4\)\."),
    ],
)
def test_modality_belongs_to_embeddings(given, options, text):
    with pytest.raises(TypeError, match=text):
        rsa(given, given, **options)


def test_rsa_of_a_list_raises():
    with pytest.raises(TypeError, match=r"^rsa: expected student embeddings as a tensor of shape \(B, D\), got list\. Pass a tensor\.$"):
        rsa(GOOD.tolist(), GOOD)


def test_constant_vector_whose_mean_is_rounded_raises():
    constant = torch.full((6,), 0.1, dtype=torch.float64)
    assert not torch.equal(constant, constant.mean().expand(6))
    bad = randn(5, 6, seed=3)
    bad[2] = constant
    with pytest.raises(ValueError, match=message("rsa", 'vectors with a direction for "correlation"', "a zero or constant one")):
        rsa(bad, GOOD, dissimilarity="correlation")


def test_zero_and_constant_vectors_are_fine_where_they_have_a_distance():
    check(rsa(with_row(0.0), GOOD), scipy_rsa(with_row(0.0), GOOD, "euclidean", "pearson"))
    check(rsa(with_row(0.1), GOOD, dissimilarity="cosine"), scipy_rsa(with_row(0.1), GOOD, "cosine", "pearson"))


# the metric -----------------------------------------------------------------------------------------------------------

PAIRS = 11
STUDENT = Embeddings(randn(PAIRS, 6, seed=10), randn(PAIRS, 6, seed=11))
TEACHER = Embeddings(STUDENT.image[:, :4] + randn(PAIRS, 4, seed=12), STUDENT.text[:, :4] + randn(PAIRS, 4, seed=13))
MODALITIES = ("image", "text", "stacked", "cross-modal")
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def rows(embeddings: Embeddings, start: int, stop: int) -> Embeddings:
    return Embeddings(*(None if value is None else value[start:stop] for value in embeddings))


def chosen(embeddings: Embeddings, modality: str) -> Tensor | Embeddings:
    if modality == "cross-modal":
        return embeddings
    return torch.cat(list(embeddings)) if modality == "stacked" else getattr(embeddings, modality)


def function(student: Embeddings, teacher: Embeddings, modality: str, **options: str) -> Tensor:
    named = {"modality": modality} if modality == "cross-modal" else {}
    return rsa(chosen(student, modality), chosen(teacher, modality), **named, **options)


def pair(start: int, stop: int) -> tuple[Embeddings, Embeddings]:
    return rows(STUDENT, start, stop), rows(TEACHER, start, stop)


def stored(metric: RSA) -> tuple[int, int, int]:
    student, teacher = ((), ()) if metric.streams else (metric.student, metric.teacher)
    return len(student), len(teacher), len(metric.ids)


@every_modality
@every_dissimilarity
@every_correlation
@pytest.mark.parametrize("cuts", [(0, PAIRS), (0, 1, 4, PAIRS), tuple(range(PAIRS + 1))], ids=["one", "uneven", "single rows"])
def test_metric_equals_function(modality, dissimilarity, correlation, cuts):
    options = {"dissimilarity": dissimilarity, "correlation": correlation}
    metric = RSA(modality=modality, **options)
    for start, stop in itertools.pairwise(cuts):
        metric.update(*pair(start, stop), ids=range(start, stop), teacher_ids=torch.arange(start, stop))
    check(metric.compute(), function(STUDENT, TEACHER, modality, **options))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_metric_needs_only_its_modality(modality):
    metric = RSA(modality=modality)
    metric.update(*(Embeddings(**{modality: getattr(value, modality)}) for value in (STUDENT, TEACHER)))
    check(metric.compute(), rsa(getattr(STUDENT, modality), getattr(TEACHER, modality)))


def test_metric_defaults():
    metric = RSA()
    metric.update(STUDENT, TEACHER)
    check(metric.compute(), rsa(STUDENT.image, TEACHER.image, dissimilarity="euclidean", correlation="pearson"))
    assert metric.higher_is_better
    assert not metric.is_differentiable


def test_metric_call_returns_the_batch_and_collects():
    metric = RSA()
    check(metric(*pair(0, 5)), rsa(STUDENT.image[:5], TEACHER.image[:5]))
    metric.update(*pair(5, PAIRS))
    check(metric.compute(), rsa(STUDENT.image, TEACHER.image))


def test_metric_stores_no_graph():
    metric = RSA()
    metric.update(Embeddings(STUDENT.image.clone().requires_grad_()), Embeddings(TEACHER.image.clone().requires_grad_()))
    assert not metric.student[0].requires_grad
    assert not metric.teacher[0].requires_grad


def test_metric_reset():
    metric = RSA(max_samples=PAIRS)
    metric.update(*pair(0, 6), ids=range(6))
    metric.compute()
    metric.reset()
    assert stored(metric) == (0, 0, 0)
    metric.update(STUDENT, TEACHER, ids=range(PAIRS))  # neither repeated ids nor too many rows
    check(metric.compute(), rsa(STUDENT.image, TEACHER.image))


STREAMED = ("sqeuclidean", "cosine", "correlation")


@every_modality
@pytest.mark.parametrize("dissimilarity", STREAMED)
def test_streaming_keeps_sums_and_no_rows(modality, dissimilarity):
    metric = RSA(modality=modality, dissimilarity=dissimilarity, max_samples=3)  # a limit of rows that are kept
    sizes = []
    for start in range(0, PAIRS, 2):
        metric.update(*pair(start, min(start + 2, PAIRS)))
        sizes.append(sum(value.numel() for value in metric.moments))
    assert len(set(sizes)) == 1
    assert stored(metric) == (0, 0, 0)
    check(metric.compute(), function(STUDENT, TEACHER, modality, dissimilarity=dissimilarity))


@pytest.mark.parametrize(
    "options",
    [
        {"dissimilarity": "euclidean"},
        {"dissimilarity": "cosine", "correlation": "spearman"},
        {"dissimilarity": "cosine", "method": "exact"},
        {"dissimilarity": "cosine", "keep_rows": True},
        {"dissimilarity": "cosine", "level": 0.9},
    ],
)
def test_what_needs_rows_keeps_them(options):
    metric = RSA(**options, max_samples=PAIRS - 1)
    metric.update(STUDENT, TEACHER)
    assert stored(metric)[:2] == (1, 1)
    assert not metric.streams
    with pytest.raises(ValueError, match=message("RSA", f"at most max_samples={PAIRS - 1} rows", str(PAIRS))):
        metric.compute()


@every_modality
@pytest.mark.parametrize("dissimilarity", ["euclidean", "cosine"])
def test_forward_returns_the_batch_and_collects(modality, dissimilarity):
    metric = RSA(modality=modality, dissimilarity=dissimilarity)
    for start, stop in ((0, 3), (3, 7), (7, PAIRS)):
        check(metric(*pair(start, stop), ids=range(start, stop)), function(*pair(start, stop), modality, dissimilarity=dissimilarity))
    check(metric.compute(), function(STUDENT, TEACHER, modality, dissimilarity=dissimilarity))
    assert not metric.streams or len(metric.moments) == 1


@every_modality
def test_metric_interval(modality):
    metric = RSA(modality=modality, correlation="spearman", level=0.8, resamples=50, seed=3)
    metric.update(*pair(0, 4))
    metric.update(*pair(4, PAIRS))
    found = metric.compute()
    assert found.as_parts() == rsa_interval(STUDENT, TEACHER, modality=modality, correlation="spearman", level=0.8, resamples=50, seed=3)


def test_streaming_far_from_zero_and_in_small_batches():
    """A common offset of a billion spreads: the running mean keeps its digits."""
    teacher = randn(60, 5, seed=1)
    student = 1e6 + 2.0**-10 * (teacher + randn(60, 5, seed=2)).round(decimals=3)
    exact = student - 1e6
    metric = RSA(dissimilarity="sqeuclidean")
    for start in range(0, 60, 2):
        metric.update(Embeddings(student[start : start + 2]), Embeddings(teacher[start : start + 2]))
    check(metric.compute(), scipy_rsa(exact, teacher, "sqeuclidean", "pearson"), rtol=1e-12)


def test_streaming_never_returns_what_rounding_made():
    rows = torch.eye(20, dtype=torch.float64)
    for student in (rows, rows + 1e-6 * randn(20, 20)):
        metric = RSA(dissimilarity="sqeuclidean")
        metric.update(Embeddings(student), Embeddings(randn(20, 3, seed=1)))
        with pytest.raises(ValueError, match=r"^RSA: expected distances that spread by more than 0\.3 % of their mean .+keep_rows=True"):
            metric.compute()
    kept = RSA(dissimilarity="sqeuclidean", keep_rows=True)
    kept.update(Embeddings(student), Embeddings(randn(20, 3, seed=1)))
    check(kept.compute(), scipy_rsa(student, randn(20, 3, seed=1), "sqeuclidean", "pearson"), rtol=1e-7)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_streaming_stores_nothing_when_update_raises(bad):
    metric = RSA(dissimilarity="cosine")
    metric.update(*pair(0, 6))
    broken = STUDENT.image[6:].clone()
    broken[1] = bad
    with pytest.raises(ValueError, match=r"^RSA: expected (vectors with a direction|finite student)"):
        metric.update(Embeddings(broken), Embeddings(TEACHER.image[6:]))
    with pytest.raises(ValueError, match=r"^RSA: expected student embeddings of width 6 as before, got 5"):
        metric.update(Embeddings(STUDENT.image[6:, :5]), Embeddings(TEACHER.image[6:]))
    with pytest.raises(ValueError, match=r"^RSA: expected teacher embeddings of width 4 as before, got 3"):
        metric.update(Embeddings(STUDENT.image[6:]), Embeddings(TEACHER.image[6:, :3]))
    with pytest.raises(ValueError, match=r"^RSA: expected ids in every update or in none"):
        metric.update(*pair(6, 9), ids=range(3))
    metric.update(*pair(6, PAIRS))
    check(metric.compute(), rsa(STUDENT.image, TEACHER.image, dissimilarity="cosine"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric RSA was called before")
def test_streaming_needs_three_samples():
    metric = RSA(dissimilarity="cosine")
    with pytest.raises(ValueError, match=message("RSA", "at least 3 samples", "none")):
        metric.compute()
    for modality in ("image", "cross-modal"):
        metric = RSA(modality=modality, dissimilarity="cosine")
        metric.update(*pair(0, 2))
        with pytest.raises(ValueError, match=message("rsa", "at least 3 samples", "2")):
            metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric RSA was called before")
@pytest.mark.parametrize("used_before", [False, True])
def test_metric_compute_before_update(used_before):
    metric = RSA()
    if used_before:
        metric.update(STUDENT, TEACHER)
        metric.reset()
    with pytest.raises(ValueError, match=message("RSA", "at least 3 samples", "none")):
        metric.compute()


def test_metric_compute_of_two_samples():
    metric = RSA()
    metric.update(*pair(0, 2))
    with pytest.raises(ValueError, match=message("rsa", "at least 3 samples", "2")):
        metric.compute()


@pytest.mark.parametrize(("modality", "count"), [("image", PAIRS), ("text", PAIRS), ("stacked", 2 * PAIRS), ("cross-modal", 2 * PAIRS)])
def test_metric_max_samples(modality, count):
    exact = RSA(modality=modality, max_samples=count)
    exact.update(STUDENT, TEACHER)
    exact.compute()
    small = RSA(modality=modality, max_samples=count - 1)
    small.update(*pair(0, 4))
    small.update(*pair(4, PAIRS))
    with pytest.raises(ValueError, match=message("RSA", rf"at most max_samples={count - 1} rows", str(count))):
        small.compute()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("modality", "both", "'image', 'text', 'stacked', 'cross-modal'"),
        ("dissimilarity", "l1", "'euclidean', 'sqeuclidean', 'cosine', 'correlation'"),
        ("correlation", "kendall", "'pearson', 'spearman'"),
    ],
)
def test_metric_unknown_option(option, value, allowed):
    with pytest.raises(ValueError, match=message("RSA", f"{option} to be one of {allowed}", f"'{value}'")):
        RSA(**{option: value})


FOUR = pair(6, 10)
BROKEN = Embeddings(torch.full((4, 6), torch.nan), FOUR[0].text)


@pytest.mark.parametrize(
    ("modality", "arguments", "error", "expected", "got"),
    [
        ("image", {"ids": [6, 7, 8, 9], "teacher_ids": [6, 8, 7, 9]}, ValueError, "the same ids in the same order .+", "different ones"),
        ("image", {"ids": [6, 7, 8, 9], "teacher_ids": [6, 7, 8]}, ValueError, "4 integer ids", r"int64 tensor of shape \(3,\)"),
        ("image", {"ids": [6, 7, 8]}, ValueError, "4 integer ids", r"int64 tensor of shape \(3,\)"),
        ("stacked", {"ids": list(range(8))}, ValueError, "4 integer ids", r"int64 tensor of shape \(8,\)"),
        ("image", {"ids": torch.arange(4.0)}, ValueError, "4 integer ids", r"float32 tensor of shape \(4,\)"),
        ("image", {"ids": torch.arange(4)[:, None]}, ValueError, "4 integer ids", r"int64 tensor of shape \(4, 1\)"),
        ("image", {"teacher_ids": [6, 7, 8, 9]}, ValueError, "ids beside teacher_ids", "None"),
        ("image", {"student": BROKEN}, ValueError, "finite student embeddings", "NaN or infinity"),
        ("image", {"teacher": rows(TEACHER, 6, 9)}, ValueError, "as many student as teacher embeddings", r"\(4, 6\) and \(3, 4\)"),
        ("text", {"student": Embeddings(image=FOUR[0].image)}, ValueError, 'text embeddings for modality="text"', "None"),
        ("stacked", {"teacher": Embeddings(image=FOUR[1].image)}, ValueError, 'text embeddings for modality="stacked"', "None"),
        (
            "stacked",
            {"student": Embeddings(FOUR[0].image, FOUR[0].text[:3])},
            ValueError,
            "image and text embeddings of the same pairs",
            r"float64 tensor of shape \(4, 6\) on cpu and float64 tensor of shape \(3, 6\) on cpu",
        ),
        ("image", {"student": FOUR[0].image}, TypeError, r"geomreg\.Embeddings\(image=, text=\)", r"float64 tensor of shape \(4, 6\)"),
        ("image", {"teacher": None}, TypeError, r"geomreg\.Embeddings\(image=, text=\)", "None"),
    ],
)
def test_metric_stores_nothing_when_update_raises(modality, arguments, error, expected, got):
    metric = RSA(modality=modality)
    metric.update(*pair(0, 6), ids=range(6))
    with pytest.raises(error, match=message("RSA", expected, got)):
        metric.update(**{"student": FOUR[0], "teacher": FOUR[1], **arguments})
    assert stored(metric) == (1, 1, 1)
    check(metric.compute(), function(rows(STUDENT, 0, 6), rows(TEACHER, 0, 6), modality))


REPEATED = message("RSA", "every sample once", "repeated ids")


@pytest.mark.parametrize("batches", [[[0, 1, 2, 1]], [[0, 1, 2, 3], [4, 0]]], ids=["one batch", "two batches"])
def test_metric_repeated_ids(batches):
    metric = RSA()
    for ids in batches:
        metric.update(*pair(0, len(ids)), ids=ids)
    with pytest.raises(ValueError, match=REPEATED):
        metric.compute()


# two processes --------------------------------------------------------------------------------------------------------

CUTS = ((0, 3, 7), (7, PAIRS))  # two batches on the first process, one on the second, of unequal size


def collect(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {}
        for modality, correlation in itertools.product(MODALITIES, CORRELATIONS):  # rows are gathered, sums are merged
            metric = RSA(modality=modality, dissimilarity="cosine", correlation=correlation)
            for start, stop in itertools.pairwise(CUTS[rank]):
                metric.update(*pair(start, stop), ids=range(start, stop))
            results[modality, correlation] = metric.compute()
            results[modality, correlation, "again"] = metric.compute()
        for modality, correlation in itertools.product(MODALITIES, CORRELATIONS):
            alone = RSA(modality=modality, dissimilarity="cosine", correlation=correlation)  # the second process has no samples
            if rank == 0:
                alone.update(STUDENT, TEACHER, ids=range(PAIRS))
            results[modality, correlation, "alone"] = alone.compute()
        padded = RSA()  # a sampler that gives sample 0 to both processes
        padded.update(*pair(0, 4), ids=[0, 1 + rank, 3 + rank * 2, 4 + rank * 2])
        try:
            padded.compute()
        except ValueError as error:
            results["repeated"] = str(error)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_metric_over_two_processes_equals_one(tmp_path: Path):
    mp.spawn(collect, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for modality, correlation in itertools.product(MODALITIES, CORRELATIONS):
            expected = function(STUDENT, TEACHER, modality, dissimilarity="cosine", correlation=correlation)
            check(results[modality, correlation], expected)
            check(results[modality, correlation, "again"], expected)
            check(results[modality, correlation, "alone"], expected)
        assert re.match(REPEATED, results["repeated"])


def test_width_must_not_change_between_updates():
    metric = RSA()
    metric.update(*(Embeddings(image=torch.randn(4, 3)) for _ in range(2)))
    with pytest.raises(ValueError, match=r"^RSA: expected teacher embeddings of width 3 as before, got 5"):
        metric.update(Embeddings(image=torch.randn(4, 3)), Embeddings(image=torch.randn(4, 5)))
    assert metric.compute().isfinite()


def test_ids_in_some_updates_only():
    metric = RSA()
    metric.update(*(Embeddings(image=torch.randn(4, 3)) for _ in range(2)), ids=range(4))
    with pytest.raises(ValueError, match=r"^RSA: expected ids in every update or in none"):
        metric.update(*(Embeddings(image=torch.randn(4, 3)) for _ in range(2)))


@pytest.mark.parametrize("ids", ["abcd", ["a", "b", "c", "d"], [True, False, True, False], [0.0, 1.0, 2.0, 3.0]])
def test_ids_that_are_no_integers(ids):
    with pytest.raises(ValueError, match=r"^RSA: expected 4 integer ids"):
        RSA().update(*(Embeddings(image=torch.randn(4, 3)) for _ in range(2)), ids=range(4), teacher_ids=ids)

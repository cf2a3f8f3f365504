"""The proved bounds on distances and RSA: random and adversarial cases, the extremal ones, and an oracle in loops."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import rotation
from hypothesis import assume, given, target
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from geomreg import Embeddings
from geomreg.functional import average_vector_loss
from geomreg.metrics import Distortion, DistortionBound, distortion_bound, rsa, tiles

ROUNDING = 1e-9


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def message(name: str, expected: str, got: str) -> str:
    return rf"^{re.escape(name)}: expected {expected}, got {got}\. .+\.$"


def check(actual: DistortionBound, expected: DistortionBound) -> None:
    for field, one, two in zip(DistortionBound._fields, actual, expected, strict=True):
        assert one.ndim == 0, field
        assert one.dtype == torch.float64, field
        assert float(one) == pytest.approx(float(two), rel=ROUNDING, abs=1e-12), field


# an oracle in loops ---------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    """Of the population."""
    centre = mean(values)
    return mean([(value - centre) ** 2 for value in values])


def centred(rows: list[list[float]]) -> list[list[float]]:
    centre = [mean(list(column)) for column in zip(*rows, strict=True)]
    return [[value - middle for value, middle in zip(row, centre, strict=True)] for row in rows]


def spread(rows: list[list[float]]) -> float:
    """Mean squared distance to the mean."""
    return mean([math.dist(row, [0.0] * len(row)) ** 2 for row in centred(rows)])


def differences(student: Tensor, teacher: Tensor) -> list[list[float]]:
    return [[f - p for f, p in zip(*rows, strict=True)] for rows in zip(student.tolist(), teacher.tolist(), strict=True)]


def distances(points: Tensor) -> list[float]:
    return [math.dist(one, two) for one, two in itertools.combinations(points.tolist(), 2)]


def procrustes(student: Tensor, teacher: Tensor) -> Tensor:
    """The student after the best rotation and scale, both spaces centred."""
    f, p = (torch.tensor(centred(value.tolist()), dtype=torch.float64) for value in (student, teacher))
    best, singular_sum = orthogonal_procrustes(f.numpy(), p.numpy())
    return float(singular_sum / f.square().sum()) * f @ torch.from_numpy(best)


def oracle(student: Tensor, teacher: Tensor) -> DistortionBound:
    samples = len(student)
    before, after = distances(teacher), distances(student)
    plain = spread(differences(student, teacher))
    aligned = spread(differences(procrustes(student, teacher), teacher))

    def lower_bound(value: float) -> float:
        square = 1 - 2 * value * samples / (samples - 1) / variance(before)
        return math.sqrt(square) if square >= 0 else -1.0

    covariance = mean([(a - mean(before)) * (b - mean(after)) for a, b in zip(before, after, strict=True)])
    values = (
        math.sqrt(mean([(b - a) ** 2 for a, b in zip(before, after, strict=True)])),
        math.sqrt(2 * plain * samples / (samples - 1)),
        covariance / math.sqrt(variance(before) * variance(after)),
        lower_bound(plain),
        lower_bound(aligned),
        plain,
        aligned,
    )
    return DistortionBound(*(torch.tensor(value, dtype=torch.float64) for value in values))


@pytest.mark.parametrize("noise", [0.02, 0.2, 3.0])
@pytest.mark.parametrize(("samples", "width"), [(3, 1), (3, 8), (7, 3), (20, 33)])
def test_bound_equals_oracle(samples, width, noise):
    teacher = randn(samples, width, seed=1) * torch.linspace(0.1, 3, samples, dtype=torch.float64)[:, None]
    student = 1.02 * teacher + 0.3 + noise * randn(samples, width, seed=2)
    bound = distortion_bound(student, teacher)
    check(bound, oracle(student, teacher))
    if noise != 0.2:  # neither branch of the lower bound goes untested
        assert (bound.rsa_bound == -1) == (noise == 3.0)
    assert bound.aligned_dispersion > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bound_of_rounded_inputs(dtype):
    teacher = (randn(9, 5, seed=1) * 3).to(dtype)
    student = (teacher + 0.1 * randn(9, 5, seed=2).to(dtype)).requires_grad_()
    bound = distortion_bound(student, teacher)
    check(bound, oracle(student.detach().double(), teacher.double()))
    assert not any(value.requires_grad for value in bound)


def test_bound_of_non_contiguous_inputs():
    teacher, student = randn(5, 9, seed=1).T, randn(9, 10, seed=2)[:, ::2]
    check(distortion_bound(student, teacher), oracle(student, teacher))


# cases to attack the bounds with --------------------------------------------------------------------------------------


@st.composite
def spaces(draw) -> tuple[Tensor, Tensor]:
    """A teacher on a coarse grid (duplicates, collinear points) and a student made from it, or from nothing of it."""
    samples, width = draw(st.integers(3, 8)), draw(st.integers(1, 4))

    def grid(limit: int) -> Tensor:
        rows = st.lists(st.integers(-limit, limit), min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(rows, min_size=samples, max_size=samples)), dtype=torch.float64)

    teacher = grid(8)
    kind = draw(st.sampled_from(("small change", "one moved", "rotated", "scaled", "unrelated")))
    if kind == "unrelated":
        student = grid(8)
    elif kind == "one moved":
        student = teacher.clone()
        student[draw(st.integers(0, samples - 1))] += draw(st.integers(-12, 12)) / 4
    else:
        student = teacher + grid(4) / draw(st.sampled_from((4, 16, 64)))
        if kind == "rotated":
            student = student @ rotation(width, draw(st.integers(0, 99)))
        if kind != "small change":
            student = student * draw(st.floats(0.25, 4)) + draw(st.integers(-3, 3))
    assume(all(float(torch.pdist(value).max() - torch.pdist(value).min()) > 1e-3 for value in (student, teacher)))
    return student, teacher


# statement 1 ----------------------------------------------------------------------------------------------------------


@given(pair=spaces())
def test_change_of_each_distance_is_at_most_the_distance_of_the_difference_vectors(pair):
    student, teacher = pair
    shift = student - teacher
    squares = []
    for i, j in itertools.combinations(range(len(student)), 2):
        before, after = (math.dist(value[i].tolist(), value[j].tolist()) for value in (teacher, student))
        squares.append(math.dist(shift[i].tolist(), shift[j].tolist()) ** 2)
        assert abs(after - before) <= math.sqrt(squares[-1]) + ROUNDING
    # the bound is the root-mean-square of exactly these
    assert float(distortion_bound(student, teacher).distance_bound) == pytest.approx(math.sqrt(mean(squares)), rel=ROUNDING, abs=1e-12)


@pytest.mark.parametrize("samples", [3, 8, 30])
def test_equal_difference_vectors_are_an_isometry(samples):
    teacher = randn(samples, 6, seed=1)
    bound = distortion_bound(teacher + 5 * randn(6, seed=2), teacher)
    for value in (bound.distance_change, bound.distance_bound, bound.dispersion, bound.aligned_dispersion):
        assert float(value) == pytest.approx(0, abs=1e-12)
    for value in (bound.rsa, bound.rsa_bound, bound.aligned_rsa_bound):
        assert float(value) == pytest.approx(1, abs=1e-12)


def test_cosine_rsa_has_no_such_bound():
    teacher = randn(8, 6, seed=1)
    student = teacher + 2 * randn(6, seed=2)
    assert rsa(student, teacher, dissimilarity="cosine") < 0.95 < distortion_bound(student, teacher).rsa_bound


# statement 2 ----------------------------------------------------------------------------------------------------------


@given(pair=spaces())
def test_distance_change_is_at_most_its_bound(pair):
    bound = distortion_bound(*pair)
    target(float(bound.distance_change - bound.distance_bound))
    assert bound.distance_change <= bound.distance_bound * (1 + ROUNDING) + 1e-12


@pytest.mark.parametrize("samples", [3, 4, 10, 50])
@pytest.mark.parametrize("stretch", [0.9, 1.001, 1.5])
def test_stretching_attains_the_bound_on_distances(samples, stretch):
    teacher = randn(samples, 5, seed=samples)
    bound = distortion_bound(stretch * teacher, teacher)
    assert float(bound.distance_change) == pytest.approx(float(bound.distance_bound), rel=ROUNDING)
    assert bound.distance_change > 0


def test_bound_over_distinct_pairs_needs_its_factor():
    """Points -1, 0, 1 stretched by 1.1: the distances change by .1, .1 and .2; without n / (n - 1) the bound is broken."""
    teacher = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    bound = distortion_bound(1.1 * teacher, teacher)
    assert float(bound.dispersion) == pytest.approx(0.02 / 3, rel=ROUNDING)
    assert float(bound.distance_change) == pytest.approx(math.sqrt(0.06 / 3), rel=ROUNDING)
    assert float(bound.distance_bound) == pytest.approx(math.sqrt(0.06 / 3), rel=ROUNDING)
    assert bound.distance_change > 1.2 * math.sqrt(2 * bound.dispersion)


def test_two_points_need_the_factor_too():
    """u = +-0.1 along their line: one distance, changed by .200; sqrt(2 V) = .141, over all four ordered pairs and not over one."""
    teacher, shift = [0.0, 1.0], [-0.1, 0.1]
    change = abs(abs(teacher[1] + shift[1] - teacher[0] - shift[0]) - abs(teacher[1] - teacher[0]))
    dispersion = spread([[value] for value in shift])
    assert change == pytest.approx(0.2)
    assert change > 1.4 * math.sqrt(2 * dispersion)
    assert change == pytest.approx(math.sqrt(2 * dispersion * 2 / 1))
    assert mean([0.0, change**2, change**2, 0.0]) == pytest.approx(2 * dispersion)


@given(pair=spaces(), seed=st.integers(0, 99), length=st.sampled_from((0.0, 0.1, 1.0, 10.0)))
def test_average_vector_loss_is_at_least_twice_the_dispersion(pair, seed, length):
    image, text = pair, tuple(value.roll(1, dims=0) * 1.5 + 1 for value in pair)
    student, teacher = (torch.cat(both) for both in zip(image, text, strict=True))
    twice = 2 * float(distortion_bound(student, teacher).dispersion)

    def loss(centre: Tensor) -> float:
        return float(average_vector_loss(image[0], text[0], image[1], text[1], mean=centre))

    best = (student - teacher).mean(dim=0)
    away = length * randn(len(best), seed=seed)
    assert loss(best) == pytest.approx(twice, rel=ROUNDING, abs=1e-12)
    assert loss(best + away) == pytest.approx(twice + 2 * float(away.square().sum()), rel=ROUNDING, abs=1e-12)
    assert loss(away) >= twice * (1 - ROUNDING) - 1e-12


# statement 3 ----------------------------------------------------------------------------------------------------------


@given(pair=spaces())
def test_rsa_is_at_least_its_bound(pair):
    bound = distortion_bound(*pair)
    target(float(bound.rsa_bound - bound.rsa))
    assert bound.rsa_bound == -1 or 0 <= bound.rsa_bound <= 1
    assert bound.rsa >= bound.rsa_bound - ROUNDING


def attained(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ordered points a on a line, moved to a + tau * delta without changing their order.

    Over pairs i < j the distances a_j - a_i change by tau * (delta_j - delta_i). The mean of this over all pairs is 0 if
    delta is orthogonal to the ranks: the change of the *centred* distances then is all of epsilon. It is orthogonal to
    the centred distances of the student if n * tau * <delta, a> + n * tau^2 * |delta|^2 = 0 (delta of mean zero), so
    tau = -<delta, a> / |delta|^2; a right angle there is what the bound assumes.
    """
    ranks = torch.arange(samples, dtype=torch.float64)
    points = ranks + 0.4 * torch.rand(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(torch.stack([torch.ones_like(ranks), ranks], dim=1)).Q
    delta = randn(samples, seed=seed)
    delta = delta - basis @ (basis.T @ delta)
    student = points - (delta @ points) / delta.square().sum() * delta
    assert bool((student.diff() > 0).all())
    return student[:, None], points[:, None]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("samples", [3, 4, 6, 12])
def test_bound_on_rsa_is_attained(samples, seed):
    bound = distortion_bound(*attained(samples, seed))
    assert float(bound.rsa) == pytest.approx(float(bound.rsa_bound), abs=1e-9)
    assert float(bound.aligned_rsa_bound) == pytest.approx(float(bound.rsa_bound), abs=1e-9)
    assert bound.rsa < 1 - 1e-7


def test_bound_on_rsa_needs_the_population_variance():
    """The case that attains the bound breaks it with the larger sample variance."""
    student, teacher = attained(3, seed=1)
    bound, pairs = distortion_bound(student, teacher), torch.pdist(teacher)
    assert bound.rsa < (1 - bound.distance_bound**2 / pairs.var(correction=1)).sqrt() - 1e-4


def test_bound_on_rsa_says_nothing_above_sigma():
    teacher = randn(6, 3, seed=1)
    limit = float(torch.pdist(teacher).var(correction=0) * 5 / 12)  # epsilon = sigma at this dispersion
    noise = randn(6, 3, seed=2)
    noise = (noise - noise.mean(dim=0)) / (noise - noise.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    below, above = (distortion_bound(teacher + math.sqrt(factor * limit) * noise, teacher) for factor in (0.99, 1.01))
    assert float(below.rsa_bound) == pytest.approx(0.1, rel=1e-9)
    assert float(above.rsa_bound) == -1


def test_bound_holds_where_rsa_is_negative():
    teacher = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    bound = distortion_bound(torch.tensor([[0.0], [10.0], [1.0]], dtype=torch.float64), teacher)
    assert bound.rsa < -0.2
    assert bound.rsa_bound <= bound.aligned_rsa_bound <= bound.rsa


# statement 4 ----------------------------------------------------------------------------------------------------------


@given(pair=spaces())
def test_rsa_is_at_least_its_aligned_bound(pair):
    bound = distortion_bound(*pair)
    target(float(bound.aligned_rsa_bound - bound.rsa))
    assert 0 <= bound.aligned_dispersion <= bound.dispersion
    assert bound.rsa_bound <= bound.aligned_rsa_bound <= 1
    assert bound.rsa >= bound.aligned_rsa_bound - ROUNDING


@given(pair=spaces(), seed=st.integers(0, 99), scale=st.floats(-3, 3))
def test_aligned_dispersion_is_the_best_over_rotations_and_scales(pair, seed, scale):
    student, teacher = pair
    value = float(distortion_bound(student, teacher).aligned_dispersion)
    assert value == pytest.approx(spread(differences(procrustes(student, teacher), teacher)), rel=ROUNDING, abs=1e-10)
    other = scale * student @ rotation(student.shape[1], seed)
    assert value <= spread(differences(other, teacher)) + 1e-10


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
@pytest.mark.parametrize(("samples", "width"), [(5, 2), (12, 6), (8, 63)])
def test_rotation_and_scale_leave_only_the_aligned_bound(samples, width, scale):
    teacher = randn(samples, width, seed=1)
    bound = distortion_bound(scale * teacher @ rotation(width, seed=2) + 3, teacher)
    assert float(bound.rsa_bound) == -1
    assert float(bound.aligned_rsa_bound) == pytest.approx(1, abs=1e-9)
    assert float(bound.rsa) == pytest.approx(1, abs=1e-9)
    assert float(bound.aligned_dispersion) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("noise", [3e-8, 1e-6, 1e-4])
def test_aligned_bound_of_nearly_equidistant_points(noise):
    """Their distances vary so little that rounding of V* would break the bound."""
    teacher = torch.eye(8, dtype=torch.float64) + noise * randn(8, 8, seed=1)
    student = 1.7 * (teacher + 0.3 * noise * randn(8, 8, seed=2)) @ rotation(8, 3)
    bound = distortion_bound(student, teacher)
    assert 0.2 < bound.aligned_rsa_bound <= bound.rsa


def test_aligned_dispersion_is_no_bound_on_distances():
    teacher = randn(8, 5, seed=1)
    bound = distortion_bound(2 * teacher, teacher)
    assert bound.distance_change > 1
    assert float(bound.aligned_dispersion) == pytest.approx(0, abs=1e-12)


# tiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dissimilarity", ["euclidean", "cosine"])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_tiles_equal_one(monkeypatch, rows, dissimilarity):
    teacher = randn(13, 4, seed=1) + 1
    student = teacher + 0.1 * randn(13, 4, seed=2)
    whole = distortion_bound(student, teacher, dissimilarity=dissimilarity)
    monkeypatch.setattr(tiles, "ROWS", rows)
    check(distortion_bound(student, teacher, dissimilarity=dissimilarity), whole)


@pytest.mark.parametrize("gap", [1e-12, 1e-9, 1e-4, 0.1])
def test_distances_of_close_points_in_one_tile(gap):
    points = torch.cat([randn(5, 7, seed=1), randn(5, 7, seed=1) + gap * randn(5, 7, seed=2)])
    expected = torch.tensor([[math.dist(one, two) for two in points.tolist()] for one in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(tiles.squared_distances(points, points).sqrt(), expected, rtol=1e-12, atol=0)


def test_small_change_with_a_large_offset():
    """Dyadic numbers: the offset changes no input by rounding."""
    teacher = torch.randint(-9, 9, (20, 5), generator=torch.Generator().manual_seed(1)).double()
    student = teacher + torch.randint(-9, 9, (20, 5), generator=torch.Generator().manual_seed(2)).double() / 2**16
    near, far = distortion_bound(student, teacher), distortion_bound(student + 2.0**30, teacher + 2.0**30)
    assert float(far.dispersion) == pytest.approx(float(near.dispersion), rel=1e-12)
    assert float(far.distance_bound) == pytest.approx(float(near.distance_bound), rel=1e-12)


def test_slack_is_what_the_bounds_leave_open():
    teacher = randn(12, 5, seed=1)
    bound = distortion_bound(1.1 * teacher @ rotation(5) * 0.9 + 0.1 * randn(12, 5, seed=2), teacher)
    assert bound.distance_slack == bound.distance_bound - bound.distance_change > 0
    assert bound.rsa_slack == bound.rsa - bound.rsa_bound >= bound.aligned_rsa_slack == bound.rsa - bound.aligned_rsa_bound > 0


# cosine ---------------------------------------------------------------------------------------------------------------


def directions(points: Tensor) -> Tensor:
    return torch.tensor([[value / math.hypot(*row) for value in row] for row in points.tolist()], dtype=torch.float64)


def cosine_oracle(student: Tensor, teacher: Tensor) -> DistortionBound:
    f, p = directions(student), directions(teacher)
    centres = [value - torch.tensor([mean(list(column)) for column in zip(*value.tolist(), strict=True)]) for value in (f, p)]
    turned = f @ torch.from_numpy(orthogonal_procrustes(centres[0].numpy(), centres[1].numpy())[0])
    before, after = ([1 - math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs_of(value)] for value in (p, f))
    squares = []
    for moved in (f, turned):
        shift = torch.tensor(differences(moved, p), dtype=torch.float64)
        lengths = zip(distances(f), distances(p), distances(shift), strict=True)
        squares.append(mean([((one + two) / 2 * three) ** 2 for one, two, three in lengths]))
    covariance = mean([(a - mean(before)) * (b - mean(after)) for a, b in zip(before, after, strict=True)])

    def lower_bound(square: float) -> float:
        rest = 1 - square / variance(before)
        return math.sqrt(rest) if rest >= 0 else -1.0

    values = (
        math.sqrt(mean([(b - a) ** 2 for a, b in zip(before, after, strict=True)])),
        math.sqrt(squares[0]),
        covariance / math.sqrt(variance(before) * variance(after)),
        lower_bound(squares[0]),
        lower_bound(min(squares)),
        spread(differences(f, p)),
        spread(differences(turned, p)),
    )
    return DistortionBound(*(torch.tensor(value, dtype=torch.float64) for value in values))


def pairs_of(points: Tensor) -> list[tuple[list[float], list[float]]]:
    return list(itertools.combinations(points.tolist(), 2))


@pytest.mark.parametrize("noise", [0.02, 0.2, 3.0])
@pytest.mark.parametrize(("samples", "width"), [(3, 2), (7, 3), (20, 33)])
def test_cosine_bound_equals_oracle(samples, width, noise):
    teacher = randn(samples, width, seed=1) * torch.linspace(0.1, 3, samples, dtype=torch.float64)[:, None]
    student = 1.5 * teacher + noise * teacher.norm(dim=1, keepdim=True) / width**0.5 * randn(samples, width, seed=2)
    check(distortion_bound(student, teacher, dissimilarity="cosine"), cosine_oracle(student, teacher))


@st.composite
def spheres(draw) -> tuple[Tensor, Tensor]:
    student, teacher = draw(spaces())
    away = torch.tensor([[0.01 * (k + 1)] for k in range(len(teacher))], dtype=torch.float64)
    pair = (student + away * (student == 0).all(dim=1, keepdim=True), teacher + away * (teacher == 0).all(dim=1, keepdim=True))
    assume(all(float(torch.pdist(directions(value)).max() - torch.pdist(directions(value)).min()) > 1e-3 for value in pair))
    return pair


@given(pair=spheres())
def test_cosine_bounds_hold(pair):
    bound = distortion_bound(*pair, dissimilarity="cosine")
    target(float(bound.distance_change - bound.distance_bound))
    assert bound.distance_change <= bound.distance_bound * (1 + ROUNDING) + 1e-9
    assert bound.rsa >= bound.aligned_rsa_bound - ROUNDING
    assert bound.aligned_rsa_bound >= bound.rsa_bound
    assert 0 <= bound.aligned_dispersion <= bound.dispersion
    assert float(bound.rsa) == pytest.approx(float(rsa(*pair, dissimilarity="cosine")), abs=1e-9)


@given(pair=spheres())
def test_statements_on_cosines(pair):
    """Of each pair, of the root mean square and of the mean over pairs, from V and the traces."""
    f, p = (directions(value) for value in pair)
    u, samples = torch.tensor(differences(f, p), dtype=torch.float64), len(f)
    changes = []
    for (a, b), (c, d), (v, w) in zip(pairs_of(f), pairs_of(p), pairs_of(u), strict=True):
        one, two = (math.fsum(x * y for x, y in zip(*both, strict=True)) for both in ((a, b), (c, d)))
        changes.append(abs(one - two))
        assert changes[-1] <= (math.dist(a, b) + math.dist(c, d)) / 2 * math.dist(v, w) + ROUNDING
    dispersion, factor = spread(differences(f, p)), samples / (samples - 1)
    bound = float(distortion_bound(*pair, dissimilarity="cosine").distance_bound)
    assert math.sqrt(mean([change**2 for change in changes])) <= bound + 1e-9
    assert bound <= 2 * math.sqrt(2 * dispersion * factor) + 1e-9
    assert mean(changes) <= factor * math.sqrt(2 * (spread(f.tolist()) + spread(p.tolist())) * dispersion) + 1e-9


@pytest.mark.parametrize(("before", "after"), [(0.3, 0.4), (1.2, 0.1), (0.5, 1.5)])
def test_statement_on_a_cosine_is_attained(before, after):
    """Two points that open symmetrically: the chord keeps its direction."""
    p, f = ([[-math.sin(angle), math.cos(angle)], [math.sin(angle), math.cos(angle)]] for angle in (before, after))
    shift = 2 * abs(math.sin(after) - math.sin(before))
    assert math.dist(minus(f[0], p[0]), minus(f[1], p[1])) == pytest.approx(shift)
    change = abs(math.cos(2 * after) - math.cos(2 * before))
    assert change == pytest.approx((math.dist(*f) + math.dist(*p)) / 2 * shift, rel=1e-12)


def minus(one: list[float], two: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, two, strict=True)]


def test_cosine_bound_on_the_change_is_attained():
    """The three points of a triangle about an axis, which opens like an umbrella."""

    def umbrella(angle: float) -> Tensor:
        turns = [2 * math.pi * k / 3 for k in range(3)]
        rows = [[math.sin(angle) * math.cos(turn), math.sin(angle) * math.sin(turn), math.cos(angle)] for turn in turns]
        return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)  # the last stays, so that distances differ

    three = [umbrella(angle)[:3] for angle in (0.3, 0.5)]
    changes = [abs((one - two) / 2) for one, two in zip(*([d**2 for d in distances(value)] for value in three), strict=True)]
    u = torch.tensor(differences(three[1], three[0]), dtype=torch.float64)
    weights = zip(distances(three[1]), distances(three[0]), distances(u), strict=True)
    assert changes == pytest.approx([(one + two) / 2 * shift for one, two, shift in weights], rel=1e-12)
    bound = distortion_bound(umbrella(0.5), umbrella(0.3), dissimilarity="cosine")
    assert 0 < bound.distance_slack < 0.05 * bound.distance_bound


def test_cosine_needs_the_distances_in_its_bound():
    """Far apart on the sphere a cosine changes by more than the distance: epsilon alone is no bound, for all its being one on distances."""

    def fan(angle: float) -> Tensor:
        rows = [[0.0, 1.0], [math.sin(angle), math.cos(angle)], [-math.sin(angle), math.cos(angle)]]
        return torch.tensor(rows, dtype=torch.float64)

    euclidean, cosine = (distortion_bound(fan(1.4), fan(1.2), dissimilarity=kind) for kind in ("euclidean", "cosine"))
    assert euclidean.distance_change <= euclidean.distance_bound
    assert cosine.distance_change > 1.1 * euclidean.distance_bound
    assert cosine.distance_change <= cosine.distance_bound


def test_rotation_leaves_only_the_aligned_cosine_bound():
    teacher = randn(12, 6, seed=1)
    bound = distortion_bound(3 * teacher @ rotation(6, seed=2), teacher, dissimilarity="cosine")
    assert float(bound.rsa_bound) == -1
    assert float(bound.aligned_rsa_bound) == pytest.approx(1, abs=1e-9)
    assert float(bound.aligned_dispersion) == pytest.approx(0, abs=1e-12)


def test_common_shift_changes_cosines():
    """The lengths of the difference vectors of the directions, not those of the embeddings, count."""
    teacher = randn(8, 6, seed=1)
    bound = distortion_bound(teacher + 2 * randn(6, seed=2), teacher, dissimilarity="cosine")
    assert bound.distance_change > 0.1
    assert bound.dispersion > 0.1


# invariances ----------------------------------------------------------------------------------------------------------


@given(pair=spaces(), seed=st.integers(0, 99))
def test_bound_is_invariant_to_permutation_translation_and_a_common_rotation(pair, seed):
    student, teacher = pair
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    turn = rotation(student.shape[1], seed)
    shift = randn(2, student.shape[1], seed=seed)
    moved = distortion_bound(student[order] @ turn + shift[0], teacher[order] @ turn + shift[1])
    for field, one, two in zip(DistortionBound._fields, moved, distortion_bound(student, teacher), strict=True):
        if field.endswith("rsa_bound"):  # the root multiplies rounding errors next to 0
            one, two = one.clamp(min=0).square(), two.clamp(min=0).square()
        assert float(one) == pytest.approx(float(two), rel=ROUNDING, abs=1e-9), field


# the page --------------------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_of_proofs_names_is_there():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "distortion-bound.md").read_text(encoding="utf-8")))
    tests = "".join((root / "tests" / "metrics" / f"test_{name}.py").read_text(encoding="utf-8") for name in ("distortion", "agreement"))
    assert len(named) > 20
    assert named <= set(re.findall(r"^def (test_\w+)\(", tests, flags=re.MULTILINE))


# errors ---------------------------------------------------------------------------------------------------------------

GOOD = randn(5, 4, seed=3)
NAN, INFINITE = GOOD.clone(), GOOD.clone()
NAN[1, 2], INFINITE[1, 2] = math.nan, math.inf


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "got"),
    [
        (GOOD[:2], GOOD[:2], "at least 3 samples", "2"),
        (GOOD[:4], GOOD, "embeddings of one shape", r"\(4, 4\) and \(5, 4\)"),
        (GOOD[:, :3], GOOD, "embeddings of one shape", r"\(5, 3\) and \(5, 4\)"),
        (NAN, GOOD, "finite student embeddings", "NaN or infinity"),
        (GOOD * 1e70, GOOD, "student embeddings below 1e60", "larger ones"),
        (GOOD, -1e70 * GOOD, "teacher embeddings below 1e60", "larger ones"),
        (GOOD, INFINITE, "finite teacher embeddings", "NaN or infinity"),
        (torch.ones(5, 4), GOOD, "distances that differ", "10 equal ones"),
        (GOOD, torch.ones(5, 4), "distances that differ", "10 equal ones"),
        (GOOD[0], GOOD, r"student embeddings of shape \(B, D\) with B, D >= 1", r"float64 tensor of shape \(4,\)"),
    ],
)
def test_bound_value_errors(student, teacher, expected, got):
    with pytest.raises(ValueError, match=message("distortion_bound", expected, got)):
        distortion_bound(student, teacher)


def test_bound_type_errors():
    with pytest.raises(
        TypeError, match=message("distortion_bound", "floating-point teacher embeddings", r"int64 tensor of shape \(5, 4\)")
    ):
        distortion_bound(GOOD, GOOD.long())
    with pytest.raises(
        TypeError, match=r"^distortion_bound: expected student embeddings as a tensor of shape \(B, D\), got None\. Pass a tensor\.$"
    ):
        distortion_bound(None, GOOD)


# the metric -----------------------------------------------------------------------------------------------------------

PAIRS = 11
MODALITIES = ("image", "text", "stacked")
TEACHER = Embeddings(3 * randn(PAIRS, 6, seed=10), 2 * randn(PAIRS, 6, seed=11) + 1)
STUDENT = Embeddings(TEACHER.image + 0.1 * randn(PAIRS, 6, seed=12), TEACHER.text + 0.2 * randn(PAIRS, 6, seed=13))
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def batch(start: int, stop: int) -> tuple[Embeddings, Embeddings]:
    return tuple(Embeddings(*(part[start:stop] for part in value)) for value in (STUDENT, TEACHER))


def chosen(modality: str, stop: int = PAIRS) -> DistortionBound:
    values = batch(0, stop)
    return distortion_bound(*(torch.cat(list(value)) if modality == "stacked" else getattr(value, modality) for value in values))


@every_modality
@pytest.mark.parametrize("cuts", [(0, PAIRS), (0, 1, 4, PAIRS), tuple(range(PAIRS + 1))], ids=["one", "uneven", "single rows"])
def test_metric_equals_function(modality, cuts):
    metric = Distortion(modality=modality)
    for start, stop in itertools.pairwise(cuts):
        metric.update(*batch(start, stop))
    check(metric.compute().as_parts(), chosen(modality))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_metric_needs_only_its_modality(modality):
    metric = Distortion(modality=modality)
    metric.update(*(Embeddings(**{modality: getattr(value, modality)}) for value in (STUDENT, TEACHER)))
    check(metric.compute().as_parts(), chosen(modality))


def test_metric_default_call_and_reset():
    metric = Distortion()
    check(metric(*batch(0, 5)).as_parts(), chosen("image", stop=5))
    metric.update(*batch(5, PAIRS))
    check(metric.compute().as_parts(), chosen("image"))
    metric.reset()
    assert metric.student == metric.teacher == []
    metric.update(*batch(0, 4))
    check(metric.compute().as_parts(), chosen("image", stop=4))


def test_metric_stores_no_graph():
    metric = Distortion()
    metric.update(Embeddings(STUDENT.image.clone().requires_grad_()), Embeddings(TEACHER.image.clone().requires_grad_()))
    assert not metric.student[0].requires_grad
    assert not metric.teacher[0].requires_grad


@pytest.mark.parametrize(("modality", "count"), [("image", PAIRS), ("text", PAIRS), ("stacked", 2 * PAIRS)])
def test_metric_max_samples(modality, count):
    exact, small = (Distortion(modality=modality, max_samples=limit) for limit in (count, count - 1))
    for metric in (exact, small):
        metric.update(*batch(0, 4))
        metric.update(*batch(4, PAIRS))
    exact.compute()
    with pytest.raises(ValueError, match=message("Distortion", rf"at most max_samples={count - 1} rows", str(count))):
        small.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Distortion was called before")
def test_metric_with_too_few_samples():
    metric = Distortion()
    with pytest.raises(ValueError, match=message("Distortion", "at least 3 samples", "none")):
        metric.compute()
    metric.update(*batch(0, 2))
    with pytest.raises(ValueError, match=message("distortion_bound", "at least 3 samples", "2")):
        metric.compute()


def test_metric_unknown_modality():
    with pytest.raises(ValueError, match=message("Distortion", "modality to be one of 'image', 'text', 'stacked'", "'both'")):
        Distortion(modality="both")


FOUR = batch(6, 10)


@pytest.mark.parametrize(
    ("modality", "arguments", "error", "expected", "got"),
    [
        ("image", {"student": Embeddings(torch.full((4, 6), math.nan))}, ValueError, "finite student embeddings", "NaN or infinity"),
        (
            "image",
            {"teacher": batch(6, 9)[1]},
            ValueError,
            "student and teacher embeddings of the same samples",
            r"shapes \(4, 6\) and \(3, 6\)",
        ),
        (
            "image",
            {"teacher": Embeddings(FOUR[1].image[:, :5])},
            ValueError,
            "student and teacher embeddings of one width",
            r"shapes \(4, 6\) and \(4, 5\)",
        ),
        ("text", {"student": Embeddings(FOUR[0].image)}, ValueError, 'text embeddings for modality="text"', "None"),
        ("stacked", {"teacher": Embeddings(text=FOUR[1].text)}, ValueError, 'image embeddings for modality="stacked"', "None"),
        (
            "stacked",
            {"student": Embeddings(FOUR[0].image, FOUR[0].text[:3])},
            ValueError,
            "image and text embeddings of the same pairs",
            r"float64 tensor of shape \(4, 6\) on cpu and float64 tensor of shape \(3, 6\) on cpu",
        ),
        ("image", {"student": FOUR[0].image}, TypeError, r"geomreg\.Embeddings\(image=, text=\)", r"float64 tensor of shape \(4, 6\)"),
    ],
)
def test_metric_stores_nothing_when_update_raises(modality, arguments, error, expected, got):
    metric = Distortion(modality=modality)
    metric.update(*batch(0, 6))
    with pytest.raises(error, match=message("Distortion", expected, got)):
        metric.update(**{"student": FOUR[0], "teacher": FOUR[1], **arguments})
    assert len(metric.student) == len(metric.teacher) == 1
    check(metric.compute().as_parts(), chosen(modality, stop=6))


# two processes --------------------------------------------------------------------------------------------------------


def collect(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        metric = Distortion(modality="stacked")
        for start, stop in itertools.pairwise(((0, 3, 7), (7, PAIRS))[rank]):
            metric.update(*batch(start, stop))
        torch.save(tuple(metric.compute().values()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_metric_over_two_processes_equals_one(tmp_path: Path):
    mp.spawn(collect, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        check(DistortionBound(*torch.load(tmp_path / f"{rank}.pt")), chosen("stacked"))

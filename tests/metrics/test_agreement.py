"""Zero-shot agreement: the certificate and the bound hold (random and adversarial), are attained, and equal loops."""

import math
import re

import pytest
import torch
from batches import rotation
from hypothesis import given, target
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import ZeroShotBound, agreement, zero_shot_bound


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(values: Tensor) -> list[list[float]]:
    return [[value / math.hypot(*row) for value in row] for row in values.detach().double().tolist()]


def minus(one: list[float], two: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, two, strict=True)]


def nearest(point: list[float], heads: list[list[float]]) -> int:
    """Class of the largest cosine, the first of equal ones."""
    cosines = [math.fsum(a * b for a, b in zip(point, head, strict=True)) for head in heads]
    return max(range(len(heads)), key=lambda c: (cosines[c], -c))


def oracle(student: Tensor, teacher: Tensor, student_heads: Tensor, teacher_heads: Tensor) -> ZeroShotBound:
    f, p, g, t = (unit(value) for value in (student, teacher, student_heads, teacher_heads))
    u, v = ([minus(a, b) for a, b in zip(one, two, strict=True)] for one, two in ((f, p), (g, t)))
    mean = [math.fsum(column) / len(u) for column in zip(*u, strict=True)]
    radius, spread = max(math.dist(one, mean) for one in v), math.fsum(math.dist(one, mean) ** 2 for one in u) / len(u)
    agree, certified, margins = 0, 0, []
    for i, point in enumerate(p):
        best = nearest(point, t)
        others = [c for c in range(len(t)) if c != best]
        gaps = {c: math.dist(point, t[c]) - math.dist(point, t[best]) for c in others}
        agree += nearest(f[i], g) == best
        certified += all(gaps[c] > math.dist(u[i], v[c]) + math.dist(u[i], v[best]) for c in others)
        margins.append(min(gaps.values()))
    turned = [1.0]
    for margin in margins:  # just below such a tau one margin less would count, just above one more
        tau = margin / 2 - radius
        if tau > 1e-12:
            turned.append(sum(other < margin - 1e-12 for other in margins) / len(p) + spread / tau**2)
    return ZeroShotBound(*(torch.tensor(x, dtype=torch.float64) for x in (agree / len(p), certified / len(p), max(0.0, 1 - min(turned)))))


def check(actual: ZeroShotBound, expected: ZeroShotBound) -> None:
    for field, one, two in zip(ZeroShotBound._fields, actual, expected, strict=True):
        assert one.ndim == 0, field
        assert one.dtype == torch.float64, field
        assert float(one) == pytest.approx(float(two), abs=1e-9), field


def problem(samples: int, classes: int, width: int, change: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images near the heads of their classes, and a student that moved by about ``change``."""
    heads = randn(classes, width, seed=seed)
    teacher = heads[torch.arange(samples) % classes] + 0.5 * randn(samples, width, seed=seed + 1)
    student = teacher + change * (randn(samples, width, seed=seed + 2) + 1)
    return 3 * student, teacher, heads + change * (randn(classes, width, seed=seed + 3) + 1), 2 * heads


@pytest.mark.parametrize("change", [0.0, 0.001, 0.01, 0.05, 0.3, 2.0])
@pytest.mark.parametrize(("samples", "classes", "width"), [(1, 2, 2), (9, 3, 4), (40, 7, 33)])
def test_equals_oracle(samples, classes, width, change):
    given = problem(samples, classes, width, change, seed=1)
    check(zero_shot_bound(*given), oracle(*given))


def test_the_shares_of_the_cases_lie_between_none_and_all():
    """Else the comparison above would say little."""
    found = [zero_shot_bound(*problem(40, 7, 33, change, seed=1)) for change in (0.001, 0.01, 0.05, 0.3)]
    for field in ZeroShotBound._fields[1:]:
        assert any(0.02 < float(getattr(value, field)) < 0.98 for value in found), field
    assert 0.1 < float(zero_shot_bound(*problem(40, 7, 33, 2.0, seed=1)).agreement) < 0.98


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_tiles_equal_one(monkeypatch, rows):
    given = problem(11, 4, 5, 0.02, seed=3)
    monkeypatch.setattr(agreement, "ROWS", rows)
    check(zero_shot_bound(*given), oracle(*given))


def test_student_that_is_the_teacher():
    _, teacher, _, heads = problem(20, 5, 8, 0.0, seed=1)
    bound = zero_shot_bound(teacher, teacher, heads, heads)
    assert [float(value) for value in bound] == pytest.approx([1, 1, 1])
    assert float(bound.slack) == float(bound.bound_slack) == 0


def test_equal_cosines_are_the_first_class_and_not_certified():
    heads = torch.eye(3)
    points = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    bound = zero_shot_bound(points, points, heads, heads)
    assert [float(value) for value in bound] == pytest.approx([1, 0.5, 0.5])


# the statements --------------------------------------------------------------------------------------------------------


@st.composite
def spaces(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On a coarse grid (equal directions, equal margins); the student moves every image, one image, one head, or is unrelated."""
    samples, classes, width = draw(st.integers(1, 8)), draw(st.integers(2, 4)), draw(st.integers(2, 3))

    def grid(rows: int, limit: int) -> Tensor:
        row = st.lists(st.integers(-limit, limit), min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64)

    def safe(values: Tensor) -> Tensor:
        return values + 0.01 * (values == 0).all(dim=1, keepdim=True)

    teacher, heads = safe(grid(samples, 4)), safe(grid(classes, 4))
    size = draw(st.sampled_from((1 / 64, 1 / 16, 1 / 4, 1)))
    kind = draw(st.sampled_from(("all", "one image", "one head", "common", "unrelated")))
    student, moved = teacher.clone(), heads.clone()
    if kind == "unrelated":
        student, moved = grid(samples, 4), grid(classes, 4)
    if kind in ("all", "common"):
        shift = grid(1, 4)
        student, moved = student + size * shift, moved + size * shift
    if kind in ("all", "one image"):
        student[draw(st.integers(0, samples - 1))] += size * grid(1, 4)[0]
    if kind in ("all", "one head"):
        moved[draw(st.integers(0, classes - 1))] += size * grid(1, 4)[0]
    return safe(student), teacher, safe(moved), heads


@given(given=spaces())
def test_certificate_and_bound_hold(given):
    found = zero_shot_bound(*given)
    target(float(found.certified - found.agreement))
    assert 0 <= found.bound <= found.certified + 1e-9
    assert found.certified <= found.agreement
    assert found.slack >= 0
    assert found.bound_slack >= -1e-9


@given(given=spaces(), tau=st.sampled_from((0.01, 0.1, 0.3, 1.0)), length=st.sampled_from((0.0, 0.1, 1.0)), seed=st.integers(0, 99))
def test_statement_for_every_tau_and_mean(given, tau, length, seed):
    """The share of other decisions is at most P(margin < 2 tau + 2 rho) + E|u - m|^2 / tau^2; the bound takes the best tau at its mean."""
    f, p, g, t = (torch.tensor(unit(value), dtype=torch.float64) for value in given)
    distances = torch.cdist(p, t, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values
    found, centre = zero_shot_bound(*given), (f - p).mean(dim=0)
    for mean in (centre, centre + length * randn(len(centre), seed=seed)):
        radius = (g - t - mean).norm(dim=1).max()
        few = ((distances[:, 1] - distances[:, 0]) < 2 * tau + 2 * radius - 1e-9).double().mean()
        many = ((distances[:, 1] - distances[:, 0]) < 2 * tau + 2 * radius + 1e-9).double().mean()
        spread = (f - p - mean).square().sum(dim=1).mean()
        assert 1 - found.agreement <= many + spread / tau**2 + 1e-9
        if mean is centre:
            assert 1 - found.bound <= few + spread / tau**2 + 1e-9


def circle(*angles: float) -> Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)


@pytest.mark.parametrize(("near", "far"), [(0.2, 1.0), (0.5, 0.6), (0.01, 2.0)])
def test_certificate_is_attained_on_the_circle(near, far):
    """The image turns by d one way, both heads by d the other way: every chord keeps its direction, so every triangle inequality is one of
    equal sides. The decision turns exactly at d = (far - near) / 4, and the certificate ends exactly there."""
    turn = (far - near) / 4
    for factor in (0.5, 0.999, 1.001, 1.5):
        d = factor * turn
        found = zero_shot_bound(circle(d), circle(0.0), circle(-near - d, far - d), circle(-near, far))
        assert bool(found.certified) == bool(found.agreement) == (factor < 1)


def test_certificate_needs_both_terms():
    """With the term of the best head alone, the image above at 1.5 times the angle would be certified although it turns."""
    near, far = 0.2, 1.0
    d = 1.5 * (far - near) / 4
    f, p, g, t = circle(d), circle(0.0), circle(-near - d, far - d), circle(-near, far)
    margin = math.dist(p[0], t[1]) - math.dist(p[0], t[0])
    assert margin > math.dist(f[0] - p[0], g[0] - t[0])
    assert float(zero_shot_bound(f, p, g, t).agreement) == 0


def test_bound_is_approached():
    """Two of ten images, at opposite points, turn by d and all heads by -d, so that their difference vectors are opposite and at the end of
    what Chebyshev allows; both decisions turn. For small angles chords are arcs and the bound is all but the truth."""
    near, d = 0.05, 1e-3
    far = near + 3.999 * d
    heads, rest = (-near, far, math.pi - near, math.pi + far), (-near,) * 8
    teacher, student = circle(0.0, math.pi, *rest), circle(d, math.pi + d, *rest)
    found = zero_shot_bound(student, teacher, circle(*(angle - d for angle in heads)), circle(*heads))
    assert float(found.agreement) == pytest.approx(0.8)
    assert found.bound <= found.agreement
    assert float(found.bound) == pytest.approx(0.8, abs=1e-3)


def test_common_rotation_turns_no_decision_but_the_certificates():
    """A rotation of student images and heads is invisible to zero-shot classification, not to the difference vectors."""
    _, teacher, _, heads = problem(20, 5, 8, 0.0, seed=1)
    turn = rotation(8)
    found = zero_shot_bound(teacher @ turn, teacher, heads @ turn, heads)
    assert float(found.agreement) == 1
    assert float(found.certified) == float(found.bound) == 0


@given(seed=st.integers(0, 99))
def test_invariances(seed):
    given = problem(9, 4, 5, 0.02, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    classes = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    turn = rotation(5, seed)
    more = torch.rand(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    moved = (given[0][order] * more, given[1][order], given[2][classes], given[3][classes] * 7)
    check(zero_shot_bound(*(value @ turn for value in moved)), zero_shot_bound(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_inputs_that_require_grad(dtype):
    given = [value.to(dtype).requires_grad_() for value in problem(9, 4, 5, 0.02, 1)]
    found = zero_shot_bound(*given)
    check(found, oracle(*given))
    assert not any(value.requires_grad for value in found)


GOOD, HEADS = randn(5, 4, seed=3), randn(3, 4, seed=4)
ZERO = HEADS.clone()
ZERO[2] = 0


@pytest.mark.parametrize(
    ("given", "expected", "got"),
    [
        ((GOOD, GOOD[:4], HEADS, HEADS), "student and teacher embeddings of the same samples", r"shapes \(5, 4\) and \(4, 4\)"),
        ((GOOD, GOOD, HEADS, HEADS[:2]), "student head and teacher head embeddings of the same samples", r"shapes \(3, 4\) and \(2, 4\)"),
        ((GOOD, GOOD, HEADS[:1], HEADS[:1]), "at least 2 samples", "1"),
        ((GOOD, GOOD, HEADS[:, :3], HEADS[:, :3]), "student and student head embeddings of one width", r"shapes \(5, 4\) and \(3, 3\)"),
        ((GOOD, GOOD / 0, HEADS, HEADS), "finite teacher embeddings", "NaN or infinity"),
        ((GOOD, GOOD, HEADS, ZERO), "teacher head embeddings with a direction", "a zero vector"),
        ((0 * GOOD, GOOD, HEADS, HEADS), "student embeddings with a direction", "a zero vector"),
    ],
)
def test_value_errors(given, expected, got):
    with pytest.raises(ValueError, match=rf"^zero_shot_bound: expected {expected}, got {got}\. .+\.$"):
        zero_shot_bound(*given)


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("zero_shot_bound: expected floating-point student head embeddings, got int64 tensor")):
        zero_shot_bound(GOOD, GOOD, HEADS.long(), HEADS)

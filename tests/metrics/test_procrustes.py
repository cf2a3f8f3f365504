"""The Procrustes decomposition against scipy's fits one after the other, pure cases, invariances and errors."""

import math
import re

import pytest
import torch
from batches import rotation
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from geomreg.metrics import ProcrustesParts, distortion_bound, procrustes

PARTS = ("translation", "rotation", "scale", "residual")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(one: Tensor, two: Tensor) -> float:
    """Mean squared distance of rows."""
    return math.fsum(math.dist(a, b) ** 2 for a, b in zip(one.tolist(), two.tolist(), strict=True)) / len(one)


def oracle(student: Tensor, teacher: Tensor) -> ProcrustesParts:
    """The teacher moved, turned, scaled, each step by its own fit, and the distance to the student after each."""
    left = [distance(student, teacher)]
    centre = student.mean(dim=0)
    moved = teacher - teacher.mean(dim=0) + centre
    left.append(distance(student, moved))
    turn = torch.from_numpy(orthogonal_procrustes((moved - centre).numpy(), (student - centre).numpy())[0])
    turned = (moved - centre) @ turn + centre
    left.append(distance(student, turned))
    factor = float(((student - centre) * (turned - centre)).sum() / (turned - centre).square().sum())
    left.append(distance(student, factor * (turned - centre) + centre))
    values = (left[0], left[0] - left[1], left[1] - left[2], left[2] - left[3], left[3], factor)
    return ProcrustesParts(*(torch.tensor(value, dtype=torch.float64) for value in values))


def check(actual: ProcrustesParts, expected: ProcrustesParts, tolerance: float = 1e-10) -> None:
    for field, one, two in zip(ProcrustesParts._fields, actual, expected, strict=True):
        assert one.ndim == 0, field
        assert one.dtype == torch.float64, field
        assert float(one) == pytest.approx(float(two), rel=tolerance, abs=tolerance), field


def shares(student: Tensor, teacher: Tensor) -> dict[str, float]:
    found = procrustes(student, teacher).shares
    assert tuple(found) == PARTS
    return {part: float(share) for part, share in found.items()}


@pytest.mark.parametrize("noise", [0.01, 0.5, 5.0])
@pytest.mark.parametrize(("samples", "width"), [(3, 1), (4, 8), (20, 5), (40, 33)])
def test_equals_fits_one_after_the_other(samples, width, noise):
    teacher = randn(samples, width, seed=1) * torch.linspace(0.1, 2, width, dtype=torch.float64) + 1
    student = 1.3 * teacher @ rotation(width, seed=2) + 0.4 + noise * randn(samples, width, seed=3)
    check(procrustes(student, teacher), oracle(student, teacher))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_pure_cases(size):
    teacher = randn(30, 6, seed=1)
    teacher = teacher - teacher.mean(dim=0)
    generator = torch.triu(randn(6, 6, seed=2), diagonal=1)
    turn = torch.linalg.matrix_exp(min(size, 1.0) * (generator - generator.T))
    residual = teacher.square() - teacher.square().mean(dim=0)
    cross = residual.T @ teacher  # made to need neither rotation nor scale: no cross-covariance with the teacher
    residual = residual - teacher @ torch.linalg.solve(teacher.T @ teacher, cross.T)
    cases = {
        "translation": teacher + size * randn(6, seed=3),
        "rotation": teacher @ turn,
        "scale": (1 + size) * teacher,
        "residual": teacher + size * residual,
    }
    for part, student in cases.items():
        found = shares(student, teacher)
        assert found[part] == pytest.approx(1, abs=1e-8), part
        assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
        assert min(found.values()) >= 0


def test_reflection_is_a_rotation():
    teacher = randn(30, 3, seed=1)
    teacher = teacher - teacher.mean(dim=0)
    assert shares(teacher * torch.tensor([1.0, 1.0, -1.0]), teacher)["rotation"] == pytest.approx(1, abs=1e-10)


def test_rotation_about_the_origin_is_translation_far_from_it():
    teacher = randn(30, 3, seed=1) + 100
    assert shares(teacher @ rotation(3, seed=2), teacher)["translation"] > 0.99


def test_order_of_rotation_and_scale_matters():
    """After a quarter turn the best factor of the unturned teacher is 0; fitted last, it is the right one."""
    teacher = randn(500, 2, seed=1)
    teacher = teacher - teacher.mean(dim=0)
    student = 2 * teacher @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    parts = procrustes(student, teacher)
    assert float((student * teacher).sum(dim=1).mean()) == pytest.approx(0, abs=1e-12)  # so the factor would be 0
    spread = float(teacher.square().sum(dim=1).mean())
    assert float(parts.scale) == pytest.approx(spread, rel=1e-10)
    assert float(parts.rotation) == pytest.approx(4 * spread, rel=1e-10)
    assert float(parts.factor) == pytest.approx(2, rel=1e-10)


@given(seed=st.integers(0, 999), samples=st.integers(3, 9), width=st.integers(1, 5), noise=st.sampled_from((0.0, 1e-4, 0.1, 1.0)))
def test_shares_are_a_bar_and_the_residual_is_the_aligned_dispersion(seed, samples, width, noise):
    teacher = randn(samples, width, seed=seed)
    student = teacher @ rotation(width, seed) * 1.5 + noise * randn(samples, width, seed=seed + 1) if seed % 2 else teacher + noise
    parts = procrustes(student, teacher)
    found = [float(share) for share in parts.shares.values()]
    assert min(found) >= 0
    assert math.fsum(found) == pytest.approx(1 if noise or seed % 2 else 0, abs=1e-12)
    spreads = [float((value - value.mean(dim=0)).square().sum(dim=1).mean()) for value in (student, teacher)]
    aligned = float(distortion_bound(student, teacher).aligned_dispersion)
    assert float(parts.residual) * spreads[1] == pytest.approx(aligned * spreads[0], abs=1e-12)


def test_no_change_is_all_zero():
    teacher = randn(6, 3)
    assert shares(teacher, teacher) == dict.fromkeys(PARTS, 0.0)
    assert float(procrustes(teacher, teacher).factor) == pytest.approx(1, rel=1e-12)


def test_collapsed_student_is_a_factor_of_zero():
    teacher = randn(9, 3)
    parts = procrustes(torch.ones(9, 3, dtype=torch.float64), teacher)
    check(parts, oracle(torch.ones(9, 3, dtype=torch.float64), teacher), 1e-12)
    assert float(parts.factor) == pytest.approx(0, abs=1e-12)


@given(seed=st.integers(0, 99))
def test_invariances(seed):
    teacher = randn(9, 4, seed=seed)
    student = 1.2 * teacher + 0.3 * randn(9, 4, seed=seed + 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    turn, shift = rotation(4, seed), 3 * randn(4, seed=seed + 2)
    check(procrustes(student[order] @ turn + shift, teacher[order] @ turn + shift), procrustes(student, teacher))
    assert shares(7 * student, 7 * teacher) == pytest.approx(shares(student, teacher), rel=1e-9)


def test_small_change_with_a_large_offset():
    teacher = torch.randint(-9, 9, (40, 5), generator=torch.Generator().manual_seed(1)).double()
    student = teacher + torch.randint(-9, 9, (40, 5), generator=torch.Generator().manual_seed(2)).double() / 1024
    offset = 2.0**20
    check(procrustes(student + offset, teacher + offset), procrustes(student, teacher), 1e-9)
    assert shares(student + offset, teacher + offset) == pytest.approx(shares(student, teacher), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_and_strided_inputs_that_require_grad(dtype):
    teacher, student = randn(5, 12, seed=1).to(dtype).T, randn(12, 10, seed=2).to(dtype)[:, ::2].requires_grad_()
    parts = procrustes(student, teacher)
    check(parts, oracle(student.detach().double(), teacher.double()))
    assert not any(value.requires_grad for value in parts)


GOOD = randn(5, 4, seed=3)
NAN = GOOD.clone()
NAN[1, 2] = math.nan


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "got"),
    [
        (GOOD[:2], GOOD[:2], "at least 3 samples", "2"),
        (GOOD[:4], GOOD, "student and teacher embeddings of the same samples", r"shapes \(4, 4\) and \(5, 4\)"),
        (GOOD[:, :3], GOOD, "student and teacher embeddings of one width", r"shapes \(5, 3\) and \(5, 4\)"),
        (NAN, GOOD, "finite student embeddings", "NaN or infinity"),
        (GOOD, torch.full((5, 4), 0.1), "teacher embeddings that differ", "equal ones alone"),
    ],
)
def test_value_errors(student, teacher, expected, got):
    with pytest.raises(ValueError, match=rf"^procrustes: expected {expected}, got {got}\. .+\.$"):
        procrustes(student, teacher)


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("procrustes: expected floating-point teacher embeddings, got int64 tensor")):
        procrustes(GOOD, GOOD.long())

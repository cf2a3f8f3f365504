"""Drift against loops and numpy's singular values, its extremes, invariances and errors."""

import math
import re

import numpy as np
import pytest
import torch
from batches import rotation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import DriftParts, distortion_bound, drift


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(student: Tensor, teacher: Tensor) -> DriftParts:
    rows = [[f - p for f, p in zip(*pair, strict=True)] for pair in zip(student.tolist(), teacher.tolist(), strict=True)]
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    square = math.fsum(value**2 for value in mean)
    dispersion = math.fsum(math.dist(row, mean) ** 2 for row in rows) / len(rows)
    total = math.fsum(math.hypot(*row) ** 2 for row in rows) / len(rows)
    singular = np.linalg.svd(np.array(rows) - np.array(mean), compute_uv=False)
    shares = [value / singular.sum() for value in singular if value > 1e-10 * singular.max()]
    rank = math.exp(-math.fsum(share * math.log(share) for share in shares))
    return DriftParts(*(torch.tensor(value, dtype=torch.float64) for value in (math.sqrt(square), dispersion, total, square / total, rank)))


def check(actual: DriftParts, expected: DriftParts, tolerance: float = 1e-10) -> None:
    for field, one, two in zip(DriftParts._fields, actual, expected, strict=True):
        assert one.ndim == 0, field
        assert one.dtype == torch.float64, field
        assert float(one) == pytest.approx(float(two), rel=tolerance, abs=1e-12), field


@pytest.mark.parametrize(("samples", "width"), [(3, 1), (3, 64), (20, 5), (20, 33), (200, 16)])
def test_equals_oracle(samples, width):
    teacher = randn(samples, width, seed=1)
    student = teacher + 0.1 * randn(samples, width, seed=2) * torch.logspace(0, -3, width, dtype=torch.float64) + 0.05
    check(drift(student, teacher), oracle(student, teacher))


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_effective_rank_counts_equal_directions(directions):
    """As many difference vectors +-e_k for each of some axes: equal singular values."""
    shift = torch.eye(8, dtype=torch.float64)[:directions]
    teacher = randn(2 * directions + 2, 8)
    student = teacher + torch.cat([shift, -shift, torch.zeros(2, 8)]) @ rotation(8)
    assert float(drift(student, teacher).effective_rank) == pytest.approx(directions, rel=1e-9)


def test_effective_rank_is_of_singular_values_not_of_variances():
    shift = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(drift(shift, torch.zeros(4, 2)).effective_rank) == pytest.approx(expected, rel=1e-12)


def test_common_shift_alone_and_no_drift():
    teacher = randn(6, 4).float()
    parts = drift(teacher.double() + torch.tensor([3.0, 0, 4, 0]), teacher)
    assert float(parts.mean_shift) == pytest.approx(5, rel=1e-12)
    assert (float(parts.dispersion), float(parts.common_share), float(parts.effective_rank)) == (0, 1, 0)
    assert [float(value) for value in drift(teacher, teacher)] == [0] * 5


@given(seed=st.integers(0, 99), size=st.sampled_from((1e-3, 1.0)))
def test_invariances_and_dispersion_of_the_bound(seed, size):
    teacher = randn(9, 4, seed=seed)
    student = teacher + size * (randn(9, 4, seed=seed + 1) + 1)
    parts = drift(student, teacher)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    turn, shift = rotation(4, seed), 3 * randn(4, seed=seed + 2)
    check(drift(student[order] @ turn + shift, teacher[order] @ turn + shift), parts, 1e-9)
    assert float(parts.dispersion) == pytest.approx(float(distortion_bound(student, teacher).dispersion), rel=1e-12)
    assert 1 <= float(parts.effective_rank) <= 4


def test_small_drift_with_a_large_offset():
    teacher = torch.randint(-9, 9, (40, 5), generator=torch.Generator().manual_seed(1)).double()
    student = teacher + torch.randint(-9, 9, (40, 5), generator=torch.Generator().manual_seed(2)).double() / 1024
    check(drift(student + 2.0**30, teacher + 2.0**30), drift(student, teacher), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_and_strided_inputs_that_require_grad(dtype):
    teacher, student = randn(5, 12, seed=1).to(dtype).T, randn(12, 10, seed=2).to(dtype)[:, ::2].requires_grad_()
    parts = drift(student, teacher)
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
        (GOOD, NAN, "finite teacher embeddings", "NaN or infinity"),
    ],
)
def test_value_errors(student, teacher, expected, got):
    with pytest.raises(ValueError, match=rf"^drift: expected {expected}, got {got}\. .+\.$"):
        drift(student, teacher)


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("drift: expected floating-point student embeddings, got bool tensor")):
        drift(GOOD > 0, GOOD)

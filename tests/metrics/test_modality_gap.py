"""The modality gap against a loop, its invariances and errors."""

import math
import re

import pytest
import torch
from batches import rotation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geomreg.metrics import modality_gap


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def centroid(values: Tensor, normalize: bool) -> list[float]:
    rows = [[value / (math.hypot(*row) if normalize else 1) for value in row] for row in values.tolist()]
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def oracle(image: Tensor, text: Tensor, normalize: bool = True) -> float:
    return math.dist(centroid(image, normalize), centroid(text, normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("images", "texts", "width"), [(1, 1, 1), (1, 9, 3), (12, 5, 33)])
def test_equals_oracle(images, texts, width, normalize):
    image, text = 5 * randn(images, width, seed=1) + 1, randn(texts, width, seed=2) - 0.2
    value = modality_gap(image, text, normalize=normalize)
    assert value.ndim == 0
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(oracle(image, text, normalize), rel=1e-12, abs=1e-15)


@given(seed=st.integers(0, 99), normalize=st.booleans())
def test_invariances(seed, normalize):
    image, text = randn(7, 4, seed=seed), randn(5, 4, seed=seed + 1)
    expected = float(modality_gap(image, text, normalize=normalize))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    turn, more = rotation(4, seed), torch.rand(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    moved = (image[order] * more if normalize else image[order] + 3) @ turn
    other = (text if normalize else text + 3) @ turn
    assert float(modality_gap(moved, other, normalize=normalize)) == pytest.approx(expected, rel=1e-10)
    assert float(modality_gap(other, moved, normalize=normalize)) == pytest.approx(expected, rel=1e-10)


def test_extremes():
    point = randn(1, 6)
    assert float(modality_gap(point.repeat(4, 1), 7 * point)) == pytest.approx(0, abs=1e-15)
    assert float(modality_gap(point.repeat(4, 1), -7 * point)) == pytest.approx(2, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_and_strided_inputs_that_require_grad(dtype):
    image, text = randn(5, 12, seed=1).to(dtype).T, randn(9, 10, seed=2).to(dtype)[:, ::2].requires_grad_()
    value = modality_gap(image, text)
    assert float(value) == pytest.approx(oracle(image.double(), text.detach().double()), rel=1e-12)
    assert not value.requires_grad


@pytest.mark.parametrize("scale", [1e-40, 1e38])
def test_smallest_and_largest_float32(scale):
    image, text = randn(4, 3, seed=1).float(), randn(4, 3, seed=2).float() / 4
    assert float(modality_gap(image, text * scale)) == pytest.approx(float(modality_gap(image, text)), rel=1e-3)


GOOD = randn(5, 4, seed=3)
ZERO = GOOD.clone()
ZERO[2] = 0


@pytest.mark.parametrize(
    ("image", "text", "expected", "got"),
    [
        (GOOD[:0], GOOD, r"image embeddings of shape \(B, D\) with B, D >= 1", r"float64 tensor of shape \(0, 4\)"),
        (GOOD, GOOD[:, :3], "image and text embeddings of one width", r"shapes \(5, 4\) and \(5, 3\)"),
        (GOOD, GOOD / 0, "finite text embeddings", "NaN or infinity"),
        (GOOD, ZERO, "text embeddings with a direction", "a zero vector"),
    ],
)
def test_value_errors(image, text, expected, got):
    with pytest.raises(ValueError, match=rf"^modality_gap: expected {expected}, got {got}\. .+\.$"):
        modality_gap(image, text)


def test_type_error():
    with pytest.raises(TypeError, match=re.escape("modality_gap: expected text embeddings as a tensor of shape (B, D), got None.")):
        modality_gap(GOOD, None)

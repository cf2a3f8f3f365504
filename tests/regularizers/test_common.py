"""Directions of vectors of every size."""

import pytest
import torch

from geomreg.regularizers.common import unit_along, unit_rows

SIZES = {torch.float32: (1e-37, 1e-30, 1e-22, 1e19, 1e30, 1e37), torch.float64: (1e-300, 1e-200, 1e160, 1e300)}


@pytest.mark.parametrize("dtype", SIZES)
def test_directions_do_not_depend_on_the_size(dtype):
    """Value, and the gradient times the size; ordinary numbers are rounded as the quotient by the norm."""
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = unit_rows(x.requires_grad_())
    assert torch.equal(expected, x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
    (gradient,) = torch.autograd.grad(expected[:, 0].sum(), x)
    for size in SIZES[dtype]:
        scaled = (size * x.detach()).requires_grad_()
        value = unit_rows(scaled)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value[:, 0].sum(), scaled)[0] * size, gradient)


@pytest.mark.parametrize("dtype", SIZES)
def test_what_has_no_direction(dtype):
    """Zeros, and numbers whose inverse overflows, have value and gradient 0; NaN and infinity go on."""
    x = torch.tensor([[0.0, 0.0], [torch.finfo(dtype).tiny / 8, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]], dtype=dtype, requires_grad=True)
    value = unit_rows(x)
    assert value[:2].eq(0).all()
    assert value[2:].isnan().any(dim=1).all()
    assert torch.autograd.grad(value[:2].sum(), x)[0][:2].eq(0).all()
    largest = torch.full((1, 2), torch.finfo(dtype).max, dtype=dtype)
    torch.testing.assert_close(unit_rows(largest), torch.full((1, 2), 0.5**0.5, dtype=dtype))


def test_a_summand_of_the_norm():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(unit_along(x, 1, eps=5.0), x / 10)
    torch.testing.assert_close(unit_along(1e-200 * x, 1, eps=5e-200), x / 10)

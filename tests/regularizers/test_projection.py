"""CaRot's projection norms: the authors' numbers, live weights."""

import copy

import pytest
import torch
from golden_cases import cases, check, inputs, name_of
from torch import nn

from geomreg import ProjectionOrthogonality
from geomreg.functional import projection_orthogonality_loss


@pytest.mark.parametrize("golden", cases("carot", containing="projection"), ids=name_of)
def test_golden(golden):
    arguments, hyper = inputs(golden), golden["hyper"]
    value = projection_orthogonality_loss(
        arguments["visual_proj"], arguments["text_projection"], cross=hyper["cross_fnorm"], orthogonal=hyper["l_orth_wv"]
    )
    check(golden, value, arguments)


def test_zero_norm_has_zero_gradient():
    weight = torch.eye(5, 3, dtype=torch.float64, requires_grad=True)
    value = projection_orthogonality_loss(weight, cross=0.0)
    value.backward()
    assert value.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, 3, generator=generator, dtype=torch.float64, requires_grad=True) for rows in (5, 4))
    assert torch.autograd.gradcheck(projection_orthogonality_loss, (image, text))
    assert torch.autograd.gradgradcheck(projection_orthogonality_loss, (image, text))


def test_module_follows_the_live_weights_and_registers_nothing():
    image, text = nn.Parameter(torch.randn(5, 3)), nn.Linear(4, 3)
    term = ProjectionOrthogonality(image, text)
    before = term()
    torch.testing.assert_close(before, projection_orthogonality_loss(image, text.weight.T))
    before.backward()
    assert image.grad.abs().max() > 0
    assert text.weight.grad.abs().max() > 0
    with torch.no_grad():
        image.mul_(2)
    assert not torch.allclose(term(None, None), before)
    assert not list(term.parameters())
    assert [id(value) for value in term.weights] == [id(image), id(text.weight)]
    assert [id(value) for value in ProjectionOrthogonality(image, cross=0).weights] == [id(image)]
    assert not term.state_dict()
    assert copy.deepcopy(term)().item() == term().item()


def test_bad_input():
    with pytest.raises(ValueError, match=r"^projection_orthogonality_loss: expected a text projection with cross=0.05, got None"):
        ProjectionOrthogonality(nn.Parameter(torch.ones(5, 3)))
    with pytest.raises(ValueError, match=r"^projection_orthogonality_loss: expected image and text embeddings of one width"):
        ProjectionOrthogonality(nn.Parameter(torch.ones(5, 3)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^projection_orthogonality_loss: expected image projection"):
        projection_orthogonality_loss(torch.ones(3), cross=0.0)
    for option in ("cross", "orthogonal"):
        with pytest.raises(ValueError, match=rf"^projection_orthogonality_loss: expected {option} as a finite number >= 0"):
            ProjectionOrthogonality(nn.Parameter(torch.ones(5, 3)), nn.Linear(4, 3), **{option: -1.0})

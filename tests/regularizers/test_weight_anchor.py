"""L2-SP and EWC: official numbers, per-sample Fisher, anchors that stay."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_value, case, check, tensor
from torch import nn

from geomreg import WeightAnchor
from geomreg.functional import fisher_diagonal, weight_anchor_loss


@pytest.mark.parametrize("name", ["l2sp", "l2sp_at_start"])
def test_golden_l2sp(name):
    """Whose code leaves the half out."""
    golden = case("weight_space", name)
    live = {key: tensor(value).requires_grad_() for key, value in golden["inputs"]["target"].items()}
    anchors = {key: tensor(value) for key, value in golden["inputs"]["source"].items()}
    check(golden, 2 * weight_anchor_loss(live, anchors), live)


def test_golden_zscl_l2():
    golden = case("zscl", "l2_loss")
    live = {key: tensor(value).requires_grad_() for key, value in golden["inputs"]["student"].items()}
    check(golden, 2 * weight_anchor_loss(live, {key: tensor(value) for key, value in golden["inputs"]["reference"].items()}), live)


def test_golden_ewc():
    """Avalanche's plugin leaves the half out."""
    golden = case("weight_space", "ewc_penalty")
    live = {key: tensor(value).requires_grad_() for key, value in golden["inputs"]["params"].items()}
    anchors, fisher = ({key: tensor(value) for key, value in golden["inputs"][part].items()} for part in ("anchor", "importances"))
    check(golden, 2 * golden["hyper"]["ewc_lambda"] * weight_anchor_loss(live, anchors, fisher=fisher), live)


def classifier(golden):
    parameters = {key: tensor(value) for key, value in golden["inputs"]["params"].items()}
    model = nn.Linear(parameters["weight"].shape[1], parameters["weight"].shape[0]).double()
    model.load_state_dict(parameters)
    return model, tensor(golden["inputs"]["x"]), tensor(golden["inputs"]["y"]).long()


def cross_entropy(model, sample):
    x, y = sample
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_golden_fisher_is_per_sample_whatever_the_batch(batch):
    golden = case("weight_space", "ewc_importances_batch1")
    model, x, y = classifier(golden)
    fisher = fisher_diagonal(model, cross_entropy, zip(x.split(batch), y.split(batch), strict=True))
    for key, value in fisher.items():
        assert_value(golden, value, golden["outputs"]["importances"][key])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch", [2, 6])
def test_gradients_of_batch_means_are_another_thing(batch):
    """Avalanche's importances with larger batches."""
    golden = case("weight_space", f"ewc_importances_batch{batch}")
    model, x, y = classifier(golden)
    fisher = fisher_diagonal(model, cross_entropy, [(x, y)])
    assert all(value.sum() > 1.5 * tensor(golden["outputs"]["importances"][key]).sum() for key, value in fisher.items())


def test_fisher_of_dict_batches_and_several_tensors():
    model, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    model.bias.requires_grad_(False)
    batches = [{"x": torch.randn(n, 3, generator=generator), "y": torch.randn(n, 2, generator=generator)} for n in (4, 1)]
    fisher = fisher_diagonal(model, lambda m, s: (m(s["x"]) - s["y"]).square().sum(), batches)
    assert list(fisher) == ["weight"]
    expected = torch.zeros(2, 3)
    for batch in batches:
        for x, y in zip(batch["x"], batch["y"], strict=True):
            (gradient,) = torch.autograd.grad((model(x) - y).square().sum(), model.weight)
            expected += gradient.square() / 5
    torch.testing.assert_close(fisher["weight"], expected)


def test_fisher_of_nothing():
    with pytest.raises(ValueError, match=r"^fisher_diagonal: expected samples, got no batch"):
        fisher_diagonal(nn.Linear(1, 1), cross_entropy, [])
    with pytest.raises(ValueError, match=r"^fisher_diagonal: expected parameters that require grad, got none"):
        fisher_diagonal(nn.Linear(1, 1).requires_grad_(False), cross_entropy, [])


def moved(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by
    return model


def test_module_anchors_a_copy():
    """L2-SP's own code keeps a reference, so that the penalty stays 0 for ever."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    term = WeightAnchor(model)
    assert term().item() == 0
    moved(model, 0.5)
    value = term(None, None)
    assert value.item() == pytest.approx(0.125 * sum(p.numel() for p in model.parameters()))
    value.backward()
    torch.testing.assert_close(model[0].weight.grad, torch.full((2, 3), 0.5))
    assert not list(term.parameters())


def test_module_resumes_with_the_same_anchors():
    model = nn.Linear(3, 2)
    term = WeightAnchor(model, fisher={"weight": torch.full((2, 3), 4.0), "bias": torch.ones(2), "other": torch.ones(1)})
    moved(model, 1.0)
    later = WeightAnchor(model, fisher={"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert later().item() == 0
    later.load_state_dict(term.state_dict())
    assert later().item() == term().item() == pytest.approx((4 * 6 + 2) / 2)


def test_excluded_and_frozen_weights_are_free():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    term = WeightAnchor(model, exclude=("1.",))
    moved(model, 1.0)
    assert term().item() == pytest.approx(3.0)  # half of six weights


def test_casting_the_module_leaves_anchors_and_importances():
    model = nn.Linear(3, 2)
    term = WeightAnchor(model, fisher={"weight": torch.full((2, 3), 1e-9), "bias": torch.ones(2)})
    before = {name: value.clone() for name, value in term.fisher.named().items()}
    term.to(torch.bfloat16).half()
    assert term().item() == 0
    assert all(torch.equal(value, before[name]) for name, value in term.fisher.named().items())


def test_names_with_slashes():
    model = nn.ModuleDict({"a/b": nn.Linear(2, 1, bias=False)})
    term = WeightAnchor(model)
    moved(model, 1.0)
    assert term().item() == pytest.approx(1.0)


def test_fisher_of_methods_of_the_model():
    """The loss may call what it likes of the model."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0]))

        def encode_image(self, x):
            return x * self.weight

    fisher = fisher_diagonal(Tower(), lambda model, x: model.encode_image(x).sum(), [torch.tensor([[1.0], [3.0]])])
    assert fisher["weight"].item() == pytest.approx(5.0)  # (1 + 9) / 2
    with pytest.raises(ValueError, match=r"^fisher_diagonal: expected no batch normalisation in training mode"):
        fisher_diagonal(nn.Sequential(nn.BatchNorm1d(2)), lambda model, x: model(x).sum(), [torch.ones(3, 2)])


def test_bad_input():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^WeightAnchor: expected at least one parameter that requires grad, got none"):
        WeightAnchor(model, exclude=("weight", "bias"))
    with pytest.raises(TypeError, match=r"^WeightAnchor: expected exclude as a tuple of prefixes, got 'weight'"):
        WeightAnchor(model, exclude="weight")
    with pytest.raises(ValueError, match=r"^WeightAnchor: expected exclude of parameters that there are, got 'head'"):
        WeightAnchor(model, exclude=("head",))
    with pytest.raises(TypeError, match=r"^WeightAnchor: expected model as an nn.Module, got None"):
        WeightAnchor(None)
    with pytest.raises(ValueError, match=r"^WeightAnchor, fisher: expected two state dicts with the same keys, got bias"):
        WeightAnchor(model, fisher={"weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"^weight_anchor_loss, anchors: expected equal shapes"):
        weight_anchor_loss({"w": torch.ones(2)}, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"^weight_anchor_loss: expected constant anchors, got one that requires grad for 'w'"):
        weight_anchor_loss({"w": torch.ones(2)}, {"w": torch.ones(2, requires_grad=True)})

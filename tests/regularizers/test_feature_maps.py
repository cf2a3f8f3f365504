"""LDIFS: the authors' numbers on the authors' axis, a loop on ours, hooks."""

import pytest
import torch
from golden_cases import cases, check, name_of, tensor
from torch import nn

from geomreg import FeatureMapDistance, FeatureMaps
from geomreg.functional import feature_map_distance_loss


@pytest.mark.parametrize("golden", cases("weight_space", containing="ldifs"), ids=name_of)
def test_golden(golden):
    student = [tensor(value).requires_grad_() for value in golden["inputs"]["target_features"]]
    teacher = [tensor(value) for value in golden["inputs"]["source_features"]]
    value = feature_map_distance_loss(student, teacher, axis=1)
    check(golden, value, {f"layer{k}": one for k, one in enumerate(student)})


def maps(*shapes, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


def test_equals_loop_over_tokens():
    student, teacher = maps((2, 3, 4), (2, 5), grad=True), maps((2, 3, 4), (2, 5), seed=1)
    expected = 0.0
    for one, other in zip(student, teacher, strict=True):
        vectors = list(zip(one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1]), strict=True))
        expected += sum(((a / a.norm() - b / b.norm()) ** 2).mean().item() for a, b in vectors) / len(vectors) / 2
    value = feature_map_distance_loss(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(FeatureMapDistance()(None, None, feature_maps=student, teacher_feature_maps=teacher), value)
    assert torch.autograd.gradcheck(lambda *layers: feature_map_distance_loss(layers, teacher), student)


def test_axis_and_eps_matter():
    student, teacher = maps((2, 3, 4)), maps((2, 3, 4), seed=1)
    inputs = {"feature_maps": student, "teacher_feature_maps": teacher}
    values = [FeatureMapDistance(**options)(**inputs).item() for options in ({}, {"axis": 1}, {"eps": 1.0}, {"axis": 2})]
    assert values[0] == values[3]
    assert len({round(value, 9) for value in values}) == 3


def test_zero_maps_are_finite():
    student = [torch.zeros(2, 3, requires_grad=True)]
    value = feature_map_distance_loss(student, [torch.zeros(2, 3)])
    value.backward()
    assert value.item() == 0
    assert student[0].grad.isfinite().all()


def test_hooks_collect_in_order_and_go_away():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
    x = torch.randn(5, 2)
    with FeatureMaps(model, ["1.1", "0"]) as found:
        model(x)
    assert torch.equal(found.values[1], model[0](x))
    assert torch.equal(found.values[0], model(x))
    found.values[0].sum().backward()
    assert model[0].weight.grad.abs().max() > 0
    before = found.values
    model(2 * x)
    assert all(one is other for one, other in zip(found.values, before, strict=True))  # closed: no hook left
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_away_after_an_error():
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(RuntimeError), FeatureMaps(model, ["0"]):
        model(torch.ones(5, 7))
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Identity())
    with pytest.raises(ValueError, match=r"^FeatureMaps: expected a list of names of the model's layers, got '00'. Did you mean '0'"):
        FeatureMaps(model, ["00"])
    with pytest.raises(TypeError, match=r"^FeatureMaps: expected model as an nn.Module, got None"):
        FeatureMaps(None, ["0"])
    for bad in ([], "0", None):
        with pytest.raises(ValueError, match=r"^FeatureMaps: expected a list of names"):
            FeatureMaps(model, bad)
    with pytest.raises(RuntimeError, match=r"^FeatureMaps: expected an output of every layer, got none of 1"):
        _ = FeatureMaps(model, ["0"]).values
    pair = nn.Module()
    pair.inner = nn.Identity()
    with pytest.raises(TypeError, match=r"^FeatureMaps: expected a tensor from each layer, got tuple"), FeatureMaps(pair, ["inner"]):
        pair.inner((1, 2))


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.ones(2, 3), [torch.ones(2, 3)], TypeError, "expected student maps as a list"),
        ([torch.ones(2, 3)], [[1.0]], TypeError, "expected teacher maps as a list"),
        ([], [], ValueError, "expected as many maps from both models, got 0 and 0"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)] * 2, ValueError, "expected as many maps from both models, got 1 and 2"),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], ValueError, "expected maps of one shape and device"),
        ([torch.ones(2, 3)], [torch.ones(2, 3, requires_grad=True)], ValueError, "expected teacher maps without gradient"),
    ],
)
def test_bad_maps(student, teacher, error, message):
    with pytest.raises(error, match=f"^feature_map_distance_loss: {message}"):
        feature_map_distance_loss(student, teacher)


def test_bad_axis_and_eps():
    with pytest.raises(ValueError, match=r"^feature_map_distance_loss: expected an axis of a map of shape \(2, 3\), got 2"):
        feature_map_distance_loss([torch.ones(2, 3)], [torch.ones(2, 3)], axis=2)
    for axis in (None, "x", 1.5, 0):
        with pytest.raises(ValueError, match=r"^FeatureMapDistance: expected axis as a whole number other than 0"):
            FeatureMapDistance(axis=axis)
    with pytest.raises(ValueError, match=r"^FeatureMapDistance: expected eps as a finite number > 0"):
        FeatureMapDistance(eps=0.0)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3)])
def test_empty_maps_are_refused(shape):
    empty = [torch.ones(2, 3), torch.zeros(shape)]
    with pytest.raises(
        ValueError, match=r"^feature_map_distance_loss: expected maps with at least one number, got float32 tensor of shape"
    ):
        feature_map_distance_loss(empty, empty)


@pytest.mark.parametrize("size", [1e-6, 1e15, 1e25, 1e36])
def test_maps_of_every_size_have_directions(size):
    one, other = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    value = feature_map_distance_loss([size * one], [other])
    torch.testing.assert_close(value, feature_map_distance_loss([one], [other]), rtol=2e-3 if size < 1e-5 else 1e-5, atol=0.0)


@pytest.mark.parametrize("by", ["wrapper", "inner", "method", "function"])
def test_model_that_was_compiled_before(by):
    """Hooks that come later are skipped: the message says so, and what it advises works."""
    torch._dynamo.reset()
    model, batch = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3)
    if by == "method":
        model.compile(backend="eager")
    run = model if by == "method" else torch.compile(model if by != "function" else lambda x: model(x), backend="eager")
    run(batch)
    with FeatureMaps(run if by == "wrapper" else model, ["_orig_mod.0" if by == "wrapper" else "0"]) as maps:
        run(batch)
    with pytest.raises(RuntimeError, match=r"^FeatureMaps: expected an output of every layer, got none of 1\. torch\.compile skips hooks"):
        _ = maps.values
    with torch.compiler.set_stance("force_eager"), maps:
        run(batch)
    assert torch.equal(maps.values[0], model[0](batch))
    torch._dynamo.reset()


def test_model_that_did_not_run():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with FeatureMaps(nn.Sequential(nn.Linear(3, 4)), ["0"]) as maps:
        pass
    with pytest.raises(RuntimeError, match=r"got none of 1\. Run the model in the context\.$"):
        _ = maps.values

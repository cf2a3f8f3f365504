"""WiSE-FT: official numbers, and the entries that are not to be mixed."""

import pytest
import torch
from golden_cases import assert_value, cases, name_of, tensor
from hypothesis import given
from hypothesis import strategies as st

from geomreg import alpha_sweep, interpolate

PLAIN = cases("weight_space", containing="/wise_ft_alpha_")


def state(values):
    """A literal state dict in float64."""
    return {key: tensor(value) for key, value in values.items()}


def models():
    """State dicts of a model with a BatchNorm before and after some training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(5, 3))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    return model, before, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("golden", PLAIN, ids=name_of)
def test_golden_official(golden):
    ends = [state(golden["inputs"][key]) for key in ("theta_0_zeroshot", "theta_1_finetuned")]
    merged = interpolate(*ends, golden["hyper"]["alpha"])
    assert merged.keys() == golden["outputs"]["theta"].keys()
    for key, expected in golden["outputs"]["theta"].items():
        assert_value(golden, merged[key], expected)


def test_golden_cases_are_all_there():
    assert [case["hyper"]["alpha"] for case in PLAIN] == [0.0, 0.3, 0.5, 1.0]


@given(alpha=st.floats(0, 1), first=st.floats(-1e3, 1e3), second=st.floats(-1e3, 1e3))
def test_formula(alpha, first, second):
    ends = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (first, second)]
    expected = (1 - alpha) * first + alpha * second
    assert interpolate(*ends, alpha)["w"].item() == pytest.approx(expected, rel=1e-12, abs=1e-12 * (abs(first) + abs(second)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0, 1])
def test_ends_are_exact(dtype, alpha):
    generator = torch.Generator().manual_seed(0)
    ends = [{"w": (torch.randn(64, generator=generator) * scale).to(dtype)} for scale in (1e-3, 1e3)]
    merged = interpolate(*ends, alpha)["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, ends[alpha]["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    ends = [{"w": torch.randn(256, generator=generator).to(dtype)} for _ in range(2)]
    expected = torch.lerp(ends[0]["w"].float(), ends[1]["w"].float(), 0.3).to(dtype)
    assert torch.equal(interpolate(*ends, 0.3)["w"], expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)])
def test_mixed_precision_ends_at_the_finetuned(dtypes):
    generator = torch.Generator().manual_seed(0)
    ends = [{"w": torch.randn(16, generator=generator, dtype=torch.float64).to(dtype)} for dtype in dtypes]
    merged = interpolate(*ends, 1.0)["w"]
    assert merged.dtype == dtypes[1]
    assert torch.equal(merged, ends[1]["w"])


def test_counters_are_the_finetuned_models():
    model, before, after = models()
    merged = interpolate(before, after, 0.5)
    counter = merged["1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter.item() == 3
    torch.testing.assert_close(merged["1.running_mean"], (before["1.running_mean"] + after["1.running_mean"]) / 2)
    model.load_state_dict(merged)


def test_shares_no_storage():
    _, before, after = models()
    kept = [{key: value.clone() for key, value in one.items()} for one in (before, after)]
    for alpha in (0.0, 0.5, 1.0):
        for value in interpolate(before, after, alpha).values():
            assert not value.requires_grad
            value.zero_()
    for one, other in zip((before, after), kept, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_live_parameters_give_plain_tensors():
    layer = torch.nn.Linear(2, 2)
    merged = interpolate(dict(layer.named_parameters()), dict(layer.named_parameters()), 0.5)
    assert not any(value.requires_grad for value in merged.values())


@pytest.mark.parametrize("lacking", [0, 1])
def test_missing_key(lacking):
    ends = list(models()[1:])
    del ends[lacking]["0.bias"]
    with pytest.raises(ValueError, match=r"^interpolate: expected two state dicts with the same keys, got 0\.bias in only one"):
        interpolate(*ends, 0.5)


def test_many_missing_keys_are_counted():
    first = {f"w{index}": torch.zeros(1) for index in range(5)}
    with pytest.raises(ValueError, match="w0, w1, w2 and 2 more"):
        interpolate(first, {}, 0.5)


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)])
def test_mismatched_entry(other):
    with pytest.raises(ValueError, match=r"^interpolate: expected equal shapes and kinds for 'w', got float32 tensor of shape \(2,\)"):
        interpolate({"w": torch.zeros(2)}, {"w": other}, 0.5)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), True, "0.5", None])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"^interpolate: expected alpha between 0 and 1, got"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha)


def test_sweep_is_lazy_and_in_order():
    _, before, after = models()
    sweep = alpha_sweep(before, after, iter([0.0, 0.25, 1.0]))
    alpha, first = next(sweep)
    assert alpha == 0.0
    assert torch.equal(first["0.weight"], before["0.weight"])
    after["0.weight"].add_(1.0)  # seen by the states that are still to come
    rest = dict(sweep)
    assert list(rest) == [0.25, 1.0]
    assert torch.equal(rest[1.0]["0.weight"], after["0.weight"])
    torch.testing.assert_close(rest[0.25]["0.weight"], 0.75 * before["0.weight"] + 0.25 * after["0.weight"])


def test_masks_with_infinities_stay():
    mask = torch.full((2, 2), float("-inf")).triu(1)
    found = interpolate({"mask": mask, "w": torch.zeros(1)}, {"mask": mask, "w": torch.ones(1)}, 0.5)
    assert torch.equal(found["mask"], mask)
    assert found["w"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["pre-trained", "fine-tuned"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_numbers_of_a_diverged_run_are_refused(bad, side, alpha):
    """With the name of the key and of the side; also where the share of that side is 0."""
    good, spoiled = {"a": torch.ones(2), "b.weight": torch.ones(3)}, {"a": torch.ones(2), "b.weight": torch.tensor([1.0, bad, 2.0])}
    pair = (spoiled, good) if side == "pre-trained" else (good, spoiled)
    what = "NaN" if bad != bad else "infinity"
    with pytest.raises(ValueError, match=rf"^interpolate: expected finite numbers in 'b.weight', got {what} in the {side} weights"):
        interpolate(*pair, alpha)


def test_infinity_on_both_sides_is_a_mask():
    mask = {"mask": torch.tensor([0.0, float("-inf")])}
    assert torch.equal(interpolate(mask, mask, 0.5)["mask"], mask["mask"])

"""What every regularizer promises, on every regularizer."""

import copy
import pickle

import pytest
import torch
from batches import (
    NO_MEAN,
    average_vector_oracle,
    dive_oracle,
    gradients,
    mapped,
    pairwise_vector_oracle,
    random_pair,
    random_vector,
    rotation,
)
from hypothesis import given
from hypothesis import strategies as st

from geomreg import AverageVectorLoss, DiVE, Embeddings, FeatureDistillation, PairwiseVectorLoss, Regularizer, WeightedSum
from geomreg.functional import average_vector_loss, dive_loss, feature_distillation_loss, pairwise_vector_loss

FUNCTIONS = {  # name -> (function of student, teacher, mean; oracle of the same)
    "average_vector": (lambda s, t, mean: average_vector_loss(*s, *t, mean=mean), average_vector_oracle),
    "pairwise_vector": (lambda s, t, mean: pairwise_vector_loss(*s, *t), pairwise_vector_oracle),
    "dive": (lambda s, t, mean: dive_loss(*s, *t, mean=mean), dive_oracle),
    "feature_distillation": (
        lambda s, t, mean: feature_distillation_loss(s.image, t.image) + feature_distillation_loss(s.text, t.text),
        lambda s, t, mean: average_vector_oracle(s, t, NO_MEAN),
    ),
}
MODULES = {
    "average_vector": AverageVectorLoss,
    "average_vector_before": lambda **options: AverageVectorLoss(update="before", **options),
    "pairwise_vector": PairwiseVectorLoss,
    "dive": DiVE,
    "dive_before": lambda **options: DiVE(update="before", **options),
    "feature_distillation": FeatureDistillation,
    "weighted_sum": lambda **options: WeightedSum(avl=(2.0, AverageVectorLoss(**options)), pvl=(0.5, PairwiseVectorLoss(**options))),
}
FP32_MEAN = {"rtol": 1e-9, "atol": 0}  # update="before" rounds 1 % of the batch mean to fp32
LOW = (torch.bfloat16, torch.float16, torch.float32)
every_function = pytest.mark.parametrize(("function", "oracle"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
both_scales = pytest.mark.parametrize("normalize", [True, False])


def equal_pair(rows=5, width=8, dtype=torch.float64):
    """Student with the teacher's values."""
    _, teacher = random_pair(rows, width, dtype=dtype)
    return Embeddings(*(value.clone().requires_grad_() for value in teacher)), teacher


@every_function
@pytest.mark.parametrize("rows", [1, 2, 7, 129])
@pytest.mark.parametrize("width", [1, 63, 512])
def test_function_equals_loop(function, oracle, rows, width):
    student, teacher = random_pair(rows, width)
    mean = random_vector(width)
    value = function(student, teacher, mean)
    assert value.shape == ()
    assert value.item() == pytest.approx(oracle(student, teacher, mean), rel=1e-12)


@every_function
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 4)])
def test_gradcheck(function, oracle, rows, width):
    student, teacher = random_pair(rows, width)
    mean = random_vector(width)

    def value(image, text):
        return function(Embeddings(image, text), teacher, mean)

    assert torch.autograd.gradcheck(value, tuple(student))
    assert torch.autograd.gradgradcheck(value, tuple(student))


@every_function
def test_cotangent_scales_gradient(function, oracle):
    student, teacher = random_pair()
    mean = random_vector()
    plain = gradients(function(student, teacher, mean), student)
    scaled = gradients(-3.7 * function(student, teacher, mean), student)
    for one, other in zip(plain, scaled, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(-3.7 * one, other, rtol=1e-12, atol=0)


@every_function
def test_noncontiguous_inputs(function, oracle):
    student, teacher = random_pair()
    mean = random_vector()
    strided = [mapped(one, lambda x: x.t().contiguous().t()) for one in (student, teacher)]
    assert not strided[0].image.is_contiguous()
    spaced = torch.stack([mean, mean], dim=1)[:, 0]
    expected, actual = function(student, teacher, mean), function(*strided, spaced)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    for one, other in zip(gradients(actual, strided[0]), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@every_function
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "width"), [(2, 1), (7, 63), (5, 512)])
def test_low_precision_against_float64_on_rounded_inputs(function, oracle, dtype, rows, width):
    student, teacher = random_pair(rows, width, dtype=dtype)
    mean = random_vector(width, dtype=torch.float32)
    value = function(student, teacher, mean)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(oracle(student, teacher, mean), rel=1e-6)
    wide = mapped(student, torch.Tensor.double)
    expected = gradients(function(wide, mapped(teacher, torch.Tensor.double), mean.double()), wide)
    for one, other in zip(gradients(value, student), expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= 2 * torch.finfo(dtype).eps * other.abs().max()


@every_module
@both_scales
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_nothing(build, normalize, dtype):
    student, teacher = random_pair(dtype=dtype)
    plain, inside = build(normalize=normalize), build(normalize=normalize)
    expected = plain(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = inside(student, teacher)
        inside.step()
    plain.step()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for one, other in zip(plain.buffers(), inside.buffers(), strict=True):
        assert torch.equal(one, other)


@every_module
@pytest.mark.parametrize("dtype", LOW)
def test_normalization_in_full_precision(build, dtype):
    student, teacher = random_pair(dtype=dtype)
    wide = [mapped(one, torch.Tensor.double) for one in (student, teacher)]
    expected = build(normalize=True)(*wide)
    assert build(normalize=True)(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


@every_module
def test_normalize_is_the_unit_vectors_loss(build):
    student, teacher = random_pair()
    units = [mapped(one, lambda x: x / x.norm(dim=1, keepdim=True)) for one in (student, teacher)]
    value = build(normalize=True)(student, teacher)
    torch.testing.assert_close(value, build(normalize=False)(*units), **FP32_MEAN)
    torch.testing.assert_close(value, build()(student, teacher), rtol=0, atol=0)
    assert not torch.allclose(value, build(normalize=False)(student, teacher), rtol=1e-2)


@every_module
@both_scales
def test_zero_value_and_gradient_at_the_teacher(build, normalize):
    student, teacher = equal_pair()
    regularizer = build(normalize=normalize)
    value = regularizer(student, teacher)
    assert value.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(value, student))
    away, _ = random_pair(seed=1)
    regularizer.step()
    assert regularizer(away, teacher).item() > 0


@every_module
@both_scales
def test_gradient_reaches_both_modalities_and_no_teacher(build, normalize):
    student, teacher = random_pair()
    value = build(normalize=normalize)(student, teacher)
    value.backward()
    assert all(one.grad.abs().max() > 0 for one in student)
    assert all(other.grad is None and not other.requires_grad for other in teacher)


@every_module
@pytest.mark.parametrize("modality", ["image", "text"])
def test_teacher_with_gradient_raises(build, modality):
    student, teacher = random_pair()
    live = teacher._replace(**{modality: getattr(teacher, modality).clone().requires_grad_()})
    with pytest.raises(ValueError, match=rf"{modality} teacher.*requires grad"):
        build()(student, live)


@every_module
@both_scales
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_propagates(build, normalize, side, bad):
    student, teacher = random_pair()
    with torch.no_grad():
        (student if side == "student" else teacher).text[1, 2] = bad
    value = build(normalize=normalize)(student, teacher)
    assert not value.isfinite()
    assert not gradients(value, student)[1].isfinite().all()


@every_module
def test_extreme_norms_stay_finite(build):
    for scale in (0.0, 1e-20, 1e15):
        student, teacher = random_pair(dtype=torch.float32)
        student = mapped(student, lambda x, scale=scale: x * scale)
        value = build(normalize=True)(student, teacher)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(value, student))
    student, teacher = random_pair(dtype=torch.float16)
    value = build(normalize=False)(mapped(student, lambda x: x * 1e4), teacher)
    assert value.isfinite()  # the squares are far outside fp16


@every_module
def test_duplicates_cost_the_same(build):
    student, teacher = random_pair()
    doubled = [mapped(one, lambda x: x.repeat(2, 1)) for one in (student, teacher)]
    torch.testing.assert_close(build()(*doubled), build()(student, teacher), **FP32_MEAN)


@every_function
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 6), width=st.integers(2, 6))
def test_joint_rotation_and_permutation(function, oracle, seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    mean, matrix = random_vector(width, seed), rotation(width, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = [mapped(one, lambda x: x[order] @ matrix) for one in (student, teacher)]
    expected = function(student, teacher, mean)
    torch.testing.assert_close(function(*moved, mean @ matrix), expected, rtol=1e-10, atol=1e-12)


@every_function
@pytest.mark.parametrize("seed", range(3))
def test_one_sided_moves_are_seen(function, oracle, seed):
    student, teacher = random_pair(seed=seed)
    mean, matrix = random_vector(seed=seed), rotation(8, seed)
    value = function(student, teacher, mean)
    rotated = function(mapped(student, lambda x: x @ matrix), teacher, mean)
    shuffled = function(mapped(student, lambda x: x.roll(1, 0)), teacher, mean)
    assert not torch.allclose(rotated, value, rtol=1e-3)
    assert not torch.allclose(shuffled, value, rtol=1e-3)


@every_function
def test_function_compiles(function, oracle):
    student, teacher = random_pair()
    mean = random_vector()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, expected = compiled(student, teacher, mean), function(student, teacher, mean)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for one, other in zip(gradients(value, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@every_module
def test_module_compiles_over_steps(build):
    eager, wrapped = build(), build()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        student, teacher = random_pair(seed=seed)
        expected, value = eager(student, teacher), compiled(student, teacher)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        for one, other in zip(gradients(value, student), gradients(expected, student), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        eager.step()
        wrapped.step()
    for one, other in zip(eager.buffers(), wrapped.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@every_module
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_continue_alike_and_apart(build, duplicate):
    original = build(normalize=False)
    original(*random_pair())
    original.step()
    twin = duplicate(original)
    student, teacher = random_pair(seed=1)
    assert torch.equal(twin(student, teacher), original(student, teacher))
    before = {key: value.clone() for key, value in original.state_dict().items()}
    twin.step()
    twin(*random_pair(seed=2))
    twin.step()
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


@every_module
def test_state_dict_resumes(build):
    original, resumed = build(normalize=False), build(normalize=False)
    for seed in range(2):
        original(*random_pair(seed=seed))
        original.step()
    resumed.load_state_dict(original.state_dict())
    pair = random_pair(seed=5)
    assert torch.equal(resumed(*pair), original(*pair))


@every_module
def test_is_a_regularizer_without_parameters(build):
    regularizer = build()
    assert isinstance(regularizer, Regularizer)
    assert not list(regularizer.parameters())
    assert regularizer.step() is None

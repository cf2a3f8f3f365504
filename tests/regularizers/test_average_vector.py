"""Average vector loss: golden numbers, its identities, and the life of the running mean (shared by DiVE)."""

import copy
import itertools
import warnings

import pytest
import torch
from batches import NO_MEAN, batch_mean, gradients, mapped, random_pair, random_vector, rotation, shifts
from golden_cases import assert_gradients, assert_value, case, cases, inputs, name_of, tensor
from hypothesis import given
from hypothesis import strategies as st

from geomreg import AverageVectorLoss, DiVE, Embeddings, FeatureDistillation
from geomreg.functional import average_vector_loss, feature_distillation_loss, pairwise_vector_loss

OWNERS = (AverageVectorLoss, DiVE)  # of a running mean
SIZES = {"seed": st.integers(0, 2**31), "rows": st.integers(1, 6), "width": st.integers(1, 6)}
ORDERS = {"after": "loss_then_update", "before": "update_then_loss"}
every_owner = pytest.mark.parametrize("owner", OWNERS)
every_update = pytest.mark.parametrize("update", ORDERS)


def near(actual, expected):
    """Equal up to the rounding of an fp32 mean."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-7)


def embeddings(arguments):
    """Student and teacher of a golden case."""
    pairs = [Embeddings(arguments[f"{side}_image"], arguments[f"{side}_text"]) for side in ("student", "teacher")]
    return pairs[0], pairs[1]


def ran(owner, batches, **options):
    """A module after one step on each batch."""
    regularizer = owner(**{"normalize": False, **options})
    for batch in batches:
        regularizer(*batch)
        regularizer.step()
    return regularizer


# Golden numbers


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/avl_m_"), ids=name_of)
def test_golden_with_given_mean(golden):
    arguments = inputs(golden)
    student, teacher = embeddings(arguments)
    value = average_vector_loss(*student, *teacher, mean=arguments["m"])
    value.backward()
    assert_value(golden, value, golden["outputs"]["avl"])
    assert_gradients(golden, arguments)


@pytest.mark.parametrize("kind", ["raw", "unit"])
def test_golden_batch_mean(kind):
    golden = case("dive_spec", f"avl_m_batch_mean_{kind}")
    assert_value(golden, batch_mean(*embeddings(inputs(golden))), golden["inputs"]["m"])


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/first_step_"), ids=name_of)
def test_golden_first_step_function(golden):
    arguments = inputs(golden)
    student, teacher = embeddings(arguments)
    value = average_vector_loss(*student, *teacher, mean=tensor(golden["outputs"]["m_used"]))
    assert_value(golden, value, golden["outputs"]["avl"])


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/first_step_"), ids=name_of)
def test_golden_first_step_module(golden):
    student, teacher = embeddings(inputs(golden))
    update = {order: update for update, order in ORDERS.items()}[golden["hyper"]["order"]]
    regularizer = AverageVectorLoss(decay=golden["hyper"]["alpha"], update=update, normalize=False)
    near(regularizer(student, teacher), tensor(golden["outputs"]["avl"]))
    regularizer.step()
    near(regularizer.mean, tensor(golden["outputs"]["m_after"]))


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/ema_three_steps"), ids=name_of)
@every_update
def test_golden_three_steps(golden, update):
    images, texts = shifts(*embeddings(inputs(golden)))
    regularizer = AverageVectorLoss(decay=golden["hyper"]["alpha"], update=update, normalize=False)
    nothing = Embeddings(torch.zeros_like(images), torch.zeros_like(texts))
    for step in golden["outputs"]["steps"]:
        moved = Embeddings(images.roll(step["roll"], 0) * step["scale_u"], texts.roll(step["roll"], 0) * step["scale_v"])
        near(regularizer(moved, nothing), tensor(step[f"avl_{ORDERS[update]}"]))
        regularizer.step()
        near(regularizer.mean, tensor(step["m_after"]))


def test_golden_pure_translation():
    golden = case("dive_spec", "pure_translation")
    arguments = inputs(golden)
    teacher = (arguments["teacher_image"], arguments["teacher_text"])
    student = [value + arguments["shift"] for value in teacher]
    assert_value(golden, average_vector_loss(*student, *teacher, mean=arguments["shift"]), golden["outputs"]["avl_at_m_equal_shift"])
    assert_value(golden, average_vector_loss(*student, *teacher, mean=NO_MEAN), golden["outputs"]["avl_at_m_zero"])


def test_golden_exact_rational():
    golden = case("dive_spec", "exact_rational_b2d2")
    arguments = inputs(golden)
    zeros = torch.zeros_like(arguments["u"])
    value = average_vector_loss(arguments["u"], arguments["v"], zeros, zeros, mean=arguments["m"])
    assert_value(golden, value, golden["outputs"]["avl"])
    regularizer = AverageVectorLoss(decay=golden["hyper"]["alpha"], normalize=False)
    regularizer.load_state_dict({"mean": arguments["m"]})
    assert_value(golden, regularizer(Embeddings(arguments["u"], arguments["v"]), Embeddings(zeros, zeros)), golden["outputs"]["avl"])
    regularizer.step()
    near(regularizer.mean, tensor(golden["outputs"]["m_after"]))


# Identities


@given(**SIZES, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_zero_where_all_moved_by_the_mean(seed, rows, width, scale):
    _, teacher = random_pair(rows, width, seed)
    shift = scale * random_vector(width, seed)
    student = mapped(teacher, lambda x: x + shift)
    limit = 1e-28 * max(1.0, scale) ** 2 * 100
    assert average_vector_loss(*student, *teacher, mean=shift) <= limit
    assert average_vector_loss(*student, *teacher, mean=NO_MEAN) > 0.1 * shift.square().sum()


@given(**SIZES)
def test_translation_of_students_with_the_mean(seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    mean, shift = random_vector(width, seed), random_vector(width, seed + 1)
    expected = average_vector_loss(*student, *teacher, mean=mean)
    moved = mapped(student, lambda x: x + shift)
    torch.testing.assert_close(average_vector_loss(*moved, *teacher, mean=mean + shift), expected, rtol=1e-10, atol=1e-12)
    both = [one._replace(text=one.text + shift) for one in (student, teacher)]
    torch.testing.assert_close(average_vector_loss(*both[0], *both[1], mean=mean), expected, rtol=1e-10, atol=1e-12)


@given(**SIZES)
def test_decomposition_into_spread_and_drag(seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    mean, center = random_vector(width, seed), batch_mean(student, teacher)
    value = average_vector_loss(*student, *teacher, mean=mean)
    spread = average_vector_loss(*student, *teacher, mean=center)
    torch.testing.assert_close(value, spread + 2 * (center - mean).square().sum(), rtol=1e-10, atol=1e-12)


@given(**SIZES, distance=st.sampled_from([0.0, 1.0, 100.0]))
def test_dominates_pairwise_vector(seed, rows, width, distance):
    student, teacher = random_pair(rows, width, seed)
    mean = batch_mean(student, teacher) + distance * random_vector(width, seed)
    average = average_vector_loss(*student, *teacher, mean=mean)
    assert pairwise_vector_loss(*student, *teacher) <= 2 * average * (1 + 1e-12)


def test_domination_is_attained_by_opposite_shifts():
    _, teacher = random_pair()
    shift = random_vector()
    student = Embeddings(teacher.image + shift, teacher.text - shift)
    average = average_vector_loss(*student, *teacher, mean=torch.zeros(8))
    torch.testing.assert_close(pairwise_vector_loss(*student, *teacher), 2 * average, rtol=1e-12, atol=0)


@given(seed=st.integers(0, 2**31))
def test_each_modality_has_its_own_order(seed):
    student, teacher = random_pair(seed=seed)
    shuffled = [one._replace(text=one.text.flip(0)) for one in (student, teacher)]
    mean = random_vector(seed=seed)
    expected = average_vector_loss(*student, *teacher, mean=mean)
    torch.testing.assert_close(average_vector_loss(*shuffled[0], *shuffled[1], mean=mean), expected, rtol=1e-12, atol=0)


def test_mean_must_turn_with_the_embeddings():
    student, teacher = random_pair()
    mean, matrix = random_vector(), rotation(8)
    turned = [mapped(one, lambda x: x @ matrix) for one in (student, teacher)]
    value = average_vector_loss(*student, *teacher, mean=mean)
    assert not torch.allclose(average_vector_loss(*turned[0], *turned[1], mean=mean), value, rtol=1e-3)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("mean", [NO_MEAN, random_vector()], ids=["0-d", "vector"])
def test_single_modality_is_its_part(modality, mean):
    student, teacher = random_pair()
    alone = [Embeddings(**{modality: getattr(one, modality)}) for one in (student, teacher)]
    part = average_vector_loss(*alone[0], *alone[1], mean=mean)
    shift = (getattr(student, modality) - getattr(teacher, modality)) - mean
    torch.testing.assert_close(part, shift.square().sum(1).mean(), rtol=1e-12, atol=0)
    regularizer = AverageVectorLoss(normalize=False)
    regularizer(*alone)
    regularizer.step()
    near(regularizer.mean, 0.01 * shifts(*alone)[0].mean(0))


def test_modalities_may_differ_in_number():
    (few, fewer), (many, more) = random_pair(rows=2), random_pair(rows=6, seed=1)
    student, teacher = Embeddings(few.image, many.text), Embeddings(fewer.image, more.text)
    mean = random_vector()
    images = average_vector_loss(few.image, None, fewer.image, None, mean=mean)
    texts = average_vector_loss(None, many.text, None, more.text, mean=mean)
    torch.testing.assert_close(average_vector_loss(*student, *teacher, mean=mean), images + texts, rtol=1e-12, atol=0)
    regularizer = ran(AverageVectorLoss, [(student, teacher)], decay=0.0)
    near(regularizer.mean, batch_mean(student, teacher))  # of all eight vectors, not of two means


def test_widths_of_the_modalities_must_agree():
    wide, narrow = random_pair(width=8), random_pair(width=1)
    student, teacher = (Embeddings(one.image, other.text) for one, other in zip(wide, narrow, strict=True))
    with pytest.raises(ValueError, match="expected"):
        AverageVectorLoss(normalize=False)(student, teacher)


@every_update
@pytest.mark.parametrize("normalize", [True, False])
def test_frozen_mean_is_distillation_on_both_encoders(update, normalize):
    control, distillation = AverageVectorLoss(decay=1.0, update=update, normalize=normalize), FeatureDistillation(normalize=normalize)
    for seed in range(3):
        student, teacher = random_pair(seed=seed)
        value, expected = control(student, teacher), distillation(student, teacher)
        assert torch.equal(value, expected)
        for one, other in zip(gradients(value, student), gradients(expected, student), strict=True):
            assert torch.equal(one, other)
        control.step()
        assert not control.mean.any()


def test_zero_mean_is_distillation():
    student, teacher = random_pair()
    expected = sum(feature_distillation_loss(one, other) for one, other in zip(student, teacher, strict=True))
    for zero in (NO_MEAN, torch.zeros(8)):
        assert torch.equal(average_vector_loss(*student, *teacher, mean=zero), expected)


# The running mean


@every_owner
@every_update
def test_default_decay(owner, update):
    pair = random_pair()
    near(ran(owner, [pair], update=update).mean, 0.01 * batch_mean(*pair))


@every_owner
@every_update
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_mean_follows_the_recurrence(owner, update, decay):
    regularizer, expected = owner(decay=decay, update=update, normalize=False), torch.zeros(8, dtype=torch.float64)
    for seed in range(4):
        student, teacher = random_pair(rows=seed + 1, seed=seed)
        moved = decay * expected + (1 - decay) * batch_mean(student, teacher)
        value = regularizer(student, teacher)
        pairwise = pairwise_vector_loss(*student, *teacher) if owner is DiVE else 0
        used = moved if update == "before" else expected
        near(value, average_vector_loss(*student, *teacher, mean=used) + pairwise)
        regularizer.step()
        expected = moved
        near(regularizer.mean, expected)


@every_owner
@pytest.mark.parametrize("normalize", [True, False])
def test_mean_is_of_what_the_loss_sees(owner, normalize):
    student, teacher = random_pair()
    seen = [mapped(one, lambda x: x / x.norm(dim=1, keepdim=True)) if normalize else one for one in (student, teacher)]
    near(ran(owner, [(student, teacher)], decay=0.0, normalize=normalize).mean, batch_mean(*seen))


@every_owner
def test_forward_moves_no_mean(owner):
    regularizer = ran(owner, [random_pair()])
    before, pair = regularizer.mean.clone(), random_pair(seed=1)
    first = regularizer(*pair)
    assert torch.equal(regularizer(*pair), first)
    assert torch.equal(regularizer.mean, before)
    regularizer.step()
    assert not torch.equal(regularizer.mean, before)


@every_owner
@every_update
def test_evaluation_collects_nothing(owner, update):
    regularizer = ran(owner, [random_pair()], update=update)
    before = regularizer.mean.clone()
    regularizer.eval()
    for seed in (1, 2):
        student, teacher = random_pair(seed=seed)
        pairwise = pairwise_vector_loss(*student, *teacher) if owner is DiVE else 0
        near(regularizer(student, teacher), average_vector_loss(*student, *teacher, mean=before) + pairwise)
    regularizer.step()
    assert torch.equal(regularizer.mean, before)


@every_owner
@every_update
def test_step_without_forward_changes_nothing(owner, update):
    fresh = owner(update=update)
    fresh.step()
    assert fresh.mean.shape == ()
    regularizer = ran(owner, [random_pair()], update=update)
    before = regularizer.mean.clone()
    regularizer.step()
    assert torch.equal(regularizer.mean, before)


@every_owner
@pytest.mark.parametrize("sizes", [(4, 4), (1, 3, 4)])
def test_accumulation_equals_one_batch(owner, sizes):
    student, teacher = random_pair(rows=8)
    parts, whole = owner(normalize=False), owner(normalize=False)
    bounds = list(itertools.accumulate(sizes, initial=0))
    for _ in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for begin, end in itertools.pairwise(bounds):
            piece = [mapped(one, lambda x, begin=begin, end=end: x[begin:end]) for one in (student, teacher)]
            total = total + parts(*piece) * (end - begin) / 8
        near(total, whole(student, teacher))
        parts.step()
        whole.step()
        near(parts.mean, whole.mean)


@every_owner
@every_update
def test_starts_0d_and_takes_the_width(owner, update):
    regularizer = owner(update=update)
    assert regularizer.mean.shape == ()
    assert regularizer.mean.item() == 0
    regularizer(*random_pair(width=5))
    assert regularizer.mean.shape == ()
    regularizer.step()
    assert regularizer.mean.shape == (5,)


@every_owner
def test_state_holds_the_mean_only(owner):
    assert list(ran(owner, [random_pair()]).state_dict()) == ["mean"]


@every_owner
@every_update
def test_resume_from_state_dict(owner, update):
    saved = ran(owner, [random_pair()], update=update)
    resumed = owner(update=update, normalize=False)
    resumed(*random_pair(seed=7))  # left over from before the load
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(resumed.mean, saved.mean)
    for seed in (1, 2):
        pair = random_pair(seed=seed)
        assert torch.equal(resumed(*pair), saved(*pair))
        saved.step()
        resumed.step()
        assert torch.equal(resumed.mean, saved.mean)


@every_owner
def test_loading_the_start_forgets_the_mean(owner):
    regularizer = ran(owner, [random_pair()])
    regularizer.load_state_dict(owner().state_dict())
    assert regularizer.mean.shape == ()
    assert regularizer.mean.item() == 0
    regularizer(*random_pair(width=3))
    regularizer.step()
    assert regularizer.mean.shape == (3,)


@every_owner
def test_loading_copies(owner):
    saved = ran(owner, [random_pair()])
    resumed = owner()
    resumed.load_state_dict(saved.state_dict())
    resumed.mean.zero_()
    assert saved.mean.any()


def test_loading_a_matrix_raises():
    with pytest.raises(RuntimeError, match="mean"):
        AverageVectorLoss().load_state_dict({"mean": torch.zeros(2, 3)})


@every_owner
@pytest.mark.parametrize("change", ["bfloat16", "half", "double"])
def test_mean_stays_fp32(owner, change):
    regularizer = ran(owner, [random_pair()])
    regularizer(*random_pair(seed=1))
    expected, untouched = regularizer.mean.clone(), copy.deepcopy(regularizer)
    parent = torch.nn.Sequential(torch.nn.Linear(2, 2), regularizer)
    getattr(parent, change)()
    assert parent[0].weight.dtype != torch.float32
    assert regularizer.mean.dtype == torch.float32
    assert torch.equal(regularizer.mean, expected)
    for one in (regularizer, untouched):
        one.step()
    assert torch.equal(regularizer.mean, untouched.mean)


@every_owner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mean_is_fp32_for_every_input(owner, dtype):
    pair = random_pair(dtype=dtype)
    regularizer = ran(owner, [pair], decay=0.0)
    assert regularizer.mean.dtype == torch.float32
    near(regularizer.mean, batch_mean(*pair))


@every_owner
@every_update
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_batch_that_is_not_finite_is_skipped(owner, update, bad):
    regularizer = ran(owner, [random_pair()], update=update, decay=0.5)
    before = regularizer.mean.clone()
    student, teacher = random_pair(seed=1)
    with torch.no_grad():
        student.text[0, 3] = bad
    assert not regularizer(student, teacher).isfinite()
    regularizer.step()
    assert torch.equal(regularizer.mean, before)
    pair = random_pair(seed=2)
    regularizer(*pair)
    regularizer.step()
    near(regularizer.mean, 0.5 * before + 0.5 * batch_mean(*pair).float())


@every_owner
def test_forgotten_step_warns_once(owner):
    regularizer, pair = owner(), random_pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(101):
            regularizer(*pair)
        assert len(caught) == 1
        for _ in range(150):
            regularizer(*pair)
        regularizer.step()
        for _ in range(101):
            regularizer(*pair)
    assert len(caught) == 1
    assert "step()" in str(caught[0].message)
    assert caught[0].filename == __file__  # points to the caller


@every_owner
def test_regular_steps_do_not_warn(owner):
    regularizer, pair = owner(), random_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forward in range(1, 151):
            regularizer(*pair)
            if forward % 75 == 0:
                regularizer.step()
        for _ in range(150):
            regularizer.eval()(*pair)


@every_owner
def test_before_takes_one_forward_per_step(owner):
    regularizer = owner(update="before", normalize=False)
    regularizer(*random_pair())
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        regularizer(*random_pair())
    regularizer.step()
    regularizer(*random_pair())
    regularizer.step()
    assert torch.equal(regularizer.mean, ran(owner, [random_pair()] * 2, update="before").mean)


@every_owner
@every_update
def test_discard_drops_what_is_pending(owner, update):
    """After a skipped optimizer step; the next forward is as if the dropped one had not been."""
    regularizer = ran(owner, [random_pair()], update=update)
    regularizer(*random_pair(seed=1))
    regularizer.discard()
    regularizer(*random_pair(seed=2))
    regularizer.step()
    assert torch.equal(regularizer.mean, ran(owner, [random_pair(), random_pair(seed=2)], update=update).mean)


@every_owner
def test_step_without_a_forward_keeps_the_mean(owner):
    regularizer = owner()
    regularizer.step()
    assert regularizer.mean.ndim == 0
    regularizer = ran(owner, [random_pair()])
    before = regularizer.mean.clone()
    regularizer.step()
    assert torch.equal(regularizer.mean, before)


def test_before_takes_one_forward_per_step_when_compiled():
    regularizer = AverageVectorLoss(update="before", normalize=False)
    compiled = torch.compile(regularizer, backend="eager")
    compiled(*random_pair())
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        compiled(*random_pair())
    regularizer.step()
    compiled(*random_pair())
    regularizer.step()
    assert torch.equal(regularizer.mean, ran(AverageVectorLoss, [random_pair()] * 2, update="before").mean)


def test_before_with_zero_decay_uses_this_batch():
    student, teacher = random_pair()
    ran_already = ran(AverageVectorLoss, [random_pair(seed=9)], update="before", decay=0.0)
    value = ran_already(student, teacher)
    near(value, average_vector_loss(*student, *teacher, mean=batch_mean(student, teacher)))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_no_gradient_through_the_mean(decay):
    student, teacher = random_pair()
    value = AverageVectorLoss(update="before", decay=decay, normalize=False)(student, teacher)
    actual = gradients(value, student)
    mean = (1 - decay) * batch_mean(student, teacher)
    for gradient, shift in zip(actual, shifts(student, teacher), strict=True):
        near(gradient, 2 / len(shift) * (shift - mean))
    live = [one - other for one, other in zip(student, teacher, strict=True)]
    moving = (1 - decay) * torch.cat(live).mean(0)
    through = gradients(sum((shift - moving).square().sum(1).mean() for shift in live), student)
    same = torch.allclose(actual[0], through[0], rtol=1e-4, atol=1e-6)
    assert same == (decay == 0.0)  # at the batch's own mean the gradient through it vanishes


@every_owner
@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), True, "0.9", None])
def test_bad_decay(owner, decay):
    with pytest.raises(ValueError, match=rf"^{owner.__name__}: expected decay"):
        owner(decay=decay)


@every_owner
@pytest.mark.parametrize("update", ["After", "", None])
def test_bad_update(owner, update):
    with pytest.raises(ValueError, match=rf"^{owner.__name__}: expected update to be one of 'after', 'before'"):
        owner(update=update)


@every_owner
def test_options_are_keyword_only(owner):
    with pytest.raises(TypeError):
        owner(0.9)


@every_owner
def test_width_of_a_committed_mean_is_checked(owner):
    regularizer = ran(owner, [random_pair(width=8)])
    before = regularizer.mean.clone()
    with pytest.raises(ValueError, match="mean of shape"):
        regularizer(*random_pair(width=4))
    regularizer(*random_pair(width=8))  # the refused batch leaves nothing behind
    regularizer.step()
    near(regularizer.mean, 0.99 * before + 0.01 * batch_mean(*random_pair(width=8)).float())


@every_owner
def test_width_of_pending_statistics_is_checked(owner):
    regularizer = owner(normalize=False, decay=0.0)
    regularizer(*random_pair(width=8))
    with pytest.raises(ValueError, match="mean of shape"):
        regularizer(*random_pair(width=4))
    regularizer.step()
    near(regularizer.mean, batch_mean(*random_pair(width=8)).float())

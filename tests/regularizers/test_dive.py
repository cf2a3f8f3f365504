"""DiVE: the sum of its two terms, with the running mean of the first (whose life is tested with that term)."""

import pytest
import torch
from batches import NO_MEAN, batch_mean, gradients, random_pair, random_vector
from golden_cases import assert_gradients, assert_value, cases, inputs, name_of, tensor
from hypothesis import given
from hypothesis import strategies as st

from geomreg import AverageVectorLoss, DiVE, Embeddings, PairwiseVectorLoss, WeightedSum
from geomreg.functional import dive_loss

ORDERS = {"loss_then_update": "after", "update_then_loss": "before"}


def embeddings(arguments):
    """Student and teacher of a golden case."""
    pairs = [Embeddings(arguments[f"{side}_image"], arguments[f"{side}_text"]) for side in ("student", "teacher")]
    return pairs[0], pairs[1]


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/first_step_"), ids=name_of)
def test_golden_first_step(golden):
    arguments = inputs(golden)
    student, teacher = embeddings(arguments)
    value = golden["hyper"]["lambda"] * dive_loss(*student, *teacher, mean=tensor(golden["outputs"]["m_used"]))
    value.backward()
    assert_value(golden, value, golden["outputs"]["weighted_total"])
    assert_gradients(golden, arguments)


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/first_step_"), ids=name_of)
def test_golden_first_step_module(golden):
    arguments = inputs(golden)
    student, teacher = embeddings(arguments)
    regularizer = DiVE(decay=golden["hyper"]["alpha"], update=ORDERS[golden["hyper"]["order"]], normalize=False)
    value = golden["hyper"]["lambda"] * regularizer(student, teacher)
    torch.testing.assert_close(value, tensor(golden["outputs"]["weighted_total"]), rtol=1e-7, atol=0)
    regularizer.step()
    torch.testing.assert_close(regularizer.mean.double(), tensor(golden["outputs"]["m_after"]), rtol=1e-6, atol=1e-7)
    value.backward()
    assert_gradients({**golden, "suggested_rtol": 1e-6}, arguments)  # the module's mean is fp32


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), width=st.integers(1, 6))
def test_is_distillation_of_half_sum_and_half_difference(seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    mean = random_vector(width, seed)
    images, texts = (one - other for one, other in zip(student, teacher, strict=True))
    a, b = (images + texts) / 2 - mean, (images - texts) / 2
    expected = (2 * a.square().sum(1) + 6 * b.square().sum(1)).mean()
    torch.testing.assert_close(dive_loss(*student, *teacher, mean=mean), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("update", ["after", "before"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_weighted_sum_of_its_terms(update, normalize):
    options = {"decay": 0.5, "update": update, "normalize": normalize}
    terms = WeightedSum(avl=(1.0, AverageVectorLoss(**options)), pvl=(1.0, PairwiseVectorLoss(normalize=normalize)))
    regularizer = DiVE(**options)
    for seed in range(3):
        student, teacher = random_pair(seed=seed)
        value, expected = regularizer(student, teacher), terms(student, teacher)
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        for one, other in zip(gradients(value, student), gradients(expected, student), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        regularizer.step()
        terms.step()
        assert torch.equal(regularizer.mean, terms.regularizers["avl"].mean)


def test_frozen_mean_keeps_the_pairwise_term():
    student, teacher = random_pair()
    control = DiVE(decay=1.0, normalize=False)
    for _ in range(2):
        assert torch.equal(control(student, teacher), dive_loss(*student, *teacher, mean=NO_MEAN))
        control.step()
    assert not torch.equal(control(student, teacher), dive_loss(*student, *teacher, mean=batch_mean(student, teacher)))


@pytest.mark.parametrize("lacking", ["image", "text"])
def test_needs_pairs(lacking):
    student, teacher = (one._replace(**{lacking: None}) for one in random_pair())
    regularizer = DiVE()
    with pytest.raises(ValueError, match=rf"^DiVE: expected image-text pairs, got None for the {lacking}"):
        regularizer(student, teacher)
    regularizer.step()
    assert regularizer.mean.shape == ()  # nothing was collected


def test_refused_pairs_leave_nothing_behind():
    (one, other), (more, many) = random_pair(rows=4), random_pair(rows=3)
    regularizer = DiVE(normalize=False)
    with pytest.raises(ValueError, match="same pairs"):
        regularizer(Embeddings(one.image, more.text), Embeddings(other.image, many.text))
    regularizer.step()
    assert regularizer.mean.shape == ()

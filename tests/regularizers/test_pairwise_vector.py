"""Pairwise vector loss: golden numbers, what it does not see, and the pairs it needs."""

import pytest
import torch
from batches import mapped, random_pair, random_vector
from golden_cases import assert_gradients, assert_value, case, cases, inputs, name_of
from hypothesis import given
from hypothesis import strategies as st

from geomreg import Embeddings, PairwiseVectorLoss
from geomreg.functional import pairwise_vector_loss

SIZES = {"seed": st.integers(0, 2**31), "rows": st.integers(1, 6), "width": st.integers(1, 6)}


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/pvl_"), ids=name_of)
def test_golden(golden):
    arguments = inputs(golden)
    value = pairwise_vector_loss(
        arguments["student_image"], arguments["student_text"], arguments["teacher_image"], arguments["teacher_text"]
    )
    value.backward()
    assert_value(golden, value, golden["outputs"]["pvl"])
    assert_gradients(golden, arguments)


@pytest.mark.parametrize("golden", cases("dive_spec", containing="/first_step_"), ids=name_of)
def test_golden_first_step(golden):
    arguments = inputs(golden)
    student = Embeddings(arguments["student_image"], arguments["student_text"])
    teacher = Embeddings(arguments["teacher_image"], arguments["teacher_text"])
    assert_value(golden, PairwiseVectorLoss(normalize=False)(student, teacher), golden["outputs"]["pvl"])


def test_golden_unit_through_the_module():
    raw, unit = (case("dive_spec", f"pvl_{kind}") for kind in ("raw", "unit"))
    arguments = inputs(raw)
    student = Embeddings(arguments["student_image"], arguments["student_text"])
    teacher = Embeddings(arguments["teacher_image"], arguments["teacher_text"])
    assert_value(unit, PairwiseVectorLoss()(student, teacher), unit["outputs"]["pvl"])


def test_golden_pure_translation():
    golden = case("dive_spec", "pure_translation")
    arguments = inputs(golden)
    teacher = (arguments["teacher_image"], arguments["teacher_text"])
    student = [value + arguments["shift"] for value in teacher]
    assert_value(golden, pairwise_vector_loss(*student, *teacher), golden["outputs"]["pvl"])


def test_golden_exact_rational():
    golden = case("dive_spec", "exact_rational_b2d2")
    arguments = inputs(golden)
    zeros = torch.zeros_like(arguments["u"])
    assert_value(golden, pairwise_vector_loss(arguments["u"], arguments["v"], zeros, zeros), golden["outputs"]["pvl"])


@given(**SIZES)
def test_common_shift_costs_nothing(seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    shift = random_vector(width, seed)
    assert pairwise_vector_loss(*mapped(teacher, lambda x: x + shift), *teacher) <= 1e-26
    expected = pairwise_vector_loss(*student, *teacher)
    moved = mapped(student, lambda x: x + shift)
    torch.testing.assert_close(pairwise_vector_loss(*moved, *teacher), expected, rtol=1e-10, atol=1e-12)


def test_shift_of_one_modality_costs_its_square():
    _, teacher = random_pair()
    shift = random_vector()
    value = pairwise_vector_loss(teacher.image + shift, teacher.text, *teacher)
    torch.testing.assert_close(value, shift.square().sum(), rtol=1e-12, atol=0)


@given(**SIZES)
def test_exchange_of_modalities(seed, rows, width):
    student, teacher = random_pair(rows, width, seed)
    expected = pairwise_vector_loss(*student, *teacher)
    torch.testing.assert_close(pairwise_vector_loss(*student[::-1], *teacher[::-1]), expected, rtol=1e-13, atol=0)


def test_pairing_matters():
    student, teacher = random_pair()
    swapped = [one._replace(text=one.text.roll(1, 0)) for one in (student, teacher)]
    value = pairwise_vector_loss(*student, *teacher)
    assert not torch.allclose(pairwise_vector_loss(*swapped[0], *swapped[1]), value, rtol=1e-3)


@pytest.mark.parametrize("lacking", ["image", "text"])
def test_needs_pairs(lacking):
    student, teacher = (one._replace(**{lacking: None}) for one in random_pair())
    with pytest.raises(ValueError, match=rf"^PairwiseVectorLoss: expected image-text pairs, got None for the {lacking}"):
        PairwiseVectorLoss()(student, teacher)


def test_needs_as_many_images_as_texts():
    (one, other), (more, many) = random_pair(rows=4), random_pair(rows=3)
    with pytest.raises(ValueError, match="same pairs"):
        PairwiseVectorLoss()(Embeddings(one.image, more.text), Embeddings(other.image, many.text))

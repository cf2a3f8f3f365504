"""Feature distillation: SnD's official numbers in its single-teacher form, and the choice of modalities."""

import math

import pytest
import torch
from batches import mapped, random_pair, random_vector
from golden_cases import assert_gradients, assert_value, case, inputs
from hypothesis import given
from hypothesis import strategies as st

from geomreg import Embeddings, FeatureDistillation
from geomreg.functional import feature_distillation_loss


def first_task_weight(hyper):
    """Weight of SnD's distance when both teachers are the pre-trained model: every score is the same."""
    score = 1 / (1 + math.exp(hyper["scale"] * hyper["threshold"]))
    return hyper["ratio_prev"] * score + hyper["ratio_pretrained"] * (1 - score)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("single_teacher", lambda hyper: 1.0),
        ("first_task_prev_is_pretrained", first_task_weight),
        ("student_equals_teacher", lambda _: 1.0),
    ],
)
def test_golden_official(name, weight):
    golden = case("snd", name)
    arguments = inputs(golden)
    student, teacher = Embeddings(arguments["student_image_raw"]), Embeddings(arguments["pretrained_image_raw"])
    value = weight(golden["hyper"]) * FeatureDistillation()(student, teacher)
    value.backward()
    assert_value(golden, value, golden["outputs"]["loss"])
    assert_gradients(golden, arguments)


def test_golden_official_function():
    golden = case("snd", "l2loss_reduce_mean_square_False")
    arguments = inputs(golden)
    value = feature_distillation_loss(arguments["x"], arguments["y"])
    value.backward()
    assert_value(golden, value, golden["outputs"]["value"])
    assert_gradients(golden, arguments)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), width=st.integers(1, 6))
def test_common_translation(seed, rows, width):
    student, teacher = (one.image for one in random_pair(rows, width, seed))
    shift = random_vector(width, seed)
    expected = feature_distillation_loss(student, teacher)
    torch.testing.assert_close(feature_distillation_loss(student + shift, teacher + shift), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(feature_distillation_loss(teacher + shift, teacher), shift.square().sum(), rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), width=st.integers(1, 6))
def test_unit_vectors_give_cosine(seed, rows, width):
    student, teacher = (Embeddings(one.image) for one in random_pair(rows, width, seed))
    cosine = torch.nn.functional.cosine_similarity(student.image, teacher.image)
    torch.testing.assert_close(FeatureDistillation()(student, teacher), (2 - 2 * cosine).mean(), rtol=1e-10, atol=1e-12)


def test_is_summed_over_the_width():
    student, teacher = random_pair()
    expected = 8 * torch.nn.functional.mse_loss(student.image, teacher.image)
    torch.testing.assert_close(feature_distillation_loss(student.image, teacher.image), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("modalities", "used"),
    [
        (None, ("image", "text")),
        (("image",), ("image",)),
        (("text",), ("text",)),
        (("image", "text"), ("image", "text")),
        (["text"], ("text",)),
    ],
)
def test_modalities(modalities, used):
    student, teacher = random_pair()
    value = FeatureDistillation(modalities=modalities, normalize=False)(student, teacher)
    expected = sum(feature_distillation_loss(getattr(student, field), getattr(teacher, field)) for field in used)
    assert torch.equal(value, expected)
    value.backward()
    assert [field for field in student._fields if getattr(student, field).grad is not None] == list(used)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_default_takes_what_is_given(modality):
    student, teacher = (Embeddings(**{modality: getattr(one, modality)}) for one in random_pair())
    value = FeatureDistillation(normalize=False)(student, teacher)
    assert torch.equal(value, feature_distillation_loss(getattr(student, modality), getattr(teacher, modality)))
    alone = FeatureDistillation(modalities=(modality,), normalize=False)
    assert torch.equal(alone(student, teacher), value)


def test_modality_that_is_missing_raises():
    student, teacher = (one._replace(text=None) for one in random_pair())
    with pytest.raises(ValueError, match=r"^FeatureDistillation: expected text embeddings, got None"):
        FeatureDistillation(modalities=("image", "text"))(student, teacher)


@pytest.mark.parametrize("modalities", ["image", (), ("audio",), ("image", "audio")])
def test_bad_modalities(modalities):
    with pytest.raises(ValueError, match=r"^FeatureDistillation: expected modalities"):
        FeatureDistillation(modalities=modalities)


def test_numbers_of_the_modalities_may_differ():
    (one, other), (more, many) = random_pair(rows=4), random_pair(rows=3, seed=1)
    student, teacher = Embeddings(one.image, more.text), Embeddings(other.image, many.text)
    expected = feature_distillation_loss(one.image, other.image) + feature_distillation_loss(more.text, many.text)
    assert torch.equal(FeatureDistillation(normalize=False)(student, teacher), expected)


def test_has_no_state():
    regularizer = FeatureDistillation()
    regularizer(*(mapped(one, lambda x: x) for one in random_pair()))
    regularizer.step()
    assert not regularizer.state_dict()
    assert not list(regularizer.buffers())

"""Feature distillation: SnD's official numbers in its single-teacher form, and the choice of modalities."""

import math

import pytest
import torch
from batches import mapped, random_pair, random_vector
from golden_cases import assert_gradients, assert_value, case, check, inputs
from hypothesis import given
from hypothesis import strategies as st

from geomreg import CosineAnchor, Embeddings, FeatureDistillation, SelectiveDistillation
from geomreg.functional import cosine_anchor_loss, feature_distillation_loss, selective_distillation_loss


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


def selective(golden, **options):
    """The module with a case's hyper-parameters on its inputs."""
    arguments, hyper = inputs(golden), golden["hyper"]
    options = {
        "threshold": hyper["threshold"], "scale": float(hyper["scale"]), "previous_weight": float(hyper["ratio_prev"]),
        "teacher_weight": float(hyper["ratio_pretrained"]), **options,
    }  # fmt: skip
    one, other, previous = (Embeddings(arguments[f"{key}_image_raw"]) for key in ("student", "pretrained", "prev"))
    return SelectiveDistillation(**options)(one, other, previous=previous), arguments


@pytest.mark.parametrize("name", ["per_sample_selection_NOT_OFFICIAL", "first_task_prev_is_pretrained", "single_teacher"])
def test_golden_selection(name):
    golden = case("snd", name)
    value, arguments = selective(golden)
    check(golden, value, arguments)


@pytest.mark.parametrize(("name", "factor"), [("dual_default", 1.3085309665), ("dual_equal_weights", 1.2313432855)])
def test_official_selection_is_lost_in_a_broadcast(name, factor):
    """The known deviation: the official mean of the (B, B) product is the mean score times the mean distance."""
    golden = case("snd", name)
    value, arguments = selective(golden)
    assert value.item() == pytest.approx(factor * golden["outputs"]["loss"], rel=1e-9)
    z, previous, teacher = (torch.nn.functional.normalize(arguments[f"{key}_image_raw"]) for key in ("student", "prev", "pretrained"))
    hyper = golden["hyper"]
    score = torch.sigmoid(hyper["scale"] * ((teacher - previous).norm(dim=1) - hyper["threshold"]))
    broadcast = hyper["ratio_prev"] * score.mean() * (z - previous).square().sum(1).mean()
    broadcast = broadcast + hyper["ratio_pretrained"] * (1 - score).mean() * (z - teacher).square().sum(1).mean()
    assert broadcast.item() == pytest.approx(golden["outputs"]["loss"], rel=1e-12)


def test_selection_by_hand():
    student, previous = (one.image for one in random_pair(6, 3, seed=1))
    teacher = random_pair(6, 3, seed=2)[1].image
    expected = 0.0
    for z, p, t in zip(student.tolist(), previous.tolist(), teacher.tolist(), strict=True):
        score = 1 / (1 + math.exp(-2.0 * (math.dist(p, t) - 0.7)))
        expected += (3.0 * score * math.dist(z, p) ** 2 + 0.25 * (1 - score) * math.dist(z, t) ** 2) / 6
    options = {"threshold": 0.7, "scale": 2.0, "previous_weight": 3.0, "teacher_weight": 0.25}
    assert selective_distillation_loss(student, previous, teacher, **options).item() == pytest.approx(expected, rel=1e-12)
    assert selective_distillation_loss(student, previous, teacher).item() == pytest.approx(
        selective_distillation_loss(
            student, previous, teacher, threshold=0.2, scale=6.0, previous_weight=9.0, teacher_weight=0.5
        ).item(), rel=1e-15,
    )  # fmt: skip


@pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text"), None])
def test_selection_of_modalities(modalities):
    (student, teacher), (_, previous) = random_pair(), random_pair(seed=3)
    value = SelectiveDistillation(modalities=modalities, normalize=False)(student, teacher, previous=previous)
    names = modalities or ("image", "text")
    expected = sum(selective_distillation_loss(*(getattr(one, name) for one in (student, previous, teacher))) for name in names)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_selection_needs_only_what_it_keeps():
    (student, teacher), (_, previous) = random_pair(), random_pair(seed=3)
    alone = SelectiveDistillation()(Embeddings(student.image), Embeddings(teacher.image), previous=Embeddings(previous.image))
    torch.testing.assert_close(SelectiveDistillation()(student, Embeddings(teacher.image), previous=previous), alone, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["threshold", "scale", "previous_weight", "teacher_weight"])
@pytest.mark.parametrize("bad", [float("nan"), "1", None, True])
def test_bad_selection(option, bad):
    with pytest.raises(ValueError, match=rf"^SelectiveDistillation: expected {option}"):
        SelectiveDistillation(**{option: bad})
    student, teacher = (one.image for one in random_pair())
    with pytest.raises(ValueError, match=rf"^selective_distillation_loss: expected {option}"):
        selective_distillation_loss(student, teacher, teacher, **{option: bad})


def test_faults_of_the_previous_teacher_are_called_so():
    student, teacher = random_pair()
    for previous in (None, student.image):
        with pytest.raises(TypeError, match=r"^SelectiveDistillation: expected previous as geomreg.Embeddings"):
            SelectiveDistillation()(student, teacher, previous=previous)
    with pytest.raises(ValueError, match=r"^SelectiveDistillation: expected image student and previous embeddings of one shape"):
        SelectiveDistillation()(student, teacher, previous=Embeddings(torch.ones(2, 8)))
    with pytest.raises(ValueError, match="expected modalities as a tuple"):
        FeatureDistillation(modalities=5)


def test_previous_with_gradient_raises():
    (student, teacher), (live, _) = random_pair(), random_pair(seed=3)
    with pytest.raises(ValueError, match="requires grad"):
        SelectiveDistillation()(student, teacher, previous=live)


def test_golden_cosine():
    golden = case("snd", "cosine_similarity_loss")
    arguments = inputs(golden)
    check(golden, cosine_anchor_loss(arguments["x"], arguments["y"]), arguments)


def test_cosine_is_exact_near_the_teacher():
    """One minus a cosine in fp32 would be off by several per cent here."""
    _, teacher = random_pair(64, 512, dtype=torch.float32)
    drift = 1e-3 * teacher.image.norm(dim=1, keepdim=True) / 512**0.5 * random_pair(64, 512, seed=1, dtype=torch.float32)[1].image
    exact = (1 - torch.nn.functional.cosine_similarity((teacher.image + drift).double(), teacher.image.double())).mean().item()
    assert cosine_anchor_loss(teacher.image + drift, teacher.image).item() == pytest.approx(exact, rel=1e-4)
    plain = (1 - torch.nn.functional.cosine_similarity(teacher.image + drift, teacher.image)).mean().item()
    assert plain != pytest.approx(exact, rel=1e-2)


def test_cosine_modalities():
    student, teacher = random_pair()
    whole = cosine_anchor_loss(student.image, teacher.image) + cosine_anchor_loss(student.text, teacher.text)
    torch.testing.assert_close(CosineAnchor()(student, teacher), whole)
    torch.testing.assert_close(CosineAnchor(modalities=("text",))(student, teacher), cosine_anchor_loss(student.text, teacher.text))

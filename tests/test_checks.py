"""Every bad input raises the right type, with a message that says where, what was expected and what came."""

import re

import pytest
import torch
from batches import random_pair

from geomreg import AverageVectorLoss, DiVE, Embeddings, FeatureDistillation, PairwiseVectorLoss, WeightedSum, checks
from geomreg.functional import average_vector_loss, dive_loss, feature_distillation_loss, pairwise_vector_loss

GOOD = torch.ones(3, 4)
NO_MEAN = torch.zeros(())
FUNCTIONS = {  # each as a function of an image student and its teacher
    "average_vector_loss": lambda s, t: average_vector_loss(s, GOOD, t, GOOD, mean=NO_MEAN),
    "pairwise_vector_loss": lambda s, t: pairwise_vector_loss(s, GOOD, t, GOOD),
    "dive_loss": lambda s, t: dive_loss(s, GOOD, t, GOOD, mean=NO_MEAN),
    "feature_distillation_loss": feature_distillation_loss,
}
MODULES = {
    "AverageVectorLoss": AverageVectorLoss,
    "DiVE": DiVE,
    "PairwiseVectorLoss": PairwiseVectorLoss,
    "FeatureDistillation": FeatureDistillation,
}
BAD_PAIRS = {  # name -> (student, teacher, error, expected, got)
    "student is a list": ([[1.0]], GOOD, TypeError, "student embeddings as a tensor", "list"),
    "teacher is a list": (GOOD, [[1.0]], TypeError, "teacher embeddings as a tensor", "list"),
    "one vector": (torch.ones(4), GOOD, ValueError, r"shape \(B, D\)", r"\(4,\)"),
    "feature map": (torch.ones(3, 4, 2), GOOD, ValueError, r"shape \(B, D\)", r"\(3, 4, 2\)"),
    "no sample": (torch.ones(0, 4), torch.ones(0, 4), ValueError, "B, D >= 1", r"\(0, 4\)"),
    "no width": (torch.ones(3, 0), torch.ones(3, 0), ValueError, "B, D >= 1", r"\(3, 0\)"),
    "integer student": (GOOD.long(), GOOD, TypeError, "floating-point", "int64 tensor"),
    "integer teacher": (GOOD, GOOD.long(), TypeError, "floating-point", "int64 tensor"),
    "boolean student": (GOOD.bool(), GOOD, TypeError, "floating-point", "bool tensor"),
    "other rows": (torch.ones(2, 4), GOOD, ValueError, "one shape", r"\(2, 4\) and \(3, 4\)"),
    "one row": (torch.ones(1, 4), GOOD, ValueError, "one shape", r"\(1, 4\) and \(3, 4\)"),
    "other width": (GOOD, torch.ones(3, 5), ValueError, "one shape", r"\(3, 4\) and \(3, 5\)"),
    "one wide": (GOOD, torch.ones(3, 1), ValueError, "one shape", r"\(3, 4\) and \(3, 1\)"),
    "other device": (GOOD, torch.ones(3, 4, device="meta"), ValueError, "one device", "cpu and meta"),
    "live teacher": (GOOD, GOOD.clone().requires_grad_(), ValueError, "without gradient", "requires grad"),
}
every_bad_pair = pytest.mark.parametrize(("student", "teacher", "error", "expected", "got"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
every_module = pytest.mark.parametrize(("name", "module"), MODULES.items(), ids=MODULES.keys())


def raises(error, name, expected, got):
    """The error with a message of the house's form: where, what was expected, what came, a last full stop."""
    return pytest.raises(error, match=re.compile(rf"^{name}: expected .*{expected}.*, got .*{got}.*\.$", re.DOTALL))


@pytest.mark.parametrize(("name", "function"), FUNCTIONS.items(), ids=FUNCTIONS.keys())
@every_bad_pair
def test_functions_refuse(name, function, student, teacher, error, expected, got):
    with raises(error, name.strip(), expected, got):
        function(student, teacher)


@every_module
@every_bad_pair
@pytest.mark.parametrize("modality", ["image", "text"])
def test_modules_refuse(name, module, student, teacher, error, expected, got, modality):
    other = {"image": "text", "text": "image"}[modality]
    pair = [Embeddings(**{modality: value, other: GOOD}) for value in (student, teacher)]
    with raises(error, name, rf"(?=.*{modality} (student|teacher|embeddings)).*{expected}", got):
        module()(*pair)


@every_module
@pytest.mark.parametrize(
    ("student", "teacher", "error", "expected", "got"),
    [
        (GOOD, Embeddings(GOOD), TypeError, "student as geomreg.Embeddings", "tensor"),
        ((GOOD, GOOD), Embeddings(GOOD, GOOD), TypeError, "student as geomreg.Embeddings", "tuple"),
        (Embeddings(GOOD), None, TypeError, "teacher as geomreg.Embeddings", "None"),
        (Embeddings(GOOD, GOOD), Embeddings(GOOD), ValueError, "text embeddings from both", "student and None from the teacher"),
        (Embeddings(GOOD), Embeddings(GOOD, GOOD), ValueError, "text embeddings from both", "teacher and None from the student"),
        (Embeddings(None, GOOD), Embeddings(GOOD, GOOD), ValueError, "image embeddings from both", "None from the student"),
        (Embeddings(), Embeddings(), ValueError, "image or text embeddings", "None for both"),
    ],
)
def test_modules_refuse_what_is_not_embeddings(name, module, student, teacher, error, expected, got):
    with raises(error, name, expected, got):
        module()(student, teacher)


@every_module
def test_refused_batches_leave_nothing_behind(name, module):
    regularizer = module()
    with pytest.raises(ValueError, match=name):
        regularizer(Embeddings(GOOD, GOOD), Embeddings(GOOD, torch.ones(2, 4)))
    regularizer.step()
    assert all(buffer.ndim == 0 and buffer == 0 for buffer in regularizer.buffers())


def test_weighted_sum_names_the_term():
    with raises(TypeError, "PairwiseVectorLoss", "image student", "int64"):
        WeightedSum(pvl=(1.0, PairwiseVectorLoss()))(Embeddings(GOOD.long(), GOOD), Embeddings(GOOD, GOOD))


@pytest.mark.parametrize("name", ["pairwise_vector_loss", "dive_loss"])
@pytest.mark.parametrize("text", [torch.ones(1, 4), torch.ones(3, 1), torch.ones(2, 4)])
def test_pairs_must_have_one_shape(name, text):
    function = {"pairwise_vector_loss": pairwise_vector_loss, "dive_loss": lambda *pairs: dive_loss(*pairs, mean=NO_MEAN)}[name]
    with raises(ValueError, name, "same pairs", r"\(3, 4\).*and"):
        function(GOOD, text, GOOD, text)


@pytest.mark.parametrize(
    ("mean", "error", "expected", "got"),
    [
        (0.0, TypeError, "mean as a floating-point tensor", "float"),
        (None, TypeError, "mean as a floating-point tensor", "None"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "mean as a floating-point tensor", "int64"),
        (torch.zeros(5), ValueError, r"mean of shape \(4,\) or \(\)", r"\(5,\)"),
        (torch.zeros(1), ValueError, r"mean of shape \(4,\)", r"\(1,\)"),
        (torch.zeros(1, 4), ValueError, r"mean of shape \(4,\)", r"\(1, 4\)"),
        (torch.zeros(3, 4), ValueError, r"mean of shape \(4,\)", r"\(3, 4\)"),
        (torch.zeros(4, requires_grad=True), ValueError, "constant mean", "requires grad"),
    ],
)
@pytest.mark.parametrize("function", [average_vector_loss, dive_loss])
def test_bad_mean(function, mean, error, expected, got):
    with raises(error, "average_vector_loss", expected, got):
        function(GOOD, GOOD, GOOD, GOOD, mean=mean)


@pytest.mark.parametrize(("present", "lacking"), [("student", "teacher"), ("teacher", "student")])
@pytest.mark.parametrize("modality", [0, 1])
def test_modality_on_one_side_only(present, lacking, modality):
    arguments = [GOOD] * 4
    arguments[modality + (2 if lacking == "teacher" else 0)] = None
    with raises(ValueError, "average_vector_loss", f"{('image', 'text')[modality]} embeddings from both", f"from the {present} and None"):
        average_vector_loss(*arguments, mean=NO_MEAN)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (3, "int"),
        ("a", "str"),
        (torch.zeros(2, 3), "float32 tensor of shape (2, 3)"),
        (torch.zeros((), dtype=torch.bfloat16), "bfloat16 tensor of shape ()"),
    ],
)
def test_describe(value, text):
    assert checks.describe(value) == text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(bad):
    checks.check_finite("rsa", "values", GOOD)
    with raises(ValueError, "rsa", "finite values", "NaN or infinity"):
        checks.check_finite("rsa", "values", torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "expected", "got"),
    [
        (GOOD, torch.ones(2, 4), {"minimum": 1}, "as many student as teacher", r"\(3, 4\) and \(2, 4\)"),
        (GOOD, torch.ones(3, 5), {"minimum": 1, "same_width": True}, "one shape", r"\(3, 4\) and \(3, 5\)"),
        (GOOD, GOOD, {"minimum": 4}, "at least 4 samples", "3"),
        (GOOD, GOOD * float("nan"), {"minimum": 1}, "finite teacher", "NaN"),
    ],
)
def test_check_samples(student, teacher, options, expected, got):
    with raises(ValueError, "rsa", expected, got):
        checks.check_samples("rsa", student, teacher, **options)


def test_check_samples_accepts():
    checks.check_samples("rsa", GOOD, torch.ones(3, 5), minimum=3)
    checks.check_samples("rsa", GOOD, GOOD, minimum=3, same_width=True)


def test_check_modality_selects():
    (image, text), _ = random_pair()
    for modality, expected in (("image", image), ("text", text), ("stacked", torch.cat([image, text]))):
        assert torch.equal(checks.check_modality("RSA", Embeddings(image, text), modality), expected)
    with raises(ValueError, "RSA", 'text embeddings for modality="stacked"', "None"):
        checks.check_modality("RSA", Embeddings(image), "stacked")
    with raises(TypeError, "RSA", "geomreg.Embeddings", "float64 tensor"):
        checks.check_modality("RSA", image, "image")


def test_check_same_ids():
    assert checks.check_same_ids("RSA", None, None, 3) is None
    assert checks.check_same_ids("RSA", [4, 5, 6], torch.tensor([4, 5, 6]), 3).tolist() == [4, 5, 6]
    with raises(ValueError, "RSA", "ids beside teacher_ids", "None"):
        checks.check_same_ids("RSA", None, [1], 1)
    for ids in ([1, 2], [[1, 2, 3]], [1.0, 2.0, 3.0]):
        with raises(ValueError, "RSA", "3 integer ids", "tensor"):
            checks.check_same_ids("RSA", ids, None, 3)
    with raises(ValueError, "RSA", "same ids in the same order", "different"):
        checks.check_same_ids("RSA", [4, 5, 6], [4, 6, 5], 3)
    with raises(ValueError, "RSA", "3 integer ids", "tensor"):
        checks.check_same_ids("RSA", [4, 5, 6], [4, 5], 3)

"""Similarity distillation: ZSCL, open_clip, CaRot and StarFT by their own numbers, a loop, row blocks."""

import math

import pytest
import torch
from batches import random_pair
from golden_cases import case, cases, check, inputs, leaves, name_of, tensor

from geomreg import Embeddings, FeatureDistillation, SimilarityKL, blocked
from geomreg.functional import similarity_kl_loss


@pytest.mark.parametrize(
    "golden", [one for one in cases("zscl") if one["hyper"].get("image_loss") or one["hyper"].get("text_loss")], ids=name_of
)
def test_golden_zscl(golden):
    arguments, hyper = inputs(golden), golden["hyper"]
    directions = tuple(name for name, key in (("rows", "image_loss"), ("columns", "text_loss")) if hyper[key])
    term = SimilarityKL(directions=directions, temperature=hyper["T"], form="ce")
    student, teacher = (Embeddings(arguments[f"{who}_image_raw"]) for who in ("student", "teacher"))
    value = term(student, teacher, logit_scale=math.exp(hyper["log_logit_scale"]), texts=arguments["ref_text_raw"])
    check(golden, value * (0.5 if hyper["weight_adjust"] else 1.0), arguments)


def test_golden_zscl_feature_mse():
    golden = case("zscl", "feature_mse")
    arguments = inputs(golden)
    student, teacher = (Embeddings(arguments[f"{who}_image_raw"]) for who in ("student", "teacher"))
    check(golden, FeatureDistillation()(student, teacher) / student.image.shape[1], arguments)


def test_golden_zscl_images_against_images():
    golden = case("zscl", "image_image_ablation")
    arguments, hyper = inputs(golden), golden["hyper"]
    student, teacher = (torch.nn.functional.normalize(arguments[f"{who}_image_raw"]) for who in ("student", "teacher"))
    value = similarity_kl_loss(
        student, teacher, student, teacher_reference=teacher, form="ce", temperature=hyper["T"],
        logit_scale=math.exp(hyper["log_logit_scale"]), exclude=torch.eye(len(student), dtype=torch.bool),
    )  # fmt: skip
    check(golden, value, arguments)


@pytest.mark.parametrize(
    ("golden", "output", "factor"),
    [(one, "distill_loss", 1) for one in cases("open_clip", containing="distill")]
    + [(one, "loss", 2) for one in cases("carot", containing="self_distillation")],  # CaRot adds the two directions
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_golden_batch(golden, output, factor):
    hyper = golden["hyper"]
    arguments = inputs(golden) | leaves({"inputs": {}}, logit_scale=hyper["logit_scale"])
    term = SimilarityKL(against="batch", temperature=1.0, form="ce", teacher_logit_scale=hyper["teacher_logit_scale"], normalize=False)
    student, teacher = (Embeddings(arguments[f"{who}image"], arguments[f"{who}text"]) for who in ("", "teacher_"))
    check(golden, factor * term(student, teacher, logit_scale=arguments["logit_scale"]), arguments, output=output)


@pytest.mark.parametrize("golden", cases("text_guided", containing="starft"), ids=name_of)
def test_golden_starft(golden):
    arguments = inputs(golden)
    exclude = None
    if "labels" in golden["inputs"]:
        labels = tensor(golden["inputs"]["labels"])
        exclude = labels[:, None] == labels[None, :]
    value = similarity_kl_loss(
        arguments["image"], arguments["teacher_image"], arguments["text"], teacher_reference=arguments["teacher_text"],
        logit_scale=golden["hyper"]["teacher_logit_scale"], temperature=1.0, exclude=exclude,
    )  # fmt: skip
    check(golden, value, arguments)


def softmax(values):
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("form", ["kl", "ce"])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 1), (3, 7, 2), (5, 2, 63)])
def test_equals_loop(form, rows, columns, width):
    (student, teacher), (reference, other) = ([one.image for one in random_pair(n, width, seed)] for seed, n in enumerate((rows, columns)))
    value = similarity_kl_loss(
        student, teacher, reference, teacher_reference=other, logit_scale=3.0, teacher_logit_scale=5.0, temperature=1.7, form=form
    )
    expected = 0.0
    for z, z0 in zip(student, teacher, strict=True):
        q = softmax([3.0 / 1.7 * float(z @ r) for r in reference])
        p = softmax([5.0 / 1.7 * float(z0 @ r) for r in other])
        expected += sum(a * ((math.log(a) if form == "kl" else 0.0) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert value.item() == pytest.approx(1.7**2 * expected / rows, rel=1e-10, abs=1e-14)


def test_forms_have_one_gradient_and_the_teachers_entropy_between_them():
    student, teacher = (one.image for one in random_pair())
    texts = random_pair(6, seed=1)[1].text
    kl, ce = (similarity_kl_loss(student, teacher, texts, logit_scale=2.0, form=form) for form in ("kl", "ce"))
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (kl, ce)))
    p = torch.softmax(2.0 / 2.0 * teacher @ texts.T, dim=1)
    assert (ce - kl).item() == pytest.approx(-4 * (p * p.log()).sum(1).mean().item())


def test_defaults_are_the_students_own_constants():
    student, teacher = (one.image for one in random_pair())
    texts = random_pair(6, seed=1)[0].text
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    short = similarity_kl_loss(student, teacher, texts, logit_scale=scale)
    spelled = similarity_kl_loss(
        student,
        teacher,
        texts,
        teacher_reference=texts.detach(),
        logit_scale=scale,
        teacher_logit_scale=scale.detach(),
        temperature=2.0,
        form="kl",
    )
    for one, other in zip(
        torch.autograd.grad(short, (student, texts, scale)), torch.autograd.grad(spelled, (student, texts, scale)), strict=True
    ):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_row_blocks_change_nothing(monkeypatch, masked):
    (student, teacher), (texts, _) = ([one.image for one in random_pair(n, seed=seed)] for seed, n in enumerate((13, 7)))
    mask = (torch.arange(13)[:, None] + torch.arange(7)[None, :]) % 3 == 0 if masked else None
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)

    def run():
        value = similarity_kl_loss(student, teacher, texts, logit_scale=scale, exclude=mask)
        return value, torch.autograd.grad(1.5 * value, (student, texts, scale))

    expected, gradients = run()
    largest = []
    monkeypatch.setattr(
        torch.nn.functional, "log_softmax", lambda x, dim, f=torch.nn.functional.log_softmax: (largest.append(x.numel()), f(x, dim))[1]
    )
    monkeypatch.setattr(blocked, "TILE", 4 * 7)
    value, blockwise = run()
    assert max(largest) == 4 * 7
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for one, other in zip(blockwise, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    direct = torch.func.grad(lambda z: similarity_kl_loss(z, teacher, texts.detach(), logit_scale=3.0, exclude=mask))(student.detach())
    torch.testing.assert_close(1.5 * direct, gradients[0], rtol=1e-10, atol=1e-14)
    (gradient,) = torch.autograd.grad(similarity_kl_loss(student, teacher, texts, logit_scale=scale), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^row_blocked: expected one derivative"):
        gradient.sum().backward()


def test_directions_of_the_module():
    student, teacher = random_pair()
    texts = random_pair(6, seed=1)[1].text
    one = {direction: SimilarityKL(directions=(direction,)) for direction in ("rows", "columns")}
    both = SimilarityKL()(student, teacher, logit_scale=9.0, texts=texts)
    torch.testing.assert_close(both, sum(term(student, teacher, logit_scale=9.0, texts=texts) for term in one.values()))
    unit = torch.nn.functional.normalize
    rows = similarity_kl_loss(unit(student.image), unit(teacher.image), unit(texts), logit_scale=9.0)
    torch.testing.assert_close(one["rows"](student, teacher, logit_scale=9.0, texts=texts), rows)
    mean = SimilarityKL(against="batch")(student, teacher, logit_scale=9.0)
    halves = [SimilarityKL(against="batch", directions=(d,))(student, teacher, logit_scale=9.0) for d in ("rows", "columns")]
    torch.testing.assert_close(mean, sum(halves) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "text"}, "expected against to be one of"),
        ({"form": "js"}, "expected form to be one of"),
        ({"directions": ("rows", "rows")}, "expected directions as a tuple of different ones"),
        ({"temperature": 0.0}, "expected temperature as a finite number > 0"),
        ({"teacher_logit_scale": -1.0}, "expected teacher_logit_scale as a finite number > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^SimilarityKL: {message}"):
        SimilarityKL(**options)


def test_bad_inputs():
    student, teacher = random_pair()
    live, texts = random_pair(6, seed=1)[0].text, random_pair(6, seed=1)[1].text
    term = SimilarityKL()
    for given, message in (
        (None, "expected texts embeddings as a tensor"),
        (live, "expected constant texts embeddings, got some that require grad"),
        (texts[:, :3], "expected texts embeddings of width 8"),
        (texts[:0], r"expected texts embeddings of shape \(B, D\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^SimilarityKL: {message}"):
            term(student, teacher, logit_scale=1.0, texts=given)
    with pytest.raises(ValueError, match=r'^SimilarityKL: expected no texts with against="batch"'):
        SimilarityKL(against="batch")(student, teacher, logit_scale=1.0, texts=texts)
    for bad in (0.0, float("nan"), torch.ones(2), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"^similarity_kl_loss: expected logit_scale"):
            term(student, teacher, logit_scale=bad, texts=texts)
    with pytest.raises(ValueError, match=r"^similarity_kl_loss: expected exclude as a bool tensor of shape \(5, 6\)"):
        similarity_kl_loss(student.image, teacher.image, texts, logit_scale=1.0, exclude=torch.ones(5, 5, dtype=torch.bool))

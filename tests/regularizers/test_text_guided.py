"""Lipsum-FT, CAR-FT and FD-Align by their numbers and by loops; random texts that resume."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from batches import random_pair
from golden_cases import case, cases, check, inputs, name_of

from geomreg import ContextKL, Embeddings, TextEnergy
from geomreg.functional import context_embeddings, context_kl_loss, text_energy_loss


@pytest.mark.parametrize("golden", cases("lipsum_ft"), ids=name_of)
def test_golden_lipsum(golden):
    arguments = inputs(golden)
    scale = math.exp(golden["hyper"]["log_logit_scale"])
    value = text_energy_loss(arguments["image"], arguments["teacher_image"], arguments["random_text"], logit_scale=scale)
    check(golden, value, arguments)


def test_golden_fd_align():
    """Which averages over contexts too."""
    golden = case("text_guided", "fdalign_context_kl")
    arguments = inputs(golden)
    student, teacher = (Embeddings(arguments[f"{who}_image_raw"]) for who in ("student", "teacher"))
    contexts = arguments["context_text_unit"]
    check(golden, ContextKL()(student, teacher, logit_scale=100.0, texts=contexts) / len(contexts), arguments)


def test_energy_equals_loop():
    (image, _), (teacher, _) = random_pair(3, 4)
    texts = random_pair(5, 4, seed=1)[1].text
    expected = sum((2.5 * float(z @ r) - 2.5 * float(z0 @ r)) ** 2 for z, z0 in zip(image, teacher, strict=True) for r in texts) / (
        2 * 3 * 5
    )
    assert text_energy_loss(image, teacher, texts, logit_scale=2.5).item() == pytest.approx(expected, rel=1e-12)


def test_energy_does_not_see_what_no_text_sees():
    (image, _), (teacher, _) = random_pair(3, 4)
    texts = torch.eye(4, dtype=torch.float64)[:3]
    value = text_energy_loss(image, teacher, texts, logit_scale=2.0)
    moved = image + torch.tensor([0.0, 0.0, 0.0, 7.0])
    torch.testing.assert_close(text_energy_loss(moved, teacher, texts, logit_scale=2.0), value)


def test_context_equals_loop():
    (image, _), (teacher, _) = random_pair(3, 4)
    contexts, expected = random_pair(5, 4, seed=1)[1].text, 0.0
    for z, z0 in zip(image, teacher, strict=True):
        p, q = (torch.softmax(1.5 * contexts @ one, dim=0) for one in (z0, z))
        expected += sum(float(a) * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 3
    assert context_kl_loss(image, teacher, contexts, logit_scale=1.5).item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(
        context_kl_loss(image, teacher, contexts + 3.0, logit_scale=1.5), context_kl_loss(image, teacher, contexts, logit_scale=1.5)
    )


def test_context_embeddings():
    texts = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for template, vector in zip(texts, context_embeddings(texts), strict=True):
        mean = sum(row / row.norm() for row in template) / 3
        torch.testing.assert_close(vector, mean / mean.norm())
    for bad in (texts[0], texts.long(), [1.0]):
        with pytest.raises(ValueError, match=r"^context_embeddings: expected a floating-point tensor of shape \(K, C, D\)"):
            context_embeddings(bad)


def encoder(calls):
    table = torch.randn(49_408, 8, generator=torch.Generator().manual_seed(0))

    def encode_text(tokens):
        calls.append(tokens)
        return table[tokens].mean(dim=1).requires_grad_()  # a careless tower that leaves its gradient on

    return encode_text


def test_random_texts_are_of_a_step_and_resume():
    calls, (student, teacher) = [], random_pair(dtype=torch.float32)
    term = TextEnergy(encoder(calls), count=5, length=3, seed=7)
    first = term(student, teacher, logit_scale=10.0)
    assert torch.equal(term(student, teacher, logit_scale=10.0), first)
    assert len(calls) == 1  # encoded once a step
    term.step()
    second = term(student, teacher, logit_scale=10.0)
    assert not torch.equal(second, first)
    for tokens in calls:
        assert tokens.shape == (5, 5)
        assert (tokens[:, 0] == 49_406).all()
        assert (tokens[:, -1] == 49_407).all()
        assert (tokens[:, 1:-1] < 49_406).all()
    resumed = TextEnergy(encoder(calls), count=5, length=3, seed=7)
    resumed.load_state_dict(term.state_dict())
    assert torch.equal(resumed(student, teacher, logit_scale=10.0), second)
    assert not torch.equal(TextEnergy(encoder(calls), count=5, length=3, seed=8)(student, teacher, logit_scale=10.0), first)


def test_random_texts_are_spread_over_the_vocabulary():
    body = TextEnergy(encoder([]), count=4000, length=8).random_tokens()[:, 1:-1]
    assert body.min() < 100
    assert body.max() > 49_300
    assert abs(body.double().mean().item() - 49_405 / 2) < 4 * 49_406 / math.sqrt(12 * body.numel())


def test_random_texts_through_open_clip():
    text = {"context_length": 16, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)
    student, teacher = random_pair(dtype=torch.float32)
    value = TextEnergy(model.encode_text, context_length=16)(student, teacher, logit_scale=10.0)
    value.backward()
    assert value > 0
    assert student.image.grad.abs().max() > 0
    assert student.text.grad is None


def test_a_tower_given_as_module_is_not_registered():
    term = TextEnergy(torch.nn.Sequential(torch.nn.Embedding(49_408, 8), torch.nn.Flatten(), torch.nn.Linear(80, 8)))
    assert not list(term.parameters())
    assert set(term.state_dict()) == {"_extra_state"}


def test_texts_are_normalised_or_not():
    student, teacher = random_pair()
    texts = random_pair(5, seed=1)[1].text
    units = [F.normalize(value) for value in (student.image, teacher.image, texts)]
    torch.testing.assert_close(TextEnergy()(student, teacher, logit_scale=3.0, texts=texts), text_energy_loss(*units, logit_scale=3.0))
    torch.testing.assert_close(
        TextEnergy(normalize=False)(student, teacher, logit_scale=3.0, texts=texts),
        text_energy_loss(student.image, teacher.image, texts, logit_scale=3.0),
    )
    torch.testing.assert_close(ContextKL()(student, teacher, logit_scale=3.0, texts=texts), context_kl_loss(*units, logit_scale=3.0))


@pytest.mark.parametrize("option", ["count", "length", "vocabulary", "start", "end", "seed", "context_length"])
@pytest.mark.parametrize("bad", [-1, 1.5, "3", True])
def test_bad_options(option, bad):
    with pytest.raises(ValueError, match=rf"^TextEnergy: expected {option} as a whole number"):
        TextEnergy(encoder([]), **{option: bad})


def test_bad_inputs():
    student, teacher = random_pair()
    texts, live = random_pair(5, seed=1)[1].text, random_pair(5, seed=1)[0].text
    with pytest.raises(ValueError, match=r"^TextEnergy: expected texts or encode_text, got neither"):
        TextEnergy()(student, teacher, logit_scale=1.0)
    with pytest.raises(ValueError, match=r"^TextEnergy: expected texts or encode_text, got both"):
        TextEnergy(encoder([]))(student, teacher, logit_scale=1.0, texts=texts)
    with pytest.raises(TypeError, match=r"^TextEnergy: expected encode_text as a function"):
        TextEnergy("tower")
    with pytest.raises(ValueError, match=r"^TextEnergy: expected context_length as a whole number >= 10"):
        TextEnergy(encoder([]), context_length=9)
    for term in (TextEnergy(), ContextKL()):
        with pytest.raises(ValueError, match="expected constant texts embeddings"):
            term(student, teacher, logit_scale=1.0, texts=live)
        with pytest.raises(ValueError, match="expected image embeddings, got None"):
            term(Embeddings(text=student.text), Embeddings(text=teacher.text), logit_scale=1.0, texts=texts)

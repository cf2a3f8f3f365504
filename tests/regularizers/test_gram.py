"""Gram structure: loops over entries, the D x D identity in fp32, blocks."""

import pytest
import torch
from batches import random_pair, rotation

from geomreg import Embeddings, GramStructure
from geomreg.functional import gram_loss

BLOCKS = ("image-image", "text-text", "image-text")


def oracle(z, p, w, q):
    total = sum((float(z[j] @ w[k]) - float(p[j] @ q[k])) ** 2 for j in range(len(z)) for k in range(len(w)))
    return total / (len(z) * len(w))


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 1), (2, 5, 63), (7, 3, 4), (33, 20, 8)])
def test_equals_loop(rows, columns, width):
    (z, p), (w, q) = ([one.image for one in random_pair(count, width, seed)] for seed, count in enumerate((rows, columns)))
    assert gram_loss(z, p).item() == pytest.approx(oracle(z, p, z, p), rel=1e-10)
    value = gram_loss(z, p, student_columns=w, teacher_columns=q)
    assert value.item() == pytest.approx(oracle(z, p, w, q), rel=1e-10)
    value.backward()
    assert z.grad.abs().max() > 0
    assert w.grad.abs().max() > 0


def direct(z, p):
    return (z @ z.T - p @ p.T).square().mean()


@pytest.mark.parametrize("drift", [1.0, 1e-1, 1e-2, 1e-3])
def test_gradient_in_fp32_is_no_worse_than_the_direct_forms(drift):
    teacher = torch.nn.functional.normalize(random_pair(96, 64)[1].image)
    student = torch.nn.functional.normalize(teacher + drift * random_pair(96, 64, seed=1)[1].image / 8)

    def error(function):
        exact = torch.func.grad(function)(student.float().double(), teacher.float().double())
        return (torch.func.grad(function)(student.float(), teacher.float()) - exact).norm() / exact.norm()

    assert error(gram_loss) < 2e-6
    assert error(gram_loss) <= 2 * error(direct)
    if drift < 0.1:
        assert error(gram_loss) < 0.2 * error(direct)


def test_value_does_not_cancel():
    """At a drift of 0.02 % the difference of plain D x D moments has lost everything in fp32."""
    teacher = torch.nn.functional.normalize(random_pair(512, 64)[1].image)
    student = torch.nn.functional.normalize(teacher + 2e-4 * random_pair(512, 64, seed=1)[1].image / 8)
    exact = direct(student.float().double(), teacher.float().double()).item()
    assert gram_loss(student.float(), teacher.float()).item() == pytest.approx(exact, rel=1e-5)
    z, p = student.float(), teacher.float()
    moments = ((z.T @ z).square().sum() - 2 * (z.T @ p).square().sum() + (p.T @ p).square().sum()) / 512**2
    assert moments.item() != pytest.approx(exact, rel=0.05)


def test_no_quadratic_memory():
    """40,000 rows: a B x B matrix would take 6.4 GB."""
    student, teacher = torch.ones(40_000, 2), torch.zeros(40_000, 2)
    assert gram_loss(student, teacher).item() == pytest.approx(4.0)


@pytest.mark.parametrize("blocks", [(block,) for block in BLOCKS] + [BLOCKS, BLOCKS[::2]], ids="+".join)
def test_blocks(blocks):
    student, teacher = random_pair()
    parts = {
        "image-image": oracle(student.image, teacher.image, student.image, teacher.image),
        "text-text": oracle(student.text, teacher.text, student.text, teacher.text),
        "image-text": oracle(student.image, teacher.image, student.text, teacher.text),
    }
    value = GramStructure(blocks=blocks, normalize=False)(student, teacher)
    assert value.item() == pytest.approx(sum(parts[block] for block in blocks), rel=1e-10)


def test_default_is_all_blocks_of_unit_vectors():
    student, teacher = random_pair()
    units = [Embeddings(*(value / value.norm(dim=1, keepdim=True) for value in one)) for one in (student, teacher)]
    torch.testing.assert_close(GramStructure()(student, teacher), GramStructure(blocks=BLOCKS, normalize=False)(*units))


def test_one_modality_is_enough_for_its_block():
    student, teacher = random_pair()
    one, other = Embeddings(text=student.text), Embeddings(text=teacher.text)
    term = GramStructure(blocks=("text-text",))
    torch.testing.assert_close(term(one, other), term(student, teacher))
    with pytest.raises(ValueError, match=r"^GramStructure: expected image embeddings, got None"):
        GramStructure()(one, other)


def test_rotation_of_the_student_is_free_and_of_one_modality_is_not():
    student, teacher = random_pair()
    matrix = rotation(8)
    both = Embeddings(student.image @ matrix, student.text @ matrix)
    one = Embeddings(student.image @ matrix, student.text)
    value = GramStructure()(student, teacher)
    torch.testing.assert_close(GramStructure()(both, teacher), value)
    assert not torch.allclose(GramStructure()(one, teacher), value, rtol=1e-3)


@pytest.mark.parametrize("bad", [(), "image-image", ("image",), ("image-image", "image-image"), ("text-image",)])
def test_bad_blocks(bad):
    with pytest.raises(ValueError, match=r"^GramStructure: expected blocks as a tuple of different ones of"):
        GramStructure(blocks=bad)


def test_bad_columns():
    student, teacher = (one.image for one in random_pair())
    with pytest.raises(ValueError, match=r"^gram_loss: expected student_columns and teacher_columns together"):
        gram_loss(student, teacher, student_columns=student)
    with pytest.raises(ValueError, match=r"^gram_loss: expected image and text embeddings of one width"):
        gram_loss(student, teacher, student_columns=torch.ones(2, 3), teacher_columns=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^gram_loss: expected column teacher embeddings without gradient"):
        gram_loss(student, teacher, student_columns=student, teacher_columns=student)

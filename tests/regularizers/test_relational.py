"""RKD: the authors' numbers, loops over pairs and triplets, drawn triplets."""

import math

import pytest
import torch
from batches import random_pair
from golden_cases import assert_value, case, cases, check, inputs, name_of

from geomreg import RelationalAngle, RelationalDistance
from geomreg.functional import relational_angle_loss, relational_distance_loss

LOSSES = {"distance": relational_distance_loss, "angle": relational_angle_loss}


@pytest.mark.parametrize(
    "golden", [one for one in cases("rkd") if name_of(one).split("_")[0] in LOSSES and "angle_student" not in one["name"]], ids=name_of
)
def test_golden(golden):
    arguments = inputs(golden)
    check(golden, LOSSES[name_of(golden).split("_")[0]](arguments["student"], arguments["teacher"]), arguments)


def test_golden_sum():
    golden = case("rkd", "torchdistill_1_2")
    arguments = inputs(golden)
    student, teacher = arguments["student"], arguments["teacher"]
    check(golden, relational_distance_loss(student, teacher) + 2 * relational_angle_loss(student, teacher), arguments)


def test_coincident_rows_have_no_angle_and_no_exploding_gradient():
    golden = case("rkd", "angle_student_duplicate_rows")
    arguments = inputs(golden)
    value = relational_angle_loss(arguments["student"], arguments["teacher"])
    value.backward()
    assert_value(golden, value, golden["outputs"]["loss"])
    official = torch.tensor(golden["grads"]["student"])
    assert official.abs().max() > 1e9
    assert arguments["student"].grad.abs().max() < 1
    torch.testing.assert_close(arguments["student"].grad[2:], official[2:].double(), rtol=1e-6, atol=1e-9)


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def distance_oracle(student, teacher):
    def relative(rows):
        distances = [[math.dist(a, b) for b in rows] for a in rows]
        return distances, sum(map(sum, distances)) / (len(rows) * (len(rows) - 1))

    (one, mu), (other, nu) = relative(student.tolist()), relative(teacher.tolist())
    count = len(one)
    return sum(huber(one[j][k] / mu - other[j][k] / nu) for j in range(count) for k in range(count)) / count**2


def angle_oracle(student, teacher):
    def cosine(x, j, k, i):
        a, b = x[k] - x[j], x[i] - x[j]
        lengths = float(a.norm() * b.norm())
        return float(a @ b) / lengths if lengths else 0.0

    rows = range(len(student))
    total = sum(huber(cosine(student, j, k, i) - cosine(teacher, j, k, i)) for j in rows for k in rows for i in rows)
    return total / len(student) ** 3


@pytest.mark.parametrize(("rows", "width", "other"), [(3, 1, 1), (4, 63, 63), (7, 3, 5)])
def test_equals_loop(rows, width, other):
    student, teacher = random_pair(rows, width)[0].image.detach(), random_pair(rows, other)[1].image
    assert relational_distance_loss(student, teacher).item() == pytest.approx(distance_oracle(student, teacher), rel=1e-10)
    assert relational_angle_loss(student, teacher).item() == pytest.approx(angle_oracle(student, teacher), rel=1e-10, abs=1e-15)
    far = torch.cat([student[:-1], 50 * student[-1:]])  # beyond the bend of Huber's loss
    assert relational_distance_loss(far, teacher).item() == pytest.approx(distance_oracle(far, teacher), rel=1e-10)


def test_drawn_triplets_are_unbiased():
    """Mean value and gradient over many draws, within four standard errors."""
    student, teacher = (one.image for one in random_pair(5, 3))
    whole = relational_angle_loss(student, teacher)
    (gradient,) = torch.autograd.grad(whole, student)
    values, gradients = [], []
    for seed in range(600):
        value = relational_angle_loss(student, teacher, max_triplets=4, seed=seed)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, student)[0])
    for drawn, exact in ((torch.stack(values), whole.detach()), (torch.stack(gradients), gradient)):
        error = (drawn.mean(dim=0) - exact).abs() / (drawn.std(dim=0) / len(drawn) ** 0.5)
        assert error.max() < 4
    assert torch.stack(values).std() > 0


def test_drawn_triplets_have_three_different_rows():
    drawn = []
    take = torch.Tensor.__getitem__

    class Spied(torch.Tensor):
        def __getitem__(self, index):
            drawn.append(index.as_subclass(torch.Tensor))
            return take(self.as_subclass(torch.Tensor), index)

    relational_angle_loss(torch.randn(4, 3).as_subclass(Spied), torch.randn(4, 3), max_triplets=20)
    first, vertex, second = drawn[:3]
    triplets = set(zip(vertex.tolist(), first.tolist(), second.tolist(), strict=True))
    assert all(len(set(triplet)) == 3 for triplet in triplets)
    assert len(triplets) > 8


def test_enough_triplets_is_all():
    student, teacher = (one.image for one in random_pair(4, 3))
    whole = relational_angle_loss(student, teacher)
    assert torch.equal(relational_angle_loss(student, teacher, max_triplets=24), whole)
    assert not torch.equal(relational_angle_loss(student, teacher, max_triplets=23), whole)


def test_module_draws_other_triplets_after_each_step_and_resumes():
    pair = random_pair(6, 3)
    term = RelationalAngle(max_triplets=5, seed=3)
    first = term(*pair)
    assert torch.equal(term(*pair), first)
    term.step()
    second = term(*pair)
    assert not torch.equal(second, first)
    resumed = RelationalAngle(max_triplets=5, seed=3)
    resumed.load_state_dict(term.state_dict())
    assert torch.equal(resumed(*pair), second)


@pytest.mark.parametrize(
    ("term", "loss", "minimum"), [(RelationalDistance, relational_distance_loss, 2), (RelationalAngle, relational_angle_loss, 3)]
)
def test_module_is_the_sum_over_modalities(term, loss, minimum):
    student, teacher = random_pair(5, 4)
    units = [[value / value.norm(dim=1, keepdim=True) for value in one] for one in (student, teacher)]
    expected = loss(units[0][0], units[1][0]) + loss(units[0][1], units[1][1])
    torch.testing.assert_close(term()(student, teacher), expected)
    torch.testing.assert_close(term(modalities=("text",))(student, teacher), loss(units[0][1], units[1][1]))
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: expected at least {minimum} samples, got {minimum - 1}"):
        loss(student.image[: minimum - 1], teacher.image[: minimum - 1])


@pytest.mark.parametrize("option", ["max_triplets", "seed"])
@pytest.mark.parametrize("bad", [-1, 1.5, "3", True])
def test_bad_options(option, bad):
    with pytest.raises(ValueError, match=rf"^RelationalAngle: expected {option} as a whole number"):
        RelationalAngle(**{option: bad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[0, 0, 2, 3, 4], [0, 0, 0, 3, 3], [0, 0, 0, 0, 0]])
def test_drawn_triplets_are_unbiased_where_rows_coincide(rows, dtype):
    """In one space alone, in both, and in the teacher alone."""
    student, teacher = (one.image.detach().to(dtype) for one in random_pair(5, 3))
    for one, other in ((student[rows], teacher), (student[rows], teacher[rows]), (student, teacher[rows])):
        whole = relational_angle_loss(one, other).item()
        drawn = torch.stack([relational_angle_loss(one, other, max_triplets=30, seed=seed) for seed in range(400)])
        assert (drawn.mean() - whole).abs() <= 4 * drawn.std() / 400**0.5 + 1e-6


def test_drawn_triplets_that_miss_a_spoiled_row_do_not_hide_it():
    student, teacher = (one.image.detach() for one in random_pair(30, 3))
    student[29] = float("nan")
    assert all(not relational_angle_loss(student, teacher, max_triplets=1, seed=seed).isfinite() for seed in range(5))


@pytest.mark.parametrize("options", [{}, {"max_triplets": 20}])
@pytest.mark.parametrize("apart", [1e-8, 1e-13, 1e-25, 1e-36])
def test_angles_of_rows_that_nearly_coincide_have_a_gradient(apart, options):
    """Their direction counts like every other, whatever the distance."""
    teacher = random_pair(5, 3)[0].image.detach().float()
    far = torch.cat([torch.zeros(1, 3), torch.eye(3), torch.ones(1, 3)])
    near = far.clone()
    near[1] *= apart
    near.requires_grad_()
    value = relational_angle_loss(near, teacher, **options)
    value.backward()
    assert near.grad.isfinite().all()
    limit = far.clone()
    limit[1] *= 1e-5
    assert value.item() == pytest.approx(relational_angle_loss(limit, teacher, **options).item(), rel=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-30, -20, -12, -7, 8, 20, 30])
def test_embeddings_of_any_size(kind, dtype, power):
    """Free of units: small embeddings that differ are not equal, and squares of large ones do not overflow."""
    student, teacher = (one.image.detach().to(dtype) for one in random_pair(5, 3))
    expected = LOSSES[kind](student, teacher)
    resized = (10.0**power * student).requires_grad_()
    found = LOSSES[kind](resized, 10.0**power * teacher)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
    (gradient,) = torch.autograd.grad(found, resized)
    assert gradient.isfinite().all()
    assert gradient.any()

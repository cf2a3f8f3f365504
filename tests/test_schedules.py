"""Schedules: end points, shape, bad numbers; weights balanced by gradient norms."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from batches import random_pair
from torch import nn

from geomreg import Embeddings, FeatureDistillation, WeightedSum
from geomreg.schedules import BalancedWeight, Cosine, Linear, Warmup


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.5, 8.0), (2.0, 2.0)])
def test_end_points_and_monotonicity(kind, start, end):
    values = [kind(start, end, steps=7)(step) for step in range(12)]
    assert values[0] == pytest.approx(start)
    assert values[7:] == pytest.approx([end] * 5)
    assert values == pytest.approx(sorted(values, reverse=start > end))


def test_shapes():
    assert Linear(4.0, 0.0, steps=8)(3) == 2.5
    assert Cosine(4.0, 0.0, steps=8)(3) == pytest.approx(2 * (1 + math.cos(3 * math.pi / 8)))
    assert [Warmup(Linear(4.0, 0.0, steps=8), steps=4)(step) for step in (0, 2, 4, 8)] == [0.0, 1.5, 2.0, 0.0]


def test_pickles():
    schedule = Warmup(Cosine(4.0, 1.0, steps=8), steps=4)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(-1.0, 0.0, steps=1), "Linear: expected start"),
        (lambda: Linear(1.0, float("inf"), steps=1), "Linear: expected end"),
        (lambda: Cosine(1.0, 0.0, steps=0), "Cosine: expected steps as a whole number >= 1"),
        (lambda: Warmup(-1.0, steps=1), "Warmup: expected then"),
        (lambda: Warmup(1.0, steps=1.5), "Warmup: expected steps"),
    ],
)
def test_bad_numbers(build, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


class Slope(nn.Module):
    """A regularizer whose gradient has a given norm for each modality."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, student, teacher=None):
        return sum(self.norm * value.sum() / value.numel() ** 0.5 for value in student if value is not None)

    def step(self):
        return


def run(keep, steps, task=3.0, scale=1.0, rows=4):
    """Steps of a loop with gradients of known norms; the weights in force in each."""
    seen = []
    for _ in range(steps):
        target, reference = (
            Embeddings(torch.zeros(rows, 5, requires_grad=True), torch.zeros(rows, 5, requires_grad=True)) for _ in range(2)
        )
        loss = Slope(task)(keep.watch_task(target)) + keep(reference, None)
        (scale * loss).backward()
        seen.append(keep.weights["slope"])
        assert target.image.grad.norm().item() == pytest.approx(scale * task)
        assert reference.image.grad.norm().item() == pytest.approx(scale * seen[-1] * keep.regularizers["slope"].norm, rel=1e-5)
        keep.step()
    return seen


def balanced(term=0.2, **options):
    return WeightedSum(slope=(BalancedWeight(0.5, **{"warmup": 3, **options}), Slope(term)))


def test_weight_reaches_the_ratio_after_the_warm_up_and_stays():
    assert run(balanced(initial=2.0), 6) == pytest.approx([2.0, 2.0, 2.0, 7.5, 7.5, 7.5])  # 0.5 * 3 / 0.2


def test_loss_scale_cancels():
    assert run(balanced(), 5, scale=1024.0)[-1] == pytest.approx(7.5)


def test_weight_is_capped():
    assert run(balanced(cap=5.0), 5)[-1] == pytest.approx(5.0)


def test_norms_are_averaged_over_steps():
    keep = balanced(decay=0.5)
    run(keep, 4, task=3.0)
    run(keep, 1, task=9.0)
    averages = [0.0]
    for norm in (3.0, 3.0, 3.0, 3.0, 9.0):
        averages.append(0.5 * averages[-1] + 0.5 * norm)
    correction = 1 - 0.5**5
    assert keep.weights["slope"] == pytest.approx(0.5 * (averages[-1] / correction) / 0.2, rel=1e-5)


def test_steps_without_both_gradients_count_for_nothing():
    keep = balanced()
    run(keep, 2)
    before = copy.deepcopy(keep.state_dict())
    keep.watch_task(random_pair()[0])
    keep.step()  # no backward at all
    (float("nan") * (Slope(1.0)(keep.watch_task(random_pair()[0])) + keep(random_pair()[0], None))).backward()
    keep.step()
    run(keep, 0)
    for key, value in keep.state_dict().items():
        if key.startswith("balanced"):
            assert torch.equal(value, before[key]), key


def test_discard_drops_the_gradients_of_a_skipped_step():
    keep, other = balanced(), balanced()
    run(keep, 2)
    run(other, 2)
    Slope(50.0)(keep.watch_task(random_pair()[0])).backward()
    keep.discard()
    assert run(keep, 4) == run(other, 4)


def test_balanced_weight_resumes():
    keep = balanced(decay=0.9)
    run(keep, 5)
    resumed = balanced(decay=0.9)
    resumed.load_state_dict(keep.state_dict())
    assert run(resumed, 3, task=8.0) == run(keep, 3, task=8.0)


def test_balanced_weight_is_fp32_whatever_the_module_is_cast_to():
    keep = balanced()
    run(keep, 5)
    before = keep.weights["slope"]
    keep.to(torch.bfloat16)
    assert keep.balanced["slope"].weight.dtype == torch.float32
    assert keep.weights["slope"] == before


@pytest.mark.parametrize(("watched", "message"), [(False, "of the task's"), (True, "of the term's")])
def test_weight_that_never_balances_warns_once(watched, message):
    keep = WeightedSum(slope=(BalancedWeight(0.5), Slope(1.0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(210):
            student = random_pair()[0]
            (Slope(1.0)(keep.watch_task(student)) if watched else keep(student)).backward()
            keep.step()
    assert len(caught) == 1
    assert message in str(caught[0].message)


def test_watching_changes_no_gradient_and_survives_missing_modalities():
    student, teacher = random_pair()
    keep = WeightedSum(fd=(BalancedWeight(1.0, initial=2.0), FeatureDistillation()))
    one, other = Embeddings(student.image), Embeddings(teacher.image)
    (watched,) = torch.autograd.grad(keep(keep.watch_task(one), other), student.image)
    (plain,) = torch.autograd.grad(2.0 * FeatureDistillation()(one, other), student.image)
    torch.testing.assert_close(watched, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "expected ratio as a finite number > 0"),
        ({"initial": -1.0}, "expected initial as a finite number > 0"),
        ({"cap": float("inf")}, "expected cap as a finite number > 0"),
        ({"warmup": 0}, "expected warmup as a whole number >= 1"),
        ({"decay": 1.5}, "expected decay between 0 and 1"),
        ({"decay": 1.0}, "expected decay between 0 and 1"),
    ],
)
def test_bad_balance(options, message):
    with pytest.raises(ValueError, match=f"^BalancedWeight: {message}"):
        BalancedWeight(**{"ratio": 1.0, **options})

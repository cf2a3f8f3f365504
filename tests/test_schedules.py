"""Schedules: end points, shape, bad numbers."""

import math
import pickle

import pytest

from geomreg.schedules import Cosine, Linear, Warmup


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

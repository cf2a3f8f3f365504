"""What the first steps show, from records made up for it."""

import math
from types import SimpleNamespace

import pytest

from geomreg.integrations.recipes.config import MethodConfig, TermConfig
from geomreg.integrations.recipes.evaluate import interval
from geomreg.integrations.recipes.trial import HIGH, LOW, advice, base_lines, unusual_weights


def entries(losses, ratios=()):
    found = [{"loss": loss} for loss in losses]
    for entry, ratio in zip(found, ratios, strict=False):
        entry["gradient_ratio"] = ratio
    return found


@pytest.mark.parametrize(
    ("losses", "ratios", "every", "told"),
    [
        ([2.0, 1.9, 1.8, 1.7], [0.0, 0.2, 0.3, 0.3], 1, []),
        ([2.0, 1.9, 1.8, 1.7], [0.0, 0.2, 0.3, LOW / 2], 1, ["near 0"]),
        ([2.0, 1.9, 1.8, 1.7], [0.0, 0.2, 0.3, HIGH * 2], 1, ["far above 1"]),
        ([2.0, 9.0, 1.8, 1.7], [0.0, 0.2, 0.3, 0.3], 1, ["the loss rose to 9 "]),
        ([2.0, 9.0, 8.0, 7.0], [0.0, 0.0, 0.0, 0.0], 1, ["the loss rose to 9 ", "near 0"]),
        ([2.0, 1.9, 1.8, 1.7], [], 1, []),  # terms on weights, or none
        ([0.0, 0.0, 0.0, 0.0], [math.nan] * 4, 1, []),
        ([2.0] * 4, [0.0, 0.0, 0.9, 0.0], 2, []),  # the steps between have no regularizer
        ([2.0] * 4, [0.0, 0.0, 0.001, 0.0], 2, ["near 0"]),
        ([2.0] * 4, [0.0, 0.0, 3 * HIGH, 0.0], 2, ["far above 1"]),
        ([2.0] * 4, [0.0, 0.0, 0.0, 0.0], 4, []),  # only the first, where student and teacher are equal
    ],
)
def test_advice(losses, ratios, every, told):
    lines = advice(entries(losses, ratios), every, trains=1e-5)
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert line.startswith("! ")
        assert part in line
        assert "1e-05" in line


@pytest.mark.parametrize(
    ("term", "weight", "options", "told"),
    [
        ("DiVE", 1000.0, {}, None),
        ("DiVE", 300.0, {}, None),
        ("DiVE", 100.0, {}, "the weight 100 of keep is far below what is usual for DiVE, 1000: little will be kept"),
        ("DiVE", 10.0, {"normalize": False}, None),  # of other units
        ("AverageVectorLoss", 1e5, {}, "the weight 100000 of keep is far above what is usual for AverageVectorLoss, 1000: "),
        ("FeatureDistillation", 50.0, {}, "the weight 50 of keep is far below what is usual for FeatureDistillation, 1000 to 2000: "),
        ("ProjectionOrthogonality", 1e9, {}, None),  # of no method
    ],
)
def test_weights_far_from_those_of_the_methods(term, weight, options, told):
    for role in ("terms", "target_terms"):
        method = MethodConfig("mine", **{role: {"keep": TermConfig(term, weight, options)}})
        lines = unusual_weights(SimpleNamespace(method=method))
        assert len(lines) == (told is not None)
        assert all(line.startswith(f"! {told}") for line in lines)


def test_interval():
    """Wilson's, against the values that Newcombe (1998) prints in his table 1."""
    for found, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert interval(found, count) == pytest.approx((low, high), abs=1e-4)
    assert interval(20, 20)[1] == 1.0


def test_lines_of_the_base_model():
    scores = {"id": {"accuracy": 50.0, "samples": 20.0, "broken": 0.0}, "part": {"accuracy": 100.0, "samples": 8.0, "broken": 2.0}}
    assert base_lines(scores, {"id": 20, "part": 500}) == [
        "id: 50.0 % of 20 samples (29.9 to 70.1 % with 95 % confidence)",
        "part: 100.0 % of a random 8 of 500 samples (67.6 to 100.0 % with 95 % confidence), 2 broken",
    ]

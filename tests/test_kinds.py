"""What tells one function from another: equal for functions that do the same, at each step of a loop, and not for others."""

import gc

import pytest
import torch
from torch import nn

from geomreg.kinds import kind


def scaled(factor):
    return lambda x: factor * x


def logged(record, loss):
    return lambda x: record.append(loss(x))


def test_functions_made_anew_at_each_step_are_equal():
    loss, record = nn.MSELoss(), []
    first = kind(logged(record, loss))
    record += [1.0, torch.ones(())]
    assert kind(logged(record, loss)) == first
    assert kind(scaled(torch.ones(2))) == kind(scaled(torch.zeros(2)))


@pytest.mark.parametrize("other", [2, "sum", True, nn.MSELoss(), {"reduction": "sum"}, ("sum",), scaled(2.0)], ids=str)
def test_what_a_function_holds_counts(other):
    assert kind(scaled(other)) == kind(scaled(other))
    for another in (1, "mean", False, nn.MSELoss(), {"reduction": "mean"}, ("mean",), scaled(1.0)):
        assert kind(scaled(other)) != kind(scaled(another))


def test_coarse_leaves_out_numbers_strings_and_what_containers_hold():
    assert kind(scaled(1), coarse=True) == kind(scaled(2), coarse=True)
    assert kind(scaled(nn.MSELoss()), coarse=True) == kind(scaled(nn.MSELoss()), coarse=True)
    assert kind(scaled("sum"), coarse=True) == kind(scaled("mean"), coarse=True)
    assert kind(scaled(["a"]), coarse=True) == kind(scaled(["b", "c"]), coarse=True)
    assert kind(scaled(True), coarse=True) != kind(scaled(False), coarse=True)
    assert kind(scaled(len), coarse=True) != kind(scaled(nn.MSELoss()), coarse=True)


def test_objects_are_told_apart_and_not_kept_alive():
    known = {kind(nn.MSELoss()) for _ in range(3)}
    gc.collect()
    assert len(known) == 3
    assert kind(nn.MSELoss()) not in known

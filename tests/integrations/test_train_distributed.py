"""Two gloo processes with half a batch each end with the weights of one process with the whole batch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import announce, free_port
from test_train import SETTINGS, model, stream

from geomreg import DiVE, Teacher, WeightedSum
from geomreg.integrations.recipes.train import encode, finetune


def repeating(batches):
    """Captions that repeat, on one rank more than on the other."""
    for batch in batches:
        yield batch | {"text": batch["text"][[0, 1, 0, 2, 0, 5]]}


def part_of(batches, rank: int, ranks: int):
    return lambda start: ({key: value[rank::ranks] for key, value in batch.items()} for batch in batches)


VARIANTS = ({}, {"chunk_size": 2}, {"unique_texts": True}, {"chunk_size": 2, "unique_texts": True})


def run(rank: int, ranks: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Final weights and running mean of FLYP + DiVE on this rank's part of every batch."""
    student = model()
    keep, log = WeightedSum(dive=(7.0, DiVE())), []
    finetune(
        student,
        part_of(repeating(stream(1, size=6)), rank, ranks),
        dataclasses.replace(SETTINGS, **options),
        regularizer=keep,
        reference=part_of(stream(2, size=4), rank, ranks),
        teacher=Teacher(student, encode),
        accelerator=Accelerator(cpu=True),
        on_step=lambda entry: log.append([entry["loss"], entry["dive"]]),
    )
    return {**student.state_dict(), "running mean": keep.regularizers["dive"].mean, "log": torch.tensor(log)}


def worker(rank: int, ranks: int, port: int, folder: str) -> None:
    announce(rank, ranks, port)
    torch.save([run(rank, ranks, options) for options in VARIANTS], Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    whole = run(0, 1, {})
    mp.spawn(worker, args=(2, free_port(), str(tmp_path)), nprocs=2)
    results = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    before = model().state_dict()
    for options, (first, second) in zip(VARIANTS, results, strict=True):
        assert any(not torch.equal(value, before[key]) for key, value in first.items() if key in before)
        for key, value in whole.items():
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=f"ranks differ in {key} with {options}")
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7, msg=f"{key} with {options}")

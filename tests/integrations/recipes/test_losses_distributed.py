"""Every target loss in two gloo processes, with all weights or shards of them, against one process on the whole batches."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import announce, free_port
from test_losses import SETTINGS, batches, images, parts, prepared

from geomreg.integrations.recipes.shard import Sharded
from geomreg.integrations.recipes.train import finetune

VARIANTS = [(kind, chunk_size, sharded) for kind in ("head", "texts", "captions") for chunk_size in (None, 2) for sharded in (False, True)]


def part_of(stream, rank, ranks):
    return lambda start: ({key: value[rank::ranks] for key, value in batch.items()} for batch in stream(start))


def run(rank, ranks, kind, chunk_size, sharded):
    """Weights at the end, the mean of which is taken, and what was logged."""
    one, loss = prepared(kind)
    accelerator, log, extra = Accelerator(cpu=True), [], parts(kind, one)
    spread = Sharded(one, accelerator, (extra["regularizer"], extra["target_regularizer"])) if sharded else None
    settings = dataclasses.replace(SETTINGS, chunk_size=chunk_size, average_every=2, clip_norm=1.0)
    finetune(
        one, part_of(batches(1), rank, ranks), settings, loss=loss, reference=part_of(images(2), rank, ranks), accelerator=accelerator,
        sharded=spread, on_step=log.append, **extra,
    )  # fmt: skip
    keys = ("loss", "regularizer", "context", "fd/weighted", "gradient_ratio")
    return {**one.state_dict(), "log": torch.tensor([[entry[key] for key in keys] for entry in log[1:]])}  # at the first no term pulls


def worker(rank, ranks, port, folder):
    announce(rank, ranks, port)
    torch.save([run(rank, ranks, *variant) for variant in VARIANTS], Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    whole = {kind: run(0, 1, kind, None, False) for kind in ("head", "texts", "captions")}
    mp.spawn(worker, args=(2, free_port(), str(tmp_path)), nprocs=2)
    results = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    for variant, (first, second) in zip(VARIANTS, results, strict=True):
        for key, value in whole[variant[0]].items():
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=f"ranks differ in {key} with {variant}")
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7, msg=f"{key} with {variant}")

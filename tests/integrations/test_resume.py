"""A run that was killed, however often, ends as one that was left alone: bit by bit."""

import dataclasses
import json
import time

import pytest
import torch
from accelerate import Accelerator
from killing import killed_until_done
from test_train import batches, model

from geomreg import DiVE, FeatureDistillation, Teacher, WeightedSum
from geomreg.integrations.recipes import checkpoint
from geomreg.integrations.recipes.train import Checkpoints, RunStoppedError, Settings, encode, finetune
from geomreg.schedules import Linear

SETTINGS = Settings(steps=12, learning_rate=1e-3, warmup_steps=3, clip_norm=1.0, chunk_size=3, regularize_every=2)


def student():
    """In fp32, with dropout of patches."""
    found = model().float()
    found.visual.patch_dropout = torch.nn.Dropout(0.3)
    return found


def run(folder, *, settings=SETTINGS, every=1, pause=0.0, stop_after=None, checkpoints=True):
    """Train, write a line for each step, and return the final weights and mean."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    one = student()
    keep = WeightedSum(dive=(Linear(5.0, 1.0, steps=8), DiVE(decay=0.5)), fd=(1.0, FeatureDistillation()))

    def on_step(entry):
        time.sleep(pause)
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pairs(seed):
        return lambda start: ({key: x.float() if key == "image" else x for key, x in b.items()} for b in batches(seed)(start))

    finetune(
        one, pairs(1), settings, regularizer=keep, reference=pairs(2), teacher=Teacher.averaged(one, encode, decay=0.9),
        accelerator=Accelerator(cpu=True), checkpoints=Checkpoints(folder, every, keep=2) if checkpoints else None, on_step=on_step,
        should_stop=lambda: stop_after is not None and len(lines(folder)) >= stop_after - 1,
    )  # fmt: skip
    return {**one.state_dict(), "mean": keep.regularizers["dive"].mean}


def lines(folder):
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_of_each_step(folder):
    return list({entry["step"]: entry for entry in lines(folder)}.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run without checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, checkpoints=False), lines(folder)


def equal(folder, found, whole):
    state, log = whole
    assert last_of_each_step(folder) == log
    for key, value in state.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("every", [1, 5])
def test_checkpoints_change_nothing(tmp_path, whole, every):
    equal(tmp_path, run(tmp_path, every=every), whole)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        ["step-000000011", "step-000000012"],
        ["step-000000010", "step-000000012"],
    ][every > 1]


@pytest.mark.parametrize("every", [1, 3])
def test_stopped_and_resumed(tmp_path, whole, every):
    for stop_after in (4, 7):
        with pytest.raises(RunStoppedError, match=f"^finetune: stopped after step {stop_after} of 12"):
            run(tmp_path, every=every, stop_after=stop_after)
        assert checkpoint.latest(tmp_path).name == f"step-{stop_after:09d}"
    equal(tmp_path, run(tmp_path, every=every), whole)
    before = lines(tmp_path)
    equal(tmp_path, run(tmp_path, every=every), whole)  # nothing is left to do
    assert lines(tmp_path) == before


def killed(folder, pause, every):
    run(folder, pause=pause, every=every)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, whole):
    """SIGKILL after some steps and some milliseconds, and in the midst of saves."""
    assert killed_until_done(killed, tmp_path, 0.06, 2, first=0.3, more=0.13) >= 2
    equal(tmp_path, run(tmp_path), whole)


def test_killed_while_saving(tmp_path, whole, monkeypatch):
    """At every file of a checkpoint, and at its naming."""
    count, real = 0, checkpoint._to_disk

    def to_disk(path):
        nonlocal count
        count += 1
        if count % 17 == 0:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(checkpoint, "_to_disk", to_disk)
    interruptions = 0
    for _ in range(100):
        try:
            found = run(tmp_path, every=1)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 5
    equal(tmp_path, found, whole)


@pytest.mark.parametrize(
    ("change", "message"), [({"steps": 13}, "steps 12, got 13"), ({"learning_rate": 2e-3}, "learning_rate 0.001, got 0.002")]
)
def test_other_settings_are_refused(tmp_path, change, message):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"^finetune: expected the run in {tmp_path} to go on with {message}"):
        run(tmp_path, settings=dataclasses.replace(SETTINGS, **change))


def test_damaged_checkpoint(tmp_path, whole):
    with pytest.raises(RunStoppedError):
        run(tmp_path, stop_after=3)
    newest = checkpoint.latest(tmp_path)
    (newest / "optimizer.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match=rf"expected the checkpoint {newest} as it was written, got another content of optimizer"):
        equal(tmp_path, run(tmp_path), whole)  # from the one before
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000000011", "step-000000012"]
    for path in checkpoint.checkpoints(tmp_path):
        (path / "checksums.json").unlink()  # as an older geomreg wrote them
    with (
        pytest.warns(UserWarning, match=r"an older geomreg wrote none"),
        pytest.raises(
            RuntimeError, match=r"^finetune: expected a whole checkpoint in \S*, got step-000000012 with no checksums.json .* delete"
        ),
    ):
        run(tmp_path)

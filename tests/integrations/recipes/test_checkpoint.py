"""Checkpoints come back as they were written, or not at all."""

import json
import random

import numpy as np
import pytest
import torch

from geomreg.integrations.recipes import checkpoint


def trained_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return type(one) is type(two) and one == two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float64])
def test_round_trip_of_tensors(tmp_path, dtype):
    value = {"a": torch.ones(3, 2).T.to(dtype), "b": [torch.tensor(1).to(dtype), torch.zeros(0).to(dtype)]}
    value["c"] = value["a"]  # one storage under two names
    checkpoint.write(tmp_path, "state", value)
    assert same(checkpoint.read(tmp_path, "state"), value)


def test_round_trip_of_an_optimizer(tmp_path):
    model, optimizer = trained_optimizer()
    checkpoint.write(tmp_path, "optimizer", optimizer.state_dict())
    found = checkpoint.read(tmp_path, "optimizer")
    assert set(found["state"]) == {0, 1, 2, 3}  # whole numbers stay so
    twin, again = trained_optimizer()
    again.load_state_dict(found)
    twin.load_state_dict(model.state_dict())
    for one, other in ((model, optimizer), (twin, again)):
        one(torch.ones(2, 3)).sum().backward()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_other_values(tmp_path):
    value = {"a": None, "b": [1, 2.5, "text", True, float("inf")], 3: {"c": -0.0, "": {}}, "tensor": {"items": 1}}
    checkpoint.write(tmp_path, "state", value)
    assert same(checkpoint.read(tmp_path, "state"), value)
    assert not (tmp_path / "state.safetensors").exists()
    with pytest.raises(TypeError, match=r"expected numbers, strings and tensors in a checkpoint, got set at state\.a\.0"):
        checkpoint.write(tmp_path, "state", {"a": [{1, 2}]})


def test_random_state_goes_on(tmp_path):
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)], np.random.randn()

    np.random.randn()  # leaves a second normal number behind
    random.gauss(0, 1)
    checkpoint.write(tmp_path, "random", checkpoint.random_state())
    expected = draws()
    checkpoint.set_random_state(checkpoint.read(tmp_path, "random"))
    assert draws() == expected


def test_only_finished_checkpoints_count(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 200):
        folder = checkpoint.begin(tmp_path, step)
        checkpoint.write(folder, "state", {"step": step})
        if step < 200:
            checkpoint.publish(folder, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000000010"]
    assert checkpoint.read(checkpoint.latest(tmp_path), "state") == {"step": 10}
    folder = checkpoint.begin(tmp_path, 10)
    checkpoint.write(folder, "state", {"step": "again"})
    checkpoint.publish(folder)
    assert checkpoint.read(checkpoint.latest(tmp_path), "state") == {"step": "again"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


def test_damage_is_named(tmp_path):
    checkpoint.write(tmp_path, "state", {"a": torch.ones(100)})
    with pytest.raises(RuntimeError, match=r"expected process-1.json in the checkpoint .* Resume with as many processes"):
        checkpoint.read(tmp_path, "process-1")
    with pytest.raises(
        RuntimeError, match=r"expected run.json in the checkpoint .*, got none. Remove it: the run goes on from the one before"
    ):
        checkpoint.read(tmp_path, "run")
    content = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(content[:-8])
    with pytest.raises(RuntimeError, match=r"expected a whole checkpoint in .*, got a damaged state"):
        checkpoint.read(tmp_path, "state")
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(RuntimeError, match="got a damaged state"):
        checkpoint.read(tmp_path, "state")
    (tmp_path / "state.json").write_text(json.dumps({"items": 3}))
    with pytest.raises(RuntimeError, match="got a damaged state"):
        checkpoint.read(tmp_path, "state")


@pytest.mark.filterwarnings("ignore:finetune. expected the checkpoint")
def test_any_bit_of_a_checkpoint_counts(tmp_path):
    """One flipped, a file cut off, gone, or in another's place: the checkpoint before is the latest."""
    for step in (1, 2):
        folder = checkpoint.begin(tmp_path, step)
        for name in ("model", "optimizer"):
            checkpoint.write(folder, name, {"a": torch.full((5,), float(step)), "name": name})
        checkpoint.publish(folder)
    first, second = checkpoint.checkpoints(tmp_path)
    assert checkpoint.latest(tmp_path) == second
    generator, files = random.Random(0), {path: path.read_bytes() for path in second.iterdir()}
    for path, content in files.items():
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        for damage in (bytes(changed), content[:-1], None, files[second / "optimizer.json"] + b" "):
            path.unlink() if damage is None else path.write_bytes(damage)
            assert checkpoint.latest(tmp_path) == first, (path, damage)
            path.write_bytes(content)
    assert checkpoint.latest(tmp_path) == second
    (first / "model.json").write_text("{}")
    (second / "model.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"expected a whole checkpoint in \S*, got step-000000002 with another content of model.json"):
        checkpoint.latest(tmp_path)
    folder = checkpoint.begin(tmp_path, 1)
    checkpoint.write(folder, "model", {})
    (folder / ".tmpAbCdEf").write_bytes(b"half")  # safetensors', of a process that was killed
    checkpoint.publish(folder, keep=1)  # the run has gone back
    assert {path.name for path in checkpoint.latest(tmp_path).iterdir()} == {"model.json", "checksums.json"}
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000000001"]

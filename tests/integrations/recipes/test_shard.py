"""Two gloo processes that share the weights (FSDP2) end as one process that has all of them."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from processes import announce, free_port
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from geomreg import AverageVectorLoss, DiVE, Embeddings, ProjectionOrthogonality, Teacher, WeightAnchor, WeightedSum, backward
from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes import checkpoint, shard
from geomreg.integrations.recipes.models import Lora, ModelConfig, freeze
from geomreg.integrations.recipes.shard import Sharded, check_launch
from geomreg.integrations.recipes.train import Checkpoints, RunStoppedError, Settings, encode, finetune

RANKS = 2
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 8, "vocab_size": 63, "width": 32, "heads": 2, "layers": 2}  # 63: ranks hold parts of different size
SETTINGS = Settings(steps=4, learning_rate=1e-3, warmup_steps=2)


def model() -> nn.Module:
    """In fp64: some gradients are zero in exact arithmetic (key biases), and Adam would amplify fp32 rounding there."""
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT, output_dict=True).double()


def stream(seed: int, size: int, only: tuple[str, ...] = ("image", "text")):
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.randn(size, 3, 16, 16, generator=generator).double()
        batch = {"image": images, "text": torch.randint(1, 62, (size, 8), generator=generator)}
        yield {key: batch[key] for key in only}


def batches(seed: int, size: int, rank: int, ranks: int, only: tuple[str, ...] = ("image", "text")):
    """This rank's rows, from any step on; every batch repeats two captions."""

    def part(start: int):
        for batch in itertools.islice(stream(seed, size, only), start, None):
            if size == 6:
                batch["text"] = batch["text"][[0, 1, 0, 2, 0, 5]]
            yield {key: value[rank::ranks] for key, value in batch.items()}

    return part


def dive(one: nn.Module) -> dict[str, Any]:
    return {"regularizer": WeightedSum(dive=(7.0, DiVE())), "teacher": Teacher(one, encode)}


def averaged(one: nn.Module) -> dict[str, Any]:
    return {**dive(one), "teacher": Teacher.averaged(one, encode, decay=0.5)}


def on_weights(one: nn.Module) -> dict[str, Any]:
    """Terms on weights, on both batches; importances that differ."""
    fisher = {name: torch.linspace(0, 2, value.numel()).view_as(value).double() for name, value in one.named_parameters()}
    with torch.no_grad():  # anchors that are not where the run starts
        before = {name: value.clone() for name, value in one.named_parameters()}
        for value in one.parameters():
            value += 0.01
        anchor, important = WeightAnchor(one), WeightAnchor(one, fisher=fisher, exclude=("visual.transformer",))
        for name, value in one.named_parameters():
            value.copy_(before[name])
    return {
        "target_regularizer": WeightedSum(
            anchor=(3.0, anchor), projection=(0.5, ProjectionOrthogonality(one.visual.proj, one.text_projection))
        ),
        "regularizer": WeightedSum(dive=(7.0, DiVE()), important=(2.0, important)),
        "teacher": Teacher(one, encode),
    }


def with_adapters(one: nn.Module) -> dict[str, Any]:
    freeze(one, ModelConfig("x", lora=Lora(rank=2), logit_scale="frozen"))
    with torch.no_grad():  # as after some steps: else the first gradient of half the adapters is zero
        for name, value in one.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.linspace(-0.1, 0.1, value.numel()).view_as(value))
    return {**dive(one.double()), "teacher": Teacher.adapters_off(one, encode)}


def texts_only(one: nn.Module) -> dict[str, Any]:
    return {"regularizer": WeightedSum(keep=(5.0, AverageVectorLoss())), "teacher": Teacher(one, encode)}


def frozen_texts(one: nn.Module) -> dict[str, Any]:
    freeze(one, ModelConfig("x", frozen=("text",)))
    return dive(one)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "flyp": (lambda one: {}, {}),
    "flyp in chunks": (lambda one: {}, {"chunk_size": 2}),
    "dive": (dive, {"clip_norm": 0.5}),
    "dive in chunks": (dive, {"chunk_size": 2, "regularize_every": 2}),
    "averaged teacher": (averaged, {"unique_texts": True, "clip_norm": 100.0}),
    "terms on weights": (on_weights, {}),
    "terms on weights in chunks": (on_weights, {"chunk_size": 2, "clip_norm": 0.5}),
    "adapters": (with_adapters, {"chunk_size": 2}),
    "captions alone": (texts_only, {"chunk_size": 1}),
    "frozen text tower": (frozen_texts, {"chunk_size": 2}),
}


def run(name: str, rank: int, ranks: int, *, folder: Path | None = None, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Final weights, running mean and log of a case on this rank's part of every batch."""
    build, options = CASES[name]
    student, log = model(), []
    parts = build(student)
    before = copy.deepcopy(student.state_dict())
    accelerator = Accelerator(cpu=True)
    terms = [parts.get(key) for key in ("regularizer", "target_regularizer")]
    only = ("text",) if build is texts_only else ("image", "text")
    found = finetune(
        student,
        batches(1, 6, rank, ranks),
        dataclasses.replace(SETTINGS, **options),
        reference=batches(2, 4, rank, ranks, only) if "regularizer" in parts else None,
        accelerator=accelerator,
        sharded=Sharded(student, accelerator, terms) if ranks > 1 else None,
        checkpoints=None if folder is None else Checkpoints(folder, 10),
        on_step=lambda entry: log.append(list(entry.values())),
        should_stop=lambda: stop_after is not None and len(log) == stop_after - 1,
        **parts,
    )
    assert found is student
    assert not student.training
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    end = {key: value.clone() for key, value in student.state_dict().items()}
    if parts.get("teacher") is not None:
        end |= {f"teacher {key}": value for key, value in parts["teacher"].state_dict().items()}
    for one in terms:
        end |= {f"term {key}": value for key, value in (() if one is None else one.state_dict().items())}
    return {**end, "log": torch.tensor([value for entry in log for value in entry], dtype=torch.float64)}


def stopped_and_resumed(name: str, rank: int, folder: Path) -> dict[str, torch.Tensor]:
    try:
        run(name, rank, RANKS, folder=folder, stop_after=2)
    except RunStoppedError:
        return run(name, rank, RANKS, folder=folder)
    raise AssertionError("the run did not stop")


def one_step(rank: int, ranks: int, chunk_size: int) -> dict[str, torch.Tensor]:
    """Gradients of a loss with a classifier that is a part of the model but used outside of its forward pass."""
    one, accelerator = model(), Accelerator(cpu=True)
    one.classifier = nn.Linear(24, 3).double()
    sharded = Sharded(one, accelerator) if ranks > 1 else None
    trained = one if sharded is None else sharded.model
    batch = next(batches(3, 8, rank, ranks)(0))

    def loss(embeddings: Embeddings) -> torch.Tensor:
        head = nn.functional.cross_entropy(one.classifier(embeddings.image), torch.zeros(len(embeddings.image), dtype=torch.long))
        return head * one.logit_scale.exp() + 0.0 * embeddings.text.sum()

    declared = [one.logit_scale, *one.classifier.parameters()] if sharded is None else sharded.declared()
    backward(lambda part: encode(trained, part), batch, loss, chunk_size=chunk_size, model=trained, parameters=declared)
    if sharded is not None:
        sharded.finish_gradients(None)
    return {
        name: value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad.clone()
        for name, value in trained.named_parameters()
        if value.grad is not None
    }


def mechanics(rank: int) -> dict[str, Any]:
    """What is sharded, that bf16 keeps its tail, and that only the main process gathers."""
    one = model().float()
    sharded = Sharded(one, Accelerator(cpu=True))
    batch = {"image": next(stream(5, 3))["image"].float(), "text": next(stream(5, 3))["text"]}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, spread = (embed(which.eval(), batch["image"], batch["text"]) for which in (one, sharded.model))
    before = copy.deepcopy(one.state_dict())
    with torch.no_grad():
        for value in sharded.parts:
            value.to_local().add_(1.0)
    sharded.gather()
    moved = [torch.allclose(value, before[name] + 1.0) for name, value in one.state_dict().items() if name != "logit_scale"]
    still = [torch.equal(value, before[name]) for name, value in one.state_dict().items()]
    return {
        "units": [name for name, module in sharded.model.named_modules() if isinstance(module, FSDPModule)],
        "whole": [name for name, value in sharded.model.named_parameters() if not isinstance(value, DTensor)],
        "held": sum(value.to_local().numel() for value in sharded.parts),
        "bf16": [(a.dtype, torch.equal(a, b)) for a, b in zip(plain, spread, strict=True)],
        "gathered": (all(moved), all(still)),
    }


def worker(rank: int, port: int, folder: str) -> None:
    announce(rank, RANKS, port)
    results = {name: run(name, rank, RANKS) for name in CASES}
    results |= {f"resumed {name}": stopped_and_resumed(name, rank, Path(folder) / name) for name in RESUMED}
    results |= {f"step {size}": one_step(rank, RANKS, size) for size in (1, 10)}
    torch.save({**results, "mechanics": mechanics(rank)}, Path(folder) / f"{rank}.pt")


RESUMED = ("dive in chunks", "averaged teacher", "terms on weights", "adapters")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both processes' results."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(free_port(), str(folder)), nprocs=RANKS)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return found, folder


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    """accelerate keeps one state for the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(results, name):
    whole = run(name, 0, 1)
    ranks = [result[name] for result in results[0]]
    assert whole.keys() == ranks[0].keys()
    for key, value in whole.items():
        torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0, msg=f"ranks differ in {key}")
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_is_bitwise_the_same(results, name):
    (found, _), folder = results, results[1]
    for result in found:
        whole, resumed = result[name], result[f"resumed {name}"]
        logged = resumed["log"]
        assert 0 < len(logged) < len(whole["log"])
        assert torch.equal(whole["log"][-len(logged) :], logged)
        for key, value in whole.items():
            assert key == "log" or torch.equal(value, resumed[key]), key
    newest = checkpoint.latest(folder / name)
    assert sorted(path.stem for path in newest.glob("process-*.json")) == ["process-0", "process-1"]
    saved = checkpoint.read(newest, "model")
    assert saved.keys() == {key for key in found[0][name] if key != "log" and not key.startswith(("teacher ", "term "))}
    assert all(torch.equal(value, found[0][name][key]) for key, value in saved.items())  # whole, in the layout of a run without shards


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 10])
def test_a_classifier_outside_of_the_forward_pass(results, size):
    whole = one_step(0, 1, size)
    assert whole["classifier.weight"].any()
    for result in results[0]:
        found = result[f"step {size}"]
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_mechanics(results):
    first, second = (result["mechanics"] for result in results[0])
    blocks = [f"{tower}transformer.resblocks.{k}" for tower in ("visual.", "") for k in range(2)]
    assert sorted(first["units"]) == sorted(["", *blocks])
    assert first["whole"] == ["logit_scale"]
    total = sum(value.numel() for value in model().parameters()) - 1
    assert first["held"] + second["held"] == total
    assert first["held"] < 0.6 * total
    assert first["bf16"] == second["bf16"] == [(torch.float32, True)] * 2
    assert first["gathered"] == (True, False)
    assert second["gathered"] == (False, True)


def test_what_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    with pytest.raises(ValueError, match=r"^finetune: expected precision bf16 or no for sharded training, got fp16. Use bf16\.$"):
        Sharded(model(), accelerator)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="expected a launch without accelerate's FSDP, got one with it"):
        check_launch(accelerator)
    with pytest.raises(ValueError, match="expected a launch without accelerate's FSDP, got one with it"):
        finetune(model(), batches(1, 6, 0, 1), SETTINGS, accelerator=accelerator)


def test_anchor_of_a_weight_that_nothing_else_moves(monkeypatch):
    """Its gradient is that of the anchor, averaged as FSDP averages."""
    monkeypatch.setattr(shard.dist, "get_world_size", lambda: 2)
    anchor = object.__new__(shard._ShardedAnchor)
    nn.Module.__init__(anchor)
    anchor.live, anchor.leaves = {"w": nn.Parameter(torch.ones(3))}, {"w": torch.ones(3, requires_grad=True)}
    (2 * anchor.leaves["w"].sum()).backward()
    anchor.add_gradients()
    assert anchor.live["w"].grad.tolist() == [1.0, 1.0, 1.0]
    assert anchor.leaves["w"].grad is None

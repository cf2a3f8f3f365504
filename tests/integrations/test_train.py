"""The training loop: equals a loop written out by hand, moves what it should, refuses what it cannot do."""

import copy
import dataclasses
import itertools
import math
import warnings

import open_clip
import pytest
import torch
from accelerate import Accelerator

from geomreg import AverageVectorLoss, CosineAnchor, DiVE, FeatureDistillation, GramStructure, Teacher, WeightedSum
from geomreg.integrations.recipes.train import Settings, encode, finetune

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
SETTINGS = Settings(steps=4, learning_rate=1e-3, warmup_steps=2)


def model() -> torch.nn.Module:
    """In fp64: some gradients are zero in exact arithmetic (key biases), and Adam would amplify fp32 rounding there."""
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT, output_dict=True).double()


def batches(seed: int, size: int = 5):
    """Endless batches from any number on."""
    return lambda start: itertools.islice(stream(seed, size), start, None)


def stream(seed: int, size: int = 5):
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.randn(size, 3, 16, 16, generator=generator).double()
        yield {"image": images, "text": torch.randint(1, 63, (size, 8), generator=generator)}


def by_hand(regularized: bool) -> dict[str, torch.Tensor]:
    student = model().train()
    teacher = copy.deepcopy(student).eval()
    term = DiVE()
    optimizer = torch.optim.AdamW(student.parameters(), lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
    target, reference = stream(1), stream(2)
    for step in range(SETTINGS.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 2))
        optimizer.param_groups[0]["lr"] = SETTINGS.learning_rate * ((step + 1) / 2 if step < 2 else cosine)
        images, texts = encode(student, next(target))
        logits = student.logit_scale.exp() * images @ texts.T
        labels = torch.arange(len(logits))
        loss = (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2
        if regularized:
            batch = next(reference)
            with torch.no_grad():
                frozen = encode(teacher, batch)
            loss = loss + 7.0 * term(encode(student, batch), frozen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        term.step() if regularized else None
    return student.state_dict()


@pytest.mark.parametrize("regularized", [False, True])
def test_equals_a_loop_written_out(regularized):
    student, log = model(), []
    extra = {}
    if regularized:
        extra = {"regularizer": WeightedSum(dive=(7.0, DiVE())), "reference": batches(2), "teacher": Teacher(student, encode)}
    result = finetune(student, batches(1), SETTINGS, accelerator=Accelerator(cpu=True), on_step=log.append, **extra)
    assert result is student
    assert not result.training
    expected = by_hand(regularized)
    for key, value in result.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-10, msg=key)  # updates are 1e-3
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(("dive" in entry) == regularized for entry in log)
    if regularized:
        assert log[0]["regularizer"] < 1e-25  # teacher and student start equal, up to rounding squared
        assert log[1]["regularizer"] == pytest.approx(7.0 * log[1]["dive"])
        assert extra["regularizer"].regularizers["dive"].mean.ndim == 1  # step() was called
        torch.testing.assert_close(extra["teacher"].model.state_dict(), model().state_dict())


def repeating(start: int):
    """Batches whose captions repeat."""
    for batch in batches(1)(start):
        yield batch | {"text": batch["text"][[0, 1, 0, 2, 1]]}


def trained(settings: Settings, *, keep: WeightedSum | None = None, reference=None):
    student = model()
    log: list[dict[str, float]] = []
    finetune(
        student, repeating, settings, accelerator=Accelerator(cpu=True), on_step=log.append, regularizer=keep or sums("plain"),
        reference=reference or batches(2), teacher=Teacher(student, encode),
    )  # fmt: skip
    return student.state_dict(), log


def sums(kind: str) -> WeightedSum:
    """A mean over samples; two that need the whole batch."""
    terms = {
        "plain": {"dive": (7.0, DiVE())},
        "before": {"dive": (7.0, DiVE(decay=0.5, update="before"))},
        "mixed": {"dive": (7.0, DiVE()), "gram": (3.0, GramStructure())},
    }
    return WeightedSum(**terms[kind])


@pytest.mark.parametrize("kind", ["plain", "before", "mixed"])
@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"unique_texts": True}, {"chunk_size": 2, "unique_texts": True}])
def test_savings_change_no_number(kind, options):
    expected, expected_log = trained(SETTINGS, keep=sums(kind))
    state, log = trained(dataclasses.replace(SETTINGS, **options), keep=sums(kind))
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-9, msg=key)  # the mean is fp32
    assert log[-1] == pytest.approx(expected_log[-1], rel=1e-5)


def test_regularizer_on_every_second_step():
    """With twice the weight, on its own sequence of reference batches."""
    constant = itertools.repeat(next(stream(2)))
    drawn = []

    def counted(start):
        for batch in constant:
            drawn.append(batch)
            yield batch

    settings = dataclasses.replace(SETTINGS, regularize_every=2)
    state, log = trained(settings, keep=WeightedSum(fd=(7.0, FeatureDistillation())), reference=counted)
    expected, expected_log = trained(
        SETTINGS, keep=WeightedSum(fd=(lambda step: 14.0 * (step % 2 == 0), FeatureDistillation())), reference=lambda start: constant
    )
    torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-10)
    assert len(drawn) == 2
    assert ["fd" in entry for entry in log] == [True, False, True, False]
    assert 2 * log[2]["regularizer"] == pytest.approx(expected_log[2]["regularizer"])


@pytest.mark.parametrize(("option", "value"), [("chunk_size", 0), ("regularize_every", 0), ("regularize_every", 1.5)])
def test_bad_settings(option, value):
    with pytest.raises(ValueError, match=f"^Settings: expected {option} as a whole number >= 1, got {value}"):
        Settings(steps=1, **{option: value})


def test_a_mean_of_the_start_alone():
    with pytest.raises(ValueError, match=r"^Settings: expected average_every of at most 9 steps, got 10: the mean would be the start"):
        Settings(steps=9, average_every=10)


def test_schedule():
    settings = Settings(steps=110, warmup_steps=10)
    rates = [settings.rate(step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert all(one >= two for one, two in itertools.pairwise(rates[10:]))


def test_clip_norm_limits_the_gradient():
    student = model()
    settings, norms = Settings(steps=1, learning_rate=1e-3, warmup_steps=1, clip_norm=1e-4), []

    def measure(entry):
        norms.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in student.parameters()])).item())

    finetune(student, batches(1), settings, accelerator=Accelerator(cpu=True), on_step=measure)
    assert norms[-1] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("given", [("regularizer",), ("reference", "teacher"), ("regularizer", "reference")])
def test_parts_that_belong_together(given):
    student = model()
    parts = {"regularizer": WeightedSum(dive=(1.0, DiVE())), "reference": batches(2), "teacher": Teacher(student, encode)}
    with pytest.raises(ValueError, match=r"^finetune: expected regularizer, reference and teacher together"):
        finetune(student, batches(1), SETTINGS, accelerator=Accelerator(cpu=True), **{name: parts[name] for name in given})


def test_diverged_loss_stops_before_the_weights_are_spoilt():
    student = model()
    before = copy.deepcopy(student.state_dict())
    batch = next(stream(1))
    with pytest.raises(RuntimeError, match=r"^finetune: expected a finite loss"):
        finetune(student, lambda start: iter([batch | {"image": batch["image"] * math.nan}]), SETTINGS, accelerator=Accelerator(cpu=True))
    torch.testing.assert_close(student.state_dict(), before)


def test_gradient_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"^finetune: expected gradient_accumulation_steps=1, got 2"):
        finetune(model(), batches(1), SETTINGS, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))


def test_skipped_optimizer_step_leaves_the_mean(monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    student, keep = model(), WeightedSum(dive=(7.0, DiVE(update="before")))  # which refuses a second forward
    finetune(student, batches(1), SETTINGS, accelerator=Accelerator(cpu=True), regularizer=keep, reference=batches(2),
             teacher=Teacher(student, encode))  # fmt: skip
    assert not keep.regularizers["dive"].mean.any()


def test_nothing_of_a_run_stays_behind():
    """Runs one after the other on one Accelerator: no model, optimizer or gradient is kept, and no patched forward."""
    accelerator, student = Accelerator(cpu=True), model()
    result = finetune(student, batches(1), SETTINGS, accelerator=accelerator)
    assert accelerator._models == accelerator._optimizers == []
    assert all(p.grad is None for p in result.parameters())
    assert "forward" not in vars(result)


def resnet():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(8, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


def pairs(start):
    for k in itertools.count(start):
        generator = torch.Generator().manual_seed(k)
        yield {"image": torch.randn(6, 3, 32, 32, generator=generator), "text": torch.randint(1, 64, (6, 8), generator=generator)}


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_averaged_teacher_has_statistics_of_its_own(decay):
    """Those that its weights would have left behind on the same target batches; and the terms begin at 0."""
    one = resnet()
    teacher, by_hand = Teacher.averaged(one, encode, decay=decay), copy.deepcopy(one).train()
    batches, entries = pairs(0), []

    def on_step(entry):
        entries.append(entry)
        with torch.no_grad():
            by_hand.encode_image(next(batches)["image"])
            for held, value in zip(by_hand.parameters(), one.parameters(), strict=True):
                held.lerp_(value, 1 - decay)
        for (key, value), expected in zip(teacher.model.state_dict().items(), by_hand.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, msg=key)

    settings = Settings(steps=4, learning_rate=3e-3, warmup_steps=1)
    keep = WeightedSum(dive=(1.0, DiVE()), avl=(1.0, AverageVectorLoss()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(one, pairs, settings, accelerator=Accelerator(cpu=True), on_step=on_step, regularizer=keep, teacher=teacher,
                 reference=lambda start: pairs(50 + start))  # fmt: skip
    assert max(entries[0]["dive"], entries[0]["avl"]) < 1e-9
    assert entries[-1]["avl"] > 1e-9 or decay == 0


@pytest.mark.parametrize("chunk_size", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_terms_on_a_target_with_dropout_are_not_called_a_mistake(chunk_size):
    """Its loss needs training mode; the reference is embedded in evaluation mode and agrees."""
    torch.manual_seed(0)
    one = open_clip.CLIP(embed_dim=24, vision_cfg={**VIT, "patch_dropout": 0.5}, text_cfg=TEXT, output_dict=True).double()
    keep, on_target = WeightedSum(avl=(1.0, AverageVectorLoss())), WeightedSum(cosine=(1.0, CosineAnchor()))
    entries = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(one, batches(1), dataclasses.replace(SETTINGS, chunk_size=chunk_size), accelerator=Accelerator(cpu=True), regularizer=keep,
                 target_regularizer=on_target, teacher=Teacher(one, encode), reference=batches(2), on_step=entries.append)  # fmt: skip
    assert entries[0]["cosine"] > 1e-3
    assert entries[0]["avl"] < 1e-12


@pytest.mark.parametrize("steps", [6, 7])
def test_mean_of_the_weights_has_statistics_of_its_own(steps):
    """Those of a direct pass over the target batches with the mean's weights, not those that the last step left."""
    one = resnet()
    settings = Settings(steps=steps, learning_rate=3e-3, warmup_steps=1, average_every=2)
    kept = []
    finetune(one, pairs, settings, accelerator=Accelerator(cpu=True), on_step=lambda _: kept.append(copy.deepcopy(one.state_dict())))
    direct = copy.deepcopy(one).train()
    layers = [module for module in direct.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for batch in itertools.islice(pairs(0), steps):
            direct.encode_image(batch["image"])
    for key, value in direct.state_dict().items():
        torch.testing.assert_close(one.state_dict()[key], value, msg=key)
    moved = [
        key for key in one.state_dict() if "running_mean" in key and not torch.allclose(kept[-2][key], one.state_dict()[key], rtol=0.1)
    ]
    assert moved
    assert not one.training

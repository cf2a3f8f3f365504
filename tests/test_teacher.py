"""Teacher: frozen, apart from the student, invisible to checkpoints."""

import copy
import pickle
from dataclasses import dataclass

import peft
import pytest
import torch
from golden_cases import case
from torch import Tensor, nn

from geomreg import DiVE, EmbeddingCache, Embeddings, FeatureDistillation, Teacher
from geomreg.schedules import Linear


def encode(model, batch):
    """The same for student and teacher."""
    return Embeddings(image=model(batch))


def student_model(kind="norm"):
    """A small encoder, with or without buffers that move in training."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(6) if kind == "norm" else nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.ReLU(), nn.Linear(6, 3))


def train(model, steps=3):
    """Move every parameter and buffer of a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


BATCH = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
both_kinds = pytest.mark.parametrize("kind", ["norm", "dropout"])


class Stubborn(nn.Linear):
    """Deep copies are the module itself."""

    def __deepcopy__(self, memo):
        return self


class StubbornBuffer(nn.Module):
    """Deep copies keep the buffer's storage."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(3))

    def __deepcopy__(self, memo):
        twin = StubbornBuffer()
        twin.table = self.table[:2]  # a view
        return twin


class Learner(nn.Module):
    """A training module that holds student and teacher."""

    def __init__(self):
        super().__init__()
        self.student = student_model()
        self.teacher = Teacher(self.student, encode)
        self.regularizer = DiVE()


@both_kinds
def test_stays_while_the_student_trains(kind):
    student = student_model(kind)
    teacher = Teacher(student, encode)
    expected = student.eval()(BATCH).detach()
    before = teacher(BATCH).image
    assert torch.equal(before, expected)
    train(student.train())
    assert torch.equal(teacher(BATCH).image, expected)
    assert not torch.allclose(student.eval()(BATCH), expected)
    if kind == "norm":
        assert not torch.equal(student[1].running_mean, teacher.model[1].running_mean)
        assert teacher.model[1].num_batches_tracked == 0


@both_kinds
def test_stays_in_evaluation_mode(kind):
    learner = nn.ModuleDict({"teacher": Teacher(student_model(kind).train(), encode)})
    learner.train()
    learner["teacher"].train()
    assert not learner["teacher"].training
    assert not any(module.training for module in learner["teacher"].model.modules())
    first = learner["teacher"](BATCH).image
    assert torch.equal(learner["teacher"](BATCH).image, first)


def test_gives_ordinary_tensors_without_graph():
    teacher = Teacher(student_model(), encode)
    learner_input = BATCH.clone().requires_grad_()
    image = teacher(learner_input).image
    assert not image.requires_grad
    assert not image.is_inference()
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    teacher.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    with torch.inference_mode():
        teacher(BATCH)
    assert torch.is_grad_enabled()


def test_leaves_the_model_as_it_is():
    student = student_model().train()
    Teacher(student, encode)
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_leaks_nothing_into_its_parent():
    learner = Learner()
    count = len(list(learner.student.parameters()))
    assert len(list(learner.parameters())) == count
    assert all(name.startswith("student.") for name, _ in learner.named_parameters())
    assert set(learner.state_dict()) == {f"student.{key}" for key in learner.student.state_dict()} | {"regularizer.mean"}
    assert not list(learner.teacher.buffers())
    held = {id(parameter) for parameter in learner.teacher.model.parameters()}
    assert not held & {id(parameter) for parameter in learner.parameters()}
    learner.load_state_dict(learner.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_follows_dtype_in_its_parent(dtype):
    learner = Learner()
    learner.to(dtype)
    assert all(parameter.dtype == dtype for parameter in learner.teacher.model.parameters())
    assert learner.teacher.model[1].running_mean.dtype == dtype
    assert learner.teacher(BATCH.to(dtype)).image.dtype == dtype
    assert not any(parameter.requires_grad for parameter in learner.teacher.model.parameters())


def test_average_of_masks_with_infinities():
    """As the attention masks of CLIP's text towers are."""
    student = nn.Linear(2, 2)
    student.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    teacher = Teacher.averaged(student, encode, decay=0.5)
    before = teacher.model.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.step()
    assert torch.equal(teacher.model.mask, student.mask)
    torch.testing.assert_close(teacher.model.weight, before + 0.5)


def test_follows_device_in_its_parent():
    learner = Learner()
    learner.to("meta")
    assert all(tensor.is_meta for tensor in [*learner.teacher.model.parameters(), *learner.teacher.model.buffers()])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_are_frozen_and_apart(duplicate):
    learner = Learner()
    twin = duplicate(learner)
    expected = learner.teacher(BATCH).image
    with torch.no_grad():
        learner.teacher.model[0].weight.zero_()
    assert torch.equal(twin.teacher(BATCH).image, expected)
    twin.train()
    assert not twin.teacher.model.training
    assert not any(parameter.requires_grad for parameter in twin.teacher.model.parameters())


def test_tied_weights_stay_tied_and_apart():
    student = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    student[1].weight = student[0].weight
    teacher = Teacher(student, encode)
    assert teacher.model[1].weight is teacher.model[0].weight
    assert teacher.model[0].weight.data_ptr() != student[0].weight.data_ptr()


@pytest.mark.parametrize("part", [Stubborn(4, 4), StubbornBuffer()], ids=["parameter", "buffer"])
@pytest.mark.parametrize("nested", [True, False])
def test_shared_storage_raises(part, nested):
    model = nn.Sequential(nn.Linear(4, 4), part) if nested else part
    with pytest.raises(ValueError, match=r"^Teacher: expected a copy with storage of its own, got one that shares '"):
        Teacher(model, encode)


def test_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4)).train()
    with pytest.raises(ValueError, match=r"^Teacher"):
        Teacher(model, encode)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_passes_both_modalities_and_the_batch():
    teacher = Teacher(student_model(), lambda model, batch: Embeddings(model(batch["a"]), model(batch["b"])))
    image, text = teacher({"a": BATCH, "b": 2 * BATCH})
    assert torch.equal(image, teacher.model(BATCH))
    assert torch.equal(text, teacher.model(2 * BATCH))


@pytest.mark.parametrize("model", [None, student_model, torch.zeros(2)])
def test_bad_model(model):
    with pytest.raises(TypeError, match=r"^Teacher: expected model as an nn.Module, got"):
        Teacher(model, encode)


def test_bad_encode():
    with pytest.raises(TypeError, match=r"^Teacher: expected encode as a function of \(model, batch\), got None"):
        Teacher(student_model(), None)


@pytest.mark.parametrize("result", [BATCH, (BATCH, BATCH), None])
def test_encode_must_return_embeddings(result):
    with pytest.raises(TypeError, match=r"^Teacher: expected encode to return geomreg.Embeddings, got"):
        Teacher(student_model(), lambda model, batch: result)(BATCH)


@dataclass
class Output:
    """As models of transformers return it."""

    pooler_output: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "what"), [(lambda x: x, "encode to return geomreg.Embeddings"), (Embeddings, "image embeddings as a tensor")]
)
def test_outputs_of_models_are_no_embeddings(wrap, what):
    with pytest.raises(TypeError, match=rf"^Teacher: expected {what}, got Output\. Take its \.pooler_output"):
        Teacher(student_model(), lambda model, batch: wrap(Output(model(batch))))(BATCH)


def test_start_of_training_costs_nothing():
    student, regularizer = student_model().eval(), DiVE(normalize=False)
    teacher = Teacher(student, lambda model, batch: Embeddings(model(batch), model(2 * batch)))
    value = regularizer(Embeddings(student(BATCH), student(2 * BATCH)), teacher(BATCH))
    value.backward()
    assert value.item() == 0
    assert not any(parameter.grad.any() for parameter in student.parameters())


# averaged -------------------------------------------------------------------------------------------------------------


def averaged(model, **options):
    return Teacher.averaged(model, encode, **options)


def test_averaged_moves_in_step_alone_and_by_the_formula():
    model = student_model()
    teacher = averaged(model, decay=0.75)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        train(model)
        before = copy.deepcopy(teacher.model.state_dict())
        teacher(BATCH)
        for key, value in teacher.model.state_dict().items():
            assert torch.equal(value, before[key])
        teacher.step()
        for key, value in model.state_dict().items():
            expected[key] = 0.75 * expected[key] + 0.25 * value if value.is_floating_point() else value.clone()
    for key, value in teacher.model.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_schedule_of_carot():
    """Momentum at the official steps: only each 500 steps, from step 0 on, after which the start keeps 5 %."""
    golden = case("carot", "ema_momentum_schedule")
    hyper = golden["hyper"]
    model = nn.Linear(1, 1, bias=False)
    steps = int(hyper["m_warm_up"] * hyper["num_batches"] * hyper["epochs"])
    schedule = Linear(hyper["m_sche_src"], hyper["m_sche_tar"], steps=steps)
    recorded = golden["outputs"]["at_step"]
    for step, values in recorded.items():
        assert schedule(int(step)) == pytest.approx(values["m"])
    nn.init.zeros_(model.weight)
    teacher = averaged(model, decay=schedule, every=hyper["ema_up_freq"])
    for step in range(501):
        nn.init.ones_(model.weight)
        if step == 500:
            nn.init.zeros_(teacher.model.weight)
        teacher.step()
        if str(step) in recorded:
            assert teacher.model.weight.item() == pytest.approx(recorded[str(step)]["teacher_after_from_0_with_student_1"])
        elif step < 500:
            assert teacher.model.weight.item() == pytest.approx(0.95)


def test_averaged_resumes_exactly_and_leaks_no_parameter():
    model = student_model()
    teacher = averaged(model, decay=Linear(0.1, 0.9, steps=6), every=2)
    for _ in range(3):
        train(model, 1)
        teacher.step()
    saved = copy.deepcopy(teacher.state_dict())
    twin = copy.deepcopy(model)
    resumed = averaged(twin, decay=Linear(0.1, 0.9, steps=6), every=2)
    resumed.load_state_dict(saved)
    assert not list(teacher.parameters())
    for one, other in ((teacher, model), (resumed, twin)):
        torch.manual_seed(5)
        for _ in range(3):
            train(other, 1)
            one.step()
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
    assert torch.equal(teacher(BATCH).image, resumed(BATCH).image)


@pytest.mark.parametrize(
    ("options", "message"), [({"decay": 1.5}, "decay between 0 and 1"), ({"every": 0}, "every as a whole number >= 1")]
)
def test_bad_averages(options, message):
    with pytest.raises(ValueError, match=f"^Teacher: expected {message}"):
        averaged(student_model(), **options)


def test_averaged_moves_in_bf16():
    """A step of a thousandth is below bf16's rounding; the average is kept in fp32 and saved so."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.zeros_(model.weight)
    teacher = averaged(model, decay=0.999)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        teacher.step()
    assert teacher.model.weight.dtype == torch.bfloat16
    assert teacher.model.weight.item() == pytest.approx(1 - 0.999**1000, rel=0.005)
    saved = teacher.state_dict()
    assert saved["average.weight"].dtype == torch.float32
    assert set(saved) == {"steps", "average.weight"}
    resumed = averaged(copy.deepcopy(model), decay=0.999)
    resumed.load_state_dict(saved)
    teacher.step()
    resumed.step()
    assert torch.equal(resumed.state_dict()["average.weight"], teacher.state_dict()["average.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        resumed.load_state_dict({"steps": torch.tensor(1)})


def test_frozen_teacher_does_not_move_in_step():
    model = student_model()
    teacher = Teacher(model, encode)
    before = copy.deepcopy(teacher.model.state_dict())
    train(model)
    teacher.step()
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not teacher.state_dict()


# adapters -------------------------------------------------------------------------------------------------------------


def adapted(**options):
    """A model with LoRA on its linear layers, trained for a while; and the model without."""
    base = student_model("dropout")
    plain = copy.deepcopy(base).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "3"], r=2, lora_dropout=0.5, **options))
    train(model, 5)
    return model, plain


def test_adapters_off_is_the_model_before_exactly():
    model, plain = adapted()
    teacher = Teacher.adapters_off(model, encode)
    assert not torch.allclose(model.eval()(BATCH), plain(BATCH), rtol=1e-2)
    assert torch.equal(teacher(BATCH).image, plain(BATCH))
    train(model.train(), 5)
    assert torch.equal(teacher(BATCH).image, plain(BATCH))


def test_adapters_off_copies_nothing():
    model, _ = adapted()
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    teacher = Teacher.adapters_off(model, encode)
    assert {parameter.untyped_storage().data_ptr() for parameter in teacher.model.parameters()} == storages
    assert not list(teacher.parameters())
    assert not teacher.state_dict()


def test_adapters_off_restores_every_mode_and_flag_even_after_an_error():
    model, _ = adapted()
    model.train()
    model.base_model.model[1].eval()
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    teacher = Teacher.adapters_off(model, encode)
    with torch.no_grad():
        model.eval()
        expected = model(BATCH)
        for module, training in zip(model.modules(), before[0], strict=True):
            module.training = training
    teacher(BATCH)
    with pytest.raises(RuntimeError):
        teacher(torch.ones(2, 9))
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert torch.equal(model.eval()(BATCH), expected)  # the adapters are on again


def test_adapters_off_gives_gradient_to_the_adapters_alone():
    model, _ = adapted()
    teacher = Teacher.adapters_off(model, encode)
    FeatureDistillation()(encode(model, BATCH), teacher(BATCH)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any().item()) == ("lora_" in name), name


def test_adapters_that_cannot_be_switched_off():
    with pytest.raises(ValueError, match=r"^Teacher: expected a model with PEFT adapters, got none"):
        Teacher.adapters_off(student_model(), encode)
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"^Teacher: expected adapters beside their weights, got merged ones"):
        Teacher.adapters_off(model, encode)
    model, _ = adapted()
    teacher = Teacher.adapters_off(model, encode)
    model.merge_adapter()
    with pytest.raises(ValueError, match="got merged ones"):
        teacher(BATCH)
    model, _ = adapted()
    next(p for name, p in model.named_parameters() if "base_layer" in name).requires_grad_(True)
    with pytest.raises(ValueError, match=r"^Teacher: expected every weight beside the adapters to be frozen, got .*base_layer"):
        Teacher.adapters_off(model, encode)
    model, _ = adapted(bias="all")
    with pytest.raises(ValueError, match=r"^Teacher: expected every weight beside the adapters to be frozen"):
        Teacher.adapters_off(model, encode)


def test_what_would_move_with_the_student_is_refused():
    base = student_model("norm")
    with pytest.raises(ValueError, match=r"^Teacher: expected a model of which only adapters are trained, got BatchNorm1d"):
        Teacher.adapters_off(peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2)), encode)
    saved = peft.get_peft_model(student_model("dropout"), peft.LoraConfig(target_modules=["0"], modules_to_save=["3"], r=2))
    for parameter in saved.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^Teacher: expected a model of which only adapters are trained, got ModulesToSaveWrapper"):
        Teacher.adapters_off(saved, encode)


def test_adapters_on_attention_are_refused():
    model = nn.Sequential(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"], r=2))
    with pytest.raises(ValueError, match=r"^Teacher: expected adapters on layers that can be switched off exactly"):
        Teacher.adapters_off(model, encode)


class ReadsTheWeight(nn.Module):
    """As some vision transformers do with their ``qkv``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.out(nn.functional.linear(batch, self.qkv.weight, self.qkv.bias))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.out(self.attention(batch, batch, batch)[0])


@pytest.mark.parametrize("targets", [["out_proj"], ["out_proj", "out"]])
def test_adapters_that_attention_passes_over_are_refused_at_once(targets):
    """Student and teacher would be equal for ever; with adapters elsewhere these alone would never learn."""
    model = peft.get_peft_model(nn.Sequential(Attending()), peft.LoraConfig(target_modules=targets, r=2))
    with pytest.raises(ValueError, match=r"^Teacher: expected adapters that run, got one at '.*attention\.out_proj', of which nn\.Mult"):
        Teacher.adapters_off(model, lambda model, batch: Embeddings(image=model(batch)))


def test_adapters_that_never_run_are_refused_in_the_first_call():
    encode = lambda model, batch: Embeddings(image=model(batch))  # noqa: E731
    batch = torch.randn(3, 4)
    teacher = Teacher.adapters_off(peft.get_peft_model(ReadsTheWeight(), peft.LoraConfig(target_modules=["qkv"], r=2)), encode)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=r"^Teacher: expected adapters that run, got one at '.*qkv', of which ReadsTheWeight reads"):
            teacher(batch)
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    both = Teacher.adapters_off(peft.get_peft_model(ReadsTheWeight(), peft.LoraConfig(target_modules=["qkv", "out"], r=2)), encode)
    assert both(batch).image.shape == (3, 4)


@pytest.mark.parametrize("first", ["image", "text"])
def test_adapters_of_a_tower_that_a_batch_does_not_use(first):
    """A layer that PyTorch runs by a fast path in evaluation mode, too."""
    towers = nn.ModuleDict({"image": nn.TransformerEncoderLayer(4, 2, 8), "text": nn.TransformerEncoderLayer(4, 2, 8)})
    model = peft.get_peft_model(towers, peft.LoraConfig(target_modules=["image.linear1", "text.linear1"], r=2))
    layers = model.base_model.model
    teacher = Teacher.adapters_off(model, lambda model, batch: Embeddings(**{key: layers[key](value) for key, value in batch.items()}))
    for key in (first, "image", "text"):
        assert getattr(teacher({key: torch.randn(3, 4)}), key).shape == (3, 4)


def test_cached_texts_belong_to_what_was_drawn(tmp_path):
    """Another text under a known id is an error; other types and more padding are not."""
    tokens = torch.tensor([[1, 5, 2, 0], [1, 6, 2, 0], [1, 7, 8, 2]])
    data = [{"id": row, "text": tokens[row]} for row in range(3)]
    table = torch.nn.Embedding(10, 4)
    teacher = Teacher(table, lambda model, batch: Embeddings(text=model(batch["text"]).sum(dim=1)))
    cached = Teacher.cached(EmbeddingCache.build(teacher, data, tmp_path, progress=False, shard_rows=2, batch_size=2))
    batch = {"id": torch.tensor([2, 0, 1]), "text": tokens[[2, 0, 1]]}
    expected = teacher(batch).text
    wider = torch.nn.functional.pad(batch["text"].int(), (0, 3))
    for text in (batch["text"], wider):
        assert torch.equal(cached({**batch, "text": text}).text, expected)
    assert torch.equal(cached({"id": batch["id"]}).text, expected)
    batch["text"][1, 1] = 9
    with pytest.raises(
        ValueError, match=r"^EmbeddingCache: expected the texts that .* was built from, got another for 1 of 3 samples: 0\."
    ):
        cached(batch)

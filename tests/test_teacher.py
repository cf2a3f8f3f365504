"""Teacher: frozen, apart from the student, invisible to checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn

from geomreg import DiVE, Embeddings, Teacher


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


def test_start_of_training_costs_nothing():
    student, regularizer = student_model().eval(), DiVE(normalize=False)
    teacher = Teacher(student, lambda model, batch: Embeddings(model(batch), model(2 * batch)))
    value = regularizer(Embeddings(student(BATCH), student(2 * BATCH)), teacher(BATCH))
    value.backward()
    assert value.item() == 0
    assert not any(parameter.grad.any() for parameter in student.parameters())

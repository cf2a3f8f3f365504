"""A student that has its teacher's weights and does not embed alike is told why, once; any other student is left alone."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from peft import LoraConfig, get_peft_model
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from geomreg import AverageVectorLoss, CosineAnchor, DiVE, EmbeddingCache, Embeddings, Teacher, WeightedSum, backward
from geomreg import same_weights as module
from geomreg.functional import average_vector_loss

WIDTH = 16


class Attended(nn.Module):
    """Tokens through attention with something random before it."""

    def __init__(self, noise: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.noise = nn.Identity() if noise is None else noise
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)

    def forward(self, batch: Tensor) -> Tensor:
        tokens = self.noise(batch[:, None] * torch.linspace(-1, 1, 6)[:, None] + torch.arange(6.0)[:, None])
        return self.attention(tokens, tokens, tokens)[0].mean(dim=1)


def text_model(**options: float) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        projection_dim=8, eos_token_id=29, bos_token_id=28, **options,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


NOISY = {
    "dropout": (lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8)), "Dropout at '2'"),
    "little dropout": (lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.Dropout(0.01), nn.Linear(64, 8)), "Dropout at '1'"),
    "attention dropout": (lambda: Attended(dropout=0.2), "MultiheadAttention at 'attention'"),
    "patch dropout": (lambda: Attended(PatchDropout(0.5, exclude_first_token=False)), "PatchDropout at 'noise'"),
    "drop path": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), DropPath(0.2)), "DropPath at '1'"),
    "batch normalisation": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8)), "BatchNorm1d at '1'"),
    "transformers": (lambda: text_model(attention_dropout=0.2).train(), "CLIPAttention at 'text_model.encoder.layers.0.self_attn'"),
}


def encode(model: nn.Module, batch: Tensor) -> Embeddings:
    found = model(batch)
    return Embeddings(text=F.normalize(getattr(found, "text_embeds", found).float(), dim=-1))


def batch_for(model: nn.Module, rows: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "text_model"):
        return torch.randint(1, 30, (rows, 8), generator=generator).index_fill(1, torch.tensor([7]), 29)
    return torch.randn(rows, WIDTH, generator=generator)


def heard(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ for one in caught if "Teacher" in str(one.message))
    return [str(one.message) for one in caught if str(one.message).startswith("Teacher: ")]


def built(kind: str = "dropout") -> tuple[nn.Module, Teacher, Tensor]:
    torch.manual_seed(0)
    model = NOISY[kind][0]().train()
    return model, Teacher(model, encode), batch_for(model)


@pytest.mark.parametrize("kind", NOISY)
def test_noise_is_named_once(kind):
    model, teacher, batch = built(kind)
    keep = WeightedSum(avl=(1000.0, AverageVectorLoss()), cosine=(1.0, CosineAnchor()))
    (message,) = heard(lambda: keep(encode(model, batch), teacher(batch)))
    assert "expected student and teacher of the same weights to embed a batch alike, got text embeddings" in message
    assert NOISY[kind][1] in message
    assert "student.eval()" in message
    assert not heard(lambda: [keep(encode(model, batch), teacher(batch)) for _ in range(3)])


@pytest.mark.parametrize("kind", NOISY)
def test_evaluation_mode_is_quiet(kind):
    """And at 0, with the gradient of the student; the next step may put it back into training mode."""
    model, teacher, batch = built(kind)
    if kind == "batch normalisation":
        teacher = Teacher(model.eval(), encode)
    model.eval()
    keep, known = AverageVectorLoss(), teacher(batch)
    values = []
    assert not heard(lambda: values.append(keep(encode(model, batch), known)))
    assert values[0] < 1e-9
    assert values[0].requires_grad


@pytest.mark.parametrize("teach_first", [True, False])
@pytest.mark.parametrize(
    "term",
    [lambda s, t: AverageVectorLoss()(s, t), lambda s, t: average_vector_loss(None, s.text, None, t.text, mean=torch.zeros(()))],
    ids=["module", "function"],
)
def test_other_view(teach_first, term):
    model, teacher, batch = built()
    model.eval()
    other = batch + 0.1 * batch_for(model, seed=1)

    def step() -> None:
        known = teacher(batch) if teach_first else None
        seen = encode(model, other)
        term(seen, teacher(batch) if known is None else known)

    (message,) = heard(step)
    assert "Give both the same view and preprocessing of the batch, and compute both in one precision" in message


def test_both_modalities_are_compared():
    torch.manual_seed(0)
    model = nn.ModuleDict({"image": nn.Linear(WIDTH, 8), "text": nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 8))})
    both = lambda model, batch: Embeddings(model["image"](batch), model["text"](batch))  # noqa: E731
    teacher, batch = Teacher(model, both), torch.randn(8, WIDTH)
    (message,) = heard(lambda: DiVE()(both(model, batch), teacher(batch)))
    assert "got text embeddings" in message


def test_precision():
    """Rounding of bf16 is no news where both round; a student in bf16 against a teacher in fp32 is, beyond that rounding, none either."""
    model, teacher, batch = built()
    model.eval()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            AverageVectorLoss()(encode(model, batch), teacher(batch))

    assert not heard(step)
    model, teacher, batch = built()
    model.eval().bfloat16()
    assert not heard(lambda: AverageVectorLoss()(encode(model, batch.bfloat16()), teacher(batch)))
    model, teacher, batch = built()
    model.bfloat16()  # and dropout, which is larger
    assert len(heard(lambda: AverageVectorLoss()(encode(model, batch.bfloat16()), teacher(batch)))) == 1


def other_model(model, teacher, batch):
    return NOISY["dropout"][0]().train()


def moved_before(model, teacher, batch):
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    return model


def copied(model, teacher, batch):
    return copy.deepcopy(model)


def gone(model, teacher, batch):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("student", [other_model, moved_before, copied, gone])
def test_a_student_that_may_differ_is_left_alone(student):
    """Another model, one that was resumed or trained, one of which the teacher knows nothing."""
    model, teacher, batch = built()
    trained = student(model, teacher, batch)
    assert not heard(lambda: [AverageVectorLoss()(encode(trained, batch), teacher(batch)) for _ in range(3)])


def test_after_a_step_nothing_is_said():
    model, teacher, batch = built()
    teacher(batch)  # without a term
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    encode(model, batch).text[:, 0].sum().backward()
    optimizer.step()
    assert not heard(lambda: AverageVectorLoss()(encode(model, batch), teacher(batch)))


def test_evaluation_before_training_does_not_use_it_up():
    model, teacher, batch = built()
    keep = AverageVectorLoss()
    with torch.no_grad():
        assert not heard(lambda: keep.eval()(encode(model, batch), teacher(batch)))
    keep.train()
    assert len(heard(lambda: keep(encode(model, batch), teacher(batch)))) == 1


def test_chunked_step_says_it_when_the_student_has_moved():
    """Embeddings of a chunked step are leaves; that their model was trained shows at the teacher's next call."""
    for trained in (True, False):
        model, teacher, batch = built()
        student = model if trained else NOISY["dropout"][0]().train()
        keep, optimizer = AverageVectorLoss(), torch.optim.SGD(student.parameters(), lr=0.1)

        def step() -> None:
            known = teacher(batch)  # noqa: B023
            backward(lambda chunk: encode(student, chunk), batch, lambda e: keep(e, known), chunk_size=8)  # noqa: B023
            optimizer.step()  # noqa: B023

        assert not heard(step)
        assert len(heard(step)) == trained
        assert not heard(step)


def test_averaged_teacher_and_adapters():
    model, _, batch = built()
    teacher = Teacher.averaged(model, encode)
    assert len(heard(lambda: AverageVectorLoss()(encode(model, batch), teacher(batch)))) == 1
    for begun in (True, False):
        model, _, batch = built()
        adapted = get_peft_model(model, LoraConfig(target_modules=["0"], lora_dropout=0.0))
        if not begun:
            with torch.no_grad():
                adapted.base_model.model[0].lora_B.default.weight.add_(0.01)
        teacher = Teacher.adapters_off(adapted, encode)
        assert len(heard(lambda: AverageVectorLoss()(encode(adapted, batch), teacher(batch)))) == begun  # noqa: B023


def test_costs_nothing_of_the_student():
    """No further forward pass, no random number, nothing kept alive."""
    model, teacher, batch = built()
    calls = []
    model.register_forward_hook(lambda *given: calls.append(1))
    torch.manual_seed(3)
    seen = encode(model, batch)
    after = torch.get_rng_state()
    with pytest.warns(UserWarning, match="Teacher"):
        AverageVectorLoss()(seen, teacher(batch))
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), after)
    watched = weakref.ref(teacher)
    del teacher
    assert watched() is None  # without the garbage collector: no cycle holds a whole model
    _, again, _ = built()
    known = again(batch)  # marked, never compared
    held = weakref.ref(again)
    del again
    assert held() is None
    del known
    gc.collect()


def test_copies_and_files_of_a_teacher_know_no_student():
    model, teacher, batch = built()
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert not heard(lambda: AverageVectorLoss()(encode(model, batch), other(batch)))  # noqa: B023


def test_compiled_terms_and_marks_in_files(tmp_path):
    """A mark is not in the tensor: embeddings can be saved, and a term compiles in one graph."""
    model, teacher, batch = built()
    known = teacher(batch)
    torch.save(known, tmp_path / "known.pt")
    torch.load(tmp_path / "known.pt", weights_only=False)
    keep = torch.compile(AverageVectorLoss(decay=1.0), fullgraph=True, backend="eager")
    assert not heard(lambda: keep(encode(model, batch), known))


@pytest.mark.parametrize("field", ["to_local", "is_meta"])
def test_weights_that_one_process_cannot_compare(field, monkeypatch):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not module.same_parameters(one, two)
    two.load_state_dict(one.state_dict())
    assert module.same_parameters(one, two)
    if field == "is_meta":
        two.to("meta")
    else:
        two.weight.to_local = lambda: None
    assert not module.same_parameters(one, two)


# chunks and caches ------------------------------------------------------------------------------------------------------


def rows_of(embeddings, index):
    return Embeddings(*(None if value is None else value[index] for value in embeddings))


@pytest.mark.parametrize("chunk_size", [8, 10, 32, 100])
@pytest.mark.parametrize("trained", [True, False])
def test_separable_step_says_it_at_its_first_chunk(chunk_size, trained):
    """The teacher's rows of a chunk are a copy; they are known by where the chunk is."""
    model, teacher, batch = built()
    student, keep = model if trained else NOISY["dropout"][0]().train(), CosineAnchor()

    def step(known: Embeddings) -> None:
        fn = lambda e, index: keep(e, rows_of(known, index))  # noqa: E731
        backward(lambda chunk: encode(student, chunk), batch, fn, chunk_size=chunk_size, separable=True)

    said = heard(lambda: step(teacher(batch)))
    assert len(said) == trained
    assert not said or "Dropout at '2'" in said[0]
    assert not heard(lambda: step(teacher(batch)))


def test_separable_step_in_evaluation_mode_is_quiet():
    """Also its trial, whose embeddings are turned at random, and rows in another order, which are not looked at."""
    for order in (slice(None), torch.arange(31, -1, -1)):
        model, teacher, batch = built()
        model.eval()
        known, keep = rows_of(teacher(batch), order), CosineAnchor()
        fn = lambda e, index: keep(e, rows_of(known, index))  # noqa: B023, E731
        assert not heard(lambda: backward(lambda chunk: encode(model, chunk), batch, fn, chunk_size=8, separable=True))  # noqa: B023


class Numbered:
    """Samples of a batch, by number."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, row: int) -> dict:
        return {"id": row, "x": self.batch[row]}


def in_dict(model: nn.Module, batch: dict) -> Embeddings:
    return encode(model, batch["x"])


def cached(path, model, batch, how="built", dtype=torch.float32) -> Teacher:
    cache = EmbeddingCache.build(Teacher(model, in_dict), Numbered(batch), path, progress=False, dtype=dtype)
    if how != "built":
        cache = EmbeddingCache.open(path, **({"teacher": Teacher(model, in_dict)} if how == "opened with its teacher" else {}))
    return Teacher.cached(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["built", "opened with its teacher", "opened"])
def test_cached_teacher_of_a_known_student(tmp_path, how, dtype):
    model, _, rows = built()
    teacher, batch = cached(tmp_path, model, rows, how, dtype), {"id": list(range(32)), "x": rows}
    keep = AverageVectorLoss()
    model.eval()
    assert not heard(lambda: keep(in_dict(model, batch), teacher(batch)))
    teacher = cached(tmp_path, model, rows, how, dtype)
    model.train()
    said = heard(lambda: keep(in_dict(model, batch), teacher(batch)))
    assert len(said) == (how != "opened")
    assert not heard(lambda: keep(in_dict(model, batch), teacher(batch)))


@pytest.mark.parametrize("student", [other_model, moved_before, copied, gone])
def test_cached_teacher_of_a_student_that_may_differ(tmp_path, student):
    model, _, rows = built()
    teacher, batch = cached(tmp_path, model, rows), {"id": list(range(32)), "x": rows}
    trained = student(model, teacher, rows)
    assert not heard(lambda: [AverageVectorLoss()(in_dict(trained, batch), teacher(batch)) for _ in range(3)])


def test_cached_teacher_whose_student_moved_before_it_was_made(tmp_path):
    model, _, rows = built()
    cache = cached(tmp_path, model, rows).cache
    moved_before(model, None, None)
    batch = {"id": list(range(32)), "x": rows}
    teacher = Teacher.cached(cache)
    assert not heard(lambda: [AverageVectorLoss()(in_dict(model, batch), teacher(batch)) for _ in range(3)])


def test_cached_teacher_keeps_no_model_alive(tmp_path):
    model, _, rows = built()
    teacher = cached(tmp_path, model, rows)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None
    teacher({"id": [0], "x": rows[:1]})


def test_nothing_is_said_where_training_mode_is_meant():
    model, teacher, batch = built()
    with module.uncompared():
        known = teacher(batch)
    assert not heard(lambda: AverageVectorLoss()(encode(model, batch), known))
    assert len(heard(lambda: AverageVectorLoss()(encode(model, batch), teacher(batch)))) == 1


@pytest.mark.parametrize("kind", ["frozen", "averaged", "cached"])
def test_statistics_that_the_task_has_moved_are_no_mistake(tmp_path, kind):
    """The batch of the task is seen in training mode, that of the terms in evaluation mode: the statistics moved in between."""
    model, teacher, rows = built("batch normalisation")
    batch = {"id": list(range(32)), "x": rows}
    makers = {"frozen": Teacher, "averaged": Teacher.averaged}
    teacher = makers[kind](model, in_dict) if kind in makers else cached(tmp_path, model, rows)
    for _ in range(2):
        in_dict(model.train(), {"x": 3 * rows + 1})
        assert not heard(lambda: AverageVectorLoss()(in_dict(model.eval(), batch), teacher(batch)))

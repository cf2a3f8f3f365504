"""The chunked step gives the gradient of the whole batch: every kind of loss, batch, tower and mistake."""

import copy
import weakref
from functools import partial

import contract
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from geomreg import (
    AverageVectorLoss,
    ContrastiveReplay,
    DiVE,
    Embeddings,
    FeatureDistillation,
    FeatureMapDistance,
    FeatureMaps,
    GramStructure,
    SimilarityKL,
    Teacher,
    WeightedSum,
    backward,
)
from geomreg.functional import contrastive_loss
from geomreg.schedules import BalancedWeight


class Towers(nn.Module):
    """Two encoders with dropout and a logit scale."""

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 4)).to(dtype)
        self.text = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 4)).to(dtype)
        self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, images, texts):
        return Embeddings(self.image(images), self.text(texts))


def data(rows, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, generator=generator, dtype=dtype) for width in (5, 3))


def encode_with(model):
    return lambda batch: model(*batch)


def gradients(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def close(actual, expected, tolerance):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


TERMS = {
    "contrastive": lambda: (ContrastiveReplay(), True),
    "dive": lambda: (DiVE(decay=0.5), False),
    "before": lambda: (AverageVectorLoss(decay=0.5, update="before"), False),
    "gram": lambda: (GramStructure(), False),
    "distillation": lambda: (FeatureDistillation(), False),
}


def losses(model, names, teacher_embeddings):
    """A mix of terms as a loss function, and the parameters that it uses."""
    built = {name: TERMS[name]() for name in names}
    terms = {name: term for name, (term, _) in built.items()}
    scaled = any(needs for _, needs in built.values())

    def loss_fn(embeddings):
        extra = {"logit_scale": model.logit_scale.exp()}
        return sum(
            (k + 1.0) * term(embeddings, teacher_embeddings, **(extra if name == "contrastive" else {}))
            for k, (name, term) in enumerate(terms.items())
        )

    return loss_fn, [model.logit_scale] if scaled else [], terms


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 13),
    chunk_size=st.integers(1, 15),
    names=st.lists(st.sampled_from(sorted(TERMS)), min_size=1, max_size=3, unique=True),
    dropout=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gradient_of_the_whole_batch(rows, chunk_size, names, dropout, dtype):
    plain = Towers(0.0, dtype)
    chunked, whole = Towers(dropout, dtype), Towers(dropout, dtype)
    batch = data(rows, dtype=dtype)
    teacher = Embeddings(*(value.detach() * 1.1 + 0.1 for value in plain(*batch)))
    loss_fn, parameters, terms = losses(chunked, names, teacher)
    torch.manual_seed(7)
    value = backward(encode_with(chunked), batch, loss_fn, chunk_size=chunk_size, parameters=parameters)
    assert value.shape == ()
    assert not value.requires_grad
    state = torch.get_rng_state()

    expected_fn, _, expected_terms = losses(whole, names, teacher)
    torch.manual_seed(7)  # the masks of the chunks, one after the other
    pieces = [whole(*(value[k : k + chunk_size] for value in batch)) for k in range(0, rows, chunk_size)]
    expected = expected_fn(Embeddings(*(torch.cat(parts) for parts in zip(*pieces, strict=True))))
    expected.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert value.item() == pytest.approx(expected.item(), rel=tolerance * 10)
    close(gradients(chunked), gradients(whole), tolerance if dtype == torch.float64 else 2e-5)
    assert torch.equal(state, torch.get_rng_state())  # as if each chunk had been encoded once
    for one, other in zip(terms.values(), expected_terms.values(), strict=True):
        one.step()
        other.step()
        for key, statistic in one.state_dict().items():
            if torch.is_tensor(statistic) and statistic.ndim:
                torch.testing.assert_close(statistic, other.state_dict()[key])


def test_dropout_masks_are_replayed():
    """Without the replay the gradient is another."""
    model, batch = Towers(0.5), data(8)
    torch.manual_seed(1)
    backward(encode_with(model), batch, lambda e: e.image.square().sum(), chunk_size=3)
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(2)
    backward(encode_with(model), batch, lambda e: e.image.square().sum(), chunk_size=3)
    assert not torch.allclose(found, gradients(model))


def test_random_numbers_go_on_after_those_of_the_loss():
    """Not again from before it: a loss that draws would repeat itself in the next step."""
    model, drawn = Towers(0.5), []

    def loss_fn(embeddings):
        drawn.append(torch.rand(()).item())
        return embeddings.image.square().mean()

    for chunk_size in (3, 8):
        torch.manual_seed(1)
        for _ in range(2):
            backward(encode_with(model), data(8), loss_fn, chunk_size=chunk_size)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn[:3])) == 3
    assert len(set(drawn[3:])) == 3


def test_chunk_of_the_whole_batch_encodes_once():
    model, calls = Towers(), []

    def encode(batch):
        calls.append(len(batch[0]))
        return model(*batch)

    def loss_fn(embeddings):
        return embeddings.image.square().mean()

    backward(encode, data(6), loss_fn, chunk_size=6)
    assert calls == [6]
    calls.clear()
    backward(encode, data(6), loss_fn, chunk_size=4)
    assert calls == [4, 2, 4, 2]


def test_calls_add_up():
    """A target loss and a regularizer as two calls are the sum of both losses."""
    model, batch, reference = Towers(), data(7), data(5, seed=3)
    teacher = Teacher(copy.deepcopy(model), lambda model, batch: Embeddings(*(1.2 * value for value in model(*batch))))
    keep = WeightedSum(dive=(3.0, DiVE()))
    backward(
        encode_with(model), batch, lambda e: contrastive_loss(*e, logit_scale=model.logit_scale.exp()), chunk_size=2,
        parameters=[model.logit_scale], sync=False,
    )  # fmt: skip
    backward(encode_with(model), reference, lambda e: keep(e, teacher(reference)), chunk_size=3)
    whole = Towers()
    loss = contrastive_loss(*whole(*batch), logit_scale=whole.logit_scale.exp()) + WeightedSum(dive=(3.0, DiVE()))(
        whole(*reference), teacher(reference)
    )
    loss.backward()
    close(gradients(model), gradients(whole), 1e-12)


@pytest.mark.parametrize("rows", [5, 6, 13])
def test_separable_loss_needs_one_pass(rows):
    model, batch, calls = Towers(), data(rows), []
    targets = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def encode(chunk):
        calls.append(len(chunk[0]))
        return model(*chunk)

    def loss_fn(embeddings, index):
        return model.logit_scale * (embeddings.image - targets[index]).square().sum(1).mean()

    value = backward(encode, batch, loss_fn, chunk_size=3, separable=True)
    assert sum(calls) == rows
    whole = Towers()
    expected = whole.logit_scale * (whole(*batch).image - targets).square().sum(1).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    close(gradients(model), gradients(whole), 1e-12)


SEPARABLE = {name: (term.build, term.inputs) for name, term in contract.TERMS.items() if term.separable}
SEPARABLE["SimilarityKL, rows"] = (partial(SimilarityKL, directions=("rows",)), contract.TERMS["SimilarityKL"].inputs)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("training", [True, False])
def test_terms_that_say_they_are_separable_are(name, training):
    """Value, gradient and what is committed are those of the whole batch, in one pass."""
    build, inputs = SEPARABLE[name]
    batch, extra = data(7), inputs(7, 4, 0, torch.float64)
    teacher = Towers()
    torch.nn.init.normal_(teacher.image[0].weight, generator=torch.Generator().manual_seed(4))
    frozen = Embeddings(*(value.detach() for value in teacher(*batch)))
    found = []
    for chunk_size in (3, 7):
        model, keep = Towers(), WeightedSum(term=(2.0, build())).train(training)
        assert keep.separable

        def loss_fn(embeddings, index, keep=keep):
            rows = {key: Embeddings(*(x[index] for x in value)) if key == "previous" else value for key, value in extra.items()}
            return keep(embeddings, Embeddings(*(value[index] for value in frozen)), **rows)

        for _ in range(2):  # in training the second meets a committed mean
            model.zero_grad()
            value = backward(encode_with(model), batch, loss_fn, chunk_size=chunk_size, separable=True)
            keep.step()
        found.append((value, gradients(model)))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)  # the mean is fp32
    close(found[0][1], found[1][1], 1e-6)


@pytest.mark.parametrize("options", [{"chunk_size": 9}, {"chunk_size": 2}, {"chunk_size": 2, "separable": True}])
def test_declared_parameters_that_the_loss_does_not_use(options):
    """Have a gradient of zero, which is what DDP waits for; one that is there stays."""
    model = Towers()

    def loss_fn(embeddings, index=None):
        return embeddings.image.square().mean()

    backward(encode_with(model), data(5), loss_fn, parameters=[model.logit_scale], **options)
    assert model.logit_scale.grad == 0
    found = gradients(model)
    model.logit_scale.grad.fill_(3.0)
    backward(encode_with(model), data(5), loss_fn, parameters=[model.logit_scale], **options)
    assert model.logit_scale.grad == 3
    close(gradients(model)[1:], 2 * found[1:], 1e-12)


@pytest.mark.parametrize("chunk_size", [2, 9])
@pytest.mark.parametrize("form", ["iterator", "twice", "frozen too"])
def test_parameters_as_they_come(chunk_size, form):
    model, frozen = Towers(), torch.ones((), dtype=torch.float64)
    parameters = {
        "iterator": (p for p in [model.logit_scale]), "twice": [model.logit_scale] * 2, "frozen too": [frozen, model.logit_scale],
    }[form]  # fmt: skip
    backward(
        encode_with(model), data(5), lambda e: contrastive_loss(*e, logit_scale=frozen * model.logit_scale.exp()), chunk_size=chunk_size,
        parameters=parameters,
    )  # fmt: skip
    whole = Towers()
    contrastive_loss(*whole(*data(5)), logit_scale=whole.logit_scale.exp()).backward()
    close(gradients(model), gradients(whole), 1e-12)
    with pytest.raises(TypeError, match=r"^backward: expected parameters as a list of tensors, got a float64 tensor"):
        backward(encode_with(model), data(5), lambda e: e.image.sum(), chunk_size=2, parameters=model.logit_scale)


@pytest.mark.parametrize("chunk_size", [2, 9])
@pytest.mark.parametrize("locked", ["image", "text"])
@pytest.mark.parametrize("as_parts", [False, True])
def test_locked_towers(chunk_size, locked, as_parts):
    ends = []
    for size in (chunk_size, None):
        model, (images, texts) = Towers(), data(5)
        getattr(model, locked).requires_grad_(False)

        def loss_fn(embeddings):
            return contrastive_loss(*embeddings, logit_scale=2.0)

        if size is None:
            loss_fn(model(images, texts)).backward()
        elif as_parts:
            parts = [(lambda b, m=model: Embeddings(image=m.image(b)), images), (lambda b, m=model: Embeddings(text=m.text(b)), texts)]
            backward(parts, None, loss_fn, chunk_size=size)
        else:
            backward(encode_with(model), (images, texts), loss_fn, chunk_size=size)
        assert getattr(model, locked)[0].weight.grad is None
        ends.append(gradients(model))
    close(*ends, 1e-12)


def test_encoders_that_reuse_their_output_or_return_a_slice():
    model, kept = Towers(), torch.zeros(3, 4, dtype=torch.float64)
    alive = []

    def encode(chunk):
        image = model.image(chunk[0])
        if torch.is_grad_enabled():
            return Embeddings(image)
        kept[: len(image)] = image  # as captured graphs do
        large = torch.zeros(len(image), 1000, 4, dtype=torch.float64)
        alive.append(weakref.ref(large.untyped_storage()))
        large[:, 0] = kept[: len(image)]
        return Embeddings(kept[: len(image)] if len(alive) % 2 else large[:, 0])

    def loss_fn(embeddings):
        assert not any(storage() for storage in alive)
        return embeddings.image.square().sum(1).exp().mean()

    backward(encode, data(9), loss_fn, chunk_size=3)
    whole = Towers()
    whole.image(data(9)[0]).square().sum(1).exp().mean().backward()
    close(gradients(model), gradients(whole), 1e-12)


def test_gradients_of_an_fsdp_module_are_reduced_again_afterwards():
    """By whatever comes after the step, or after a mistake in it."""

    class Sharded(Towers):
        def set_requires_gradient_sync(self, sync):
            self.sync = sync

        def set_is_last_backward(self, last):
            self.last = last

    model = Sharded()
    backward(encode_with(model), data(5), lambda e: e.image.square().mean(), chunk_size=2, model=model, sync=False)
    assert model.sync
    assert model.last
    with pytest.raises(ZeroDivisionError):
        backward(encode_with(model), data(5), lambda e, i: 1 / 0, chunk_size=2, model=model, separable=True)
    assert model.sync


def test_sums_that_are_not_separable():
    assert not WeightedSum(a=(1.0, FeatureDistillation()), b=(1.0, GramStructure())).separable
    assert not WeightedSum(a=(BalancedWeight(0.1), FeatureDistillation())).separable
    assert not WeightedSum(a=(1.0, DiVE(update="before"))).separable
    assert not WeightedSum(a=(1.0, SimilarityKL(against="batch", directions=("rows",)))).separable


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 20])
def test_parts_of_different_lengths(chunk_size):
    """Each caption once: the texts of the batch are rows of the unique texts."""
    model, (images, _) = Towers(), data(9)
    captions, index = data(4, seed=5)[1], torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    encoded = []

    def texts(batch):
        encoded.append(len(batch))
        return Embeddings(text=model.text(batch))

    def loss_fn(embeddings):
        return contrastive_loss(embeddings.image, embeddings.text[index], logit_scale=2.0)

    parts = [(lambda batch: Embeddings(image=model.image(batch["pixels"])), {"pixels": images}), (texts, captions)]
    value = backward(parts, None, loss_fn, chunk_size=chunk_size)
    whole = Towers()
    expected = contrastive_loss(whole.image(images), whole.text(captions[index]), logit_scale=2.0)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    close(gradients(model), gradients(whole), 1e-12)
    assert sum(encoded) in (4, 8)


@pytest.mark.parametrize("container", ["tensor", "tuple", "list", "dict", "namedtuple", "mapping"])
def test_containers(container):
    model, (images, texts) = Towers(), data(5)
    seen = []

    def encode(batch):
        seen.append(type(batch))
        pixels = batch if container == "tensor" else batch["image"] if container in ("dict", "mapping") else batch[0]
        return Embeddings(image=model.image(pixels))

    batch = {
        "tensor": images, "tuple": (images, texts), "list": [images, texts], "dict": {"image": images, "text": texts},
        "mapping": BatchEncoding({"image": images, "text": texts}),
        "namedtuple": Embeddings(images, texts),
    }[container]  # fmt: skip
    backward(encode, batch, lambda e: e.image.square().mean(), chunk_size=2)
    assert set(seen) == {type(batch)}
    found = model.image[0].weight.grad.clone()
    model.zero_grad()
    model.image(images).square().mean().backward()
    close(found, model.image[0].weight.grad, 1e-12)


def test_scale_is_applied_once_and_not_returned():
    plain, scaled = Towers(), Towers()
    values = [
        backward(encode_with(model), data(7), lambda e: contrastive_loss(*e, logit_scale=2.0), chunk_size=3, **options)
        for model, options in ((plain, {}), (scaled, {"scale": lambda loss: 1024 * loss}))
    ]
    assert torch.equal(*values)
    close(gradients(scaled), 1024 * gradients(plain), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_of_the_first_pass_do_not_cut_the_second(dtype):
    model = Towers(dtype=torch.float32)
    batch = data(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        backward(encode_with(model), batch, lambda e: contrastive_loss(*e, logit_scale=2.0), chunk_size=2)
        found = gradients(model)
        assert found.abs().max() > 0
        model.zero_grad()
        contrastive_loss(*model(*batch), logit_scale=2.0).backward()
    assert (found - gradients(model)).norm() <= 0.02 * gradients(model).norm()


def test_parts_that_the_loss_does_not_use():
    model, (images, texts) = Towers(), data(5)
    parts = [(lambda b: Embeddings(image=model.image(b)), images), (lambda b: Embeddings(text=model.text(b)), texts)]
    backward(parts, None, lambda e: e.image.square().mean(), chunk_size=2)
    assert model.text[0].weight.grad is None
    found = model.image[0].weight.grad.clone()
    model.zero_grad()
    model.image(images).square().mean().backward()
    close(found, model.image[0].weight.grad, 1e-12)


def test_gradient_checkpointing():
    model, batch = Towers(), data(6)

    def encode(chunk):
        image = torch.utils.checkpoint.checkpoint(model.image, chunk[0], use_reentrant=False)
        return Embeddings(image, model.text(chunk[1]))

    backward(encode, batch, lambda e: contrastive_loss(*e, logit_scale=2.0), chunk_size=4)
    whole = Towers()
    contrastive_loss(*whole(*batch), logit_scale=2.0).backward()
    close(gradients(model), gradients(whole), 1e-12)


@pytest.mark.slow
def test_fifty_steps_end_at_the_same_weights():
    ends = []
    for chunk_size in (4, 100):
        model = Towers()
        teacher = Teacher(model, lambda model, batch: model(*batch))
        keep = WeightedSum(dive=(2.0, DiVE()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(50):
            optimizer.zero_grad()
            target, reference = data(10, seed=2 * step), data(7, seed=2 * step + 1)
            backward(
                encode_with(model), target, lambda e, m=model: contrastive_loss(*e, logit_scale=m.logit_scale.exp()),
                chunk_size=chunk_size, parameters=[model.logit_scale], sync=False,
            )  # fmt: skip
            backward(encode_with(model), reference, lambda e, r=reference, k=keep, t=teacher: k(e, t(r)), chunk_size=chunk_size)
            optimizer.step()
            keep.step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() <= 1e-9


# mistakes -------------------------------------------------------------------------------------------------------------


def refused(error, message, encode=None, batch=None, loss_fn=lambda e: e.image.square().mean(), model=None, **options):
    """Refused with this message, and no gradient was added."""
    model = model or Towers()
    with pytest.raises(error, match=f"^backward: {message}"):
        backward(encode or encode_with(model), data(5) if batch is None else batch, loss_fn, **{"chunk_size": 2, **options})
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
def test_bad_chunk_size(chunk_size):
    refused(ValueError, "expected chunk_size as a whole number >= 1", chunk_size=chunk_size)


def test_bad_batches():
    refused(TypeError, "expected batch as a tensor, or a tuple or dict of tensors, got str", batch="images")
    refused(TypeError, "expected batch as a tensor, or a tuple or dict of tensors, got list", batch=[1, 2])
    refused(ValueError, r"expected tensors with equally many samples along dimension 0, got \[5, 4\]", batch=(data(5)[0], data(4)[1]))
    refused(ValueError, r"expected tensors with equally many samples along dimension 0, got \[0, 0\]", batch=data(0))


def test_undeclared_parameter():
    """Whose gradient would be lost, and under DDP its bucket left unreduced without a word."""
    model = Towers()
    refused(
        ValueError, "expected every tensor that loss_fn uses outside of encode in parameters, got 1 more", model=model,
        loss_fn=lambda e: contrastive_loss(*e, logit_scale=model.logit_scale.exp()),
    )  # fmt: skip


def test_terms_on_feature_maps():
    model, (images, _) = Towers(), data(5)
    with FeatureMaps(model, ["image.1"]) as maps:

        def loss_fn(embeddings):
            model.image(images)
            return embeddings.image.sum() + FeatureMapDistance()(
                feature_maps=maps.values, teacher_feature_maps=[torch.zeros_like(maps.values[0])]
            )

        refused(ValueError, "expected every tensor .* terms on feature maps cannot be chunked", model=model, loss_fn=loss_fn)


def test_losses_that_do_not_depend_on_the_embeddings():
    model = Towers()
    constant = torch.ones((), dtype=torch.float64, requires_grad=True)
    for loss_fn in (lambda e: torch.ones(()), lambda e: e.image.detach().sum(), lambda e: constant * 2):
        refused(ValueError, "expected a loss that depends on embeddings", model=model, loss_fn=loss_fn, parameters=[constant])
        for options in ({"chunk_size": 5}, {"separable": True}):
            refused(
                ValueError, "expected a loss that depends on embeddings", model=model, parameters=[constant],
                loss_fn=lambda e, i=None, f=loss_fn: f(e), **options,
            )  # fmt: skip
    model.requires_grad_(False)
    for chunk_size in (2, 5):
        refused(ValueError, "expected a loss that depends on embeddings", model=model, chunk_size=chunk_size)


def test_losses_that_are_not_scalar():
    refused(
        ValueError, "expected loss_fn to return a 0-d floating-point tensor, got float64 tensor of shape", loss_fn=lambda e: e.image.sum(1)
    )
    refused(ValueError, "expected loss_fn to return a 0-d floating-point tensor, got float", loss_fn=lambda e: 1.0)


def test_bad_encoders():
    model = Towers()
    refused(
        TypeError, "expected encode to return geomreg.Embeddings, got Tensor|expected encode to return", encode=lambda b: b[0], model=model
    )
    refused(
        ValueError,
        r"expected floating-point image embeddings of shape \(2, D\) for 2 samples",
        encode=lambda b: Embeddings(model.image(b[0])[:1]),
        model=model,
    )
    refused(
        ValueError, "expected image embeddings of one width from every chunk", model=model,
        encode=lambda b: Embeddings(model.image(b[0])[:, : len(b[0])]),
    )  # fmt: skip
    refused(
        ValueError, "expected text embeddings of one width from every chunk", model=model,
        encode=lambda b: Embeddings(model.image(b[0]), model.text(b[1]) if len(b[0]) == 2 else None),
    )  # fmt: skip
    refused(ValueError, "expected image or text embeddings, got None for both", encode=lambda b: Embeddings(), model=model)


def test_outputs_of_models_and_batches_with_more_than_tensors():
    model = Towers()

    class Output:
        def __init__(self, embeddings):
            self.image_embeds = embeddings

    say = r"got Output\. Take its \.image_embeds"
    refused(TypeError, rf"expected encode to return geomreg.Embeddings, {say}", encode=lambda b: Output(model.image(b[0])), model=model)
    refused(TypeError, rf"expected image embeddings as a tensor, {say}", encode=lambda b: Embeddings(Output(b[0])), model=model)
    batch = {"image": data(5)[0], "id": ["a", "b", "c", "d", "e"]}
    with pytest.raises(
        TypeError, match=r"^backward: expected batch as .*, got dict with list at 'id'\. Collate it first, and leave out what"
    ):
        backward(lambda b: Embeddings(model.image(b["image"])), batch, lambda e: e.image.sum(), chunk_size=2)


def test_bad_parts():
    model = Towers()
    images = data(5)[0]
    part = (lambda b: Embeddings(image=model.image(b)), images)
    with pytest.raises(ValueError, match=r"^backward: expected parts as a list of \(encode, batch\) with batch=None"):
        backward([part], images, lambda e: e.image.sum(), chunk_size=2)
    with pytest.raises(ValueError, match=r"^backward: expected image embeddings of one width from every chunk of one part"):
        backward([part, part], None, lambda e: e.image.sum(), chunk_size=2)
    with pytest.raises(ValueError, match=r"^backward: expected one encode and batch with separable=True, got 2 parts"):
        backward([part, part], None, lambda e, i: e.image.sum(), chunk_size=2, separable=True)


def test_separable_chunks_of_other_widths():
    model = Towers()
    with pytest.raises(ValueError, match=r"^backward: expected image embeddings of one width from every chunk"):
        backward(
            lambda b: Embeddings(model.image(b[0])[:, : len(b[0])]), data(5), lambda e, i: e.image.mean(), chunk_size=2, separable=True
        )  # fmt: skip


@pytest.mark.parametrize("separable", [False, True])
def test_batch_norm_in_training_mode(separable):
    model = Towers()
    model.image.append(nn.BatchNorm1d(4).double())
    loss_fn = (lambda e, i: e.image.square().mean()) if separable else (lambda e: e.image.square().mean())
    refused(
        RuntimeError, r"expected no batch normalisation in training mode, got BatchNorm1d", model=model, loss_fn=loss_fn,
        separable=separable,
    )  # fmt: skip
    model.eval()
    backward(encode_with(model), data(5), loss_fn, chunk_size=2, separable=separable)
    model.train()
    backward(encode_with(model), data(5), loss_fn, chunk_size=5, separable=separable)  # the statistics of the whole batch

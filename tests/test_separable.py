"""A loss that is no mean over samples is not taken chunk by chunk: terms that say so, and functions that are tried."""

import random
import warnings
from contextlib import nullcontext
from functools import partial

import contract
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geomreg
from geomreg import DiVE, Embeddings, FeatureDistillation, WeightedSum, backward
from geomreg.functional import contrastive_loss
from geomreg.schedules import BalancedWeight

ROWS, WIDTH = 7, 8


class Towers(nn.Module):
    """Two linear encoders of the same rows."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, WIDTH).to(dtype), nn.Linear(5, WIDTH).to(dtype)

    def forward(self, batch):
        return Embeddings(self.image(batch), self.text(batch))


def batch(rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)


def rows_of(embeddings, index):
    return Embeddings(*(value[index].detach() for value in embeddings))


def run(loss_fn, *, chunk_size=3, towers=None, rows=ROWS, dtype=torch.float64, separable=True):
    towers = towers or Towers(dtype)
    backward(towers, batch(rows, dtype), loss_fn, chunk_size=chunk_size, separable=separable)
    return torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])


def refused(error, message, loss_fn, **options):
    """Refused, and no gradient was added."""
    towers = Towers()
    with pytest.raises(error, match=f"^backward: {message}"):
        run(loss_fn, towers=towers, **options)
    assert all(parameter.grad is None for parameter in towers.parameters())


def info_nce(e, index):
    return F.cross_entropy(20 * e.image @ e.text.T, torch.arange(len(e.image)))


# terms -----------------------------------------------------------------------------------------------------------------

NOT_SEPARABLE = {name: (term.build, term) for name, term in contract.TERMS.items() if not term.separable}
NOT_SEPARABLE |= {
    "before": (partial(DiVE, update="before"), contract.TERMS["DiVE"]),
    "batch": (partial(geomreg.SimilarityKL, against="batch"), contract.TERMS["ContrastiveReplay"]),
}


@pytest.mark.parametrize("name", NOT_SEPARABLE)
@pytest.mark.parametrize("way", ["term", "method", "sum", "method of a sum", "compiled"])
def test_terms_that_are_no_mean_are_refused(name, way):
    """Whatever stands between the term and the step, or given itself; a batch of one chunk is no exception."""
    build, declared = NOT_SEPARABLE[name]
    term, one = build(), contract.case(declared, ROWS)
    keep = WeightedSum(term=(1.0, term))
    ways = {"term": term, "sum": keep, "method of a sum": keep.forward, "compiled": torch.compile(term, backend="eager")}
    message = "expected a loss that is a mean over samples with separable=True, got"
    if way == "method":
        refused(ValueError, message, term.forward)
        return
    for chunk_size in (3, ROWS):
        refused(
            ValueError, message, chunk_size=chunk_size, loss_fn=lambda e, index: ways[way](e, rows_of(one.teacher, index), **one.inputs)
        )


def test_balanced_sums_are_refused():
    keep = WeightedSum(a=(BalancedWeight(0.3), FeatureDistillation()))
    known = Towers()(batch())
    for call in (keep, lambda *given: keep.terms(*given).total):
        refused(ValueError, "expected a loss .* got WeightedSum, which is none", lambda e, i, call=call: call(e, rows_of(known, i)))


def test_a_term_of_ones_own_that_does_not_say_it_is_separable_is_refused():
    class Own(nn.Module):
        def forward(self, student, teacher=None):
            return student.image.square().mean()

        def step(self):
            pass

    refused(ValueError, "expected a loss .* got Own, which is none", lambda e, i: Own()(e))
    Own.separable = True
    assert run(lambda e, i: Own()(e)).any()


# functions -------------------------------------------------------------------------------------------------------------


def head_with_batch_statistics(e, index):
    return ((e.image - e.image.mean(dim=0)) / e.image.std(dim=0, correction=0).clamp(min=0.1)).square().exp().clamp(max=9).mean()


OTHERS = {
    "contrastive": info_nce,
    "the library's": lambda e, i: contrastive_loss(*e, logit_scale=2.0),
    "a sum": lambda e, i: (e.image * e.text).square().sum(),
    "batch statistics": head_with_batch_statistics,
    "weighted mean": lambda e, i: (e.image.square().sum(1) * (1 + i)).sum() / (1 + i).sum(),
    "relative to the batch": lambda e, i: F.mse_loss(e.image.norm(dim=1) / e.image.norm(dim=1).mean(), e.text.norm(dim=1)),
    "root": lambda e, i: e.image.square().mean().sqrt(),
    "some labels left out": lambda e, i: F.cross_entropy(e.image, torch.where(i % 3 == 0, -100, i % WIDTH)),
    "labels of other rows": lambda e, i: F.cross_entropy(e.image, torch.arange(len(i))),
    "means of classes": lambda e, i: sum(e.image[i // 3 == c].square().mean() for c in (i // 3).unique()) / len((i // 3).unique()),
    "divided by its value": lambda e, i: (lambda loss: loss / loss.detach())(e.image.square().mean()),
    "beside a large number": lambda e, i: 1e5 + e.image.square().mean().sqrt(),
    "partial": partial(lambda s, e, i: info_nce(Embeddings(s * e.image, e.text), i), 0.5),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("chunk_size", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_that_are_no_mean_are_refused_each_time(name, chunk_size, dtype):
    loss_fn = OTHERS[name] if dtype == torch.float64 else lambda e, i: OTHERS[name](e, i)
    for _ in range(2):
        refused(ValueError, "expected a loss that is a mean over samples .* Leave separable out", loss_fn, chunk_size=chunk_size)


def test_chunks_of_one_sample():
    refused(ValueError, "expected a loss that is a mean over samples", info_nce, chunk_size=1)


def test_one_helper_around_several_losses_is_tried_with_each():
    def around(loss):
        return lambda e, i: 0.5 * loss(e, i)

    for _ in range(2):
        assert run(around(lambda e, i: e.image.square().mean())).any()
        refused(ValueError, "expected a loss that is a mean over samples", around(info_nce))


class Reduced(nn.Module):
    """Mean or sum, as it is told."""

    def __init__(self, reduction):
        super().__init__()
        self.reduction = reduction

    def forward(self, e, index):
        return getattr(e.image.square().sum(dim=1), self.reduction)()

    def method(self, e, index):
        return self(e, index)


def in_a_global(reduction):
    globals()["_reduced"] = Reduced(reduction)
    return lambda e, i: _reduced(e, i)  # noqa: F821


TOLD = {
    "module": Reduced,
    "method": lambda reduction: Reduced(reduction).method,
    "module of torch": lambda reduction: partial(lambda loss, e, i: loss(e.image, e.text), nn.MSELoss(reduction=reduction)),
    "dictionary": lambda reduction: lambda e, i, options={"reduction": reduction}: F.mse_loss(e.image, e.text, **options),
    "number": lambda reduction: lambda e, i, mean=int(reduction == "mean"): e.image.square().sum() / (len(i) if mean else 1.0),
    "global": in_a_global,
    "switched": lambda reduction, one=Reduced("mean"): (setattr(one, "reduction", reduction), one)[1],  # noqa: B008
}


@pytest.mark.parametrize("name", TOLD)
def test_one_code_that_is_told_what_to_do_is_tried_for_each(name):
    for _ in range(2):
        assert run(TOLD[name]("mean")).any()
        refused(ValueError, "expected a loss that is a mean over samples", TOLD[name]("sum"))


@pytest.mark.parametrize("loss", ["surrogate", "nothing but rounding", "cut off", "beside a large number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_of_unusual_value_are_taken(loss, dtype):
    """Their value or their gradient is 0 but for rounding."""
    losses = {
        "surrogate": lambda e, i: (lambda each: each - each.detach())((e.image * e.text.detach()).sum(dim=1).mean()),
        "nothing but rounding": lambda e, i: (1 - F.cosine_similarity(e.image, e.image.detach())).mean(),
        "cut off": lambda e, i: F.relu(-e.image.square().sum(dim=1)).mean(),
        "beside a large number": lambda e, i: 1e5 + e.image.square().mean(),
    }
    run(losses[loss], dtype=dtype, rows=13)


def test_zero_at_the_start_hides_nothing():
    """Student and teacher are equal, so every loss is 0 there."""
    known = Towers()(batch())

    def relative(e, index):
        z, t = e.image, known.image[index].detach()
        return ((z - z.mean(dim=0)) - (t - t.mean(dim=0))).square().mean()

    refused(ValueError, "expected a loss that is a mean over samples", relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_tried_once_and_leave_no_trace(dtype, monkeypatch):
    """Neither in the random numbers nor in what terms collect; the gradient is that of the whole batch."""
    monkeypatch.setattr("geomreg.separable._tried", {})
    keep, calls = DiVE(decay=0.5), []
    known = Embeddings(*(1.1 * value.detach() for value in Towers(dtype)(batch(dtype=dtype))))

    def loss_fn(e, index):
        calls.append(len(index))
        return keep(e, rows_of(known, index)) + F.binary_cross_entropy_with_logits(e.image, known.text[index].sigmoid())

    towers = Towers(dtype)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = run(loss_fn, chunk_size=4, towers=towers, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert keep.pending_count == 2 * ROWS
    assert calls == [4, 7, 4, 3, 2, 5, 7, 3]
    again = run(loss_fn, chunk_size=4, dtype=dtype)
    assert calls[8:] == [4, 3]
    towers = Towers(dtype)
    loss_fn(towers(batch(dtype=dtype)), torch.arange(ROWS)).backward()
    expected = torch.cat([p.grad.flatten() for p in towers.parameters()])
    for one in (found, again):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-7)


def test_the_trial_is_not_recorded_by_balanced_weights():
    recorded = []
    for separable in (True, "unchecked"):
        balanced = BalancedWeight(0.3)
        keep = WeightedSum(a=(balanced, FeatureDistillation()))
        run(lambda e, i, keep=keep: keep.watch_task(e).image.square().mean(), separable=separable)
        recorded.append(balanced.pending)
    assert torch.equal(*recorded)
    assert recorded[0].any()


@pytest.mark.parametrize("draw", ["torch", "python"])
def test_a_loss_that_draws_random_numbers_is_not_tried_but_warns_once(draw):
    """Its parts would draw others; random numbers of torch go on as without the trial."""

    def noisy(e, index):
        return (F.dropout(e.image, 0.5) if draw == "torch" else random.random() * e.image).square().mean()

    gradients = []
    for separable in (True, True, "unchecked"):
        towers = Towers()
        torch.manual_seed(5)
        said = pytest.warns(UserWarning, match="one that draws random numbers") if not gradients else nullcontext()
        with said, warnings.catch_warnings():
            warnings.simplefilter("error" if gradients else "always")
            gradients.append(run(noisy, towers=towers, separable=separable))
    if draw == "torch":
        assert all(torch.equal(one, gradients[-1]) for one in gradients)


def test_unchecked_is_called_for_the_chunks_alone():
    calls = []

    def loss_fn(e, index):
        calls.append(len(index))
        return e.image.square().mean()

    run(loss_fn, separable="unchecked")
    assert calls == [3, 3, 1]
    refused(ValueError, "expected separable to be one of", loss_fn, separable="no")


def test_the_number_of_arguments():
    message = r"expected loss_fn\(Embeddings, index\) with separable=True, got one with the arguments \(e\)"
    refused(TypeError, message, lambda e: e.image.sum())
    message = r"expected loss_fn\(Embeddings\) without separable=True, got one with the arguments \(e, rows\)"
    refused(TypeError, message, lambda e, rows: e.image.sum(), separable=False)
    assert run(lambda *given: given[0].image.square().mean()).any()


# what the trial costs, and what it must not break


def steps_of(losses, rows=12, chunk_size=4, encode=lambda chunk: chunk):
    """A step with each loss."""
    torch.manual_seed(0)
    leaf = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    for loss in losses:
        backward(lambda chunk: Embeddings(image=encode(chunk)), leaf, loss, chunk_size=chunk_size, separable=True)


def counted(loss, calls):
    """The loss, which notes how many rows it was asked for."""

    def noting(embeddings, index, captions):
        calls.append(len(index))
        return loss(embeddings)

    return noting


@pytest.mark.parametrize(
    "value", [lambda e: e.image.square().mean(1).mean(), lambda e: 0 * e.image.mean()], ids=["plain", "nothing to see"]
)
def test_a_closure_over_the_captions_of_each_batch_is_not_tried_at_every_step(value):
    calls = []
    noting = counted(value, calls)
    steps_of([lambda e, i, captions=[f"caption {step}"]: noting(e, i, captions) for step in range(99)])
    trials = sum(rows == 12 for rows in calls)
    assert 1 <= trials <= 2 * 17  # each calls it twice for the whole batch


def test_large_containers_are_not_walked():
    looked = []

    class Captions(list):
        def __iter__(self):
            for one in super().__iter__():
                looked.append(one)
                yield one

    captions = Captions(str(k) for k in range(1000))
    steps_of([lambda e, i, captions=captions: e.image.square().mean(1).mean()])
    assert len(looked) < 100


def test_a_weight_that_is_zero_at_first_is_found_out():
    weights = {"contrastive": 0.0}

    def loss(embeddings, index):
        return embeddings.image.square().mean() + weights["contrastive"] * (embeddings.image @ embeddings.image.T).logsumexp(1).mean()

    steps_of([loss] * 3)
    weights["contrastive"] = 1.0
    with pytest.raises(ValueError, match="expected a loss that is a mean over samples with separable=True"):
        steps_of([loss] * 9)


def test_a_head_that_counts_its_passes_over_processes_is_not_called_for_the_trial():
    class Counting(torch.nn.Linear):
        passes = 0

        def no_sync(self):
            """As DistributedDataParallel has."""

        def forward(self, value):
            self.passes += 1
            return super().forward(value)

    head = Counting(6, 1).double()
    with pytest.warns(UserWarning, match=r"fails for other rows than those of its chunk \(_UntriableError: Counting counts its passes"):
        steps_of([lambda e, i: head(e.image).square().mean()])
    assert head.passes == 3


def test_a_loss_of_what_the_encoder_left_beside_is_not_broken():
    left = {}

    def encode(chunk):
        left["weight"] = torch.arange(len(chunk), dtype=chunk.dtype)
        return chunk

    with pytest.warns(UserWarning, match=r"fails for other rows than those of its chunk \(RuntimeError: The size of tensor a"):
        steps_of([lambda e, i: (e.image.square().mean(1) * left["weight"]).mean()], encode=encode)


def test_a_loss_that_runs_a_model_sees_two_chunks():
    seen = []
    model = torch.nn.Linear(6, 6).double()
    model.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    steps_of([lambda e, i: (e.image - model(e.image)).square().mean()], rows=40, chunk_size=4)
    assert max(seen) == 8

"""Every check of ``tests/contract.py`` on every regularizer, and mutants on which the checks fail."""

import copy
import pickle
from dataclasses import replace

import contract
import pytest
import torch
from batches import NO_MEAN, average_vector_oracle, dive_oracle, pairwise_vector_oracle
from contract import CHECKS, MAPS, OTHERS, TERMS, Term, called, case, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import geomreg
from geomreg import AverageVectorLoss, DiVE, Embeddings, RelationalAngle, TextEnergy, regularizers
from geomreg.checks import check_embeddings

every_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


def test_every_public_regularizer_declares_itself():
    public = {name for name in regularizers.__all__ if issubclass(getattr(regularizers, name), nn.Module)}  # not FeatureMaps
    assert public == set(TERMS) | set(OTHERS)
    assert all(hasattr(geomreg, name) for name in public)


@every_term
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(term, check):
    check(term)


FREE = [(name, free) for name, term in TERMS.items() for free in sorted(term.free)]


@pytest.mark.parametrize(("name", "free"), FREE, ids=[f"{name}-{free}" for name, free in FREE])
@settings(derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 7), width=st.integers(2, 6))
def test_declared_maps_change_nothing(name, free, seed, rows, width):
    assert unchanged(TERMS[name], free, seed, rows, width)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("AverageVectorLoss", average_vector_oracle),
        ("PairwiseVectorLoss", pairwise_vector_oracle),
        ("DiVE", dive_oracle),
        ("FeatureDistillation", lambda student, teacher, mean: average_vector_oracle(student, teacher, NO_MEAN)),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 7, 129])
@pytest.mark.parametrize("width", [1, 63, 512])
def test_function_equals_loop(name, oracle, rows, width):
    """The other terms have their loops in their own files."""
    one = case(TERMS[name], rows, width)
    assert TERMS[name].function(one).item() == pytest.approx(oracle(one.student, one.teacher, one.mean), rel=1e-12)


@every_term
@pytest.mark.parametrize(("rows", "width"), [(1, 63), (2, 1), (2, 512), (129, 63)])
def test_odd_shapes(term, rows, width):
    if rows < term.rows:
        with pytest.raises(ValueError, match=r"expected at least [23] samples"):
            called(term, term.build(), case(term, rows, width))
    else:
        assert called(term, term.build(), case(term, min(rows, 40) if term is TERMS["RelationalAngle"] else rows, width)).isfinite()


@every_term
def test_compiles_into_one_graph_over_steps(term):
    eager, wrapped = term.build(), term.build()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        one = case(term, seed=seed)
        expected, value = called(term, eager, one), called(term, compiled, one)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
        for a, b in zip(contract.gradients(term, value, one), contract.gradients(term, expected, one), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
        eager.step()
        wrapped.step()


@pytest.mark.parametrize("update", ["after", "before"])
@pytest.mark.parametrize("build", [AverageVectorLoss, DiVE])
def test_update_before_compiles_too(build, update):
    eager, wrapped = build(update=update), build(update=update)
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        one = case(TERMS["DiVE"], seed=seed)
        torch.testing.assert_close(compiled(one.student, one.teacher), eager(one.student, one.teacher), rtol=1e-9, atol=1e-12)
        eager.step()
        wrapped.step()
    torch.testing.assert_close(wrapped.mean, eager.mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OTHERS)
def test_terms_that_look_at_no_embeddings(name):
    """0-d, fp32 or wider, gradient, any student, no parameters of their own, autocast, copies, compiled, resumed."""
    leaf = nn.Parameter(case(TERMS["DiVE"], 6, 4, dtype=torch.float32).student.image.detach())
    term, inputs = OTHERS[name].build(leaf)
    assert isinstance(term, geomreg.Regularizer)
    assert tuple(getattr(term, "inputs", ())) == tuple(inputs)
    assert not list(term.parameters())
    value = term(None, None, **inputs)
    assert value.shape == ()
    assert value.dtype == torch.float32
    value.backward()
    assert leaf.grad.abs().max() > 0
    assert torch.equal(term(Embeddings(torch.ones(2, 3)), None, **inputs), value)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(term(None, None, **inputs), value)
    for twin in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert torch.equal(twin(None, None, **inputs), value)
    torch.testing.assert_close(torch.compile(term, fullgraph=True, backend="aot_eager")(None, None, **inputs), value)
    term.load_state_dict(term.state_dict())
    assert term.step() is None
    assert torch.equal(term(None, None, **inputs), value)


@pytest.mark.parametrize("name", ["drawn triplets", "random texts"])
def test_random_draws_compile_into_one_graph_over_steps(name):
    table = torch.randn(49_408, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def build():
        if name == "drawn triplets":
            return RelationalAngle(max_triplets=5)
        return TextEnergy(lambda tokens: table[tokens].mean(dim=1), count=4)

    eager, wrapped = build(), build()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    inputs, values = ({} if name == "drawn triplets" else {"logit_scale": 2.0}), []
    one = case(TERMS["DiVE"])
    for _ in range(3):
        expected = eager(one.student, one.teacher, **inputs)
        torch.testing.assert_close(compiled(one.student, one.teacher, **inputs), expected, rtol=1e-10, atol=1e-14)
        values.append(expected.item())
        eager.step()
        wrapped.step()
    assert len(set(values)) == 3


# mutants: the suite can fail ------------------------------------------------------------------------------------------


class Mutant(nn.Module):
    """Feature distillation with one fault."""

    def __init__(self, fault, *, normalize=True):
        super().__init__()
        self.fault, self.normalize, self.separable = fault, normalize, fault != "not separable"
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, student, teacher):
        if self.fault != "teacher gradient":
            check_embeddings("Mutant", student, teacher)
        if self.normalize and self.fault != "ignored option":
            student, teacher = (Embeddings(*(x / x.norm(dim=1, keepdim=True) for x in one)) for one in (student, teacher))
        total = 0.0
        for one, other in zip(student, teacher, strict=True):
            if one is None:
                continue
            distances = (one - other).square().sum(1)
            if self.fault == "mean over D":
                distances = distances / one.shape[1]
            if self.fault == "broadcast":
                distances = distances[:, None] * torch.sigmoid((one - other).square().sum(1))[None, :]
            if self.fault == "moving mean":
                with torch.no_grad():
                    self.mean = self.mean + distances.mean()
                distances = distances + self.mean
            total = total + distances.mean()
        return total.detach() if self.fault == "detached" else total

    def step(self):
        return


def mutant(fault: str) -> Term:
    """The term of feature distillation, built with a fault in module and function."""

    def function(one):
        return Mutant(fault, normalize=False)(one.student, one.teacher)

    faulty_function = function if fault in ("broadcast", "detached") else TERMS["FeatureDistillation"].function
    return replace(TERMS["FeatureDistillation"], build=lambda **options: Mutant(fault, **options), function=faulty_function)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("detached", contract.shape_and_gradient),
        ("broadcast", contract.separability),
        ("not separable", contract.separability),
        ("mean over D", contract.module_is_the_function),
        ("moving mean", contract.state),
        ("ignored option", contract.options_are_used),
        ("ignored option", contract.module_is_the_function),
        ("teacher gradient", contract.live_teacher_is_refused),
    ],
)
def test_mutants_fail(fault, check):
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(mutant(fault))


def test_the_mutants_base_passes():
    """So the faults are what the checks see."""
    sound = replace(TERMS["FeatureDistillation"], build=lambda **options: Mutant("none", **options))
    for check in (
        contract.shape_and_gradient,
        contract.module_is_the_function,
        contract.separability,
        contract.options_are_used,
        contract.live_teacher_is_refused,
        contract.state,
    ):
        check(sound)


@every_term
def test_wrong_declarations_fail(term):
    """Each declaration that can be wrong is caught: a free map too many, separable, degree, zero."""
    false = next(name for name in MAPS if name not in term.free)
    assert not all(unchanged(term, false, seed) for seed in range(3))
    with pytest.raises(AssertionError):
        contract.counterexamples(replace(term, free=term.free - {"permutation of the samples"}))
    with pytest.raises(AssertionError):
        contract.separability(replace(term, separable=not term.separable))
    with pytest.raises(AssertionError):
        contract.zero_at_the_teacher(replace(term, zero=not term.zero))
    if term.degree is not None:
        with pytest.raises(AssertionError):
            contract.homogeneity(replace(term, degree=term.degree + 1))

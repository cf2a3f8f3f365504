"""What every regularizer declares about itself, and the checks that hold it to that.

One :class:`Term` for each public regularizer on embeddings. A check is a function of a term that raises AssertionError;
``tests/regularizers/test_contract.py`` runs every check on every term, and shows on mutants that the checks can fail.
"""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import random_pair, random_vector, rotation
from torch import Tensor

import geomreg
from geomreg import Embeddings
from geomreg import functional as F

LOW = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """Everything that a loss may look at."""

    student: Embeddings
    teacher: Embeddings
    mean: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """A regularizer and what it claims.

    Attributes:
        build: module from its options.
        function: the same loss of a case as it is, by the public function; not normalised.
        inputs: extra named inputs of the module, from (rows, width, seed, dtype).
        gradient: modalities that receive gradient.
        teacher: whether the teacher matters.
        pairs: whether texts must belong to images.
        separable: whether the loss is a mean over samples, for a fixed mean.
        zero: whether value and gradient vanish where the student is the teacher.
        degree: power of the embeddings' size; None where there is none.
        free: maps (keys of MAPS) that leave the loss unchanged.
        compares: what the student is held to, for docs/regularizers.md.
        rows: smallest batch.
        normalizes: whether the module has ``normalize``.
    """

    build: Callable[..., torch.nn.Module]
    function: Callable[[Case], Tensor]
    free: frozenset[str]
    compares: str
    inputs: Callable[..., dict[str, Any]] = lambda *_: {}
    gradient: tuple[str, ...] = ("image", "text")
    teacher: bool = True
    pairs: bool = False
    separable: bool = True
    zero: bool = True
    degree: int | None = 2
    rows: int = 1
    normalizes: bool = True


def case(term: Term, rows: int = 5, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """A random case of a term."""
    student, teacher = random_pair(rows, width, seed, dtype)
    return Case(student, teacher, random_vector(width, seed, dtype), term.inputs(rows, width, seed, dtype))


def called(term: Term, module: torch.nn.Module, one: Case) -> Tensor:
    """The module's value."""
    return module(one.student, one.teacher if term.teacher else None, **one.inputs)


def gradients(term: Term, value: Tensor, one: Case) -> list[Tensor]:
    """Gradient for each modality that should have one."""
    return list(torch.autograd.grad(value, [getattr(one.student, name) for name in term.gradient]))


def embeddings_of(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Named inputs with their embeddings changed."""
    changed = dict(inputs)
    if "texts" in inputs:
        changed["texts"] = change(inputs["texts"])
    if "previous" in inputs:
        changed["previous"] = both(inputs["previous"], change)
    return changed


def both(embeddings: Embeddings, change: Callable[[Tensor], Tensor]) -> Embeddings:
    """Images and texts changed; leaves stay leaves."""
    return Embeddings(*(change(value.detach()).requires_grad_(value.requires_grad) for value in embeddings))


def image(embeddings: Embeddings, change: Callable[[Tensor], Tensor]) -> Embeddings:
    """Images changed."""
    return embeddings._replace(image=both(embeddings, change).image)


def _permuted(one: Case, seed: int) -> Case:
    order = torch.randperm(len(one.student.image), generator=torch.Generator().manual_seed(seed))
    inputs = dict(one.inputs)
    if "previous" in inputs:
        inputs["previous"] = both(inputs["previous"], lambda x: x[order])
    return replace(one, student=both(one.student, lambda x: x[order]), teacher=both(one.teacher, lambda x: x[order]), inputs=inputs)


def _rotated(one: Case, seed: int) -> Case:
    def turn(x: Tensor) -> Tensor:
        return x @ rotation(x.shape[-1], seed)

    return Case(both(one.student, turn), both(one.teacher, turn), turn(one.mean), embeddings_of(one.inputs, turn))


def _of_student(change: Callable[[Tensor, int], Tensor], *, mean: bool = False) -> Callable[[Case, int], Case]:
    def apply(one: Case, seed: int) -> Case:
        moved = replace(one, student=both(one.student, lambda x: change(x, seed)))
        return replace(moved, mean=change(one.mean, seed)) if mean else moved

    return apply


def _of_images(change: Callable[[Tensor, int], Tensor]) -> Callable[[Case, int], Case]:
    def apply(one: Case, seed: int) -> Case:
        inputs = dict(one.inputs)
        if "previous" in inputs:
            inputs["previous"] = image(inputs["previous"], lambda x: change(x, seed))
        student, teacher = (image(value, lambda x: change(x, seed)) for value in (one.student, one.teacher))
        return replace(one, student=student, teacher=teacher, inputs=inputs)

    return apply


def _shift(x: Tensor, seed: int) -> Tensor:
    return x + random_vector(x.shape[-1], seed + 17, x.dtype)


def _turn(x: Tensor, seed: int) -> Tensor:
    return x @ rotation(x.shape[-1], seed + 17)


def _stretch(x: Tensor, seed: int) -> Tensor:
    return x * (0.5 + torch.rand(len(x), 1, generator=torch.Generator().manual_seed(seed), dtype=x.dtype))


MAPS: dict[str, Callable[[Case, int], Case]] = {
    "permutation of the samples": _permuted,
    "common rotation": _rotated,  # of student, teacher, mean and every other embedding
    "exchange of images and texts": lambda one, seed: replace(
        one, student=Embeddings(one.student.text, one.student.image), teacher=Embeddings(one.teacher.text, one.teacher.image)
    ),
    "rotation of the images": _of_images(_turn),  # in student and teacher
    "shift of the images": _of_images(_shift),
    "rotation of the student": _of_student(_turn),
    "shift of the student": _of_student(_shift),
    "shift of the student and the mean": _of_student(_shift, mean=True),
    "scaling of the student": _of_student(lambda x, seed: 1.7 * x),
    "scaling of each vector": _of_student(_stretch),
}
PERMUTATION, COMMON, EXCHANGE, TURN_IMAGES, SHIFT_IMAGES, TURN, SHIFT, SHIFT_ALONG, SCALE, STRETCH = MAPS


def what_it_keeps(term: Term) -> str:
    """The words of docs/regularizers.md: what is compared, and which moves of the student alone cost nothing."""
    moves = {TURN: "rotation", SHIFT: "shift", SCALE: "scaling", STRETCH: "length of each vector"}
    found = [word for name, word in moves.items() if name in term.free and not (name == SCALE and STRETCH in term.free)]
    if SHIFT_ALONG in term.free and SHIFT not in term.free:
        found.append("shift by the running mean")
    return term.compares + (f"; free: {', '.join(found)}" if found else "")


def _texts(rows: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    return random_pair(6, width, seed + 101, dtype)[1].text


def _teachers_of(function: Callable[..., Tensor], **options: Any) -> Callable[[Case], Tensor]:
    """A function of (student, teacher) added over modalities."""
    return lambda c: function(c.student.image, c.teacher.image, **options) + function(c.student.text, c.teacher.text, **options)


def _gram(c: Case) -> Tensor:
    (z, t), (z0, t0) = c.student, c.teacher
    return F.gram_loss(z, z0) + F.gram_loss(t, t0) + F.gram_loss(z, z0, student_columns=t, teacher_columns=t0)


def _zscl(c: Case) -> Tensor:
    z, z0, texts, scale = c.student.image, c.teacher.image, c.inputs["texts"], c.inputs["logit_scale"]
    rows = F.similarity_kl_loss(z, z0, texts, logit_scale=scale)
    return rows + F.similarity_kl_loss(texts, texts, z, teacher_reference=z0, logit_scale=scale)


def _bank(rows: int, width: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"logit_scale": 2.0, "texts": _texts(rows, width, seed, dtype)}


_EVERY_RELATION = frozenset(MAPS) - {STRETCH}
TERMS = {
    "AverageVectorLoss": Term(
        geomreg.AverageVectorLoss,
        lambda c: F.average_vector_loss(*c.student, *c.teacher, mean=c.mean),
        frozenset({PERMUTATION, COMMON, EXCHANGE, SHIFT_IMAGES, SHIFT_ALONG}),
        "embeddings",
    ),
    "PairwiseVectorLoss": Term(
        geomreg.PairwiseVectorLoss,
        lambda c: F.pairwise_vector_loss(*c.student, *c.teacher),
        frozenset({PERMUTATION, COMMON, EXCHANGE, SHIFT_IMAGES, SHIFT, SHIFT_ALONG}),
        "each image minus its text",
        pairs=True,
    ),
    "DiVE": Term(
        geomreg.DiVE,
        lambda c: F.dive_loss(*c.student, *c.teacher, mean=c.mean),
        frozenset({PERMUTATION, COMMON, EXCHANGE, SHIFT_IMAGES, SHIFT_ALONG}),
        "embeddings, and each image minus its text",
        pairs=True,
    ),
    "FeatureDistillation": Term(
        geomreg.FeatureDistillation,
        _teachers_of(F.feature_distillation_loss),
        frozenset({PERMUTATION, COMMON, EXCHANGE, TURN_IMAGES, SHIFT_IMAGES}),
        "embeddings",
    ),
    "SelectiveDistillation": Term(
        partial(geomreg.SelectiveDistillation, threshold=1.0, scale=1.0),  # the default is saturated for raw random vectors
        lambda c: F.selective_distillation_loss(c.student.image, c.inputs["previous"].image, c.teacher.image, threshold=1.0, scale=1.0),
        frozenset({PERMUTATION, COMMON, TURN_IMAGES, SHIFT_IMAGES}),
        "image embeddings of one of two teachers",
        inputs=lambda rows, width, seed, dtype: {"previous": random_pair(rows, width, seed + 55, dtype)[1]},
        gradient=("image",),
        zero=False,
        degree=None,
    ),
    "CosineAnchor": Term(
        geomreg.CosineAnchor,
        _teachers_of(F.cosine_anchor_loss),
        frozenset({PERMUTATION, COMMON, EXCHANGE, TURN_IMAGES, SCALE, STRETCH}),
        "directions of the embeddings",
        degree=0,
        normalizes=False,
    ),
    "CyclicConsistency": Term(
        geomreg.CyclicConsistency,
        lambda c: F.cyclic_loss(*c.student),
        frozenset({PERMUTATION, COMMON, EXCHANGE, TURN}),
        "inner products of the images to those of their texts (no teacher)",
        teacher=False,
        pairs=True,
        separable=False,
        zero=False,
        degree=4,
    ),
    "GramStructure": Term(
        geomreg.GramStructure,
        _gram,
        frozenset({PERMUTATION, COMMON, EXCHANGE, TURN}),
        "inner products within the batch",
        separable=False,
        degree=4,
    ),
    "SimilarityKL": Term(
        geomreg.SimilarityKL,
        _zscl,
        frozenset({PERMUTATION, COMMON}),
        "similarities of the images to a bank of texts",
        inputs=_bank,
        gradient=("image",),
        separable=False,
        degree=None,
    ),
    "RelationalDistance": Term(
        geomreg.RelationalDistance,
        _teachers_of(F.relational_distance_loss),
        _EVERY_RELATION,
        "ratios of the distances within the batch",
        separable=False,
        degree=0,
        rows=2,
    ),
    "RelationalAngle": Term(
        geomreg.RelationalAngle,
        _teachers_of(F.relational_angle_loss),
        _EVERY_RELATION,
        "angles within the batch",
        separable=False,
        degree=0,
        rows=3,
    ),
    "ContrastiveReplay": Term(
        geomreg.ContrastiveReplay,
        lambda c: F.contrastive_loss(*c.student, logit_scale=c.inputs["logit_scale"]),
        frozenset({PERMUTATION, COMMON, EXCHANGE, TURN}),
        "which text belongs to which image (no teacher)",
        inputs=lambda *_: {"logit_scale": 2.0},
        teacher=False,
        pairs=True,
        separable=False,
        zero=False,
        degree=None,
    ),
    "TextEnergy": Term(
        geomreg.TextEnergy,
        lambda c: F.text_energy_loss(c.student.image, c.teacher.image, c.inputs["texts"], logit_scale=c.inputs["logit_scale"]),
        frozenset({PERMUTATION, COMMON, SHIFT_IMAGES}),
        "logits of the images for random texts",
        inputs=_bank,
        gradient=("image",),
        degree=None,  # of second degree in the images; the bank stays as it is
    ),
    "ContextKL": Term(
        geomreg.ContextKL,
        lambda c: F.context_kl_loss(c.student.image, c.teacher.image, c.inputs["texts"], logit_scale=c.inputs["logit_scale"]),
        frozenset({PERMUTATION, COMMON}),
        "distribution of the images over contexts",
        inputs=_bank,
        gradient=("image",),
        degree=None,
    ),
}


@dataclass(frozen=True)
class Other:
    """A regularizer that looks at no embeddings.

    Attributes:
        kind: what it looks at instead.
        compares: what it keeps, in the words of docs/regularizers.md.
        build: leaves with grad, and from them (module, named inputs); the leaves as they come or copies of them.
    """

    kind: str
    compares: str
    build: Callable[[Tensor], tuple[torch.nn.Module, dict[str, Any]]]


def _anchored(leaf: Tensor) -> tuple[torch.nn.Module, dict[str, Any]]:
    model = torch.nn.Module()
    model.weight = leaf
    term = geomreg.WeightAnchor(model)
    with torch.no_grad():
        leaf.mul_(1.5)
    return term, {}


OTHERS = {
    "FeatureMapDistance": Other(
        "feature maps",
        "normalised feature maps of several layers",
        lambda leaf: (geomreg.FeatureMapDistance(), {"feature_maps": [leaf], "teacher_feature_maps": [torch.ones_like(leaf)]}),
    ),
    "ProjectionOrthogonality": Other(
        "parameters", "orthogonal projections (no teacher)", lambda leaf: (geomreg.ProjectionOrthogonality(leaf, cross=0.0), {})
    ),
    "WeightAnchor": Other("parameters", "weights; with `fisher_diagonal` those that matter", _anchored),
}


# checks ---------------------------------------------------------------------------------------------------------------


def shape_and_gradient(term: Term) -> None:
    """0-d, fp32 or wider, finite; gradient to what it declares and to nothing else; nothing to the teacher."""
    for rows in {term.rows, 3, 7}:
        for width in (1, 5):
            one = case(term, max(rows, term.rows), width)
            value = called(term, term.build(), one)
            assert value.shape == ()
            assert value.dtype == torch.float64
            assert value.isfinite()
    one = case(term)
    called(term, term.build(), one).backward()
    for name in Embeddings._fields:
        gradient = getattr(one.student, name).grad
        if name in term.gradient:
            assert gradient is not None, f"no gradient to {name}"
            assert gradient.abs().max() > 0, f"zero gradient to {name}"
        else:
            assert gradient is None or not gradient.any(), f"gradient to {name}"
    assert all(value.grad is None for value in one.teacher)


def module_is_the_function(term: Term) -> None:
    """On unit vectors with ``normalize``, as they are without; a fresh mean is zero."""
    one = case(term)
    fresh = replace(one, mean=torch.zeros((), dtype=torch.float64))
    if term.normalizes:
        torch.testing.assert_close(called(term, term.build(normalize=False), one), term.function(fresh), rtol=1e-10, atol=1e-13)

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    units = Case(both(one.student, unit), both(one.teacher, unit), fresh.mean, embeddings_of(one.inputs, unit))
    torch.testing.assert_close(called(term, term.build(), one), term.function(units), rtol=1e-10, atol=1e-13)


def first_and_second_derivative(term: Term) -> None:
    """Against finite differences."""
    one = case(term, max(3, term.rows), 4)

    def value(*leaves: Tensor) -> Tensor:
        moved = one.student._replace(**dict(zip(term.gradient, leaves, strict=True)))
        return term.function(replace(one, student=moved))

    leaves = [getattr(one.student, name) for name in term.gradient]
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def cotangent(term: Term) -> None:
    """The gradient is linear in what comes from above."""
    one = case(term)
    plain = gradients(term, term.function(one), one)
    scaled = gradients(term, -3.7 * term.function(one), one)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(-3.7 * a, b, rtol=1e-11, atol=1e-15)


def functional_gradient(term: Term) -> None:
    """``torch.func.grad`` on the public function."""
    one = case(term)
    name = term.gradient[0]

    def value(x: Tensor) -> Tensor:
        return term.function(replace(one, student=one.student._replace(**{name: x})))

    expected = gradients(term, term.function(one), one)[0]
    fixed = replace(one, student=Embeddings(*(x.detach() for x in one.student)))
    one = fixed
    torch.testing.assert_close(torch.func.grad(value)(getattr(fixed.student, name)), expected, rtol=1e-11, atol=1e-15)


def strides(term: Term) -> None:
    """Memory layout changes nothing."""
    one = case(term)
    strided = replace(
        one, student=both(one.student, lambda x: x.t().contiguous().t()), teacher=both(one.teacher, lambda x: x.t().contiguous().t())
    )
    torch.testing.assert_close(term.function(strided), term.function(one), rtol=1e-11, atol=1e-15)
    for a, b in zip(gradients(term, term.function(strided), strided), gradients(term, term.function(one), one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def low_precision(term: Term) -> None:
    """bf16, fp16 and fp32 inputs, inside and outside of autocast, against float64 on the rounded inputs."""
    for dtype in LOW:
        for width in (3, 64):
            one = case(term, 7, width, dtype=dtype)
            wide = Case(
                both(one.student, Tensor.double),
                both(one.teacher, Tensor.double),
                one.mean.double(),
                embeddings_of(one.inputs, Tensor.double),
            )
            expected, value = called(term, term.build(), wide), called(term, term.build(), one)
            assert value.dtype == torch.float32
            for inside in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=inside):
                    again = called(term, term.build(), one)
                assert again.dtype == torch.float32
                assert torch.equal(value, again)
            assert value.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-7)
            for a, b in zip(gradients(term, value, one), gradients(term, expected, wide), strict=True):
                assert a.dtype == dtype
                assert (a.double() - b).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-6) * b.abs().max()


def zero_at_the_teacher(term: Term) -> None:
    """Value and gradient vanish there if and only if the term says so; away from it the loss is positive."""
    one = case(term)
    same = replace(one, student=Embeddings(*(value.clone().requires_grad_() for value in one.teacher)))
    value = called(term, term.build(), same)
    if term.zero:
        assert abs(value.item()) < 1e-12
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients(term, value, same))
    else:
        assert abs(value.item()) > 1e-3
    assert called(term, term.build(), one).item() > 1e-6


def not_a_number_propagates(term: Term) -> None:
    """GradScaler must see it."""
    for side in ("student", "teacher") if term.teacher else ("student",):
        one = case(term)
        with torch.no_grad():
            getattr(one, side).image[1, 2] = float("nan")
        assert not called(term, term.build(), one).isfinite()


def zero_rows_have_no_exploding_gradient(term: Term) -> None:
    """Not of size 1 / eps, in fp16 too, where that would be infinite and GradScaler would skip every step."""
    for dtype in (torch.float32, torch.float16):
        one = case(term, dtype=dtype)
        with torch.no_grad():
            one.student.image[0] = 0
        for gradient in gradients(term, called(term, term.build(), one), one):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e3


def mixed_dtypes(term: Term) -> None:
    """A wider teacher, or wider texts, are promoted to."""
    one = case(term, dtype=torch.float32)
    mixed = Case(one.student, both(one.teacher, Tensor.double), one.mean.double(), embeddings_of(one.inputs, Tensor.double))
    value = called(term, term.build(), mixed)
    assert value.item() == pytest.approx(called(term, term.build(), one).item(), rel=1e-4)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(term, value, mixed))


def extremes_stay_finite(term: Term) -> None:
    """Zero, tiny and huge vectors, repeated rows."""
    for change in (lambda x: 0 * x, lambda x: 1e-20 * x, lambda x: 1e15 * x, lambda x: x[:1].expand_as(x).clone()):
        one = case(term, dtype=torch.float32)
        one = replace(one, student=both(one.student, change))
        value = called(term, term.build(), one)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(term, value, one))


def edges_are_not_hidden(term: Term) -> None:
    """fp32 embeddings of every size: where lengths do not count the value is that of the directions, else it is not a silent 0.

    A run that diverged must not look perfect: a student of huge embeddings may give infinity, never the value of zeros.
    """
    one = case(term, dtype=torch.float32)
    zeros = called(term, term.build(), replace(one, student=both(one.student, lambda x: 0 * x))).item()
    unit = called(term, term.build(), one)
    for power in (-37, -30, -22, 19, 25, 30, 36):
        scaled = replace(one, student=both(one.student, lambda x, power=power: 10.0**power * x))
        value = called(term, term.build(), scaled)
        torch.testing.assert_close(value, unit, rtol=1e-4, atol=1e-6)
        if power < 0:
            assert all(gradient.isfinite().all() for gradient in gradients(term, value, scaled))
        elif term.normalizes:
            plain, raw = (called(term, term.build(normalize=False), each).item() for each in (one, scaled))
            assert raw != zeros
            assert not math.isfinite(raw) or (raw == pytest.approx(plain, rel=1e-4) if term.degree == 0 else raw > 1)


def near_duplicates_have_a_gradient(term: Term) -> None:
    """Rows that nearly coincide, in the student alone or in both: finite value and gradient."""
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    for apart in (0.0, 1e-38, 1e-30, 1e-20, 1e-13, 1e-8):
        for dtype in (torch.float32, torch.float64):
            one = case(term, 6, dtype=dtype)
            away = apart * torch.arange(6, dtype=dtype)[:, None] * torch.eye(6, 8, dtype=dtype)

            def doubled(x: Tensor, away: Tensor = away) -> Tensor:
                return x[rows] * (torch.arange(8) > 5) + away

            for moved in (replace(one, student=both(one.student, doubled)), replace(one, teacher=both(one.teacher, doubled))):
                value = called(term, term.build(), moved)
                assert value.isfinite()
                assert all(gradient.isfinite().all() for gradient in gradients(term, value, moved))


def infinity_propagates(term: Term) -> None:
    """A student with an infinite number gives no finite value."""
    one = case(term)
    with torch.no_grad():
        one.student.image[1, 2] = math.inf
    assert not called(term, term.build(), one).isfinite()


def no_row_is_refused(term: Term) -> None:
    """The mean over nothing would be NaN, and the sum a perfect 0."""
    one = case(term)
    none = replace(one, student=both(one.student, lambda x: x[:0]), teacher=both(one.teacher, lambda x: x[:0]))
    if "previous" in one.inputs:
        none = replace(none, inputs={"previous": both(one.inputs["previous"], lambda x: x[:0])})
    with pytest.raises(ValueError, match=r"expected .* embeddings of shape \(B, D\) with B, D >= 1"):
        called(term, term.build(), none)


def live_teacher_is_refused(term: Term) -> None:
    """A teacher with gradient is an error that says so."""
    if not term.teacher:
        return
    for name in term.gradient:
        one = case(term)
        live = one.teacher._replace(**{name: getattr(one.teacher, name).clone().requires_grad_()})
        with pytest.raises(ValueError, match=rf"{name} teacher.*requires grad"):
            called(term, term.build(), replace(one, teacher=live))


def missing_modality(term: Term) -> None:
    """What it needs must be there; what it does not need may be None."""
    one = case(term)
    for name in Embeddings._fields:
        lacking = replace(one, student=one.student._replace(**{name: None}), teacher=one.teacher._replace(**{name: None}))
        needed = name in term.gradient and (term.pairs or len(term.gradient) == 1 or isinstance(term.build(), geomreg.GramStructure))
        if needed:
            with pytest.raises(ValueError, match="None"):
                called(term, term.build(), lacking)
        else:
            assert called(term, term.build(), lacking).isfinite()


def separability(term: Term) -> None:
    """The mean over chunks is the whole, if and only if the term says so."""
    one = case(term, 7)

    def part(rows: slice) -> Tensor:
        inputs = dict(one.inputs)
        if "previous" in inputs:
            inputs["previous"] = both(inputs["previous"], lambda x: x[rows])
        chunk = replace(one, student=both(one.student, lambda x: x[rows]), teacher=both(one.teacher, lambda x: x[rows]), inputs=inputs)
        return term.function(chunk)

    chunks = (3 * part(slice(0, 3)) + 4 * part(slice(3, 7))) / 7
    assert torch.allclose(chunks, term.function(one), rtol=1e-9) == term.separable
    assert getattr(term.build(), "separable", False) == term.separable
    assert geomreg.WeightedSum(term=(1.0, term.build())).needs_teacher == term.teacher


def homogeneity(term: Term) -> None:
    """Scaling every embedding and the mean by 2 multiplies the loss by 2 to its degree; without a degree by no power."""
    one = case(term)

    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    scaled = Case(both(one.student, doubled), both(one.teacher, doubled), 2 * one.mean, embeddings_of(one.inputs, doubled))
    ratio = (term.function(scaled) / term.function(one)).item()
    if term.degree is not None:
        assert ratio == pytest.approx(2.0**term.degree, rel=1e-9)
    elif "texts" not in one.inputs or not isinstance(term.build(), geomreg.TextEnergy):
        assert all(ratio != pytest.approx(2.0**power, rel=1e-3) for power in range(9))


def unchanged(term: Term, name: str, seed: int, rows: int = 5, width: int = 4) -> bool:
    """Whether a map leaves the loss as it is in one case."""
    one = case(term, max(rows, term.rows), width, seed)
    return torch.allclose(term.function(MAPS[name](one, seed)), term.function(one), rtol=1e-7, atol=1e-10)


def counterexamples(term: Term) -> None:
    """Each map that is not declared changes the loss."""
    for name in MAPS:
        if name not in term.free:
            assert not all(unchanged(term, name, seed) for seed in range(3)), f"{name} is free and not declared"


def state(term: Term) -> None:
    """forward moves nothing that counts; step() does; copies go on alike and apart; state_dict resumes; no parameters."""
    module, options = term.build(), {"normalize": False} if term.normalizes else {}
    assert isinstance(module, geomreg.Regularizer)
    assert not list(module.parameters())
    assert tuple(getattr(module, "inputs", ())) + tuple(getattr(module, "optional_inputs", ())) == tuple(
        dict.fromkeys((*getattr(module, "inputs", ()), *case(term).inputs, *getattr(module, "optional_inputs", ())))
    ), "an input that the module does not declare"
    module = term.build(**options)
    first = called(term, module, case(term))
    assert torch.equal(called(term, module, case(term)), first), "forward moved the state"
    assert module.step() is None
    again = [called(term, twin, case(term, seed=1)) for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))]
    resumed = term.build(**options)
    resumed.load_state_dict(module.state_dict())
    expected = called(term, module, case(term, seed=1))
    for value in (*again, called(term, resumed, case(term, seed=1))):
        assert torch.equal(value, expected)


def options_are_used(term: Term) -> None:
    """``normalize`` changes the value."""
    if term.normalizes:
        values = [called(term, term.build(normalize=normalize), case(term)).item() for normalize in (True, False)]
        assert values[0] != pytest.approx(values[1], rel=1e-3)


CHECKS = [
    shape_and_gradient,
    module_is_the_function,
    first_and_second_derivative,
    cotangent,
    functional_gradient,
    strides,
    low_precision,
    zero_at_the_teacher,
    not_a_number_propagates,
    zero_rows_have_no_exploding_gradient,
    mixed_dtypes,
    extremes_stay_finite,
    edges_are_not_hidden,
    near_duplicates_have_a_gradient,
    infinity_propagates,
    no_row_is_refused,
    live_teacher_is_refused,
    missing_modality,
    separability,
    homogeneity,
    counterexamples,
    state,
    options_are_used,
]

"""WeightedSum: a sum, its parts, and the state of its terms."""

import copy

import pytest
import torch
from batches import gradients, random_pair

from geomreg import (
    AverageVectorLoss,
    ContextKL,
    ContrastiveReplay,
    DiVE,
    FeatureDistillation,
    PairwiseVectorLoss,
    Regularizer,
    SimilarityKL,
    Terms,
    WeightedSum,
)
from geomreg.schedules import BalancedWeight, Linear


def example():
    """Three terms, one with state."""
    return WeightedSum(avl=(3.0, AverageVectorLoss(decay=0.5)), pvl=(0.25, PairwiseVectorLoss()), fd=(2, FeatureDistillation()))


def test_value_and_gradient_are_the_weighted_sum():
    student, teacher = random_pair()
    value = example()(student, teacher)
    parts = [AverageVectorLoss()(student, teacher), PairwiseVectorLoss()(student, teacher), FeatureDistillation()(student, teacher)]
    expected = 3.0 * parts[0] + 0.25 * parts[1] + 2.0 * parts[2]
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for one, other in zip(gradients(value, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_terms_are_detached_and_unweighted():
    student, teacher = random_pair()
    terms = example().terms(student, teacher)
    assert isinstance(terms, Terms)
    assert list(terms.parts) == ["avl", "pvl", "fd"]
    assert terms.total.requires_grad
    assert not any(part.requires_grad for part in terms.parts.values())
    assert torch.equal(terms.parts["pvl"], PairwiseVectorLoss()(student, teacher))
    assert torch.equal(terms.total, example()(student, teacher))


def test_terms_collect_like_forward():
    called, listed = example(), example()
    for seed in range(2):
        called(*random_pair(seed=seed))
        listed.terms(*random_pair(seed=seed))
        called.step()
        listed.step()
    assert torch.equal(called.regularizers["avl"].mean, listed.regularizers["avl"].mean)
    assert called.regularizers["avl"].mean.any()


def test_step_reaches_nested_sums():
    inner, alone = AverageVectorLoss(), AverageVectorLoss()
    outer = WeightedSum(keep=(2.0, WeightedSum(avl=(1.0, inner))), pvl=(1.0, PairwiseVectorLoss()))
    outer(*random_pair())
    outer.step()
    alone(*random_pair())
    alone.step()
    assert torch.equal(inner.mean, alone.mean)
    assert isinstance(outer, Regularizer)


def test_evaluation_reaches_the_terms():
    keep = example().eval()
    keep(*random_pair())
    keep.train().step()
    assert keep.regularizers["avl"].mean.shape == ()


def test_state_resumes():
    saved = example()
    saved(*random_pair())
    saved.step()
    assert set(saved.state_dict()) == {"_extra_state", "regularizers.avl.mean"}
    resumed = example()
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(resumed(*random_pair(seed=1)), saved(*random_pair(seed=1)))


def test_zero_weight_gives_value_without_gradient():
    student, teacher = random_pair()
    terms = WeightedSum(dive=(0.0, DiVE())).terms(student, teacher)
    assert terms.total.item() == 0
    assert terms.parts["dive"].item() > 0
    assert not any(gradient.any() for gradient in gradients(terms.total, student))


def test_same_options_are_independent_instances():
    keep = WeightedSum(one=(1.0, AverageVectorLoss(decay=0.0)), two=(1.0, AverageVectorLoss(decay=1.0)))
    keep(*random_pair())
    keep.step()
    assert keep.regularizers["one"].mean.any()
    assert not keep.regularizers["two"].mean.any()


def test_discard_reaches_every_term_that_collects():
    keep = WeightedSum(one=(1.0, AverageVectorLoss(decay=0.0)), two=(1.0, FeatureDistillation()), three=(1.0, DiVE(decay=0.0)))
    keep(*random_pair())
    keep.discard()
    keep.step()
    assert not keep.regularizers["one"].mean.any()
    assert not keep.regularizers["three"].mean.any()


def test_scheduled_weights_move_in_step_and_resume():
    def build():
        return WeightedSum(falling=(Linear(3.0, 1.0, steps=4), FeatureDistillation()), fixed=(2.0, PairwiseVectorLoss()))

    keep, pair = build(), random_pair()
    parts = keep.terms(*pair).parts
    seen = []
    for _ in range(6):
        terms = keep.terms(*pair)
        torch.testing.assert_close(terms.total, keep.weights["falling"] * parts["falling"] + 2.0 * parts["fixed"])
        assert torch.equal(keep(*pair), terms.total)  # a forward moves nothing
        seen.append(keep.weights["falling"])
        if len(seen) == 3:
            resumed = build()
            resumed.load_state_dict(keep.state_dict())
            assert resumed.weights == keep.weights
        keep.step()
    assert seen == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    assert list(keep.weights) == ["falling", "fixed"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1", None])
def test_schedule_that_gives_no_weight(value):
    keep = WeightedSum(one=(lambda step: 1.0 if step == 0 else value, FeatureDistillation()))
    with pytest.raises(ValueError, match=r"^WeightedSum: expected the weight of one at step 1 as a finite number >= 0"):
        keep.step()


def test_inputs_reach_the_terms_that_take_them():
    student, teacher = random_pair()
    texts = random_pair(6, seed=1)[1].text
    keep = WeightedSum(replay=(1.0, ContrastiveReplay()), zscl=(2.0, SimilarityKL()), dive=(3.0, DiVE()))
    assert keep.inputs == ("logit_scale", "texts")
    assert keep.optional_inputs == ("labels",)
    labels = torch.tensor([0, 0, 1, 2, 3])
    parts = keep.terms(student, teacher, logit_scale=5.0, labels=labels, texts=texts).parts
    torch.testing.assert_close(parts["replay"], ContrastiveReplay()(student, logit_scale=5.0, labels=labels).detach())
    torch.testing.assert_close(parts["zscl"], SimilarityKL()(student, teacher, logit_scale=5.0, texts=texts).detach())
    nested = WeightedSum(inner=(1.0, keep))
    torch.testing.assert_close(nested(student, teacher, logit_scale=5.0, texts=texts), keep(student, teacher, logit_scale=5.0, texts=texts))


def test_terms_take_only_what_their_options_need():
    """So terms of different kinds go together."""
    student, teacher = random_pair()
    texts = random_pair(6, seed=1)[1].text
    keep = WeightedSum(
        distilled=(1.0, SimilarityKL(against="batch")), contexts=(1.0, ContextKL()), softmax=(1.0, ContrastiveReplay()),
        sigmoid=(1.0, ContrastiveReplay(form="sigmoid")),
    )  # fmt: skip
    assert keep(student, teacher, logit_scale=5.0, logit_bias=-1.0, texts=texts, labels=torch.arange(5)).isfinite()


def test_shared_terms_are_refused():
    term, weight = DiVE(), BalancedWeight(1.0)
    with pytest.raises(ValueError, match=r"^WeightedSum: expected a term and a balanced weight of its own for two"):
        WeightedSum(one=(1.0, term), two=(2.0, term))
    with pytest.raises(ValueError, match=r"^WeightedSum: expected a term and a balanced weight of its own for two"):
        WeightedSum(one=(weight, DiVE()), two=(weight, DiVE()))


def test_wrong_inputs():
    keep, pair = WeightedSum(replay=(1.0, ContrastiveReplay())), random_pair()
    with pytest.raises(TypeError, match=r"^WeightedSum: expected the inputs logit_scale, got no logit_scale"):
        keep(*pair)
    with pytest.raises(TypeError, match=r"^WeightedSum: expected inputs that a term takes, got logit_scal. Did you mean logit_scale"):
        keep(*pair, logit_scal=1.0)
    with pytest.raises(TypeError, match=r"^WeightedSum: expected inputs that a term takes, got x. Its terms take none"):
        WeightedSum(dive=(1.0, DiVE()))(*pair, x=1.0)


def test_repr_shows_the_weights():
    assert "avl: 3" in repr(example())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), True, "1", None, torch.tensor(1.0)])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match=r"^WeightedSum: expected the weight of avl as a finite number >= 0, got"):
        WeightedSum(avl=(weight, AverageVectorLoss()))


@pytest.mark.parametrize("entry", [AverageVectorLoss(), (1.0,), [1.0, AverageVectorLoss()], (1.0, AverageVectorLoss(), 2)])
def test_bad_entry(entry):
    with pytest.raises(TypeError, match=r"^WeightedSum: expected avl=\(weight, regularizer\), got"):
        WeightedSum(avl=entry)


@pytest.mark.parametrize("term", [torch.nn.Linear(2, 2), AverageVectorLoss, lambda student, teacher: 0, None])
def test_bad_term(term):
    with pytest.raises(TypeError, match=r"^WeightedSum: expected avl as an nn.Module with step\(\), got"):
        WeightedSum(avl=(1.0, term))


def test_no_terms():
    with pytest.raises(ValueError, match=r"^WeightedSum: expected at least one"):
        WeightedSum()


@pytest.mark.parametrize("name", ["train", "keys", "a.b", ""])
def test_names_that_cannot_be_used(name):
    with pytest.raises(ValueError, match=r"^WeightedSum: expected a plain name for a term"):
        WeightedSum(**{name: (1.0, FeatureDistillation())})


def test_a_term_in_the_weight_s_place_and_a_class():
    with pytest.raises(TypeError, match=r"^WeightedSum: expected dive=\(weight, regularizer\), got DiVE first\. Write the weight first"):
        WeightedSum(dive=(DiVE(), 1000.0))
    with pytest.raises(TypeError, match=r"^WeightedSum: expected dive as an nn.Module with step\(\), got the class DiVE\. Call it"):
        WeightedSum(dive=(1000.0, DiVE))

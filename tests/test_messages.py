"""What is no tensor of numbers, and options that do not exist, get one line of the house's form from every public function and class."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

import geomreg
import geomreg.functional
import geomreg.metrics
from geomreg import AverageVectorLoss, DiVE, Embeddings, Teacher, WeightedSum, backward, interpolate

HOUSE = re.compile(r"^[A-Za-z][\w. ]*: expected .+, got .+\. .+[.?]$", re.DOTALL)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
BAD = {
    "list": X.tolist(),
    "array": X.numpy(),
    "sparse": X.to_sparse(),
    "csr": X.to_sparse_csr(),
    "fp8": X.to(torch.float8_e4m3fn),
    "meta": X.to("meta"),
    "complex": X.to(torch.complex64),
    "nested": torch.nested.nested_tensor([X[0], X[1]]),
    "jagged": torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged),
    "output": BaseModelOutputWithPooling(last_hidden_state=X[None], pooler_output=X),
    "string": "x",
}
every_bad = pytest.mark.parametrize("kind", BAD)
INPUTS = {
    "logit_scale": 10.0,
    "texts": X,
    "labels": torch.arange(5),
    "previous": Embeddings(X, X),
    "feature_maps": [X],
    "teacher_feature_maps": [X],
}


def refused(call, *errors: type[Exception]) -> str:
    with pytest.raises(errors or (TypeError, ValueError)) as caught:
        call()
    assert HOUSE.match(str(caught.value)), caught.value
    assert type(caught.value) in (TypeError, ValueError)
    return str(caught.value)


def public_functions() -> dict[str, tuple[object, dict[str, object]]]:
    """With an argument for every parameter that needs one."""
    known = {"mean": torch.zeros(4), "logit_scale": 10.0, "k": 2}
    found = {}
    for room in (geomreg.functional, geomreg.metrics):
        for name in room.__all__:
            function = getattr(room, name)
            if not inspect.isfunction(function):
                continue
            needed = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
            arguments = {one: known.get(one, X) for one in needed}
            if any(isinstance(value, Tensor) for value in arguments.values()):
                found[name] = function, arguments
    return found


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
@every_bad
def test_functions(name, kind):
    function, arguments = FUNCTIONS[name]
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            refused(lambda: function(**{**arguments, key: BAD[kind]}))  # noqa: B023


def terms() -> list[type[nn.Module]]:
    kinds = [getattr(geomreg, name) for name in geomreg.regularizers.__all__ if hasattr(getattr(geomreg, name), "step")]
    return [kind for kind in kinds if all(one.default is not one.empty for one in inspect.signature(kind).parameters.values())]


@pytest.mark.parametrize("term", [one for one in terms() if one.__name__ != "FeatureMapDistance"])
@every_bad
def test_embeddings_of_terms(term, kind):
    regularizer = term()
    inputs = {key: INPUTS[key] for key in getattr(regularizer, "inputs", ())}
    sides = (0, 1) if WeightedSum(term=(1.0, term())).needs_teacher else (0,)
    for side in sides:
        pair = [Embeddings(X, X), Embeddings(X, X)]
        pair[side] = Embeddings(BAD[kind], X)
        refused(lambda: regularizer(*pair, **inputs))  # noqa: B023
    for key, value in inputs.items():
        if isinstance(value, Tensor) or key == "previous":
            bad = Embeddings(BAD[kind], X) if key == "previous" else BAD[kind]
            refused(lambda: regularizer(Embeddings(X, X), Embeddings(X, X), **{**inputs, key: bad}))  # noqa: B023


@every_bad
def test_what_encode_returns(kind):
    value, batch = BAD[kind], X
    text = refused(lambda: backward(lambda chunk: Embeddings(image=value), batch, lambda e: e.image.sum(), chunk_size=2))
    refused(lambda: backward(lambda chunk: value, batch, lambda e: e.image.sum(), chunk_size=2))
    refused(lambda: backward(lambda c: Embeddings(image=c.clone().requires_grad_()), batch, lambda e: value, chunk_size=2))
    refused(lambda: Teacher(nn.Linear(1, 1), lambda model, batch: value)(batch))
    if kind != "complex":  # that is the terms' to refuse
        refused(lambda: Teacher(nn.Linear(1, 1), lambda model, batch: Embeddings(image=value))(batch))
    if kind == "output":
        assert text.endswith("got BaseModelOutputWithPooling. Take its .pooler_output.")


def test_outputs_of_transformers():
    output = CLIPOutput(image_embeds=X, text_embeds=X)
    assert refused(lambda: AverageVectorLoss()(Embeddings(image=output), Embeddings(image=X))).endswith("Take its .image_embeds.")


@pytest.mark.parametrize("kind", [getattr(geomreg, name) for name in geomreg.regularizers.__all__] + [
    one for name in geomreg.metrics.__all__ if hasattr(one := getattr(geomreg.metrics, name), "compute")
])  # fmt: skip
def test_options(kind):
    """Misspelled, without a name, missing; the signature that ``help`` shows is that of the class."""
    parameters = inspect.signature(kind).parameters
    needed = {one.name: 2 for one in parameters.values() if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    options = sorted((one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY), key=len)
    if options:
        wrong = options[-1][:-2] + options[-1][-1] + options[-1][-2]
        text = refused(lambda: kind(**needed, **{wrong: 1}), TypeError)
        assert text.startswith(f"{kind.__name__}: expected options that it has, got {wrong}. Did you mean {options[-1]}?")
    places = sum(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters.values())
    assert "without one" in refused(lambda: kind(*[X] * (places + 1)), TypeError)
    if needed:
        assert f"expected {', '.join(needed)}, got no value" in refused(kind, TypeError)
    assert "self" not in parameters


def test_weighted_sum_and_interpolate():
    assert "got DiVE without a name. Write WeightedSum(dive=" in refused(lambda: WeightedSum(DiVE()), TypeError)
    assert refused(lambda: DiVE(decya=0.9)) == "DiVE: expected options that it has, got decya. Did you mean decay?"
    for bad in ([1.0], np.ones(2)):
        assert "expected a tensor for 'a'" in refused(lambda: interpolate({"a": bad}, {"a": torch.ones(2)}, 0.5), TypeError)  # noqa: B023

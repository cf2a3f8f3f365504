"""Weights stay near their start: L2-SP (arXiv 1802.01483), and EWC with a Fisher diagonal (arXiv 1612.00796)."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from geomreg.checks import check_anchors, check_module, check_prefixes
from geomreg.precision import apply_keeping_fp32, at_least_fp32
from geomreg.regularizers.common import summed
from geomreg.types import Embeddings

__all__ = ["WeightAnchor", "fisher_diagonal", "weight_anchor_loss"]


def weight_anchor_loss(
    parameters: Mapping[str, Tensor], anchors: Mapping[str, Tensor], *, fisher: Mapping[str, Tensor] | None = None
) -> Tensor:
    r"""Half the squared distance of the weights to their anchors, each weight by its importance.

    .. math:: \frac12 \sum_n F_n (\theta_n - \theta^*_n)^2, \quad F = 1 \text{ for L2-SP}

    Args:
        parameters: live parameters by name; receive gradient.
        anchors: the values to stay near, with the same names and shapes; constant.
        fisher: importance of each weight (:func:`fisher_diagonal`), with the same names and shapes; constant. None: all 1.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Weight units squared, *summed* over all weights, with the half. L2-SP's code and Avalanche's EWC leave the half out: their
        weight is half of the one here.

    Invariances:
        A common translation of weights and anchors.

    Raises:
        ValueError: names or shapes that differ, no parameter, anchors or importances that require grad.

    Deviations:
        L2-SP has a second weight for the new head: leave the head out of ``parameters``. Weight decay of the optimizer still
        pulls to 0, and Adam rescales the pull of each weight.

    Example:
        >>> import torch
        >>> weight_anchor_loss({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
        tensor(2.)

    Reference:
        Li et al., Explicit inductive bias for transfer learning, ICML 2018, arXiv 1802.01483, equation 2; Kirkpatrick et al.,
        Overcoming catastrophic forgetting, PNAS 2017, arXiv 1612.00796, equation 3.
    """
    name = "weight_anchor_loss"
    check_anchors(name, "anchors", parameters, anchors)
    if fisher is not None:
        check_anchors(name, "fisher", parameters, fisher)

    def term(key: str, value: Tensor) -> Tensor:
        square = (at_least_fp32(value) - at_least_fp32(anchors[key]).to(value.device)).square()
        return square.sum() if fisher is None else (at_least_fp32(fisher[key]).to(value.device) * square).sum()

    return summed(term(key, value) for key, value in parameters.items()) / 2


def fisher_diagonal(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Empirical Fisher diagonal: the mean over samples of each weight's squared gradient, of one sample at a time.

    Args:
        model: evaluated as it is (call ``.eval()`` first: dropout would add its noise); no gradient is left behind.
        loss: ``loss(model, sample) -> 0-d`` for one sample: the tensors of a batch with a leading dimension of 1.
        batches: tensors, or tuples, lists or dicts of tensors, with samples along dimension 0; memory is that of the gradients
            of one batch's samples.

    Returns:
        Parameter name to tensor of its shape in fp32 or wider, for parameters that require grad.

    Raises:
        ValueError: no samples, or no parameter that requires grad.

    Reference:
        With true labels in the loss: the empirical Fisher; with labels drawn from the model: the Fisher of arXiv 1612.00796.
    """
    check_module("fisher_diagonal", "model", model)
    parameters = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ValueError("fisher_diagonal: expected parameters that require grad, got none. Unfreeze what is to be anchored.")

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(f"fisher_diagonal: expected no batch normalisation in training mode, got {name!r}. Call model.eval() first.")

    class OfSample(nn.Module):
        """Calls the loss with the model itself, whose weights functional_call exchanges."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: Any) -> Tensor:
            return loss(self.model, sample)

    of_sample = OfSample()

    def one(weights: dict[str, Tensor], sample: Any) -> Tensor:
        alone = tree_map(lambda value: value[None], sample)
        found: Tensor = functional_call(of_sample, {f"model.{key}": value for key, value in weights.items()}, (alone,))
        return found

    of_samples = vmap(grad(one), in_dims=(None, 0), randomness="different")
    totals = {key: torch.zeros_like(at_least_fp32(value)) for key, value in parameters.items()}
    samples = 0
    for batch in batches:
        gradients = of_samples(parameters, batch)
        for key, gradient in gradients.items():
            totals[key] += at_least_fp32(gradient).square().sum(dim=0)
        samples += len(next(iter(gradients.values())))
    if not samples:
        raise ValueError("fisher_diagonal: expected samples, got no batch. Pass a data loader with data.")
    return {key: value / samples for key, value in totals.items()}


class _Values(nn.Module):
    """Clones of tensors by name, saved; whatever ``.to(dtype)`` does, they stay the values they were."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.keys = {name: name.replace(".", "/") for name in values}  # buffers cannot have a dot in their name
        for name, key in self.keys.items():
            self.register_buffer(key, values[name].detach().clone())

    def named(self) -> dict[str, Tensor]:
        return {name: getattr(self, key) for name, key in self.keys.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Values":
        apply_keeping_fp32(self, partial(super()._apply, fn, recurse))
        return self


class WeightAnchor(nn.Module):
    """Module form of :func:`weight_anchor_loss` on a model's live weights; the embeddings are not looked at.

    The anchors are cloned when this is built, and saved: a resumed run stays near the same start. The live weights are held, not
    registered: ``parameters()`` stays empty. A deep copy or a pickle holds a copy of them, which no longer is the model's.

    Args:
        model: its parameters that require grad are anchored at their present values.
        fisher: importance of each, by name; None: all 1 (L2-SP).
        exclude: prefixes of names to leave free, such as a new head.
    """

    separable: ClassVar[bool] = True

    def __init__(self, model: nn.Module, *, fisher: Mapping[str, Tensor] | None = None, exclude: tuple[str, ...] = ()) -> None:
        super().__init__()
        check_module("WeightAnchor", "model", model)
        live = {key: value for key, value in model.named_parameters() if value.requires_grad}
        check_prefixes("WeightAnchor", "exclude", exclude, live)
        parameters = {key: value for key, value in live.items() if not key.startswith(tuple(exclude))}
        check_anchors("WeightAnchor", "anchors", parameters, parameters, constant=False)
        self._held = (parameters,)  # in a tuple, so that nn.Module does not register them
        self.anchors, self.fisher = _Values(parameters), None
        if fisher is not None:
            importances = {key: fisher[key] for key in parameters if key in fisher}
            check_anchors("WeightAnchor", "fisher", parameters, importances)
            self.fisher = _Values(importances)

    def forward(self, student: Embeddings | None = None, teacher: Embeddings | None = None) -> Tensor:
        (parameters,) = self._held
        return weight_anchor_loss(parameters, self.anchors.named(), fisher=None if self.fisher is None else self.fisher.named())

    def step(self) -> None:
        """Nothing to commit: the anchors stay."""

"""Weights stay near their start: L2-SP (arXiv 1802.01483), and EWC with a Fisher diagonal (arXiv 1612.00796)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from geomreg.checks import check_anchors
from geomreg.precision import at_least_fp32
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


def fisher_diagonal(model: nn.Module, loss: Callable[[Callable[..., Any], Any], Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
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
    parameters = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ValueError("fisher_diagonal: expected parameters that require grad, got none. Unfreeze what is to be anchored.")

    def one(weights: dict[str, Tensor], sample: Any) -> Tensor:
        alone = tree_map(lambda value: value[None], sample)
        return loss(lambda *arguments, **options: functional_call(model, weights, arguments, options), alone)

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


class WeightAnchor(nn.Module):
    """Module form of :func:`weight_anchor_loss` on a model's live weights; the embeddings are not looked at.

    The anchors are cloned when this is built, and saved: a resumed run stays near the same start. The live weights are held, not
    registered: ``parameters()`` stays empty. A deep copy or a pickle holds a copy of them, which no longer is the model's.

    Args:
        model: its parameters that require grad are anchored at their present values.
        fisher: importance of each, by name; None: all 1 (L2-SP).
        exclude: prefixes of names to leave free, such as a new head.
    """

    def __init__(self, model: nn.Module, *, fisher: Mapping[str, Tensor] | None = None, exclude: tuple[str, ...] = ()) -> None:
        super().__init__()
        parameters = {key: value for key, value in model.named_parameters() if value.requires_grad and not key.startswith(tuple(exclude))}
        check_anchors("WeightAnchor", "anchors", parameters, parameters, constant=False)
        self._held = (parameters,)  # in a tuple, so that nn.Module does not register them
        self.anchors, self.fisher = nn.Module(), None if fisher is None else nn.Module()
        for key, value in parameters.items():
            self.anchors.register_buffer(key.replace(".", "/"), value.detach().clone())
        if fisher is not None and self.fisher is not None:
            importances = {key: fisher[key] for key in parameters if key in fisher}
            check_anchors("WeightAnchor", "fisher", parameters, importances)
            for key, importance in importances.items():
                self.fisher.register_buffer(key.replace(".", "/"), importance.detach().clone())

    def forward(self, student: Embeddings | None = None, teacher: Embeddings | None = None) -> Tensor:
        (parameters,) = self._held

        def of(part: nn.Module) -> dict[str, Tensor]:
            return {key.replace("/", "."): value for key, value in part.named_buffers()}

        return weight_anchor_loss(parameters, of(self.anchors), fisher=None if self.fisher is None else of(self.fisher))

    def step(self) -> None:
        """Nothing to commit: the anchors stay."""

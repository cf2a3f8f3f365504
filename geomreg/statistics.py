"""Running statistics of batch normalisations, which belong to the weights that they were collected with.

A mean of weights has other activations than either model. Three rules, one for each way to average:

- the mean at the end of a run (``average_every``) has them collected anew by :func:`recompute_statistics`: the data are there;
- an averaged teacher and :func:`geomreg.interpolate` know no data: they average them and warn, so that the caller collects them anew
  with the same function.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geomreg.distributed import all_reduce_sum, world_size

__all__ = ["moving_statistics", "recompute_statistics", "warn_of_mixed_statistics"]

_STATISTICS = ("running_mean", "running_var")


def moving_statistics(model: nn.Module) -> list[str]:
    """Names of the batch normalisations whose running statistics move with every batch: those in training mode."""
    moving = {id(layer) for layer in _layers(model) if layer.training}
    return [name for name, module in model.named_modules() if id(module) in moving]


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], object]) -> int:
    """Running statistics of all batch normalisations as a pass over ``batches`` with the present weights has them.

    Each is the mean of the batches' statistics, over all processes if there are several: then every one calls this, with equally many
    batches. All else is in evaluation mode for the pass. ``num_batches_tracked`` counts the batches of this process. Modes and momenta are
    as before afterwards; a model without running statistics is not run.

    Args:
        model: whose statistics are replaced.
        batches: training data, as many batches as a stable mean takes.
        run: ``run(model, batch)``, a forward pass through all that is to be measured.

    Returns:
        The number of batches.

    Raises:
        ValueError: no batch; the statistics stay as they were.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> recompute_statistics(model, [torch.tensor([[1.0], [3.0]])], lambda model, batch: model(batch))
        1
        >>> model.running_mean
        tensor([2.])
    """
    layers = _layers(model)
    if not layers:
        return 0
    before = [{name: getattr(layer, name).clone() for name in (*_STATISTICS, "num_batches_tracked")} for layer in layers]
    modes, momenta = [(module, module.training) for module in model.modules()], [layer.momentum for layer in layers]
    count = 0
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches
            layer.train()
        for batch in batches:
            run(model, batch)
            count += 1
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        if not count:
            _restore(layers, before)
    if not count:
        raise ValueError("recompute_statistics: expected batches of training data, got none. Pass a few.")
    for layer in layers:
        for name in _STATISTICS:
            value = getattr(layer, name)
            value.copy_(all_reduce_sum(value) / world_size())
    return count


def _restore(layers: list[_BatchNorm], before: list[dict[str, Tensor]]) -> None:
    for layer, values in zip(layers, before, strict=True):
        for name, value in values.items():
            getattr(layer, name).copy_(value)


def warn_of_mixed_statistics(name: str, start: Mapping[str, Tensor], stop: Mapping[str, Tensor]) -> None:
    """Warn where two state dicts to be mixed have different running statistics of batch normalisations."""
    different = [key for key in stop if key.rpartition(".")[2] in _STATISTICS and not torch.equal(start[key].to(stop[key]), stop[key])]
    if different:
        warnings.warn(
            f"{name}: expected equal running statistics of batch normalisations, got different ones in {different[0]!r}"
            f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}. Their mean is that of no model: load the result and call "
            "geomreg.recompute_statistics with some training data.",
            stacklevel=3,
        )

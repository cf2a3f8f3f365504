"""Running statistics of batch normalisations, which belong to the weights that they were collected with.

A mean of weights has other activations than either model. Three rules, one for each way to average:

- the mean at the end of a run (``average_every``) and its ensemble have them collected anew by :func:`recompute_statistics`: the data
  are there, and ``geomreg ensemble`` asks for some;
- an averaged teacher that is shown the student's batches (:meth:`geomreg.Teacher.follow`, as in a run) has them follow its own weights;
- without data an averaged teacher and :func:`geomreg.interpolate` average them and warn, so that the caller collects them anew.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geomreg.distributed import all_reduce_sum, world_size

__all__ = ["STATISTICS", "follow_statistics", "mixed_statistics", "moving_statistics", "recompute_statistics", "warn_of_mixed_statistics"]

STATISTICS = ("running_mean", "running_var")


def moving_statistics(model: nn.Module) -> list[str]:
    """Names of the batch normalisations whose running statistics move with every batch: those in training mode."""
    moving = {id(layer) for layer in _layers(model) if layer.training}
    return [name for name, module in model.named_modules() if id(module) in moving]


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    *,
    names: Collection[str] | None = None,
    alone: bool = False,
) -> int:
    """Running statistics of all batch normalisations as a pass over ``batches`` with the present weights has them.

    Each is the mean of the batches' statistics, over all processes if there are several: then every one calls this, with equally many
    batches. All else is in evaluation mode for the pass. ``num_batches_tracked`` counts the batches of this process. Modes and momenta are
    as before afterwards; a model without running statistics is not run, and a layer that ``run`` does not reach keeps its own.

    Args:
        model: whose statistics are replaced.
        batches: training data, as many batches as a stable mean takes.
        run: ``run(model, batch)``, a forward pass through all that is to be measured.
        names: of the batch normalisations that are meant, as :meth:`torch.nn.Module.named_modules` has them; by default all.
        alone: one process of several calls this, and counts its own batches.

    Returns:
        The number of batches.

    Raises:
        ValueError: no batch, a name that is no module's, or activations that are not finite; the statistics stay as they were.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> recompute_statistics(model, [torch.tensor([[1.0], [3.0]])], lambda model, batch: model(batch))
        1
        >>> model.running_mean
        tensor([2.])
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names or () if name not in modules]:
        raise ValueError(f"recompute_statistics: expected names of modules, got {unknown[0]!r}. Take those of named_modules().")
    meant = None if names is None else {id(modules[name]) for name in names}
    layers = [layer for layer in _layers(model) if meant is None or id(layer) in meant]
    if not layers:
        return 0
    before = [{name: getattr(layer, name).clone() for name in (*STATISTICS, "num_batches_tracked")} for layer in layers]
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
        if broken := next((layer for layer in layers if not layer.get_buffer("running_mean").isfinite().all()), None):
            raise ValueError(
                f"recompute_statistics: expected finite activations, got others before a {type(broken).__name__} of "
                f"{broken.num_features} features. Look at the batches and the weights."
            )
    except BaseException:
        count = 0  # nothing half-made stays
        raise
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        passed_over = [not count or layer.num_batches_tracked == 0 for layer in layers]
        for layer, values, unchanged in zip(layers, before, passed_over, strict=True):
            if unchanged:
                _restore(layer, values)
    if not count:
        raise ValueError("recompute_statistics: expected batches of training data, got none. Pass a few.")
    if not alone:
        _share(layers)
    return count


@torch.no_grad()
def follow_statistics(model: nn.Module, names: Collection[str], run: Callable[[], object]) -> None:
    """Let the named batch normalisations see one batch in training mode, all else in evaluation mode.

    Several processes begin with the first one's statistics, and each goes on with its own batch: as DistributedDataParallel does with
    those of the student.

    Args:
        model: whose running statistics move, each by its own momentum.
        names: as :func:`moving_statistics` gives them.
        run: a forward pass of the batch.
    """
    layers = [model.get_submodule(name) for name in names]
    modes = [(module, module.training) for module in model.modules()]
    if world_size() > 1:
        for layer in layers:
            for value in layer.buffers():
                dist.broadcast(value, 0)
    try:
        model.eval()
        for layer in layers:
            layer.train()
        run()
    finally:
        for module, training in modes:
            module.training = training


def _share(layers: Iterable[_BatchNorm]) -> None:
    """The mean of all processes."""
    for layer in layers:
        for name in STATISTICS:
            value = getattr(layer, name)
            value.copy_(all_reduce_sum(value) / world_size())


def _restore(layer: _BatchNorm, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        getattr(layer, name).copy_(value)


def mixed_statistics(start: Mapping[str, Tensor], stop: Mapping[str, Tensor]) -> list[str]:
    """Keys of running statistics of batch normalisations that differ between two state dicts that are to be mixed."""
    return [key for key in stop if key.rpartition(".")[2] in STATISTICS and not torch.equal(start[key].to(stop[key]), stop[key])]


def warn_of_mixed_statistics(name: str, start: Mapping[str, Tensor], stop: Mapping[str, Tensor]) -> None:
    """Warn where two state dicts to be mixed have different running statistics of batch normalisations."""
    if different := mixed_statistics(start, stop):
        warnings.warn(
            f"{name}: expected equal running statistics of batch normalisations, got different ones in {different[0]!r}"
            f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}. Their mean is that of no model: load the result and call "
            "geomreg.recompute_statistics with some training data.",
            stacklevel=3,
        )

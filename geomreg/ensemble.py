"""Weight-space ensembles of a pre-trained and a fine-tuned model (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from geomreg.checks import check_fraction, check_mixed, check_same_keys
from geomreg.precision import at_least_fp32
from geomreg.statistics import warn_of_mixed_statistics

__all__ = ["alpha_sweep", "interpolate"]


def interpolate(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    r"""State dict between two checkpoints of one architecture.

    .. math:: \theta = (1 - \alpha)\, \theta_{pretrained} + \alpha\, \theta_{finetuned}

    Every floating-point entry is interpolated, in fp32 or wider, and keeps its dtype; integer and boolean entries
    (counters, indices) are those of ``finetuned``. CLIP's log logit scale is interpolated like the rest, which is the
    geometric mean of the scales. A zero-shot head must be rebuilt afterwards. Running statistics of batch normalisations
    are interpolated too, and then belong to no model: where they differ, a warning says to collect them anew with
    :func:`geomreg.recompute_statistics`.

    Args:
        pretrained: state dict; its floating-point entries are the result at ``alpha=0``.
        finetuned: state dict with the same keys and shapes, the result at ``alpha=1``.
        alpha: in [0, 1].

    Returns:
        New state dict; no tensor shares storage with the inputs.

    Raises:
        ValueError: ``alpha`` outside [0, 1], a key missing on one side, shapes or kinds of numbers that differ, NaN, infinity on one
            side alone.

    Example:
        >>> import torch
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
        tensor([0.2500, 0.2500])

    Reference:
        Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903, equation 1.
    """
    check_fraction("interpolate", "alpha", alpha)
    check_same_keys("interpolate", pretrained, finetuned)
    if 0 < alpha < 1:
        warn_of_mixed_statistics("interpolate", pretrained, finetuned)
    return _mixed(pretrained, finetuned, alpha)


def _mixed(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    merged = {}
    for key, end in finetuned.items():
        if end.is_floating_point():
            wide = torch.promote_types(at_least_fp32(end).dtype, pretrained[key].dtype)
            start = pretrained[key].detach().to(end.device, wide)
            stop = end.detach().to(wide)
            mixed = torch.where(start == stop, stop, torch.lerp(start, stop, float(alpha)))  # masks hold -inf
            check_mixed("interpolate", key, start, stop, mixed)
            merged[key] = mixed.to(end.dtype)
        else:
            merged[key] = end.detach().clone()
    return merged


def alpha_sweep(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alphas: Iterable[float]
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """``(alpha, interpolate(pretrained, finetuned, alpha))`` for each alpha, one state dict at a time."""
    for alpha in alphas:
        check_fraction("interpolate", "alpha", alpha)
        check_same_keys("interpolate", pretrained, finetuned)
        if 0 < alpha < 1:
            warn_of_mixed_statistics("interpolate", pretrained, finetuned)
        yield alpha, _mixed(pretrained, finetuned, alpha)

"""Feature maps of several layers stay where the frozen model has them (LDIFS, arXiv 2308.13320)."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar

from torch import Tensor, nn

from geomreg.checks import check_axis, check_layers, check_map_pair, check_maps, check_module, check_positive
from geomreg.distributed import weighted_by_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import summed, unit_along
from geomreg.types import Embeddings

__all__ = ["FeatureMapDistance", "FeatureMaps", "feature_map_distance_loss"]


def feature_map_distance_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, axis: int = -1, eps: float = 1e-10) -> Tensor:
    r"""Mean squared difference of normalised feature maps, averaged over layers.

    .. math:: \frac1L \sum_l \mathrm{mean}\, \big( \hat x_l - \hat x^0_l \big)^2, \quad \hat x = \frac{x}{\lVert x \rVert + \epsilon}

    Args:
        student: L feature maps ``(B, ..., C)`` of the model in training; each receives gradient.
        teacher: L maps of the same inputs and layers by the frozen model; constant.
        axis: along which a vector is normalised. -1: the channels of each token. The authors normalise over axis 1, which
            for ``(B, tokens, C)`` maps of a ViT are the tokens; pass ``axis=1`` for their numbers. It is also the
            channel axis of ``(B, C, H, W)`` maps.
        eps: added to the norm.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Free of units; a mean over samples, tokens, channels and layers, so about ``1 / C`` of a squared distance of unit vectors.
        LDIFS uses a weight of 10.

    Invariances:
        Permutation of samples and, together in student and teacher, of tokens and channels; positive scaling of each map.

    Raises:
        TypeError: no sequence of floating-point tensors.
        ValueError: no layer, numbers of layers, shapes or devices that differ, a teacher that requires grad, an axis that a
            map does not have.

    Deviations:
        The default axis; see ``axis``.

    Example:
        >>> import torch
        >>> feature_map_distance_loss([torch.tensor([[3.0, 0.0]])], [torch.tensor([[0.0, 2.0]])])
        tensor(1.)

    Reference:
        Mukhoti et al., Fine-tuning can cripple your foundation model, TMLR 2024, arXiv 2308.13320, equation 3.
    """
    name = "feature_map_distance_loss"
    check_maps(name, student, teacher)
    check_positive(name, "eps", eps)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        with full_precision(one):
            return (unit_along(at_least_fp32(one), axis, eps) - unit_along(at_least_fp32(other), axis, eps)).square().mean()

    for one, other in zip(student, teacher, strict=True):
        check_map_pair(name, one, other, axis)
    return summed(distance(one, other) for one, other in zip(student, teacher, strict=True)) / len(student)


class FeatureMaps:
    """Collects the outputs of some layers of a model while a context is open.

    Args:
        model: any ``nn.Module``. An output that a later layer changes in place is seen changed. Run it uncompiled: code that torch.compile
            made before the context was opened passes hooks over.
        layers: names as in ``model.named_modules()``; LDIFS takes ``ln_pre`` and blocks 3, 6, 9 and 12 of a ViT.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> with FeatureMaps(model, ["0", "1"]) as maps:
        ...     _ = model(torch.ones(4, 2))
        >>> [tuple(value.shape) for value in maps.values]
        [(4, 3), (4, 3)]
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        check_module("FeatureMaps", "model", model)
        self._model, known = model, dict(model.named_modules())
        self._modules = [known[layer] for layer in check_layers("FeatureMaps", layers, known)]
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def values(self) -> list[Tensor]:
        """The last output of each layer, in the order of ``layers``."""
        missing = [k for k in range(len(self._modules)) if k not in self._found]
        if missing:
            hint = (
                "torch.compile skips hooks that are added after it compiled the model or what runs it: run the model uncompiled in the "
                'context, under torch.compiler.set_stance("force_eager"), say'
                if any(_compiled(module) for module in self._model.modules()) or _compiled_before()
                else "Run the model in the context"
            )
            raise RuntimeError(f"FeatureMaps: expected an output of every layer, got none of {len(missing)}. {hint}.")
        return [self._found[k] for k in range(len(self._modules))]

    def __enter__(self) -> "FeatureMaps":
        self._found.clear()
        for k, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(lambda _, __, output, k=k: self._keep(k, output)))
        return self

    def _keep(self, k: int, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"FeatureMaps: expected a tensor from each layer, got {type(output).__name__}. Choose an inner layer.")
        self._found[k] = output

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _compiled_before() -> bool:
    """Something was compiled in this process, be it a function around the model, of which the model knows nothing."""
    utilities = sys.modules.get("torch._dynamo.utils")
    return utilities is not None and utilities.counters["frames"]["ok"] > 0


class FeatureMapDistance(nn.Module):
    """Module form of :func:`feature_map_distance_loss`; takes ``feature_maps=`` of the student and ``teacher_feature_maps=``.

    Collect both with :class:`FeatureMaps`; the embeddings are not looked at. Maps hold a batch's activations, so the chunked step
    refuses this term.

    Args:
        axis: along which a vector is normalised: -1 channels, 1 the authors' token axis.
        eps: added to the norm.
    """

    inputs: ClassVar[tuple[str, ...]] = ("feature_maps", "teacher_feature_maps")

    def __init__(self, *, axis: int = -1, eps: float = 1e-10) -> None:
        super().__init__()
        check_positive("FeatureMapDistance", "eps", eps)
        check_axis("FeatureMapDistance", axis)
        self.axis, self.eps = axis, eps

    def forward(
        self,
        student: Embeddings | None = None,
        teacher: Embeddings | None = None,
        *,
        feature_maps: Sequence[Tensor],
        teacher_feature_maps: Sequence[Tensor],
    ) -> Tensor:
        value = feature_map_distance_loss(feature_maps, teacher_feature_maps, axis=self.axis, eps=self.eps)
        return weighted_by_rows([(value, len(feature_maps[0]))], self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"axis={self.axis}, eps={self.eps}"

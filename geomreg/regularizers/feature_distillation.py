"""Feature distillation: embeddings stay where one teacher, or one of two, has them (SnD, arXiv 2403.09296)."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from geomreg.checks import check_modalities, check_number, check_pair, check_weight
from geomreg.distributed import weighted_by_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import chosen, unit_rows
from geomreg.types import Embeddings

__all__ = [
    "CosineAnchor",
    "FeatureDistillation",
    "SelectiveDistillation",
    "cosine_anchor_loss",
    "feature_distillation_loss",
    "selective_distillation_loss",
]


def feature_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared Euclidean distance of the embeddings to the teacher's.

    .. math:: \frac1B \sum_i \lVert z_i - z^0_i \rVert^2

    Args:
        student: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        teacher: ``(B, D)`` embeddings of the same inputs by the frozen model; constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Embedding units squared: summed over D, averaged over B (``mse_loss`` is this divided by D). For unit vectors
        ``2 - 2 cos``, between 0 and 4.

    Invariances:
        Permutation of samples; one orthogonal map or translation applied to both.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, or the teacher requires grad.

    Deviations:
        None known. SnD with two teachers is :func:`selective_distillation_loss`.

    Example:
        >>> import torch
        >>> feature_distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(5.)

    Reference:
        Yu et al., Select and Distill, ECCV 2024, arXiv 2403.09296; on both encoders: Yang et al., CLIP-KD (FD),
        arXiv 2307.12732.
    """
    check_pair("feature_distillation_loss", student, teacher)
    with full_precision(student):
        return (at_least_fp32(student) - at_least_fp32(teacher)).square().sum(dim=1).mean()


def selective_distillation_loss(
    student: Tensor,
    previous: Tensor,
    teacher: Tensor,
    *,
    threshold: float = 0.2,
    scale: float = 6.0,
    previous_weight: float = 9.0,
    teacher_weight: float = 0.5,
) -> Tensor:
    r"""Distillation from two frozen models, each sample mostly from the one that its difference points to.

    .. math:: \frac1B \sum_i \big( \lambda_p\, \eta_i \lVert z_i - z^p_i \rVert^2
              + \lambda_0\, (1 - \eta_i) \lVert z_i - z^0_i \rVert^2 \big), \quad
              \eta_i = \sigma\big(\gamma (\lVert z^0_i - z^p_i \rVert - \tau)\big)

    Where the two teachers differ, the sample belongs to what the previous model learned; where they agree, the
    pre-trained one may hold it. No score carries gradient: both teachers are constant.

    Args:
        student: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        previous: ``(B, D)`` embeddings of the same inputs by the model before this task (z^p); constant.
        teacher: ``(B, D)`` embeddings of the same inputs by the pre-trained model (z^0); constant.
        threshold: distance of the teachers at which both count half (tau; 0.2 in the authors' configuration).
        scale: steepness of the selection (gamma; 6 there).
        previous_weight: weight of the previous model (lambda_p; 9 there).
        teacher_weight: weight of the pre-trained model (lambda_0; 0.5 there).

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Embedding units squared (summed over D, averaged over B) for a given selection; ``threshold`` is a distance of
        embeddings and its default belongs to unit vectors.

    Invariances:
        Permutation of samples; one orthogonal map or translation applied to all three.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a teacher requires grad, an option that is not a finite number.

    Deviations:
        The authors' code multiplies ``(B, 1)`` scores with ``(B,)`` distances and averages the ``(B, B)`` product, which is
        the mean score times the mean distance: no selection. This is the paper's per-image selection.

    Example:
        >>> import torch
        >>> zero, far = torch.zeros(1, 2), torch.tensor([[10.0, 0.0]])
        >>> selective_distillation_loss(far, far, zero).item()  # the teachers differ: only the previous model counts
        0.0

    Reference:
        Yu et al., Select and Distill, ECCV 2024, arXiv 2403.09296; constants of the authors' configuration file.
    """
    name = "selective_distillation_loss"
    check_pair(name, student, previous, other="previous")
    check_pair(name, student, teacher)
    _check_selection(name, threshold, scale, previous_weight, teacher_weight)
    with full_precision(student):
        z, z_previous, z_teacher = (at_least_fp32(value) for value in (student, previous, teacher))
        score = torch.sigmoid(scale * (torch.linalg.vector_norm(z_teacher - z_previous, dim=1) - threshold))  # (B,)
        to_previous = (z - z_previous).square().sum(dim=1)  # (B,)
        to_teacher = (z - z_teacher).square().sum(dim=1)
        return (previous_weight * score * to_previous + teacher_weight * (1 - score) * to_teacher).mean()


def _check_selection(name: str, threshold: float, scale: float, previous_weight: float, teacher_weight: float) -> None:
    check_number(name, "threshold", threshold)
    for option, value in (("scale", scale), ("previous_weight", previous_weight), ("teacher_weight", teacher_weight)):
        check_weight(name, option, value)


def cosine_anchor_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean of one minus the cosine between student and teacher.

    .. math:: \frac1B \sum_i \big( 1 - \cos(z_i, z^0_i) \big) = \frac1{2B} \sum_i \lVert \hat z_i - \hat z^0_i \rVert^2

    The right-hand side, with unit vectors, is what is computed: one minus a cosine cancels near the teacher.

    Args:
        student: ``(B, D)`` embeddings of the model in training, of any length; receives gradient.
        teacher: ``(B, D)`` embeddings of the same inputs by the frozen model; constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Free of embedding units, between 0 and 2; averaged over B. Half of :func:`feature_distillation_loss` of unit
        vectors. A zero vector has no direction: 1/2 (1 - cos would be 1), and no gradient.

    Invariances:
        Permutation of samples; one orthogonal map applied to both; positive scaling of each vector.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, or the teacher requires grad.

    Deviations:
        None known.

    Example:
        >>> import torch
        >>> cosine_anchor_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(1.)

    Reference:
        The class ``CosineSimilarityLoss`` of SnD's code (arXiv 2403.09296), unused there.
    """
    check_pair("cosine_anchor_loss", student, teacher)
    return feature_distillation_loss(unit_rows(student), unit_rows(teacher)) / 2


class FeatureDistillation(nn.Module):
    """Module form of :func:`feature_distillation_loss`, added over modalities.

    Args:
        modalities: which embeddings to keep, ``("image",)`` for SnD, ``("image", "text")`` for both encoders; by
            default those that are given.
        normalize: divide embeddings by their L2 norm first (SnD does).
    """

    separable: ClassVar[bool] = True

    def __init__(self, *, modalities: tuple[str, ...] | None = None, normalize: bool = True) -> None:
        super().__init__()
        self.modalities = check_modalities("FeatureDistillation", modalities)
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        parts = chosen("FeatureDistillation", self.modalities, self.normalize, student, teacher)
        return weighted_by_rows(((feature_distillation_loss(one, other), len(one)) for one, other in parts), self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, normalize={self.normalize}"


class CosineAnchor(nn.Module):
    """Module form of :func:`cosine_anchor_loss`, added over modalities.

    Args:
        modalities: which embeddings to keep; by default those that are given.
    """

    separable: ClassVar[bool] = True

    def __init__(self, *, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.modalities = check_modalities("CosineAnchor", modalities)

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        parts = chosen("CosineAnchor", self.modalities, False, student, teacher)
        return weighted_by_rows(((cosine_anchor_loss(one, other), len(one)) for one, other in parts), self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}"


class SelectiveDistillation(nn.Module):
    """Module form of :func:`selective_distillation_loss`, added over modalities; takes the second teacher as ``previous=``.

    Args:
        modalities: which embeddings to keep; images alone by default, as in SnD.
        threshold: distance of the teachers at which both count half.
        scale: steepness of the selection.
        previous_weight: weight of the model before this task.
        teacher_weight: weight of the pre-trained model.
        normalize: divide embeddings by their L2 norm first (SnD does).
    """

    inputs: ClassVar[tuple[str, ...]] = ("previous",)
    separable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        modalities: tuple[str, ...] | None = ("image",),
        threshold: float = 0.2,
        scale: float = 6.0,
        previous_weight: float = 9.0,
        teacher_weight: float = 0.5,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.modalities = check_modalities("SelectiveDistillation", modalities)
        _check_selection("SelectiveDistillation", threshold, scale, previous_weight, teacher_weight)
        self.threshold, self.scale = threshold, scale
        self.previous_weight, self.teacher_weight, self.normalize = previous_weight, teacher_weight, normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None, *, previous: Embeddings) -> Tensor:
        parts = chosen("SelectiveDistillation", self.modalities, self.normalize, student, previous, teacher, labels=("previous", "teacher"))
        options = {"threshold": self.threshold, "scale": self.scale}
        options |= {"previous_weight": self.previous_weight, "teacher_weight": self.teacher_weight}
        loss: Callable[..., Tensor] = selective_distillation_loss
        return weighted_by_rows(((loss(*part, **options), len(part[0])) for part in parts), self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        names = ("modalities", "threshold", "scale", "previous_weight", "teacher_weight", "normalize")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

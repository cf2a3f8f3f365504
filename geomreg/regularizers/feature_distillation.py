"""Feature distillation: embeddings stay where the teacher has them (the distillation term of SnD, arXiv 2403.09296)."""

from torch import Tensor, nn

from geomreg.checks import check_embeddings, check_modalities, check_pair
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.average_vector import unit
from geomreg.types import Embeddings

__all__ = ["FeatureDistillation", "feature_distillation_loss"]


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
        SnD selects between two teachers per image; this is its single-teacher form.

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


class FeatureDistillation(nn.Module):
    """Module form of :func:`feature_distillation_loss`, added over modalities.

    Args:
        modalities: which embeddings to keep, ``("image",)`` for SnD, ``("image", "text")`` for both encoders; by
            default those that are given.
        normalize: divide embeddings by their L2 norm first (SnD does).
    """

    def __init__(self, *, modalities: tuple[str, ...] | None = None, normalize: bool = True) -> None:
        super().__init__()
        self.modalities = check_modalities("FeatureDistillation", modalities)
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        teacher = check_embeddings("FeatureDistillation", student, teacher, required=self.modalities or ())
        if self.normalize:
            student, teacher = unit(student), unit(teacher)
        terms = [
            feature_distillation_loss(one, other)
            for modality, one, other in zip(Embeddings._fields, student, teacher, strict=True)
            if one is not None and other is not None and (self.modalities is None or modality in self.modalities)
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, normalize={self.normalize}"

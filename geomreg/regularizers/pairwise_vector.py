"""Pairwise vector loss of DiVE: image and text of a pair should move by the same vector (arXiv 2511.09973)."""

from typing import ClassVar

from torch import Tensor, nn

from geomreg.checks import check_embeddings, check_pair, check_paired, check_pairs_present
from geomreg.distributed import weighted_by_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import unit
from geomreg.types import Embeddings

__all__ = ["PairwiseVectorLoss", "pairwise_vector_loss"]


def pairwise_vector_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    r"""Mean squared distance between the difference vectors of an image and of its text.

    .. math:: \frac1B \sum_j \lVert u_j - v_j \rVert^2, \quad u = f_{student} - f_{teacher} \text{ (images)},\; v \text{ likewise (texts)}

    Args:
        student_image: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        student_text: ``(B, D)`` embeddings of the paired texts, row j with image j; receives gradient.
        teacher_image: ``(B, D)`` embeddings of the same images by the frozen model; constant.
        teacher_text: ``(B, D)`` embeddings of the same texts by the frozen model; constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Embedding units squared: summed over D, averaged over B. At most twice the average vector loss, for any mean.

    Invariances:
        Permutation of pairs; one orthogonal map applied to both models and both modalities; any translation of all
        students (a common shift costs nothing); exchange of the modalities.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, or a teacher requires grad.

    Deviations:
        None known; the paper has no public code.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1, 2)
        >>> pairwise_vector_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), zero, zero)
        tensor(2.)

    Reference:
        Suzuki et al., Difference Vector Equalization, AAAI 2026, arXiv 2511.09973, pairwise vector loss.
    """
    name = "pairwise_vector_loss"
    check_pair(name, student_image, teacher_image, "image")
    check_pair(name, student_text, teacher_text, "text")
    check_paired(name, student_image, student_text)
    with full_precision(student_image):
        image_shift = at_least_fp32(student_image) - at_least_fp32(teacher_image)  # (B, D)
        text_shift = at_least_fp32(student_text) - at_least_fp32(teacher_text)
        return (image_shift - text_shift).square().sum(dim=1).mean()


class PairwiseVectorLoss(nn.Module):
    """Module form of :func:`pairwise_vector_loss`.

    Args:
        normalize: divide embeddings by their L2 norm first.
    """

    separable: ClassVar[bool] = True

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        teacher = check_embeddings("PairwiseVectorLoss", student, teacher)
        if self.normalize:
            student, teacher = unit(student), unit(teacher)
        pair, reference = (check_pairs_present("PairwiseVectorLoss", one) for one in (student, teacher))
        return weighted_by_rows([(pairwise_vector_loss(*pair, *reference), len(pair[0]))], self.training)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"

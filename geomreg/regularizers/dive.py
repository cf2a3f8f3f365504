"""DiVE: average and pairwise vector loss together (arXiv 2511.09973)."""

from torch import Tensor

from geomreg.checks import check_embeddings, check_paired, check_pairs_present
from geomreg.distributed import weighted_by_rows
from geomreg.regularizers.average_vector import AverageVectorLoss, average_vector_loss
from geomreg.regularizers.pairwise_vector import pairwise_vector_loss
from geomreg.types import Embeddings

__all__ = ["DiVE", "dive_loss"]


def dive_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor, *, mean: Tensor) -> Tensor:
    r"""Sum of :func:`average_vector_loss` and :func:`pairwise_vector_loss`, equal weights.

    .. math:: \frac1B \sum_j \big( \lVert u_j - m \rVert^2 + \lVert v_j - m \rVert^2 + \lVert u_j - v_j \rVert^2 \big)

    With ``a = (u + v) / 2 - m`` and ``b = (u - v) / 2`` this is ``2|a|^2 + 6|b|^2``: for m near zero, distillation on
    both encoders at about twice the weight.

    Args:
        student_image: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        student_text: ``(B, D)`` embeddings of the paired texts; receives gradient.
        teacher_image: ``(B, D)`` embeddings of the same images by the frozen model; constant.
        teacher_text: ``(B, D)`` likewise for the texts; constant.
        mean: ``(D,)`` or 0-d, constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Embedding units squared: summed over D, averaged over B. The paper's weight is 1000 (unit vectors, logit scale
        100); the natural weight grows with the square of the logit scale.

    Invariances:
        Permutation of pairs; one orthogonal map applied to students, teachers and mean; a translation of all students
        together with the mean; exchange of the modalities.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, or a teacher or the mean requires grad.

    Deviations:
        None known; the paper has no public code.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> dive_loss(one, one, zero, zero, mean=torch.ones(2))  # a common shift by the mean
        tensor(0.)

    Reference:
        Suzuki et al., Difference Vector Equalization, AAAI 2026, arXiv 2511.09973, total objective.
    """
    student, teacher = Embeddings(student_image, student_text), Embeddings(teacher_image, teacher_text)
    check_embeddings("dive_loss", student, teacher, required=Embeddings._fields)
    check_paired("dive_loss", student_image, student_text)
    average = average_vector_loss(student_image, student_text, teacher_image, teacher_text, mean=mean)
    return average + pairwise_vector_loss(student_image, student_text, teacher_image, teacher_text)


class DiVE(AverageVectorLoss):
    """Module form of :func:`dive_loss`; the running mean, its ``step()`` and the arguments are those of
    :class:`AverageVectorLoss`. ``decay=1.0`` freezes the mean at zero: distillation on both encoders, the control."""

    def _checked(self, student: Embeddings, teacher: Embeddings | None) -> tuple[Embeddings, Embeddings]:
        student, teacher = super()._checked(student, teacher)
        check_paired("DiVE", *check_pairs_present("DiVE", student))
        return student, teacher

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        student, teacher = self._checked(student, teacher)
        mean = self._collect(student, teacher) if self.training else self.mean
        pair, reference = check_pairs_present("DiVE", student), check_pairs_present("DiVE", teacher)
        return weighted_by_rows([(dive_loss(*pair, *reference, mean=mean), len(pair[0]))], self.training)

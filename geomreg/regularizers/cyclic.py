"""Cyclic consistency: images and texts have the same inner products among themselves and across (CyCLIP, arXiv 2205.14459)."""

from torch import Tensor, nn

from geomreg.checks import check_paired_embeddings, check_weight
from geomreg.distributed import gathered_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import pairs
from geomreg.types import Embeddings

__all__ = ["CyclicConsistency", "cyclic_loss"]


def cyclic_loss(image: Tensor, text: Tensor, *, in_modal: float = 0.25, cross_modal: float = 0.25) -> Tensor:
    r"""Geometry of the images against that of their texts, in the student alone; no teacher.

    .. math:: \frac{\lambda_1}{B} \sum_{j,k} \big( \langle z_j, z_k \rangle - \langle t_j, t_k \rangle \big)^2
              + \frac{\lambda_2}{B} \sum_{j,k} \big( \langle z_j, t_k \rangle - \langle z_k, t_j \rangle \big)^2

    With A = Z + T and E = Z - T the two matrices are ``(A E' + E A') / 2`` and ``(E A' - A E') / 2``; both squared norms come from
    the D x D products A'A, E'E and A'E, without a B x B matrix and without cancellation where images and texts agree.

    Args:
        image: ``(B, D)`` embeddings of the model in training, as they come; receives gradient.
        text: ``(B, D)`` embeddings of the paired texts; receives gradient.
        in_modal: weight lambda_1 of image-image against text-text (0.25 in the authors' instructions).
        cross_modal: weight lambda_2 of image-text against text-image (0.25 there).

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Fourth power of embedding units. The authors' scale: summed over all B^2 entries and divided by B, so it grows with
        the batch (of all processes). Time O(B D^2), memory O(B D + D^2).

    Invariances:
        Permutation of pairs; one orthogonal map applied to both modalities; exchange of the modalities. The in-modal part
        alone also to one orthogonal map for each modality. Not translation.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a weight that is negative or not finite.

    Deviations:
        The authors multiply inner products by the logit scale and divide by its square again, which cancels.

    Example:
        >>> import torch
        >>> cyclic_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), in_modal=1.0)  # (4 - 1)^2
        tensor(9.)

    Reference:
        Goel et al., CyCLIP, NeurIPS 2022, arXiv 2205.14459, equations 2 and 3.
    """
    name = "cyclic_loss"
    check_paired_embeddings(name, image, text)
    _check_weights(name, in_modal, cross_modal)
    with full_precision(image):
        z, t = at_least_fp32(image), at_least_fp32(text)
        a, e = z + t, z - t  # (B, D)
        squares, product = ((a.T @ a) * (e.T @ e)).sum(), a.T @ e
        mixed = (product * product.T).sum()
        return (in_modal * (squares + mixed) + cross_modal * (squares - mixed)) / (2 * len(z))


def _check_weights(name: str, in_modal: float, cross_modal: float) -> None:
    check_weight(name, "in_modal", in_modal)
    check_weight(name, "cross_modal", cross_modal)


class CyclicConsistency(nn.Module):
    """Module form of :func:`cyclic_loss`, over the batches of all processes; the teacher may be None.

    Args:
        in_modal: weight of image-image against text-text.
        cross_modal: weight of image-text against text-image.
        normalize: divide embeddings by their L2 norm first, as CyCLIP does.
    """

    def __init__(self, *, in_modal: float = 0.25, cross_modal: float = 0.25, normalize: bool = True) -> None:
        super().__init__()
        _check_weights("CyclicConsistency", in_modal, cross_modal)
        self.in_modal, self.cross_modal, self.normalize = in_modal, cross_modal, normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None = None) -> Tensor:
        image, text = pairs("CyclicConsistency", student, self.normalize)
        image, text = (gathered_rows(value, self.training) for value in (image, text))
        return cyclic_loss(image, text, in_modal=self.in_modal, cross_modal=self.cross_modal)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"in_modal={self.in_modal}, cross_modal={self.cross_modal}, normalize={self.normalize}"

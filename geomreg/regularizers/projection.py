"""Orthogonality of the projections into the shared space (CaRot, arXiv 2311.01723)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from geomreg.checks import check_matrix, check_weight, check_width
from geomreg.precision import common_precision, full_precision
from geomreg.types import Embeddings

__all__ = ["ProjectionOrthogonality", "projection_orthogonality_loss"]


def projection_orthogonality_loss(image: Tensor, text: Tensor | None = None, *, cross: float = 0.05, orthogonal: float = 0.2) -> Tensor:
    r"""Frobenius norms that vanish for an orthogonal image projection and projections of disjoint range.

    .. math:: \lambda_c \lVert W_v W_t^\top \rVert_F + \lambda_o \lVert W_v^\top W_v - I \rVert_F

    Args:
        image: ``(width, D)`` projection W_v of the image tower (``visual.proj`` of open_clip's ViT); receives gradient.
        text: ``(width', D)`` projection W_t of the text tower (``text_projection``); receives gradient. None with ``cross=0``.
        cross: lambda_c, 0.05 in the authors' code.
        orthogonal: lambda_o, 0.2 there.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Norms, not squared, summed over entries: of the square of the weights. The gradient jumps at 0, where it is 0.

    Invariances:
        One orthogonal map of the shared space, and one of each tower's features.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: no matrices, widths of the shared space that differ, a weight that is negative or not finite.

    Deviations:
        The authors' code fails for ResNet towers; here any matrix will do.

    Example:
        >>> import torch
        >>> projection_orthogonality_loss(2 * torch.eye(1), torch.ones(1, 1), cross=1.0, orthogonal=1.0)  # |2| + |4 - 1|
        tensor(5.)

    Reference:
        Oh et al., Towards calibrated robust fine-tuning of vision-language models (CaRot), NeurIPS 2024, arXiv 2311.01723; the
        two norms as in the authors' code. Its self-distillation is ``SimilarityKL(against="batch", temperature=1.0,
        form="ce")`` with twice the weight, against an averaged teacher.
    """
    name = "projection_orthogonality_loss"
    check_matrix(name, "image projection", image)
    check_weight(name, "cross", cross)
    check_weight(name, "orthogonal", orthogonal)
    with full_precision(image):
        w, *others = common_precision(*(value for value in (image, text) if value is not None))
        total = orthogonal * _norm(w.T @ w - torch.eye(w.shape[1], dtype=w.dtype, device=w.device))
        if text is None:
            if cross:
                raise ValueError(f"{name}: expected a text projection with cross={cross}, got None. Pass it, or cross=0.")
            return total
        check_matrix(name, "text projection", text)
        check_width(name, Embeddings(image, text))
        return total + cross * _norm(w @ others[0].T)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm with gradient 0 at 0."""
    square = matrix.square().sum()
    return torch.where(square != 0, square, 1.0).sqrt() * (square != 0)


def _matrix(value: nn.Parameter | nn.Linear) -> Tensor:
    return value.weight.T if isinstance(value, nn.Linear) else value


class ProjectionOrthogonality(nn.Module):
    """Module form of :func:`projection_orthogonality_loss` on a model's live weights; the embeddings are not looked at.

    The weights are held, not registered: ``parameters()`` and ``state_dict()`` stay empty. A deep copy or a pickle holds a copy
    of them, which no longer is the model's.

    Args:
        image: ``(width, D)`` parameter, or the ``nn.Linear`` (whose weight is ``(D, width)``) of the image tower.
        text: likewise of the text tower; None with ``cross=0``.
        cross: weight of the norm between the towers.
        orthogonal: weight of the image projection's norm.
    """

    separable: ClassVar[bool] = True

    def __init__(
        self, image: nn.Parameter | nn.Linear, text: nn.Parameter | nn.Linear | None = None, *, cross: float = 0.05, orthogonal: float = 0.2
    ) -> None:
        super().__init__()
        self.cross, self.orthogonal = cross, orthogonal
        self._held = (image, text)  # in a tuple, so that nn.Module does not register them
        self()  # refuses what cannot be used now, not in the first step

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The live parameters that it looks at."""
        return tuple(value.weight if isinstance(value, nn.Linear) else value for value in self._held if value is not None)

    def forward(self, student: Embeddings | None = None, teacher: Embeddings | None = None) -> Tensor:
        image, text = self._held
        return projection_orthogonality_loss(
            _matrix(image), None if text is None else _matrix(text), cross=self.cross, orthogonal=self.orthogonal
        )

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"cross={self.cross}, orthogonal={self.orthogonal}"

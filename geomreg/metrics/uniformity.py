"""Alignment and uniformity: are the two embeddings of a pair close, and do the embeddings fill the sphere?"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import (
    check_count,
    check_directions,
    check_option,
    check_pairs_present,
    check_positive,
    check_same_samples,
    check_student,
)
from geomreg.metrics.base import EmbeddingMetric
from geomreg.metrics.results import Results
from geomreg.metrics.tiles import pair_distances, row_blocks, squared_distances
from geomreg.types import Embeddings

__all__ = ["AlignmentUniformity", "AlignmentUniformityParts", "alignment", "uniformity"]


def alignment(image: Tensor, text: Tensor, *, alpha: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Mean distance of the two embeddings of a pair, to a power: :math:`\frac1N \sum_i \lVert x_i - y_i \rVert^\alpha`; low is aligned.

    Args:
        image: ``(N, D)`` image embeddings.
        text: ``(N, D)`` text embeddings of the same pairs in the same order.
        alpha: the power.
        normalize: divide each embedding by its norm first, as the definition wants; False takes them as they come.

    Returns:
        0-d fp64 tensor; of unit vectors in [0, 2^alpha], and 2 - 2 (mean cosine) for ``alpha=2``.

    Scale:
        Embedding units to the power alpha, a mean over pairs.

    Invariances:
        Permutation of pairs; exchange of the modalities; one orthogonal map of both; scaling of single embeddings if ``normalize``, else
        one translation of both.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: no pair, different shapes, NaN or infinity, a zero vector if ``normalize``, alpha not above 0.

    Example:
        >>> import torch
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]])).item()
        4.0

    Reference:
        Wang and Isola, Understanding contrastive representation learning through alignment and uniformity on the hypersphere, 2020
        (arXiv 2005.10242), section 4.1.1.
    """
    check_positive("alignment", "alpha", alpha)
    check_same_samples("alignment", ("image", "text"), (image, text), minimum=1, same_width=True)
    one, two = (_ready("alignment", label, value, normalize) for label, value in (("image", image), ("text", text)))
    distances: Tensor = torch.linalg.vector_norm(one - two, dim=1)
    return distances.pow(alpha).mean()


def uniformity(x: Tensor, y: Tensor | None = None, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Logarithm of the mean Gaussian potential of all pairs of distinct samples; low is uniform.

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \lVert x_i - x_j \rVert^2}

    With ``y`` the pairs are :math:`(x_i, y_j)` with :math:`i \ne j`: images against the texts of *other* pairs.

    Args:
        x: ``(N, D)`` embeddings.
        y: ``(N, D)`` embeddings of the other modality, row i belonging to row i of x; None for x with itself.
        t: the sharpness.
        normalize: divide each embedding by its norm first, as the definition wants; False takes them as they come.

    Returns:
        0-d fp64 tensor, <= 0; 0 where all embeddings are equal; of unit vectors at least -4t.

    Scale:
        Free of units for unit vectors; exact over all pairs, by a log-sum-exp that cannot vanish. Time O(N^2 D); memory for a tile of
        pairs beside fp64 copies of the embeddings.

    Invariances:
        Permutation of samples; one orthogonal map; exchange of x and y; scaling of single embeddings if ``normalize``, else one
        translation of all.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 2 samples, different shapes, NaN or infinity, a zero vector if ``normalize``, t not above 0.

    Example:
        >>> import torch
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), t=0.5).item()
        -2.0

    Reference:
        Wang and Isola 2020 (arXiv 2005.10242), section 4.1.2; their code averages over the same pairs i < j.
    """
    check_positive("uniformity", "t", t)
    labels, values = (("x",), (x,)) if y is None else (("x", "y"), (x, y))
    check_same_samples("uniformity", labels, values, minimum=2, same_width=True)
    ready = [_ready("uniformity", label, value, normalize) for label, value in zip(labels, values, strict=True)]
    one, two = ready[0] - ready[0].mean(dim=0), ready[-1] - ready[0].mean(dim=0)  # far from 0 every tile would take the slow way
    if y is None:
        parts = [(-t * squares).logsumexp(dim=0) for (squares,) in pair_distances((one,))]
        return torch.stack(parts).logsumexp(dim=0) - math.log(len(one) * (len(one) - 1) / 2)
    parts = []
    for rows in row_blocks(len(one)):
        for columns in row_blocks(len(two)):
            exponents = -t * squared_distances(one[rows], two[columns])
            if rows == columns:
                exponents.fill_diagonal_(-torch.inf)  # the pairs themselves
            parts.append(exponents.flatten().logsumexp(dim=0))
    return torch.stack(parts).logsumexp(dim=0) - math.log(len(one) * (len(one) - 1))


def _ready(name: str, label: str, value: Tensor, normalize: bool) -> Tensor:
    return check_directions(name, label, value) if normalize else value.detach().double()


class AlignmentUniformityParts(NamedTuple):
    """Alignment of pairs and uniformity of each modality and across; 0-d fp64 tensors.

    Attributes:
        alignment: see :func:`alignment`.
        image: :func:`uniformity` of the images.
        text: :func:`uniformity` of the texts.
        cross: :func:`uniformity` of images against the texts of other pairs.
    """

    alignment: Tensor
    image: Tensor
    text: Tensor
    cross: Tensor


class AlignmentUniformityResults(Results):
    """:class:`AlignmentUniformityParts` as a dictionary."""

    parts = AlignmentUniformityParts


class AlignmentUniformity(EmbeddingMetric):
    """Metric form of :func:`alignment` and :func:`uniformity` of one model: collects pairs over batches and processes.

    ``update(embeddings)`` takes :class:`~geomreg.Embeddings` with both modalities, row j of both belonging to pair j.

    Args:
        alpha: see :func:`alignment`.
        t: see :func:`uniformity`.
        normalize: see there.
        max_samples: more pairs than this raise in ``compute``: time grows with their square.
    """

    higher_is_better = False
    results = AlignmentUniformityResults
    image: list[Tensor]
    text: list[Tensor]

    def __init__(self, *, alpha: float = 2.0, t: float = 2.0, normalize: bool = True, max_samples: int = 50_000, **kwargs: Any) -> None:
        check_positive("AlignmentUniformity", "alpha", alpha)
        check_positive("AlignmentUniformity", "t", t)
        check_option("AlignmentUniformity", "normalize", normalize, (False, True))
        check_count("AlignmentUniformity", "max_samples", max_samples, 2)
        super().__init__(("image", "text"), **kwargs)
        self.alpha, self.t, self.normalize, self.max_samples = alpha, t, normalize, max_samples

    def update(self, embeddings: Embeddings) -> None:
        """Add one batch of pairs; raises before anything is stored."""
        image, text = check_pairs_present("AlignmentUniformity", check_student("AlignmentUniformity", embeddings))
        check_same_samples("AlignmentUniformity", ("image", "text"), (image, text), minimum=1, same_width=True)
        self._keep(image=image, text=text)

    def compute(self) -> Results:
        """The entries of :class:`AlignmentUniformityParts` over everything collected, by name."""
        image, text = self._kept("image", "text", minimum=2, max_samples=self.max_samples)
        parts = AlignmentUniformityParts(
            alignment(image, text, alpha=self.alpha, normalize=self.normalize),
            uniformity(image, t=self.t, normalize=self.normalize),
            uniformity(text, t=self.t, normalize=self.normalize),
            uniformity(image, text, t=self.t, normalize=self.normalize),
        )
        return AlignmentUniformityResults(parts._asdict())

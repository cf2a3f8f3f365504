"""Linear centred kernel alignment: do two embedding spaces have the same inner products, whatever their axes?"""

from typing import Any

import torch
from torch import Tensor

from geomreg.checks import check_collapse, check_option, check_same_samples
from geomreg.metrics.base import MomentsMetric
from geomreg.metrics.moments import Moments

__all__ = ["LinearCKA", "linear_cka"]


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    r"""Linear CKA of two spaces: the cosine of their centred Gram matrices, without any ``(N, N)`` matrix.

    .. math:: \frac{H(X, Y)}{\sqrt{H(X, X)\, H(Y, Y)}}, \qquad H(X, Y) = \lVert X_c^\top Y_c \rVert_F^2

    (c: mean subtracted). ``unbiased`` replaces H by the unbiased estimate HSIC\ :sub:`1` of Song et al., which leaves the diagonal of the
    Gram matrices out and here too needs sums over samples alone. With :math:`a_i, b_i` the squared norms of the centred rows, its
    row sums become constants and

    .. math:: N (N - 3)\, H_1(X, Y) = \lVert X_c^\top Y_c \rVert_F^2 + \frac{\sum_i a_i \sum_i b_i}{(N - 1)(N - 2)}
        - \frac{N}{N - 2} \sum_i a_i b_i.

    Args:
        x: ``(N, D)`` embeddings, as they come.
        y: ``(N, E)`` embeddings of the same samples in the same order; the widths may differ.
        unbiased: without it the value is inflated where N is not much larger than the widths (two spaces of noise then look alike).

    Returns:
        0-d fp64 tensor: in [0, 1], or unbiased in [-1, 1] with expectation near 0 for independent spaces.

    Scale:
        Free of units. Time O(N (D + E)^2), memory O((D + E)^2) in fp64.

    Invariances:
        Permutation of samples; translation, positive or negative scaling and an orthogonal map of either space; exchange of x and y.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples (4 if unbiased), different numbers of samples, NaN or infinity, all embeddings of a space equal,
            or unbiased all inner products of different samples equal after centring (the value is undefined).

    Deviations:
        No constant is added to the denominator (platonic-rep adds 1e-6).

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> linear_cka(5 - 2 * points.flip(1), points).item()
        1.0

    Reference:
        Kornblith et al., Similarity of neural network representations revisited, 2019 (arXiv 1905.00414). Unbiased: Song et al., Feature
        selection via dependence maximization, JMLR 2012, eq. 4; Nguyen et al., 2021 (arXiv 2010.15327), eq. 3, whose minibatch form
        averages H over batches and so differs from the value over all samples; the class here does not.
    """
    check_same_samples("linear_cka", ("x", "y"), (x, y), minimum=4 if unbiased else 3)
    return _cka("linear_cka", ("x", "y"), Moments.of(x, y), unbiased)


def _cka(name: str, labels: tuple[str, str], moments: Moments, unbiased: bool) -> Tensor:
    for block, label in enumerate(labels):
        check_collapse(name, label, moments.collapsed(block))
    moments = _of_one_size(moments)
    for block, label in enumerate(labels):
        if unbiased and not _has_structure(moments, block):
            raise ValueError(
                f"{name}: expected {label} embeddings of different distances for the unbiased estimate, got equidistant ones. "
                "It is undefined; take more samples, or unbiased=False."
            )
    own = [_dependence(moments, block, block, unbiased).sqrt() for block in range(2)]
    return (_dependence(moments, 0, 1, unbiased) / own[0] / own[1]).clamp(-1 if unbiased else 0, 1)


def _of_one_size(moments: Moments) -> Moments:
    """Those of each space divided by its size, so that no power of embeddings of any size overflows or vanishes."""
    sizes = torch.stack([moments.block(block, block).diagonal().amax() for block in range(2)]).sqrt()
    columns = sizes.repeat_interleave(torch.tensor(moments.widths, device=sizes.device))
    quartic = moments.quartic / sizes[:, None] / sizes[:, None] / sizes / sizes
    return moments._replace(scatter=moments.scatter / columns[:, None] / columns, quartic=quartic)


def _dependence(moments: Moments, first: int, second: int, unbiased: bool) -> Tensor:
    """H, or N (N - 3) H_1."""
    squares = moments.block(first, second).square().sum()
    if not unbiased:
        return squares
    count = moments.rows
    traces = moments.block(first, first).trace() * moments.block(second, second).trace()
    return squares + traces / (count - 1) / (count - 2) - count / (count - 2) * moments.quartic[first, second]


def _has_structure(moments: Moments, block: int) -> bool:
    """H_1 of a space with itself is a sum of squares that is 0 for equidistant points, say."""
    return bool(_dependence(moments, block, block, True) > 1e-12 * moments.block(block, block).square().sum())


class LinearCKA(MomentsMetric):
    """Metric form of :func:`linear_cka` of student and teacher; exact over batches and processes.

    Its state is the sums over samples, O((D + E)^2) numbers however many samples come. An average of the CKA of batches, or of their
    H, is another number that moves with the batch size.

    Args:
        modality: ``"image"``, ``"text"``, or ``"stacked"`` (images and texts in one set of samples).
        unbiased: see :func:`linear_cka`.
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, *, modality: str = "image", unbiased: bool = False, **kwargs: Any) -> None:
        check_option("LinearCKA", "unbiased", unbiased, (False, True))
        super().__init__(modality, **kwargs)
        self.unbiased = unbiased

    def _moments(self, student: Tensor, teacher: Tensor) -> Moments:
        return Moments.of(student, teacher)

    def compute(self) -> Tensor:
        """0-d fp64 tensor."""
        self._check_ids()
        moments = self._collected(minimum=4 if self.unbiased else 3)
        return _cka("LinearCKA", ("student", "teacher"), moments, self.unbiased)

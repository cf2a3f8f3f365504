"""Drift: how far did the embeddings move, together and each on its own, and in how many directions?"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_same_samples
from geomreg.metrics.base import MomentsMetric
from geomreg.metrics.moments import Moments
from geomreg.metrics.results import Results

__all__ = ["Drift", "DriftParts", "drift"]


class DriftParts(NamedTuple):
    """What the difference vectors u = student - teacher look like; 0-d fp64 tensors.

    Attributes:
        mean_shift: norm of the mean difference vector, the common shift.
        dispersion: V, mean squared distance of the difference vectors to their mean.
        mean_square: mean squared norm of the difference vectors: squared ``mean_shift`` plus ``dispersion``.
        common_share: share of it that is common shift; 0 where nothing moved.
        effective_rank: number of directions, between 1 and D, of the difference vectors about their mean; 0 where V is 0.
    """

    mean_shift: Tensor
    dispersion: Tensor
    mean_square: Tensor
    common_share: Tensor
    effective_rank: Tensor


def drift(student: Tensor, teacher: Tensor) -> DriftParts:
    r"""Common shift, dispersion and effective rank of the difference vectors :math:`u_i = f_i - p_i`.

    The effective rank is that of Roy and Vetterli, :math:`\exp(-\sum_k \pi_k \log \pi_k)` with :math:`\pi_k = \sigma_k / \sum_l \sigma_l`
    of the *singular values* of the ``(N, D)`` matrix of difference vectors, here about their mean, so that the common shift is not
    counted again. Singular values below :math:`\sqrt{D \epsilon}` of the largest (3e-7 at D = 512) count as 0,
    and so do dispersion and effective rank where :math:`\sqrt V` is below 1e-12 of the mean shift: rounding makes as much.

    Args:
        student: ``(N, D)`` embeddings f, as they come.
        teacher: ``(N, D)`` embeddings p of the same samples in the same order.

    Returns:
        :class:`DriftParts`.

    Scale:
        ``mean_shift`` in embedding units, ``dispersion`` and ``mean_square`` in their square (a mean over samples), the others free of
        units. Time O(N D^2 + D^3), memory O(D^2). The effective rank of N samples is at most N - 1.

    Invariances:
        Permutation of samples; one translation or one orthogonal map of both spaces.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, different shapes, NaN or infinity.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> parts = drift(points + torch.tensor([3.0, 4.0]), points)
        >>> parts.mean_shift.item(), parts.common_share.item(), parts.effective_rank.item()
        (5.0, 1.0, 0.0)

    Reference:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    check_same_samples("drift", ("student", "teacher"), (student, teacher), minimum=3, same_width=True)
    return _parts(_moments(student, teacher))


def _moments(student: Tensor, teacher: Tensor) -> Moments:
    return Moments.of(student.detach().double() - teacher.detach().double())


def _parts(moments: Moments) -> DriftParts:
    square, dispersion = moments.centre(0).square().sum(), moments.spread(0)
    still = moments.collapsed(0)  # dispersion of rounding alone
    dispersion = torch.zeros_like(dispersion) if still else dispersion
    total = square + dispersion
    rank = torch.zeros_like(total) if still else _effective_rank(moments.block(0, 0))
    return DriftParts(square.sqrt(), dispersion, total, square / torch.where(total > 0, total, 1.0), rank)


def _effective_rank(scatter: Tensor) -> Tensor:
    squares = torch.linalg.eigvalsh(scatter / scatter.trace())
    floor = len(squares) * torch.finfo(squares.dtype).eps * squares.max()
    values = torch.where(squares > floor, squares, 0.0).sqrt()
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()


class DriftResults(Results):
    """:class:`DriftParts` as a dictionary."""

    parts = DriftParts


class Drift(MomentsMetric):
    """Metric form of :func:`drift`; exact over batches and processes, with O(D^2) numbers of state.

    Args:
        modality: ``"image"``, ``"text"``, or ``"stacked"`` (one mean for images and texts, as DiVE has).
    """

    higher_is_better = False
    results = DriftResults
    same_width = True

    def __init__(self, *, modality: str = "image", **kwargs: Any) -> None:
        super().__init__(modality, **kwargs)

    def _moments(self, student: Tensor, teacher: Tensor) -> Moments:
        return _moments(student, teacher)

    def compute(self) -> Results:
        """The entries of :class:`DriftParts` over everything collected, by name."""
        self._check_ids()
        return DriftResults(_parts(self._collected(minimum=3))._asdict())

"""How far two embedding spaces differ, measured, and what the difference vectors prove about it."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_count, check_directions, check_distances_differ, check_option, check_samples, check_size
from geomreg.metrics.base import PairedMetric
from geomreg.metrics.moments import Moments
from geomreg.metrics.results import Results
from geomreg.metrics.tiles import pair_distances

__all__ = ["Distortion", "DistortionBound", "distortion_bound"]

DISSIMILARITIES = ("euclidean", "cosine")


class DistortionBound(NamedTuple):
    """Measured distortion of the pairwise distances or cosines, and its bounds; 0-d fp64 tensors.

    Attributes:
        distance_change: root-mean-square change of the distance (or cosine) over pairs of distinct samples.
        distance_bound: bound on it from the difference vectors.
        rsa: measured Pearson RSA of the distances (or cosines).
        rsa_bound: lower bound on it from the same; -1 where it says nothing.
        aligned_rsa_bound: the sharper lower bound after the best rotation (and scale) of the student; -1 where it says nothing.
        dispersion: V, mean squared distance of the difference vectors to their mean.
        aligned_dispersion: V*, the same after the best rotation (and, for distances, scale) of the student, at most V.
    """

    distance_change: Tensor
    distance_bound: Tensor
    rsa: Tensor
    rsa_bound: Tensor
    aligned_rsa_bound: Tensor
    dispersion: Tensor
    aligned_dispersion: Tensor

    @property
    def distance_slack(self) -> Tensor:
        """What the bound leaves open: ``distance_bound - distance_change``, >= 0 but for rounding."""
        return self.distance_bound - self.distance_change

    @property
    def rsa_slack(self) -> Tensor:
        """``rsa - rsa_bound``, >= 0 but for rounding; more than 1 where the bound says nothing about a positive RSA."""
        return self.rsa - self.rsa_bound

    @property
    def aligned_rsa_slack(self) -> Tensor:
        """``rsa - aligned_rsa_bound``, at most ``rsa_slack``."""
        return self.rsa - self.aligned_rsa_bound


def distortion_bound(student: Tensor, teacher: Tensor, *, dissimilarity: str = "euclidean") -> DistortionBound:
    r"""Bounds on the change of pairwise distances and of RSA from the difference vectors, beside the measured values.

    With difference vectors :math:`u_i = f_i - p_i`, :math:`V = \frac1n \sum \lVert u_i - \bar u \rVert^2`,
    :math:`\epsilon^2 = 2 V n / (n - 1)` and the population variance :math:`\sigma^2` of the teacher's distances over
    distinct pairs: the root-mean-square change of a distance is at most :math:`\epsilon`, and if
    :math:`\epsilon < \sigma`, RSA is at least :math:`\sqrt{1 - \epsilon^2 / \sigma^2}`. RSA ignores rotation and scale
    of the student, so there V may be replaced by :math:`V^* = P - \lVert \Sigma_{fp} \rVert_*^2 / F` (P, F traces of the teacher's
    and student's covariance, nuclear norm of the cross-covariance). In each case the average vector loss of a paired
    batch, for any mean, is at least 2 V.

    ``"cosine"`` divides all embeddings by their norms first. No bound on cosines follows from V by the same proof; instead
    :math:`\lvert \Delta \cos_{ij} \rvert \le \frac12 (D^f_{ij} + D^p_{ij}) \lVert u_i - u_j \rVert`, whose root mean square over
    pairs takes the place of :math:`\epsilon` (it is at most :math:`2 \epsilon`), and the variance of the teacher's cosines that of
    :math:`\sigma^2`; aligned: after the best rotation of the student.

    Proofs, and the cases where each bound is attained: docs/distortion-bound.md.

    Args:
        student: ``(N, D)`` embeddings f, as they come.
        teacher: ``(N, D)`` embeddings p of the same samples in the same order.
        dissimilarity: ``"euclidean"``, or ``"cosine"`` (1 - cosine).

    Returns:
        :class:`DistortionBound`.

    Scale:
        ``distance_*`` in embedding units, ``dispersion`` in their square, RSA free of units; with ``"cosine"`` everything is. Time
        O(N^2 D + D^3); memory O(D^2) beside fp64 copies of the embeddings: distances exist for some pairs at a time.

    Invariances:
        Permutation of samples; a translation of either space (not with ``"cosine"``); one orthogonal map of both; with ``"cosine"`` scaling
        of single embeddings.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, different shapes, NaN or infinity, all distances of a space equal, a zero vector with
            ``"cosine"``.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> distortion_bound(points + 1, points).rsa_bound.item()  # a common shift changes no distance
        1.0
    """
    name = "distortion_bound"
    check_option(name, "dissimilarity", dissimilarity, DISSIMILARITIES)
    check_samples(name, student, teacher, minimum=3, same_width=True)
    for label, value in (("student", student), ("teacher", teacher)):
        check_size(name, label, value)
    if dissimilarity == "cosine":
        f, p = check_directions(name, "student", student), check_directions(name, "teacher", teacher)
    else:
        f, p = student.detach().double(), teacher.detach().double()
    samples, shift = len(f), f - p  # before centring, which rounds embeddings far from 0
    dispersion = (shift - shift.mean(dim=0)).square().sum(dim=1).mean()
    f, p = f - f.mean(dim=0), p - p.mean(dim=0)
    teacher_trace, student_trace = p.square().sum(dim=1).mean(), f.square().sum(dim=1).mean()
    left, singular, right = torch.linalg.svd(f.T @ p / samples)
    nuclear = singular.sum()
    if dissimilarity == "cosine":
        pairs, changes = _pairs(name, f, p, (f - p, f @ (left @ right) - p))
        aligned = student_trace + teacher_trace - 2 * nuclear
    else:
        pairs, _ = _pairs(name, f, p, ())
        factor = nuclear / student_trace
        aligned = (p - factor * f @ (left @ right)).square().sum(dim=1).mean()  # V*, without the difference of large numbers
        changes = 2 * samples / (samples - 1) * torch.stack([dispersion, aligned])
    changes = changes.cummin(dim=0).values  # the second is only used where it is sharper
    spreads, count = pairs.scatter.diagonal(), pairs.rows

    def lower_bound(change: Tensor) -> Tensor:
        square = 1 - change * count / spreads[0]
        return torch.where(square >= 0, square.clamp(min=0).sqrt(), -1.0)  # vacuous: RSA may be negative

    return DistortionBound(
        distance_change=(spreads[2] / count + pairs.mean[2].square()).sqrt(),
        distance_bound=changes[0].sqrt(),
        rsa=(pairs.scatter[0, 1] / spreads[0].sqrt() / spreads[1].sqrt()).clamp(-1, 1),
        rsa_bound=lower_bound(changes[0]),
        aligned_rsa_bound=lower_bound(changes[1]),
        dispersion=dispersion,
        aligned_dispersion=torch.minimum(aligned.clamp(min=0), dispersion),  # rounding alone can break 0 <= V* <= V
    )


def _pairs(name: str, f: Tensor, p: Tensor, shifts: tuple[Tensor, ...]) -> tuple[Moments, Tensor]:
    """Moments of (before, after, change) of the distances over pairs of distinct rows; with ``shifts`` those of 1 - cosine of (moved) unit
    vectors, and for each shift the mean square of the bound on a cosine's change."""
    pairs: list[Moments] = []
    bounds = f.new_zeros(len(shifts))
    least, most = f.new_full((2,), torch.inf), f.new_full((2,), -torch.inf)
    for squares in pair_distances((p, f, *shifts)):
        before, after = squares[0].sqrt(), squares[1].sqrt()
        change = after - before
        if shifts:
            weights = (before + after).square() / 4
            bounds += torch.stack([weights @ square for square in squares[2:]])
            before, after, change = squares[0] / 2, squares[1] / 2, (before + after) * change / 2
        values = torch.stack([before, after, change], dim=1)
        least, most = torch.minimum(least, values[:, :2].amin(dim=0)), torch.maximum(most, values[:, :2].amax(dim=0))
        pairs = [reduce(Moments.merged, [*pairs, Moments.of(values)])]
    check_distances_differ(name, least, most, int(pairs[0].rows))
    return pairs[0], bounds / pairs[0].rows


class DistortionResults(Results):
    """:class:`DistortionBound` as a dictionary."""

    parts = DistortionBound


class Distortion(PairedMetric):
    """Metric form of :func:`distortion_bound`: collects embeddings over batches and processes.

    Args:
        modality: ``"image"``, ``"text"`` or ``"stacked"``.
        dissimilarity: see :func:`distortion_bound`.
        max_samples: more rows than this raise in ``compute``: time grows with their square.

    ``higher_is_better`` is that of ``distance_change``; of the RSA and its bounds more is better.
    """

    higher_is_better = False
    results = DistortionResults
    same_width = True
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, *, modality: str = "image", dissimilarity: str = "euclidean", max_samples: int = 10_000, **kwargs: Any) -> None:
        check_option("Distortion", "dissimilarity", dissimilarity, DISSIMILARITIES)
        check_count("Distortion", "max_samples", max_samples, 3)
        super().__init__(modality, ("student", "teacher"), **kwargs)
        self.dissimilarity, self.max_samples = dissimilarity, max_samples

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        self._keep(student=student, teacher=teacher)

    def compute(self) -> Results:
        """The entries of :class:`DistortionBound` over everything collected, by name."""
        self._check_ids()
        one, two = self._kept("student", "teacher", minimum=3, max_samples=self.max_samples)
        return DistortionResults(distortion_bound(one, two, dissimilarity=self.dissimilarity)._asdict())

"""How far two embedding spaces differ, measured, and what the difference vectors prove about it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from geomreg.checks import check_modality, check_next, check_option, check_samples
from geomreg.metrics.rsa import gathered, pearson
from geomreg.types import Embeddings

__all__ = ["Distortion", "DistortionBound", "distortion_bound"]


class DistortionBound(NamedTuple):
    """Measured distortion of the pairwise Euclidean distances, and its bounds; 0-d fp64 tensors.

    Attributes:
        distance_change: root-mean-square change of the distance over pairs of distinct samples.
        distance_bound: bound on it from the dispersion of the difference vectors.
        rsa: measured Pearson RSA of Euclidean distances.
        rsa_bound: lower bound on it from the same dispersion; -1 where it says nothing.
        aligned_rsa_bound: the sharper lower bound after the best rotation and scale; -1 where it says nothing.
        dispersion: V, mean squared distance of the difference vectors to their mean.
        aligned_dispersion: V*, the same after the best rotation and scale of the student (Procrustes), at most V.
    """

    distance_change: Tensor
    distance_bound: Tensor
    rsa: Tensor
    rsa_bound: Tensor
    aligned_rsa_bound: Tensor
    dispersion: Tensor
    aligned_dispersion: Tensor


def distortion_bound(student: Tensor, teacher: Tensor) -> DistortionBound:
    r"""Bounds on the change of pairwise distances and of RSA from the difference vectors, beside the measured values.

    With difference vectors :math:`u_i = f_i - p_i`, :math:`V = \frac1n \sum \lVert u_i - \bar u \rVert^2`,
    :math:`\epsilon^2 = 2 V n / (n - 1)` and the population variance :math:`\sigma^2` of the teacher's distances over
    distinct pairs: the root-mean-square change of a distance is at most :math:`\epsilon`, and if
    :math:`\epsilon < \sigma`, RSA is at least :math:`\sqrt{1 - \epsilon^2 / \sigma^2}`. RSA ignores rotation and scale
    of the student, so there V may be replaced by :math:`V^* = P - \lVert \Sigma_{fp} \rVert_*^2 / F` (P, F traces of the teacher's
    and student's covariance, nuclear norm of the cross-covariance). In each case the average vector loss of a paired
    batch, for any mean, is at least 2 V.

    Args:
        student: ``(N, D)`` embeddings f, as they come.
        teacher: ``(N, D)`` embeddings p of the same samples in the same order.

    Returns:
        :class:`DistortionBound`.

    Scale:
        ``distance_*`` in embedding units, ``dispersion`` in their square, RSA free of units.

    Invariances:
        Permutation of samples; a translation of either space; one orthogonal map of both.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, different shapes, NaN or infinity, all distances of a space equal.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> distortion_bound(points + 1, points).rsa_bound.item()  # a common shift changes no distance
        1.0
    """
    name = "distortion_bound"
    check_samples(name, student, teacher, minimum=3, same_width=True)
    f, p = student.detach().double(), teacher.detach().double()
    f, p = f - f.mean(dim=0), p - p.mean(dim=0)
    samples = len(f)
    dispersion = (f - p).square().sum(dim=1).mean()
    teacher_trace, student_trace = p.square().sum(dim=1).mean(), f.square().sum(dim=1).mean()
    nuclear = torch.linalg.svdvals(f.T @ p / samples).sum()
    aligned = teacher_trace - nuclear.square() / student_trace
    aligned = torch.minimum(aligned.clamp(min=0), dispersion)  # rounding alone can break 0 <= V* <= V
    before, after = torch.pdist(p), torch.pdist(f)
    measured = pearson(name, after, before)
    variance = before.var(correction=0)

    def lower_bound(value: Tensor) -> Tensor:
        square = 1 - 2 * value * samples / (samples - 1) / variance
        return torch.where(square >= 0, square.clamp(min=0).sqrt(), -1.0)  # vacuous: RSA may be negative

    return DistortionBound(
        distance_change=(after - before).square().mean().sqrt(),
        distance_bound=(2 * dispersion * samples / (samples - 1)).sqrt(),
        rsa=measured,
        rsa_bound=lower_bound(dispersion),
        aligned_rsa_bound=lower_bound(aligned),
        dispersion=dispersion,
        aligned_dispersion=aligned,
    )


class Distortion(Metric):
    """Metric form of :func:`distortion_bound`: collects embeddings over batches and processes.

    Args:
        modality: ``"image"``, ``"text"`` or ``"stacked"``.
        max_samples: more rows than this raise in ``compute``: memory grows with their square.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *, modality: str = "image", max_samples: int = 10_000, **kwargs: object) -> None:
        super().__init__(**kwargs)
        check_option("Distortion", "modality", modality, ("image", "text", "stacked"))
        self.modality, self.max_samples = modality, max_samples
        for state in ("student", "teacher"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, student: Embeddings, teacher: Embeddings) -> None:
        """Add one batch; raises before anything is stored."""
        one, two = (check_modality("Distortion", value, self.modality) for value in (student, teacher))
        check_samples("Distortion", one, two, minimum=1, same_width=True)
        check_next("Distortion", self.student, one, "student")
        self.student.append(one.detach())  # type: ignore[operator, union-attr]
        self.teacher.append(two.detach())  # type: ignore[operator, union-attr]

    def compute(self) -> DistortionBound:
        """:class:`DistortionBound` over everything collected."""
        one, two = gathered("Distortion", self.student, self.teacher, self.max_samples)
        return distortion_bound(one, two)

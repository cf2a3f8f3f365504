"""Procrustes decomposition: how much of what fine-tuning did to a space is translation, rotation, scale, and what remains?"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_collapse, check_same_samples
from geomreg.metrics.base import MomentsMetric
from geomreg.metrics.moments import Moments
from geomreg.metrics.results import Results

__all__ = ["Procrustes", "ProcrustesParts", "procrustes"]

PARTS = ("translation", "rotation", "scale", "residual")


class ProcrustesParts(NamedTuple):
    """Parts of the mean squared change, which add up to ``total``; 0-d fp64 tensors.

    Attributes:
        total: mean squared distance of a student embedding to its teacher's.
        translation: what the best translation of the teacher takes away.
        rotation: what the best orthogonal map takes away after it.
        scale: what the best factor takes away after both.
        residual: what remains: the mean squared distance to the moved, turned and scaled teacher.
        factor: that best factor, >= 0.
    """

    total: Tensor
    translation: Tensor
    rotation: Tensor
    scale: Tensor
    residual: Tensor
    factor: Tensor

    @property
    def shares(self) -> dict[str, Tensor]:
        """Each part over the total: one stacked bar of height 1. All 0 where nothing changed."""
        whole = torch.where(self.total > 0, self.total, 1.0)
        return {part: getattr(self, part) / whole for part in PARTS}


def procrustes(student: Tensor, teacher: Tensor) -> ProcrustesParts:
    r"""Decomposition of the mean squared change into translation, rotation, scale and a residual, in this order.

    The student is taken as teacher + change, and the teacher is fitted to it: :math:`f_i \approx s R p_i + t`. With the traces F and P of
    the covariances of student and teacher, :math:`\Sigma` their cross-covariance, :math:`N = \lVert \Sigma \rVert_*` its nuclear norm
    and :math:`V = F + P - 2 \operatorname{tr} \Sigma` the dispersion of the difference vectors:

    =========== ============================================ ==========================================
    step        what is left after it                        part
    =========== ============================================ ==========================================
    nothing     :math:`\lVert \bar u \rVert^2 + V`
    translation :math:`V`                                    :math:`\lVert \bar u \rVert^2`
    rotation    :math:`F + P - 2 N`                          :math:`2 (N - \operatorname{tr} \Sigma)`
    scale       :math:`F - N^2 / P`                          :math:`(P - N)^2 / P`, with s = N / P
    =========== ============================================ ==========================================

    Each step is a least-squares fit that contains "do nothing", so no part is negative. **The order matters** for the parts of rotation
    and scale: R is the same for every s > 0, but a factor fitted first would be that of the unturned space (0 after a quarter turn in the
    plane, which leaves the rotation nothing to turn). A translation is one of centroids; a rotation is about the centroid, so a
    rotation about the origin also shows as translation where the centroid is far from it. Reflections count as rotations: no distance
    sees the difference.

    Args:
        student: ``(N, D)`` embeddings f, as they come.
        teacher: ``(N, D)`` embeddings p of the same samples in the same order.

    Returns:
        :class:`ProcrustesParts`. A student unrelated to the teacher has s near 0, and its change is the teacher's spread given up
        (``scale``) and a new spread (``residual``). N <= D + 1 samples can be turned into each other more easily than many; take N well
        above D to compare values.

    Scale:
        Embedding units squared, a mean over samples; ``factor`` and ``shares`` free of units. Time O(N D^2 + D^3), memory O(D^2).
        Rounding of the nuclear norm leaves an error of about 1e-15 P in rotation, scale and residual.

    Invariances:
        Permutation of samples; one orthogonal map or one translation of both spaces; one scaling of both for the shares.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, different shapes, NaN or infinity, all teacher embeddings equal. (Equal student embeddings are a
            factor of 0.)

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, -3.0]])
        >>> {name: round(share.item(), 6) for name, share in procrustes(2 * points + 5, points).shares.items()}
        {'translation': 0.909091, 'rotation': 0.0, 'scale': 0.090909, 'residual': 0.0}

    Reference:
        Schönemann and Carroll, Fitting one matrix to another under choice of a central dilation and a rigid motion, Psychometrika 1970. The
        residual over F is the aligned dispersion of :func:`geomreg.metrics.distortion_bound` over P.
    """
    check_same_samples("procrustes", ("student", "teacher"), (student, teacher), minimum=3, same_width=True)
    return _parts("procrustes", _moments(student, teacher))


def _moments(student: Tensor, teacher: Tensor) -> Moments:
    """Of the change and the teacher: a small change is not the difference of large moments."""
    return Moments.of(student.detach().double() - teacher.detach().double(), teacher)


def _parts(name: str, moments: Moments) -> ProcrustesParts:
    check_collapse(name, "teacher", moments.collapsed(1))
    translation, dispersion, before = moments.centre(0).square().sum(), moments.spread(0), moments.spread(1)
    mixed = moments.block(0, 1) / moments.rows
    cross = mixed + moments.block(1, 1) / moments.rows
    rotation = 2 * (torch.linalg.svdvals(cross).sum() - cross.trace())
    rotation = torch.minimum(rotation.clamp(min=0), dispersion)  # rounding alone can leave this range
    left, growth = dispersion - rotation, mixed.trace() + rotation / 2  # N - P, without the difference of two large numbers
    scale = torch.minimum(growth.square() / before, left)
    return ProcrustesParts(translation + dispersion, translation, rotation, scale, left - scale, (1 + growth / before).clamp(min=0))


class ProcrustesResults(Results):
    """:class:`ProcrustesParts` as a dictionary."""

    parts = ProcrustesParts


class Procrustes(MomentsMetric):
    """Metric form of :func:`procrustes`; exact over batches and processes, with O(D^2) numbers of state.

    Args:
        modality: ``"image"``, ``"text"``, or ``"stacked"`` (one translation, rotation and factor for images and texts).
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    results = ProcrustesResults
    same_width = True

    def __init__(self, *, modality: str = "image", **kwargs: Any) -> None:
        super().__init__(modality, **kwargs)

    def _moments(self, student: Tensor, teacher: Tensor) -> Moments:
        return _moments(student, teacher)

    def compute(self) -> Results:
        """The entries of :class:`ProcrustesParts` over everything collected, by name."""
        self._check_ids()
        return ProcrustesResults(_parts("Procrustes", self._collected(minimum=3))._asdict())

"""Zero-shot agreement of student and teacher: measured, certified sample by sample, and bounded by summary statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_directions, check_same_samples
from geomreg.metrics.base import MomentsMetric
from geomreg.metrics.moments import Moments
from geomreg.metrics.results import Results
from geomreg.metrics.tiles import ROWS, squared_distances

__all__ = ["ZeroShotAgreement", "ZeroShotBound", "zero_shot_bound"]

ROUNDING = 1e-12  # of distances of unit vectors, on the safe side


class ZeroShotBound(NamedTuple):
    """Shares of samples, 0-d fp64 tensors; ``agreement >= certified`` and ``agreement >= bound`` always hold.

    Attributes:
        agreement: student and teacher decide for the same class: the measured value.
        certified: the difference vectors and the teacher's margin prove it.
        bound: lower bound from the teacher's margins and two numbers about the difference vectors; 0 where it says nothing.
    """

    agreement: Tensor
    certified: Tensor
    bound: Tensor

    @property
    def slack(self) -> Tensor:
        """What the certificate misses: ``agreement - certified``."""
        return self.agreement - self.certified

    @property
    def bound_slack(self) -> Tensor:
        """What the bound misses: ``agreement - bound``."""
        return self.agreement - self.bound


def zero_shot_bound(student: Tensor, teacher: Tensor, student_heads: Tensor, teacher_heads: Tensor) -> ZeroShotBound:
    r"""Share of zero-shot decisions that the change cannot have turned, beside the measured share that it did not turn.

    All embeddings are divided by their norms. With difference vectors :math:`u = f - p` of an image and :math:`v_c` of the head of class
    c, b the teacher's class and D its distances, the student decides the same if, for every other class c,

    .. math:: D(p, t_c) - D(p, t_b) > \lVert u - v_c \rVert + \lVert u - v_b \rVert .

    From summary statistics, with any vector m, :math:`\rho = \max_c \lVert v_c - m \rVert` and the teacher's margins (the least of the left
    sides): the share of other decisions is, for every :math:`\tau > 0`, at most

    .. math:: P(\text{margin} < 2 \tau + 2 \rho) + \mathbb{E} \lVert u - m \rVert^2 / \tau^2 .

    ``bound`` takes the best tau, and for m the mean of the images' u. Proofs: docs/distortion-bound.md, statement 5.

    Args:
        student: ``(N, D)`` image embeddings of the student.
        teacher: ``(N, D)`` image embeddings of the teacher of the same samples in the same order.
        student_heads: ``(C, D)`` text embedding of each class by the student (for several templates: their mean).
        teacher_heads: ``(C, D)`` the same by the teacher.

    Returns:
        :class:`ZeroShotBound`. Of cosines that are equal but for rounding any may be the decision; it is not certified.

    Scale:
        Shares. Time O(N C D); memory for the similarities of some rows.

    Invariances:
        Permutation of samples; one permutation of the heads (without equal cosines); scaling of single embeddings; one orthogonal map of
        everything. A rotation of the student alone (images and heads) leaves ``agreement``, not the certificates.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: no sample, fewer than 2 classes, different shapes, NaN or infinity, a zero vector.

    Example:
        >>> import torch
        >>> heads = torch.eye(3)
        >>> zero_shot_bound(heads + 0.01, heads, heads, heads).certified.item()
        1.0
    """
    name = "zero_shot_bound"
    check_same_samples(name, ("student", "teacher"), (student, teacher), minimum=1, same_width=True)
    heads = _heads(name, student_heads, teacher_heads)
    check_same_samples(name, ("student", "student head"), (student, student_heads), minimum=1, same_rows=False, same_width=True)
    decisions, shifts = _decisions(name, student, teacher, heads)
    return _bound(decisions, Moments.of(shifts), heads)


def _heads(name: str, student_heads: Tensor, teacher_heads: Tensor) -> tuple[Tensor, Tensor]:
    labels = ("student head", "teacher head")
    check_same_samples(name, labels, (student_heads, teacher_heads), minimum=2, same_width=True)
    one, two = (check_directions(name, label, value) for label, value in zip(labels, (student_heads, teacher_heads), strict=True))
    return one, two


def _decisions(name: str, student: Tensor, teacher: Tensor, heads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``(N, 3)``: teacher's margin, is it certified, do both agree; and the difference vectors."""
    f, p = check_directions(name, "student", student), check_directions(name, "teacher", teacher)
    parts, shifts = [], f - p
    rows = max(1, 4 * ROWS**2 // len(heads[0]))
    for start in range(0, len(f), rows):
        part = slice(start, start + rows)
        cosines = p[part] @ heads[1].T
        best = cosines.argmax(dim=1, keepdim=True)
        agree = (f[part] @ heads[0].T).argmax(dim=1, keepdim=True) == best
        away = squared_distances(p[part], heads[1]).sqrt()
        moved = squared_distances(shifts[part], heads[0] - heads[1]).sqrt()
        gap, needed = away - away.gather(1, best), moved + moved.gather(1, best)
        gap.scatter_(1, best, torch.inf)
        certain = (gap - needed).amin(dim=1, keepdim=True) > ROUNDING
        parts.append(torch.cat([gap.amin(dim=1, keepdim=True), certain.double(), agree.double()], dim=1))
    return torch.cat(parts), shifts


def _bound(decisions: Tensor, shifts: Moments, heads: tuple[Tensor, Tensor]) -> ZeroShotBound:
    margins, certified, agreement = decisions.unbind(dim=1)
    radius = torch.linalg.vector_norm(heads[0] - heads[1] - shifts.mean, dim=1).max()
    ordered = margins.sort().values
    room = (ordered - ROUNDING) / 2 - radius  # the tau that ends at a margin: the best is one of these
    fewer = torch.searchsorted(ordered, ordered).double() / len(ordered)  # share of smaller margins
    turned = torch.where(room > 0, fewer + shifts.spread(0) / torch.where(room > 0, room, 1.0).square(), 1.0)
    return ZeroShotBound(agreement.mean(), certified.mean(), (1 - turned.min()).clamp(min=0))


class ZeroShotResults(Results):
    """:class:`ZeroShotBound` as a dictionary."""

    parts = ZeroShotBound


class ZeroShotAgreement(MomentsMetric):
    """Metric form of :func:`zero_shot_bound`; exact over batches and processes, with three numbers of state a sample.

    Args:
        student_heads: see :func:`zero_shot_bound`; those of this moment, so build a new metric for each evaluation.
        teacher_heads: see there.

    ``update(student, teacher)`` takes :class:`~geomreg.Embeddings`, of which the images count.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    results = ZeroShotResults
    same_width = True
    modalities = ("image",)
    decisions: list[Tensor]
    student_heads: Tensor
    teacher_heads: Tensor

    def __init__(self, student_heads: Tensor, teacher_heads: Tensor, **kwargs: Any) -> None:
        heads = _heads("ZeroShotAgreement", student_heads, teacher_heads)
        super().__init__("image", ("decisions",), **kwargs)
        for key, value in zip(("student_heads", "teacher_heads"), heads, strict=True):
            self.register_buffer(key, value, persistent=False)

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        super()._check(student, teacher)
        pair = ("teacher", "head"), (teacher, self.teacher_heads)
        check_same_samples("ZeroShotAgreement", *pair, minimum=1, same_rows=False, same_width=True)

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        decisions, _ = _decisions("ZeroShotAgreement", student, teacher, (self.student_heads, self.teacher_heads))
        super()._add(student, teacher)
        self.decisions.append(decisions.flatten())

    def _moments(self, student: Tensor, teacher: Tensor) -> Moments:
        f, p = (check_directions("ZeroShotAgreement", label, value) for label, value in (("student", student), ("teacher", teacher)))
        return Moments.of(f - p)

    def compute(self) -> Results:
        """The entries of :class:`ZeroShotBound` over everything collected, by name."""
        self._check_ids()
        shifts = self._collected()
        decisions = self._joined("decisions", 1)
        return ZeroShotResults(_bound(decisions.reshape(-1, 3), shifts, (self.student_heads, self.teacher_heads))._asdict())

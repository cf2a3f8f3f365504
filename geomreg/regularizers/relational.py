"""Relational distillation: relative distances and angles within a batch stay those of the teacher (RKD, arXiv 1904.05068)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomreg.checks import check_count, check_modalities, check_pair, check_rows
from geomreg.distributed import gathered_rows
from geomreg.precision import at_least_fp32, full_precision
from geomreg.regularizers.common import chosen, nothing, sized, summed, unit_along
from geomreg.types import Embeddings

__all__ = ["RelationalAngle", "RelationalDistance", "relational_angle_loss", "relational_distance_loss"]

_CLOSEST = 1e-6  # coincident rows count as this far apart, as in the authors' code, but of the longest row


def relational_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Huber difference of the pairwise distances, each space's divided by its mean distance.

    .. math:: \frac1{B^2} \sum_{j,k} h\Big( \frac{\lVert z_j - z_k \rVert}{\mu} - \frac{\lVert z^0_j - z^0_k \rVert}{\mu^0} \Big)

    with h(x) = x^2 / 2 for |x| < 1, |x| - 1/2 beyond, and the mean distance mu over j != k, through which gradient flows.

    Args:
        student: ``(B, D)`` embeddings of the model in training, as they come; B >= 2; receives gradient.
        teacher: ``(B, E)`` embeddings of the same inputs by the frozen model, of any width; constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Free of units; averaged over all B^2 entries, of which the B on the diagonal are 0. Time O(B^2 D), memory O(B^2); on CUDA
        the backward pass of ``torch.pdist`` takes O(B^2 D).

    Invariances:
        Permutation of samples; translation, orthogonal map and positive scaling of student or teacher, each by itself. It
        therefore allows DiVE's common shift, and more.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: numbers of rows or devices differ, fewer than two rows, the teacher requires grad.

    Deviations:
        Distances from differences, not from inner products; coincident rows count as 1e-6 of the longest row apart in both, not as 1e-6,
        which would make all small embeddings equal.

    Example:
        >>> import torch
        >>> line = torch.tensor([[0.0], [1.0], [3.0]])
        >>> relational_distance_loss(5 * line + 2, line)
        tensor(0.)

    Reference:
        Park et al., Relational knowledge distillation, CVPR 2019, arXiv 1904.05068, equations 5 to 7.
    """
    name = "relational_distance_loss"
    check_pair(name, student, teacher, same_width=False)
    check_rows(name, student, 2)
    with full_precision(student):
        one, other = (_relative_distances(at_least_fp32(value)) for value in (student, teacher))
        return 2 * F.smooth_l1_loss(one, other, reduction="sum") / len(student) ** 2  # both orders of each pair


def _relative_distances(x: Tensor) -> Tensor:
    """Distances of the B (B - 1) / 2 pairs divided by their mean."""
    x = sized(x)
    longest = torch.linalg.vector_norm(x.detach(), dim=1).max()
    distances = torch.pdist(x).clamp(min=_CLOSEST * torch.where(longest == 0, 1.0, longest))
    return distances / distances.mean()


def relational_angle_loss(student: Tensor, teacher: Tensor, *, max_triplets: int | None = None, seed: int = 0) -> Tensor:
    r"""Huber difference of the angles that three samples form.

    .. math:: \frac1{B^3} \sum_{j,k,l} h(\cos\angle_{kjl} - \cos\angle^0_{kjl}), \quad
              \cos\angle_{kjl} = \langle e_{jk}, e_{jl} \rangle, \quad e_{jk} = \frac{z_k - z_j}{\lVert z_k - z_j \rVert}

    Args:
        student: ``(B, D)`` embeddings of the model in training, as they come; B >= 3; receives gradient.
        teacher: ``(B, E)`` embeddings of the same inputs by the frozen model, of any width; constant.
        max_triplets: with more than this many triplets of different samples, that many are drawn at random; the expected
            value and gradient are those of all. None takes all B (B - 1) (B - 2).
        seed: of the draw.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Free of units, at most 3/2; averaged over B^3, of which triplets with a repeated sample are 0, but for the angle of a direction with
        itself where two rows coincide in one space alone. Memory O(B^3 + B^2 D), or O(max_triplets D + B^2).

    Invariances:
        Permutation of samples (of all triplets); translation, orthogonal map and positive scaling of student or teacher, each
        by itself.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: numbers of rows or devices differ, fewer than three rows, the teacher requires grad, ``max_triplets`` < 1.

    Deviations:
        Coincident rows have no direction: cosine 0 and no gradient, where the authors' code gives gradients of 1e9.

    Example:
        >>> import torch
        >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational_angle_loss(3 * corner - 1, corner).item() < 1e-12
        True

    Reference:
        Park et al., Relational knowledge distillation, CVPR 2019, arXiv 1904.05068, equations 8 and 9.
    """
    name = "relational_angle_loss"
    check_pair(name, student, teacher, same_width=False)
    check_rows(name, student, 3)
    if max_triplets is not None:
        check_count(name, "max_triplets", max_triplets, 1)
    return _angle_loss(student, teacher, None if max_triplets is None else _draws(max_triplets, seed))


def _draws(count: int, seed: int) -> Tensor:
    """``(3, count)`` numbers in [0, 1) that stand for triplets, whatever the number of rows."""
    return torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _angle_loss(student: Tensor, teacher: Tensor, draws: Tensor | None) -> Tensor:
    rows = len(student)
    triplets = rows * (rows - 1) * (rows - 2)
    with full_precision(student):
        spaces = [at_least_fp32(value) for value in (student, teacher)]
        if draws is None or triplets <= draws.shape[1]:
            one, other = (_angles(x) for x in spaces)
            return F.smooth_l1_loss(one, other, reduction="sum") / rows**3
        counts = torch.tensor([[rows], [rows - 1], [rows - 2]])
        vertex, first, second = (draws * counts).long().to(student.device)
        first = (vertex + 1 + first) % rows
        for taken in torch.stack([vertex, first]).sort(dim=0).values:  # the second-th row that is neither of the two
            second = second + (second >= taken).long()
        one, other = ((unit_along(x[first] - x[vertex], -1) * unit_along(x[second] - x[vertex], -1)).sum(dim=-1) for x in spaces)
        drawn = F.smooth_l1_loss(one, other) * (triplets / rows**3)
        length, of_teacher = (_lengths(x) for x in spaces)
        with_itself = 2 * F.smooth_l1_loss(length, of_teacher, reduction="sum") / rows**3  # both orders of each pair
        return drawn + with_itself


def _angles(x: Tensor) -> Tensor:
    """``(B, B, B)`` cosines at the first index."""
    directions = unit_along(x[None, :] - x[:, None], -1)  # (B, B, D): from row j to row k
    return directions @ directions.transpose(1, 2)


def _lengths(x: Tensor) -> Tensor:
    """Squared lengths of the B (B - 1) / 2 directions, the cosines of each with itself: 0 where rows coincide, else 1; NaN stays."""
    largest = torch.pdist(x.detach(), p=math.inf)
    return torch.where(nothing(largest), 0.0, 1.0 + 0.0 * largest)


class RelationalDistance(nn.Module):
    """Module form of :func:`relational_distance_loss`, added over modalities; over the batches of all processes.

    Args:
        modalities: which embeddings to keep; by default those that are given.
        normalize: divide embeddings by their L2 norm first.
    """

    def __init__(self, *, modalities: tuple[str, ...] | None = None, normalize: bool = True) -> None:
        super().__init__()
        self.modalities = check_modalities("RelationalDistance", modalities)
        self.normalize = normalize

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        parts = chosen("RelationalDistance", self.modalities, self.normalize, student, teacher)
        return summed(relational_distance_loss(*(gathered_rows(value, self.training) for value in part)) for part in parts)

    def step(self) -> None:
        """Nothing to commit: this term has no state."""

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, normalize={self.normalize}"


class RelationalAngle(nn.Module):
    """Module form of :func:`relational_angle_loss`, added over modalities; over the batches of all processes.

    Args:
        modalities: which embeddings to keep; by default those that are given.
        max_triplets: draw this many triplets where there are more; other ones after each :meth:`step`. None takes all.
        seed: of the draws, the same on every process.
        normalize: divide embeddings by their L2 norm first.

    The number of steps so far is part of ``state_dict``: a resumed run draws on.
    """

    def __init__(
        self, *, modalities: tuple[str, ...] | None = None, max_triplets: int | None = None, seed: int = 0, normalize: bool = True
    ) -> None:
        super().__init__()
        self.modalities = check_modalities("RelationalAngle", modalities)
        if max_triplets is not None:
            check_count("RelationalAngle", "max_triplets", max_triplets, 1)
        check_count("RelationalAngle", "seed", seed, 0)
        self.max_triplets, self.seed, self.normalize = max_triplets, seed, normalize
        self._steps = 0
        self._draw()

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        parts = chosen("RelationalAngle", self.modalities, self.normalize, student, teacher)
        rows = [[gathered_rows(value, self.training) for value in part] for part in parts]
        for one, other in rows:
            check_pair("RelationalAngle", one, other)
            check_rows("RelationalAngle", one, 3)
        return summed(_angle_loss(one, other, self._draws) for one, other in rows)

    def step(self) -> None:
        """Other triplets from now on."""
        self._steps += 1
        self._draw()

    def _draw(self) -> None:
        self._draws = None if self.max_triplets is None else _draws(self.max_triplets, self.seed * 1_000_003 + self._steps)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        self._steps = int(state)
        self._draw()

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, max_triplets={self.max_triplets}, seed={self.seed}, normalize={self.normalize}"

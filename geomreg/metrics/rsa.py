"""Representational similarity analysis: do two embedding spaces order the same samples by the same distances?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from geomreg.checks import check_modality, check_next, check_option, check_same_ids, check_samples
from geomreg.types import Embeddings

__all__ = ["RSA", "rsa"]

DISSIMILARITIES = ("euclidean", "sqeuclidean", "cosine", "correlation")
CORRELATIONS = ("pearson", "spearman")


def rsa(student: Tensor, teacher: Tensor, *, dissimilarity: str = "euclidean", correlation: str = "pearson") -> Tensor:
    r"""Correlation of the two spaces' dissimilarities over all pairs of distinct samples.

    Args:
        student: ``(N, D)`` embeddings, as they come.
        teacher: ``(N, E)`` embeddings of the same samples in the same order; the widths may differ.
        dissimilarity: ``"euclidean"``, ``"sqeuclidean"`` (rsatoolbox's "euclidean" up to a factor), ``"cosine"``
            (1 - cosine) or ``"correlation"`` (1 - Pearson across the width).
        correlation: ``"pearson"``, or ``"spearman"`` (mean ranks for ties).

    Returns:
        0-d fp64 tensor in [-1, 1].

    Scale:
        Free of units. Time O(N^2 (D + E)); memory for the N (N - 1) / 2 distances of each space in fp64.

    Invariances:
        Permutation of samples; positive scaling of either space. An orthogonal map of either space, except for
        correlation (whose mean over the width is not a rotation's to keep). Translation of either space for the Euclidean
        dissimilarities, *not* for cosine and correlation.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, different numbers of samples, NaN or infinity, a zero vector under ``"cosine"`` or
            a constant one under ``"correlation"``, all distances of a space equal (the correlation is undefined).

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> rsa(2 * points + 5, points).item()
        1.0

    Reference:
        Kriegeskorte et al., Representational similarity analysis, Frontiers in Systems Neuroscience 2008. DiVE
        (arXiv 2511.09973) reports an RSA score without saying which; compare only scores of one definition.
    """
    check_option("rsa", "dissimilarity", dissimilarity, DISSIMILARITIES)
    check_option("rsa", "correlation", correlation, CORRELATIONS)
    check_samples("rsa", student, teacher, minimum=3)
    one, two = (_distances("rsa", value, dissimilarity) for value in (student, teacher))
    if correlation == "spearman":
        one, two = _ranks(one), _ranks(two)
    return pearson("rsa", one, two)


def pearson(name: str, one: Tensor, two: Tensor) -> Tensor:
    """Pearson correlation of two vectors in fp64; undefined for a constant one, which raises."""
    deviations = []
    for value in (one, two):
        if value.max() - value.min() <= 1e-12 * value.abs().max():
            raise ValueError(
                f"{name}: expected distances that differ, got {value.numel()} equal ones. The correlation is undefined; "
                "look for collapsed embeddings or take more samples."
            )
        deviation = value - value.mean()
        deviations.append(deviation / torch.linalg.vector_norm(deviation))
    return torch.dot(deviations[0], deviations[1]).clamp(-1, 1)


def _distances(name: str, embeddings: Tensor, dissimilarity: str) -> Tensor:
    """Condensed dissimilarities ``(N (N - 1) / 2,)`` in fp64, row by row of the upper triangle.

    Differences of vectors, never differences of inner products: accurate for neighbours that nearly coincide.
    """
    x = embeddings.detach().double()
    if dissimilarity == "correlation":
        x = x - x.mean(dim=1, keepdim=True)
    if dissimilarity in ("cosine", "correlation"):
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        scale = embeddings.detach().double().abs().amax(dim=1, keepdim=True)
        if bool((norms <= 1e-12 * scale).any()):
            raise ValueError(
                f'{name}: expected vectors with a direction for "{dissimilarity}", got a zero or constant one. '
                'Drop that sample or use "euclidean".'
            )
        return torch.pdist(x / norms).square() / 2
    distances = torch.pdist(x)
    return distances.square() if dissimilarity == "sqeuclidean" else distances


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, the mean rank for ties; values that differ by rounding alone are ties, zero distances included."""
    ordered, order = values.sort()
    step = ordered.diff() > 1e-9 * ordered[1:].abs() + 1e-12 * ordered[-1].abs()
    group = torch.cat([step.new_zeros(1, dtype=torch.long), step.long().cumsum(dim=0)])
    counts = torch.bincount(group).double()
    mean_rank = counts.cumsum(dim=0) - (counts - 1) / 2
    return torch.empty_like(values).scatter_(0, order, mean_rank[group])


class RSA(Metric):
    """Metric form of :func:`rsa`: collects embeddings over batches and processes.

    Args:
        modality: ``"image"``, ``"text"``, or ``"stacked"`` (images and texts in one set of samples, which adds the
            cross-modal distances).
        dissimilarity: see :func:`rsa`.
        correlation: see :func:`rsa`.
        max_samples: more rows than this raise in ``compute``: memory grows with their square (10,000 take 0.8 GB).

    ``update(student, teacher, ids=..., teacher_ids=...)`` takes :class:`~geomreg.Embeddings`; with integer ids given, a
    different order on the two sides, or the same sample twice (a distributed sampler that pads), is an error.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        *,
        modality: str = "image",
        dissimilarity: str = "euclidean",
        correlation: str = "pearson",
        max_samples: int = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_option("RSA", "modality", modality, ("image", "text", "stacked"))
        check_option("RSA", "dissimilarity", dissimilarity, DISSIMILARITIES)
        check_option("RSA", "correlation", correlation, CORRELATIONS)
        self.modality, self.dissimilarity, self.correlation, self.max_samples = modality, dissimilarity, correlation, max_samples
        for state in ("student", "teacher", "ids"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(
        self,
        student: Embeddings,
        teacher: Embeddings,
        ids: Tensor | Sequence[int] | None = None,
        teacher_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Add one batch; raises before anything is stored."""
        one, two = (check_modality("RSA", value, self.modality) for value in (student, teacher))
        check_samples("RSA", one, two, minimum=1)
        rows = len(one) // 2 if self.modality == "stacked" else len(one)
        known = check_same_ids("RSA", ids, teacher_ids, rows)
        check_next("RSA", self.student, one, "student")
        check_next("RSA", self.teacher, two, "teacher")
        if len(self.student) and bool(len(self.ids)) != (known is not None):  # type: ignore[arg-type]
            raise ValueError("RSA: expected ids in every update or in none, got a mixture. Pass ids each time.")
        self.student.append(one.detach())  # type: ignore[operator, union-attr]
        self.teacher.append(two.detach())  # type: ignore[operator, union-attr]
        if known is not None:
            self.ids.append(known.to(one.device))  # type: ignore[operator, union-attr]

    def compute(self) -> Tensor:
        """0-d fp64 tensor."""
        ids = _all(self.ids)
        if ids is not None and torch.unique(ids).numel() != ids.numel():
            raise ValueError("RSA: expected every sample once, got repeated ids. Switch off the sampler's padding or drop repeats.")
        one, two = gathered("RSA", self.student, self.teacher, self.max_samples)
        return rsa(one, two, dissimilarity=self.dissimilarity, correlation=self.correlation)


def gathered(name: str, student: object, teacher: object, max_samples: int) -> tuple[Tensor, Tensor]:
    """The collected rows of a metric's two states, checked against ``max_samples``."""
    one, two = _all(student), _all(teacher)
    if one is None or two is None:
        raise ValueError(f"{name}: expected at least 3 samples, got none. Call update() first.")
    if len(one) > max_samples:
        raise ValueError(
            f"{name}: expected at most max_samples={max_samples} rows, got {len(one)}. Take a subset, or raise max_samples "
            "(memory grows with its square)."
        )
    return one, two


def _all(state: object) -> Tensor | None:
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if isinstance(state, list) and state else None

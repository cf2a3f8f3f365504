"""Mutual nearest neighbours: which share of a sample's neighbours in one space are its neighbours in the other?"""

from typing import Any

import torch
from torch import Tensor

from geomreg.checks import check_below, check_collapse, check_count, check_directions, check_option, check_same_samples
from geomreg.metrics.base import PairedMetric
from geomreg.metrics.tiles import ROWS, squared_distances

__all__ = ["MutualKNN", "mutual_knn"]

METRICS = ("inner", "cosine", "euclidean")


def mutual_knn(x: Tensor, y: Tensor, *, k: int, metric: str = "inner", per_sample: bool = False) -> Tensor:
    r"""Share of common k nearest neighbours in two spaces, averaged over samples.

    .. math:: \frac{1}{N} \sum_i \frac{\lvert \mathcal{N}^x_k(i) \cap \mathcal{N}^y_k(i) \rvert}{k}

    with :math:`\mathcal{N}^x_k(i)` the k samples other than i that are nearest to i in x. **Ties** (values that differ by rounding alone:
    by less than 1e-11 of a squared distance, or 1e-12 of the product of the norms) go to the sample that comes first, in both spaces.

    Args:
        x: ``(N, D)`` embeddings, as they come.
        y: ``(N, E)`` embeddings of the same samples in the same order; the widths may differ.
        k: number of neighbours, below N. With k = N - 1 the value is 1, whatever the spaces.
        metric: nearest by ``"inner"`` product (the largest; what platonic-rep does, with unit vectors), ``"cosine"`` or ``"euclidean"``.
        per_sample: return the share of every sample.

    Returns:
        0-d fp64 tensor in [0, 1]; ``(N,)`` with ``per_sample``. Independent spaces give k / (N - 1) on average.

    Scale:
        Free of units. Time O(N^2 (D + E)); memory O(N) beside fp64 copies of the embeddings: similarities exist for some rows at a time.

    Invariances:
        Permutation of samples (without ties at the k-th neighbour); exchange of x and y; positive scaling and an orthogonal map of either
        space; translation of either under ``"euclidean"`` alone; scaling of single samples under ``"cosine"`` alone.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 3 samples, k not in [1, N - 1], different numbers of samples, NaN or infinity, rows that are
            all equal in both, a zero vector under ``"cosine"``.

    Deviations:
        platonic-rep leaves ties to argsort.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
        >>> mutual_knn(points[[0, 2, 1, 3]], points, k=1, metric="euclidean").item()
        0.0

    Reference:
        Huh et al., The platonic representation hypothesis, 2024 (arXiv 2405.07987), appendix A.
    """
    name, labels = "mutual_knn", ("x", "y")
    check_option(name, "metric", metric, METRICS)
    check_count(name, "k", k, 1)
    check_same_samples(name, labels, (x, y), minimum=3)
    check_below(name, "k", k, len(x), "samples")
    ready = [_prepared(name, label, value, metric) for label, value in zip(labels, (x, y), strict=True)]
    check_collapse(name, "x or y", all(_collapsed(one) for one in ready))  # ties would make any two such spaces agree
    shares = torch.empty(len(x), dtype=torch.float64, device=x.device)
    rows = max(1, 4 * ROWS**2 // len(x))
    for start in range(0, len(x), rows):
        own = torch.arange(start, min(start + rows, len(x)), device=x.device)
        one, two = (_neighbours(value, own, k, metric) for value in ready)
        shares[own] = (one & two).double().sum(dim=1) / k
    return shares if per_sample else shares.mean()


def _prepared(name: str, label: str, value: Tensor, metric: str) -> Tensor:
    return check_directions(name, label, value) if metric == "cosine" else value.detach().double()


def _collapsed(rows: Tensor) -> bool:
    """Rows that differ by rounding alone."""
    return bool((rows - rows[0]).abs().max() <= 1e-12 * rows.abs().max())


def _neighbours(rows: Tensor, own: Tensor, k: int, metric: str) -> Tensor:
    """``(P, N)``: True at the k nearest of each of the rows with the numbers ``own``."""
    if metric == "inner":
        norms = torch.linalg.vector_norm(rows, dim=1)
        far, rounding = -(rows[own] @ rows.T), 1e-12 * torch.outer(norms[own], norms)
    else:
        far = squared_distances(rows[own], rows, centre=rows.mean(dim=0), own=own)
        rounding = 1e-11 * far
    far.scatter_(1, own[:, None], torch.inf)
    last = far.topk(k, dim=1, largest=False).values[:, -1:]
    chosen: Tensor = far <= last + rounding
    several = (chosen.sum(dim=1) > k).nonzero()[:, 0]  # rows with more candidates than places
    if len(several):
        nearer = far[several] < last[several] - rounding[several]
        tied, free = chosen[several] & ~nearer, k - nearer.sum(dim=1, keepdim=True)
        chosen[several] = nearer | (tied & (tied.cumsum(dim=1) <= free))
    return chosen


class MutualKNN(PairedMetric):
    """Metric form of :func:`mutual_knn` of student and teacher: collects embeddings over batches and processes.

    Args:
        k: see :func:`mutual_knn`.
        modality: ``"image"``, ``"text"``, or ``"stacked"`` (images and texts in one set of samples).
        metric: see :func:`mutual_knn`.
        max_samples: more rows than this raise in ``compute``: time grows with their square.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, *, k: int, modality: str = "image", metric: str = "inner", max_samples: int = 50_000, **kwargs: Any) -> None:
        check_count("MutualKNN", "k", k, 1)
        check_option("MutualKNN", "metric", metric, METRICS)
        check_count("MutualKNN", "max_samples", max_samples, 3)
        super().__init__(modality, ("student", "teacher"), **kwargs)
        self.k, self.metric, self.max_samples = k, metric, max_samples

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        self._keep(student=student, teacher=teacher)

    def compute(self) -> Tensor:
        """0-d fp64 tensor."""
        self._check_ids()
        one, two = self._kept("student", "teacher", minimum=3, max_samples=self.max_samples)
        return mutual_knn(one, two, k=self.k, metric=self.metric)

"""Modality gap: how far apart are the centroids of the image and text embeddings?"""

from typing import Any

import torch
from torch import Tensor

from geomreg.checks import check_directions, check_modality, check_next_widths, check_option, check_same_samples
from geomreg.metrics.base import EmbeddingMetric
from geomreg.types import Embeddings

__all__ = ["ModalityGap", "modality_gap"]

SIDES = ("image", "text")


def modality_gap(image: Tensor, text: Tensor, *, normalize: bool = True) -> Tensor:
    r"""Euclidean distance of the two modalities' centroids, :math:`\lVert \frac1n \sum_i x_i - \frac1m \sum_j y_j \rVert`.

    Args:
        image: ``(N, D)`` image embeddings.
        text: ``(M, D)`` text embeddings of the same space; they need not be pairs.
        normalize: divide each embedding by its norm first, as the definition wants; False takes them as they come.

    Returns:
        0-d fp64 tensor, >= 0; of unit vectors at most 2.

    Scale:
        Embedding units. Time O((N + M) D).

    Invariances:
        Permutation of samples; one orthogonal map of both modalities; scaling of single embeddings if ``normalize``, else one
        translation of both.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: no sample, different widths, NaN or infinity, a zero vector if ``normalize``.

    Example:
        >>> import torch
        >>> modality_gap(torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).item()
        2.0

    Reference:
        Liang et al., Mind the gap, 2022 (arXiv 2203.02053), section 4.
    """
    check_same_samples("modality_gap", SIDES, (image, text), minimum=1, same_rows=False, same_width=True)
    return _gap(_record("modality_gap", image, text, normalize))


def _record(name: str, image: Tensor, text: Tensor, normalize: bool) -> Tensor:
    """``(3 + 2 D,)``: D, then the number of rows and their sum for images and for texts; sums of records stand one behind the other."""
    parts = [image.new_tensor([image.shape[1]], dtype=torch.float64)]
    for side, value in zip(SIDES, (image, text), strict=True):
        rows = check_directions(name, side, value) if normalize else value.detach().double()
        parts += [rows.new_tensor([len(rows)]), rows.sum(dim=0)]
    return torch.cat(parts)


def _added(records: Tensor) -> Tensor:
    """Of all samples: one record."""
    width = int(records[0])
    return torch.cat([records[:1], records.reshape(-1, 3 + 2 * width)[:, 1:].sum(dim=0)])


def _gap(records: Tensor) -> Tensor:
    sums = _added(records)[1:].reshape(2, -1)
    means = sums[:, 1:] / sums[:, :1]
    distance: Tensor = torch.linalg.vector_norm(means[0] - means[1])
    return distance


class ModalityGap(EmbeddingMetric):
    """Metric form of :func:`modality_gap` of one model; exact over batches and processes, with O(D) numbers of state.

    ``update(embeddings)`` takes :class:`~geomreg.Embeddings` with both modalities; they need not be equally many. ``higher_is_better`` is
    False, for wrappers that want a direction; whether a smaller gap is better depends on the task.

    Args:
        normalize: see :func:`modality_gap`.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    sums: list[Tensor]

    def __init__(self, *, normalize: bool = True, **kwargs: Any) -> None:
        check_option("ModalityGap", "normalize", normalize, (False, True))
        super().__init__(("sums",), (str(normalize),), **kwargs)
        self.normalize = normalize

    def update(self, embeddings: Embeddings) -> None:
        """Add one batch; raises before anything is stored."""
        image, text = (check_modality("ModalityGap", embeddings, side) for side in SIDES)
        check_same_samples("ModalityGap", SIDES, (image, text), minimum=1, same_rows=False, same_width=True)
        record = _record("ModalityGap", image, text, self.normalize)
        if self.sums:
            check_next_widths("ModalityGap", (int(self.sums[0][0]),), (image.shape[1],))
        self.sums.append(record)
        self._merge()

    def _merge(self) -> None:
        if self.sums:
            self.sums = [_added(torch.cat(self.sums))]

    def compute(self) -> Tensor:
        """0-d fp64 tensor."""
        return _gap(self._joined("sums", 1))

"""Representational similarity analysis: do two embedding spaces order the same samples by the same distances?"""

import warnings
from typing import Any

import torch
from torch import Tensor

from geomreg.checks import (
    check_count,
    check_distances_differ,
    check_fraction,
    check_next_widths,
    check_option,
    check_sample_count,
    check_samples,
    check_tensors_or_embeddings,
)
from geomreg.metrics.base import PairedMetric
from geomreg.metrics.results import Results
from geomreg.metrics.rsa_bootstrap import RSAInterval, in_order, interval_of
from geomreg.metrics.rsa_moments import CLOSED, Moments, closed_sums, precise
from geomreg.metrics.rsa_pairs import Pairs, Space
from geomreg.metrics.rsa_ranks import BoundedRSA, by_histogram, ranks
from geomreg.types import Embeddings

__all__ = ["RSA", "BoundedRSA", "RSAInterval", "bounded_rsa", "rsa", "rsa_interval"]

DISSIMILARITIES = ("euclidean", "sqeuclidean", "cosine", "correlation")
CORRELATIONS = ("pearson", "spearman")
METHODS = ("auto", "exact", "histogram")
MODALITIES = ("image", "text", "stacked", "cross-modal")
BINS = 1 << 17  # tables that stay in cache
SORTED = 2**23  # pairs whose ranks are sorted by default: 4,096 samples; 75 bytes each
LOOSE = 1e-3  # a bound above this is worth a warning


def rsa(
    student: Tensor | Embeddings,
    teacher: Tensor | Embeddings,
    *,
    dissimilarity: str = "euclidean",
    correlation: str = "pearson",
    modality: str | None = None,
    method: str = "auto",
) -> Tensor:
    r"""Correlation of the two spaces' dissimilarities over all pairs of distinct samples.

    Args:
        student: ``(N, D)`` embeddings, as they come; or :class:`~geomreg.Embeddings`, of which ``modality`` says what is compared.
        teacher: ``(N, E)`` embeddings of the same samples in the same order; the widths may differ.
        dissimilarity: ``"euclidean"``, ``"sqeuclidean"`` (rsatoolbox's "euclidean" up to a factor), ``"cosine"``
            (1 - cosine) or ``"correlation"`` (1 - Pearson across the width).
        correlation: ``"pearson"``, or ``"spearman"`` (mean ranks for ties).
        modality: None for tensors; for Embeddings ``"image"``, ``"text"``, ``"stacked"`` (images and texts as 2 N samples in one set) or
            ``"cross-modal"`` (the N x N dissimilarities of image i to text j, those of a sample's own image and text among them: the
            block that retrieval and zero-shot classification read).
        method: how. Pearson is exact either way: ``"auto"`` takes sums over samples where they are precise, ``"exact"`` always goes through
            the pairs. Spearman: ``"exact"`` sorts all pairs, ``"histogram"`` ranks them in 2^17 bins, ``"auto"`` sorts up to 4,096
            samples (2^23 pairs). The error of a histogram has a proved bound, see :func:`bounded_rsa`; above 1e-3 a warning gives it.

    Returns:
        0-d fp64 tensor in [-1, 1].

    Scale:
        Free of units. Pearson of squared Euclidean, cosine and correlation dissimilarity with at least as many samples as dimensions:
        time O(N D^2), memory O(D^2). It needs distances that spread by more than 0.3 % of their mean; others, and all that is left, go
        through the pairs tile by tile: time O(N^2 D), memory O(N D); exact Spearman 75 bytes a pair.

    Invariances:
        Permutation of samples; positive scaling of either space. An orthogonal map of either space, except for
        correlation (whose mean over the width is not a rotation's to keep). Translation of either space for the Euclidean
        dissimilarities, *not* for cosine and correlation.

    Raises:
        TypeError: not floating-point tensors or Embeddings of them.
        ValueError: fewer than 3 samples, different numbers of samples, NaN or infinity, a zero vector under ``"cosine"`` or
            a constant one under ``"correlation"``, all distances of a space equal (the correlation is undefined).

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> round(rsa(2 * points + 5, points).item(), 9)
        1.0

    Reference:
        Kriegeskorte et al., Representational similarity analysis, Frontiers in Systems Neuroscience 2008. DiVE
        (arXiv 2511.09973) reports an RSA score without saying which; compare only scores of one definition.
    """
    value, bound = _score("rsa", student, teacher, dissimilarity, correlation, modality, method)
    if bound > LOOSE:
        warnings.warn(
            f"rsa: the histogram leaves an error of up to {float(bound):.1g} in {float(value):.4f}. "
            'Pass method="exact", or see geomreg.metrics.bounded_rsa for more bins.',
            stacklevel=2,
        )
    return value


def bounded_rsa(
    student: Tensor | Embeddings,
    teacher: Tensor | Embeddings,
    *,
    dissimilarity: str = "euclidean",
    modality: str | None = None,
    method: str = "histogram",
    bins: int = BINS,
) -> BoundedRSA:
    """Spearman :func:`rsa` with a proved bound on its error.

    Args:
        student: as for :func:`rsa`.
        teacher: as for :func:`rsa`.
        dissimilarity: as for :func:`rsa`.
        modality: as for :func:`rsa`.
        method: ``"histogram"``, ``"exact"`` or ``"auto"``, as for :func:`rsa`.
        bins: of each histogram, at least 8; the bound falls about as 1 / bins.

    Returns:
        :class:`BoundedRSA`: the exact score, with mean ranks for ties and values that differ by rounding (1e-11) alone taken as tied,
        is within ``bound`` of ``value``. The proof is in ``geomreg/metrics/rsa_ranks.py``; it assumes nothing about the distances.
        In ``benchmarks/rsa`` the error is a quarter of the bound or less.

    Raises:
        TypeError, ValueError: as :func:`rsa`.

    Example:
        >>> import torch
        >>> points = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        >>> value, bound = bounded_rsa(points.round(decimals=1), points)
        >>> abs(value - rsa(points.round(decimals=1), points, correlation="spearman")) <= bound
        tensor(True)
    """
    check_count("bounded_rsa", "bins", bins, 8)
    return _score("bounded_rsa", student, teacher, dissimilarity, "spearman", modality, method, bins=bins)


def rsa_interval(
    student: Tensor | Embeddings,
    teacher: Tensor | Embeddings,
    *,
    dissimilarity: str = "euclidean",
    correlation: str = "pearson",
    modality: str | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RSAInterval:
    """:func:`rsa` with a bootstrap interval over samples: what another draw of as many samples might have given.

    Samples are resampled, not pairs, which are not independent. A pair of two draws of one sample is left out; a sample's own image-text
    distance counts once for each draw of the sample. Resamples of fewer than 3 different samples or of equal distances are left out.
    Percentiles of the others are the interval.

    Args:
        student: as for :func:`rsa`. With Embeddings a sample is a pair of image and text, drawn together.
        teacher: as for :func:`rsa`.
        dissimilarity: as for :func:`rsa`.
        correlation: as for :func:`rsa`.
        modality: as for :func:`rsa`.
        level: share of the bootstrap scores inside.
        resamples: how many.
        seed: of the draws.

    Returns:
        :class:`RSAInterval`.

    Scale:
        Pearson: O(N^2 resamples) in matrix products over tiles (or, for squared distances in few dimensions, O(N D^2 resamples)); nothing
        is computed from embeddings twice. Spearman: up to 2^23 pairs (4,096 samples), whose ranks are exact up to 2^14 pairs and rounded to
        2^14 classes beyond.

    Raises:
        TypeError, ValueError: as :func:`rsa`; more pairs than that under Spearman; most resamples undefined.

    Invariances:
        Permutation of samples: draws are of samples in the order of their numbers, whatever order they come in, bit for bit but for
        ``value``.

    Reference:
        Nili et al., A toolbox for representational similarity analysis, PLOS Computational Biology 2014 (bootstrap over conditions);
        pairs of a condition with itself left out as in rsatoolbox: Schuett et al., Statistical inference on representational
        geometries, eLife 2023, who show that this interval is somewhat wide.
    """
    name = "rsa_interval"
    check_fraction(name, "level", level, below_one=True)
    check_count(name, "resamples", resamples, 1)
    value, _ = _score(name, student, teacher, dissimilarity, correlation, modality, "auto")
    one, two = (check_tensors_or_embeddings(name, rows, modality) for rows in (student, teacher))
    parts = 2 if modality in ("stacked", "cross-modal") else 1
    order = in_order(torch.cat([part.detach().double() for rows in (one, two) for part in rows.chunk(parts)], dim=1))
    one, two = (torch.cat([part[order] for part in rows.chunk(parts)]) for rows in (one, two))
    pairs = _pairs(name, one, two, dissimilarity, modality)
    if correlation == "spearman" and pairs.number > SORTED:
        raise ValueError(f"{name}: expected at most {SORTED} pairs for a Spearman interval, got {pairs.number}. Take a subset, or Pearson.")
    return interval_of(
        name, pairs, value, parts=parts, spearman=correlation == "spearman",
        level=level, resamples=resamples, seed=seed, closed=(one, two, dissimilarity) if modality in (None, "image", "text") else None,
    )  # fmt: skip


def _score(
    name: str,
    student: Tensor | Embeddings,
    teacher: Tensor | Embeddings,
    dissimilarity: str,
    correlation: str,
    modality: str | None,
    method: str,
    bins: int = BINS,
) -> BoundedRSA:
    check_option(name, "dissimilarity", dissimilarity, DISSIMILARITIES)
    check_option(name, "correlation", correlation, CORRELATIONS)
    check_option(name, "method", method, METHODS if correlation == "spearman" else METHODS[:2])
    check_option(name, "modality", modality, (None, *MODALITIES))
    one, two = (check_tensors_or_embeddings(name, rows, modality) for rows in (student, teacher))
    cross = modality == "cross-modal"
    for rows in zip(*((value.chunk(2) if cross else (value,)) for value in (one, two)), strict=True):
        check_samples(name, *rows, minimum=3)
    if correlation == "pearson" and method == "auto" and dissimilarity in CLOSED and max(one.shape[1], two.shape[1]) <= len(one):
        sums = closed_sums(name, one, two, dissimilarity, cross=cross)
        if precise(sums):
            return _exact(sums.correlation())
    pairs = _pairs(name, one, two, dissimilarity, modality)
    if correlation == "pearson":
        return _exact(pairs.sums(name).correlation())
    if method == "histogram" or (method == "auto" and pairs.number > SORTED):
        return by_histogram(name, pairs, bins)
    values = []
    for value in pairs.gathered():
        check_distances_differ(name, value.min(), value.max(), len(value))
        values.append(ranks(value))
    return _exact(pearson(name, *values))


def _exact(value: Tensor) -> BoundedRSA:
    return BoundedRSA(value, torch.zeros_like(value))


def _pairs(name: str, student: Tensor, teacher: Tensor, dissimilarity: str, modality: str | None) -> Pairs:
    return Pairs(Space.of(name, student, dissimilarity), Space.of(name, teacher, dissimilarity), modality == "cross-modal")


def pearson(name: str, one: Tensor, two: Tensor) -> Tensor:
    """Pearson correlation of two vectors in fp64; undefined for a constant one, which raises."""
    deviations = []
    for value in (one, two):
        check_distances_differ(name, value.min(), value.max(), len(value))
        deviation = value - value.mean()
        deviations.append(deviation / torch.linalg.vector_norm(deviation))
    return torch.dot(deviations[0], deviations[1]).clamp(-1, 1)


class RSAResults(Results):
    """:class:`RSAInterval` as a dictionary."""

    parts = RSAInterval


class RSA(PairedMetric):
    """Metric form of :func:`rsa` or, with ``level``, of :func:`rsa_interval`: collects embeddings over batches and processes.

    Args:
        modality: ``"image"``, ``"text"``, ``"stacked"`` (images and texts in one set of samples) or ``"cross-modal"`` (image i to text
            j), see :func:`rsa`.
        dissimilarity: see :func:`rsa`.
        correlation: see :func:`rsa`.
        method: see :func:`rsa`.
        level: of a bootstrap interval; None for the score alone.
        resamples: see :func:`rsa_interval`.
        seed: see :func:`rsa_interval`.
        keep_rows: by default Pearson of squared Euclidean, cosine and correlation dissimilarity streams: it keeps sums of 3 D^2 fp64
            numbers (6 MB at width 512), whatever the number of samples. True keeps the rows, for few samples in very many dimensions, or
            distances that spread so little (0.3 % of their mean) that rounding would show in sums, which is an error.
        max_samples: more rows than this, where rows must be kept, raise in ``compute``: time grows with their square, memory with their
            number (of exact Spearman with its square).

    ``update(student, teacher, ids=..., teacher_ids=...)`` takes :class:`~geomreg.Embeddings`; with integer ids given, a
    different order on the two sides, or the same sample twice (a distributed sampler that pads), is an error.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    modalities = MODALITIES
    student: list[Tensor]
    teacher: list[Tensor]
    moments: list[Tensor]

    def __init__(
        self,
        *,
        modality: str = "image",
        dissimilarity: str = "euclidean",
        correlation: str = "pearson",
        method: str = "auto",
        level: float | None = None,
        resamples: int = 1000,
        seed: int = 0,
        keep_rows: bool = False,
        max_samples: int = 10_000,
        **kwargs: Any,
    ) -> None:
        check_option("RSA", "dissimilarity", dissimilarity, DISSIMILARITIES)
        check_option("RSA", "correlation", correlation, CORRELATIONS)
        check_option("RSA", "method", method, METHODS if correlation == "spearman" else METHODS[:2])
        if level is not None:
            check_fraction("RSA", "level", level, below_one=True)
            check_option("RSA", "method with a level", method, ("auto",))
        check_count("RSA", "resamples", resamples, 1)
        check_count("RSA", "seed", seed, 0)
        check_option("RSA", "keep_rows", keep_rows, (False, True))
        check_count("RSA", "max_samples", max_samples, 3)
        streams = correlation == "pearson" and dissimilarity in CLOSED and method == "auto" and level is None and not keep_rows
        states, options = (("moments",), (dissimilarity,)) if streams else (("student", "teacher"), ())
        super().__init__(modality, states, options, **kwargs)
        self.results = None if level is None else RSAResults
        self.dissimilarity, self.correlation, self.method = dissimilarity, correlation, method
        self.level, self.resamples, self.seed, self.max_samples, self.streams = level, resamples, seed, max_samples, streams

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        check_samples("RSA", student, teacher, minimum=1)

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        if self.streams:
            if self.moments:
                widths = self.moments[0][:2].long().tolist()
                check_next_widths("RSA", widths, (student.shape[1], teacher.shape[1]), ("student", "teacher"))
            self.moments.append(self._record(student, teacher))
            self._merge()
        else:  # image and text of a sample side by side
            one, two = (torch.cat(rows.chunk(self._parts), dim=1) for rows in (student, teacher))
            self._keep(student=one, teacher=two)

    def _record(self, one: Tensor, two: Tensor) -> Tensor:
        """Moments of images and texts apart for cross-modal dissimilarities, else of all rows together."""
        parts = (one.chunk(2), two.chunk(2)) if self.modality == "cross-modal" else ((one,), (two,))
        return torch.cat([Moments.of_rows("RSA", x, y, self.dissimilarity).packed() for x, y in zip(*parts, strict=True)])

    def _merge(self) -> None:
        if self.streams and self.moments:
            self.moments = [torch.cat([one.packed() for one in self._total()])]

    def _total(self) -> list[Moments]:
        """Of all batches, of this or of all processes."""
        sets = Moments.unpacked(self._joined("moments", 3))
        step = 2 if self.modality == "cross-modal" else 1
        total = sets[:step]
        for start in range(step, len(sets), step):
            total = [old.plus(new) for old, new in zip(total, sets[start : start + step], strict=True)]
        return total

    def compute(self) -> Tensor | Results:
        """0-d fp64 tensor, or with ``level`` the entries of :class:`RSAInterval` by name."""
        self._check_ids()
        if self.streams:
            return self._streamed()
        student, teacher = self._kept("student", "teacher", minimum=3, max_samples=self.max_samples, parts=self._parts)
        if self._parts == 1:
            return self._scored(student, teacher, None)
        one, two = (Embeddings(*rows.chunk(2, dim=1)) for rows in (student, teacher))
        return self._scored(one, two, self.modality)

    def _scored(self, student: Tensor | Embeddings, teacher: Tensor | Embeddings, modality: str | None) -> Tensor | Results:
        kinds = {"dissimilarity": self.dissimilarity, "correlation": self.correlation}
        if self.level is None:
            return rsa(student, teacher, **kinds, modality=modality, method=self.method)
        options = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        return RSAResults(rsa_interval(student, teacher, **kinds, modality=modality, **options)._asdict())  # type: ignore[arg-type]

    def _streamed(self) -> Tensor:
        total = self._total()
        check_sample_count("rsa", round(float(total[0].weight)), 3)
        sums = total[0].between(total[1]) if len(total) == 2 else total[0].within()
        if not precise(sums):
            raise ValueError(
                "RSA: expected distances that spread by more than 0.3 % of their mean (of embeddings between 1e-69 and 1e69), got less. "
                "Rounding would show in the sums: pass keep_rows=True, and look for collapsed embeddings."
            )
        return sums.correlation()

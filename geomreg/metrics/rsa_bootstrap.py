"""Bootstrap interval of an RSA score over samples, without drawing a single distance anew.

A resample of N samples is a vector w of counts. Its pairs are those of distinct draws; a pair of two draws of *one* sample says
nothing (its distance is 0 in any model) and is left out, as rsatoolbox does. So a pair (i, j) of samples counts w_i w_j times, and all
sums that a Pearson correlation needs are forms w^T K w of the N x N matrices K of p, q, p^2, q^2 and p q: some matrix products, for all
resamples together. The distance from a sample's own image to its own text is a distance of one draw: it counts w_i times, not w_i^2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geomreg.metrics.rsa_moments import CLOSED, closed_sums, precise
from geomreg.metrics.rsa_pairs import Pairs, Sums
from geomreg.metrics.rsa_ranks import ranks

__all__ = ["RSAInterval", "interval_of"]

CLASSES = 1 << 14  # of ranks: more pairs than that are ranked in classes of equal size
DISTINCT = 3  # samples that a resample needs, as in rsatoolbox


class RSAInterval(NamedTuple):
    """An RSA score with its bootstrap percentile interval; 0-d fp64 tensors.

    Attributes:
        value: the score of all samples.
        low: lower end.
        high: upper end.
    """

    value: Tensor
    low: Tensor
    high: Tensor


def drawn(samples: int, resamples: int, seed: int) -> Tensor:
    """``(resamples, samples)``: how often each sample is drawn, as uint8."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.empty(resamples, samples, dtype=torch.uint8)
    for row in counts:
        row.copy_(torch.bincount(torch.randint(samples, (samples,), generator=generator), minlength=samples))
    return counts


def in_order(rows: Tensor) -> Tensor:
    """``(N,)``: the numbers of the rows of ``(N, W)`` by their first entry, equal ones by their second, and so on.

    Draws are of samples in this order, so that an interval depends on the samples, not on the batches or processes they came in.
    """
    place = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    order = place
    for column in rows.T:
        order = column.argsort(stable=True)
        order = order[place[order].argsort(stable=True)]
        new = (place[order].diff() != 0) | (column[order].diff() != 0)
        ranks_in_order = torch.cat([place.new_zeros(1), new.long().cumsum(0)])
        place = torch.empty_like(place).scatter_(0, order, ranks_in_order)
        if int(ranks_in_order[-1]) == len(rows) - 1:
            break
    return order


def interval_of(
    name: str, pairs: Pairs, value: Tensor, *, parts: int, spearman: bool, level: float, resamples: int, seed: int,
    closed: tuple[Tensor, Tensor, str] | None,
) -> RSAInterval:  # fmt: skip
    """``parts``: rows of a sample (image and text: 2); ``closed``: rows and dissimilarity, if every row is a sample."""
    samples = len(pairs.student.rows) // parts
    counts = drawn(samples, resamples, seed)
    enough = (counts > 0).sum(dim=1) >= DISTINCT
    counts = counts[enough].to(pairs.student.rows.device)
    if spearman:
        scores = _spearman(pairs, counts, parts)
    else:
        found = _closed(counts, *closed) if closed is not None and _cheaper(closed, samples) else None
        scores = _pearson(name, pairs, counts, parts) if found is None else found
    scores = scores[scores.isfinite()].clamp(-1, 1)
    if 2 * len(scores) < resamples:
        raise ValueError(
            f"{name}: expected most resamples to have a score, got {len(scores)} of {resamples}. Take more samples: a resample needs "
            "3 different ones with distances that differ."
        )
    tail = (1 - level) / 2
    low, high = torch.quantile(scores, scores.new_tensor([tail, 1 - tail]))
    return RSAInterval(value, low, high)


def _own(pairs: Pairs, parts: int) -> tuple[Tensor, Tensor] | None:
    """Distances from each sample's image to its own text, where there are any."""
    if parts == 1:
        return None
    image = torch.arange(len(pairs.student.rows) // 2, device=pairs.student.rows.device)
    return pairs.student.between(image, image + len(image)), pairs.teacher.between(image, image + len(image))


def _correlations(pairs: Pairs, counts: Tensor, parts: int, sums: Tensor, shift: Sums) -> Tensor:
    """From ``(5, resamples)`` sums of p, q, p^2, q^2, p q with w_i w_j, p and q less their ``shift``."""
    w = counts.double()
    total, square = w.sum(dim=1), w.square().sum(dim=1)
    n = total.square() if pairs.cross else ((parts * total).square() - parts * square) / 2
    own = _own(pairs, parts)
    if own is not None:
        repeated = w.square() - w
        p, q = own[0] - shift.mean_p, own[1] - shift.mean_q
        n = n - repeated.sum(dim=1)
        sums = sums - torch.stack([repeated @ value for value in (p, q, p * p, q * q, p * q)])
    p, q, pp, qq, pq = sums
    variances = pp - p * p / n, qq - q * q / n
    scores: Tensor = (pq - p * q / n) / (variances[0].clamp(min=0) * variances[1].clamp(min=0)).sqrt()
    equal = (variances[0] <= 1e-12 * pp) | (variances[1] <= 1e-12 * qq)
    return scores.where(~equal, torch.nan)


def _pearson(name: str, pairs: Pairs, counts: Tensor, parts: int) -> Tensor:
    shift = pairs.sums(name)
    sums = torch.zeros(5, len(counts), dtype=torch.float64, device=counts.device)
    samples = counts.shape[1]
    for left, right in pairs.slices():
        p, q = pairs.student.tile(left, right).sub_(shift.mean_p), pairs.teacher.tile(left, right).sub_(shift.mean_q)
        if left == right:
            p, q = (value.triu_(1) for value in (p, q))
        one, two = (_columns(counts, rows, samples) for rows in (left, right))
        for k, kernel in enumerate((p, q, p * p, q * q, p * q)):
            sums[k] += ((one @ kernel) * two).sum(dim=1)
    return _correlations(pairs, counts, parts, sums, shift)


def _columns(counts: Tensor, rows: slice, samples: int) -> Tensor:
    """Counts of the samples that some rows belong to."""
    return counts.index_select(1, torch.arange(rows.start, rows.stop, device=counts.device) % samples).double()


def _cheaper(closed: tuple[Tensor, Tensor, str], samples: int) -> bool:
    """Sums over samples, 2 N (D^2 + D E + E^2) operations a resample, or five products over half the pairs."""
    d, e = closed[0].shape[1], closed[1].shape[1]
    return closed[2] in CLOSED and 2 * (d * d + d * e + e * e) < 5 * samples


def _closed(counts: Tensor, student: Tensor, teacher: Tensor, dissimilarity: str) -> Tensor | None:
    """None where rounding would show."""
    found = []
    for row in counts:
        there = row.nonzero()[:, 0]
        weights = row[there].double()
        sums = closed_sums("rsa_interval", student[there], teacher[there], dissimilarity, cross=False, weights=weights)
        if not precise(sums):
            return None
        found.append(sums.correlation())
    return torch.stack(found)


def _spearman(pairs: Pairs, counts: Tensor, parts: int) -> Tensor:
    """Weighted mid-ranks: each pair as often as it is drawn."""
    classes = []
    for values in pairs.gathered():
        place = (ranks(values) * 2).long()  # mean ranks are halves of whole numbers
        few = len(place) <= CLASSES
        classes.append(torch.unique(place, return_inverse=True)[1] if few else place * CLASSES // (2 * len(place) + 1))
    own = _own_pairs(pairs) if parts > 1 else None
    found = []
    for row in counts:
        w = row.double()
        weight = _weights(pairs, w.repeat(parts))
        if own is not None:
            weight[own[0]] = w[own[1]]
        found.append(_weighted_spearman(classes, weight))
    return torch.stack(found)


def _weighted_spearman(classes: list[Tensor], weight: Tensor) -> Tensor:
    middle, variances = [], []
    for one in classes:
        total = weight.new_zeros(CLASSES).scatter_add_(0, one, weight)
        rank = total.cumsum(dim=0) - total / 2 - total.sum() / 2
        variances.append(torch.dot(total, rank.square()))
        middle.append(rank.index_select(0, one))
    return torch.dot(middle[0].mul_(weight), middle[1]) / (variances[0] * variances[1]).sqrt()


def _weights(pairs: Pairs, w: Tensor) -> Tensor:
    """w_i w_j of every pair of rows, in the order of :meth:`Pairs.gathered`."""
    found = []
    for left, right in pairs.slices():
        tile = torch.outer(w[left], w[right])
        found.append(tile[torch.ones_like(tile, dtype=torch.bool).triu_(1)] if left == right else tile.reshape(-1))
    return torch.cat(found)


def _own_pairs(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Where in that order the pairs of a sample's own image and text are, and of which sample."""
    places, samples, at = [], [], 0
    device, half = pairs.student.rows.device, len(pairs.student.rows) // 2
    for left, right in pairs.slices():
        i, j = (torch.arange(rows.start, rows.stop, device=device) for rows in (left, right))
        own = j - i[:, None] == half
        kept = own[torch.ones_like(own).triu_(1)] if left == right else own.reshape(-1)
        places.append(at + kept.nonzero()[:, 0])
        samples.append(i[own.nonzero()[:, 0]])
        at += len(kept)
    return torch.cat(places), torch.cat(samples)

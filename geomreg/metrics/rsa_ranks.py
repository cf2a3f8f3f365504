"""Spearman correlation of the dissimilarities: exact by sorting, or from histograms with a proved bound on the error.

The bound. Let R be the mid-ranks of all n student dissimilarities, less their mean, as a vector; S those of the teacher. Every pair falls
into a bin, and bins are ordered as the values are. Let r give each pair the mid-rank of its bin, s likewise for the teacher; both are known
from the two histograms. What is returned is rho', which is cos(r, s) but for an error of which 4. speaks.

1. *Ties included, the part of R that r misses is orthogonal to r and bounded.* Equal values share a bin, so the mid-ranks in a bin of h
   pairs have the bin's mid-rank as their mean: (R - r) is orthogonal to r, which is constant there. Its square sums to at most
   (h^3 - h) / 12 in that bin: h different ranks attain it, and to replace tied ones by their mean is a projection, which only shortens.
   A bin of one value (its least and largest differ by rounding alone, as one more pass may find) adds 0. So the angle of R and r is at
   most theta = arctan sqrt(sum of these / |r|^2).
2. *Ties by rounding.* Values that are equal in exact arithmetic may be rounded to both sides of an edge. The true mid-ranks are then a
   projection of those above, which merges groups at edges. All of their T members lie within rounding (``ROUNDING``) of an edge; they are
   counted. The merging moves R by at most sqrt((T^3 - T) / 12), so by an angle of at most tau = arcsin(that / |r|).
3. Angles between vectors obey the triangle inequality: the angle of R and S, whose cosine is the Spearman correlation rho, differs from
   that of r and s by at most all four angles together.
4. *One pass.* cos(r, s) needs the sum of r s over all pairs, and r and s are known after the pass. During it there are guesses f and g of
   them, from a sample of the pairs, and sums of g in each bin of the student and of f in each bin of the teacher. Of
   <r, s> = <r, g> + <f, s> - <f, g> + <r - f, s - g> the first three follow from these sums. The last is at most |r - f| |s - g|, which
   is known after the pass too: if both guesses are off by a thousandth, it is a millionth.

Hence |rho - rho'| <= the largest change of the cosine over the range of angles that 3. and 4. leave.

Nothing is assumed about the distribution of the distances; where bins are too wide for it the bound says so.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geomreg.checks import check_distances_differ
from geomreg.metrics.rsa_pairs import Pairs

__all__ = ["BoundedRSA", "by_histogram", "ranks"]

ROUNDING = 1e-11  # relative error of a dissimilarity: see NEAR in rsa_pairs
SAMPLE = 1 << 19  # pairs that choose the range of the bins and guess the ranks
TIGHT = 1e-4  # a larger bound is worth one more pass, for bins of one value


class BoundedRSA(NamedTuple):
    """An RSA score and a proved bound on its error; 0-d fp64 tensors.

    Attributes:
        value: the score.
        bound: |value - exact| is at most this; 0 from a method without approximation.
    """

    value: Tensor
    bound: Tensor


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, the mean rank for ties; values that differ by rounding alone are ties, zero distances included."""
    order = torch.from_numpy(np.argsort(values.numpy())) if values.device.type == "cpu" else values.argsort()  # numpy's is faster
    ordered = values.index_select(0, order)
    step = ordered.diff() > ROUNDING * ordered[1:].abs()  # wider, and chance would tie some of many pairs
    del ordered
    group = torch.cat([step.new_zeros(1, dtype=torch.int32), step.cumsum(dim=0, dtype=torch.int32)])
    counts = torch.bincount(group).double()
    mean_rank = counts.cumsum(dim=0).sub_(counts.sub_(1).div_(2))
    return torch.empty_like(values).scatter_(0, order, mean_rank.index_select(0, group))


class Bins(NamedTuple):
    """Equal bins from ``low`` to ``high``; what lies outside is in the outermost."""

    low: float
    scale: float
    number: int
    rounding: float

    @classmethod
    def of(cls, low: float, high: float, number: int) -> "Bins":
        scale = (number - 2 - 0.6180339887) / (high - low)  # not round: levels at equal steps, tied pairs of a grid, keep off the edges
        return cls(low, scale, number, ROUNDING * scale * max(abs(low), abs(high)))

    def positions(self, values: Tensor) -> Tensor:
        """In bins; both ends, and what is beyond, away from edges. Monotone, also as rounded."""
        return values.sub(self.low).mul_(self.scale).add_(0.5).clamp_(0.5, self.number - 1.5)

    def at_edges(self, positions: Tensor) -> Tensor:
        """How many lie within rounding of an edge."""
        return (positions.frac().sub_(0.5).abs_() >= 0.5 - self.rounding).sum()


def by_histogram(name: str, pairs: Pairs, bins: int) -> BoundedRSA:
    """Spearman correlation of the pairs' dissimilarities in one pass over them, or two; memory for the histograms alone."""
    chosen, guesses = _guessed(name, pairs, bins)
    counts = torch.zeros(2, bins, dtype=torch.int64, device=pairs.student.rows.device)
    edges, sums = counts.new_zeros(2), torch.zeros_like(counts, dtype=torch.float64)
    ones = counts.new_ones(0)
    for values in pairs.tiles():
        if len(values[0]) > len(ones):
            ones = counts.new_ones(len(values[0]))
        places = []
        for k, value in enumerate(values):
            positions = chosen[k].positions(value)
            places.append(positions.long())
            edges[k] += chosen[k].at_edges(positions)
            counts[k].scatter_add_(0, places[k], ones[: len(value)])
        for k in range(2):
            sums[k].scatter_add_(0, places[k], guesses[1 - k].index_select(0, places[1 - k]))
    ranks = [_middle_ranks(count) for count in counts]
    squares = [torch.dot(count.double(), rank.square()) for count, rank in zip(counts, ranks, strict=True)]
    product = torch.dot(ranks[0], sums[0]) + torch.dot(ranks[1], sums[1]) - torch.dot(guesses[0], sums[0])
    norm = squares[0].sqrt() * squares[1].sqrt()
    value = (product / norm).clamp(-1, 1)
    misses = [torch.dot(count.double(), (rank - guess).square()) for count, rank, guess in zip(counts, ranks, guesses, strict=True)]
    error = float(misses[0].sqrt() * misses[1].sqrt() / norm) + 1e-12  # of the sums

    def bound(wide: Tensor) -> float:
        """``wide``: counts of bins that may hold different values."""
        angle = sum(
            math.atan2(math.sqrt(_untied(wide[k])), float(squares[k].sqrt()))
            + math.asin(min(1.0, math.sqrt(_untied(edges[k]) / float(squares[k]))))
            for k in range(2)
        )
        least, most = (math.acos(max(-1.0, min(1.0, float(value) + change))) for change in (error, -error))
        ends = math.cos(max(0.0, least - angle)), math.cos(min(math.pi, most + angle))
        return max(abs(end - float(value)) for end in ends)

    found = bound(counts)
    if found > TIGHT:
        found = min(found, bound(counts.where(_wide(pairs, chosen, counts), 0)))
    return BoundedRSA(value, value.new_tensor(found))


def _untied(counts: Tensor) -> float:
    """Sum of squares of as many different ranks about their mean, over all counts."""
    h = counts.double()
    return float((h.pow(3) - h).sum()) / 12


def _middle_ranks(counts: Tensor) -> Tensor:
    """Mean rank of each bin, less the mean of all."""
    h = counts.double()
    return h.cumsum(dim=0) - (h - 1) / 2 - (h.sum() + 1) / 2


def _wide(pairs: Pairs, chosen: list[Bins], counts: Tensor) -> Tensor:
    """Which bins hold more than one value."""
    shape = counts.shape
    low = torch.full(shape, torch.inf, dtype=torch.float64, device=counts.device)
    high = torch.full(shape, -torch.inf, dtype=torch.float64, device=counts.device)
    for values in pairs.tiles():
        for k, value in enumerate(values):
            bins = chosen[k].positions(value).long()
            low[k].scatter_reduce_(0, bins, value, "amin")
            high[k].scatter_reduce_(0, bins, value, "amax")
    return high - low > ROUNDING * high


def _guessed(name: str, pairs: Pairs, number: int) -> tuple[list[Bins], list[Tensor]]:
    """Bins for both spaces and the mean rank of each, as a sample of the pairs (or all of them, if they are few) has it.

    Bins go from end to end, or less a tail of far outliers that leaves few bins to the rest. Any choice is valid: the histograms are of
    all pairs, and the bound is computed from them.
    """
    few = pairs.number <= SAMPLE
    found, guesses = [], []
    for k, parts in enumerate(zip(*(pairs.tiles() if few else pairs.sampled(SAMPLE)), strict=True)):
        ordered = torch.cat(parts).sort().values
        low, high = float(ordered[0]), float(ordered[-1])
        if high - low <= 1e-12 * high:  # rare: look at all
            least, most = torch.stack([torch.stack(tile[k].aminmax()) for tile in pairs.tiles()]).T
            check_distances_differ(name, least.min(), most.max(), pairs.number)
            candidates = [Bins.of(float(least.min()), float(most.max()), number)]
        else:
            tails = (float(ordered[-1 - int(tail * len(ordered))]) for tail in (0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2))
            candidates = [Bins.of(low, one, number) for one in tails if one - low > 1e-12 * one]
        counts = [torch.bincount(one.positions(ordered).long(), minlength=number) for one in candidates]
        best = min(range(len(counts)), key=lambda j: _untied(counts[j]))
        found.append(candidates[best])
        guesses.append(_middle_ranks(counts[best]) * (pairs.number / len(ordered)))
    return found, guesses

"""Dissimilarities of all pairs, tile by tile in fp64: O(N D) memory, and accurate for neighbours that nearly coincide."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_distances_differ
from geomreg.metrics.tiles import squared_distances

__all__ = ["Pairs", "Space", "Sums", "directions"]

TILE = 512  # rows; a tile and its temporaries stay in cache
PATCH = 64  # rows of a tile of a sample


class Sums(NamedTuple):
    """Central sums over pairs of the student's (p) and the teacher's (q) dissimilarities; 0-d fp64 tensors."""

    number: Tensor
    mean_p: Tensor
    mean_q: Tensor
    pp: Tensor
    qq: Tensor
    pq: Tensor

    def plus(self, other: "Sums") -> "Sums":
        """Of both sets of pairs (Chan, Golub, LeVeque 1979): no difference of large sums."""
        number = self.number + other.number
        p, q = other.mean_p - self.mean_p, other.mean_q - self.mean_q
        share, weight = other.number / number, self.number * other.number / number
        return Sums(
            number,
            self.mean_p + share * p,
            self.mean_q + share * q,
            self.pp + other.pp + weight * p * p,
            self.qq + other.qq + weight * q * q,
            self.pq + other.pq + weight * p * q,
        )

    def correlation(self) -> Tensor:
        """Pearson."""
        return (self.pq / (self.pp.sqrt() * self.qq.sqrt())).clamp(-1, 1)


class Space(NamedTuple):
    """The rows of one model, as points whose (squared) Euclidean distances are the dissimilarities up to a factor."""

    rows: Tensor
    mean: Tensor
    root: bool

    @classmethod
    def of(cls, name: str, embeddings: Tensor, dissimilarity: str) -> "Space":
        rows = directions(name, embeddings, dissimilarity)
        exponent = math.frexp(float(rows.abs().max()))[1]
        rows = rows * math.ldexp(1.0, -max(exponent, -1000))  # squares neither overflow nor vanish; a power of two rounds nothing
        return cls(rows, rows.mean(dim=0), dissimilarity == "euclidean")

    def chosen(self, left: Tensor, right: Tensor) -> Tensor:
        """``(l, r)`` dissimilarities of rows to other rows, for a sample: near ones are not renewed."""
        x, y = (self.rows[rows.to(self.rows.device)] - self.mean for rows in (left, right))
        values = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
        return values if self.root else values.square_()

    def tile(self, left: slice, right: slice) -> Tensor:
        """``(l, r)`` dissimilarities of some rows to others; 0 of a row to itself."""
        own = torch.arange(left.stop - left.start, device=self.rows.device) if left == right else None
        values = squared_distances(self.rows[left], self.rows[right], centre=self.mean, own=own)
        return values.sqrt_() if self.root else values

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """``(n,)`` dissimilarities of rows ``left`` to rows ``right``, one by one."""
        values = (self.rows[left] - self.rows[right]).square().sum(dim=1)
        return values.sqrt() if self.root else values


def directions(name: str, embeddings: Tensor, dissimilarity: str) -> Tensor:
    """Rows in fp64 whose squared distances are the dissimilarities: unit vectors for cosine and, less their means, for correlation."""
    x = embeddings.detach().double()
    if dissimilarity not in ("cosine", "correlation"):
        return x
    size = x.abs().amax(dim=1, keepdim=True)
    ordinary = (size == 0) | ((size > 1e-100) & (size < 1e100))
    x, size = x / size.where(~ordinary, 1), size.where(ordinary, 1)  # squares neither overflow nor vanish
    if dissimilarity == "correlation":
        x = x - x.mean(dim=1, keepdim=True)
        x = x - x.mean(dim=1, keepdim=True)  # what rounding left of a mean that is large beside the rest
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if bool((norms <= 1e-12 * size).any()):
        raise ValueError(
            f'{name}: expected vectors with a direction for "{dissimilarity}", got a zero or constant one. '
            'Drop that sample or use "euclidean".'
        )
    unit: Tensor = x / norms
    return unit


class Pairs(NamedTuple):
    """All pairs of distinct rows, or (``cross``) all N x N pairs of an image and a text: first half of the rows to second half."""

    student: Space
    teacher: Space
    cross: bool

    @property
    def number(self) -> int:
        rows = len(self.student.rows)
        return (rows // 2) ** 2 if self.cross else rows * (rows - 1) // 2

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Row ranges of every tile; equal ones stand for their upper triangle."""
        rows = len(self.student.rows)
        half = rows // 2
        for start in range(0, half if self.cross else rows, TILE):
            left = slice(start, min(start + TILE, half if self.cross else rows))
            for other in range(half if self.cross else start, rows, TILE):
                yield left, slice(other, min(other + TILE, rows))

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Flat dissimilarities of student and teacher, each pair once."""
        for left, right in self.slices():
            p, q = self.student.tile(left, right), self.teacher.tile(left, right)
            if left == right:
                upper = torch.ones_like(p, dtype=torch.bool).triu(1)
                p, q = p[upper], q[upper]
            if p.numel():
                yield p.reshape(-1), q.reshape(-1)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """All of them at once: 16 bytes a pair."""
        one, two = (self.student.rows.new_empty(self.number) for _ in range(2))
        at = 0
        for p, q in self.tiles():
            one[at : at + len(p)], two[at : at + len(q)] = p, q
            at += len(p)
        return one, two

    def sampled(self, least: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles of about ``least`` random pairs in which every row takes part alike, which tells more than as many pairs of a few rows."""
        rows = len(self.student.rows)
        half = rows // 2
        generator = torch.Generator().manual_seed(0)
        found = 0
        while found < least:
            order = torch.randperm(half if self.cross else rows, generator=generator)
            other = half + torch.randperm(half, generator=generator) if self.cross else order[half : 2 * half]
            for left, right in zip(torch.split(order[:half], PATCH), torch.split(other, PATCH), strict=True):
                p, q = (space.chosen(left, right) for space in (self.student, self.teacher))
                yield p.reshape(-1), q.reshape(-1)
                found += p.numel()

    def sums(self, name: str) -> Sums:
        """Central sums over all pairs; raises if the dissimilarities of a space are all equal."""
        total: Sums | None = None
        ends = [[torch.inf, -torch.inf], [torch.inf, -torch.inf]]
        for values in self.tiles():
            means, deviations = [], []
            for end, value in zip(ends, values, strict=True):
                end[0], end[1] = min(end[0], float(value.min())), max(end[1], float(value.max()))
                means.append(value.mean())
                deviations.append(value - means[-1])
            p, q = deviations
            number = p.new_tensor(float(len(p)))
            found = Sums(number, means[0], means[1], torch.dot(p, p), torch.dot(q, q), torch.dot(p, q))
            total = found if total is None else total.plus(found)
        least, most = torch.tensor(ends, dtype=torch.float64).T
        check_distances_differ(name, least, most, self.number)
        assert total is not None  # for the type checker: there are pairs
        return total

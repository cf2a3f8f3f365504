"""Pearson RSA of squared distances without pairs: from sums over samples, in O(N D^2) time and O(D^2) memory.

For points x_i (student) and y_i (teacher) with weights w_i, each centred at its weighted mean, a_i = |x_i|^2, b_i = |y_i|^2,
W = sum w, d_ij = |x_i - x_j|^2 = a_i + a_j - 2 x_i.x_j, and d'_ij likewise:

    sum_ij w_i w_j d_ij        = 2 W A                            A = sum w a,  B = sum w b
    sum_ij w_i w_j d_ij d'_ij  = 2 W Q + 2 A B + 4 |M|_F^2        Q = sum w a b,  M = sum w x y^T  (D x E)

(the other terms carry sum w x = 0). A sample has no distance to itself, so over the n = W^2 - sum w^2 pairs of distinct samples

    covariance sum = 2 W (Q - A B / W) + 4 |M|_F^2 - 4 A B (sum w^2) / n.

Between two sets (images x_i, texts t_j, all N x N pairs), each centred by itself, with the vector g from the texts' mean to the images',
d_ij = (|x_i|^2 + 2 g.x_i) + (|t_j|^2 - 2 g.t_j) + |g|^2 - 2 x_i.t_j is a row effect, a column effect and an interaction, which are
uncorrelated over the grid:

    covariance sum = W (C_images + C_texts) + 4 <sum w x x'^T, sum w t t'^T>_F,   C: covariance sum of the effects.

Cosine and correlation dissimilarity are half the squared distance of unit vectors. The sums are those of points near their mean, so a
common offset costs no digits. What costs digits is a spread of the distances that is small beside their mean: the relative error is a
small multiple of 2^-53 (1 + (mean / spread)^2). Beyond ``LIMIT`` the result is not used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geomreg.metrics.rsa_pairs import Sums, directions

__all__ = ["CLOSED", "Moments", "closed_sums", "precise"]

CLOSED = ("sqeuclidean", "cosine", "correlation")
LIMIT = 1e5  # of 1 + (mean / spread)^2: distances that spread by 0.3 % of their mean; 11 digits are left
TINY = 1e-280  # nearer to the smallest fp64 number its digits go
CHUNK = 2048  # rows in fp64 at a time


class Moments(NamedTuple):
    """Sums over samples about their mean; the mean is ``origin + mean``, which keeps the digits of a small cloud far from zero."""

    weight: Tensor
    square_weight: Tensor
    origin_x: Tensor
    origin_y: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    a: Tensor
    b: Tensor
    aa: Tensor
    ab: Tensor
    bb: Tensor
    ax: Tensor
    ay: Tensor
    bx: Tensor
    by: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: Tensor | None = None) -> "Moments":
        """Of fp64 rows ``(N, D)`` and ``(N, E)``."""
        w = x.new_ones(len(x)) if weights is None else weights
        total = w.sum()
        origins, means, centred, weighted = [], [], [], []
        for rows in (x, y):
            origins.append(w @ rows / total)
            rows = rows - origins[-1]
            means.append(w @ rows / total)  # what rounding left of it
            centred.append(rows - means[-1])
            weighted.append(centred[-1] if weights is None else centred[-1] * w[:, None])
        (x, y), (wx, wy) = centred, weighted
        a, b = x.square().sum(dim=1), y.square().sum(dim=1)
        wa, wb = a * w, b * w
        matrices = [wx.T @ x, wx.T @ y, wy.T @ y]
        sums = [wa.sum(), wb.sum(), wa @ a, wa @ b, wb @ b, a @ wx, a @ wy, b @ wx, b @ wy]
        return cls(*[total, w.square().sum(), *origins, *means, *matrices, *sums])

    @classmethod
    def of_rows(cls, name: str, student: Tensor, teacher: Tensor, dissimilarity: str, weights: Tensor | None = None) -> "Moments":
        """Of embeddings as they come, some rows at a time."""
        total: Moments | None = None
        for start in range(0, len(student), CHUNK):
            x, y = (directions(name, value[start : start + CHUNK], dissimilarity) for value in (student, teacher))
            w = None if weights is None else weights[start : start + CHUNK]
            if w is None or bool(w.any()):
                total = cls.of(x, y, w) if total is None else total.plus(cls.of(x, y, w))
        assert total is not None  # for the type checker: there are rows
        return total

    def plus(self, other: "Moments") -> "Moments":
        """Of both sets of samples."""
        total = self.weight + other.weight
        shift_x = (other.origin_x - self.origin_x) + other.mean_x - self.mean_x
        shift_y = (other.origin_y - self.origin_y) + other.mean_y - self.mean_y
        share = other.weight / total
        one = self._moved(-share * shift_x, -share * shift_y)
        two = other._moved((1 - share) * shift_x, (1 - share) * shift_y)
        added = [p + q for p, q in zip(one[6:], two[6:], strict=True)]
        means = self.mean_x + share * shift_x, self.mean_y + share * shift_y
        return Moments(total, self.square_weight + other.square_weight, self.origin_x, self.origin_y, *means, *added)

    def _moved(self, u: Tensor, v: Tensor) -> "Moments":
        """About the points ``mean - u`` and ``mean - v``: x becomes x + u, y becomes y + v."""
        w, uu, vv = self.weight, u @ u, v @ v
        return self._replace(
            xx=self.xx + w * torch.outer(u, u),
            xy=self.xy + w * torch.outer(u, v),
            yy=self.yy + w * torch.outer(v, v),
            a=self.a + w * uu,
            b=self.b + w * vv,
            aa=self.aa + 4 * (u @ self.ax) + 2 * uu * self.a + 4 * (u @ self.xx @ u) + w * uu * uu,
            ab=self.ab + 2 * (v @ self.ay + u @ self.bx) + vv * self.a + uu * self.b + 4 * (u @ self.xy @ v) + w * uu * vv,
            bb=self.bb + 4 * (v @ self.by) + 2 * vv * self.b + 4 * (v @ self.yy @ v) + w * vv * vv,
            ax=self.ax + self.a * u + 2 * (self.xx @ u) + w * uu * u,
            ay=self.ay + self.a * v + 2 * (u @ self.xy) + w * uu * v,
            bx=self.bx + self.b * u + 2 * (self.xy @ v) + w * vv * u,
            by=self.by + self.b * v + 2 * (self.yy @ v) + w * vv * v,
        )

    def within(self) -> Sums:
        """Over the pairs of distinct samples, each in both orders."""
        w, n = self.weight, self.weight.square() - self.square_weight
        values = []
        for one, two, product, matrix in (
            (self.a, self.a, self.aa, self.xx), (self.b, self.b, self.bb, self.yy), (self.a, self.b, self.ab, self.xy)
        ):  # fmt: skip
            values.append(2 * w * (product - one * two / w) + 4 * matrix.square().sum() - 4 * one * two * self.square_weight / n)
        return Sums(n, 2 * w * self.a / n, 2 * w * self.b / n, *values)

    def between(self, other: "Moments") -> Sums:
        """Over all pairs of a sample of this set and one of ``other``, which has the same samples and weights."""
        w = self.weight
        u = (self.origin_x - other.origin_x) + self.mean_x - other.mean_x
        v = (self.origin_y - other.origin_y) + self.mean_y - other.mean_y
        values = w * (self._effects(u, v) + other._effects(-u, -v))
        inner = [(getattr(self, field) * getattr(other, field)).sum() for field in ("xx", "yy", "xy")]
        pp, qq, pq = values + 4 * torch.stack(inner)
        return Sums(w * w, (self.a + other.a) / w + u @ u, (self.b + other.b) / w + v @ v, pp, qq, pq)

    def _effects(self, u: Tensor, v: Tensor) -> Tensor:
        """Covariance sums of a_i + 2 u.x_i and b_i + 2 v.y_i: first, second, mixed."""
        w = self.weight
        aa = self.aa - self.a * self.a / w + 4 * (u @ self.ax) + 4 * (u @ self.xx @ u)
        bb = self.bb - self.b * self.b / w + 4 * (v @ self.by) + 4 * (v @ self.yy @ v)
        ab = self.ab - self.a * self.b / w + 2 * (v @ self.ay + u @ self.bx) + 4 * (u @ self.xy @ v)
        return torch.stack([aa, bb, ab])

    def packed(self) -> Tensor:
        """One vector that begins with D and E."""
        widths = self.weight.new_tensor([self.xy.shape[0], self.xy.shape[1]])
        return torch.cat([widths, *(value.reshape(-1) for value in self)])

    @classmethod
    def unpacked(cls, values: Tensor) -> list["Moments"]:
        """Of any number of packed ones in a row."""
        d, e = int(values[0]), int(values[1])
        shapes = [(), (), (d,), (e,), (d,), (e,), (d, d), (d, e), (e, e), (), (), (), (), (), (d,), (e,), (d,), (e,)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        parts = torch.split(values.reshape(-1, 2 + sum(sizes))[:, 2:], sizes, dim=1)
        return [cls(*(part[k].reshape(shape) for part, shape in zip(parts, shapes, strict=True))) for k in range(len(parts[0]))]


def closed_sums(name: str, student: Tensor, teacher: Tensor, dissimilarity: str, *, cross: bool, weights: Tensor | None = None) -> Sums:
    """Sums over the pairs of rows; ``cross``: of the first half of the rows to the second."""
    half = len(student) // 2
    parts = (slice(0, half), slice(half, None)) if cross else (slice(None),)
    found = [Moments.of_rows(name, student[part], teacher[part], dissimilarity, weights) for part in parts]
    return found[0].between(found[1]) if cross else found[0].within()


def precise(sums: Sums) -> bool:
    """Whether rounding, overflow and underflow have left enough of the variances."""
    terms = ((sums.mean_p, sums.pp), (sums.mean_q, sums.qq))
    return all(
        bool(torch.isfinite(variance * LIMIT)) and bool(variance > TINY) and bool(variance * LIMIT >= variance + sums.number * mean * mean)
        for mean, variance in terms
    )

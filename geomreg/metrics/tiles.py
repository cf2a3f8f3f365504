"""Pairs of many samples, a tile of the pair matrix at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["ROWS", "pair_distances", "row_blocks", "squared_distances"]

ROWS = 512  # rows and columns of a tile: 2 MB in fp64, which stays in cache
NEAR = 1e-3  # of the squared norms: nearer pairs are computed from differences of vectors, which keeps 12 digits of all others
ROUNDING = 1e-30  # of the squared norms: nearer pairs differ in the last digits alone
CHUNK = 4096  # near pairs gathered at a time


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of at most :data:`ROWS` rows."""
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def squared_distances(one: Tensor, two: Tensor, *, centre: Tensor | None = None, own: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances ``(N, M)`` of fp64 rows, each to about 12 digits, however small; 0 of rows that rounding separates.

    By inner products, which is fast but takes differences of large numbers; pairs so close that this costs digits are computed again from
    differences of vectors, several times slower.

    Args:
        one: ``(N, D)``.
        two: ``(M, D)``.
        centre: ``(D,)``, subtracted from all rows for the products alone: the nearer it is to them, the fewer pairs are computed again.
        own: ``(N,)`` columns: the row itself, at a distance of 0.
    """
    x, y = (one, two) if centre is None else (one - centre, two - centre)
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    squares = torch.addmm(b, x, y.T, alpha=-2).add_(a[:, None])
    if own is not None:
        squares.scatter_(1, own[:, None], torch.inf)
    if bool(squares.min() < NEAR * (a.max() + b.max())):
        _renew_near(squares, squares < NEAR * (a[:, None] + b), one, two)
    if own is not None:
        squares.scatter_(1, own[:, None], 0)
    return squares


def _renew_near(squares: Tensor, near: Tensor, x: Tensor, y: Tensor) -> None:
    """From differences of the rows as they come: to subtract a centre rounds them."""
    norms = x.square().sum(dim=1), y.square().sum(dim=1)
    if int(near.sum()) > near.numel() // 8:
        exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
        exact = torch.where(exact > ROUNDING * (norms[0][:, None] + norms[1]), exact, 0)
        torch.where(near, exact, squares, out=squares)
        return
    rows, columns = near.nonzero(as_tuple=True)
    for start in range(0, len(rows), CHUNK):
        i, j = rows[start : start + CHUNK], columns[start : start + CHUNK]
        exact = (x[i] - y[j]).square().sum(dim=1)
        squares[i, j] = torch.where(exact > ROUNDING * (norms[0][i] + norms[1][j]), exact, 0)


def pair_distances(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """For one tile of pairs of distinct rows after the other (each pair once), the squared distances ``(P,)`` in each of ``values``."""
    for rows in row_blocks(len(values[0])):
        for columns in row_blocks(len(values[0])):
            if columns.start < rows.start or (rows == columns and rows.stop - rows.start == 1):
                continue
            own = torch.arange(rows.stop - rows.start, device=values[0].device) if rows == columns else None
            squares = [squared_distances(value[rows], value[columns], own=own) for value in values]
            if rows == columns:
                one, two = torch.triu_indices(len(squares[0]), len(squares[0]), offset=1, device=squares[0].device)
                yield [square[one, two] for square in squares]
            else:
                yield [square.flatten() for square in squares]

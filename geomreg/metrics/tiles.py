"""Pairs of many samples, a tile of the pair matrix at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from geomreg.checks import check_max_samples, check_updated

__all__ = ["ROWS", "collected_rows", "pair_distances", "row_blocks", "squared_distances"]

ROWS = 512  # rows and columns of a tile: 2 MB in fp64


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of at most :data:`ROWS` rows."""
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def squared_distances(one: Tensor, two: Tensor, *, itself: bool = False) -> Tensor:
    """Squared Euclidean distances ``(N, M)`` of fp64 rows, to about 12 digits even of points that nearly coincide.

    By inner products, which is fast but takes differences of large numbers; a tile with two points so close that this costs digits is
    computed again, several times slower, from differences of vectors. Rows should be centred. ``itself``: ``two`` is ``one``, and the
    diagonal, which is 0 but for rounding, is of no interest.
    """
    norms = one.square().sum(dim=1)[:, None] + two.square().sum(dim=1)
    squares = torch.addmm(norms, one, two.T, alpha=-2)
    near = squares < 1e-3 * norms
    if itself:
        near.fill_diagonal_(False)
    if bool(near.any()):
        squares = torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares.clamp(min=0)


def pair_distances(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """For one tile of pairs of distinct rows after the other (each pair once), the squared distances ``(P,)`` in each of ``values``."""
    for rows in row_blocks(len(values[0])):
        for columns in row_blocks(len(values[0])):
            if columns.start < rows.start or (rows == columns and rows.stop - rows.start == 1):
                continue
            squares = [squared_distances(value[rows], value[columns], itself=rows == columns) for value in values]
            if rows == columns:
                one, two = torch.triu_indices(len(squares[0]), len(squares[0]), offset=1, device=squares[0].device)
                yield [square[one, two] for square in squares]
            else:
                yield [square.flatten() for square in squares]


def collected_rows(name: str, states: tuple[object, ...], minimum: int, max_samples: int) -> tuple[Tensor, ...]:
    """The rows that a metric collected, of this or of all processes, checked against ``max_samples``."""
    values = [torch.cat(state) if isinstance(state, list) and state else state for state in states]
    rows = tuple(value for value in values if isinstance(value, Tensor))
    if len(rows) < len(states):
        check_updated(name, 0, minimum)
    check_max_samples(name, max(len(value) for value in rows), max_samples)
    return rows

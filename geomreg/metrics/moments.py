"""Central moments of rows that come in batches and from several processes: what the metrics without pairs are made of."""

import math
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from geomreg.checks import check_next_widths, check_updated

__all__ = ["Moments", "collected"]

ENTRIES = 2**22  # numbers of a block of rows that are in fp64 at a time: 32 MB


class Moments(NamedTuple):
    """Moments of the rows ``z_i = (x_i, y_i, ...)`` about their mean, in fp64; sums, not means.

    With ``q_ik`` the squared norm of block k of the centred row i. The order of batches and processes changes rounding alone, and a
    large common offset costs no digits: every batch is centred on its own mean, then moved (Chan, Golub and LeVeque 1983, here also
    for the moments of third and fourth order).

    Attributes:
        widths: width of each block.
        rows: 0-d, number of rows.
        mean: ``(W,)``, W the sum of widths.
        scatter: ``(W, W)``, sum of z z^T.
        cubic: ``(K, W)``, sum of q_k z.
        quartic: ``(K, K)``, sum of q_k q_l.
    """

    widths: tuple[int, ...]
    rows: Tensor
    mean: Tensor
    scatter: Tensor
    cubic: Tensor
    quartic: Tensor

    @staticmethod
    def of(*blocks: Tensor) -> "Moments":
        """Moments of rows whose blocks are ``(N, D)``, ``(N, E)``, ...; some rows at a time."""
        widths = tuple(value.shape[1] for value in blocks)
        rows = max(1, ENTRIES // sum(widths))
        starts = range(0, len(blocks[0]), rows)
        parts = (torch.cat([value.detach()[start : start + rows].double() for value in blocks], dim=1) for start in starts)
        return reduce(Moments.merged, (_of_rows(widths, part) for part in parts))

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows together."""
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        step = apart * (other.rows / rows)
        one, two = self._moved(-step), other._moved(apart - step)
        sums = (first + second for first, second in zip(one, two, strict=True))
        return Moments(self.widths, rows, self.mean + step, *sums)

    def block(self, first: int, second: int) -> Tensor:
        """Scatter of block ``first`` with block ``second``."""
        return self.scatter[self._columns(first), self._columns(second)]

    def centre(self, block: int) -> Tensor:
        """Mean of a block."""
        return self.mean[self._columns(block)]

    def spread(self, block: int) -> Tensor:
        """Mean squared distance of a block's rows to their mean: the trace of its population covariance."""
        return self.block(block, block).trace() / self.rows

    def collapsed(self, block: int) -> bool:
        """All rows of a block are equal, but for rounding."""
        return bool(self.spread(block) <= 1e-24 * self.centre(block).square().sum())

    def _columns(self, block: int) -> slice:
        start = sum(self.widths[:block])
        return slice(start, start + self.widths[block])

    def record(self) -> Tensor:
        """One flat vector that says its own widths; records stand one behind the other in a metric's state."""
        header = self.mean.new_tensor([len(self.widths), *self.widths])
        return torch.cat([header, self.rows[None], *(value.flatten() for value in self[2:])])

    def _moved(self, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scatter, cubic and quartic of the rows z + by (the sum of z is 0)."""
        blocks = _blocks(self.widths, by) * by  # row k: block k of ``by``, zero elsewhere
        squares, traces = blocks @ by, _blocks(self.widths, by) @ self.scatter.diagonal()
        inner = self.cubic @ blocks.T
        cubic = self.cubic + torch.outer(traces, by) + 2 * blocks @ self.scatter + self.rows * torch.outer(squares, by)
        both = torch.outer(traces, squares)
        quartic = self.quartic + 2 * (inner + inner.T) + both + both.T + 4 * blocks @ self.scatter @ blocks.T
        return self.scatter + self.rows * torch.outer(by, by), cubic, quartic + self.rows * torch.outer(squares, squares)


def _of_rows(widths: tuple[int, ...], rows: Tensor) -> Moments:
    mean = rows.mean(dim=0)
    rows = rows - mean
    rest = rows.mean(dim=0)  # what rounding of a mean far from zero left
    rows = rows - rest
    squares = rows.square() @ _blocks(widths, rows).T
    return Moments(widths, rows.new_tensor(len(rows)), mean + rest, rows.T @ rows, squares.T @ rows, squares.T @ squares)


def _blocks(widths: tuple[int, ...], like: Tensor) -> Tensor:
    """``(K, W)``: 1 where a column belongs to a block."""
    owner = torch.repeat_interleave(torch.tensor(widths))
    return (owner == torch.arange(len(widths))[:, None]).to(like)


def _read(records: Tensor) -> Iterator[Moments]:
    while records.numel():
        blocks = int(records[0])
        widths = tuple(int(width) for width in records[1 : 1 + blocks])
        width, records = sum(widths), records[1 + blocks :]
        values = []
        for shape in ((), (width,), (width, width), (blocks, width), (blocks, blocks)):
            size = math.prod(shape)
            values.append(records[:size].reshape(shape))
            records = records[size:]
        yield Moments(widths, *values)


def collected(name: str, state: Tensor | list[Tensor], minimum: int) -> Moments:
    """Moments in a metric's state, a list of records of this or one vector of all processes, of at least ``minimum`` samples."""
    records = state if isinstance(state, list) else [state]
    parts = [part for record in records for part in _read(record)]
    check_updated(name, int(sum(part.rows for part in parts)), minimum)
    for part in parts:
        check_next_widths(name, parts[0].widths, part.widths)
    return reduce(Moments.merged, parts)

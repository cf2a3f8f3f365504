"""The rows of a matrix with the largest inner products, of equal ones the lower row first, whatever finds them."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["nearest_rows"]

SPARE = 16  # rows that a search gives beyond those that are asked for
_SIMILARITIES = 2**22  # in memory
_NUMBERS = {"cpu": 2**16}  # of gathered rows at a time, which stay in the cache of a CPU; elsewhere:
_ELSEWHERE = 2**22
_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}  # of the factors, in a matrix product


def nearest_rows(
    queries: Tensor, bank: Tensor, k: int, search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]], floor: Tensor
) -> tuple[Tensor, Tensor]:
    """``(Q, k)`` inner products in falling order and ``(Q, k)`` rows of the bank; of equal products the lower row comes first.

    A matrix product rounds equal rows differently where they stand at different places, and a search gives any of equal rows. So the
    search only proposes: the products of what it finds are summed in fp64 and rounded, which makes those of equal rows equal; and where
    more rows than it found may be among the k by the error bound of its sums, all rows of the bank are looked at.

    Args:
        queries: ``(Q, D)``, fp32 or fp64.
        bank: ``(N, D)`` of the same type, N at least k.
        k: rows for each query.
        search: ``(queries, bank, n)`` to ``(Q, n)`` products in falling order, summed in fp32 or wider, and rows.
        floor: ``(Q,)``; products up to it need not be right, and may be minus infinity.
    """
    asked = min(k + SPARE, len(bank))
    near, rows = search(queries, bank, asked)
    lengths = queries.double().norm(dim=1) * torch.linalg.vector_norm(bank, dim=1, dtype=torch.float64).max()
    error = lengths * (_rounding() + (bank.shape[1] + 2) * 2.0**-24)  # the largest of a product
    least = torch.maximum(near[:, k - 1].double() - 2 * error, floor.double() - error)[:, None]
    query, place = _not_below(near, least).unbind(dim=1)
    scores = torch.full_like(near, -torch.inf)
    scores[query, place] = _products(queries, bank, query, rows[query, place])
    rows, order = rows.sort(dim=1)
    scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    scores, rows = scores[:, :k], rows.gather(1, best)[:, :k]
    if asked < len(bank):
        unsure = _not_below(near[:, -1:], least)[:, 0]
        for some in torch.split(unsure, max(1, _SIMILARITIES // len(bank))):
            scores[some], rows[some] = _among_all(queries[some], bank, k, least[some])
    return scores, rows


def _among_all(queries: Tensor, bank: Tensor, k: int, least: Tensor) -> tuple[Tensor, Tensor]:
    """The k nearest of all rows; only those are looked at whose products, as a matrix product has them, are at least ``(Q, 1)``."""
    query, row = _not_below(queries @ bank.T, least).unbind(dim=1)
    products = _products(queries, bank, query, row)
    order = products.sort(descending=True, stable=True).indices
    order = order[query[order].sort(stable=True).indices]  # by query, then by product, then by row
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(query, query)
    scores = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros_like(scores, dtype=torch.long)
    kept = rank < k
    scores[query[kept], rank[kept]], rows[query[kept], rank[kept]] = products[order][kept], row[order][kept]
    return scores, rows


def _rounding() -> float:
    """Relative error of the factors of a matrix product in fp32, at most."""
    try:
        return _ROUNDING[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set by torch.backends.*.fp32_precision, for which there is no one answer
        return max(_ROUNDING.values())


def _not_below(values: Tensor, least: Tensor) -> Tensor:
    """Positions, in order; NaN, of a product that overflows, is one of them."""
    return (~(values.double() < least)).nonzero()


def _products(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """``(P,)`` inner products of P pairs, summed in fp64."""
    size = max(1, _NUMBERS.get(bank.device.type, _ELSEWHERE) // bank.shape[1])
    pairs = zip(torch.split(query, size), torch.split(row, size), strict=True)
    return torch.cat([(queries[q].double() * bank[r].double()).sum(dim=1).to(queries.dtype) for q, r in pairs])

"""``geomreg retrieve``: which samples of a large pool are nearest to the target data (ARF)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from geomreg.cache import EmbeddingCache
from geomreg.checks import check_count
from geomreg.regularizers.replay import retrieve_anchors
from geomreg.shards import write_file

__all__ = ["RetrieveOptions", "retrieve"]

QUERIES, BANK = 65_536, 16_384  # rows of target and pool in memory
_SIMILARITIES = 1 << 26  # in memory


@dataclass(frozen=True)
class RetrieveOptions:
    """Options of ``geomreg retrieve``.

    Args:
        target: cache of the target data, by ``geomreg embed``.
        pool: cache of the pool, by the same model.
        output: text file of the ids, one a line, nearest first.
        k: pool samples for each target sample.
        target_modality: what of the target data is compared.
        pool_modality: with what of the pool.
        limit: ids in all. Every target sample's nearest comes first, then the second nearest, as with a smaller k, and within those
            the more similar. None: all.
        device: "auto" takes a GPU if there is one; or "cpu".
    """

    target: Path
    pool: Path
    output: Path
    k: int = 10
    target_modality: Literal["image", "text"] = "image"
    pool_modality: Literal["image", "text"] = "image"
    limit: int | None = None
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_count("retrieve", "k", self.k, 1)
        if self.limit is not None:
            check_count("retrieve", "limit", self.limit, 1)


def retrieve(options: RetrieveOptions) -> list[str]:
    """Write the ids of the pool samples that are nearest to the target data (arXiv 2404.06244); returns them, nearest first.

    The file is what :class:`~geomreg.integrations.recipes.data.Subset` takes; it is written whole or not at all. Similarity is the inner
    product, see :func:`~geomreg.regularizers.replay.retrieve_anchors`: of equally similar samples, copies of one picture say, those that
    come first in the pool's cache are taken, on every machine and whatever is installed. Memory is that of some blocks of embeddings and
    12 bytes for each sample of the pool, whatever the size of the target data.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: caches by different models, or without the modality; k above the pool's size; ids that do not fit on a line.
        RuntimeError: damaged caches.
        OSError: a file that cannot be written.
    """
    target, pool = EmbeddingCache.open(options.target), EmbeddingCache.open(options.pool)
    _check_alike(target, pool, options)
    size = sum(1 for _ in pool.each_id(options.pool_modality))
    if options.k > size:
        raise ValueError(f"retrieve: expected k of at most {size}, the samples of the pool, got {options.k}. Lower k, or enlarge the pool.")
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    rank, similarity = np.full(size, options.k, np.int32), np.full(size, -np.inf)
    with tqdm(unit="target samples", disable=None) as bar:
        for queries in target.slices(options.target_modality, QUERIES):
            bank = pool.slices(options.pool_modality, BANK)
            _note(rank, similarity, *_nearest(queries.to(device), bank, options.k))
            bar.update(len(queries))
    rows = np.flatnonzero(rank < options.k)
    rows = rows[np.lexsort((rows, -similarity[rows], rank[rows]))][: options.limit]
    place = {row: k for k, row in enumerate(rows.tolist())}
    ids = [""] * len(place)
    for row, one in enumerate(pool.each_id(options.pool_modality)):
        if row in place:
            ids[place[row]] = str(one)
    for one in ids:
        if "\n" in one or one.endswith("\r") or not one.strip():
            raise ValueError(f"retrieve: expected ids that fit on a line, got {one!r}. Give the pool's samples other ids.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(options.output, "".join(f"{one}\n" for one in ids).encode("utf-8", "surrogateescape"))
    print(f"{len(ids)} of {size} samples of the pool: {options.output}")
    return ids


def _check_alike(target: EmbeddingCache, pool: EmbeddingCache, options: RetrieveOptions) -> None:
    """The two tables hold embeddings that can be compared."""
    parts = []
    for cache, modality in ((target, options.target_modality), (pool, options.pool_modality)):
        if modality not in cache.fingerprint:
            raise ValueError(
                f"retrieve: expected {modality} embeddings in {cache.path}, got {', '.join(cache.fingerprint)} alone. Build them with "
                "geomreg embed, or choose another modality."
            )
        parts.append(cache.fingerprint[modality])
    for part in parts[0].keys() & parts[1].keys() - {"data set"}:
        if parts[0][part] != parts[1][part]:
            raise ValueError(
                f"retrieve: expected two caches by one model, got {part} {parts[0][part]!r} in {target.path} and {parts[1][part]!r} in "
                f"{pool.path}. Build one of them anew."
            )


def _nearest(queries: Tensor, bank: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """``(Q, k)`` similarities in falling order and rows of the bank, which comes in parts; of equal ones the lower row first."""
    scores, rows, start = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long, device=queries.device), 0
    for part in bank:
        at_once = max(1, _SIMILARITIES // len(queries))
        found, where = retrieve_anchors(queries, part.to(queries.device), min(k, len(part)), chunk_size=at_once)
        scores, order = torch.cat([scores, found], dim=1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, where + start], dim=1).gather(1, order)[:, :k]
        scores, start = scores[:, :k], start + len(part)
    return scores, rows


def _note(rank: NDArray[np.int32], similarity: NDArray[np.float64], scores: Tensor, rows: Tensor) -> None:
    """For each row of the pool the best rank at which a target sample has it, and the largest similarity of those; in place."""
    for k, (values, at) in enumerate(zip(scores.T.double().cpu().numpy(), rows.T.cpu().numpy(), strict=True)):
        better = at[rank[at] > k]
        rank[better], similarity[better] = k, -np.inf
        same = rank[at] == k
        np.maximum.at(similarity, at[same], values[same])

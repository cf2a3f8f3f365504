"""Teacher embeddings on disk: a frozen teacher need not see the same sample twice."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from geomreg.cache_build import (
    BF16,
    MANIFEST,
    TOLERANCE,
    VIEW,
    Source,
    TableBuild,
    agreed,
    check_alike,
    check_together,
    compare,
    described_view,
    embed_missing,
    fingerprints_at,
    from_first_process,
    largest_difference,
    locked,
    missing_shards,
    modalities_of,
    publish,
    published,
    rank_of_process,
    tidy,
)
from geomreg.checks import check_count, check_positive
from geomreg.older_tables import warn_of_texts
from geomreg.same_weights import Origin
from geomreg.shards import Shard, Table, id_hashes
from geomreg.teacher import Teacher
from geomreg.types import Embeddings
from geomreg.views import text_views

__all__ = ["EmbeddingCache"]


class EmbeddingCache:
    """Embeddings of a frozen teacher for every sample of a data set, on disk, found by sample id.

    A forward of the teacher is a seventh of the work of a regularized step, and the same at every epoch. :meth:`build` makes the cache,
    :meth:`open` opens it, ``Teacher.cached(cache)`` is a teacher like the others. Images and texts are tables of their own. Each has
    a fingerprint: the teacher's weights, preprocessing or tokenizer, normalisation, data set; a mismatch names the part that
    differs.

    A cache holds one view for each sample. Augmented reference images need the teacher itself. Of texts that are token ids ``(B, L)`` at
    ``"text"`` the cache knows which ones it embedded: another text under the same id (another template, an edited caption) is an error,
    never a wrong embedding. Padding does not count: what fills a text up in a batch and not alone. Images are known by their ids, the
    transform and what the data set says of how their files are read.

    Caches of older versions are read. One whose texts were not noted says so once, when token ids are at hand, and is built anew by
    :meth:`build`; one that does not say how image files were read stays if samples that are embedded anew are as stored, with a warning.

    Example:
        >>> import tempfile, torch
        >>> from geomreg import Embeddings, EmbeddingCache, Teacher
        >>> data = [{"id": f"sample {k}", "image": torch.full((4,), float(k))} for k in range(10)]
        >>> teacher = Teacher(torch.nn.Linear(4, 2), lambda model, batch: Embeddings(image=model(batch["image"])))
        >>> cache = EmbeddingCache.build(teacher, data, tempfile.mkdtemp(), progress=False)
        >>> len(cache), cache(["sample 7", "sample 0"]).image.shape
        (10, torch.Size([2, 2]))
    """

    def __init__(self, path: Path, tables: dict[str, Table]) -> None:
        self.path, self._tables = path, tables
        self.origin: Origin | None = None  # a model that is known to embed so

    # reading

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, teacher: Teacher | None = None, preprocessing: object = None, tokenizer: object = None
    ) -> "EmbeddingCache":
        """Open a finished cache: the index and the size of every file are checked now, rows when they are first read.

        Args:
            path: its folder.
            teacher: if given, its weights must be those that the cache was built with.
            preprocessing: if given, the transform of the images must be that of :meth:`build`: the object, or the string that it got.
            tokenizer: likewise of the texts.

        Raises:
            FileNotFoundError: no cache there.
            ValueError: built with another teacher, preprocessing or tokenizer.
            RuntimeError: missing, truncated or damaged files.
        """
        path = Path(path).absolute()
        if not (path / MANIFEST).is_file():
            unfinished = " (an unfinished build)" if list(path.glob(".*.partial")) else ""
            raise FileNotFoundError(f"EmbeddingCache: expected a cache in {path}, got no {MANIFEST}{unfinished}. Build it first.")
        cache = cls(path, {modality: Table.open(path / folder) for modality, folder in published(path).items()})
        cache.check(teacher=teacher, preprocessing=preprocessing, tokenizer=tokenizer)
        return cache

    def check(self, *, teacher: Teacher | None = None, preprocessing: object = None, tokenizer: object = None) -> None:
        """Raise ValueError that names what differs, if something that is given is not what the cache was built with."""
        weights = None if teacher is None else teacher.fingerprint()
        views = {"image": preprocessing, "text": tokenizer}
        for modality, fingerprint in self.fingerprint.items():
            expected = {} if weights is None else {"weights": weights}
            if views[modality] is not None:
                expected[VIEW[modality]] = described_view(modality, views[modality])
            compare(self.path, modality, fingerprint, expected)
        if teacher is not None:
            self._remember(teacher)

    def _remember(self, teacher: Teacher) -> None:
        """The model that a teacher with these weights was made from."""
        agreement = getattr(teacher, "_agreement", None)
        self.origin = None if agreement is None else agreement.origin()

    @property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """For each modality what its table was built from."""
        return {modality: dict(table.description["fingerprint"]) for modality, table in self._tables.items()}

    def __len__(self) -> int:
        """Rows of the shortest table."""
        return min(len(table) for table in self._tables.values())

    def __contains__(self, sample: object) -> bool:
        hashes = id_hashes("EmbeddingCache", [sample])
        return all(bool((table.find(hashes) >= 0).all()) for table in self._tables.values())

    def __call__(
        self, ids: Iterable[object] | Tensor, modalities: tuple[str, ...] | None = None, *, text: Tensor | None = None
    ) -> Embeddings:
        """Embeddings of some samples.

        Args:
            ids: B sample ids: whole numbers or strings; a tensor of integers is read as such.
            modalities: what is read; by default all that the cache has.
            text: ``(B, L)`` token ids of the samples' texts, if they are at hand: compared with those that were embedded, where texts are
                read. Padding does not count.

        Returns:
            :class:`Embeddings` of ``(B, D)`` fp32 tensors on the CPU; None for what is not read.

        Raises:
            ValueError: ids that are not in the cache; another text than the one that was embedded.
            RuntimeError: damaged files, found at the first touch of each block of rows.
        """
        if isinstance(ids, (str, bytes)) or (isinstance(ids, Tensor) and ids.ndim != 1):
            raise TypeError(f"EmbeddingCache: expected a list of sample ids, got {ids!r}. Pass B of them.")
        known = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        hashes = id_hashes("EmbeddingCache", known)
        found: dict[str, Tensor] = {}
        for modality in self._tables if modalities is None else modalities:
            table = self._table(modality)
            rows = table.find(hashes)
            if (absent := np.flatnonzero(rows < 0)).size:
                shown = ", ".join(repr(known[k]) for k in absent[:3])
                raise ValueError(
                    f"EmbeddingCache: expected ids of {table.folder}, got {len(absent)} of {len(known)} that it lacks: {shown}. Build the "
                    "cache over all reference data; an id's type counts (7 is not '7')."
                )
            if modality == "text" and (views := text_views({"text": text}, len(known), table.padding)) is not None:
                _check_views(table, known, rows, views)
            found[modality] = torch.from_numpy(table.read(rows)).float()
        return Embeddings(**found)

    def _table(self, modality: str) -> Table:
        if modality not in self._tables:
            raise ValueError(
                f"EmbeddingCache: expected modalities among {', '.join(self._tables)}, got {modality!r}. Build it, or leave it out."
            )
        return self._tables[modality]

    def ids(self, modality: str | None = None) -> list[Any]:
        """Ids of all samples of a table, by default the first, in the order of the data set."""
        return list(self.each_id(modality))

    def each_id(self, modality: str | None = None) -> Iterator[Any]:
        """The same one after the other; a shard's are in memory."""
        table = self._table(modality or next(iter(self._tables)))
        return (one for entry in table.description["shards"] for one in Shard(table.folder, entry["number"]).ids())

    def slices(self, modality: str, rows: int) -> Iterator[Tensor]:
        """``(rows, D)`` fp32 embeddings of a table one after the other, in the order of :meth:`ids`; the last may be shorter."""
        check_count("EmbeddingCache.slices", "rows", rows, 1)
        table = self._table(modality)
        for start in range(0, len(table), rows):
            yield torch.from_numpy(table.read(np.arange(start, min(start + rows, len(table))))).float()

    def verify(
        self, teacher: Teacher, dataset: Dataset[Any], n: int = 64, *, seed: int = 0, tolerance: float = TOLERANCE, **loading: Any
    ) -> None:
        """Embed ``n`` random samples anew and compare them with what is stored.

        Args:
            teacher: the teacher that is to be replaced.
            dataset: the data set that training will see.
            n: samples to compare.
            seed: of their choice.
            tolerance: largest distance of new and stored embedding, relative to the norm; 1e-3 is above fp16's rounding. Under
                autocast the embeddings themselves depend on the batch by more.
            loading: ``preprocessing``, ``tokenizer``, ``collate_fn``, ``batch_size`` as for :meth:`build`.

        Raises:
            ValueError: something differs: weights, preprocessing, tokenizer, normalisation, data set, or the embeddings of some
                samples; the teacher gives nothing of what the cache has.
        """
        check_count("EmbeddingCache.verify", "n", n, 1)
        check_positive("EmbeddingCache.verify", "tolerance", tolerance)
        source = Source("EmbeddingCache.verify", teacher, dataset, **loading)
        expected = source.fingerprints(modalities_of(source.probe()), self.fingerprint)
        shared = tuple(modality for modality in self._tables if modality in expected)
        if not shared:
            raise ValueError(
                f"EmbeddingCache.verify: expected a teacher of {', '.join(self._tables)}, got one of {', '.join(expected)} alone."
            )
        for modality in shared:
            compare(self.path, modality, self._tables[modality].description["fingerprint"], expected[modality])
        chosen = torch.randperm(source.length, generator=torch.Generator().manual_seed(seed))[:n].tolist()
        for ids, embeddings, _ in source.embedded([chosen[k : k + source.batch_size] for k in range(0, len(chosen), source.batch_size)]):
            if ids:
                self._compare_rows(ids, embeddings, shared, tolerance)

    def _compare_rows(self, ids: list[Any], embeddings: Embeddings, modalities: tuple[str, ...], tolerance: float) -> None:
        stored = self(ids, modalities)
        for modality in modalities:
            difference, worst = largest_difference(getattr(stored, modality), getattr(embeddings, modality))
            if not difference <= tolerance:
                raise ValueError(
                    f"EmbeddingCache.verify: expected the stored {modality} embedding of {ids[worst]!r} within {tolerance:g}, got one "
                    f"{difference:.2g} away from the teacher's. The sample, its preprocessing or the precision has changed: delete "
                    f"{self._tables[modality].folder} and build again."
                )

    def __reduce__(self) -> tuple[Any, tuple[Path, dict[str, str]]]:
        return _opened_again, (self.path, {modality: table.folder.name for modality, table in self._tables.items()})  # in a worker, say

    def __repr__(self) -> str:
        tables = (f"{m}: {len(t)} x {t.description['width']} {t.description['dtype']}" for m, t in self._tables.items())
        return f"EmbeddingCache({str(self.path)!r}, {', '.join(tables)})"

    # building

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        dataset: Dataset[Any],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        preprocessing: object = None,
        tokenizer: object = None,
        batch_size: int = 256,
        num_workers: int = 0,
        collate_fn: Any = default_collate,
        shard_rows: int = 16_384,
        progress: bool = True,
    ) -> "EmbeddingCache":
        """Embed every sample of a data set once, and open the result.

        Like ``make``: a table that is finished and has this fingerprint stays, if a few samples that are embedded anew are as stored; one
        that was interrupted goes on after its last finished shard; any other is built beside the old, which is replaced at the end, and
        stays usable until then. What the teacher's ``encode`` returns is built: one that returns texts alone rebuilds the texts and
        keeps the images.

        In several processes (``torch.distributed``, a folder that all of them see) every process calls this with the same arguments and
        embeds a part of the shards.

        Args:
            teacher: a frozen copy, or a student with its adapters off; not an averaged one, which moves.
            dataset: of known length, whose samples are dicts with an ``"id"`` (whole number or string, each once) and what
                ``teacher.encode`` takes. May have ``ids`` (of all samples: then checked before anything is embedded),
                ``transform``, ``tokenizer``, ``fingerprint`` (a string, or one for each modality, that changes with the content), and
                ``loading`` (a string that changes with how image files become what ``transform`` gets); and ``same_files(digest)``,
                whether another image fingerprint is of the same files.
            path: folder to build in.
            dtype: ``torch.float32``, or ``torch.float16`` for half the size (0.9 % error on the average vector loss at a drift of 0.3 %).
            preprocessing: the transform of the images, or a string that names it; by default ``dataset.transform``.
            tokenizer: of the texts, or a string that names it; by default ``dataset.tokenizer``.
            batch_size: samples embedded at a time.
            num_workers: processes that load samples.
            collate_fn: samples to a batch with ``"id"``; may leave out samples that cannot be read.
            shard_rows: rows of a file, which is what a kill can cost.
            progress: show a progress bar.

        Raises:
            TypeError: samples that are no dicts with an id; a data set without length.
            ValueError: a sample that differs when it is loaded again (random augmentation, random templates); embeddings that are not
                finite, or bf16; two samples with one id; bf16 as ``dtype``; tables of different teachers.
            RuntimeError: another process builds in this folder.
            OSError: no space left, or a folder that cannot be written. What was finished is kept.
        """
        name = "EmbeddingCache.build"
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(
                f"{name}: expected dtype float32 or float16, got {dtype}. {BF16 if dtype == torch.bfloat16 else 'Choose one.'}"
            )
        check_count(name, "shard_rows", shard_rows, 1)
        path = Path(path).absolute()
        with ExitStack() as held:
            with agreed():
                source = Source(
                    name, teacher, dataset, preprocessing=preprocessing, tokenizer=tokenizer, batch_size=batch_size,
                    num_workers=num_workers, collate_fn=collate_fn,
                )  # fmt: skip
                probe = source.probe()
                kind = {"dtype": str(dtype).removeprefix("torch."), "shard_rows": shard_rows}
                builds = [
                    TableBuild(path, {"modality": modality, "fingerprint": fingerprint, **kind}, source)
                    for modality, fingerprint in source.fingerprints(modalities_of(probe), fingerprints_at(path)).items()
                ]
                check_together(path, {one.modality: one.description["fingerprint"] for one in builds})
            with agreed():  # apart: it is a collective, which a process with an error above does not reach
                check_alike(builds)
            names, numbers = {}, []
            with agreed():
                if rank_of_process() == 0:
                    writable = held.enter_context(locked(path))
                    todo = [one for one in builds if not one.finished(probe) and (writable or not one.readable)]
                    if todo and not writable:
                        raise OSError(f"{name}: expected a folder that can be written, got {path}: {todo[0].modality} is to be built anew.")
                    for one in todo:
                        one.prepare(probe)
                    if writable:
                        tidy(path)
                    names, numbers = {one.modality: one.name for one in todo}, missing_shards(todo, probe) if todo else []
            names, numbers = from_first_process((names, numbers))
            todo = [one for one in builds if one.modality in names]
            for one in todo:
                one.name = names[one.modality]
            if todo:
                with agreed():
                    embed_missing(source, todo, numbers, probe, shard_rows, progress)
                with agreed():
                    if rank_of_process() == 0:
                        publish(path, todo)
                        tidy(path)
            with agreed():
                cache = cls.open(path)
        cache._remember(teacher)
        return cache


def _check_views(table: Table, ids: list[Any], rows: NDArray[np.int64], views: NDArray[np.uint64]) -> None:
    warned = table.unknown_views
    if (other := np.flatnonzero(table.other_views(rows, views))).size:
        raise ValueError(
            f"EmbeddingCache: expected the texts that {table.folder} was built from, got another for {other.size} of {len(ids)} samples: "
            f"{', '.join(repr(ids[k]) for k in other[:3])}. Show the text that was embedded (template, caption, tokenizer), or use the "
            "teacher itself."
        )
    if table.unknown_views and not warned:
        warn_of_texts(table.folder)


def _opened_again(path: Path, folders: dict[str, str]) -> EmbeddingCache:
    if (now := published(path)) != folders:
        raise RuntimeError(
            f"EmbeddingCache: expected the tables {sorted(folders.values())} in {path}, got {sorted(now.values())}: it was built anew."
        )
    return EmbeddingCache.open(path)

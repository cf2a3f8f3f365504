"""How an embedding cache is made: samples, their embeddings, tables that grow shard by shard."""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from tqdm import tqdm  # type: ignore[import-untyped]

from geomreg.checks import check_count, describe
from geomreg.locking import Lock
from geomreg.older_tables import LOADING, said_of_loading
from geomreg.shards import DTYPES, Shard, Table, damaged, id_hashes, read_json, shard_name, write_file, write_index, write_json, write_shard
from geomreg.teacher import Teacher
from geomreg.types import Embeddings
from geomreg.units import size_text
from geomreg.views import Padding, most_padded, padding_between, text_views, told_padding

__all__ = [
    "BF16",
    "MANIFEST",
    "TOLERANCE",
    "VIEW",
    "ProcessGoneError",
    "Source",
    "TableBuild",
    "agreed",
    "check_alike",
    "check_together",
    "compare",
    "described_view",
    "embed_missing",
    "fingerprints_at",
    "from_first_process",
    "largest_difference",
    "locked",
    "missing_shards",
    "modalities_of",
    "publish",
    "published",
    "rank_of_process",
    "tidy",
]

MANIFEST = "cache.json"
VIEW = {"image": "preprocessing", "text": "tokenizer"}  # the part of a fingerprint that says how samples are seen
BF16 = "bf16 puts 53 % error on the average vector loss at a drift of 0.3 %; project and normalise in fp32 (integrations.open_clip.embed)."
_TEXTS = ("A photo of 2 cats.", "Ärger, naïve; 猫 🙂", "<tag> & it's  CamelCase\n", "a word " * 200)
_LEFT_OUT = 1000  # samples without a row that are looked at again
_KEY = r"[0-9a-f]{12}(-2)?"  # of a table's folder
_FAILED = ".failed"  # says to the other processes what went wrong in one
_PROBE = 64  # samples that are loaded twice before anything is built; every fourth is embedded
TOLERANCE = 1e-3  # of embeddings that count as the same, relative to their norm: above fp16's rounding


class Source:
    """Samples and their embeddings, one batch after the other."""

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        dataset: Any,
        *,
        preprocessing: object = None,
        tokenizer: object = None,
        batch_size: int = 256,
        num_workers: int = 0,
        collate_fn: Any = default_collate,
    ) -> None:
        if not isinstance(teacher, Teacher):
            raise TypeError(f"{name}: expected a geomreg.Teacher, got {describe(teacher)}. Wrap the model: Teacher(model, encode).")
        if not hasattr(teacher, "model"):
            raise TypeError(f"{name}: expected a teacher with a model, got a cached one. Pass the one that the cache was built from.")
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name}: expected a data set with a length and samples by number, got {describe(dataset)}. A stream has "
                "no place to go on from."
            )
        check_count(name, "batch_size", batch_size, 1)
        check_count(name, "num_workers", num_workers, 0)
        if len(dataset) == 0:
            raise ValueError(f"{name}: expected at least one sample, got an empty data set. Look at its files.")
        self.name, self.teacher, self.dataset, self.length = name, teacher, dataset, len(dataset)
        self.samples = _Named(name, dataset)
        self.batch_size, self.num_workers, self.collate_fn = batch_size, num_workers, collate_fn
        self.views = {
            "image": preprocessing if preprocessing is not None else getattr(dataset, "transform", None),
            "text": tokenizer if tokenizer is not None else getattr(dataset, "tokenizer", None),
        }
        self.padding, self.ragged = told_padding(self.views["text"]), False  # whether batches pad to their longest text
        self.parts: list[list[int]] = []  # samples of the probe
        self.viewed: NDArray[np.uint64] | None = None  # of the probe, where texts can be told apart
        self.ids: list[Any] | None = None
        if getattr(dataset, "ids", None) is not None:
            self.ids = dataset.ids.tolist() if isinstance(dataset.ids, (Tensor, np.ndarray)) else list(dataset.ids)
            if len(self.ids) != self.length:
                raise ValueError(f"{name}: expected dataset.ids of all {self.length} samples, got {len(self.ids)}. Give each sample one.")
            _, first = np.unique(id_hashes(name, self.ids), return_index=True)
            if len(first) < self.length:
                again = np.setdiff1d(np.arange(self.length), first)
                raise ValueError(
                    f"{name}: expected every sample to have an id of its own, got {self.ids[again[0]]!r} more than once. Give the samples "
                    "other ids."
                )

    def batch(self, rows: Iterable[int]) -> Mapping[str, Any]:
        """Some samples as one batch."""
        return self._checked(self.collate_fn([self.samples[row] for row in rows]))

    def _checked(self, batch: Any) -> Mapping[str, Any]:
        if not isinstance(batch, Mapping) or "id" not in batch:
            raise TypeError(f'{self.name}: expected batches as dicts with "id", got {describe(batch)}. Use default_collate or one like it.')
        return batch

    def probe(self) -> tuple[list[Any], Embeddings]:
        """Ids and embeddings of a few samples, after a look at whether loading and encoding give the same again."""
        rows = sorted(set(np.linspace(0, self.length - 1, _PROBE, dtype=int).tolist()))
        parts = self.parts = [rows[k::4] for k in range(4) if rows[k::4]]
        padding = None
        for part in parts:
            first, second = self.batch(part), self.batch(part)
            for key, value in first.items():
                if not _same(value, second.get(key)):
                    raise ValueError(
                        f"{self.name}: expected the same sample whenever it is loaded, got another {key!r} the second time. A "
                        "cache holds one view of each sample: take out random crops, flips and templates (use the evaluation "
                        "transform), or keep the teacher itself."
                    )
            padding = padding or self._padding(part, first)
        self.padding, self.ragged = padding or self.padding, padding is not None
        batch = self.batch(parts[0])
        (ids, once), (_, twice) = self.encoded(batch), self.encoded(batch)
        if not ids:
            raise ValueError(f"{self.name}: expected samples that can be read, got none among the first looked at. Check the paths.")
        self.viewed = text_views(batch, len(ids), self.padding)
        listed = None if self.ids is None else [self.ids[row] for row in parts[0]]
        if listed is not None and not set(ids) <= set(listed):
            raise ValueError(
                f"{self.name}: expected samples with the ids of dataset.ids, got {ids[0]!r} for {listed[0]!r}. Make both alike."
            )
        for modality in Embeddings._fields:
            one, two = getattr(once, modality), getattr(twice, modality)
            if one is not None and largest_difference(two, one)[0] > TOLERANCE:
                raise ValueError(
                    f"{self.name}: expected the same {modality} embeddings for the same batch, got others the second time. encode must "
                    "draw nothing at random."
                )
        return ids, once

    def _padding(self, part: list[int], batch: Mapping[str, Any]) -> Padding | None:
        """What fills texts up in a batch and not alone, if anything does; of what is padded most."""
        if len(batch["id"]) < len(part):  # samples were left out: it is not known which
            return None
        for row in most_padded(batch) if len(part) > 1 else ():
            if (found := padding_between(batch, row, self.batch([part[row]]))) is not None:
                return found
        return None

    def embedded(self, batches: list[list[int]]) -> Iterator[tuple[list[Any], Embeddings, NDArray[np.uint64] | None]]:
        """Ids, embeddings (fp32 or fp16 on the CPU) and views of the texts of each batch of sample numbers."""
        loader = DataLoader(
            self.samples,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            ids, embeddings = self.encoded(self._checked(batch))
            yield ids, embeddings, text_views(batch, len(ids), self.padding) if ids else None

    def encoded(self, batch: Mapping[str, Any]) -> tuple[list[Any], Embeddings]:
        """Ids and embeddings of a batch; fp32 or fp16 on the CPU."""
        ids = batch["id"].tolist() if isinstance(batch["id"], Tensor) else list(batch["id"])
        if not ids:
            return [], Embeddings()
        weight = next(self.teacher.model.parameters(), None)
        device = torch.device("cpu") if weight is None else weight.device
        found = {}
        for modality, value in self.teacher(_moved(batch, device))._asdict().items():
            if value is None:
                continue
            if value.ndim != 2 or len(value) != len(ids):
                raise ValueError(
                    f"{self.name}: expected {modality} embeddings of shape ({len(ids)}, D) for {len(ids)} ids, got {describe(value)}. Row "
                    "i must belong to sample i."
                )
            if value.dtype == torch.bfloat16:
                raise ValueError(f"{self.name}: expected {modality} embeddings in fp32 or fp16, got bfloat16. {BF16}")
            value = value.cpu() if value.dtype == torch.float16 else value.float().cpu()
            if not bool(torch.isfinite(value).all()):
                bad = next(one for one, row in zip(ids, value, strict=True) if not bool(torch.isfinite(row).all()))
                raise ValueError(
                    f"{self.name}: expected finite {modality} embeddings, got NaN or infinity for {bad!r}. Look at this sample."
                )
            found[modality] = value
        if not found:
            raise ValueError(f"{self.name}: expected image or text embeddings from the teacher, got None for both. Embed at least one.")
        return ids, Embeddings(**found)

    def fingerprints(self, unit: Mapping[str, bool], stored: Mapping[str, Mapping[str, str]] | None = None) -> dict[str, dict[str, str]]:
        """For each modality what its embeddings come from; of a data set that differs from that of a table which is ``stored`` in how
        file names are written alone, as there."""
        weights = self.teacher.fingerprint()
        content = getattr(self.dataset, "fingerprint", None)
        if content is not None and not isinstance(content, (str, Mapping)):
            raise TypeError(f"{self.name}: expected dataset.fingerprint as a string or one for each modality, got {describe(content)}.")
        ids = None if self.ids is None else hashlib.sha256(id_hashes(self.name, self.ids).tobytes()).hexdigest()[:16]
        found = {}
        for modality, normalized in unit.items():
            view = self.views[modality]
            data = content.get(modality) if isinstance(content, Mapping) else content
            found[modality] = {
                "weights": weights,
                VIEW[modality]: "not given" if view is None else described_view(modality, view),
                "normalisation": "unit" if normalized else "none",
                "data set": ", ".join(filter(None, (f"{self.length} samples", ids and f"ids {ids}", data and f"content {data}"))),
            }
            if modality == "image" and (loading := getattr(self.dataset, LOADING, None)) is not None:
                found[modality][LOADING] = str(loading)
            there = (stored or {}).get(modality, {}).get("data set")
            if modality == "image" and there is not None and self._same_files(found[modality]["data set"], there):
                found[modality]["data set"] = there
        return found

    def _same_files(self, now: str, there: str) -> bool:
        (head, _, content), (head_there, _, content_there) = (text.partition(", content ") for text in (now, there))
        same = getattr(self.dataset, "same_files", None)
        return head == head_there and content != content_there and same is not None and bool(same(content_there))


class _Named(Dataset[Any]):
    """The samples of a data set, each of which must have an id; in loading processes too."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        sample = self.dataset[row]
        if not isinstance(sample, Mapping) or "id" not in sample:
            got = f"a dict with {', '.join(map(repr, sample))}" if isinstance(sample, Mapping) else describe(sample)
            raise TypeError(f'{self.name}: expected samples as dicts with an "id", got {got}. Name each sample: its path, say.')
        return sample


class TableBuild:
    """A table in the making: a hidden folder that gets its name when all is there."""

    def __init__(self, path: Path, description: dict[str, Any], source: Source, name: str = "") -> None:
        self.path, self.modality, self.description, self.source = path, description["modality"], description, source
        self.name = name
        self.readable = False  # the published table is right as far as it says, but of an older version
        self.again: set[int] = set()  # shards of a published table in which samples can be read that could not be
        self.numbers = range(-(-source.length // description["shard_rows"]))

    @property
    def folder(self) -> Path:
        """Where the table will be."""
        return self.path / self.name

    @property
    def partial(self) -> Path:
        """Where it grows."""
        return self.path / f".{self.name}.partial"

    def finished(self, probe: tuple[list[Any], Embeddings]) -> bool:
        """Whether the published table is this one, to the embeddings of the probe; chooses the name."""
        self.name, other = self._names(self.description)
        current = published(self.path).get(self.modality)
        if LOADING in self.description["fingerprint"] and current in self._names(self._without_loading()):
            return self._older_stays(current)
        if current not in (self.name, other):
            return False
        try:
            table = Table.open(self.path / current)
            rows = table.find(id_hashes(self.source.name, probe[0]))
            stored = torch.from_numpy(table.read(rows)).float() if (rows >= 0).all() else None
            knows_texts = self.modality != "text" or self.source.viewed is None or self._knows_texts(table)
        except RuntimeError:  # to be mended
            self.name = current
            return False
        if stored is None or largest_difference(stored, getattr(probe[1], self.modality))[0] > TOLERANCE:
            self.name = other if current == self.name else self.name  # other samples, encode or precision: beside the old one
            return False
        if not knows_texts:
            self.name, self.readable = other if current == self.name else self.name, True
            return False
        self.name = current
        self.again = self._readable_now(table) if table.description.get("skipped") else set()
        return not self.again

    def _knows_texts(self, table: Table) -> bool:
        """Every shard does, so that the same text is the same in any batch."""
        return table.has_views() and (not self.source.ragged or table.padding == self.source.padding)

    def _names(self, description: Mapping[str, Any]) -> tuple[str, str]:
        """Of a folder, and of the one that takes its place if it holds something else."""
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.modality}-{key}", f"{self.modality}-{key}-2"

    def _without_loading(self) -> dict[str, Any]:
        """As older versions described this table."""
        fingerprint = {part: value for part, value in self.description["fingerprint"].items() if part != LOADING}
        return {**self.description, "fingerprint": fingerprint}

    def _older_stays(self, current: str) -> bool:
        """Of a table that does not say how image files were read: all samples of the probe are stored as they are embedded now."""
        try:
            table = Table.open(self.path / current)
            for part in self.source.parts:
                ids, embeddings = self.source.encoded(self.source.batch(part))
                rows = table.find(id_hashes(self.source.name, ids))
                if (rows < 0).any() or (ids and self._apart(table, rows, embeddings)):
                    return False
        except RuntimeError:
            return False
        if table.description.get("skipped") and self._readable_now(table):
            return False
        self.name = current
        return said_of_loading(self.path, None, self.description["fingerprint"][LOADING])

    def _apart(self, table: Table, rows: NDArray[np.int64], embeddings: Embeddings) -> bool:
        stored = torch.from_numpy(table.read(rows)).float()
        return largest_difference(stored, getattr(embeddings, self.modality))[0] > TOLERANCE

    def _readable_now(self, table: Table) -> set[int]:
        """Shards with samples that were left out and can be read now."""
        if self.source.ids is None:
            return set()
        left_out = np.flatnonzero(table.find(id_hashes(self.source.name, self.source.ids)) < 0)[:_LEFT_OUT].tolist()
        return {row // self.description["shard_rows"] for row in left_out if len(self.source.batch([row])["id"])}

    def prepare(self, probe: tuple[list[Any], Embeddings]) -> None:
        """A folder to work in: new, or with the shards of a former try that are still right."""
        if self.folder.is_dir():  # damaged, or not published before a kill
            shutil.rmtree(self.partial, ignore_errors=True)
            os.replace(self.folder, self.partial)
        self.partial.mkdir(exist_ok=True)
        for temporary in self.partial.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        for number in self.again:
            (self.partial / shard_name(number)).unlink(missing_ok=True)
        for number in self.numbers:
            file = self.partial / shard_name(number)
            if file.exists() and not self._still_right(number, probe):
                warnings.warn(
                    f"{self.source.name}: {self.partial.name} is of other samples or another encode: it is made anew", stacklevel=4
                )
                shutil.rmtree(self.partial)
                self.partial.mkdir()
                return

    def _still_right(self, number: int, probe: tuple[list[Any], Embeddings]) -> bool:
        """The first sample of a shard, and those of the probe in it, are stored as the teacher sees them now; a shard that cannot be read
        is removed."""
        batch = self.source.batch([number * self.description["shard_rows"]])
        first = self.source.encoded(batch)  # its errors are not the shard's
        try:
            shard = Shard(self.partial, number)
            hashes, views = shard.hashes(), shard.views()
            shard.ids()  # raises if damaged
            if not len(shard):
                return True
            for (ids, embeddings), all_there in ((first, True), (probe, False)):
                wanted = id_hashes(self.source.name, ids)
                order = np.argsort(hashes)
                at = order[np.minimum(np.searchsorted(hashes[order], wanted), len(order) - 1)]
                here = hashes[at] == wanted
                if all_there and not here.all():
                    return False
                if not here.any():
                    continue
                rows = np.sort(at[here])
                stored = np.empty((len(rows), shard.width), dtype=DTYPES[shard.dtype])
                shard.read(rows, stored, np.arange(len(rows)))
                new = getattr(embeddings, self.modality)[torch.from_numpy(here)][torch.from_numpy(np.argsort(at[here]))]
                if largest_difference(torch.from_numpy(stored).float(), new)[0] > TOLERANCE:
                    return False
            if self.modality == "text" and (viewed := self.source.viewed) is not None:
                of_first = text_views(batch, len(first[0]), self.source.padding)
                now = viewed[here] if of_first is None else np.concatenate([of_first, viewed[here]])
                if views is None or not np.isin(now, views).all():  # of an older version, or padded otherwise
                    (self.partial / shard_name(number)).unlink()
        except RuntimeError:
            (self.partial / shard_name(number)).unlink()
        return True

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in self.numbers if not (self.partial / shard_name(number)).exists()]

    def close(self) -> int:
        """Index, description, name; returns how many samples have no row."""
        if lacking := self.missing():
            raise RuntimeError(
                f"{self.source.name}: expected all shards in {self.partial}, got none with number {lacking[0]}. Build again."
            )
        filled = [number for number in self.numbers if len(Shard(self.partial, number))]
        if not filled:
            raise ValueError(f"{self.source.name}: expected samples that can be read, got none of {self.source.length}. Check the paths.")
        skipped = self.source.length - sum(len(Shard(self.partial, number)) for number in filled)
        padding = {"padding": list(self.source.padding)} if self.modality == "text" and self.source.viewed is not None else {}
        write_index(self.partial, filled, {**self.description, "skipped": skipped, **padding})
        os.replace(self.partial, self.folder)
        return skipped


def publish(path: Path, done: list[TableBuild]) -> None:
    """Finish tables and list them, all in one write; then what they replace is removed."""
    skipped = max(one.close() for one in done)
    before = published(path)
    tables = {**before, **{one.modality: one.folder.name for one in done}}
    write_json(path / MANIFEST, {"tables": tables})
    for one in done:  # unfinished builds that this one makes useless; what was there before goes with tidy()
        for folder in _own_folders(path, rf"\.{one.modality}-{_KEY}\.partial"):
            shutil.rmtree(folder, ignore_errors=True)
    if skipped:
        source = done[0].source
        warnings.warn(f"{source.name}: {skipped} of {source.length} samples could not be read and have no row", stacklevel=3)


def tidy(path: Path) -> None:
    """Remove what a kill left behind: tables that are not listed, files that were not finished."""
    listed = set(published(path).values())
    for folder in _own_folders(path, rf"({'|'.join(Embeddings._fields)})-{_KEY}"):
        if folder.name not in listed:
            shutil.rmtree(folder, ignore_errors=True)
    for file in [*path.glob(f".{MANIFEST}.*.tmp"), *path.glob(".process-*.lock"), path / _FAILED]:
        file.unlink(missing_ok=True)


def _own_folders(path: Path, pattern: str) -> list[Path]:
    """Folders that a build has made; others that happen to be there are not ours to remove."""
    return [found for found in path.iterdir() if found.is_dir() and re.fullmatch(pattern, found.name)]


def check_alike(builds: list[TableBuild]) -> None:
    """Every process describes the tables alike."""
    if not dist.is_initialized():
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [one.description for one in builds])
    for rank, described_there in enumerate(everywhere):
        if described_there != everywhere[0]:
            part, here, there = _first_difference(everywhere[0], described_there)
            raise ValueError(
                f"EmbeddingCache.build: expected all processes to build the same, got {part} {here!r} on rank 0 and {there!r} on "
                f"rank {rank}. Give all of them the same teacher, data set and options."
            )


def _first_difference(one: Any, other: Any, part: str = "tables") -> tuple[str, Any, Any]:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(part, a, b) for a, b in zip(one, other, strict=True)]
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one]
    else:
        return part, one, other
    return next(_first_difference(a, b, name) for name, a, b in pairs if a != b)


def missing_shards(todo: list[TableBuild], probe: tuple[list[Any], Embeddings]) -> list[int]:
    """Numbers of the shards to be made, if there is space for them."""
    _check_space(todo, probe[1])
    return sorted({number for one in todo for number in one.missing()})


def embed_missing(
    source: Source, todo: list[TableBuild], numbers: list[int], probe: tuple[list[Any], Embeddings], shard_rows: int, progress: bool
) -> None:
    """Write this process's share of the missing shards, and wait for the others', as long as they live."""
    failed = todo[0].path / _FAILED
    others = _Others(todo, numbers)
    try:
        _embed_share(source, todo, numbers, probe, shard_rows, progress, others)
        while dist.is_initialized() and any(set(one.missing()) & set(numbers) for one in todo):
            others.check()
            time.sleep(0.2)  # no collective: its time limit would end a build that only takes long
    except Exception as error:
        if dist.is_initialized() and not failed.exists():
            with suppress(OSError):
                write_file(failed, f"rank {rank_of_process()}: {error}".encode())  # whole: the others may be reading
        raise
    finally:
        others.leave()


class _Others:
    """The processes that build with this one. Each holds a file lock from its first shard to the last of all; whose lock is free while
    shards of its share are missing was killed. Where the file system has no locks nobody can tell.

    Args:
        todo: tables that are built.
        numbers: the shards that are made.
    """

    def __init__(self, todo: list[TableBuild], numbers: list[int]) -> None:
        self.todo, self.numbers, self.folder = todo, numbers, todo[0].path
        self.rank, self.ranks = rank_of_process(), dist.get_world_size() if dist.is_initialized() else 1
        self.own, self.looked_at = None, 0.0
        if self.ranks > 1:
            with suppress(OSError):
                self.own = Lock.take(self._file(self.rank))
            dist.barrier()  # all have theirs

    def _file(self, rank: int) -> Path:
        return self.folder / f".process-{rank}.lock"

    def check(self) -> None:
        """Raise RuntimeError if one of them failed or was killed."""
        if self.ranks == 1:
            return
        _check_failed(self.folder / _FAILED)
        if self.own is None or not self.own.held or time.monotonic() < self.looked_at + 1:
            return
        self.looked_at = time.monotonic()
        for rank in range(self.ranks):
            share = set(self.numbers[rank :: self.ranks])
            if rank == self.rank or not any(set(one.missing()) & share for one in self.todo):
                continue
            if (free := Lock.take(self._file(rank))) is not None:
                free.release()
                if any(set(one.missing()) & share for one in self.todo):  # it may have ended just now
                    _check_failed(self.folder / _FAILED)
                    raise RuntimeError(
                        f"EmbeddingCache.build: expected all processes to go on, got none any more on rank {rank}: it was killed. "
                        "Start the command again; what is finished is kept."
                    )

    def leave(self) -> None:
        """This process is done."""
        if self.own is not None:
            self.own.release(remove=True)


def _check_failed(failed: Path) -> None:
    if failed.exists():
        raise RuntimeError(f"EmbeddingCache.build: expected all processes to go on, got an error on {failed.read_text(encoding='utf-8')}")


def _embed_share(
    source: Source,
    todo: list[TableBuild],
    numbers: list[int],
    probe: tuple[list[Any], Embeddings],
    shard_rows: int,
    progress: bool,
    others: _Others,
) -> None:
    rank, ranks = rank_of_process(), dist.get_world_size() if dist.is_initialized() else 1
    numbers = numbers[rank::ranks]
    done = source.length // ranks - min(len(numbers) * shard_rows, source.length // ranks)
    unit = modalities_of(probe)
    batches, last_of = [], {}
    for number in numbers:
        end = min((number + 1) * shard_rows, source.length)
        batches += [list(range(k, min(k + source.batch_size, end))) for k in range(number * shard_rows, end, source.batch_size)]
        last_of[len(batches) - 1] = number
    ids: list[Any] = []
    seen: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
    parts: dict[str, list[Tensor]] = {one.modality: [] for one in todo}
    views: list[NDArray[np.uint64] | None] = []
    with tqdm(total=done + sum(map(len, batches)), initial=done, unit="samples", desc="embedding", disable=not progress or rank > 0) as bar:
        for k, (of_batch, embeddings, viewed) in enumerate(source.embedded(batches)):
            ids += of_batch
            views += [viewed] if of_batch else []
            others.check()
            for modality in parts if of_batch else ():
                value = getattr(embeddings, modality)
                if value is None or (unit[modality] and not _is_unit(value)):
                    got = "none" if value is None else f"one of another length for {of_batch[int(_off_unit(value).argmax())]!r}"
                    raise ValueError(f"{source.name}: expected {modality} embeddings as for the first samples, got {got}. Look at encode.")
                parts[modality].append(value)
            if k in last_of:
                seen = _added(source.name, seen, ids)
                for one in todo:
                    if not (one.partial / shard_name(last_of[k])).exists():
                        _write(one, last_of[k], ids, parts[one.modality], probe[1], views)
                ids, parts, views = [], {modality: [] for modality in parts}, []
            bar.update(len(batches[k]))


def _added(name: str, seen: NDArray[np.uint64], ids: list[Any]) -> NDArray[np.uint64]:
    """Sorted hashes of all ids so far; an id that was there before is an error now, not after hours."""
    hashes = id_hashes(name, ids)
    order = np.argsort(hashes)
    again = np.isin(hashes[order], seen)
    again[1:] |= hashes[order][1:] == hashes[order][:-1]
    if again.any():
        twice = ids[int(order[np.flatnonzero(again)[0]])]
        raise ValueError(
            f"{name}: expected every sample to have an id of its own, got {twice!r} more than once. Give the samples other ids."
        )
    return np.sort(np.concatenate([seen, hashes]))


def _write(
    one: TableBuild,
    number: int,
    ids: list[Any],
    parts: list[Tensor],
    probe: Embeddings,
    views: list[NDArray[np.uint64] | None],
) -> None:
    width = getattr(probe, one.modality).shape[1]
    if other := [part.shape[1] for part in parts if part.shape[1] != width]:
        raise ValueError(f"{one.source.name}: expected {one.modality} embeddings of width {width}, got {other[0]}. Look at encode.")
    with np.errstate(over="ignore"):  # seen below
        rows: NDArray[Any] = torch.cat([torch.empty(0, width), *parts]).numpy().astype(DTYPES[one.description["dtype"]])
    if not np.isfinite(rows).all():
        raise ValueError(f"{one.source.name}: expected embeddings that fit into float16, got larger ones. Use dtype=torch.float32.")
    known = [viewed for viewed in views if viewed is not None]
    of_all = np.concatenate(known) if one.modality == "text" and known and len(known) == len(views) else None
    write_shard(one.partial, number, ids, rows, of_all)


def _check_space(todo: list[TableBuild], probe: Embeddings) -> None:
    needed = 0
    for one in todo:
        width, size = getattr(probe, one.modality).shape[1], np.dtype(DTYPES[one.description["dtype"]]).itemsize
        rows = min(len(one.missing()) * one.description["shard_rows"], one.source.length)
        needed += rows * (width * size + 60)  # ids, hashes, index
    free = shutil.disk_usage(todo[0].path).free
    if free < needed:
        raise OSError(
            f"{todo[0].source.name}: expected {size_text(needed)} of free space in {todo[0].path}, got {size_text(free)}, "
            f"{size_text(needed - free)} too little. Free some, build elsewhere, or use dtype=torch.float16."
        )


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Within, no other process can build in this folder (where the system has file locks); False where it cannot be written.

    Raises:
        RuntimeError: another process builds there.
        OSError: a folder that cannot be written and holds no cache.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(path / ".lock")
    except OSError as error:
        if (path / MANIFEST).is_file():
            yield False
            return
        raise OSError(
            f"EmbeddingCache.build: expected a folder that can be written, got {path} ({error.strerror}). Choose another path."
        ) from error
    if lock is None:
        raise RuntimeError(f"EmbeddingCache.build: expected no other build in {path}, got one that is running. Wait for it.")
    try:
        yield True
    finally:
        lock.release(remove=True)


def published(path: Path) -> dict[str, str]:
    """Folder of each modality's finished table."""
    if not (path / MANIFEST).is_file():
        return {}
    tables = read_json(path / MANIFEST).get("tables")
    if not isinstance(tables, dict):
        raise damaged(path / MANIFEST, "no list of tables")
    return tables


def fingerprints_at(path: Path) -> dict[str, dict[str, str]]:
    """Of the finished tables; without those that are damaged, which are built anew."""
    found = {}
    for modality, folder in published(path).items():
        with suppress(RuntimeError):
            found[modality] = dict(read_json(path / folder / "table.json")["fingerprint"])
    return found


def check_together(path: Path, fingerprints: Mapping[str, Mapping[str, str]]) -> None:
    """Tables that stay must be by the same teacher as those that are built."""
    for modality, folder in published(path).items():
        if modality not in fingerprints:
            weights = next(iter(fingerprints.values()))["weights"]
            compare(path, modality, read_json(path / folder / "table.json")["fingerprint"], {"weights": weights})


def compare(path: Path, modality: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for part, value in expected.items():
        if not said_of_loading(path, found.get(part), value) if part == LOADING else found.get(part) != value:
            raise ValueError(
                f"EmbeddingCache: expected the {modality} table of {path} to be built with {part} {value!r}, got {found.get(part)!r}. "
                "Build it again with what you use now, or use what it was built with."
            )


def described(value: object, depth: int = 6) -> str:
    """An object as text that is the same in every process and differs where its parameters do; long texts by their hash."""
    text = _walked(value, depth)
    return text if len(text) <= 400 else f"{text[:80]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _walked(value: object, depth: int) -> str:
    name, parts = type(value).__qualname__, []
    if value is None or isinstance(value, (str, bool, int, float, complex, bytes, np.generic, torch.dtype, torch.device)) or not depth:
        return value if isinstance(value, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        return f"{name}{array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}"
    if isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, (set, frozenset)):
        parts = sorted(_walked(one, depth - 1) for one in value)
    elif isinstance(value, Mapping):
        parts = [part for entry in value.items() for part in entry]
    elif isinstance(value, partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        name, parts = value.__name__, [value.__self__]
    elif isinstance(value, FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        parts = [_code(value.__code__), value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in value.__closure__ or ())]
    elif isinstance(value, type):
        name = f"{value.__module__}.{value.__qualname__}"
    else:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
        state = {key: one for key, one in getattr(value, "__dict__", {}).items() if not key.startswith("_") and key != "training"}
        if isinstance(value, nn.Module):
            state |= dict(value.named_children()) | dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
        if re.fullmatch(r"<.* object>", name) and not hasattr(value, "__dict__"):
            raise ValueError(
                f"EmbeddingCache: expected an object that shows its parameters, got {name}. Pass preprocessing= or tokenizer= as a string "
                "that names it and its version."
            )
        parts = [part for key in sorted(state) for part in (key, state[key])]
    shown = [_walked(part, depth - 1) for part in parts if part is not None]
    return f"{name}({', '.join(shown)})" if shown else name


def _code(code: CodeType) -> str:
    """What a function does, without addresses, files and lines."""
    constants = [_code(one) if isinstance(one, CodeType) else _walked(one, 3) for one in code.co_consts]
    return hashlib.sha256(repr((code.co_code.hex(), code.co_names, constants)).encode()).hexdigest()[:16]


def described_view(modality: str, value: object) -> str:
    """A preprocessing by its parameters, a tokenizer by what it makes of a few texts (which its caches do not change)."""
    if modality == "text" and callable(value):
        with suppress(Exception):  # takes other arguments than a list of texts
            tokens = json.dumps(value(list(_TEXTS)), default=lambda one: one.tolist() if hasattr(one, "tolist") else dict(one))
            owner = value if isinstance(value, (FunctionType, type)) else type(value)
            return f"{owner.__module__}.{owner.__qualname__}, tokens sha256 {hashlib.sha256(tokens.encode()).hexdigest()[:16]}"
    return described(value)


def modalities_of(probe: tuple[list[Any], Embeddings]) -> dict[str, bool]:
    """The modalities that are embedded, and whether as unit vectors."""
    return {modality: _is_unit(value) for modality, value in probe[1]._asdict().items() if value is not None}


def _is_unit(value: Tensor) -> bool:
    return bool((_off_unit(value) < 2e-3).all())


def _off_unit(value: Tensor) -> Tensor:
    """How far each vector is from unit length; a zero vector counts as normalised."""
    norms = torch.linalg.vector_norm(value.float(), dim=1)
    return torch.where(norms > 0, (norms - 1).abs(), 0.0)


def largest_difference(stored: Tensor, new: Tensor) -> tuple[float, int]:
    """Distance of two embeddings relative to the norm, the largest over the rows, and its row; infinite for other widths."""
    if stored.shape != new.shape:
        return float("inf"), 0
    norms = torch.linalg.vector_norm(stored, dim=1).clamp_min(1e-12)
    difference = torch.linalg.vector_norm(new.float() - stored, dim=1) / norms
    worst = int(difference.argmax())
    return float(difference[worst]), worst


def from_first_process(value: Any) -> Any:
    """What process 0 has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    return [_moved(one, device) for one in value] if isinstance(value, (list, tuple)) else value


def _same(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one.nan_to_num(), two.nan_to_num()))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(_same(first, second) for first, second in zip(one, two, strict=True))
    return bool(np.all(one == two))


def rank_of_process() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class ProcessGoneError(RuntimeError):
    """Another process is no longer there, and why is not known."""


@contextmanager
def agreed() -> Iterator[None]:
    """Within, an error on one process becomes an error on all of them, so that none waits for ever; they leave together."""
    if not dist.is_initialized():
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    messages: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(messages, None if failed is None else str(failed))
    except RuntimeError as gone:  # by the backend, where a process is no longer there
        said = " ".join(str(gone).split())[:200]
        lost = f"EmbeddingCache.build: expected all processes to go on, got none any more of one: {said}"
        raise failed or ProcessGoneError(lost) from gone
    if failed is not None:
        raise failed
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"EmbeddingCache.build: expected all processes to go on, got an error on rank {rank}: {message}")

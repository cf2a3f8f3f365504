"""How an embedding cache is made: samples, their embeddings, tables that grow shard by shard."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm  # type: ignore[import-untyped]

from geomreg.checks import check_count, describe
from geomreg.shards import DTYPES, Shard, Table, id_hashes, read_json, shard_name, write_index, write_json, write_shard
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = [
    "BF16",
    "MANIFEST",
    "VIEW",
    "Source",
    "TableBuild",
    "agreed",
    "check_together",
    "compare",
    "described_view",
    "embed_missing",
    "modalities_of",
    "publish",
    "published",
    "rank_of_process",
]

MANIFEST = "cache.json"
VIEW = {"image": "preprocessing", "text": "tokenizer"}  # the part of a fingerprint that says how samples are seen
BF16 = "bf16 puts 53 % error on the average vector loss at a drift of 0.3 %; project and normalise in fp32 (integrations.open_clip.embed)."
_TEXTS = ("A photo of 2 cats.", "Ärger, naïve; 猫 🙂", "<tag> & it's  CamelCase\n", "a word " * 200)
_PROBE = 16  # samples that are loaded twice before anything is built


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
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
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
        self.ids: list[Any] | None = None
        if getattr(dataset, "ids", None) is not None:
            self.ids = list(dataset.ids)
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
        first, second = self.batch(rows), self.batch(rows)
        for key, value in first.items():
            if not _same(value, second.get(key)):
                raise ValueError(
                    f"{self.name}: expected the same sample whenever it is loaded, got another {key!r} the second time. A "
                    "cache holds one view of each sample: take out random crops, flips and templates (use the evaluation transform), or "
                    "keep the teacher itself."
                )
        ids, once = self._encoded(first)
        if not ids:
            raise ValueError(f"{self.name}: expected samples that can be read, got none among the first looked at. Check the paths.")
        _, twice = self._encoded(second)
        for modality in Embeddings._fields:
            one, two = getattr(once, modality), getattr(twice, modality)
            if one is not None and not torch.allclose(one, two, rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"{self.name}: expected the same {modality} embeddings for the same batch, got others the second time. encode must "
                    "draw nothing at random."
                )
        return ids, once

    def embedded(self, batches: list[list[int]]) -> Iterator[tuple[list[Any], Embeddings]]:
        """Ids and embeddings of each batch of sample numbers; fp32 or fp16 on the CPU."""
        loader = DataLoader(
            self.samples,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            yield self._encoded(self._checked(batch))

    def _encoded(self, batch: Mapping[str, Any]) -> tuple[list[Any], Embeddings]:
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

    def fingerprints(self, unit: Mapping[str, bool]) -> dict[str, dict[str, str]]:
        """For each modality what its embeddings come from."""
        weights = self.teacher.fingerprint()
        content = getattr(self.dataset, "fingerprint", None)
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
        return found


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

    def __init__(self, path: Path, modality: str, description: dict[str, Any], source: Source) -> None:
        self.path, self.modality, self.description, self.source = path, modality, description, source
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.partial = path / f"{modality}-{key}", path / f".{modality}-{key}.partial"
        self.numbers = range(-(-source.length // description["shard_rows"]))

    def finished(self) -> bool:
        """Published, with every file as long as it should be."""
        if published(self.path).get(self.modality) != self.folder.name:
            return False
        try:
            Table.open(self.folder)
        except RuntimeError:
            return False
        return True

    def prepare(self) -> None:
        """A folder to work in: new, or with the shards of a former try; a published table with damaged files loses these."""
        if self.folder.is_dir():
            shutil.rmtree(self.partial, ignore_errors=True)
            os.replace(self.folder, self.partial)
        self.partial.mkdir(exist_ok=True)
        for temporary in self.partial.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        for number in self.numbers:
            if (self.partial / shard_name(number)).exists():
                self._check_resumed(number)

    def _check_resumed(self, number: int) -> None:
        """A shard that cannot be read is made anew; one of other samples is an error."""
        file = self.partial / shard_name(number)
        try:
            hashes = Shard(self.partial, number).hashes()
        except RuntimeError:
            file.unlink()
            return
        size, source = self.description["shard_rows"], self.source
        rows = range(number * size, min((number + 1) * size, source.length))
        ids = [source.ids[k] for k in rows] if source.ids is not None else [source.samples[k]["id"] for k in (rows[0], rows[-1])]
        ids = [one.item() if isinstance(one, Tensor) else one for one in ids]
        expected = id_hashes(source.name, ids)
        if not (np.isin(hashes, expected).all() if source.ids is not None else np.isin(expected, hashes).any()):
            raise ValueError(
                f"{source.name}: expected {file} of an unfinished build to hold samples {rows[0]} to {rows[-1]}, got others: the data set "
                f"has changed. Delete {self.partial} to start anew."
            )

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
        skipped = self.source.length - sum(len(Shard(self.partial, number)) for number in filled)
        write_index(self.partial, filled, {**self.description, "skipped": skipped})
        os.replace(self.partial, self.folder)
        return skipped


def publish(path: Path, done: list[TableBuild]) -> None:
    """Finish tables and list them, all in one write; then what they replace is removed."""
    skipped = max(one.close() for one in done)
    before = published(path)
    tables = {**before, **{one.modality: one.folder.name for one in done}}
    write_json(path / MANIFEST, {"tables": tables})
    for modality, folder in before.items():
        if folder != tables[modality]:
            shutil.rmtree(path / folder, ignore_errors=True)
    if skipped:
        source = done[0].source
        warnings.warn(f"{source.name}: {skipped} of {source.length} samples could not be read and have no row", stacklevel=3)


def embed_missing(source: Source, todo: list[TableBuild], probe: tuple[list[Any], Embeddings], shard_rows: int, progress: bool) -> None:
    """Write this process's share of the missing shards."""
    rank, ranks = rank_of_process(), dist.get_world_size() if dist.is_initialized() else 1
    numbers = sorted({number for one in todo for number in one.missing()})
    if rank == 0:
        _check_space(source.name, todo, probe[1], shard_rows)
    numbers = numbers[rank::ranks]
    done = source.length // ranks - min(len(numbers) * shard_rows, source.length // ranks)
    unit = modalities_of(probe)
    batches, last_of = [], {}
    for number in numbers:
        end = min((number + 1) * shard_rows, source.length)
        batches += [list(range(k, min(k + source.batch_size, end))) for k in range(number * shard_rows, end, source.batch_size)]
        last_of[len(batches) - 1] = number
    ids: list[Any] = []
    parts: dict[str, list[Tensor]] = {one.modality: [] for one in todo}
    with tqdm(total=done + sum(map(len, batches)), initial=done, unit="samples", desc="embedding", disable=not progress or rank > 0) as bar:
        for k, (of_batch, embeddings) in enumerate(source.embedded(batches)):
            ids += of_batch
            for modality in parts if of_batch else ():
                value = getattr(embeddings, modality)
                if value is None or (unit[modality] and not _is_unit(value)):
                    got = "none" if value is None else "vectors of other length"
                    raise ValueError(f"{source.name}: expected {modality} embeddings as for the first samples, got {got}. Look at encode.")
                parts[modality].append(value)
            if k in last_of:
                for one in todo:
                    if not (one.partial / shard_name(last_of[k])).exists():
                        _write(one, last_of[k], ids, parts[one.modality], probe[1])
                ids, parts = [], {modality: [] for modality in parts}
            bar.update(len(batches[k]))


def _write(one: TableBuild, number: int, ids: list[Any], parts: list[Tensor], probe: Embeddings) -> None:
    width = getattr(probe, one.modality).shape[1]
    if other := [part.shape[1] for part in parts if part.shape[1] != width]:
        raise ValueError(f"{one.source.name}: expected {one.modality} embeddings of width {width}, got {other[0]}. Look at encode.")
    with np.errstate(over="ignore"):  # seen below
        rows: NDArray[Any] = torch.cat([torch.empty(0, width), *parts]).numpy().astype(DTYPES[one.description["dtype"]])
    if not np.isfinite(rows).all():
        raise ValueError(f"{one.source.name}: expected embeddings that fit into float16, got larger ones. Use dtype=torch.float32.")
    write_shard(one.partial, number, ids, rows)


def _check_space(name: str, todo: list[TableBuild], probe: Embeddings, shard_rows: int) -> None:
    needed = 0
    for one in todo:
        width, size = getattr(probe, one.modality).shape[1], np.dtype(DTYPES[one.description["dtype"]]).itemsize
        needed += min(len(one.missing()) * shard_rows, one.source.length) * (width * size + 60)  # ids, hashes, index
    free = shutil.disk_usage(todo[0].path).free
    if free < needed:
        raise OSError(
            f"{name}: expected {needed / 1e6:.0f} MB of free space in {todo[0].path}, got {free / 1e6:.0f} MB. Free some, build "
            "elsewhere, or use dtype=torch.float16."
        )


def published(path: Path) -> dict[str, str]:
    """Folder of each modality's finished table."""
    if not (path / MANIFEST).is_file():
        return {}
    tables: dict[str, str] = read_json(path / MANIFEST)["tables"]
    return tables


def check_together(path: Path, fingerprints: Mapping[str, Mapping[str, str]]) -> None:
    """Tables that stay must be by the same teacher as those that are built."""
    for modality, folder in published(path).items():
        if modality not in fingerprints:
            weights = next(iter(fingerprints.values()))["weights"]
            compare(path, modality, read_json(path / folder / "table.json")["fingerprint"], {"weights": weights})


def compare(path: Path, modality: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for part, value in expected.items():
        if found.get(part) != value:
            raise ValueError(
                f"EmbeddingCache: expected the {modality} table of {path} to be built with {part} {value!r}, got {found.get(part)!r}. "
                "Build it again with what you use now, or use what it was built with."
            )


def described(value: object, depth: int = 5) -> str:
    """An object as text that is the same in every process and differs where its parameters do; long texts by their hash."""
    if isinstance(value, str):
        return value
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if re.search(r"<[^<>]* object>|<function|<bound method", text) and depth:  # a repr that hides parameters, here or within
        if isinstance(value, (list, tuple)):
            name, parts = "", list(value)
        elif isinstance(value, dict):
            name, parts = "", [part for entry in value.items() for part in entry]
        elif isinstance(value, partial):
            name, parts = "partial", [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            name, parts = value.__name__, [value.__self__]
        elif isinstance(value, FunctionType):
            code = value.__code__.co_code.hex() + repr(value.__code__.co_consts) if value.__name__ == "<lambda>" else ""
            name = f"{value.__module__}.{value.__qualname__}"
            parts = [code, value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in value.__closure__ or ())]
        elif hasattr(value, "__dict__"):
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            parts = [part for key, one in sorted(vars(value).items()) for part in (key, one)]
        else:
            raise ValueError(
                f"EmbeddingCache: expected an object whose repr shows its parameters, got {text}. Pass preprocessing= or tokenizer= as a "
                "string that names it and its version."
            )
        text = f"{name}({', '.join(described(part, depth - 1) for part in parts if part is not None and part != '')})"
    return text if len(text) <= 400 else f"{text[:80]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


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
    norms = torch.linalg.vector_norm(value.float(), dim=1)
    return bool(((norms - 1).abs() < 2e-3).all())


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
    dist.all_gather_object(messages, None if failed is None else str(failed))
    if failed is not None:
        raise failed
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"EmbeddingCache.build: expected all processes to go on, got an error on rank {rank}: {message}")

"""Rows of embeddings on disk, found by id: the file format of :mod:`geomreg.cache`.

A table is a folder of safetensors shards, an index and ``table.json``. A shard holds ``embeddings`` (N, D), the ``hashes`` and the
``ids`` of its rows and a checksum for every block of rows, and of texts the ``views``, hashes of what was embedded
(:func:`geomreg.views.text_views`; older tables have none); the index holds the hashes of all rows, sorted, and where each row is.
Nothing in it is ever executed, and any safetensors reader can open it.

Rows are read at their position in the file, not through a memory map: a truncated file then is an error instead of a killed process
(SIGBUS), and resident memory is that of the rows asked for (a mapping keeps up to 64 KB for each row touched). The index is
memory-mapped.
"""

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from geomreg.units import size_text
from geomreg.views import Padding

__all__ = [
    "FORMAT",
    "Shard",
    "Table",
    "damaged",
    "id_hashes",
    "read_json",
    "shard_name",
    "write_file",
    "write_index",
    "write_json",
    "write_shard",
]

FORMAT = 1
BLOCK = 16  # rows under one checksum: 32 KB at width 512
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16}
_NAMES = {"F32": "float32", "F16": "float16", "U64": "uint64", "I64": "int64", "U32": "uint32", "U8": "uint8"}
_INDEX, _TABLE = "index.safetensors", "table.json"


def id_hashes(name: str, ids: Iterable[object]) -> NDArray[np.uint64]:
    """64-bit hashes of sample ids, which are whole numbers or strings; 7 and "7" are different ids."""
    found = []
    for one in ids:
        if isinstance(one, Tensor) and one.ndim == 0:
            one = one.item()
        if isinstance(one, str):
            text = "s" + one
        elif isinstance(one, (int, np.integer)) and not isinstance(one, bool):
            text = f"i{int(one)}"
        else:
            raise TypeError(f"{name}: expected sample ids as whole numbers or strings, got {type(one).__name__}. Name the samples so.")
        found.append(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
    return np.frombuffer(b"".join(found), dtype="<u8")


def damaged(path: Path, what: str) -> RuntimeError:
    """The error for a file that is not as it was written."""
    return RuntimeError(
        f"EmbeddingCache: expected {path} as it was written, got {what}. Delete this file and build again: only what is missing is "
        "embedded."
    )


# writing --------------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """The whole file or none of it, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some space, or write elsewhere" if full else "Look at the folder"
        raise OSError(
            f"write_file: expected to write {size_text(len(content))} to {path}, got: {error.strerror}. "
            f"{advice}; what is finished is kept, and the same call goes on from it."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file of this format, with a checksum; or the one before."""
    content = {"format": FORMAT, **content}
    write_file(path, (json.dumps({**content, "crc32": _json_checksum(content)}, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object as it was written; else an error that says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(path, "no such file") from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"unreadable content ({error})") from error
    if not isinstance(content, dict):
        raise damaged(path, "other content")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise RuntimeError(
            f"EmbeddingCache: expected format {FORMAT} in {path}, got {version}. Use the geomreg that wrote it, or a newer one."
        )
    if version != FORMAT or content.pop("crc32", None) != _json_checksum(content):
        raise damaged(path, "another checksum")
    return content


def _json_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def shard_name(number: int) -> str:
    """File of shard 0, 1, ..."""
    return f"{number:06d}.safetensors"


def write_shard(
    folder: Path, number: int, ids: Sequence[object], embeddings: NDArray[Any], views: NDArray[np.uint64] | None = None
) -> None:
    """One finished shard."""
    embeddings, hashes = np.ascontiguousarray(embeddings), id_hashes("EmbeddingCache", ids)
    names = np.frombuffer(json.dumps([one if isinstance(one, str) else int(one) for one in ids]).encode(), dtype=np.uint8)  # type: ignore[call-overload]
    content = {
        "embeddings": embeddings,
        "hashes": hashes,
        "ids": names,
        "of_ids": np.array([zlib.crc32(hashes.tobytes()), zlib.crc32(names.tobytes())], dtype=np.uint32),
        "checksums": np.array([_checksum(number, k, block) for k, block in enumerate(_blocks(embeddings))], dtype=np.uint32),
    }
    if views is not None:
        content |= {"views": views, "of_views": np.array([zlib.crc32(views.tobytes())], dtype=np.uint32)}
    write_file(folder / shard_name(number), save(content))


def write_index(folder: Path, numbers: Sequence[int], description: Mapping[str, Any]) -> None:
    """Index and ``table.json`` of a folder whose shards are complete.

    Raises:
        ValueError: two rows with one id, or two ids with one hash.
    """
    shards = [Shard(folder, number) for number in numbers]
    rows = [len(shard) for shard in shards]
    hashes = np.concatenate([shard.hashes() for shard in shards])
    for shard in shards:
        shard.ids(), shard.views()  # raise if damaged
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    (twice,) = np.nonzero(hashes[1:] == hashes[:-1])
    if len(twice):
        one, other = (_id_at(shards, rows, order[twice[0] + k]) for k in (0, 1))
        if one == other:
            raise ValueError(
                f"EmbeddingCache: expected every sample to have an id of its own, got {one!r} more than once. "
                f"Give the samples other ids, delete {folder}, and build again."
            )
        raise ValueError(
            f"EmbeddingCache: expected ids with different 64-bit hashes, got the same for {one!r} and {other!r}. Rename one of them, "
            f"delete {folder}, and build again."
        )
    index = save({"hashes": hashes, "rows": order.astype(np.int64)})
    write_file(folder / _INDEX, index)
    write_json(
        folder / _TABLE,
        {
            **description,
            "rows": int(sum(rows)),
            "width": shards[0].width,
            "dtype": shards[0].dtype,
            "index": {"bytes": len(index), "crc32": zlib.crc32(index)},
            "shards": [{"number": s.number, "rows": len(s), "bytes": s.path.stat().st_size} for s in shards],
        },
    )


def _id_at(shards: Sequence["Shard"], rows: Sequence[int], row: int) -> object:
    ends = np.cumsum(rows)
    k = int(np.searchsorted(ends, row, side="right"))
    return shards[k].ids()[int(row) - int(ends[k] - rows[k])]


def _blocks(rows: NDArray[Any]) -> Iterable[NDArray[Any]]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def _checksum(number: int, block: int, rows: NDArray[Any]) -> int:
    """Of a block of a shard: depends on its place too, so that exchanged files are found."""
    return zlib.crc32(rows.tobytes(), zlib.crc32(f"{number}/{block}".encode()))


# reading --------------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file and where their data starts."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 1 << 20:
                raise ValueError("no header")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        if 8 + length + max(ends) != size:
            raise ValueError(f"{size} bytes instead of {8 + length + max(ends)}")
    except FileNotFoundError as error:
        raise damaged(path, "no such file") from error
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, f"an unreadable header ({error})") from error
    return header, 8 + length


class Shard:
    """One shard file; rows are checked when they are first read."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number, self.path = number, folder / shard_name(number)
        self._tensors, self._data = _header(self.path)
        try:
            entry = self._tensors["embeddings"]
            (rows, self.width), self.dtype = entry["shape"], _NAMES[entry["dtype"]]
            self._rows, self._start = int(rows), self._data + int(entry["data_offsets"][0])
            self._checksums = self._array("checksums")
            if not {"hashes", "ids", "of_ids"} <= self._tensors.keys():
                raise KeyError("ids")
            if ("views" in self._tensors) != ("of_views" in self._tensors):
                raise KeyError("views")
        except (LookupError, ValueError, TypeError) as error:
            raise damaged(self.path, f"other tensors ({error})") from error
        if self.dtype not in DTYPES or len(self._checksums) != -(-self._rows // BLOCK):
            raise damaged(self.path, "other tensors")
        self._verified = np.zeros(len(self._checksums), dtype=bool)

    def __len__(self) -> int:
        return self._rows

    def hashes(self) -> NDArray[np.uint64]:
        """``(N,)`` of the ids."""
        return self._checked("hashes", 0)

    def ids(self) -> list[Any]:
        """The ids, in the order of the rows."""
        try:
            found: list[Any] = json.loads(self._checked("ids", 1).tobytes())
        except ValueError as error:
            raise damaged(self.path, f"unreadable ids ({error})") from error
        return found

    @property
    def has_views(self) -> bool:
        """Whether it knows what was embedded."""
        return "views" in self._tensors

    def views(self) -> NDArray[np.uint64] | None:
        """``(N,)`` hashes of what was embedded; None where a shard has none."""
        if not self.has_views:
            return None
        value, of_views = self._array("views"), self._array("of_views")
        if value.shape != (self._rows,) or len(of_views) != 1 or zlib.crc32(value.tobytes()) != of_views[0]:
            raise damaged(self.path, "views with another checksum")
        return value

    def _checked(self, key: str, which: int) -> NDArray[Any]:
        value = self._array(key)
        if len(self._array("of_ids")) != 2 or zlib.crc32(value.tobytes()) != self._array("of_ids")[which]:
            raise damaged(self.path, f"{key} with another checksum")
        return value

    def _array(self, key: str) -> NDArray[Any]:
        try:
            entry = self._tensors[key]
            start, end = entry["data_offsets"]
            with open(self.path, "rb") as file:
                file.seek(self._data + start)
                return np.frombuffer(file.read(end - start), dtype=_NAMES[entry["dtype"]]).reshape(entry["shape"])
        except (LookupError, ValueError, TypeError, OverflowError, OSError) as error:
            raise damaged(self.path, f"no {key} in it ({error})") from error

    def read(self, rows: NDArray[np.int64], into: NDArray[Any], places: NDArray[np.int64]) -> None:
        """Copy ``rows``, which are sorted, to ``into[places]``."""
        breaks = np.flatnonzero(np.diff(rows) > 1) + 1
        try:
            with open(self.path, "rb", buffering=0) as file:
                for run, targets in zip(np.split(rows, breaks), np.split(places, breaks), strict=True):
                    first, last = int(run[0]), int(run[-1]) + 1
                    blocks = range(first // BLOCK, -(-last // BLOCK))
                    if not self._verified[blocks.start : blocks.stop].all():
                        self._verify(file, blocks)
                    into[targets] = self._read(file, first, last)[run - first]
        except FileNotFoundError as error:
            raise damaged(self.path, "no such file") from error

    def _verify(self, file: Any, blocks: range) -> None:
        first = blocks.start * BLOCK
        data = self._read(file, first, min(blocks.stop * BLOCK, self._rows))
        for block in blocks:
            start = block * BLOCK - first
            if _checksum(self.number, block, data[start : start + BLOCK]) != self._checksums[block]:
                at = f"{block * BLOCK} to {min((block + 1) * BLOCK, self._rows) - 1}"
                raise damaged(self.path, f"rows {at} with another checksum")
            self._verified[block] = True

    def _read(self, file: Any, first: int, last: int) -> NDArray[Any]:
        dtype = np.dtype(DTYPES[self.dtype])
        size = (last - first) * self.width * dtype.itemsize
        file.seek(self._start + first * self.width * dtype.itemsize)
        content = file.read(size)
        while content and len(content) < size and (more := file.read(size - len(content))):
            content += more
        if len(content) != size:
            raise damaged(self.path, f"{len(content)} instead of {size} bytes at row {first}")
        return np.frombuffer(content, dtype=dtype).reshape(last - first, self.width)


@dataclass
class Table:
    """A published table, open for reading."""

    folder: Path
    description: dict[str, Any]
    hashes: NDArray[np.uint64]
    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    shards: dict[int, Shard] = field(default_factory=dict)
    of_shards: dict[int, NDArray[np.uint64] | None] = field(default_factory=dict)  # views, read once
    unknown_views: bool = False  # some were asked for that it does not have

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Sizes of all files and the index are checked; rows when they are first read."""
        description = read_json(folder / _TABLE)
        try:
            sizes = {folder / shard_name(entry["number"]): entry["bytes"] for entry in description["shards"]}
            path, index = folder / _INDEX, description["index"]
            sizes[path] = index["bytes"]
            ends = np.cumsum([entry["rows"] for entry in description["shards"]])
        except (KeyError, TypeError) as error:
            raise damaged(folder / _TABLE, f"no {error}") from error
        for file, expected in sizes.items():
            if not file.is_file():
                raise damaged(file, "no such file")
            if (size := file.stat().st_size) != expected:
                raise damaged(file, f"{size} instead of {expected} bytes")
        crc = 0
        with open(path, "rb") as stream:
            while part := stream.read(1 << 20):
                crc = zlib.crc32(part, crc)
        if crc != index["crc32"]:
            raise damaged(path, "another checksum")
        header, start = _header(path)
        hashes, places = (
            np.memmap(path, _NAMES[header[key]["dtype"]], "r", start + header[key]["data_offsets"][0], (int(ends[-1]),))
            for key in ("hashes", "rows")
        )
        return cls(folder, description, hashes, places, ends)

    def __len__(self) -> int:
        return int(self.description["rows"])

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Row of each hash, -1 where there is none."""
        at = np.searchsorted(self.hashes, hashes)
        inside = np.minimum(at, len(self.hashes) - 1)
        return np.where(self.hashes[inside] == hashes, self.rows[inside], -1)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """``(len(rows), D)`` in the stored precision."""
        found = np.empty((len(rows), self.description["width"]), dtype=DTYPES[self.description["dtype"]])
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        of = np.searchsorted(self.ends, ordered, side="right")
        for k in np.unique(of):
            (places,) = np.nonzero(of == k)
            entry = self.description["shards"][k]
            shard = self._shard(entry["number"], entry["rows"])
            shard.read(ordered[places] - (int(self.ends[k]) - entry["rows"]), found, order[places])
        return found

    def other_views(self, rows: NDArray[np.int64], views: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the rows were embedded from something else than ``views``; none where the table does not know."""
        found = np.zeros(len(rows), dtype=bool)
        of = np.searchsorted(self.ends, rows, side="right")
        for k in np.unique(of).tolist():
            entry = self.description["shards"][k]
            if k not in self.of_shards:
                self.of_shards[k] = self._shard(entry["number"], entry["rows"]).views()
            if (stored := self.of_shards[k]) is None:
                self.unknown_views = True
                continue
            (places,) = np.nonzero(of == k)
            found[places] = stored[rows[places] - (int(self.ends[k]) - entry["rows"])] != views[places]
        return found

    def has_views(self) -> bool:
        """Whether every shard knows what was embedded."""
        entries = self.description["shards"]
        return all(self._shard(entry["number"], entry["rows"]).has_views for entry in entries)

    @property
    def padding(self) -> Padding:
        """Of the texts behind the views."""
        return Padding(*self.description.get("padding", Padding()))

    def _shard(self, number: int, rows: int) -> Shard:
        if number not in self.shards:
            shard = Shard(self.folder, number)
            if (len(shard), shard.width, shard.dtype) != (rows, self.description["width"], self.description["dtype"]):
                raise damaged(shard.path, f"{len(shard)} rows of {shard.width} {shard.dtype}")
            self.shards[number] = shard
        return self.shards[number]

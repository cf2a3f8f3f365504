"""Millions of strings in one block of memory, which the worker processes of a loader share."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

__all__ = ["Strings", "chunks", "fingerprint", "repeats", "rows_of"]

T = TypeVar("T")
_CODEC = ("utf-8", "surrogateescape")  # file names need not be UTF-8


class Strings(Sequence[str]):
    """Immutable strings: one ``bytes`` and where each begins and ends in it.

    A list would hold an object of 50 bytes more for each string, whose reference count every reading process writes,
    so that forked workers soon copy all of it. Several ``Strings`` may share one ``bytes``.
    """

    def __init__(self, blob: bytes, starts: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.starts, self.ends = blob, starts, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "Strings":
        """Copy of ``texts``, which are held as Python objects meanwhile."""
        data = [text.encode(*_CODEC) for text in texts]
        return cls.of_lengths(b"".join(data), np.fromiter(map(len, data), np.int64, len(data)))

    @classmethod
    def concatenate(cls, parts: Iterable["Strings"]) -> "Strings":
        """Packed parts, one after another."""
        parts = list(parts)
        return cls.of_lengths(b"".join(part.blob for part in parts), np.concatenate([part.lengths for part in parts]))

    @classmethod
    def of_lengths(cls, blob: bytes, lengths: np.ndarray) -> "Strings":
        """The strings of ``lengths`` bytes that ``blob`` is made of."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(blob, offsets[:-1], offsets[1:])

    @property
    def lengths(self) -> np.ndarray:
        """``(N,)`` lengths in bytes."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Strings(self.blob, self.starts[index], self.ends[index])
        return self.blob[self.starts[index] : self.ends[index]].decode(*_CODEC)

    def __iter__(self) -> Iterator[str]:
        for rows in chunks(range(len(self))):
            part = slice(rows[0], rows[-1] + 1)
            for start, end in zip(self.starts[part].tolist(), self.ends[part].tolist(), strict=True):
                yield self.blob[start:end].decode(*_CODEC)


def chunks(items: Iterable[T], size: int = 256) -> Iterator[list[T]]:
    """The items in lists of ``size``, the last one shorter; few at once, or lists of lists keep the garbage collector busy."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def repeats(texts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """``(row, first row, number of earlier rows)`` of every text that an earlier row has too, in order."""
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    seen: dict[str, tuple[int, int]] = {}
    for row in np.flatnonzero(counts[inverse] > 1).tolist():
        text = texts[row]
        first, count = seen.get(text, (row, 0))
        seen[text] = first, count + 1
        if count:
            yield row, first, count


def rows_of(texts: Sequence[str], among: Sequence[str]) -> np.ndarray:
    """``(len(texts),)`` int64: the first row of ``among`` that holds each text, -1 if none does; 16 bytes a row meanwhile."""
    hashes = np.fromiter(map(hash, among), np.int64, len(among))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    wanted = np.fromiter(map(hash, texts), np.int64, len(texts))
    ends = np.searchsorted(hashes, wanted, side="right").tolist()
    found = np.full(len(texts), -1, np.int64)
    for row, (start, text) in enumerate(zip(np.searchsorted(hashes, wanted).tolist(), texts, strict=True)):
        found[row] = next((other for other in order[start : ends[row]].tolist() if among[other] == text), -1)
    return found


def fingerprint(*columns: Collection[str]) -> str:
    """Hexadecimal digest of the columns' strings, their order and their borders; the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        for chunk in chunks(column):
            data = [text.encode(*_CODEC) for text in chunk]
            digest.update(np.fromiter(map(len, data), "<u8", len(data)).tobytes())
            digest.update(b"".join(data))
    return digest.hexdigest()

"""Rows of CSV and TSV files, their separator found, and lines of text files; every damage named by its line."""

import contextlib
import csv
import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence

__all__ = ["read_columns", "read_lines", "read_rows"]

SEPARATORS = ("\t", ",", ";", "|")
_SAMPLE = 1 << 16  # characters, for finding the separator


def read_rows(name: str, path: str, *, separator: str | None = None, known: Collection[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """Line number, from 1, and fields of each row that is not blank; at least one.

    Quotes are those of the csv module, read strictly: a stray one would otherwise swallow the rows up to the next.

    Args:
        name: of the callable, for messages.
        path: UTF-8 file with or without byte order mark.
        separator: one character; by default the one of tab, comma, semicolon and pipe that splits the first row, best
            into fields that are ``known``, and most of the next rows into as many fields.
        known: lower-case names that the first row may have.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: a separator of several characters, an empty file, another encoding, NUL bytes, stray quotes, a row with more or
            fewer fields than the first.
    """
    if separator is not None and (not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n'):
        raise ValueError(f"{name}: expected separator as one character, got {separator!r}. Pass ',' or leave it out.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: expected a CSV or TSV file, got none at {path}. Check the path.")
    line, width = 1, 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if separator is None:
                if "\0" in (sample := file.read(_SAMPLE)):
                    raise _nul(name, path)
                separator = _found(sample, known)
                file.seek(0)
            reader = csv.reader(_without_nul(name, path, file), delimiter=separator, strict=True)
            for fields in reader:
                if fields:
                    width = width or len(fields)
                    if len(fields) != width:
                        raise ValueError(
                            f"{name}: expected {width} fields a row as in the first, separated by {separator!r}, got {len(fields)} in "
                            f"line {line} of {path}. Put quotes around texts with separators in them."
                        )
                    yield line, fields
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name}: expected rows that Python's csv module reads, got {error} (line {line} of {path}). Put quotes around texts "
            "that begin with a quote, and double those inside."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(name, path) from error
    if not width:
        raise ValueError(f"{name}: expected rows in {path}, got an empty file. Write a header and a row for each sample.")


def read_columns(name: str, path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number, from 1, and the fields of ``columns`` in each row after the header of a CSV file; raises as :func:`read_rows`."""
    rows = read_rows(name, path, separator=",")
    header = [field.strip() for field in next(rows)[1]]
    if not set(columns) <= set(header):
        raise ValueError(
            f"{name}: expected the columns {', '.join(map(repr, columns))} in {path}, got {', '.join(map(repr, header))}. "
            "Pass the original file."
        )
    positions = [header.index(column) for column in columns]
    for line, fields in rows:
        yield line, [fields[position] for position in positions]


def read_lines(name: str, path: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank in a UTF-8 file with or without byte order mark.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: another encoding, NUL bytes.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: expected a text file, got none at {path}. Check the path.")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(_without_nul(name, path, file), 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, path) from error


def _found(sample: str, known: Collection[str]) -> str:
    def fit(separator: str) -> tuple[bool, int, float, int]:
        table = [row for row in csv.reader(io.StringIO(sample, newline=""), delimiter=separator) if row]
        first, rows = table[0], table[1:-1] if len(sample) == _SAMPLE else table[1:]  # the last may be cut
        hits = sum(field.strip().casefold() in known for field in first)
        return len(first) > 1, hits, sum(len(row) == len(first) for row in rows) / max(1, len(rows)), len(first)

    return max(SEPARATORS, key=fit) if sample.strip("\r\n") else SEPARATORS[0]


def _not_utf8(name: str, path: str) -> ValueError:
    """The error that names the first line that is not UTF-8, of a file that has one."""
    number = 0
    with open(path, "rb") as file, contextlib.suppress(UnicodeDecodeError):
        for line in file:
            number += 1
            line.decode()
    return ValueError(f"{name}: expected UTF-8, got other bytes in line {number} of {path}. Save it as UTF-8.")


def _without_nul(name: str, path: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines; Python's csv module takes NUL for text from 3.11 on, and files have no names with it."""
    for line in lines:
        if "\0" in line:
            raise _nul(name, path)
        yield line


def _nul(name: str, path: str) -> ValueError:
    """The error that names the first line with a NUL byte, of a file that has one."""
    with open(path, "rb") as file:
        number = next(number for number, line in enumerate(file, 1) if b"\0" in line)
    return ValueError(
        f"{name}: expected text, got a NUL byte in line {number} of {path}. Save it as UTF-8 if it is UTF-16, or copy it anew: a write "
        "that was cut off leaves such bytes."
    )

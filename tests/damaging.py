"""What damage does to files that are read, see ``files_read.py``.

The tests damage each file in a few ways, ``benchmarks/reliability/corruptions.py`` in many.
"""

import hashlib
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from files_read import Kind

ERRORS = (ValueError, TypeError, RuntimeError, OSError)  # that the command says in one line
LINE = re.compile(r"(\S+: ){1,2}expected .+, got .+\. \S.*")


def damages(file: Path) -> list[str]:
    """What can be done to a file of its kind."""
    more = {
        ".json": ["key", "lost key", "type"],
        ".jsonl": ["line"],
        ".csv": ["line"],
        ".tsv": ["line"],
        ".txt": ["line"],
        ".yaml": ["line"],
    }
    return ["bit", "header bit", "cut", "insert", "swap", "empty", "zeros", "gone", *more.get(file.suffix, [])]


def damaged(kind: str, content: bytes, generator: random.Random, other: bytes = b"{}") -> bytes | None:
    """The content with damage; None: no file."""
    place = generator.randrange(len(content))
    if kind in ("bit", "header bit"):
        place = place if kind == "bit" else place % 300
        return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
    if kind == "line":
        lines = content.split(b"\n")
        row = generator.randrange(len(lines) - 1)
        return b"\n".join([*lines[:row], lines[row][: generator.randrange(len(lines[row]) + 1)] + b"\xff{", *lines[row + 1 :]])
    if kind in ("key", "lost key", "type"):
        return json.dumps(_altered(json.loads(content), kind, generator), indent=1).encode()
    return {
        "cut": content[:place],
        "insert": content[:place] + bytes([generator.randrange(256)]) + content[place:],
        "swap": other,
        "empty": b"",
        "zeros": content[:place] + bytes(len(content) - place),  # of a write that a lost machine did not finish
        "gone": None,
    }[kind]


def every_key(value: Any) -> Iterator[Any]:
    """Copies of a JSON value with one key renamed or lost, each key at each depth; of the entries of a list the first two."""
    if isinstance(value, dict):
        for key in value:
            yield {(one + "x" if one == key else one): entry for one, entry in value.items()}
            yield {one: entry for one, entry in value.items() if one != key}
            yield from ({**value, key: changed} for changed in every_key(value[key]))
    elif isinstance(value, list):
        for place, entry in enumerate(value[:2]):
            yield from ([*value[:place], changed, *value[place + 1 :]] for changed in every_key(entry))


def _altered(value: Any, kind: str, generator: random.Random) -> Any:
    """A copy with one key renamed or lost, or one value of another type, at a random depth."""
    if isinstance(value, dict) and value:
        key = generator.choice(list(value))
        if isinstance(value[key], (dict, list)) and value[key] and generator.random() < 0.7:
            return {**value, key: _altered(value[key], kind, generator)}
        if kind == "key":
            return {(one + "x" if one == key else one): entry for one, entry in value.items()}
        if kind == "lost key":
            return {one: entry for one, entry in value.items() if one != key}
        return {**value, key: generator.choice([one for one in (None, -1, "text", [], {}, 1e308) if one != value[key]])}
    if isinstance(value, list) and value:
        place = generator.randrange(len(value))
        return [_altered(one, kind, generator) if row == place else one for row, one in enumerate(value)]
    return None if value is not None else 0


def digest(value: Any) -> str:
    """Of nested values and tensors."""
    if isinstance(value, torch.Tensor):
        value = [str(value.dtype), list(value.shape), value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    if isinstance(value, dict):
        value = [[str(key), digest(one)] for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        value = [digest(one) for one in value]
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


class Damaged:
    """The files of a kind, which are damaged one at a time and come back."""

    def __init__(self, make: Callable[[Path], Kind], folder: Path) -> None:
        self.folder, self.kind = folder, make(folder)
        self.kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.expected = digest(self.kind.read())
        self.restore()

    def restore(self) -> None:
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in self.kept]:
            path.unlink()
        for path, before in self.kept.items():
            if not path.is_file() or path.read_bytes() != before:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(before)

    def damaged(self, file: Path, kind: str, generator: random.Random, other: bytes = b"{}") -> bytes | None:
        """Another content of the file; None: no file."""
        while (content := damaged(kind, self.kept[file], generator, other)) == self.kept[file]:
            pass
        return content

    def outcome(self, file: Path, content: bytes | None) -> tuple[str, str]:
        """What the reader makes of the damage, see ``corruptions.py``, and what it says."""
        file.unlink() if content is None else file.write_bytes(content)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                same = digest(self.kind.read()) == self.expected
            said = next((str(one.message) for one in caught if file.name in str(one.message) or str(file.parent) in str(one.message)), "")
            anew = said or (file.read_bytes() if file.is_file() else None) != content
            if same:
                return "made anew" if anew else "harmless", said
            return ("warned" if said else "silent" if self.kind.checked else "other data"), said
        except ERRORS as error:
            return self._refused(file, " ".join(str(error).split()))
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            self.restore()

    def _refused(self, file: Path, line: str) -> tuple[str, str]:
        if file.name not in line and str(file.parent) not in line:
            return ("refused, naming the option" if self.kind.options else "refused without the file's name"), line
        return "refused" if LINE.fullmatch(line) else "refused without advice", line

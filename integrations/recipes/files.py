"""Files that a disk may have no room for, and that may come back damaged: errors in one line, with the path."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["new_folder", "put_in_place", "read_json", "writing"]


@contextmanager
def writing(name: str, path: Path) -> Iterator[None]:
    """Write to ``path`` within; what goes wrong with the disk is said with it. Messages begin with ``name``.

    Raises:
        OSError: no space, no permission; also where safetensors, which has an error of its own, could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(
            f"{name}: expected to write {path}, got: {reason.rstrip('.')}. Free some space or look at the folder, and give the same "
            "command again: a run goes on from its last checkpoint."
        ) from error


def read_json(name: str, path: Path, kind: type[Any], what: str, advice: str) -> Any:
    """The content of a JSON file in UTF-8, with or without byte order mark; messages begin with ``name`` and name the file.

    Args:
        name: of the caller.
        path: of the file.
        kind: type that its content must have.
        what: should be in it.
        advice: what to do about another.

    Raises:
        ValueError: missing, damaged, or of another type than ``kind``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected {what} in {path}, got a file that cannot be read ({error}). {advice}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{name}: expected {what} in {path}, got {type(content).__name__}. {advice}")
    return content


def new_folder(folder: Path) -> Path:
    """A hidden folder beside ``folder`` to write to, for :func:`put_in_place`.

    What calls that were killed left of it is mended first: a folder that had been put aside comes back, the rest goes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _aside(folder).exists() and not folder.exists():
        os.replace(_aside(folder), folder)
    for path in folder.parent.iterdir():
        if path.name.startswith(_hidden(folder, "")):
            shutil.rmtree(path)
    temporary = folder.with_name(_hidden(folder, secrets.token_hex(4)))
    temporary.mkdir()
    return temporary


def put_in_place(new: Path, folder: Path) -> None:
    """Give a folder, whole and beside it, the name of ``folder``; one that is there is put aside meanwhile, then removed."""
    if folder.exists():
        shutil.rmtree(_aside(folder), ignore_errors=True)
        os.replace(folder, _aside(folder))
    os.replace(new, folder)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(_hidden(folder, "old"))


def _hidden(folder: Path, end: str) -> str:
    return f".{folder.name}.geomreg-{end}"

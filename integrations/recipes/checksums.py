"""Checksums of a folder's files, in a file beside them: checkpoints and exported models have one, and are compared with it when read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CHECKSUMS", "check_export", "checksum", "difference", "write_checksums"]

CHECKSUMS = "checksums.json"
_LOOKED_AT: dict[tuple[Any, ...], str | None] = {}  # what is wrong with folders whose files have been read already


def write_checksums(folder: Path, *names: str) -> Path:
    """Write the checksums of all files in ``folder``, or of those with these names; returns the file.

    Raises:
        OSError: no space, say.
    """
    listed = names or sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _digest(folder / name) for name in listed if name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files, "checksum": checksum(files)}, indent=1), encoding="utf-8")
    return folder / CHECKSUMS


def difference(folder: Path) -> str | None:
    """The first thing in a folder that is not as it was when its checksums were written; None if there is none.

    Files without a checksum may be there too. All files are read; a process does so again only after one of them has changed its size
    or time.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.exists())  # not a link that leads nowhere
    stamps = ((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path in paths)
    key = (str(folder.absolute()), *stamps)
    if key not in _LOOKED_AT:
        _LOOKED_AT[key] = _difference(folder)
    return _LOOKED_AT[key]


def check_export(name: str, folder: Path) -> None:
    """The files of an exported model are those that were written; an export without checksums is not looked at.

    Args:
        name: of the caller, for the message.
        folder: of the export.

    Raises:
        ValueError: another content, or a missing file.
    """
    if (folder / CHECKSUMS).exists() and (reason := difference(folder)) is not None:
        raise ValueError(
            f"{name}: expected the model in {folder} as it was written, got {reason}. Restore it from a copy, or export the model anew. If "
            f"you changed it on purpose, delete {folder / CHECKSUMS}: nothing is compared then."
        )


def _difference(folder: Path) -> str | None:
    try:
        content = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {CHECKSUMS} (an older geomreg wrote none)"
    except (OSError, ValueError):
        return f"a damaged {CHECKSUMS}"
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("checksum") != checksum(files):
        return f"a damaged {CHECKSUMS}"
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            return f"no {name}"
        if _digest(file) != digest:
            return f"another content of {name}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksum(content: Mapping[str, Any]) -> str:
    """Of what a JSON file holds, beside the checksum itself."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

"""Whether a digest of image paths as written is that of the same files, written otherwise: absolute, or relative to another folder."""

import os
from collections.abc import Collection, Iterator, Sequence

from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint

__all__ = ["spelt_otherwise"]

_UP = 3  # so many ".." at most before a relative path


def spelt_otherwise(digest: str, ids: Collection[str], files: Sequence[str]) -> bool:
    """Whether ``digest`` is that of ``ids`` and of these files under another spelling.

    Tried are absolute paths, and paths relative to every folder that holds all of the files, also with ``./`` or a few ``../`` before
    them. Links are not followed. Where the folder lies plays no part in a relative spelling.

    Args:
        digest: of :func:`~geomreg.integrations.recipes.data.strings.fingerprint`.
        ids: N strings.
        files: N paths from which each image is opened, N > 0.
    """
    known = Strings.concatenate(Strings.pack(os.path.abspath(path) for path in chunk) for chunk in chunks(files))
    if fingerprint(ids, known) == digest:
        return True
    for folder in _above(os.path.commonpath([os.path.dirname(min(known)), os.path.dirname(max(known))])):
        length = len(folder.encode("utf-8", "surrogateescape")) + (not folder.endswith(os.sep))
        relative = Strings(known.blob, known.starts + length, known.ends)
        for before in ("", "./", *("../" * count for count in range(1, _UP + 1))):
            if fingerprint(ids, relative if not before else _Prefixed(before, relative)) == digest:
                return True
    return False


def _above(folder: str) -> Iterator[str]:
    """The folder, and those that it lies in."""
    yield folder
    while (parent := os.path.dirname(folder)) != folder:
        yield (folder := parent)


class _Prefixed(Collection[str]):
    """Strings with the same beginning before each."""

    def __init__(self, before: str, texts: Strings) -> None:
        self.before, self.texts = before, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return (self.before + text for text in self.texts)

    def __contains__(self, text: object) -> bool:
        return any(text == one for one in self)

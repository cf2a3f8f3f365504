"""Image-text pairs listed in a CSV or TSV file."""

import difflib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geomreg.integrations.recipes.data.sample import check_reader, check_some_image, loading_of, read_sample
from geomreg.integrations.recipes.data.spelling import spelt_otherwise
from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint, repeats
from geomreg.integrations.recipes.data.table import read_rows
from geomreg.integrations.recipes.data.texts import Tokenizer

__all__ = ["CAPTION_KEYS", "ID_KEYS", "IMAGE_KEYS", "CsvPairs", "LabelledPairs", "find_column"]

IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file_name", "filename", "img")
CAPTION_KEYS = ("title", "caption", "text", "label_text", "description")
ID_KEYS = ("id",)
_MOST_CLASSES = 10_000


class CsvPairs(Dataset[dict[str, Any]]):
    """Image-text pairs of a CSV or TSV file with a header; the files of FLYP and open_clip as they are.

    Sample i is ``{"id": str, "image": transform(image), "text": (L,) int64}`` with the asked modalities only, and
    ``{"id", "broken": "<path>: <reason>"}`` if its image is missing or cannot be decoded, or its caption is empty. Images are
    read upright, blended on white where they are transparent, and scaled from more than 8 bits, or as the ``images`` of a
    :class:`~geomreg.integrations.recipes.data.rgb.Preprocessing` say: open_clip's loader is one of its options. What was converted is
    at ``"converted"``, where something was. PIL's limit against decompression bombs stays as it is set.

    **Ids** are those of the id column, which must be unique. Without one they are the image paths as written, and ``path#1``,
    ``path#2``, ... for further rows with the same image: unique, and the same after captions were edited. Without images they
    are the numbers of the rows, from 0.

    Image paths are taken as written: absolute ones, ``..`` and links lead out of ``root``, so read tables of others only where any file
    that they name may be read.

    The columns are packed (:class:`~geomreg.integrations.recipes.data.strings.Strings`): forked workers share them.

    Args:
        path: UTF-8 file, with or without byte order mark; quotes as in Python's csv module; blank lines are ignored.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64; may be None without the modality ``"text"``.
        image_key: column of image paths; by default the first of :data:`IMAGE_KEYS` that there is.
        caption_key: column of captions; by default the first of :data:`CAPTION_KEYS` that there is.
        id_key: column of ids; by default ``id`` if there is one.
        separator: by default found among tab, comma, semicolon and pipe.
        root: folder of relative image paths; by default that of the file.
        modalities: what samples hold; ``("text",)`` opens no image and needs no column of them, ``("image",)`` likewise.
        strict: raise on a broken image.

    Attributes:
        ids: N strings.
        transform, tokenizer, modalities: as given.

    Raises:
        FileNotFoundError: no such file, or neither the first image is there nor any of some others.
        ValueError: an empty or damaged file, a missing column, a NUL byte, an empty path or id, an id twice; with ``strict`` a
            broken sample.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None,
        image_key: str | None = None,
        caption_key: str | None = None,
        id_key: str | None = None,
        separator: str | None = None,
        root: str | os.PathLike[str] | None = None,
        modalities: tuple[str, ...] = ("image", "text"),
        strict: bool = False,
    ) -> None:
        self.modalities = check_reader("CsvPairs", modalities, transform, tokenizer)
        self.path = os.fspath(path)
        self.root = os.path.abspath(os.path.dirname(self.path) if root is None else root)
        self.transform, self.tokenizer, self.strict = transform, tokenizer, strict
        given = [key for key in (image_key, caption_key, id_key) if key is not None]
        known = {key.casefold() for key in (*given, *IMAGE_KEYS, *CAPTION_KEYS, *ID_KEYS)}
        rows = read_rows("CsvPairs", self.path, separator=separator, known=known)
        header = [field.strip() for field in next(rows)[1]]
        source = ("CsvPairs", self.path, header)
        image = find_column(*source, "image", image_key, IMAGE_KEYS, needed="image" in self.modalities)
        caption = find_column(*source, "caption", caption_key, CAPTION_KEYS, needed="text" in self.modalities)
        identity = find_column(*source, "id", id_key, ID_KEYS, needed=False)
        wanted = {
            "path": image if "image" in self.modalities or identity is None else None,
            "caption": caption if "text" in self.modalities else None,
            "id": identity,
        }
        parts: dict[str, list[Strings]] = {what: [] for what, column in wanted.items() if column is not None}
        lines = []
        for chunk in chunks(rows):
            lines.append(np.array([line for line, _ in chunk], np.uint32))
            for what in parts:
                texts = [fields[wanted[what]] for _, fields in chunk]
                empty = [] if what == "caption" else [line for line, text in zip(lines[-1], texts, strict=True) if not text.strip()]
                if empty:
                    raise ValueError(
                        f"CsvPairs: expected a text in every row of the {what} column, got an empty one in line {empty[0]} of {self.path}. "
                        "Fill it in or leave the row out."
                    )
                parts[what].append(Strings.pack(texts))
        if not lines:
            raise ValueError(f"CsvPairs: expected rows after the header of {self.path}, got none. Write a row for each sample.")
        self._lines = np.concatenate(lines)
        columns = {what: Strings.concatenate(parts.pop(what)) for what in list(parts)}
        self._captions, self._paths = columns.get("caption"), columns.get("path")
        self.ids: Sequence[str] = self._ids(columns.get("id"), id_key)
        if "image" in self.modalities:
            check_some_image("CsvPairs", self.path, self, "Pass root=, the images' folder.")

    def _ids(self, given: Strings | None, id_key: str | None) -> Strings:
        if given is not None:
            hint = "Make them unique."
            if id_key is None:
                hint = "Make them unique, or rename the column so that paths become the ids."
            return self._checked(given, hint)
        if self._paths is None:
            return Strings.concatenate(Strings.pack(map(str, chunk)) for chunk in chunks(range(len(self))))
        counts = np.zeros(len(self), np.uint32)
        for row, _, count in repeats(self._paths):
            counts[row] = count
        if not counts.any():
            return self._paths
        numbered = (f"{path}#{count}" if count else path for path, count in zip(self._paths, counts, strict=True))
        ids = Strings.concatenate(map(Strings.pack, chunks(numbered)))
        self._paths = Strings(ids.blob, ids.starts, ids.starts + self._paths.lengths)  # within the ids: no second copy
        return self._checked(ids, "Pass id_key=, a column of unique ids.")

    def _checked(self, ids: Strings, hint: str) -> Strings:
        for row, first, _ in repeats(ids):
            raise ValueError(
                f"CsvPairs: expected ids that differ, got {ids[row]!r} in lines {self._lines[first]} and {self._lines[row]} of "
                f"{self.path}. {hint}"
            )
        return ids

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.root, self._paths[index])

    def caption(self, index: int) -> str:
        """Text of a sample."""
        text: str = self._captions[index]
        return text

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.image_file(index) if "image" in self.modalities else ""
        caption = self._captions[index] if "text" in self.modalities else ""
        return read_sample(self, self.ids[index], path, caption, where=f" (line {self._lines[index]} of {self.path})")

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest of the ids and of the captions or image paths as written, in order; root plays no part."""
        columns = {"image": self._paths, "text": self._captions}
        return {modality: fingerprint(self.ids, columns[modality]) for modality in self.modalities}

    def same_files(self, digest: str) -> bool:
        """Whether the digest of images in a fingerprint is of these files, their paths written otherwise."""
        return spelt_otherwise(digest, self.ids, [self.image_file(row) for row in range(len(self))])


class LabelledPairs(CsvPairs):
    """Pairs whose captions are the names of classes: each different caption is one, so that a classification can be trained on them.

    Samples as of :class:`CsvPairs`, with ``"label"``.

    Args:
        path: as of :class:`CsvPairs`; must have captions.
        options: of :class:`CsvPairs`.

    Attributes:
        classes: the C different captions, in the order of their first rows.
        labels: ``(N,)`` int64, indices into ``classes``.
        templates: ``("{}",)``: a caption is a whole text.

    Raises:
        ValueError: as :class:`CsvPairs`; an empty caption, one caption for all, or more than 10,000 different ones.
    """

    templates = ("{}",)

    def __init__(self, path: str | os.PathLike[str], *, modalities: tuple[str, ...] = ("image", "text"), **options: Any) -> None:
        super().__init__(path, modalities=("image", "text"), **options)
        self.modalities = modalities
        for line, caption in zip(self._lines, self._captions, strict=True):
            if not caption.strip():
                raise ValueError(
                    f"LabelledPairs: expected the name of a class as every caption, got an empty one in line {line} of {self.path}. "
                    "Fill it in or leave the row out."
                )
        number: dict[str, int] = {}
        self.labels = np.fromiter((number.setdefault(caption, len(number)) for caption in self._captions), np.int64, len(self))
        self.classes = tuple(number)
        if not 2 <= len(number) <= _MOST_CLASSES:
            raise ValueError(
                f"LabelledPairs: expected captions that are names of 2 to {_MOST_CLASSES} classes in {self.path}, got {len(number)} "
                "different ones. Use a contrastive method for captions."
            )

    def class_texts(self, template: str) -> list[str]:
        """The text of each of the C classes."""
        return [template.replace("{}", name) for name in self.classes]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return sample if "broken" in sample else {**sample, "label": int(self.labels[index])}


def find_column(name: str, path: str, header: list[str], what: str, key: str | None, usual: tuple[str, ...], *, needed: bool) -> int | None:
    """Position of the column ``key``, by default of the first of the ``usual`` names that the header has; None if it has none.

    Raises:
        ValueError: no such column, unless it is not ``needed``; two of this name.
    """
    listed = ", ".join(map(repr, header))
    if key is None:
        lower = [column.casefold() for column in header]
        position = next((lower.index(column) for column in usual if column in lower), None)
        if position is None and needed:
            raise ValueError(
                f"{name}: expected a column of {what}s in {path} ({', '.join(usual)}), got the columns {listed}. "
                f"Pass {what}_key=, or write a header as the first line."
            )
        if position is None:
            return None
        key = header[position]
    if key not in header:
        near = difflib.get_close_matches(key, header, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Pass one of these."
        raise ValueError(f"{name}: expected {what}_key as one of the columns {listed} of {path}, got {key!r}. {hint}")
    if header.count(key) > 1:
        raise ValueError(f"{name}: expected one column {key!r} in {path}, got {header.count(key)} among {listed}. Rename the others.")
    return header.index(key)

"""Some samples of a data set, by their ids."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint, rows_of

__all__ = ["Subset"]


class Subset(Dataset[dict[str, Any]]):
    """The samples of a data set whose ids are in a text file, in the data set's order: anchors that ``geomreg retrieve`` found, say.

    Samples are the data set's own, texts and templates included, so that a cache of the whole serves its subsets. Attributes that are
    not listed (``classes``, all of them; ``templates``, ``class_texts``, ``transform``, ``tokenizer``, ``modalities``) are the data set's.

    Args:
        dataset: one of the readers, or another map-style data set with ``ids``, strings.
        path: file with an id a line as the data set writes it (UTF-8 with surrogateescape, with or without byte order mark); blank lines
            are ignored, and an id that is there twice counts once.

    Attributes:
        dataset, path: as given.
        rows: ``(N,)`` int64, ascending: rows of the data set.
        ids: N strings.
        labels, groups: ``(N,)``, if the data set has them; groups ascend where the data set's do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ids in it, or ids that the data set lacks.
    """

    def __init__(self, dataset: Any, path: str | os.PathLike[str]) -> None:
        self.dataset, self.path = dataset, os.fspath(path)
        wanted = _read(self.path)
        found = rows_of(wanted, dataset.ids)
        if (lacking := np.flatnonzero(found < 0)).size:
            raise ValueError(
                f"Subset: expected ids of the data set in {self.path}, got {lacking.size} of {len(wanted)} that it lacks, the first "
                f"{wanted[lacking[0]]!r}. Its own look like {dataset.ids[0]!r}."
            )
        self.rows = np.unique(found)
        self.ids: Sequence[str] = Strings.concatenate(
            Strings.pack(dataset.ids[row] for row in chunk) for chunk in chunks(self.rows.tolist())
        )
        for name in ("labels", "groups"):
            if (values := getattr(dataset, name, None)) is not None:
                setattr(self, name, values[self.rows])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(self.rows[index])]

    def image_file(self, index: int) -> str:
        """Path of a sample's image, where the data set has files of them."""
        return str(self.dataset.image_file(int(self.rows[index])))

    def caption(self, index: int) -> str:
        """Text of a sample, where the data set has captions."""
        return str(self.dataset.caption(int(self.rows[index])))

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest of the data set's and of the ids."""
        return {modality: fingerprint((whole,), self.ids) for modality, whole in self.dataset.fingerprint.items()}


def _read(path: str) -> Strings:
    """The lines, without blank ones."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Subset: expected a text file of ids, got none at {path}. Check the path.")
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # only here: str.splitlines knows more ends of lines
    lines = [line.removesuffix(b"\r") for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"Subset: expected an id a line in {path}, got none. Write some, or use the whole data set.")
    return Strings.of_lengths(b"".join(lines), np.fromiter(map(len, lines), np.int64, len(lines)))

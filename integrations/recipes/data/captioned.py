"""A further caption for each sample: what a captioning model says of the target images (ARF)."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from geomreg.checks import check_callable
from geomreg.integrations.recipes.data.images import broken_sample
from geomreg.integrations.recipes.data.pairs import CAPTION_KEYS, ID_KEYS, IMAGE_KEYS, find_column
from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint, repeats, rows_of
from geomreg.integrations.recipes.data.table import read_rows
from geomreg.integrations.recipes.data.texts import Tokenizer, tokenize

__all__ = ["Captioned"]


class Captioned(Dataset[dict[str, Any]]):
    """A data set whose samples have a caption of their own besides, from a CSV or TSV file, as token ids at ``"caption"``.

    ARF (arXiv 2404.06244) trains on captions of the target images by BLIP-2 beside the class texts. The file is made beforehand, by any
    captioning model, with a row for each sample: its id, and its caption. Broken samples stay as they are, and one whose caption here is
    empty is broken. Attributes that are not
    listed are the data set's.

    Args:
        dataset: one of the readers, or another map-style data set with ``ids``, strings.
        path: UTF-8 file as of :class:`CsvPairs`; rows of samples that the data set lacks are ignored.
        tokenizer: as open_clip's; by default the data set's.
        id_key: column of the samples' ids, as the data set writes them: for class folders, paths relative to it. By default ``id``, or if
            there is none the first column of image paths that :class:`CsvPairs` knows.
        caption_key: column of captions; by default the first that :class:`CsvPairs` knows.
        separator: by default found among tab, comma, semicolon and pipe.

    Attributes:
        dataset, path, tokenizer: as given.
        captions: N strings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or damaged file, a missing column, two captions for a sample; samples without a row.
        TypeError: the tokenizer is no function, or gives something else.
    """

    def __init__(
        self,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        id_key: str | None = None,
        caption_key: str | None = None,
        separator: str | None = None,
    ) -> None:
        self.dataset, self.path = dataset, os.fspath(path)
        self.tokenizer = dataset.tokenizer if tokenizer is None else tokenizer
        check_callable("Captioned", "tokenizer", self.tokenizer, "of a list of strings")
        usual = (*ID_KEYS, *IMAGE_KEYS)
        known = {key.casefold() for key in (id_key, caption_key, *usual, *CAPTION_KEYS) if key is not None}
        rows = read_rows("Captioned", self.path, separator=separator, known=known)
        header = [field.strip() for field in next(rows)[1]]
        identity = find_column("Captioned", self.path, header, "id", id_key, usual, needed=True)
        caption = find_column("Captioned", self.path, header, "caption", caption_key, CAPTION_KEYS, needed=True)
        ids, captions, lines = [], [], []
        for chunk in chunks(rows):
            lines.append(np.array([line for line, _ in chunk], np.uint32))
            ids.append(Strings.pack(fields[identity] for _, fields in chunk))
            captions.append(Strings.pack(fields[caption].strip() for _, fields in chunk))
        if not lines:
            raise ValueError(f"Captioned: expected rows after the header of {self.path}, got none. Write a row for each sample.")
        self.captions: Sequence[str] = _of_samples(
            self.path, dataset.ids, Strings.concatenate(ids), Strings.concatenate(captions), np.concatenate(lines)
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        if "broken" in sample:
            return sample
        if not self.captions[index].strip():
            options = {"strict": getattr(self.dataset, "strict", False), "what": "a caption with text"}
            return broken_sample("Captioned", sample["id"], self.path, f"empty caption of {sample['id']!r}", **options)
        return {**sample, "caption": tokenize("Captioned", self.tokenizer, self.captions[index])}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """The data set's, and a digest of ids and captions."""
        return {**self.dataset.fingerprint, "caption": fingerprint(self.dataset.ids, self.captions)}


def _of_samples(path: str, samples: Sequence[str], ids: Strings, captions: Strings, lines: np.ndarray) -> Strings:
    """The caption of each sample."""
    for row, first, _ in repeats(ids):
        raise ValueError(
            f"Captioned: expected one caption for each sample in {path}, got two for {ids[row]!r}, in lines {lines[first]} and "
            f"{lines[row]}. Remove one."
        )
    rows = rows_of(samples, ids)
    if (lacking := np.flatnonzero(rows < 0)).size:
        raise ValueError(
            f"Captioned: expected a caption for each of the {len(samples)} samples in {path}, got none for {lacking.size}, the first "
            f"{samples[lacking[0]]!r}. Ids there look like {ids[0]!r}."
        )
    return Strings(captions.blob, captions.starts[rows], captions.ends[rows])

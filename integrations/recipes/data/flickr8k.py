"""Image-text pairs of Flickr8k's token file."""

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geomreg.integrations.recipes.data.sample import check_reader, check_some_image, loading_of, read_sample
from geomreg.integrations.recipes.data.strings import Strings, fingerprint, repeats
from geomreg.integrations.recipes.data.table import read_columns, read_lines
from geomreg.integrations.recipes.data.texts import Tokenizer

__all__ = ["Flickr8k"]


class Flickr8k(Dataset[dict[str, Any]]):
    """One image-text pair for each caption of ``Flickr8k.token.txt``, or of the ``captions.txt`` that Kaggle has, in its order.

    Sample i is ``{"id": str, "image": transform(image), "text": (L,) int64}`` with the asked modalities only, and
    ``{"id", "broken": "<path>: <reason>"}`` if its image is missing or cannot be decoded (loaded as by
    :class:`~geomreg.integrations.recipes.data.CsvPairs`), or its caption is empty. The captions of ``2258277193_586949ec62.jpg.1`` are
    such samples, an image that was never published; the official splits leave it out.

    **Ids** are ``<image>#<k>`` for caption k of the image, from 0; the same from both files. Captions are taken as written, and so are the
    names of images: ``..`` leads out of ``root``.

    Args:
        tokens: UTF-8 file of lines ``<image>#<k><tab><caption>``, or CSV with the columns ``image`` and ``caption``. Flickr30k's token
            file has the same lines.
        root: folder of the images.
        split: file with the name of an image in each line, ``Flickr_8k.trainImages.txt`` say; by default all captions.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64; may be None without the modality ``"text"``.
        modalities: what samples hold; ``("text",)`` opens no image.
        strict: raise on a broken image.

    Attributes:
        ids: N strings.
        transform, tokenizer, modalities: as given.

    Raises:
        FileNotFoundError: no such file, or neither the first image is there nor any of some others.
        ValueError: a line of another kind, an id twice, an image of the split without captions, no captions; with ``strict`` a broken
            image.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        tokens: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str],
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None,
        split: str | os.PathLike[str] | None = None,
        modalities: tuple[str, ...] = ("image", "text"),
        strict: bool = False,
    ) -> None:
        self.modalities = check_reader("Flickr8k", modalities, transform, tokenizer)
        self.path, self.root = os.fspath(tokens), os.path.abspath(root)
        self.transform, self.tokenizer, self.strict = transform, tokenizer, strict
        pairs = list(_pairs(self.path))
        if split is not None:
            wanted = {name.strip() for _, name in read_lines("Flickr8k", os.fspath(split))}
            missing = sorted(wanted - {_image(token) for token, _ in pairs})
            if missing:
                shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                raise ValueError(
                    f"Flickr8k: expected captions of every image in {os.fspath(split)}, got none of {shown} in {self.path}. "
                    "Pass the split of this file."
                )
            pairs = [pair for pair in pairs if _image(pair[0]) in wanted]
        if not pairs:
            raise ValueError(
                f"Flickr8k: expected captions, got none in {self.path if split is None else os.fspath(split)}. Check the file."
            )
        self.ids = Strings.pack(token for token, _ in pairs)
        self._captions = Strings.pack(caption for _, caption in pairs)
        for row, *_ in repeats(self.ids):
            raise ValueError(f"Flickr8k: expected captions of different ids in {self.path}, got {self.ids[row]!r} twice. Remove one.")
        if "image" in self.modalities:
            check_some_image("Flickr8k", self.path, self, "Pass root=, the images' folder.")

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.root, _image(self.ids[index]))

    def caption(self, index: int) -> str:
        """Text of a sample."""
        text: str = self._captions[index]
        return text

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self, self.ids[index], self.image_file(index), self.caption(index))

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest of the ids, which name the images, and for texts of the captions; root plays no part."""
        columns = {"image": (self.ids,), "text": (self.ids, self._captions)}
        return {modality: fingerprint(*columns[modality]) for modality in self.modalities}


def _image(token: str) -> str:
    return token.rpartition("#")[0]


def _pairs(path: str) -> Iterator[tuple[str, str]]:
    """Token name and caption of each line."""
    first = next(read_lines("Flickr8k", path), (0, ""))[1]
    if first and "\t" not in first:
        counts: dict[str, int] = {}
        for line, (image, caption) in read_columns("Flickr8k", path, ("image", "caption")):
            if not image:
                raise ValueError(f"Flickr8k: expected the name of an image in every row of {path}, got none in line {line}. Fill it in.")
            counts[image] = counts.get(image, -1) + 1
            yield f"{image}#{counts[image]}", caption
        return
    for line, text in read_lines("Flickr8k", path):
        token, tab, caption = text.partition("\t")
        if not tab or not _image(token) or not token.rpartition("#")[2].isdecimal():
            raise ValueError(
                f"Flickr8k: expected lines '<image>#<k><tab><caption>', got {text!r:.100} in line {line} of {path}. "
                "Pass Flickr8k.token.txt, or a CSV file with the columns image and caption."
            )
        yield token, caption

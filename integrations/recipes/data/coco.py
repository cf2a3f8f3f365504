"""Image-text pairs of a COCO captions file."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geomreg.checks import describe
from geomreg.integrations.recipes.data.sample import check_reader, check_some_image, loading_of, read_sample
from geomreg.integrations.recipes.data.spelling import spelt_otherwise
from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint, repeats
from geomreg.integrations.recipes.data.texts import Tokenizer
from geomreg.integrations.recipes.files import read_json

__all__ = ["CocoCaptions"]


class CocoCaptions(Dataset[dict[str, Any]]):
    """One image-text pair for each annotation of a COCO captions file, ``captions_train2017.json`` say, in its order.

    Sample i is ``{"id": str, "image": transform(image), "text": (L,) int64}`` with the asked modalities only, and
    ``{"id", "broken": "<path>: <reason>"}`` if its image is missing or cannot be decoded (loaded as by
    :class:`~geomreg.integrations.recipes.data.CsvPairs`), or its caption is empty. Images without captions are left out.

    **Ids** are ``<image id>#<annotation id>``. Captions are taken as written, and so are file names: absolute ones and ``..`` lead out of
    ``root``.

    Args:
        annotations: UTF-8 JSON of an object with ``images`` (``id``, ``file_name``) and ``annotations`` (``id``, ``image_id``,
            ``caption``); other keys are ignored. The file is held as Python objects while it is read.
        root: folder of the images.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64; may be None without the modality ``"text"``.
        modalities: what samples hold; ``("text",)`` opens no image.
        strict: raise on a broken image.

    Attributes:
        ids: N strings.
        transform, tokenizer, modalities: as given.

    Raises:
        FileNotFoundError: no such file, or neither the first image is there nor any of some others.
        ValueError: a file of another kind, an annotation of an unknown image, an id twice, no captions; with ``strict`` a broken
            image.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str],
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None,
        modalities: tuple[str, ...] = ("image", "text"),
        strict: bool = False,
    ) -> None:
        self.modalities = check_reader("CocoCaptions", modalities, transform, tokenizer)
        self.path, self.root = os.fspath(annotations), os.path.abspath(root)
        self.transform, self.tokenizer, self.strict = transform, tokenizer, strict
        content = _read(self.path)
        files: dict[int, str] = {}
        for image, file_name in _entries(self.path, content, "images", {"id": int, "file_name": str}):
            if image in files:
                raise ValueError(f"CocoCaptions: expected images of different ids in {self.path}, got {image} twice. Remove one.")
            files[image] = file_name
        parts: list[list[Strings]] = [[], [], []]
        for chunk in chunks(_entries(self.path, content, "annotations", {"id": int, "image_id": int, "caption": str})):
            for number, image, _ in chunk:
                if image not in files:
                    raise ValueError(
                        f"CocoCaptions: expected annotations of the images in {self.path}, got image_id {image} in annotation {number}. "
                        "Add the image, or remove the annotation."
                    )
            parts[0].append(Strings.pack(f"{image}#{number}" for number, image, _ in chunk))
            parts[1].append(Strings.pack(files[image] for _, image, _ in chunk))
            parts[2].append(Strings.pack(caption for *_, caption in chunk))
        if not parts[0]:
            raise ValueError(f"CocoCaptions: expected annotations in {self.path}, got none. Pass a file of captions.")
        self._files, self._captions = Strings.concatenate(parts[1]), Strings.concatenate(parts[2])
        self.ids: Strings = Strings.concatenate(parts[0])
        for row, *_ in repeats(self.ids):
            raise ValueError(
                f"CocoCaptions: expected annotations of different ids in {self.path}, got {self.ids[row]!r} twice. Remove one."
            )
        if "image" in self.modalities:
            check_some_image("CocoCaptions", self.path, self, "Pass root=, the images' folder.")

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.root, self._files[index])

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
        """For each modality a digest of the ids and of the captions or file names as written, in order; root plays no part."""
        columns = {"image": self._files, "text": self._captions}
        return {modality: fingerprint(self.ids, columns[modality]) for modality in self.modalities}

    def same_files(self, digest: str) -> bool:
        """Whether the digest of images in a fingerprint is of these files, their paths written otherwise."""
        return spelt_otherwise(digest, self.ids, [self.image_file(row) for row in range(len(self))])


def _read(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"CocoCaptions: expected a JSON file, got none at {path}. Check the path.")
    content: dict[str, Any] = read_json("CocoCaptions", Path(path), object, "JSON", "Pass captions_train2017.json, say.")
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            got = f"the keys {', '.join(map(repr, content)) or '(none)'}" if isinstance(content, dict) else describe(content)
            raise ValueError(
                f"CocoCaptions: expected an object with lists of images and annotations in {path}, got {got:.200}. "
                "Pass captions_train2017.json, say."
            )
    return content


def _entries(path: str, content: dict[str, Any], key: str, fields: dict[str, type]) -> Iterator[list[Any]]:
    """The values of ``fields`` in each entry of a list."""
    for number, entry in enumerate(content[key]):
        values = [entry.get(field) if isinstance(entry, dict) else None for field in fields]
        if not all(type(value) is kind for value, kind in zip(values, fields.values(), strict=True)):
            wanted = ", ".join(f"{field} ({kind.__name__})" for field, kind in fields.items())
            raise ValueError(
                f"CocoCaptions: expected {wanted} in every entry of {key} in {path}, got {json.dumps(entry):.200} at position {number}. "
                "Pass captions_train2017.json, say."
            )
        yield values

"""What all readers do alike: the check of their options, and one sample of an image file and a text."""

import os
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from geomreg.checks import check_callable, check_choices
from geomreg.integrations.recipes.data.images import broken_sample, image_sample
from geomreg.integrations.recipes.data.rgb import described_loading
from geomreg.integrations.recipes.data.texts import Tokenizer, tokenize
from geomreg.types import Embeddings

__all__ = ["Reader", "check_reader", "check_some_image", "loading_of", "read_sample"]

_SOME = 64  # images that are looked for where a data set is opened


class Reader(Protocol):
    """Options of a data set that :func:`read_sample` uses; messages begin with its class's name."""

    transform: Callable[[Image.Image], Tensor] | None
    tokenizer: Tokenizer | None
    modalities: tuple[str, ...]
    strict: bool


def check_reader(name: str, modalities: tuple[str, ...] | None, transform: object, tokenizer: object) -> tuple[str, ...]:
    """``modalities``, by default images and, given a tokenizer, texts; each with its function."""
    if modalities is None:
        modalities = ("image",) if tokenizer is None else ("image", "text")
    modalities = check_choices(name, "modalities", modalities, Embeddings._fields)
    if "image" in modalities:
        check_callable(name, "transform", transform, "of a PIL image")
    if "text" in modalities:
        check_callable(name, "tokenizer", tokenizer, "of a list of strings")
    return modalities


def check_some_image(name: str, source: str, dataset: Any, hint: str) -> None:
    """The first image is there, or if it is missing, one of some others: then it is a broken sample, and not the folder is wrong."""
    first = dataset.image_file(0)
    if not any(os.path.isfile(dataset.image_file(row)) for row in range(0, len(dataset), max(1, len(dataset) // _SOME))):
        raise FileNotFoundError(f"{name}: expected the first image of {source}, got no file {first}. {hint}")


def loading_of(reader: Reader) -> str | None:
    """How a reader's image files become pixels, for the fingerprint of a cache; None without images."""
    return described_loading(reader.transform) if "image" in reader.modalities else None


def read_sample(
    reader: Reader, sample_id: str, path: str, text: str, *, where: str = "", data: bytes | None = None, **more: int
) -> dict[str, Any]:
    """``{"id", "image", "text", **more}`` with the reader's modalities, or a broken sample.

    A sample is broken if its image cannot be loaded, or its caption holds nothing but white space: it would teach the model what no text
    looks like.

    Args:
        reader: data set whose sample it is.
        sample_id: of the sample.
        path: image file, or with ``data`` what messages call it; not used without the modality ``"image"``.
        text: caption; not used without the modality ``"text"``.
        where: where the list of samples names this one, for messages.
        data: content of the image file.
        more: integers that belong to the sample.
    """
    name = type(reader).__name__
    sample: dict[str, Any] = {"id": sample_id}
    if "text" in reader.modalities and not text.strip():
        empty = f"empty caption{where or f' of {sample_id!r}'}"
        return broken_sample(name, sample_id, path or sample_id, empty, strict=reader.strict, what="a caption with text")
    if "image" in reader.modalities:
        sample = image_sample(name, sample_id, path, reader.transform, strict=reader.strict, where=where, data=data)
        if "broken" in sample:
            return sample
    sample |= more
    if "text" in reader.modalities:
        sample["text"] = tokenize(name, reader.tokenizer, text)
    return sample

"""Labelled images in the ImageFolder layout, with class names and templates as texts."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from geomreg.integrations.recipes.data.sample import check_reader, loading_of, read_sample
from geomreg.integrations.recipes.data.strings import Strings, fingerprint
from geomreg.integrations.recipes.data.table import read_rows
from geomreg.integrations.recipes.data.texts import Tokenizer, check_templates, fill
from geomreg.integrations.recipes.files import read_json

__all__ = ["LabelledFolder", "class_folders"]


class LabelledFolder(Dataset[dict[str, Any]]):
    """Images in one folder for each class, at any depth in it.

    Sample i is ``{"id": str, "image": transform(image), "label": int, "text": (L,) int64}`` with the asked modalities only, and
    ``{"id", "broken": "<path>: <reason>"}`` if its image cannot be decoded (loaded as by
    :class:`~geomreg.integrations.recipes.data.CsvPairs`). Its text is the class name in template ``i % len(templates)``: always
    the same, so that it can be cached; another template at each draw is the business of whoever draws.

    **Ids** are the paths relative to ``path``, with forward slashes. Samples are sorted by class folder, then by id. Files and
    folders whose names begin with a dot, and files without an extension of torchvision's ``IMG_EXTENSIONS``, are ignored. Links are
    followed, also out of ``path``.

    Args:
        path: folder of class folders.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64.
        class_names: name of each class folder: a dict, a JSON file of one, or a CSV or TSV file with the columns folder and
            name (a first row that begins with no folder's name is a header). By default the folders' own names with spaces
            for underscores.
        templates: texts with ``{}`` in the place of the class name (or ``{a}``: with its article, and spaces for underscores).
        strict: raise on a broken image.
        modalities: what samples hold beside the label; by default images and, given a tokenizer, texts.

    Attributes:
        classes: names of the C classes, sorted by folder.
        labels: ``(N,)`` int64, indices into ``classes``.
        ids: N strings.
        transform, tokenizer, templates, modalities: as given.

    Raises:
        FileNotFoundError: no such folder, no class folders, no images.
        ValueError: class folders without images; class names for other folders than there are, or not in Unicode; a template without
            ``{}``; with ``strict`` a broken image.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None = None,
        class_names: Mapping[str, str] | str | os.PathLike[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        strict: bool = False,
        modalities: tuple[str, ...] | None = None,
    ) -> None:
        name = type(self).__name__
        self.modalities = check_reader(name, modalities, transform, tokenizer)
        self.templates = check_templates(name, templates)
        self.path = os.path.abspath(path)
        self.transform, self.tokenizer, self.strict = transform, tokenizer, strict
        folders = class_folders(name, self.path)
        parts = [Strings.pack(sorted(_images(os.path.join(self.path, folder), f"{folder}/"))) for folder in folders]
        counts = np.array([len(part) for part in parts])
        if not counts.any():
            raise FileNotFoundError(
                f"{name}: expected images ({', '.join(IMG_EXTENSIONS)}) in the class folders of {self.path}, got none. Check the path."
            )
        if not counts.all():
            empty = ", ".join(folder for folder, count in zip(folders, counts, strict=True) if not count)
            raise ValueError(f"{name}: expected images in every class folder of {self.path}, got none in {empty}. Remove these.")
        self.ids: Sequence[str] = Strings.concatenate(parts)
        self.labels = np.repeat(np.arange(len(folders)), counts)
        self.classes = _names(class_names, folders)
        for folder, class_name in zip(folders, self.classes, strict=True):
            if not _is_unicode(class_name):
                raise ValueError(
                    f"{name}: expected names of classes as Unicode, got {class_name!r} of the folder {folder!r} in {self.path}. Rename it, "
                    "or pass class_names."
                )

    def class_texts(self, template: str) -> list[str]:
        """The text of each of the C classes, say for a zero-shot head."""
        return [fill(template, name) for name in self.classes]

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.path, self.ids[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        label = int(self.labels[index])
        text = fill(self.templates[index % len(self.templates)], self.classes[label])
        return read_sample(self, self.ids[index], self.image_file(index), text, label=label)

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest: of the ids, and for texts of class names and templates; ``path`` plays no part."""
        columns = {"image": (self.ids,), "text": (self.ids, self.classes, self.templates)}
        return {modality: fingerprint(*columns[modality]) for modality in self.modalities}


def class_folders(name: str, path: str) -> list[str]:
    """Names of the folders in ``path``, sorted, without hidden ones; at least one."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{name}: expected a folder of class folders, got none at {path}. Check the path.")
    with os.scandir(path) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise FileNotFoundError(f"{name}: expected a folder for each class in {path}, got none. Check the path.")
    return folders


def _is_unicode(text: str) -> bool:
    """Not so where a file name is no UTF-8: the text could be neither tokenized nor written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images(folder: str, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, f"{prefix}{entry.name}/", above | {real})
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                yield prefix + entry.name


def _names(given: Mapping[str, str] | str | os.PathLike[str] | None, folders: list[str]) -> tuple[str, ...]:
    if given is None:
        return tuple(folder.replace("_", " ") for folder in folders)
    where = ""
    if isinstance(given, (str, os.PathLike)):
        where = f" in {os.fspath(given)}"
        given = _read_names(os.fspath(given), folders)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given.values()):
        raise ValueError(
            f"LabelledFolder: expected class_names as a dict from folder to name, or a file of one, got {given!r:.200}{where}. "
            "Write {'n01440764': 'tench'}, say."
        )
    for folder in given:
        if folder not in folders:
            near = difflib.get_close_matches(str(folder), folders, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise ValueError(f"LabelledFolder: expected names of class folders that there are, got one of {folder!r}{where}. {hint}")
    missing = [folder for folder in folders if folder not in given]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"LabelledFolder: expected a name for every class folder, got none for {shown}{where}. Add it to class_names.")
    return tuple(given[folder] for folder in folders)


def _read_names(path: str, folders: list[str]) -> Any:
    if path.lower().endswith(".json"):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"LabelledFolder: expected a JSON file, got none at {path}. Check the path.")
        return read_json("LabelledFolder", Path(path), object, "JSON", "Write an object from folder to name.")
    names: dict[str, str] = {}
    for number, (line, fields) in enumerate(read_rows("LabelledFolder", path, known={folder.casefold() for folder in folders})):
        if len(fields) != 2:
            raise ValueError(
                f"LabelledFolder: expected two columns in {path}, folder and name, got {len(fields)} in line {line}. "
                "Put quotes around names with separators in them."
            )
        folder, name = (field.strip() for field in fields)
        if folder in names:
            raise ValueError(
                f"LabelledFolder: expected one name for each folder, got a second one for {folder!r} in line {line} of {path}. Remove one."
            )
        if number or folder in folders:
            names[folder] = name
    return names

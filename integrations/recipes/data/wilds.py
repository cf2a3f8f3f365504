"""iWildCam and FMoW as WILDS publishes them, read without its package."""

import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geomreg.checks import check_option
from geomreg.integrations.recipes.data.sample import check_reader, check_some_image, loading_of, read_sample
from geomreg.integrations.recipes.data.strings import Strings, fingerprint
from geomreg.integrations.recipes.data.table import read_columns
from geomreg.integrations.recipes.data.texts import Tokenizer, check_templates, fill

__all__ = ["FMOW_CATEGORIES", "FMOW_TEMPLATES", "IWILDCAM_TEMPLATES", "SPLITS", "FMoW", "IWildCam"]

SPLITS = ("train", "id_val", "id_test", "val", "test")  # val and test: out of distribution

IWILDCAM_TEMPLATES = ("a photo of {}.", "{} in the wild.")
"""FLYP's, datacreation_scripts/iwildcam.py."""

_PLACES = ("a {}", "{a}", *(f"a {{}} in {place}" for place in ("asia", "africa", "the americas", "europe", "oceania")))
FMOW_TEMPLATES = (*(f"{view} photo of {place}." for place in _PLACES for view in ("satellite", "aerial")), "a photo of a {}.", "{}.")
"""FLYP's and WiSE-FT's 16, src/templates/fmow_template.py. The continents are the same for every image, wherever it was taken."""

FMOW_CATEGORIES = tuple(
    """airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site barn border_checkpoint burial_site
    car_dealership construction_site crop_field dam debris_or_rubble educational_institution electric_substation factory_or_powerplant
    fire_station flooded_road fountain gas_station golf_course ground_transportation_station helipad hospital impoverished_settlement
    interchange lake_or_pond lighthouse military_facility multi-unit_residential nuclear_powerplant office_building oil_or_gas_facility
    park parking_lot_or_garage place_of_worship police_station port prison race_track railway_bridge recreational_facility road_bridge
    runway shipyard shopping_mall single-unit_residential smokestack solar_farm space_facility stadium storage_tank surface_mine
    swimming_pool toll_booth tower tunnel_opening waste_disposal water_treatment_facility wind_farm zoo""".split()  # noqa: SIM905
)
"""WILDS' 62 in the order of its labels."""

_FMOW_SPLITS = {  # split in the metadata, first year and the year after the last
    "train": ("train", 0, 2013),
    "id_val": ("val", 0, 2013),
    "id_test": ("test", 0, 2013),
    "val": ("val", 2013, 2016),
    "test": ("test", 2016, 10000),
}
_UNUSED = 99999  # y of the categories that WILDS left out


class IWildCam(Dataset[dict[str, Any]]):
    """iWildCam2020-WILDS: animals before camera traps; the trap is the group.

    Sample i is ``{"id": str, "image": transform(image), "label": int, "group": int, "text": (L,) int64}`` with the asked modalities
    only, and ``{"id", "broken": "<path>: <reason>"}`` if its image is missing or cannot be decoded (loaded as by
    :class:`~geomreg.integrations.recipes.data.CsvPairs`). Its text is the class name in template ``i % len(templates)``.

    **Files** of ``iwildcam_v2.0``, as wilds/datasets/iwildcam_dataset.py of p-lambda/wilds reads them: ``metadata.csv`` with the
    columns ``split``, ``filename``, ``y`` and ``location_remapped``, and the images of all splits in ``train/``. ``categories.csv``
    (``y``, ``category_id``, ``name``) is not read there; its columns are those that other programs use, and rows with ``y`` 99999, which
    FLYP skips, are skipped.

    **Ids** are the file names, which are taken as written: ``..`` leads out of ``root``.

    Args:
        root: folder ``iwildcam_v2.0``.
        split: ``"train"``, ``"id_val"``, ``"id_test"``, ``"val"`` or ``"test"``; the last two are of traps that are in no other.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64.
        templates: texts with ``{}`` in the place of the class name (or ``{a}``: with its article, and spaces for underscores); FLYP's.
        names: CSV file with the columns ``y`` and ``name_key``; by default ``categories.csv``, which has scientific names. FLYP and
            WiSE-FT train with English ones, column ``english`` of src/datasets/iwildcam_metadata/labels.csv in mlfoundations/wise-ft.
        name_key: column of the class names.
        strict: raise on a broken image.
        modalities: what samples hold beside label and group; by default images and, given a tokenizer, texts.

    Attributes:
        classes: names of the C classes (182 in WILDS; some share a name).
        labels: ``(N,)`` int64, indices into ``classes``.
        groups: ``(N,)`` int64, location of the camera trap.
        ids: N strings.
        transform, tokenizer, templates, modalities: as given.

    Raises:
        FileNotFoundError: files that are not there (of the images only the first is looked for).
        ValueError: missing columns, labels without a class, a split that there is not or that is empty; with ``strict`` a broken image.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None = None,
        templates: Sequence[str] = IWILDCAM_TEMPLATES,
        names: str | os.PathLike[str] | None = None,
        name_key: str = "name",
        strict: bool = False,
        modalities: tuple[str, ...] | None = None,
    ) -> None:
        self.modalities = check_reader("IWildCam", modalities, transform, tokenizer)
        self.templates = check_templates("IWildCam", templates)
        check_option("IWildCam", "split", split, SPLITS)
        self.root, self.transform, self.tokenizer, self.strict = os.path.abspath(root), transform, tokenizer, strict
        self.classes = _class_names(os.path.join(self.root, "categories.csv") if names is None else os.fspath(names), name_key)
        path = os.path.join(self.root, "metadata.csv")
        files, labels, groups = [], [], []
        for line, (part, file, label, location) in read_columns("IWildCam", path, ("split", "filename", "y", "location_remapped")):
            if part == split:
                if not label.isdecimal() or int(label) >= len(self.classes) or not location.isdecimal():
                    raise ValueError(
                        f"IWildCam: expected y of a class from 0 to {len(self.classes) - 1} and a number as location in {path}, got "
                        f"{label!r} and {location!r} in line {line}. Pass the original files."
                    )
                files.append(file)
                labels.append(int(label))
                groups.append(int(location))
        _check_some("IWildCam", split, path, files)
        self.ids = Strings.pack(files)
        self.labels, self.groups = np.array(labels), np.array(groups)
        if "image" in self.modalities:
            check_some_image("IWildCam", path, self, "Pass the folder iwildcam_v2.0.")

    def class_texts(self, template: str) -> list[str]:
        """The text of each of the C classes, say for a zero-shot head."""
        return [fill(template, name) for name in self.classes]

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.root, "train", self.ids[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _sample(self, range(len(self))[index])

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest: of the ids, and for texts of labels, class names and templates; ``root`` plays no part."""
        return _fingerprint(self)


class FMoW(Dataset[dict[str, Any]]):
    """FMoW-WILDS: land use in satellite images; the region of the world is the group.

    Samples and texts as of :class:`IWildCam`.

    **Files** of ``fmow_v1.1``, as wilds/datasets/fmow_dataset.py of p-lambda/wilds reads them: ``rgb_metadata.csv`` with the columns
    ``split``, ``category``, ``country_code`` and ``timestamp``; ``country_code_mapping.csv`` with ``alpha-3`` and ``region``; the image of
    row r, from 0, is ``images/rgb_img_<r>.png``. All rows count, those of split ``seq``, which no split here holds, too.

    **Splits** are WILDS' official ones: ``train``, ``id_val`` and ``id_test`` are the rows of split train, val and test before 2013,
    ``val`` those of val from 2013 to 2015, ``test`` those of test from 2016 on (UTC).

    **Ids** are the images' file names.

    Args:
        root: folder ``fmow_v1.1``.
        split: ``"train"``, ``"id_val"``, ``"id_test"``, ``"val"`` or ``"test"``; the last two are of later years.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64.
        templates: texts with ``{}`` in the place of the class name (or ``{a}``: with its article, and spaces for underscores); FLYP's.
        strict: raise on a broken image.
        modalities: what samples hold beside label and group; by default images and, given a tokenizer, texts.

    Attributes:
        classes: the 62 categories, underscores and all, as FLYP trains with them.
        labels: ``(N,)`` int64, indices into ``classes``.
        regions: names of the regions, in the order of the metadata as WILDS has them.
        unscored_group: index of the region ``"Other"``, the countries without one, which is left out of the accuracy of the worst region;
            None if there is none.
        groups: ``(N,)`` int64, indices into ``regions``.
        ids: N strings.
        transform, tokenizer, templates, modalities: as given.

    Raises:
        FileNotFoundError: files that are not there (of the images only the first is looked for).
        ValueError: missing columns, an unknown category, a timestamp that is none, a split that there is not or that is empty; with
            ``strict`` a broken image.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None = None,
        templates: Sequence[str] = FMOW_TEMPLATES,
        strict: bool = False,
        modalities: tuple[str, ...] | None = None,
    ) -> None:
        self.modalities = check_reader("FMoW", modalities, transform, tokenizer)
        self.templates = check_templates("FMoW", templates)
        check_option("FMoW", "split", split, SPLITS)
        self.root, self.transform, self.tokenizer, self.strict = os.path.abspath(root), transform, tokenizer, strict
        self.classes = FMOW_CATEGORIES
        countries = read_columns("FMoW", os.path.join(self.root, "country_code_mapping.csv"), ("alpha-3", "region"))
        region_of = {country: region for _, (country, region) in countries}
        label_of = {category: label for label, category in enumerate(FMOW_CATEGORIES)}
        path = os.path.join(self.root, "rgb_metadata.csv")
        source, first, end = _FMOW_SPLITS[split]
        regions: dict[str, int] = {}
        files, labels, groups = [], [], []
        rows = read_columns("FMoW", path, ("split", "category", "country_code", "timestamp"))
        for row, (line, (part, category, country, timestamp)) in enumerate(rows):
            group = regions.setdefault(region_of.get(country) or "Other", len(regions))
            if part == source and first <= _year(path, line, timestamp) < end:
                if category not in label_of:
                    raise ValueError(
                        f"FMoW: expected one of the 62 categories in {path}, got {category!r} in line {line}. Pass the original file."
                    )
                files.append(f"rgb_img_{row}.png")
                labels.append(label_of[category])
                groups.append(group)
        _check_some("FMoW", split, path, files)
        self.regions, self.unscored_group = tuple(regions), regions.get("Other")
        self.ids = Strings.pack(files)
        self.labels, self.groups = np.array(labels), np.array(groups)
        if "image" in self.modalities:
            check_some_image("FMoW", path, self, "Pass the folder fmow_v1.1.")

    def class_texts(self, template: str) -> list[str]:
        """The text of each of the 62 classes, say for a zero-shot head."""
        return [fill(template, name) for name in self.classes]

    def image_file(self, index: int) -> str:
        """Path of a sample's image."""
        return os.path.join(self.root, "images", self.ids[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _sample(self, range(len(self))[index])

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest: of the ids, and for texts of labels, class names and templates; ``root`` plays no part."""
        return _fingerprint(self)


def _sample(data: IWildCam | FMoW, index: int) -> dict[str, Any]:
    label, group = int(data.labels[index]), int(data.groups[index])
    text = fill(data.templates[index % len(data.templates)], data.classes[label])
    return read_sample(data, data.ids[index], data.image_file(index), text, label=label, group=group)


def _fingerprint(data: IWildCam | FMoW) -> dict[str, str]:
    columns = {"image": (data.ids,), "text": (data.ids, list(map(str, data.labels)), data.classes, data.templates)}
    return {modality: fingerprint(*columns[modality]) for modality in data.modalities}


def _check_some(name: str, split: str, path: str, files: list[str]) -> None:
    if not files:
        raise ValueError(f"{name}: expected images of the split {split!r} in {path}, got none. Pass the original file.")


def _class_names(path: str, name_key: str) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for line, (label, name) in read_columns("IWildCam", path, ("y", name_key)):
        if not label.isdecimal() or not name or int(label) in names:
            raise ValueError(
                f"IWildCam: expected a different number and a name for each class in {path}, got {label!r} and {name!r} in line {line}. "
                "Correct the row."
            )
        if int(label) != _UNUSED:
            names[int(label)] = name
    if sorted(names) != list(range(len(names))) or not names:
        raise ValueError(
            f"IWildCam: expected classes from 0 without a gap in {path}, got {len(names)} up to {max(names, default=None)}. "
            "Pass the original file."
        )
    return tuple(names[label] for label in range(len(names)))


def _year(path: str, line: int, timestamp: str) -> int:
    """In UTC."""
    try:
        time = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))  # "Z" alone: from Python 3.11 on
    except ValueError:
        raise ValueError(
            f"FMoW: expected a timestamp like '2016-01-31T12:00:00Z' in {path}, got {timestamp!r} in line {line}. Pass the original file."
        ) from None
    return (time if time.tzinfo is None else time.astimezone(timezone.utc)).year

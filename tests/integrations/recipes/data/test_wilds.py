"""iWildCam and FMoW in the layout that WILDS publishes: splits, labels, groups, texts, and damaged metadata."""

import csv
import itertools
import pickle

import numpy as np
import pytest
import torch
from samples import damage, forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import FMoW, IWildCam, collate
from geomreg.integrations.recipes.data.wilds import FMOW_CATEGORIES, FMOW_TEMPLATES, IWILDCAM_TEMPLATES, SPLITS


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def ends(texts):
    return tokenize([text[-12:] for text in texts])


# iWildCam -------------------------------------------------------------------------------------------------------------

WILDCAM_HEADER = ["", "split", "filename", "y", "image_id", "category_id", "location_remapped", "sequence_remapped", "datetime"]
CATEGORIES = [
    ["0", "0", "empty"],
    ["1", "2", "tayassu pecari"],
    ["2", "3", "große katze, wild"],
    ["99999", "245", "x"],
    ["99999", "9", "y"],
]
WILDCAM = [  # split, file, y, location
    ("train", "8b-a.jpg", 1, 7),
    ("test", "8b-b.jpg", 2, 300),
    ("train", "8b-c.jpg", 0, 12),
    ("id_val", "8b-d.jpg", 2, 7),
    ("train", "8b-e.jpg", 2, 7),
    ("val", "8b-f.jpg", 1, 301),
    ("id_test", "8b-g.jpg", 1, 12),
]


@pytest.fixture
def wildcam(tmp_path):
    root = tmp_path / "iwildcam_v2.0"
    for k, (_, name, *_) in enumerate(WILDCAM):
        write_image(root / "train" / name, (30 * k, 0, 0))
    write_wildcam(root)
    write_csv(root / "categories.csv", ["y", "category_id", "name"], CATEGORIES)
    return root


def write_wildcam(root, rows=WILDCAM, header=WILDCAM_HEADER):
    full = [[k, split, name, y, name[:-4], 5, location, k, "2013-06-05 05:44:19.000"] for k, (split, name, y, location) in enumerate(rows)]
    write_csv(root / "metadata.csv", header, full)


def read_wildcam(root, split="train", **more):
    return IWildCam(root, split, **{"transform": to_tensor, "tokenizer": ends} | more)


def test_wildcam_samples(wildcam):
    data = read_wildcam(wildcam)
    assert list(data.ids) == ["8b-a.jpg", "8b-c.jpg", "8b-e.jpg"]
    assert data.classes == ("empty", "tayassu pecari", "große katze, wild")
    assert data.labels.tolist() == [1, 0, 2]
    assert data.groups.tolist() == [7, 12, 7]
    assert data.labels.dtype == data.groups.dtype == np.int64
    assert data[2].keys() == {"id", "image", "label", "group", "text"}
    for k, (sample, row) in enumerate(zip(data, (0, 2, 4), strict=True)):
        assert (sample["id"], sample["label"], sample["group"]) == (data.ids[k], data.labels[k], data.groups[k])
        assert isinstance(sample["label"], int)
        assert isinstance(sample["group"], int)
        assert sample["image"][0].mean() == pytest.approx(30 * row / 255, abs=0.02)
    texts = ["a photo of tayassu pecari.", "empty in the wild.", "a photo of große katze, wild."]
    assert [untokenize(sample["text"]) for sample in data] == [text[-12:] for text in texts]
    assert data.class_texts("{} in the wild.") == ["empty in the wild.", "tayassu pecari in the wild.", "große katze, wild in the wild."]
    assert data[-1]["id"] == "8b-e.jpg"
    with pytest.raises(IndexError):
        data[3]
    assert (data.transform, data.tokenizer, data.templates, data.modalities) == (to_tensor, ends, IWILDCAM_TEMPLATES, ("image", "text"))


def test_wildcam_splits(wildcam):
    assert {split: list(read_wildcam(wildcam, split).ids) for split in SPLITS[1:]} == {
        split: [name for part, name, *_ in WILDCAM if part == split] for split in SPLITS[1:]
    }
    with pytest.raises(
        ValueError, match=r"^IWildCam: expected split to be one of 'train', 'id_val', 'id_test', 'val', 'test', got 'dev'\."
    ):
        read_wildcam(wildcam, "dev")
    write_wildcam(wildcam, [row for row in WILDCAM if row[0] != "val"])
    with pytest.raises(ValueError, match=r"^IWildCam: expected images of the split 'val' in .*metadata\.csv, got none\. Pass the original"):
        read_wildcam(wildcam, "val")


def test_wildcam_english_names(wildcam, tmp_path):
    """WiSE-FT's file."""
    rows = [
        ["0", "0", "empty", "empty"],
        ["1", "2", "tayassu pecari", "White-lipped peccary"],
        ["2", "3", "x", "empty"],
        ["99999", "2", "x", "y"],
    ]
    write_csv(tmp_path / "labels.csv", ["y", "category_id", "name", "english"], rows)
    data = read_wildcam(wildcam, names=tmp_path / "labels.csv", name_key="english")
    assert data.classes == ("empty", "White-lipped peccary", "empty")
    assert untokenize(data[0]["text"]) == "ped peccary."
    assert data.fingerprint["image"] == read_wildcam(wildcam).fingerprint["image"]
    assert data.fingerprint["text"] != read_wildcam(wildcam).fingerprint["text"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*WILDCAM, ("train", "x", 3, 1)],
            r"y of a class from 0 to 2 and a number as location in .*metadata\.csv, got '3' and '1' in line 9\.",
        ),
        ([*WILDCAM, ("train", "x", -1, 1)], r"y of a class from 0 to 2 and .*, got '-1' and '1' in line 9\."),
        ([*WILDCAM, ("train", "x", 1, "a")], r"y of a class from 0 to 2 and .*, got '1' and 'a' in line 9\."),
        ([], r"images of the split 'train' in .*metadata\.csv, got none\."),
    ],
)
def test_wildcam_impossible_metadata(rows, message, wildcam):
    write_wildcam(wildcam, rows)
    with pytest.raises(ValueError, match=f"^IWildCam: expected {message}"):
        read_wildcam(wildcam)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["0", "0", "a"], ["0", "1", "b"]],
            r"a different number and a name for each class in .*categories\.csv, got '0' and 'b' in line 3\.",
        ),
        ([["0", "0", ""]], r"a different number and a name for each class in .*, got '0' and '' in line 2\."),
        ([["a", "0", "b"]], r"a different number and a name for each class in .*, got 'a' and 'b' in line 2\."),
        ([["0", "0", "a"], ["2", "0", "b"]], r"classes from 0 without a gap in .*categories\.csv, got 2 up to 2\. Pass"),
        ([["99999", "0", "a"]], r"classes from 0 without a gap in .*, got 0 up to None\. Pass"),
    ],
)
def test_wildcam_impossible_categories(rows, message, wildcam):
    write_csv(wildcam / "categories.csv", ["y", "category_id", "name"], rows)
    with pytest.raises(ValueError, match=f"^IWildCam: expected {message}"):
        read_wildcam(wildcam)


def test_wildcam_missing_files_and_columns(wildcam):
    with pytest.raises(
        ValueError, match=r"^IWildCam: expected the columns 'y', 'english' in .*categories\.csv, got 'y', 'category_id', 'name'\."
    ):
        read_wildcam(wildcam, name_key="english")
    write_wildcam(wildcam, header=["", "split", "filename", "y", "image_id", "category_id", "location", "seq_id", "datetime"])  # version 1
    with pytest.raises(
        ValueError, match=r"^IWildCam: expected the columns 'split', 'filename', 'y', 'location_remapped' in .*, got '', 'split'"
    ):
        read_wildcam(wildcam)
    write_wildcam(wildcam)
    for file in (wildcam / "train").iterdir():
        damage(file, "missing")
    with pytest.raises(
        FileNotFoundError, match=r"^IWildCam: expected the first image of .*metadata\.csv, got no file .*8b-a\.jpg\. Pass the f"
    ):
        read_wildcam(wildcam)
    for name in ("metadata.csv", "categories.csv"):
        (wildcam / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"^IWildCam: expected a CSV or TSV file, got none at .*{name}\. Check the path"):
            read_wildcam(wildcam)


def test_wildcam_broken_images_and_workers(wildcam):
    data = read_wildcam(wildcam)
    damage(wildcam / "train/8b-c.jpg", "truncated")
    assert data[1] == {"id": "8b-c.jpg", "broken": data[1]["broken"]}
    with pytest.raises(ValueError, match=r"^IWildCam: expected an image, got .*8b-c\.jpg: image file is truncated.*\. Repair it"):
        read_wildcam(wildcam, strict=True)[1]
    first, second = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    assert first["id"] == ["8b-a.jpg"]
    assert len(first["broken"]) == 1
    assert (second["label"].tolist(), second["group"].tolist()) == ([2], [7])
    assert pickle.loads(pickle.dumps(data))[2]["group"] == 7


def test_modalities_of_both(wildcam, fmow):
    for kind, root in ((IWildCam, wildcam), (FMoW, fmow)):
        images = kind(root, "train", transform=to_tensor)
        assert images[0].keys() == {"id", "image", "label", "group"}
        texts = kind(root, "train", transform=forbidden, tokenizer=ends, modalities=("text",))
        assert texts[0].keys() == {"id", "text", "label", "group"}
        assert images.fingerprint | texts.fingerprint == kind(root, "train", transform=to_tensor, tokenizer=ends).fingerprint
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: expected tokenizer as a function"):
            kind(root, "train", transform=to_tensor, modalities=("image", "text"))
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: expected templates as a tuple of texts with \{{\}} for the class name"):
            kind(root, "train", transform=to_tensor, templates=("a photo",))


def test_fingerprints_of_both(wildcam, fmow, tmp_path):
    for kind, root in ((IWildCam, wildcam), (FMoW, fmow)):
        base = kind(root, "train", transform=to_tensor, tokenizer=ends).fingerprint
        assert base["image"] != base["text"]
        other = kind(root, "train", transform=to_tensor, tokenizer=ends, templates=("{}",)).fingerprint
        assert other["image"] == base["image"]
        assert other["text"] != base["text"]
        moved = root.rename(tmp_path / "moved" if kind is FMoW else tmp_path / "elsewhere")
        assert kind(moved, "train", transform=to_tensor, tokenizer=ends).fingerprint == base
        if kind is IWildCam:  # another label, the same images
            write_wildcam(moved, [(*WILDCAM[0][:2], 2, 7), *WILDCAM[1:]])
            relabelled = kind(moved, "train", transform=to_tensor, tokenizer=ends).fingerprint
            assert relabelled["image"] == base["image"]
            assert relabelled["text"] != base["text"]


# FMoW -----------------------------------------------------------------------------------------------------------------

FMOW_HEADER = ["split", "img_filename", "img_path", "spatial_reference", "epsg", "category", "visible", "img_width", "img_height"]
FMOW_HEADER += ["country_code", "cloud_cover", "timestamp", "lat", "lon"]
ROWS = [  # split, category, country, timestamp
    ("train", "airport", "FRA", "2010-05-05T10:00:00Z"),
    ("seq", "zoo", "KEN", "2012-05-05T10:00:00Z"),
    ("train", "zoo", "XKX", "2012-12-31T23:59:59Z"),
    ("train", "zoo", "CHN", "2013-01-01T00:00:00Z"),
    ("val", "office_building", "BOL", "2012-12-31T23:59:59Z"),
    ("val", "port", "CHN", "2013-01-01T00:00:00Z"),
    ("val", "port", "ATA", "2015-12-31T23:59:59Z"),
    ("val", "port", "CHN", "2016-01-01T00:00:00Z"),
    ("test", "tower", "CHN", "2012-12-31T23:59:59Z"),
    ("test", "tower", "KEN", "2013-01-01T00:00:00Z"),
    ("test", "tower", "KEN", "2015-12-31T23:59:59Z"),
    ("test", "tower", "KEN", "2016-01-01T00:00:00Z"),
    ("train", "airport_hangar", "KEN", "2002-05-05T10:00:00Z"),
]
COUNTRIES = [
    ["France", "FR", "FRA", "Europe"],
    ["Kenya", "KE", "KEN", "Africa"],
    ["China", "CN", "CHN", "Asia"],
    ["Bolivia, Plurinational State of", "BO", "BOL", "Americas"],
    ["Antarctica", "AQ", "ATA", ""],
]
EXPECTED = {"train": [0, 2, 12], "id_val": [4], "id_test": [8], "val": [5, 6], "test": [11]}


@pytest.fixture
def fmow(tmp_path):
    root = tmp_path / "fmow_v1.1"
    for k in range(len(ROWS)):
        write_image(root / "images" / f"rgb_img_{k}.png", (10 * k, 0, 0))
    write_fmow(root)
    write_csv(root / "country_code_mapping.csv", ["name", "alpha-2", "alpha-3", "region"], COUNTRIES)
    return root


def write_fmow(root, rows=ROWS):
    full = [[a, "x_rgb.jpg", "p", "s", 32631, b, True, 9, 9, c, 0, d, 1.5, 2.5] for a, b, c, d in rows]
    write_csv(root / "rgb_metadata.csv", FMOW_HEADER, full)


def read_fmow(root, split="train", **more):
    return FMoW(root, split, **{"transform": to_tensor, "tokenizer": ends} | more)


@pytest.mark.parametrize("split", SPLITS)
def test_fmow_splits(split, fmow):
    """By the official split and by years; the numbers of images are those of all rows."""
    data = read_fmow(fmow, split)
    assert list(data.ids) == [f"rgb_img_{row}.png" for row in EXPECTED[split]]
    assert data.regions == ("Europe", "Africa", "Other", "Asia", "Americas")
    assert [data.classes[label] for label in data.labels] == [ROWS[row][1] for row in EXPECTED[split]]
    regions = {"FRA": 0, "KEN": 1, "XKX": 2, "ATA": 2, "CHN": 3, "BOL": 4}
    assert data.groups.tolist() == [regions[ROWS[row][2]] for row in EXPECTED[split]]
    for k, sample in enumerate(data):
        assert sample["image"][0, 0, 0] == pytest.approx(10 * EXPECTED[split][k] / 255)
        assert (sample["label"], sample["group"]) == (data.labels[k], data.groups[k])
        assert sample.keys() == {"id", "image", "label", "group", "text"}


def test_fmow_other_forms_of_time(fmow):
    write_fmow(fmow, [(*row[:3], row[3].replace("Z", ".123456+00:00").replace("T", " ")) for row in ROWS])
    assert len(read_fmow(fmow)) == 3
    write_fmow(fmow, [(*row[:3], row[3].replace("Z", "")) for row in ROWS])
    assert len(read_fmow(fmow)) == 3
    write_fmow(fmow, [*ROWS, ("train", "zoo", "CHN", "2013-01-01T01:00:00+02:00"), ("train", "zoo", "CHN", "2012-12-31T23:00:00-02:00")])
    assert list(read_fmow(fmow).ids) == [f"rgb_img_{row}.png" for row in (0, 2, 12, 13)]


def test_fmow_classes():
    assert len(FMOW_CATEGORIES) == len(set(FMOW_CATEGORIES)) == 62
    assert list(FMOW_CATEGORIES) == sorted(FMOW_CATEGORIES)
    assert (FMOW_CATEGORIES[0], FMOW_CATEGORIES[30], FMOW_CATEGORIES[-1]) == ("airport", "multi-unit_residential", "zoo")


def test_fmow_texts(fmow):
    assert len(FMOW_TEMPLATES) == len(set(FMOW_TEMPLATES)) == 16
    data = read_fmow(fmow)
    assert data.classes is FMOW_CATEGORIES
    texts = [data.class_texts(template) for template in FMOW_TEMPLATES]
    assert [text[1] for text in texts] == [
        "satellite photo of a airport_hangar.",
        "aerial photo of a airport_hangar.",
        "satellite photo of an airport hangar.",
        "aerial photo of an airport hangar.",
        *(f"{view} photo of a airport_hangar in {place}." for place, view in itertools.product(
            ("asia", "africa", "the americas", "europe", "oceania"), ("satellite", "aerial")
        )),
        "a photo of a airport_hangar.",
        "airport_hangar.",
    ]  # fmt: skip
    assert texts[2][-1] == "satellite photo of a zoo."
    assert [untokenize(sample["text"]) for sample in data] == ["f a airport.", "oto of a zoo."[-12:], "port hangar."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("train", "castle", "FRA", "2010-01-01T00:00:00Z"), r"one of the 62 categories in .*rgb_metadata\.csv, got 'castle' in line 15\."),
        (("train", "zoo", "FRA", "last year"), r"a timestamp like '2016-01-31T12:00:00Z' in .*, got 'last year' in line 15\."),
        (("train", "zoo", "FRA", ""), r"a timestamp like '2016-01-31T12:00:00Z' in .*, got '' in line 15\."),
    ],
)
def test_fmow_impossible_metadata(row, message, fmow):
    write_fmow(fmow, [*ROWS, row])
    with pytest.raises(ValueError, match=f"^FMoW: expected {message}"):
        read_fmow(fmow)
    assert len(read_fmow(fmow, "test")) == 1


def test_fmow_other_mistakes(fmow):
    with pytest.raises(ValueError, match=r"^FMoW: expected split to be one of 'train', .*, got 'ood_val'\."):
        read_fmow(fmow, "ood_val")
    write_fmow(fmow, ROWS[:3])
    with pytest.raises(ValueError, match=r"^FMoW: expected images of the split 'test' in .*rgb_metadata\.csv, got none\. Pass"):
        read_fmow(fmow, "test")
    damage(fmow / "images/rgb_img_2.png", "text")
    assert read_fmow(fmow)[1] == {"id": "rgb_img_2.png", "broken": f"{fmow}/images/rgb_img_2.png: not an image that PIL knows"}
    for file in (fmow / "images").iterdir():
        damage(file, "missing")
    with pytest.raises(
        FileNotFoundError, match=r"^FMoW: expected the first image of .*, got no file .*rgb_img_0\.png\. Pass the folder fmow"
    ):
        read_fmow(fmow)
    write_csv(fmow / "country_code_mapping.csv", ["name", "region"], [["x", "y"]])
    with pytest.raises(
        ValueError, match=r"^FMoW: expected the columns 'alpha-3', 'region' in .*country_code_mapping\.csv, got 'name', 'region'"
    ):
        read_fmow(fmow)


def test_fmow_batches(fmow):
    (batch,) = DataLoader(read_fmow(fmow), batch_size=3, num_workers=2, collate_fn=collate)
    assert torch.equal(batch["group"], torch.tensor([0, 2, 1]))
    assert torch.equal(batch["label"], torch.tensor([0, 61, 1]))

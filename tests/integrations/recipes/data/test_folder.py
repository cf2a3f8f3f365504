"""Class folders of images: order, names, templates, labels, and every mistake in the layout."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from samples import damage, forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from geomreg.integrations.recipes.data import LabelledFolder, collate

FILES = ["n01/b.JPEG", "n01/a.png", "n01/deep/er/c.webp", "n02_x/A.jpg", "n02_x/a.jpg", "n02 x/a.jpg"]
IDS = ["n01/a.png", "n01/b.JPEG", "n01/deep/er/c.webp", "n02 x/a.jpg", "n02_x/A.jpg", "n02_x/a.jpg"]
NAMES = {"n01": "tench, Tinca tinca", "n02_x": "größe", "n02 x": "cock"}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(FILES):
        write_image(tmp_path / "images" / name, (i, 0, 0))
    return tmp_path / "images"


def read(folder, **more):
    return LabelledFolder(folder, **{"transform": to_tensor, "tokenizer": lambda texts: tokenize([t[-12:] for t in texts])} | more)


def test_samples(folder):
    data = read(folder)
    assert list(data.ids) == IDS
    assert len(data) == 6
    assert data.classes == ("n01", "n02 x", "n02 x")
    assert isinstance(data.labels, np.ndarray)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert data[2].keys() == {"id", "image", "label", "text"}
    for i, sample in enumerate(data):
        assert sample["id"] == IDS[i]
        assert sample["label"] == data.labels[i]
        assert isinstance(sample["label"], int)
    assert (data[0]["image"][0] * 255).mean() == pytest.approx(1)  # a.png: its own pixels
    assert untokenize(data[0]["text"]) == "oto of a n01."[-12:]
    assert data[-1]["id"] == IDS[-1]
    with pytest.raises(IndexError):
        data[6]


def test_same_samples_as_torchvision(folder):
    ours, theirs = read(folder), ImageFolder(str(folder))
    root = f"{folder}/"
    assert {(root + name, label) for name, label in zip(ours.ids, ours.labels, strict=True)} == set(theirs.samples)


def test_hidden_and_other_files_are_ignored(folder):
    for name in (".hidden/x.png", "n01/.x.png", "n01/.deep/x.png", "top.png"):
        write_image(folder / name)
    (folder / "n01" / "notes.txt").write_text("x")
    assert list(read(folder).ids) == IDS


def test_links(folder):
    (folder / "n01" / "deep" / "again").symlink_to(folder / "n02_x")
    (folder / "n01" / "deep" / "loop").symlink_to(folder / "n01")
    assert list(read(folder).ids) == [*IDS[:2], "n01/deep/again/A.jpg", "n01/deep/again/a.jpg", *IDS[2:]]


def test_modalities(folder):
    images = LabelledFolder(folder, transform=to_tensor)
    assert images.modalities == ("image",)
    assert images[0].keys() == {"id", "image", "label"}
    texts = read(folder, transform=forbidden, modalities=("text",))
    damage(folder / "n01" / "a.png", "missing")
    assert texts[0].keys() == {"id", "label", "text"}
    with pytest.raises(TypeError, match=r"^LabelledFolder: expected tokenizer as a function of a list of strings, got None"):
        LabelledFolder(folder, transform=to_tensor, modalities=("image", "text"))
    with pytest.raises(TypeError, match=r"^LabelledFolder: expected transform as a function of a PIL image, got None"):
        LabelledFolder(folder, transform=None)
    with pytest.raises(ValueError, match=r"^LabelledFolder: expected modalities as"):
        LabelledFolder(folder, transform=to_tensor, modalities=("label",))


def test_templates(folder):
    data = read(folder, templates=("a {}", "the {}!"), class_names=NAMES)
    assert [untokenize(sample["text"]) for sample in data] == [
        text[-12:]
        for text in ("a tench, Tinca tinca", "the tench, Tinca tinca!", "a tench, Tinca tinca", "the cock!", "a größe", "the größe!")
    ]
    assert untokenize(data[-1]["text"]) == "the größe!"
    assert data.class_texts("x {} y") == ["x tench, Tinca tinca y", "x cock y", "x größe y"]


@pytest.mark.parametrize("templates", ["a {}", (), ("a photo",), (lambda name: name,), ("a {}", "b")])
def test_impossible_templates(templates, folder):
    with pytest.raises(ValueError, match=r"^LabelledFolder: expected templates as a tuple of texts with \{\} for the class name, got "):
        read(folder, templates=templates)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.json", json.dumps(NAMES)),
        ("names.JSON", "\ufeff" + json.dumps(NAMES)),
        ("names.csv", 'folder,name\nn01,"tench, Tinca tinca"\nn02_x,größe\nn02 x,cock\n'),
        ("names.csv", '\ufeffn01,"tench, Tinca tinca"\nn02_x, größe\nn02 x,cock\n'),
        ("names.tsv", "n01\ttench, Tinca tinca\nn02_x\tgröße\nn02 x\tcock\n"),
    ],
)
def test_names_in_files(name, content, folder, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    for path in (tmp_path / name, str(tmp_path / name)):
        assert read(folder, class_names=path).classes == ("tench, Tinca tinca", "cock", "größe")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({**NAMES, "n03_x": "x"}, r"names of class folders that there are, got one of 'n03_x'\. Did you mean 'n02_x'\?"),
        ({**NAMES, "zebra": "x"}, r"names of class folders that there are, got one of 'zebra'\. Remove it\."),
        ({**NAMES, 1: "x"}, r"names of class folders that there are, got one of 1\. "),
        ({"n01": "x"}, r"a name for every class folder, got none for 'n02 x', 'n02_x'\. Add it to class_names\."),
        ({**NAMES, "n01": ""}, r"class_names as a dict from folder to name, or a file of one, got \{"),
        ({**NAMES, "n01": ["tench"]}, r"class_names as a dict from folder to name"),
        (["tench", "cock"], r"class_names as a dict from folder to name, or a file of one, got \['tench', 'cock'\]\. Write \{"),
    ],
)
def test_impossible_names(names, message, folder):
    with pytest.raises(ValueError, match=f"^LabelledFolder: expected {message}"):
        read(folder, class_names=names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'{"n01": ', r"JSON in .*x\.json, got .*line 1 column.*\. Write an object"),
        ("x.json", b'{"n01": "\xff"}', r"JSON in .*x\.json, got .*utf-8.*\. Write an object"),
        ("x.json", b'["tench"]', r"class_names as a dict from folder to name, or a file of one, got \['tench'\] in .*x\.json\."),
        ("x.csv", b"n01,a,b\nn02,b,c\n", r"two columns in .*x\.csv, folder and name, got 3 in line 1\. Put quotes"),
        ("x.csv", b"n01,a\nn02_x,b\nn01,c\n", r"one name for each folder, got a second one for 'n01' in line 3 of .*x\.csv\. Remove one\."),
        ("x.csv", b"n01,a\nn02_x,b,c\n", r"2 fields a row as in the first"),
        ("x.csv", b"", r"rows in .*x\.csv, got an empty file"),
        ("x.csv", b"n1,a\nn02_x,b\nn02 x,c\n", r"a name for every class folder, got none for 'n01' in .*x\.csv\."),
    ],
)
def test_damaged_files_of_names(name, content, message, folder, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^LabelledFolder: expected {message}"):
        read(folder, class_names=tmp_path / name)


def test_many_missing_names_are_counted(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"c{i}" / "x.png")
    with pytest.raises(ValueError, match=r"got none for 'c0', 'c1', 'c2', 'c3', 'c4' and 3 more\."):
        read(tmp_path, class_names={})


def test_impossible_layouts(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^LabelledFolder: expected a folder of class folders, got none at .*nowhere\. Check"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^LabelledFolder: expected a folder for each class in .*er, got none\. Check the path"):
        read(folder / "n01" / "deep" / "er")
    for name in ("n04", "n03"):
        (folder / name).mkdir()
    (folder / "n03" / "notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"^LabelledFolder: expected images in every class folder of .*, got none in n03, n04\. Remove these\.$"
    ):
        read(folder)
    for name in ("n01", "n02 x", "n02_x"):
        shutil.rmtree(folder / name)
    with pytest.raises(
        FileNotFoundError, match=r"^LabelledFolder: expected images \(\.jpg, .*\) in the class folders of .*, got none\. Check"
    ):
        read(folder)


def test_broken_images(folder):
    damage(folder / "n01" / "a.png", "text")
    assert read(folder)[0] == {"id": "n01/a.png", "broken": f"{folder}/n01/a.png: not an image that PIL knows"}
    with pytest.raises(ValueError, match=r"^LabelledFolder: expected an image, got .*n01/a\.png: not an image that PIL knows\. Repair it"):
        read(folder, strict=True)[0]


def test_worker_processes(folder):
    damage(folder / "n01" / "a.png", "empty")
    loader = DataLoader(read(folder, tokenizer=tokenize), batch_size=3, num_workers=2, collate_fn=collate)
    first, second = loader
    assert first["id"] == IDS[1:3]
    assert first["broken"] == [f"{folder}/n01/a.png: empty file"]
    assert torch.equal(second["label"], torch.tensor([1, 2, 2]))
    assert second["image"].shape == (3, 3, 4, 4)


def test_fingerprints(folder, tmp_path):
    base = read(folder).fingerprint
    assert base.keys() == {"image", "text"}
    assert LabelledFolder(folder, transform=to_tensor).fingerprint == {"image": base["image"]}
    for change in ({"class_names": NAMES}, {"templates": ("{}",)}):
        changed = read(folder, **change).fingerprint
        assert changed["image"] == base["image"]
        assert changed["text"] != base["text"]
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert read(moved).fingerprint == base
    (moved / "n01" / "a.png").rename(moved / "n01" / "z.png")
    changed = read(moved).fingerprint
    assert changed["image"] != base["image"]
    assert changed["text"] != base["text"]


def test_file_names_that_are_not_utf8(folder):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    write_image(folder / "n01" / "a.png").rename(folder / "n01" / name)
    data = read(folder)
    assert data.ids[1] == f"n01/{name}"
    assert "image" in data[1]
    assert data.fingerprint["image"]


def test_class_folders_that_are_not_utf8_need_names(folder):
    """Their texts could be neither tokenized nor written beside a model."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_image(folder / name / "a.png")
    named = re.escape(rf"'caf\udce9' of the folder 'caf\udce9' in {folder}. Rename it, or pass class_names.")
    with pytest.raises(ValueError, match=f"^LabelledFolder: expected names of classes as Unicode, got {named}$"):
        read(folder)
    names = {path.name: path.name for path in folder.iterdir()}
    assert "café" in read(folder, class_names={**names, name: "café"}).classes

"""COCO captions: one sample an annotation, and files of another kind."""

import json
import pickle

import pytest
import torch
from samples import damage, forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import CocoCaptions, collate

IMAGES = [
    {"license": 5, "file_name": "000000057870.jpg", "height": 4, "width": 4, "id": 57870},
    {"file_name": "no caption.jpg", "id": 3},
    {"file_name": "größe.png", "id": 384029},
]
ANNOTATIONS = [
    {"image_id": 57870, "id": 787980, "caption": "A restaurant"},
    {"image_id": 384029, "id": 789366, "caption": "größe\n"},
    {"image_id": 57870, "id": 789368, "caption": "A long table"},
]
IDS = ["57870#787980", "384029#789366", "57870#789368"]


def coco(folder, images=IMAGES, annotations=ANNOTATIONS, **more):
    for k, name in enumerate(("000000057870.jpg", "größe.png")):
        write_image(folder / "images" / name, (90 * k, 0, 0))
    write(folder, {"info": {"year": 2017}, "images": images, "annotations": annotations})
    return CocoCaptions(folder / "captions.json", **{"root": folder / "images", "transform": to_tensor, "tokenizer": tokenize} | more)


def write(folder, content):
    (folder / "captions.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_samples(tmp_path, monkeypatch):
    data = coco(tmp_path)
    assert list(data.ids) == IDS
    assert len(data) == 3
    assert [untokenize(sample["text"]) for sample in data] == ["A restaurant", "größe\n", "A long table"]
    assert data[0].keys() == {"id", "image", "text"}
    assert torch.equal(data[2]["image"], data[0]["image"])
    assert data[-2]["image"][0].mean() == pytest.approx(90 / 255)
    assert (data.transform, data.tokenizer, data.modalities) == (to_tensor, tokenize, ("image", "text"))
    with pytest.raises(IndexError):
        data[3]
    monkeypatch.chdir(tmp_path)
    relative = CocoCaptions("captions.json", root="images", transform=to_tensor, tokenizer=tokenize)
    monkeypatch.chdir("/")
    assert "image" in relative[0]


def test_modalities(tmp_path):
    texts = coco(tmp_path, modalities=("text",), transform=forbidden, root=tmp_path / "nowhere")
    images = coco(tmp_path, modalities=("image",), tokenizer=None)
    assert texts[1].keys() == {"id", "text"}
    assert images[1].keys() == {"id", "image"}
    assert texts.fingerprint | images.fingerprint == coco(tmp_path).fingerprint
    with pytest.raises(TypeError, match=r"^CocoCaptions: expected tokenizer as a function of a list of strings, got None"):
        coco(tmp_path, tokenizer=None)


def test_broken_images(tmp_path):
    data = coco(tmp_path)
    damage(tmp_path / "images/größe.png", "missing")
    assert data[1] == {"id": IDS[1], "broken": f"{tmp_path}/images/größe.png: No such file or directory"}
    with pytest.raises(ValueError, match=r"^CocoCaptions: expected an image, got .*größe\.png: No such file or directory\. Repair it"):
        pickle.loads(pickle.dumps(CocoCaptions(data.path, root=data.root, transform=to_tensor, tokenizer=tokenize, strict=True)))[1]
    first, second = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    assert (first["id"], second["id"]) == ([IDS[0]], [IDS[2]])
    assert len(first["broken"]) == 1
    damage(tmp_path / "images/000000057870.jpg", "missing")
    with pytest.raises(
        FileNotFoundError, match=r"^CocoCaptions: expected the first image of .*captions\.json, got no file .*57870\.jpg\. Pass"
    ):
        CocoCaptions(data.path, root=data.root, transform=to_tensor, tokenizer=tokenize)


def test_fingerprints(tmp_path):
    base = coco(tmp_path).fingerprint
    assert base["image"] != base["text"]
    (tmp_path / "elsewhere").mkdir()
    assert coco(tmp_path / "elsewhere", images=IMAGES[::-1]).fingerprint == base
    edited = coco(tmp_path, annotations=[ANNOTATIONS[0], {**ANNOTATIONS[1], "caption": "x"}, ANNOTATIONS[2]]).fingerprint
    assert edited["image"] == base["image"]
    assert edited["text"] != base["text"]
    renamed = coco(tmp_path, images=[*IMAGES[:2], {**IMAGES[2], "file_name": "000000057870.jpg"}]).fingerprint
    assert renamed["image"] != base["image"]
    assert renamed["text"] == base["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"annotations": [*ANNOTATIONS, {"image_id": 7, "id": 1, "caption": "x"}]},
            r"annotations of the images in .*captions\.json, got image_id 7 in annotation 1\. Add",
        ),
        ({"annotations": [*ANNOTATIONS, ANNOTATIONS[0]]}, r"annotations of different ids in .*, got '57870#787980' twice\. Remove one"),
        ({"images": [*IMAGES, IMAGES[0]]}, r"images of different ids in .*, got 57870 twice\. Remove one"),
        ({"annotations": []}, r"annotations in .*, got none\. Pass a file of captions"),
        (
            {"annotations": [*ANNOTATIONS, {"image_id": 3, "id": 1, "category_id": 1}]},  # instances_*.json
            r"id \(int\), image_id \(int\), caption \(str\) in every entry of annotations in .*, got .*category_id.* at position 3\.",
        ),
        ({"annotations": ["x"]}, r"id \(int\), .* in every entry of annotations in .*, got \"x\" at position 0"),
        ({"annotations": [{"image_id": "3", "id": 1, "caption": "x"}]}, r"id \(int\), .* in every entry of annotations"),
        ({"images": [{"id": 3}]}, r"id \(int\), file_name \(str\) in every entry of images in .*, got \{\"id\": 3\} at position 0"),
        ({"images": {"3": "x"}}, r"an object with lists of images and annotations in .*, got the keys 'info', 'images', 'annotations'\."),
    ],
)
def test_messages(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^CocoCaptions: expected {message}"):
        coco(tmp_path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', r"JSON in .*captions\.json, got .*line 1 column"),
        (b'{"images": "\xff"}', r"JSON in .*captions\.json, got .*utf-8"),
        ([], r"an object with lists of images and annotations in .*, got list\. Pass captions_train2017"),
        ({}, r"an object with lists of images and annotations in .*, got the keys \(none\)\. Pass"),
    ],
)
def test_files_of_another_kind(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^CocoCaptions: expected {message}"):
        CocoCaptions(tmp_path / "captions.json", root=tmp_path, transform=to_tensor, tokenizer=tokenize)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^CocoCaptions: expected a JSON file, got none at .*x\.json\. Check the path\."):
        CocoCaptions(tmp_path / "x.json", root=tmp_path, transform=to_tensor, tokenizer=tokenize)

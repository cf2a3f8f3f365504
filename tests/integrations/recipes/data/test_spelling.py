"""Digests of image paths tell files apart, not how their paths are written."""

import json
import os
from pathlib import Path

import pytest
from samples import to_tensor, tokenize, write_image

from geomreg.integrations.recipes.data import CocoCaptions, CsvPairs
from geomreg.integrations.recipes.data.spelling import spelt_otherwise
from geomreg.integrations.recipes.data.strings import fingerprint

NAMES = ["a/ä.png", "a/2.png", "b/1.png"]


@pytest.fixture
def images(tmp_path):
    for name in NAMES:
        write_image(tmp_path / "data" / "images" / name)
    return tmp_path / "data" / "images"


def csv_of(path, spelt, **options):
    path.parent.mkdir(exist_ok=True)
    path.write_text("id,filepath\n" + "".join(f"{k},{one}\n" for k, one in enumerate(spelt)), encoding="utf-8")
    return CsvPairs(path, transform=to_tensor, tokenizer=None, modalities=("image",), **options)


def coco_of(path, spelt, root):
    path.parent.mkdir(exist_ok=True)
    images = [{"id": k, "file_name": str(one)} for k, one in enumerate(spelt)]
    captions = [{"id": k, "image_id": k, "caption": "x"} for k in range(len(spelt))]
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return CocoCaptions(path, root=root, transform=to_tensor, tokenizer=tokenize)


def spellings(images, build):
    """The same files from several places."""
    there, lists = images.parent, images.parent / "lists"
    yield build(images / "x", NAMES, root=images)
    yield build(there / "x", [f"images/{name}" for name in NAMES], root=there)
    yield build(there / "x", [f"./images/{name}" for name in NAMES], root=there)
    yield build(lists / "x", [f"../images/{name}" for name in NAMES], root=lists)
    yield build(there.parent / "elsewhere" / "x", [images / name for name in NAMES], root=Path("/"))


@pytest.mark.parametrize("build", [csv_of, coco_of])
def test_spellings_of_the_same_files(images, build):
    known = list(spellings(images, build))
    assert len({one.fingerprint["image"] for one in known}) == len(known)
    for one in known:
        for other in known:
            assert one.same_files(other.fingerprint["image"])


def test_other_files_ids_and_orders_are_none(images):
    known = list(spellings(images, csv_of))
    for name in NAMES:
        write_image(images.parent / "newer" / name)
    others = [
        csv_of(images.parent / "y", [f"newer/{name}" for name in NAMES]),
        csv_of(images.parent / "y", [f"images/{name}" for name in NAMES[::-1]]),
        csv_of(images.parent / "y", [f"images/{name}" for name in (*NAMES[:2], NAMES[1])]),
        csv_of(images.parent / "y", [f"images/{name}" for name in NAMES[:2]]),
    ]
    for one in known[1:]:  # the first writes no folder
        for other in others:
            assert not one.same_files(other.fingerprint["image"])
            assert not other.same_files(one.fingerprint["image"])


def test_one_file():
    assert spelt_otherwise(fingerprint(["0"], ["x.png"]), ["0"], [os.path.abspath("x.png")])
    assert spelt_otherwise(fingerprint(["0"], ["x.png"]), ["0"], ["/x.png"])
    assert not spelt_otherwise(fingerprint(["0"], ["y.png"]), ["0"], ["/x.png"])

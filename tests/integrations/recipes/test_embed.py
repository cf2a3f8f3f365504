"""``geomreg embed``: what it builds is what the model says, and the training loop takes it."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from geomreg import EmbeddingCache, Teacher
from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.config import READERS
from geomreg.integrations.recipes.data import CsvPairs, LabelledFolder, collate
from geomreg.integrations.recipes.embed import Options, embed_data
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.train import encode

ROWS = 11


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def pairs(tmp_path):
    for row in range(ROWS):
        picture(tmp_path / "images" / f"{row}.png", row)
    lines = [f"images/{row}.png\tpicture {row}" for row in range(ROWS)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *lines]) + "\n")
    return tmp_path / "pairs.tsv"


def options(data, output, **others):
    return Options(**{"model": str(model_folder()), "data": data, "output": output, "device": "cpu", "workers": 0, **others})


@pytest.fixture(scope="module")
def emojiclip():
    loaded = load(str(model_folder()))
    return loaded.model, loaded.transform, loaded.tokenizer


def test_command_and_cached_teacher(pairs, emojiclip, tmp_path, capsys):
    model, transform, tokenizer = emojiclip
    arguments = ["--model", str(model_folder()), "--data", str(pairs), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["embed", *arguments, "--workers", "2", "--batch_size", "4"]) == 0
    assert "image: 11 x 128 float32, text: 11 x 128 float32" in capsys.readouterr().out
    data = CsvPairs(pairs, transform=transform, tokenizer=tokenizer)
    batch = collate([data[row] for row in (3, 10, 0)])
    teacher = Teacher.cached(EmbeddingCache.open(tmp_path / "out"), preprocessing=transform, tokenizer=tokenizer)
    for found, expected in zip(teacher(batch), Teacher(model, encode)(batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = open_clip.SimpleTokenizer(context_length=20)
    with pytest.raises(ValueError, match=r"expected the text table of .* to be built with tokenizer"):
        Teacher.cached(teacher.cache, tokenizer=other)
    small = open_clip.image_transform(32, is_train=False)
    with pytest.raises(ValueError, match=r"expected the image table of .* to be built with preprocessing"):
        Teacher.cached(teacher.cache, preprocessing=small)


def test_edited_captions_keep_the_images(pairs, tmp_path):
    embed_data(options(pairs, tmp_path / "out"))
    folders = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("image-*")}
    pairs.write_text(pairs.read_text().replace("picture 3", "drawing 3"))
    for path in (pairs.parent / "images").iterdir():
        path.unlink()  # the images are not looked at
    cache = embed_data(options(pairs, tmp_path / "out", modality="text"))
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("image-*")} == folders
    assert len(cache) == ROWS
    assert len(list((tmp_path / "out").glob("text-*"))) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near(pairs, tmp_path, precision):
    exact = embed_data(options(pairs, tmp_path / "exact"))(["images/3.png"])
    near = embed_data(options(pairs, tmp_path / "near", precision=precision, dtype="float16", check=4))(["images/3.png"])
    for one, other in zip(exact, near, strict=True):
        assert 0 < (one - other).norm() < 0.05


def test_class_folders(tmp_path, emojiclip):
    for row in range(4):
        picture(tmp_path / "data" / ("red_fox" if row % 2 else "owl") / f"{row}.png", row)
    cache = embed_data(options(tmp_path / "data", tmp_path / "out", templates=("a drawing of a {}.", "{}")))
    _, transform, tokenizer = emojiclip
    data = LabelledFolder(tmp_path / "data", transform=transform, tokenizer=tokenizer, templates=("a drawing of a {}.", "{}"))
    assert cache.ids() == list(data.ids) == ["owl/0.png", "owl/2.png", "red_fox/1.png", "red_fox/3.png"]


def test_unreadable_images_are_listed(pairs, tmp_path, capsys):
    (pairs.parent / "images" / "7.png").write_bytes(b"no picture")
    cache = embed_data(options(pairs, tmp_path / "out"))
    assert len(cache) == ROWS - 1
    assert "1 of 11 samples could not be read" in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert line.startswith("images/7.png\t")
    assert "not an image that PIL knows" in line
    with pytest.raises(ValueError, match=r"expected an image, got .*7.png"):
        embed_data(options(pairs, tmp_path / "strict", strict=True))
    picture(pairs.parent / "images" / "7.png", 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ViT-B-61"}, "expected a model of open_clip or a folder, got 'ViT-B-61'. Did you mean"),
        ({"model": "ViT-B-16"}, r"expected pretrained weights for ViT-B-16 \(a file, or of: openai, .*\), got none. Pass them"),
        ({"pretrained": "openai"}, "expected no pretrained weights beside the folder"),
        ({"model": "."}, "expected open_clip_config.json in the model's folder ., got none"),
        ({"data": "absent.csv"}, "absent.csv"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "expected to run on cuda, got cpu")]),
    ],
)
def test_bad_options(pairs, tmp_path, capsys, changes, message):
    values = {"model": str(model_folder()), "data": str(pairs), "output": str(tmp_path / "out"), "device": "cpu", **changes}
    assert main(["embed", *(part for key, value in values.items() for part in (f"--{key}", value))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geomreg: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_fingerprint_is_readable(pairs, tmp_path):
    embed_data(options(pairs, tmp_path / "out"))
    (table,) = (tmp_path / "out").glob("image-*/table.json")
    fingerprint = json.loads(table.read_text())["fingerprint"]
    assert "Resize" in fingerprint["preprocessing"]
    assert "0x" not in fingerprint["preprocessing"]
    assert fingerprint["normalisation"] == "unit"
    assert fingerprint["data set"].startswith("11 samples, ids ")


@pytest.mark.parametrize("kind", ["tar", "csv", "flickr8k"])
def test_every_kind_of_reader(pairs, emojiclip, tmp_path, kind):
    """The cache has the reader's ids, so that a run on the same data finds them."""
    model, transform, tokenizer = emojiclip
    folder = pairs.parent
    with tarfile.open(folder / "0.tar", "w") as tar:
        for row in range(ROWS):
            (folder / f"{row}.txt").write_text(f"picture {row}")
            tar.add(folder / "images" / f"{row}.png", f"{row}.png")
            tar.add(folder / f"{row}.txt", f"{row}.txt")
    (folder / "captions.token").write_text("".join(f"{row}.png#0\tpicture {row}\n" for row in range(ROWS)))
    root = {"root": str(folder / "images")}
    path, more = {"tar": ("*.tar", {}), "csv": ("pairs.tsv", {"id_key": "title"}), "flickr8k": ("captions.token", root)}[kind]
    arguments = ["--model", str(model_folder()), "--data", str(folder / path), "--kind", kind, "--options", json.dumps(more)]
    assert main(["embed", *arguments, "--output", str(tmp_path / "out"), "--device", "cpu", "--workers", "0"]) == 0
    data = READERS[kind](str(folder / path), transform=transform, tokenizer=tokenizer, **more)
    cache = EmbeddingCache.open(tmp_path / "out")
    assert sorted(cache.ids("image")) == sorted(cache.ids("text")) == sorted(data.ids)
    batch = collate([data[row] for row in (3, 10, 0)])
    for found, expected in zip(cache(batch["id"]), Teacher(model, encode)(batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"json_key": "c"}}, "expected kind with options, got options json_key alone"),
        ({"kind": "csv", "image_key": "nope"}, "expected no image_key for kind csv, which takes options, got nope. Leave it out"),
        ({"kind": "tar", "templates": ("{}",)}, "expected no templates for kind tar, which takes options, got ('{}',). Leave it out"),
        ({"class_names": Path("x")}, "expected no class_names for a CSV file, got x. Leave it out"),
        ({"kind": "flickr8k"}, "expected the option root of Flickr8k, got none. Set options.root"),
        ({"kind": "tar", "options": {"jsonkey": "c"}}, "expected options of TarPairs, got 'jsonkey'. Did you mean 'json_key'"),
    ],
)
def test_options_of_readers(pairs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        options(pairs, tmp_path / "out", **changes)
    with pytest.raises(ValueError, match="expected no caption_key for a folder, got c"):
        options(tmp_path, tmp_path / "out", caption_key="c")

"""Pairs of a CSV file: FLYP's and open_clip's format, ids, broken images, modalities, workers, fingerprints, memory."""

import csv
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import DAMAGES, damage, forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import CsvPairs, collate
from geomreg.integrations.recipes.data.pairs import CAPTION_KEYS, IMAGE_KEYS
from geomreg.integrations.recipes.data.strings import Strings

COLORS = {"a.png": (255, 0, 0), "sub/b.png": (0, 255, 0), "c.png": (0, 0, 255)}
HEADER = ["filepath", "title"]
ROWS = [["a.png", "a dog"], ["sub/b.png", "a cat, red"], ["c.png", "größe"]]


def pairs(folder: Path, rows=ROWS, *, header=HEADER, written="\t", name="pairs.csv", **more) -> CsvPairs:
    for path, color in COLORS.items():
        if not (folder / path).exists():
            write_image(folder / path, color)
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=written).writerows([header, *rows])
    return CsvPairs(folder / name, **{"transform": to_tensor, "tokenizer": tokenize} | more)


def test_format_of_flyp_and_open_clip(tmp_path):
    """As pandas' ``to_csv(sep="\\t")`` writes it, with absolute paths."""
    for path, color in COLORS.items():
        write_image(tmp_path / "images" / path, color)
    lines = "".join(f"{tmp_path}/images/{path}\ta photo of a {path[-5]}.\n" for path in COLORS)
    (tmp_path / "flyp.csv").write_text(f"filepath\ttitle\n{lines}")
    data = CsvPairs(str(tmp_path / "flyp.csv"), transform=to_tensor, tokenizer=lambda texts: tokenize([t[-4:] for t in texts]))
    assert len(data) == 3
    for i, (path, color) in enumerate(COLORS.items()):
        assert data[i].keys() == {"id", "image", "text"}
        assert data[i]["id"] == f"{tmp_path}/images/{path}"
        assert torch.equal(data[i]["image"], torch.tensor(color)[:, None, None].expand(3, 4, 4) / 255)
        assert untokenize(data[i]["text"]) == f"a {path[-5]}."[-4:]


def test_samples_and_attributes(tmp_path):
    data = pairs(tmp_path)
    assert list(data.ids) == [path for path, _ in ROWS]
    assert [untokenize(sample["text"]) for sample in data] == [caption for _, caption in ROWS]
    assert data[0]["text"].shape == (12,)
    assert data[0]["text"].dtype == torch.int64
    assert data[-1]["id"] == "c.png"
    assert (data.transform, data.tokenizer, data.modalities) == (to_tensor, tokenize, ("image", "text"))
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("separator", "\t,;|")
@pytest.mark.parametrize("image", IMAGE_KEYS)
def test_usual_names_of_columns(separator, image, tmp_path):
    for caption in CAPTION_KEYS:
        rows = [["7", text, path] for path, text in ROWS]
        data = pairs(tmp_path, rows, header=["x", caption.upper(), f" {image}"], written=separator)
        assert list(data.ids) == [path for path, _ in ROWS]
        assert untokenize(data[1]["text"]) == "a cat, red"


def test_given_columns_win(tmp_path):
    rows = [[*row, "other", "c.png"] for row in ROWS]
    data = pairs(
        tmp_path, rows, header=[*HEADER, "alt text", "thumbnail"], image_key="thumbnail", caption_key="alt text", id_key="filepath"
    )
    assert list(data.ids) == [path for path, _ in ROWS]
    assert untokenize(data[0]["text"]) == "other"
    assert data[0]["image"][2].min() == 1


def test_root(tmp_path):
    (tmp_path / "lists").mkdir()
    first = pairs(tmp_path)
    shutil.move(tmp_path / "pairs.csv", tmp_path / "lists" / "pairs.csv")
    read = {"transform": to_tensor, "tokenizer": tokenize}
    with pytest.raises(FileNotFoundError, match=r"^CsvPairs: expected the first image of .*, got no file .*lists/a\.png\. Pass root="):
        CsvPairs(tmp_path / "lists" / "pairs.csv", **read)
    data = CsvPairs(tmp_path / "lists" / "pairs.csv", root=str(tmp_path), **read)
    assert torch.equal(data[2]["image"], first[2]["image"])


def test_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = CsvPairs("pairs.csv", transform=to_tensor, tokenizer=tokenize)
    monkeypatch.chdir("/")
    assert "image" in data[0]


def test_rows_of_one_image_are_numbered(tmp_path):
    rows = [["a.png", "1"], ["c.png", "2"], ["a.png", "3"], ["a.png", "4"]]
    data = pairs(tmp_path, rows)
    assert list(data.ids) == ["a.png", "c.png", "a.png#1", "a.png#2"]
    assert torch.equal(data[3]["image"], data[0]["image"])
    edited = pairs(tmp_path, [[path, "new"] for path, _ in rows])
    assert list(edited.ids) == list(data.ids)
    with pytest.raises(ValueError, match=r"^CsvPairs: expected ids that differ, got 'a\.png#1' in lines 3 and 4 of .*\. Pass id_key="):
        pairs(tmp_path, [["a.png", "1"], ["a.png", "2"], ["a.png#1", "3"]])


@pytest.mark.parametrize("key", [{}, {"id_key": "id"}])
def test_explicit_ids(key, tmp_path):
    header = ["id", *HEADER]
    data = pairs(tmp_path, [[f"n{i}", *row] for i, row in enumerate(ROWS)], header=header, **key)
    assert list(data.ids) == ["n0", "n1", "n2"]
    with pytest.raises(
        ValueError, match=r"^CsvPairs: expected ids that differ, got 'x' in lines 2 and 5 of .*pairs\.csv\. Make them unique"
    ):
        pairs(tmp_path, [["x", "a.png", "two\nlines"], ["y", *ROWS[1]], ["x", *ROWS[2]]], header=header, **key)
    with pytest.raises(ValueError, match=r"^CsvPairs: expected a text in every row of the id column, got an empty one in line 3 of"):
        pairs(tmp_path, [["x", *ROWS[0]], ["", *ROWS[1]]], header=header, **key)


def test_ids_of_captions_alone(tmp_path):
    (tmp_path / "texts.txt").write_text("caption\na dog, a cat\nanother; dog\n")
    data = CsvPairs(tmp_path / "texts.txt", transform=None, tokenizer=tokenize, modalities=("text",))
    assert list(data.ids) == ["0", "1"]
    assert untokenize(data[0]["text"]) == "a dog, a cat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_key": "file_path"},
            r"image_key as one of the columns 'filepath', 'title' of .*pairs\.csv, got 'file_path'\. Did you mean 'filepath'\?",
        ),
        ({"caption_key": "titel"}, r"caption_key as one of the columns 'filepath', 'title' of .*, got 'titel'\. Did you mean 'title'\?"),
        ({"id_key": "zzz"}, r"id_key as one of the columns 'filepath', 'title' of .*, got 'zzz'\. Pass one of these\."),
        ({"separator": ","}, r"a column of images in .* \(filepath, image, .*\), got the columns 'filepath\\ttitle'\. Pass image_key="),
        (
            {"header": ["filepath", "legend"]},
            r"a column of captions in .* \(title, .*\), got the columns 'filepath', 'legend'\. Pass caption_key=",
        ),
        (
            {"header": ROWS[1]},
            r"a column of images in .*got the columns 'sub/b\.png', 'a cat, red'\. .*or write a header as the first line",
        ),
        ({"header": ["title", "title"], "image_key": "title"}, r"one column 'title' in .*, got 2 among 'title', 'title'\. Rename"),
        ({"rows": []}, r"rows after the header of .*pairs\.csv, got none\. Write a row"),
        ({"rows": [*ROWS, ["", "x"]]}, r"a text in every row of the path column, got an empty one in line 5 of"),
        ({"rows": [*ROWS, ["a.png"]]}, r"2 fields a row as in the first, separated by '\\t', got 1 in line 5 of"),
        ({"rows": [*ROWS, ["a.png", "b", "c"]]}, r"2 fields a row as in the first, separated by '\\t', got 3 in line 5 of"),
        ({"modalities": ("image", "sound")}, r"modalities as a tuple of different ones of 'image', 'text'"),
        ({"modalities": ()}, r"modalities as a tuple of different ones of 'image', 'text'"),
    ],
)
def test_messages(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^CsvPairs: expected {message}"):
        pairs(tmp_path, **options)


@pytest.mark.parametrize("option", ["transform", "tokenizer"])
def test_functions_are_needed(option, tmp_path):
    with pytest.raises(TypeError, match=rf"^CsvPairs: expected {option} as a function .*, got None\. Pass a function"):
        pairs(tmp_path, **{option: None})


@pytest.mark.parametrize("tokens", [{"input_ids": [[1]]}, torch.zeros(12, dtype=torch.int64), torch.zeros(1, 12), [[1, 2]]])
def test_tokenizers_of_another_kind(tokens, tmp_path):
    with pytest.raises(
        TypeError, match=r"^CsvPairs: expected tokenizer to give an int64 tensor of shape \(1, L\) for one text, got .*\. Use open_clip"
    ):
        pairs(tmp_path, tokenizer=lambda texts: tokens)[0]


def test_open_clip_preprocessing(tmp_path):
    import open_clip
    from open_clip.transform import image_transform

    data = pairs(tmp_path, transform=image_transform(32, is_train=False), tokenizer=open_clip.SimpleTokenizer(context_length=16))
    batch = collate([data[0], data[1]])
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["text"].shape == (2, 16)


@pytest.mark.parametrize("kind", DAMAGES)
def test_broken_images(kind, tmp_path):
    data = pairs(tmp_path, tokenizer=forbidden)
    damage(tmp_path / "sub/b.png", kind)
    sample = data[1]
    assert sample.keys() == {"id", "broken"}
    assert sample["id"] == "sub/b.png"
    assert sample["broken"].startswith(f"{tmp_path}/sub/b.png: ")
    strict = CsvPairs(tmp_path / "pairs.csv", transform=to_tensor, tokenizer=tokenize, strict=True)
    assert "image" in strict[0]
    with pytest.raises(
        ValueError, match=rf"^CsvPairs: expected an image, got .*sub/b\.png: {DAMAGES[kind]}.* \(line 3 of .*pairs\.csv\)\."
    ):
        strict[1]


def test_decompression_bombs_are_broken(tmp_path, monkeypatch):
    data = pairs(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert "exceeds limit" in data[0]["broken"]


def test_modalities(tmp_path):
    whole = pairs(tmp_path)
    texts = pairs(tmp_path, modalities=("text",), transform=forbidden)
    images = pairs(tmp_path, modalities=("image",), tokenizer=forbidden)
    assert texts[1].keys() == {"id", "text"}
    assert images[1].keys() == {"id", "image"}
    assert list(texts.ids) == list(images.ids) == list(whole.ids)
    assert texts.fingerprint | images.fingerprint == whole.fingerprint
    assert texts.fingerprint.keys() == {"text"}
    shutil.rmtree(tmp_path / "sub")
    (tmp_path / "a.png").unlink()
    assert "text" in CsvPairs(tmp_path / "pairs.csv", transform=None, tokenizer=tokenize, modalities=("text",))[1]
    (tmp_path / "list").write_text("path\nc.png\n")
    assert "image" in CsvPairs(tmp_path / "list", transform=to_tensor, tokenizer=None, modalities=("image",))[0]


def test_a_missing_image_is_a_broken_sample_wherever_it_is(tmp_path):
    """Only where none of some is there, the folder is wrong."""
    assert len(pairs(tmp_path, [*ROWS, ["nowhere.png", "x"]])) == 4
    data = pairs(tmp_path, [["nowhere.png", "x"], *ROWS])
    assert ["broken" in data[row] for row in range(4)] == [True, False, False, False]
    with pytest.raises(FileNotFoundError, match=r"^CsvPairs: expected the first image of .*, got no file .*/0\.png"):
        pairs(tmp_path, [[f"{row}.png", "x"] for row in range(1000)])


def test_worker_processes(tmp_path):
    data = pairs(tmp_path, [*ROWS, ["nowhere.png", "x"]])
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    first, second = loader
    assert first["id"] == ["a.png", "sub/b.png"]
    assert torch.equal(first["image"], torch.stack([data[0]["image"], data[1]["image"]]))
    assert torch.equal(first["text"], torch.stack([data[0]["text"], data[1]["text"]]))
    assert second["id"] == ["c.png"]
    assert second["broken"] == [f"{tmp_path}/nowhere.png: No such file or directory"]


def test_strict_in_worker_processes(tmp_path):
    batches = iter(DataLoader(pairs(tmp_path, [*ROWS, ["nowhere.png", "x"]], strict=True), num_workers=2, collate_fn=collate))
    assert [next(batches)["id"] for _ in ROWS] == [[path] for path, _ in ROWS]
    with pytest.raises(ValueError, match=r"CsvPairs: expected an image, got .*nowhere\.png"):
        next(batches)
    assert next(batches, None) is None  # ends the workers: left to the garbage collector, torch waits 10 s for them


def test_fingerprints(tmp_path):
    base = pairs(tmp_path).fingerprint
    assert base.keys() == {"image", "text"}
    assert base["image"] != base["text"]
    captions = pairs(tmp_path, [[path, f"{caption}!"] for path, caption in ROWS]).fingerprint
    assert captions["image"] == base["image"]
    assert captions["text"] != base["text"]
    for rows in (ROWS[::-1], ROWS[:2], [*ROWS, ROWS[0]]):
        changed = pairs(tmp_path, rows).fingerprint
        assert changed["image"] != base["image"]
        assert changed["text"] != base["text"]
    ids = {"header": ["id", *HEADER], "rows": [[row[0], *row] for row in ROWS]}
    assert pairs(tmp_path, written=",", **ids).fingerprint == base  # what counts is what was read
    other_images = [[row[0], "c.png", row[1]] for row in ROWS]
    changed = pairs(tmp_path, other_images, header=ids["header"]).fingerprint
    assert changed["image"] != base["image"]
    assert changed["text"] == base["text"]
    (tmp_path / "elsewhere").mkdir()
    assert pairs(tmp_path / "elsewhere", name="other.tsv").fingerprint == base


def test_pickle(tmp_path):
    """As workers that are not forked get it."""
    data = pairs(tmp_path, [*ROWS, ROWS[0]])
    copy, batch = pickle.loads(pickle.dumps((data, collate)))
    assert batch is collate
    assert copy[3]["id"] == "a.png#1"
    assert torch.equal(copy[3]["image"], data[0]["image"])
    assert list(copy.ids) == list(data.ids)
    assert copy.fingerprint == data.fingerprint


def held(value, seen=None):
    """Bytes of the arrays and byte strings that an object keeps alive, each counted once."""
    seen = {} if seen is None else seen
    if isinstance(value, np.ndarray) and value.base is not None:
        value = value.base
    if id(value) in seen:
        return 0
    seen[id(value)] = value
    if isinstance(value, (CsvPairs, Strings)):
        return sum(held(part, seen) for part in vars(value).values())
    return sys.getsizeof(value)


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("ids", [False, True])
def test_memory_of_many_rows(copies, ids, tmp_path):
    rows = [[f"images/{i // copies:08d}.jpg", f"a photo, number {i}, of something"] for i in range(100_000)]
    write_image(tmp_path / rows[0][0])
    if ids:
        rows = [[*row, f"{i:06d}"] for i, row in enumerate(rows)]
    data = pairs(tmp_path, rows, header=[*HEADER, *(["id"] if ids else [])])
    size = (tmp_path / "pairs.csv").stat().st_size
    assert len(data) == 100_000
    assert data.ids[99_999] == ("099999" if ids else "images/00099999.jpg" if copies == 1 else "images/00019999.jpg#4")
    assert held(data) < 2 * size
    assert held(data) > 0.9 * size  # the measure sees the columns

"""A caption for each sample from a file, beside what the sample has."""

import pickle

import pytest
from samples import damage, forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import Captioned, CsvPairs, LabelledFolder, Subset, collate

IDS = ["cat/a.png", "cat/b.png", "dog/a.png"]


@pytest.fixture
def whole(tmp_path):
    for k, name in enumerate(IDS):
        write_image(tmp_path / "images" / name, (40 * k, 0, 0))
    return LabelledFolder(tmp_path / "images", transform=to_tensor, tokenizer=tokenize, modalities=("image",))


def table(tmp_path, text):
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    return tmp_path / "captions.csv"


ROWS = 'cat/b.png,a cat asleep\ndog/a.png,"a dog, wet"\ncat/a.png, big cat \nother/x.png,unused\n'
CAPTIONS = ["big cat", "a cat asleep", "a dog, wet"]


@pytest.mark.parametrize("header", ["id,caption", "image_path,title", "Path,TEXT", "filepath,caption"])
def test_columns_and_order(whole, tmp_path, header):
    data = Captioned(whole, table(tmp_path, f"{header}\n{ROWS}"))
    assert len(data) == 3
    assert list(data.captions) == CAPTIONS
    for k, sample in enumerate(data):
        assert sample.keys() == {"id", "image", "label", "caption"}
        assert sample["id"] == IDS[k]
        assert untokenize(sample["caption"]) == CAPTIONS[k]
        assert (sample["image"] == whole[k]["image"]).all()
    assert untokenize(data[-1]["caption"]) == CAPTIONS[2]
    with pytest.raises(IndexError):
        data[3]


def test_named_columns(whole, tmp_path):
    rows = "id;caption;file;blip\n1;x;cat/a.png;one\n2;x;cat/b.png;two\n3;x;dog/a.png;three\n"
    data = Captioned(whole, table(tmp_path, rows), id_key="file", caption_key="blip")
    assert [untokenize(sample["caption"]) for sample in data] == ["one", "two", "three"]
    with pytest.raises(ValueError, match=r"^Captioned: expected id_key as one of the columns .*, got 'fil'\. Did you mean 'file'\?"):
        Captioned(whole, tmp_path / "captions.csv", id_key="fil")
    assert untokenize(Captioned(whole, table(tmp_path, rows.replace(";", "|")), id_key="file", separator="|")[0]["caption"]) == "x"


def test_the_id_column_comes_first(whole, tmp_path):
    rows = "path,id,caption\nx/1.png,cat/a.png,one\nx/2.png,cat/b.png,two\nx/3.png,dog/a.png,three\n"
    assert untokenize(Captioned(whole, table(tmp_path, rows))[2]["caption"]) == "three"


def test_attributes_are_the_data_sets(whole, tmp_path):
    data = Captioned(whole, table(tmp_path, f"id,caption\n{ROWS}"))
    assert (data.classes, data.templates, data.modalities) == (whole.classes, whole.templates, whole.modalities)
    assert (data.ids, data.labels) == (whole.ids, whole.labels)
    assert data.class_texts("{}!") == ["cat!", "dog!"]
    with pytest.raises(AttributeError):
        data.groups  # noqa: B018
    again = pickle.loads(pickle.dumps(data))
    assert untokenize(again[2]["caption"]) == CAPTIONS[2]


def test_pairs_keep_their_text(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\na.png,x\na.png,y\n")
    pairs = CsvPairs(tmp_path / "pairs.csv", transform=to_tensor, tokenizer=tokenize)
    data = Captioned(
        pairs, table(tmp_path, "id,caption\na.png#1,two\na.png,one\n"), tokenizer=lambda texts: tokenize([t + "!" for t in texts])
    )
    assert [(untokenize(s["text"]), untokenize(s["caption"])) for s in data] == [("x", "one!"), ("y", "two!")]


def test_with_a_subset_either_way(whole, tmp_path):
    (tmp_path / "ids.txt").write_text("dog/a.png\ncat/a.png\n")
    path = table(tmp_path, "id,caption\ndog/a.png,three\ncat/a.png,one\n")
    inner = Captioned(Subset(whole, tmp_path / "ids.txt"), path)
    assert [(s["label"], untokenize(s["caption"])) for s in inner] == [(0, "one"), (1, "three")]
    assert inner.labels.tolist() == [0, 1]
    outer = Subset(Captioned(whole, table(tmp_path, f"id,caption\n{ROWS}")), tmp_path / "ids.txt")
    assert [untokenize(s["caption"]) for s in outer] == [CAPTIONS[0], CAPTIONS[2]]
    assert outer.fingerprint.keys() == {"image", "caption"}


def test_batches_and_broken_images(whole, tmp_path):
    damage(tmp_path / "images" / "cat" / "b.png", "empty")
    data = Captioned(whole, table(tmp_path, f"id,caption\n{ROWS}"))
    (batch,) = DataLoader(data, batch_size=3, num_workers=1, collate_fn=collate)
    assert [untokenize(row) for row in batch["caption"]] == [CAPTIONS[0], CAPTIONS[2]]
    assert len(batch["broken"]) == 1
    assert data[1].keys() == {"id", "broken"}


def test_fingerprint(whole, tmp_path):
    one = Captioned(whole, table(tmp_path, f"id,caption\n{ROWS}")).fingerprint
    assert one["image"] == whole.fingerprint["image"]
    assert one == Captioned(whole, table(tmp_path, "id,caption\n" + "\n".join(reversed(ROWS.splitlines())))).fingerprint
    assert one["caption"] != Captioned(whole, table(tmp_path, f"id,caption\n{ROWS.replace('wet', 'dry')}")).fingerprint["caption"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,caption\ncat/a.png,x\n",
            r"a caption for each of the 3 samples in .*captions\.csv, got none for 2, the first 'cat/b\.png'\. Ids there look like 'cat/a",
        ),
        ("id,caption\n" + ROWS + "cat/a.png,again\n", r"one caption for each sample in .*, got two for 'cat/a\.png', in lines 4 and 6"),
        ("id,caption\n", r"rows after the header of .*captions\.csv, got none"),
        ("", r"rows in .*captions\.csv, got an empty file"),
        ("id,words\ncat/a.png,x\n", r"a column of captions in .* got the columns 'id', 'words'\. Pass caption_key="),
        ("name,caption\ncat/a.png,x\n", r"a column of ids in .* got the columns 'name', 'caption'\. Pass id_key="),
        ("id,caption,caption\ncat/a.png,x,y\n", r"one column 'caption' in .*, got 2 among"),
        ("id,caption\ncat/a.png,x,y\n", r"2 fields a row as in the first"),
    ],
)
def test_mistakes(whole, tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^Captioned: expected {message}"):
        Captioned(whole, table(tmp_path, text))


def test_other_mistakes(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^Captioned: expected a CSV or TSV file, got none at"):
        Captioned(whole, tmp_path / "absent.csv")
    images = LabelledFolder(tmp_path / "images", transform=forbidden)
    with pytest.raises(TypeError, match=r"^Captioned: expected tokenizer as a function of a list of strings, got None"):
        Captioned(images, table(tmp_path, f"id,caption\n{ROWS}"))

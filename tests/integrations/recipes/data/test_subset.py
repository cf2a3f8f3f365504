"""Samples chosen by their ids, from every kind of reader."""

import csv
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from samples import to_tensor, tokenize, write_image
from torch.utils.data import DataLoader

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.integrations.recipes.data import CsvPairs, IWildCam, LabelledFolder, Subset, TarPairs, collate

ALL = {"transform": to_tensor, "tokenizer": tokenize}


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(["cat/a.png", "cat/b.png", "dog/a.png", "emu/c.png", "emu/d.png"]):
        write_image(tmp_path / "images" / name, (40 * k, 0, 0))
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path):
    content = write_image(tmp_path / "x.png").read_bytes()
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for row in range(5):
                for extension, data in (("png", content), ("txt", f"{shard} {row}".encode())):
                    member = tarfile.TarInfo(f"{row}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tmp_path / "{0..3}.tar"


def chosen(tmp_path, ids):
    (tmp_path / "ids.txt").write_bytes("\n".join(ids).encode("utf-8", "surrogateescape"))
    return tmp_path / "ids.txt"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one if k != "id")


def test_class_folders(folder, tmp_path):
    whole = LabelledFolder(folder, **ALL, templates=("a {}", "the {}", "my {}"))
    data = Subset(whole, chosen(tmp_path, ["emu/d.png", "cat/b.png", "dog/a.png"]))  # the reader's order, not the file's
    assert list(data.ids) == ["cat/b.png", "dog/a.png", "emu/d.png"]
    assert len(data) == 3
    assert data.rows.tolist() == [1, 2, 4]
    assert data.labels.tolist() == [0, 1, 2]
    assert isinstance(data.labels, np.ndarray)
    assert data.classes == ("cat", "dog", "emu")
    assert data.templates == ("a {}", "the {}", "my {}")
    assert data.class_texts("{}!") == ["cat!", "dog!", "emu!"]
    assert (data.modalities, data.transform, data.tokenizer) == (("image", "text"), to_tensor, tokenize)
    assert not hasattr(data, "groups")
    for k, row in enumerate((1, 2, 4)):
        assert data[k]["id"] == whole.ids[row]
        assert same(data[k], whole[row])  # its template too
    assert data[-1]["id"] == "emu/d.png"
    assert [sample["id"] for sample in data] == list(data.ids)
    with pytest.raises(IndexError):
        data[3]


def test_classes_without_samples_stay(folder, tmp_path):
    data = Subset(LabelledFolder(folder, transform=to_tensor), chosen(tmp_path, ["emu/c.png"]))
    assert data.classes == ("cat", "dog", "emu")
    assert data.labels.tolist() == [2]


def test_shards_keep_their_groups_ascending(shards, tmp_path):
    whole = TarPairs(shards, **ALL)
    ids = ["3/1", "0/4", "0/0", "2/2"]
    data = Subset(whole, chosen(tmp_path, ids))
    assert list(data.ids) == sorted(ids)
    assert data.groups.tolist() == [0, 0, 2, 3]
    assert data.shards == whole.shards
    assert not hasattr(data, "labels")
    (batch,) = DataLoader(data, batch_size=4, num_workers=1, collate_fn=collate)
    assert batch["id"] == sorted(ids)


def test_pairs_without_labels(folder, tmp_path):
    (tmp_path / "pairs.csv").write_text("filepath,title\ncat/a.png,x\ncat/a.png,y\ndog/a.png,z\n")
    whole = CsvPairs(tmp_path / "pairs.csv", root=folder, **ALL)
    data = Subset(whole, chosen(tmp_path, ["cat/a.png#1"]))
    assert same(data[0], whole[1])
    assert not hasattr(data, "labels")
    assert not hasattr(data, "classes")
    with pytest.raises(AttributeError, match="clases"):
        data.clases  # noqa: B018


def test_groups_of_wilds(tmp_path):
    for name in "abc":
        write_image(tmp_path / "train" / f"{name}.jpg")
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = [["split", "filename", "y", "location_remapped"], *(["train", f"{n}.jpg", k % 2, 9 - k] for k, n in enumerate("abc"))]
        csv.writer(file).writerows(rows)
    (tmp_path / "categories.csv").write_text("y,category_id,name\n0,0,empty\n1,1,fox\n")
    data = Subset(IWildCam(tmp_path, "train", transform=to_tensor), chosen(tmp_path, ["b.jpg", "c.jpg"]))
    assert data.groups.tolist() == [8, 7]
    assert data.labels.tolist() == [1, 0]
    assert data[0]["group"] == 8


def test_subset_of_a_subset_and_pickle(folder, tmp_path):
    whole = LabelledFolder(folder, **ALL)
    first = Subset(whole, chosen(tmp_path, ["cat/b.png", "dog/a.png", "emu/c.png"]))
    second = Subset(first, chosen(tmp_path, ["emu/c.png", "cat/b.png"]))
    assert list(second.ids) == ["cat/b.png", "emu/c.png"]
    assert second.labels.tolist() == [0, 2]
    assert same(second[1], whole[3])
    again = pickle.loads(pickle.dumps(second))
    assert list(again.ids) == list(second.ids)
    assert again.classes == whole.classes
    assert same(again[1], whole[3])


def test_fingerprint(folder, tmp_path):
    whole = LabelledFolder(folder, **ALL)
    one = Subset(whole, chosen(tmp_path, ["cat/b.png", "dog/a.png"])).fingerprint
    assert one.keys() == {"image", "text"}
    assert one == Subset(whole, chosen(tmp_path, ["dog/a.png", "", "cat/b.png"])).fingerprint
    other = Subset(whole, chosen(tmp_path, ["cat/b.png", "emu/c.png"])).fingerprint
    renamed = Subset(LabelledFolder(folder, **ALL, templates=("my {}",)), chosen(tmp_path, ["cat/b.png", "dog/a.png"])).fingerprint
    assert one["image"] != other["image"]
    assert one["image"] == renamed["image"]
    assert one["text"] != renamed["text"]
    assert one["image"] != whole.fingerprint["image"]


def test_a_cache_of_a_subset(folder, tmp_path):
    whole = LabelledFolder(folder, transform=to_tensor)
    teacher = Teacher(torch.nn.Linear(48, 3), lambda model, batch: Embeddings(image=model(batch["image"].flatten(1))))
    data = Subset(whole, chosen(tmp_path, ["cat/b.png", "dog/a.png"]))
    cache = EmbeddingCache.build(teacher, data, tmp_path / "cache", collate_fn=collate, progress=False)
    assert cache.ids() == list(data.ids)
    cache.verify(teacher, data, 2, collate_fn=collate)


@pytest.mark.parametrize(
    "content",
    [
        b"cat/b.png\r\ndog/a.png\r\n",
        b"\xef\xbb\xbfcat/b.png\n\n \ndog/a.png",
        b"dog/a.png\ncat/b.png\ndog/a.png\n",
    ],
)
def test_files_as_editors_write_them(folder, tmp_path, content):
    (tmp_path / "ids.txt").write_bytes(content)
    assert list(Subset(LabelledFolder(folder, transform=to_tensor), tmp_path / "ids.txt").ids) == ["cat/b.png", "dog/a.png"]


def test_names_that_are_not_utf8_or_have_odd_characters(tmp_path):
    names = ["caf\udce9.png", "a\u2028b.png", "a\x0bb.png", "a\rb.png", " c.png"]
    for name in names:
        write_image(tmp_path / "images" / "x" / name)
    write_image(tmp_path / "images" / "x" / "other.png")
    whole = LabelledFolder(tmp_path / "images", transform=to_tensor)
    data = Subset(whole, chosen(tmp_path, [f"x/{name}" for name in names]))
    assert set(data.ids) == {f"x/{name}" for name in names}
    assert all("image" in sample for sample in data)


def test_mistakes(folder, tmp_path):
    whole = LabelledFolder(folder, transform=to_tensor)
    with pytest.raises(
        ValueError, match=r"^Subset: expected ids of the data set in .*ids.txt, got 2 of 3 that it lacks, the first 'cow/a.png'"
    ):
        Subset(whole, chosen(tmp_path, ["cat/a.png", "cow/a.png", "cow/b.png"]))
    for content in ("", "\n \n"):
        (tmp_path / "ids.txt").write_text(content)
        with pytest.raises(ValueError, match=r"^Subset: expected an id a line in .*ids.txt, got none"):
            Subset(whole, tmp_path / "ids.txt")
    with pytest.raises(FileNotFoundError, match=r"^Subset: expected a text file of ids, got none at .*absent"):
        Subset(whole, tmp_path / "absent")

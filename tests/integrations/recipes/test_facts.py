"""What is said of data before a run: against data sets whose faults are known."""

import io
import tarfile
import types

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from geomreg.integrations.recipes import facts as module
from geomreg.integrations.recipes.data import Captioned, CsvPairs, LabelledFolder, RandomTexts, Subset, TarPairs
from geomreg.integrations.recipes.facts import DataFacts, check_broken, data_facts, numbers_cut, print_table, table_of


def padded_with_the_end(texts, context_length=6) -> Tensor:
    """A token a letter between start 1 and end 2, which is padding too, as some tokenizers of Hugging Face have it."""
    rows = [[1, *map(ord, text[: context_length - 2]), 2] for text in texts]
    return torch.tensor([row + [2] * (context_length - len(row)) for row in rows])


@pytest.fixture
def pairs(tmp_path):
    """Ten pictures, of which two are missing; captions of which three are empty and four repeated."""
    captions = ["a", "a", "", "b", "b", " ", "cccccc", "d", "", "eeee"]
    for row in range(10):
        if row not in (3, 7):
            Image.new("RGB", (4, 4)).save(tmp_path / f"{row}.png")
    (tmp_path / "x.csv").write_text("image,title\n" + "".join(f'{row}.png,"{text}"\n' for row, text in enumerate(captions)))
    return CsvPairs(tmp_path / "x.csv", transform=to_tensor, tokenizer=padded_with_the_end)


def test_of_a_table(pairs, tmp_path):
    facts = data_facts("target", pairs, padded_with_the_end, of_texts=True, load=True, more=", 5 batches an epoch")
    assert facts.lines == [
        "10 samples, 5 batches an epoch",
        f"files, all 10: 2 missing (20.0 %), the first {tmp_path}/3.png",
        f"samples, all 10: 5 cannot be loaded, the first {tmp_path}/2.png: empty caption (line 4 of {tmp_path}/x.csv)",
        "captions, all 10: 3 empty, 4 repeated, 1 cut at 6 tokens",
    ]
    assert facts.share == 0.5
    plain = data_facts("target", pairs, padded_with_the_end, of_texts=False, load=False)
    assert [line.partition(",")[0] for line in plain.lines] == ["10 samples", "files"]


def test_of_a_random_part(pairs, monkeypatch):
    """It is said that it is one, and the same each time; the share is then the least that is likely."""
    for name in ("FILES", "SAMPLES", "CAPTIONS"):
        monkeypatch.setattr(module, name, 8)
    one, two = (data_facts("target", pairs, padded_with_the_end, of_texts=True, load=True) for _ in range(2))
    assert one.lines == two.lines
    assert all("a random 8 of 10: " in line for line in one.lines[1:4])
    assert " repeated within these, " in one.lines[3]
    found = max(found for found, _, _ in one.broken)
    assert 0 < one.share < found / 8


def test_of_a_subset_and_of_further_captions(pairs, tmp_path):
    (tmp_path / "ids.txt").write_text("3.png\n4.png\n")
    part = data_facts("reference", Subset(pairs, tmp_path / "ids.txt"), padded_with_the_end, of_texts=True, load=True)
    assert part.lines[1:] == [
        f"files, all 2: 1 missing (50.0 %), the first {tmp_path}/3.png",
        f"samples, all 2: 1 cannot be loaded, the first {tmp_path}/3.png: No such file or directory",
        "captions, all 2: none empty, 2 repeated, none cut at 6 tokens",
    ]
    (tmp_path / "c.csv").write_text("id,caption\n" + "".join(f"{one},x\n" for one in pairs.ids))
    outer = data_facts("target", Captioned(pairs, tmp_path / "c.csv"), padded_with_the_end, of_texts=True, load=False)
    assert outer.lines[2] == "captions, all 10: 3 empty, 4 repeated, 1 cut at 6 tokens"


def test_of_class_folders(tmp_path):
    for name in ("owl", "red_fox"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "classes" / name / "0.png")
    options = {"transform": to_tensor, "templates": ("{}", "a {}"), "class_names": {"owl": "owl", "red_fox": "owl"}}
    facts = data_facts("id", LabelledFolder(tmp_path / "classes", **options), padded_with_the_end, of_texts=True, load=False)
    assert facts.lines[2] == "class texts: 2 classes in 2 templates, 1 of them named as another, 2 cut at 6 tokens"


def test_of_shards(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    members = {"a.png": file.getvalue(), "a.txt": b"a", "b.png": file.getvalue(), "c.txt": b"", "a.json": b"{}", "1.5.png": b"x"}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    with pytest.warns(UserWarning, match="passed over 1 names with a dot"):
        data = TarPairs(tmp_path / "x.tar", transform=to_tensor, tokenizer=padded_with_the_end)
    facts = data_facts("target", data, padded_with_the_end, of_texts=True, load=True)
    assert facts.lines == [
        "3 samples",
        f"samples, all 3: 2 cannot be loaded, the first {tmp_path}/x.tar/b: no .txt member",
        "passed over: 1 with the extension .json (a.json), 1 names with a dot before their extension (1.5.png)",
        "shards: 1 samples without image, 1 samples without text",
        "captions, all 3: 1 empty, none repeated, none cut at 6 tokens",
    ]
    (tmp_path / "ids.txt").write_text("x/a")
    part = data_facts("target", Subset(data, tmp_path / "ids.txt"), padded_with_the_end, of_texts=True, load=True)
    assert part.share == 0  # what the whole lacks is no fault of a part
    assert part.lines[-1] == "captions, all 1: none empty, none repeated, none cut at 6 tokens"


def test_of_random_texts():
    data = RandomTexts(open_clip.SimpleTokenizer(), size=10)
    assert data_facts("texts", data, None, of_texts=True, load=True).lines == ["10 samples"]


@pytest.mark.parametrize("tokenizer", [open_clip.SimpleTokenizer(), padded_with_the_end])
def test_cut_texts_at_the_edge(tokenizer):
    """A text of exactly the context is whole."""
    context = tokenizer([""]).shape[1]
    texts = [" ".join("a" * count) if tokenizer is not padded_with_the_end else "a" * count for count in range(context + 4)]
    found, length = numbers_cut(texts, tokenizer)
    assert length == context
    assert found == [context - 1, context, context + 1, context + 2, context + 3]
    assert numbers_cut(texts, lambda texts: torch.zeros(len(texts), 3)) == (None, 3)


def test_broken_samples_that_stop_a_run():
    streams = {"target": types.SimpleNamespace(size=10)}
    for found, steps, stops in ((1, 1000, False), (2, 1000, True), (2, 50, False), (10, 10, False), (20, 60, True)):
        facts = DataFacts("target", 100, [], [(0, 100, ""), (found, 100, "x.png: no such file")])
        if stops:
            with pytest.raises(RuntimeError, match=rf"to be broken, got {found} of 100, the first x\.png: no such file\. Restore them"):
                check_broken([facts], streams, steps)
        else:
            check_broken([facts], streams, steps)
        check_broken([DataFacts("evaluation.id", 100, [], [(50, 100, "x")])], streams, 1000)  # left out, and counted there


def test_table(capsys):
    facts = [DataFacts("target", 3, ["3 samples", "more"]), DataFacts("id", 3, ["3 samples"])]
    print_table(table_of(facts, {"target": (1234, 1)}))
    assert capsys.readouterr().out.splitlines() == [
        "target  3 samples",
        "        more",
        "        drawn: 1,234 samples, 1 of them broken and replaced",
        "id      3 samples",
    ]
    assert facts[0].lines == ["3 samples", "more"]

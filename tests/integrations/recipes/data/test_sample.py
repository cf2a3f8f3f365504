"""One rule of all readers: a caption without text is a broken sample, counted and listed; with ``strict`` an error."""

import io
import json
import tarfile

import pytest
from samples import forbidden, to_tensor, tokenize, write_image

from geomreg.integrations.recipes.data import Captioned, CocoCaptions, CsvPairs, Flickr8k, LabelledFolder, LabelledPairs, Subset, TarPairs

CAPTIONS = ["one", "", "  ", "\u2003\t", "five"]  # a space of another width among them
WHOLE = [True, False, False, False, True]


def csv_pairs(folder, **options):
    (folder / "x.csv").write_text("id,image,caption\n" + "".join(f'{k},{k}.png,"{text}"\n' for k, text in enumerate(CAPTIONS)), "utf-8")
    return CsvPairs(folder / "x.csv", **options)


def coco(folder, **options):
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(5)]
    annotations = [{"id": k, "image_id": k, "caption": text} for k, text in enumerate(CAPTIONS)]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return CocoCaptions(folder / "x.json", root=folder, **options)


def flickr(folder, **options):
    (folder / "x.txt").write_text("".join(f"{k}.png#0\t{text}\n" for k, text in enumerate(CAPTIONS)), "utf-8")
    return Flickr8k(folder / "x.txt", root=folder, **options)


def tar(folder, *, end="txt", of=lambda text: text, **options):
    path = folder / f"{end}.tar"
    if not path.exists():
        with tarfile.open(path, "w") as archive:
            for k, text in enumerate(CAPTIONS):
                for name, content in ((f"{k}.png", (folder / f"{k}.png").read_bytes()), (f"{k}.{end}", of(text).encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
    return TarPairs(path, **options)


def tar_json(folder, **options):
    return tar(folder, end="json", of=lambda text: json.dumps({"c": text}), json_key="c", **options)


def captioned(folder, strict=False, **options):
    for k in range(5):
        write_image(folder / "classes" / "cat" / f"{k}.png")
    lines = [f'cat/{k}.png,"{text}"' for k, text in enumerate(CAPTIONS)]
    (folder / "c.csv").write_text("\n".join(["id,caption", *lines]), "utf-8")
    return Captioned(LabelledFolder(folder / "classes", strict=strict, **options), folder / "c.csv")


READERS = [csv_pairs, coco, flickr, tar, tar_json, captioned]


@pytest.mark.parametrize("reader", READERS)
def test_a_caption_without_text_is_a_broken_sample(tmp_path, reader):
    for k in range(5):
        write_image(tmp_path / f"{k}.png")
    options = {"transform": to_tensor, "tokenizer": tokenize}
    data, strict = reader(tmp_path, **options), reader(tmp_path, strict=True, **options)
    assert ["broken" not in sample for sample in data] == WHOLE
    for k in (1, 2, 3):
        assert "empty caption" in data[k]["broken"]
        assert data[k].keys() == {"id", "broken"}
        with pytest.raises(ValueError, match=r"expected a caption with text, got .*: empty caption.*\. Repair it, or pass strict=False"):
            strict[k]
    if reader is not captioned:
        texts = reader(tmp_path, transform=None, tokenizer=tokenize, modalities=("text",))
        assert ["broken" not in sample for sample in texts] == WHOLE
        assert [data.caption(k) for k in range(5)] == CAPTIONS
        images = reader(tmp_path, transform=to_tensor, tokenizer=forbidden, modalities=("image",))
        assert not any("broken" in sample for sample in images)  # nobody looks at the captions


def test_the_line_is_named(tmp_path):
    for k in range(5):
        write_image(tmp_path / f"{k}.png")
    data = csv_pairs(tmp_path, transform=to_tensor, tokenizer=tokenize)
    assert data[1]["broken"] == f"{tmp_path}/1.png: empty caption (line 3 of {tmp_path}/x.csv)"


def test_a_class_needs_a_name(tmp_path):
    write_image(tmp_path / "0.png")
    csv_pairs(tmp_path, transform=to_tensor, tokenizer=tokenize)
    with pytest.raises(ValueError, match=r"LabelledPairs: expected the name of a class as every caption, got an empty one in line 3 of"):
        LabelledPairs(tmp_path / "x.csv", transform=to_tensor, tokenizer=tokenize)


@pytest.mark.parametrize("reader", [csv_pairs, coco, flickr])
def test_where_a_sample_is(tmp_path, reader):
    """Of a subset too."""
    for k in range(5):
        write_image(tmp_path / f"{k}.png")
    data = reader(tmp_path, transform=to_tensor, tokenizer=tokenize)
    assert data.image_file(4) == str(tmp_path / "4.png")
    (tmp_path / "ids.txt").write_text(data.ids[4])
    part = Subset(data, tmp_path / "ids.txt")
    assert (part.image_file(0), part.caption(0)) == (str(tmp_path / "4.png"), "five")

"""Flickr8k: the token file and Kaggle's CSV, splits, and the image that was never published."""

import pytest
import torch
from samples import forbidden, to_tensor, tokenize, untokenize, write_image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import Flickr8k, collate

NAMES = ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg"]
UNPUBLISHED = "2258277193_586949ec62.jpg.1"
PAIRS = [
    (NAMES[0], "A child, red"),
    (NAMES[0], 'A "girl" .'),
    (NAMES[1], '"Dogs" fight'),
    (UNPUBLISHED, "people wait"),
    (NAMES[1], "größe"),
]
IDS = [f"{NAMES[0]}#0", f"{NAMES[0]}#1", f"{NAMES[1]}#0", f"{UNPUBLISHED}#0", f"{NAMES[1]}#1"]
TOKENS = "".join(f"{token}\t{caption}\n" for token, (_, caption) in zip(IDS, PAIRS, strict=True))
KAGGLE = "image,caption\n" + "".join('{},"{}"\n'.format(name, caption.replace('"', '""')) for name, caption in PAIRS)


def flickr(folder, content=TOKENS, split=None, **more):
    for k, name in enumerate(NAMES):
        write_image(folder / "images" / name, (200 * k, 0, 0))
    (folder / "tokens.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    if split is not None:
        (folder / "split.txt").write_text("".join(f"{name}\n" for name in split))
        more["split"] = folder / "split.txt"
    return Flickr8k(folder / "tokens.txt", **{"root": folder / "images", "transform": to_tensor, "tokenizer": tokenize} | more)


@pytest.mark.parametrize("content", [TOKENS, "\ufeff" + TOKENS.replace("\n", "\r\n"), TOKENS + "\n", KAGGLE, "\ufeff" + KAGGLE])
def test_samples(content, tmp_path):
    data = flickr(tmp_path, content)
    assert list(data.ids) == IDS
    assert len(data) == 5
    for sample, token, (_, caption) in zip(data, IDS, PAIRS, strict=True):
        assert sample["id"] == token
        if UNPUBLISHED in token:
            assert sample == {"id": token, "broken": f"{tmp_path}/images/{UNPUBLISHED}: No such file or directory"}
        else:
            assert untokenize(sample["text"]) == caption[:12]
    assert data[-1]["image"][0].mean() == pytest.approx(200 / 255, abs=0.02)
    assert data.fingerprint == flickr(tmp_path).fingerprint
    with pytest.raises(IndexError):
        data[5]


def test_splits(tmp_path):
    data = flickr(tmp_path, split=[NAMES[1], "", f"{NAMES[1]} "])
    assert list(data.ids) == [IDS[2], IDS[4]]
    assert untokenize(data[1]["text"]) == "größe"
    assert list(flickr(tmp_path, KAGGLE, split=NAMES).ids) == [IDS[0], IDS[1], IDS[2], IDS[4]]
    with pytest.raises(
        ValueError,
        match=r"^Flickr8k: expected captions of every image in .*split\.txt, got none of x0, x1, x2, x3, x4 and 2 more in .*tokens",
    ):
        flickr(tmp_path, split=[NAMES[0], *(f"x{k}" for k in range(7))])
    with pytest.raises(ValueError, match=r"^Flickr8k: expected captions, got none in .*split\.txt\. Check the file\."):
        flickr(tmp_path, split=[])
    with pytest.raises(FileNotFoundError, match=r"^Flickr8k: expected a text file, got none at .*nowhere\. Check"):
        Flickr8k(tmp_path / "tokens.txt", root=tmp_path, split=tmp_path / "nowhere", transform=to_tensor, tokenizer=tokenize)


def test_modalities_and_strict(tmp_path):
    texts = flickr(tmp_path, modalities=("text",), transform=forbidden, root=tmp_path / "nowhere")
    images = flickr(tmp_path, modalities=("image",), tokenizer=forbidden)
    assert texts[3].keys() == {"id", "text"}
    assert images[0].keys() == {"id", "image"}
    assert texts.fingerprint | images.fingerprint == flickr(tmp_path).fingerprint
    with pytest.raises(ValueError, match=r"^Flickr8k: expected an image, got .*jpg\.1: No such file or directory\. Repair it"):
        flickr(tmp_path, strict=True)[3]
    with pytest.raises(TypeError, match=r"^Flickr8k: expected transform as a function of a PIL image, got None"):
        flickr(tmp_path, transform=None)
    with pytest.raises(FileNotFoundError, match=r"^Flickr8k: expected the first image of .*tokens\.txt, got no file .*nowhere/1000"):
        flickr(tmp_path, root=tmp_path / "nowhere")


def test_worker_processes(tmp_path):
    data = flickr(tmp_path)
    first, second = DataLoader(data, batch_size=3, num_workers=2, collate_fn=collate)
    assert first["id"] == IDS[:3]
    assert torch.equal(first["text"][2], data[2]["text"])
    assert (second["id"], len(second["broken"])) == ([IDS[4]], 1)


def test_fingerprints(tmp_path):
    base = flickr(tmp_path).fingerprint
    assert base["image"] != base["text"]
    edited = flickr(tmp_path, TOKENS.replace("child", "kid")).fingerprint
    assert edited["image"] == base["image"]
    assert edited["text"] != base["text"]
    fewer = flickr(tmp_path, split=NAMES).fingerprint
    assert fewer["image"] != base["image"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"captions, got none in .*tokens\.txt\. Check the file"),
        ("\n\n", r"captions, got none in .*tokens\.txt\. Check the file"),
        (TOKENS + "a.jpg#1 a dog", r"lines '<image>#<k><tab><caption>', got 'a\.jpg#1 a dog' in line 6 of .*tokens\.txt\. Pass Flickr8k"),
        (TOKENS + "a.jpg\ta dog", r"lines '<image>#<k><tab><caption>', got 'a\.jpg\\ta dog' in line 6"),
        (TOKENS + "a.jpg#x\ta dog", r"lines '<image>#<k><tab><caption>', got 'a\.jpg#x\\ta dog' in line 6"),
        (TOKENS + "#0\ta dog", r"lines '<image>#<k><tab><caption>', got '#0\\ta dog' in line 6"),
        (TOKENS + TOKENS.splitlines()[0], r"captions of different ids in .*, got '1000268201_693b08cb0e\.jpg#0' twice"),
        (TOKENS.encode("latin-1"), r"UTF-8, got other bytes in line 5 of .*tokens\.txt\. Save it as UTF-8"),
        ("name,text\nx,y\n", r"the columns 'image', 'caption' in .*tokens\.txt, got 'name', 'text'\. Pass the original file"),
        (KAGGLE + ",x\n", r"the name of an image in every row of .*, got none in line 7\. Fill it in"),
        (KAGGLE + "a,b,c\n", r"2 fields a row as in the first, separated by ',', got 3 in line 7"),
    ],
)
def test_messages(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"^Flickr8k: expected {message}"):
        flickr(tmp_path, content)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^Flickr8k: expected a text file, got none at .*x\. Check the path"):
        Flickr8k(tmp_path / "x", root=tmp_path, transform=to_tensor, tokenizer=tokenize)

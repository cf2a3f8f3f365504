"""Before a run a cache is compared with what the run will show: true differences are refused, others of spelling and age are not."""

import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from older import forget_loading, forget_texts
from PIL import Image

from geomreg import EmbeddingCache, Teacher
from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes.cached import check_cached
from geomreg.integrations.recipes.cli import _warnings_on_one_line
from geomreg.integrations.recipes.data import CsvPairs, TarPairs, collate
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.train import encode

ROWS = 5


@pytest.fixture(scope="module")
def emojiclip():
    return load(str(model_folder()))


@pytest.fixture
def images(tmp_path):
    for row in range(ROWS):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{row}.png")
    return tmp_path / "images"


def csv(path, loaded, spelt, transform=None):
    path.parent.mkdir(exist_ok=True)
    path.write_text("id,filepath,title\n" + "".join(f"{k},{one},picture {k}\n" for k, one in enumerate(spelt)))
    return CsvPairs(path, transform=transform or loaded.transform, tokenizer=loaded.tokenizer)


def built(path, loaded, data):
    teacher = Teacher(loaded.model, encode)
    return EmbeddingCache.build(teacher, data, path, collate_fn=collate, progress=False, shard_rows=3)


def heard(call):
    """Warnings of caches, each of which a command says in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [one for one in caught if "EmbeddingCache" in str(one.message)]
    with _warnings_on_one_line():
        lines = [warnings.formatwarning(one.message, one.category, one.filename, one.lineno) for one in found]
    assert all(line.startswith("geomreg: warning: EmbeddingCache: expected") and line.count("\n") == 1 for line in lines)
    return [str(one.message) for one in found]


def test_spelling_of_paths_is_nothing(emojiclip, images, tmp_path):
    relative = csv(tmp_path / "x.csv", emojiclip, [f"images/{k}.png" for k in range(ROWS)])
    absolute = csv(tmp_path / "lists" / "x.csv", emojiclip, [images / f"{k}.png" for k in range(ROWS)])
    for number, (one, other) in enumerate([(relative, absolute), (absolute, relative)]):
        cache = built(tmp_path / f"cache {number}", emojiclip, one)
        before = {path: path.stat().st_ino for path in cache.path.iterdir()}
        check_cached(Teacher.cached(cache), other, emojiclip.model)
        cache.verify(Teacher(emojiclip.model, encode), other, collate_fn=collate)
        built(cache.path, emojiclip, other)
        assert {path: path.stat().st_ino for path in cache.path.iterdir() if not path.name.startswith(".")} == before
    exchanged = csv(tmp_path / "y.csv", emojiclip, [f"images/{k}.png" for k in (1, 0, *range(2, ROWS))])
    with pytest.raises(ValueError, match=r"with the images that .* was built from, got others under the same ids"):
        check_cached(Teacher.cached(cache), exchanged, emojiclip.model)


def tar(path, loaded, captions):
    """Captions of equal length, so that no digest changes."""
    with tarfile.open(path, "w") as archive:
        for row, caption in enumerate(captions):
            content = io.BytesIO()
            Image.new("RGB", (40, 40), (50 * row, 9, 9)).save(content, "PNG")
            for name, data in ((f"{row}.png", content.getvalue()), (f"{row}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return TarPairs(path, transform=loaded.transform, tokenizer=loaded.tokenizer)


def test_a_cache_that_does_not_know_its_texts_is_still_compared(emojiclip, tmp_path):
    """By samples, with a warning; built over, it knows them."""
    captions = ["a red fox", "a big cow", "a sad owl"]
    data = tar(tmp_path / "x.tar", emojiclip, captions)
    cache = built(tmp_path / "cache", emojiclip, data)
    forget_texts(cache.path)
    cache = EmbeddingCache.open(cache.path)
    (message,) = heard(lambda: check_cached(Teacher.cached(cache), data, emojiclip.model))
    assert "geomreg embed" in message
    other = tar(tmp_path / "x.tar", emojiclip, captions[::-1])
    assert other.fingerprint == data.fingerprint
    cache = EmbeddingCache.open(cache.path)
    with (
        pytest.warns(UserWarning, match="to know which texts it embedded"),
        pytest.raises(ValueError, match="the text embedding of 'x/0' in"),
    ):
        check_cached(Teacher.cached(cache), other, emojiclip.model)
    cache = built(cache.path, emojiclip, other)
    assert not heard(lambda: check_cached(Teacher.cached(cache), other, emojiclip.model))
    with pytest.raises(ValueError, match="got another for 2 of 3 samples"):
        check_cached(Teacher.cached(cache), tar(tmp_path / "x.tar", emojiclip, captions), emojiclip.model)


def test_images_that_were_read_otherwise(emojiclip, images, tmp_path, monkeypatch):
    """With a plain transform, which says nothing of it."""
    plain = emojiclip.transform.transform
    data = csv(tmp_path / "x.csv", emojiclip, [f"images/{k}.png" for k in range(ROWS)], plain)
    cache = built(tmp_path / "cache", emojiclip, data)
    assert cache.fingerprint["image"]["loading"] == "geomreg's loader 1: orientation applied, background white, deep scaled"
    assert not heard(lambda: check_cached(Teacher.cached(cache, preprocessing=plain), data, emojiclip.model))
    with monkeypatch.context() as patched:
        patched.setattr("geomreg.integrations.recipes.data.rgb.VERSION", 2)
        with pytest.raises(ValueError, match=r"expected images that are read as for .*got geomreg's loader 2"):
            check_cached(Teacher.cached(cache), data, emojiclip.model)
    forget_loading(cache.path)
    cache = EmbeddingCache.open(cache.path)
    (message,) = heard(lambda: check_cached(Teacher.cached(cache), data, emojiclip.model))
    assert "to say how their files were read" in message
    first = images / "0.png"
    picture = Image.open(first).convert("RGBA")
    picture.putalpha(90)
    picture.save(first)
    with pytest.warns(UserWarning, match="how their files"), pytest.raises(ValueError, match="the image embedding of '0' in"):
        check_cached(Teacher.cached(cache), data, emojiclip.model)
    again = built(cache.path, emojiclip, data)
    batch = collate([data[row] for row in range(ROWS)])
    torch.testing.assert_close(again(batch["id"]).image, Teacher(emojiclip.model, encode)(batch).image, rtol=1e-4, atol=1e-5)

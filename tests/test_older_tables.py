"""Caches of older versions: read with a warning where they do not know what was embedded, and built anew where that can be known."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from older import forget_loading, forget_texts
from torch import nn

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg import cache as module
from geomreg.views import text_views

ROWS = 70  # more than are looked at


class Pairs:
    """Token ids and images; ``far`` is added to the images beyond those that are embedded again."""

    def __init__(self, loading=None, seed=0, far=0.0):
        self.ids, self.seed, self.far = list(range(ROWS)), seed, far
        if loading is not None:
            self.loading = loading

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(100 * self.seed + row)
        image, text = torch.randn(3, generator=generator), torch.randint(1, 20, (4,), generator=generator)
        return {"id": row, "image": image + self.far * (row in FAR), "text": text}


class Changed(Pairs):
    """One sample is another."""

    def __init__(self, row, loading=None, **changes):
        super().__init__(loading)
        self.row, self.changes = row, changes

    def __getitem__(self, row):
        return {**super().__getitem__(row), **(self.changes if row == self.row else {})}


FAR = set(range(ROWS)) - set(np.linspace(0, ROWS - 1, 64, dtype=int).tolist())  # not looked at by a build
TEACHER = Teacher(
    nn.ModuleList([nn.Linear(3, 5), nn.EmbeddingBag(20, 5)]), lambda m, batch: Embeddings(m[0](batch["image"]), m[1](batch["text"]))
)


def built(path, data):
    return EmbeddingCache.build(TEACHER, data, path, shard_rows=20, progress=False)


def batch_of(data, rows=range(ROWS)):
    return torch.utils.data.default_collate([data[row] for row in rows])


def heard(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all("\n" not in str(one.message) for one in caught)
    return [str(one.message) for one in caught]


def tables(path):
    return {folder.name: folder.stat().st_ino for folder in path.glob("*-*")}


def test_reading_a_cache_that_does_not_know_its_texts_says_so_once(tmp_path):
    built(tmp_path, Pairs())
    forget_texts(tmp_path)
    teacher, batch = Teacher.cached(EmbeddingCache.open(tmp_path)), batch_of(Pairs())
    (message,) = heard(lambda: [teacher(batch) for _ in range(3)])
    assert message.startswith(f"EmbeddingCache: expected {tmp_path}/text-")
    assert "another text under the same id" in message
    assert "geomreg embed" in message
    assert not heard(lambda: EmbeddingCache.open(tmp_path)(batch["id"]))  # nothing to compare
    assert not heard(lambda: EmbeddingCache.open(tmp_path)(batch["id"], ("image",), text=batch["text"]))


def test_building_over_it_makes_the_texts_anew_and_keeps_the_images(tmp_path, monkeypatch):
    built(tmp_path, Pairs())
    before = tables(tmp_path)
    forget_texts(tmp_path)
    with monkeypatch.context() as patched:  # killed on the way: the old one stays, and what was made is kept
        patched.setattr(module, "publish", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, Pairs())
    assert len(EmbeddingCache.open(tmp_path)) == ROWS
    cache = built(tmp_path, Pairs())
    after = tables(tmp_path)
    assert len(after) == 2
    assert {name for name in after if before.get(name) == after[name]} == {name for name in before if name.startswith("image")}
    teacher, batch = Teacher.cached(cache), batch_of(Pairs())
    assert not heard(lambda: teacher(batch))
    batch["text"][3, 1] += 1
    with pytest.raises(ValueError, match="got another for 1 of 70 samples"):
        teacher(batch)
    assert not heard(lambda: built(tmp_path, Pairs()))
    assert tables(tmp_path) == after


def test_edited_captions_behind_it_are_made_anew_too(tmp_path):
    """Where no digest and no sample of the probe shows the edit."""
    built(tmp_path, Pairs())
    forget_texts(tmp_path)
    (row,) = list(FAR)[:1]
    now = Changed(row, text=torch.arange(1, 5))
    cache, batch = built(tmp_path, now), batch_of(now)
    torch.testing.assert_close(Teacher.cached(cache)(batch).text, TEACHER(batch).text)


def test_a_folder_that_cannot_be_written_is_still_read(tmp_path, monkeypatch):
    built(tmp_path, Pairs())
    forget_texts(tmp_path)
    monkeypatch.setattr(module, "locked", lambda path: nullcontext(False))
    cache = built(tmp_path, Pairs())
    assert len(heard(lambda: Teacher.cached(cache)(batch_of(Pairs())))) == 1


def test_images_that_were_read_otherwise_are_built_anew(tmp_path):
    """The data set says how; ids, transform and the samples that are looked at say nothing."""
    built(tmp_path, Pairs("as open_clip"))
    before, now = tables(tmp_path), Pairs("upright", far=1.0)
    with pytest.raises(ValueError, match=r"image table of .* built with loading 'upright', got 'as open_clip'"):
        EmbeddingCache.open(tmp_path).verify(TEACHER, now)
    cache, batch = built(tmp_path, now), batch_of(now)
    assert {name.partition("-")[0] for name in tables(tmp_path).items() - before.items() for name in name[:1]} == {"image"}
    torch.testing.assert_close(Teacher.cached(cache)(batch).image, TEACHER(batch).image)


def test_a_cache_that_does_not_say_how_stays_if_samples_agree(tmp_path):
    built(tmp_path, Pairs("upright"))
    forget_loading(tmp_path)
    before = tables(tmp_path)
    (message,) = heard(lambda: built(tmp_path, Pairs("upright")))
    assert message.startswith(f"EmbeddingCache: expected the images of {tmp_path} to say how their files were read")
    assert tables(tmp_path) == before
    assert len(heard(lambda: EmbeddingCache.open(tmp_path).verify(TEACHER, Pairs("upright")))) == 1
    assert not heard(lambda: EmbeddingCache.open(tmp_path).verify(TEACHER, Pairs()))
    assert not heard(lambda: built(tmp_path, Pairs()))  # a data set that says nothing either


def test_and_is_built_anew_if_one_of_them_does_not(tmp_path):
    built(tmp_path, Pairs("upright"))
    forget_loading(tmp_path)
    before, now = tables(tmp_path), Changed(3, loading="upright", image=torch.ones(3))  # 3: beyond the first part of those
    assert not heard(lambda: built(tmp_path, now))
    assert len(tables(tmp_path).items() - before.items()) == 1
    batch = batch_of(now)
    torch.testing.assert_close(EmbeddingCache.open(tmp_path)(range(ROWS)).image, TEACHER(batch).image)


def test_damage_in_a_shard_that_is_not_looked_at_is_mended(tmp_path):
    """The look at what the shards know finds it."""
    built(tmp_path, Pairs())
    (shard,) = tmp_path.glob("text-*/000002.safetensors")
    content = bytearray(shard.read_bytes())
    content[9] ^= 255  # the header
    shard.write_bytes(content)
    cache, batch = built(tmp_path, Pairs()), batch_of(Pairs())
    torch.testing.assert_close(Teacher.cached(cache)(batch).text, TEACHER(batch).text)


def test_texts_that_were_hashed_with_their_padding_are_made_anew(tmp_path):
    """As a version did that knew zeros alone."""

    def pad(samples):
        width = max(len(one["text"]) for one in samples)
        texts = [torch.cat([one["text"], torch.full((width - len(one["text"]),), 1)]) for one in samples]
        return {
            **torch.utils.data.default_collate([{"id": one["id"], "image": one["image"]} for one in samples]),
            "text": torch.stack(texts),
        }

    class Ragged(Pairs):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return {**sample, "text": torch.cat([sample["text"][: 1 + row % 4].clamp(min=2), torch.tensor([2])])}

    teacher = Teacher(
        nn.Linear(3, 5),
        lambda model, batch: Embeddings(text=model(torch.stack([(batch["text"] == k).sum(1) for k in (2, 3, 4)], 1).float())),
    )
    options = {"shard_rows": 20, "progress": False, "collate_fn": pad, "batch_size": 8}
    cache = EmbeddingCache.build(teacher, Ragged(), tmp_path, **options)
    forget_texts(tmp_path, zeros=lambda rows: text_views(pad([Ragged()[row] for row in rows]), len(rows)))
    with pytest.raises(ValueError, match="got another for"):
        Teacher.cached(EmbeddingCache.open(tmp_path))(pad([Ragged()[4]]))
    cache = EmbeddingCache.build(teacher, Ragged(), tmp_path, **options)
    Teacher.cached(cache)(pad([Ragged()[4]]))

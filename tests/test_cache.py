"""The embedding cache: what is read is what the teacher says, or an error; a build survives anything."""

import copy
import errno
import functools
import os
import pickle
import shutil
import time
import types

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed_until_done
from torch import nn

from geomreg import DiVE, EmbeddingCache, Embeddings, Teacher, WeightedSum, cache_build, shards
from geomreg.cache_build import described

ROWS, SHARD = 53, 10
LOOK = 2 * 16 + 2 * 6  # samples that build embeds beside those it stores: at first, and one of each shard that is there


class Towers(nn.Module):
    """Two encoders that count what they see."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = nn.Linear(4, 6), nn.Linear(3, 6)
        self.seen = {"image": 0, "text": 0}

    def __deepcopy__(self, memo):
        twin = Towers()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen  # of the teacher too
        return twin


def encode(model, batch):
    found = {}
    for name in ("image", "text"):
        if name in batch:
            model.seen[name] += len(batch[name])
            found[name] = getattr(model, name)(batch[name])
    return Embeddings(**found)


def encode_texts(model, batch):
    return encode(model, {"text": batch["text"]})


def encode_unit(model, batch):
    return Embeddings(*(nn.functional.normalize(value, dim=1) for value in encode(model, batch)))


class Pairs:
    """Samples drawn by their number."""

    def __init__(self, rows=ROWS, seed=0, name="sample {}".format, **attributes):
        self.rows, self.seed, self.name = rows, seed, name
        self.__dict__.update(attributes)

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if not 0 <= row < self.rows:
            raise IndexError(row)
        generator = torch.Generator().manual_seed(1000 * self.seed + row)
        return {"id": self.name(row), "image": torch.randn(4, generator=generator), "text": torch.randn(3, generator=generator)}


def batch_of(data, rows):
    return torch.utils.data.default_collate([data[row] for row in rows])


def built(path, data=None, teacher=None, **options):
    options = {"shard_rows": SHARD, "batch_size": 4, "progress": False, **options}
    return EmbeddingCache.build(teacher or Teacher(Towers(), encode), data or Pairs(), path, **options)


def equal(cache, data, teacher, tolerance=1e-6):
    """Every row is the teacher's."""
    rows = torch.randperm(len(data)).tolist()
    batch = batch_of(data, rows)
    found, expected = cache(batch["id"]), teacher(batch)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= tolerance * other.norm()


# reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sample {}".format, int, lambda row: 10**15 + row, lambda row: f"图/{row}.jpg"], ids=["str", "int", "big", "utf8"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-4)])
def test_rows_are_the_teachers(tmp_path, name, dtype, tolerance):
    teacher, data = Teacher(Towers(), encode), Pairs(name=name)
    cache = built(tmp_path, data, teacher, dtype=dtype)
    equal(cache, data, teacher, tolerance)
    equal(EmbeddingCache.open(tmp_path), data, teacher, tolerance)
    assert len(cache) == ROWS
    assert cache.ids() == [data[row]["id"] for row in range(ROWS)]
    assert data[3]["id"] in cache
    assert "other" not in cache
    twice = cache([data[5]["id"], data[2]["id"], data[5]["id"]]).image
    assert torch.equal(twice[0], twice[2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 100, 3), (64, 64, 64), (33, 16, 5)])
def test_sizes(tmp_path, shape):
    rows, shard_rows, batch_size = shape
    teacher, data = Teacher(Towers(), encode), Pairs(rows)
    equal(built(tmp_path, data, teacher, shard_rows=shard_rows, batch_size=batch_size), data, teacher)


@pytest.mark.parametrize("rows", [1, 7, SHARD, 25, ROWS, 100])  # within a shard, across some, all
def test_slices_are_the_rows_in_order(tmp_path, rows):
    cache = built(tmp_path)
    assert list(cache.each_id("text")) == cache.ids()
    for modality in ("image", "text"):
        parts = list(cache.slices(modality, rows))
        assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
        assert torch.equal(torch.cat(parts), getattr(cache(cache.ids()), modality))
    with pytest.raises(ValueError, match="expected rows as a whole number >= 1, got 0"):
        next(cache.slices("image", 0))


def test_modalities_are_tables_of_their_own(tmp_path):
    teacher, data = Teacher(Towers(), encode_texts), Pairs()
    cache = built(tmp_path, data, teacher)
    assert cache(["sample 1"]).image is None
    assert list(cache.fingerprint) == ["text"]
    assert not list(tmp_path.glob("image-*"))


def test_ids_of_the_other_type_and_unknown_ids(tmp_path):
    cache = built(tmp_path, Pairs(name=int))
    assert torch.equal(cache([7]).image, cache(torch.tensor([7])).image)
    assert torch.equal(cache([7]).image, cache([np.int64(7)]).image)
    with pytest.raises(ValueError, match=r"^EmbeddingCache: expected ids of .*, got 2 of 3 that it lacks: '7', 99\. .* \(7 is not '7'\)"):
        cache(["7", 3, 99])
    for bad in (True, 1.5, None):
        with pytest.raises(TypeError, match=r"^EmbeddingCache: expected sample ids as whole numbers or strings"):
            cache([bad])


def test_workers_and_pickles_open_their_own_files(tmp_path):
    cache = built(tmp_path, num_workers=2)
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(twin(["sample 3"]).text, cache(["sample 3"]).text)
    assert len(pickle.dumps(cache)) < 1000
    assert "53 x 6 float32" in repr(copy.deepcopy(cache))


def test_nothing_is_executed_and_other_readers_can_open_it(tmp_path):
    from safetensors.numpy import load_file

    built(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    first = load_file(next(path for path in files if path.name == "000000.safetensors" and "image" in path.parent.name))
    teacher, data = Teacher(Towers(), encode), Pairs()
    assert np.allclose(first["embeddings"], teacher(batch_of(data, range(SHARD))).image.numpy(), atol=1e-6)


# the teacher ----------------------------------------------------------------------------------------------------------


def test_teacher_of_a_cache_is_like_the_others(tmp_path):
    model, data = Towers(), Pairs()
    frozen = Teacher(model, encode)
    cached = Teacher.cached(built(tmp_path, data, frozen))
    batch = batch_of(data, [3, 50, 7])
    student = Embeddings(*(value.detach().requires_grad_() for value in Teacher(Towers(1), encode)(batch)))
    keep = WeightedSum(dive=(2.0, DiVE()))
    assert torch.allclose(keep(student, cached(batch)), keep(student, frozen(batch)), rtol=1e-6)
    assert not cached(batch).image.requires_grad
    assert not list(cached.parameters())
    assert not cached.state_dict()
    assert not cached.train().training
    cached.step()
    assert cached.fingerprint() == frozen.fingerprint()
    assert torch.equal(pickle.loads(pickle.dumps(cached))(batch).image, cached(batch).image)
    assert cached({"id": batch["id"], "image": batch["image"].to("meta")}).text.device.type == "meta"
    assert cached.to("meta")({"id": batch["id"]}).text.device.type == "cpu"
    only = Teacher.cached(cached.cache, modalities=("text",))(batch)
    assert only.image is None
    assert torch.equal(only.text, cached(batch).text)


def test_teacher_of_a_cache_says_what_is_wrong(tmp_path):
    cache = built(tmp_path, Pairs(transform="resize 224", tokenizer="bpe 77"))
    Teacher.cached(cache, preprocessing="resize 224", tokenizer="bpe 77")
    with pytest.raises(ValueError, match=r"expected the image table of .* with preprocessing 'resize 336', got 'resize 224'"):
        Teacher.cached(cache, preprocessing="resize 336")
    with pytest.raises(ValueError, match=r"expected the text table of .* with tokenizer 'bpe 64', got 'bpe 77'"):
        Teacher.cached(cache, tokenizer="bpe 64")
    with pytest.raises(TypeError, match=r'^Teacher: expected a batch as a dict with "id" to look up, got float32 tensor'):
        Teacher.cached(cache)(torch.ones(3))
    with pytest.raises(TypeError, match=r"^Teacher: expected an open EmbeddingCache, got str"):
        Teacher.cached("path")
    texts = built(tmp_path / "texts", teacher=Teacher(Towers(), encode_texts))
    with pytest.raises(ValueError, match=r"^Teacher: expected a cache of image embeddings, got EmbeddingCache\(.*text: 53 x 6"):
        Teacher.cached(texts, modalities=("image",))


def test_fingerprint_of_weights():
    model = Towers()
    teacher = Teacher(model, encode)
    assert teacher.fingerprint() == Teacher(Towers(), encode).fingerprint() != Teacher(Towers(1), encode).fingerprint()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    expected = Teacher(plain, lambda m, b: Embeddings(image=m(b))).fingerprint()
    student = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))
    off = Teacher.adapters_off(student, lambda m, b: Embeddings(image=m(b)))
    assert off.fingerprint() == expected
    with torch.no_grad():
        student.base_model.model[0].lora_A["default"].weight.add_(1.0)
    assert off.fingerprint() == expected
    with pytest.raises(ValueError, match=r"^Teacher: expected a teacher that stays as it is, got an averaged one"):
        Teacher.averaged(model, encode).fingerprint()
    with torch.no_grad():
        teacher.model.image.bias[0] += 1e-7
    assert teacher.fingerprint() != Teacher(model, encode).fingerprint()


# fingerprints ---------------------------------------------------------------------------------------------------------


def test_mismatch_names_the_part(tmp_path):
    teacher, data = Teacher(Towers(), encode), Pairs(transform="a", tokenizer="b", fingerprint={"image": "i", "text": "t"})
    cache = built(tmp_path, data, teacher)
    cache.verify(teacher, data)
    EmbeddingCache.open(tmp_path, teacher=teacher, preprocessing="a", tokenizer="b")
    with pytest.raises(ValueError, match=r"image table of .* to be built with weights"):
        EmbeddingCache.open(tmp_path, teacher=Teacher(Towers(1), encode))
    with pytest.raises(ValueError, match=r"image table of .* to be built with preprocessing 'c', got 'a'"):
        EmbeddingCache.open(tmp_path, preprocessing="c")

    def changed(**attributes):
        return Pairs(**{"transform": "a", "tokenizer": "b", "fingerprint": {"image": "i", "text": "t"}, **attributes})

    for other_teacher, other_data, table, part in (
        (Teacher(Towers(1), encode), data, "image", "weights"),
        (teacher, changed(transform="c"), "image", "preprocessing"),
        (teacher, changed(tokenizer="c"), "text", "tokenizer"),
        (Teacher(Towers(), encode_unit), data, "image", "normalisation"),
        (teacher, changed(fingerprint={"image": "i", "text": "other captions"}), "text", "data set"),
        (teacher, changed(rows=ROWS + 1), "image", "data set"),
    ):
        with pytest.raises(ValueError, match=rf"expected the {table} table of .* to be built with {part} "):
            cache.verify(other_teacher, other_data)


def test_verify_finds_other_samples_under_the_same_ids(tmp_path):
    teacher = Teacher(Towers(), encode)
    cache = built(tmp_path, Pairs(), teacher)
    with pytest.raises(ValueError, match=r"^EmbeddingCache.verify: expected the stored image embedding of 'sample \d+' within 0.001"):
        cache.verify(teacher, Pairs(seed=1))
    with pytest.raises(ValueError, match="expected ids of"):
        cache.verify(teacher, Pairs(name="other {}".format))
    texts = Teacher(Towers(5), encode_texts)
    with pytest.raises(ValueError, match="expected a teacher of image, got one of text alone"):
        built(tmp_path / "images", teacher=Teacher(Towers(), lambda m, b: Embeddings(m.image(b["image"])))).verify(texts, Pairs(seed=9))
    with pytest.raises(ValueError, match="expected n as a whole number >= 1, got 0"):
        cache.verify(teacher, Pairs(), n=0)

    class OneWrong(Pairs):
        def __getitem__(self, row):
            return Pairs(seed=1)[row] if row == 30 else super().__getitem__(row)

    with pytest.raises(ValueError, match="expected the stored image embedding of 'sample 30'"):
        cache.verify(teacher, OneWrong(), n=ROWS)


class Resize:
    """A transform with the default repr."""

    def __init__(self, size):
        self.size = size


class Module(nn.Module):
    """One whose repr shows nothing."""

    def __init__(self, size):
        super().__init__()
        self.size = size


def grey(image):
    return image


def test_descriptions_show_parameters():
    from torchvision import transforms

    assert described("name") == "name"
    assert described(Resize(3)) == described(Resize(3)) != described(Resize(4))
    assert described([grey, Resize(3)]) == described([grey, Resize(3)]) != described([grey, Resize(4)])
    assert "grey" in described(grey)
    assert described(functools.partial(grey, 3)) == described(functools.partial(grey, 3)) != described(functools.partial(grey, 4))
    assert described(lambda x: x + 1) == described(lambda x: x + 1) != described(lambda x: x * 1)
    sizes = [transforms.Compose([transforms.Resize(size), grey, Resize(size), transforms.ToTensor()]) for size in (3, 3, 4)]
    assert described(sizes[0]) == described(sizes[1]) != described(sizes[2])
    assert "0x" not in described(sizes[0])
    assert described(lambda x: x.sin()) != described(lambda x: x.cos())
    assert described(transforms.Lambda(grey)) == described(transforms.Lambda(grey)) != described(transforms.Lambda(described))
    assert described(Module(1)) == described(Module(1)) != described(Module(2))
    assert described({3, 1}) == described({1, 3}) != described({1, 2})
    arrays = [Resize(np.arange(5000) + (np.arange(5000) == k)) for k in (2500, 2500, 2501)]
    assert described(arrays[0]) == described(arrays[1]) != described(arrays[2])
    nested = described(lambda x: [y + 1 for y in x])
    assert "0x" not in nested
    assert __file__ not in nested
    large = types.SimpleNamespace(vocabulary={f"word {k}": k for k in range(5000)})
    assert len(described(large)) < 200
    other = types.SimpleNamespace(vocabulary={f"word {k}": k + (k == 4999) for k in range(5000)})
    assert described(large) != described(other)
    with pytest.raises(ValueError, match="expected an object that shows its parameters, got <object object>"):
        described([grey, object()])


# building -------------------------------------------------------------------------------------------------------------


def state(path):
    return {file.relative_to(path): file.stat().st_ino for file in path.rglob("*") if file.is_file()}


def test_building_again_changes_nothing(tmp_path):
    model = Towers()
    built(tmp_path, teacher=Teacher(model, encode))
    before, seen = state(tmp_path), dict(model.seen)
    built(tmp_path, teacher=Teacher(model, encode))
    assert state(tmp_path) == before
    assert model.seen["image"] <= seen["image"] + LOOK


def test_rebuilding_the_texts_keeps_the_images(tmp_path):
    model, data = Towers(), Pairs(tokenizer="old")
    built(tmp_path, data, Teacher(model, encode))
    before = state(tmp_path)
    model.seen.update(image=0, text=0)
    data = Pairs(tokenizer="new")
    cache = built(tmp_path, data, Teacher(model, encode_texts))
    after = state(tmp_path)
    assert model.seen["image"] == 0
    assert cache.fingerprint["text"]["tokenizer"] == "new"
    images = {file for file in before if file.parts[0].startswith("image")}
    assert images
    assert all(after[file] == before[file] for file in images)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2  # the old texts are gone
    equal(cache, data, Teacher(model, encode))


def test_tables_of_different_teachers_are_refused(tmp_path):
    built(tmp_path)
    before = state(tmp_path)
    with pytest.raises(ValueError, match=r"expected the image table of .* to be built with weights"):
        built(tmp_path, teacher=Teacher(Towers(1), encode_texts))
    assert state(tmp_path) == before


def test_another_build_replaces_the_first_at_its_end(tmp_path, monkeypatch):
    first, second = Teacher(Towers(), encode), Teacher(Towers(1), encode)
    built(tmp_path, teacher=first)
    monkeypatch.setattr(cache_build, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        built(tmp_path, teacher=second)
    equal(EmbeddingCache.open(tmp_path), Pairs(), first)
    monkeypatch.undo()
    equal(built(tmp_path, teacher=second), Pairs(), second)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["cache.json", "image", "text"]


@pytest.mark.parametrize("attributes", [{}, {"ids": [f"sample {k}" for k in range(ROWS)]}], ids=["plain", "ids"])
def test_interrupted_at_every_write(tmp_path, monkeypatch, attributes):
    """Whatever write is the last, the same call goes on and loses at most one shard."""
    data, write = Pairs(**attributes), shards.os.replace
    teacher = Teacher(Towers(), encode)
    expected = built(tmp_path / "whole", data, teacher)(range_of(data))
    writes = 0
    for stop in range(100):
        path, count = tmp_path / f"stopped {stop}", 0

        def replace(source, target, stop=stop):
            nonlocal count
            count += 1
            if count > stop:
                raise KeyboardInterrupt
            write(source, target)

        monkeypatch.setattr(shards.os, "replace", replace)
        try:
            built(path, data, teacher)
            writes = stop
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.undo()
        with pytest.raises(FileNotFoundError):
            EmbeddingCache.open(path)
        teacher.model.seen.update(image=0)
        again = built(path, data, teacher)
        assert teacher.model.seen["image"] <= ROWS - SHARD * min(stop // 2, 5) + LOOK
        for one, other in zip(again(range_of(data)), expected, strict=True):
            assert torch.equal(one, other)
        assert not list(path.rglob("*.tmp"))
    assert writes == 2 * 6 + 2 * 3 + 1  # shards; index, description and name of both tables; the list


def range_of(data):
    return [data.name(row) for row in range(len(data))]


def slowly(model, batch):
    time.sleep(0.01)
    return encode(model, batch)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL at arbitrary moments; the run that gets through ends with the rows of one that was left alone."""
    work = functools.partial(built, shard_rows=40)
    assert killed_until_done(work, tmp_path, Pairs(400), Teacher(Towers(), slowly), first=0.2, more=0.13) >= 2
    teacher = Teacher(Towers(), encode)
    equal(EmbeddingCache.open(tmp_path, teacher=teacher), Pairs(400), teacher)


@pytest.mark.parametrize("data", [Pairs(name="other {}".format), Pairs(seed=1)], ids=["ids", "content"])
def test_changed_samples_are_found_on_resuming(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cache_build, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        built(tmp_path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"\.partial is of other samples or another encode: it is made anew"):
        equal(built(tmp_path, data), data, Teacher(Towers(), encode))


def encode_threefold(model, batch):
    return Embeddings(*(3 * value for value in encode(model, batch)))


@pytest.mark.parametrize("change", ["content", "subset", "encode"])
def test_changes_that_no_fingerprint_shows(tmp_path, change):
    """A few samples are embedded anew: what is no longer right is built again, beside the old."""
    teacher = Teacher(Towers(), encode)
    subsets = [torch.utils.data.Subset(Pairs(100), range(k, k + 50)) for k in (0, 50)]
    first, second = {"content": (Pairs(), Pairs(seed=1)), "subset": subsets, "encode": (Pairs(), Pairs())}[change]
    other = Teacher(Towers(), encode_threefold) if change == "encode" else teacher
    built(tmp_path, first, teacher)
    for data, one in ((second, other), (first, teacher), (first, teacher)):
        equal(built(tmp_path, data, one), data, one)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    before = state(tmp_path)
    built(tmp_path, first, teacher)
    assert state(tmp_path) == before


def test_one_build_at_a_time(tmp_path):
    with cache_build.locked(tmp_path), pytest.raises(RuntimeError, match=f"expected no other build in {tmp_path}, got one that is running"):
        built(tmp_path)
    built(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_unfinished_builds_of_other_settings_go_away_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        built(tmp_path, Pairs(transform="other"))
    monkeypatch.undo()
    assert list(tmp_path.glob(".image-*.partial"))
    built(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_resuming_where_samples_were_left_out(tmp_path, monkeypatch):
    def readable(samples):
        kept = [one for one in samples if int(one["id"].split()[1]) % 10 not in (0, 9) and not 20 <= int(one["id"].split()[1]) < 30]
        return torch.utils.data.default_collate(kept) if kept else {"id": []}

    monkeypatch.setattr(cache_build, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        built(tmp_path, collate_fn=readable)
    monkeypatch.undo()
    model = Towers()
    with pytest.warns(UserWarning, match="19 of 53 samples could not be read"):
        cache = built(tmp_path, teacher=Teacher(model, encode), collate_fn=readable)
    assert len(cache) == 34
    assert model.seen["image"] <= LOOK


def test_paths_stay_right_when_the_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caches = [built("cache"), EmbeddingCache.open("cache")]
    monkeypatch.chdir("/")
    for cache in caches:
        cache(["sample 1"])


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_folders_that_cannot_be_written(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if kind == "file" else tmp_path / "file" / "cache"
    with pytest.raises(OSError, match=f"expected a folder that can be written, got {path}"):
        built(path)


def test_disk_full(tmp_path, monkeypatch):
    teacher, count, write = Teacher(Towers(), encode), 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match=r"^write_file: expected to write [0-9.]+ (bytes|KB) to .*, got: No space left on device"):
        built(tmp_path, teacher=teacher)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(FileNotFoundError, match=r"got no cache.json \(an unfinished build\)"):
        EmbeddingCache.open(tmp_path)
    equal(built(tmp_path, teacher=teacher), Pairs(), teacher)


def test_too_little_space_is_seen_before_anything_is_embedded(tmp_path, monkeypatch):
    model = Towers()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"^EmbeddingCache.build: expected [0-9.]+ KB of free space in .*, got 1.00 KB, [0-9.]+ KB too"):
        built(tmp_path, teacher=Teacher(model, encode))
    assert model.seen["image"] <= LOOK


# damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine")
    built(path)
    return path


def read_all(path):
    return EmbeddingCache.open(path)([f"sample {k}" for k in range(ROWS)])


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("number", range(17))
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
def test_damaged_files_are_found(pristine, tmp_path, number, damage):
    path = tmp_path / "cache"
    shutil.copytree(pristine, path)
    assert len(files_of(path)) == 17
    file = files_of(path)[number]
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-5], "empty": b"", "longer": content + b"\n"}[damage])
    if file.suffix == ".json" and damage == "longer":
        read_all(path)
        return
    with pytest.raises((RuntimeError, FileNotFoundError), match="EmbeddingCache: expected"):
        EmbeddingCache.open(path)


@given(st.integers(0, 16), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=150)
def test_flipped_bits_are_never_used(pristine, number, place, bit):
    """An error that names a file, or the same rows."""
    path = pristine.parent / "flipped"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(pristine, path)
    file = files_of(path)[number]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(bytes(content))
    try:
        found = read_all(path)
    except (RuntimeError, FileNotFoundError) as error:
        found = error
    if isinstance(found, Exception):
        assert str(path) in str(found)
        return
    for one, other in zip(found, read_all(pristine), strict=True):
        assert torch.equal(one, other)


def test_flipped_row_is_found_at_its_first_touch_and_made_anew(tmp_path):
    teacher = Teacher(Towers(), encode)
    stored = built(tmp_path, teacher=teacher, shard_rows=40)(["sample 20"]).image
    file = next(tmp_path.glob("image-*")) / shards.shard_name(0)
    content = file.read_bytes()
    row = stored.numpy().tobytes()
    assert content.count(row) == 1
    file.write_bytes(content.replace(row, row[:4] + b"\x00\x00\x00\x00" + row[8:]))
    cache = EmbeddingCache.open(tmp_path)
    cache(["sample 0", "sample 39", "sample 50"])  # other blocks
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"expected {file} as it was written, got rows 16 to 31 with another checksum. Delete"):
            cache(["sample 17"])
    file.unlink()
    with pytest.raises(RuntimeError, match="no such file"):
        cache(["sample 0"])
    teacher.model.seen.update(image=0)
    cache = built(tmp_path, teacher=teacher, shard_rows=40)
    assert teacher.model.seen["image"] <= 40 + LOOK
    equal(cache, Pairs(), teacher)


def test_truncated_after_opening(tmp_path):
    built(tmp_path)
    cache = EmbeddingCache.open(tmp_path)
    file = next(tmp_path.glob("image-*")) / shards.shard_name(0)
    os.truncate(file, 200)
    with pytest.raises(RuntimeError, match=f"expected {file} as it was written"):
        cache(["sample 1"])


def test_flipped_ids_are_found(tmp_path):
    built(tmp_path)
    file = next(tmp_path.glob("image-*")) / shards.shard_name(1)
    content = file.read_bytes()
    assert content.count(b"sample 15") == 1
    file.write_bytes(content.replace(b"sample 15", b"sample 95"))
    with pytest.raises(RuntimeError, match=f"expected {file} as it was written, got ids with another checksum"):
        EmbeddingCache.open(tmp_path).ids()
    next(tmp_path.glob("image-*/index.safetensors")).unlink()
    teacher = Teacher(Towers(), encode)
    cache = built(tmp_path, teacher=teacher)
    assert cache.ids()[15] == "sample 15"
    equal(cache, Pairs(), teacher)


def test_exchanged_shards_are_found(tmp_path):
    built(tmp_path)
    folder = next(tmp_path.glob("image-*"))
    one, two = folder / shards.shard_name(1), folder / shards.shard_name(2)
    content = one.read_bytes(), two.read_bytes()
    assert len(content[0]) == len(content[1])
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    with pytest.raises(RuntimeError, match="with another checksum"):
        read_all(tmp_path)


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^EmbeddingCache: expected a cache in {tmp_path}, got no cache.json. Build it first"):
        EmbeddingCache.open(tmp_path)


# what cannot be cached ------------------------------------------------------------------------------------------------


class Flipping(Pairs):
    """Half of the images mirrored, at random."""

    key = "image"

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return sample | ({self.key: sample[self.key].flip(0)} if torch.rand(()) < 0.5 else {})


class Templates(Flipping):
    key = "text"


@pytest.mark.parametrize(("data", "key"), [(Flipping(), "image"), (Templates(), "text")])
def test_random_views_are_refused(tmp_path, data, key):
    with pytest.raises(
        ValueError, match=rf"^EmbeddingCache.build: expected the same sample whenever it is loaded, got another '{key}' .* random crops"
    ):
        built(tmp_path, data)
    assert not list(tmp_path.iterdir())


def test_random_encoders_are_refused(tmp_path):
    def noisy(model, batch):
        return Embeddings(image=model.image(batch["image"]) + torch.randn(()))

    with pytest.raises(
        ValueError, match=r"expected the same image embeddings for the same batch, got others .* encode must draw nothing at random"
    ):
        built(tmp_path, teacher=Teacher(Towers(), noisy))


def test_bf16_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^EmbeddingCache.build: expected dtype float32 or float16, got torch.bfloat16. bf16 puts 53 % error"
    ):
        built(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected dtype float32 or float16, got torch.int8"):
        built(tmp_path, dtype=torch.int8)
    half = Teacher(Towers(), lambda model, batch: Embeddings(image=model.image(batch["image"]).bfloat16()))
    with pytest.raises(ValueError, match=r"expected image embeddings in fp32 or fp16, got bfloat16. bf16 puts 53 % error"):
        built(tmp_path, teacher=half)


def test_values_that_cannot_be_stored(tmp_path):
    class Spoilt(Pairs):
        spoilt = True

        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return sample | ({"image": sample["image"] * float("nan")} if row == 33 and self.spoilt else {})

    data, teacher = Spoilt(), Teacher(Towers(), encode)
    with pytest.raises(ValueError, match=r"expected finite image embeddings, got NaN or infinity for 'sample 33'. Look at this sample"):
        built(tmp_path, data, teacher)
    with pytest.raises(FileNotFoundError):
        EmbeddingCache.open(tmp_path)
    data.spoilt = False
    teacher.model.seen.update(image=0)
    cache = built(tmp_path, data, teacher)
    assert teacher.model.seen["image"] <= ROWS - 3 * SHARD + LOOK  # the three finished shards were kept
    equal(cache, data, teacher)
    large = Teacher(Towers(), lambda model, batch: Embeddings(image=1e6 * model.image(batch["image"])))
    with pytest.raises(ValueError, match="expected embeddings that fit into float16, got larger ones"):
        built(tmp_path / "large", teacher=large, dtype=torch.float16)


def test_ids_must_differ(tmp_path):
    with pytest.raises(ValueError, match="expected every sample to have an id of its own, got 'a' more than once"):
        built(tmp_path, Pairs(name=lambda row: "a" if row in (3, 44) else f"b{row}"))
    model = Towers()
    with pytest.raises(ValueError, match="expected every sample to have an id of its own, got 'a' more than once"):
        built(tmp_path, Pairs(ids=["a" if row in (3, 44) else row for row in range(ROWS)]), Teacher(model, encode))
    assert model.seen["image"] == 0
    with pytest.raises(ValueError, match=r"expected dataset.ids of all 53 samples, got 3"):
        built(tmp_path, Pairs(ids=[1, 2, 3]))


def test_colliding_hashes_are_refused(tmp_path, monkeypatch):
    hashes = shards.id_hashes
    monkeypatch.setattr(shards, "id_hashes", lambda name, ids: hashes(name, ids) % np.uint64(64))
    with pytest.raises(ValueError, match=r"expected ids with different 64-bit hashes, got the same for 'sample \d+' and 'sample \d+'"):
        built(tmp_path)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "expected a geomreg.Teacher, got Towers", {"teacher": Towers()}),
        (TypeError, "expected a data set with a length and samples by number, got generator", {"data": (one for one in Pairs())}),
        (ValueError, "expected at least one sample, got an empty data set", {"data": Pairs(0)}),
        (TypeError, r'expected samples as dicts with an "id", got tuple', {"data": [(torch.ones(4), torch.ones(3))]}),
        (TypeError, r"expected samples as dicts with an \"id\", got a dict with 'image'", {"data": [{"image": torch.ones(4)}]}),
        (TypeError, "expected sample ids as whole numbers or strings, got float", {"data": [{"id": 0.5, "text": torch.ones(3)}]}),
        (TypeError, r'expected batches as dicts with "id", got list', {"collate_fn": lambda samples: samples}),
        (ValueError, "expected batch_size as a whole number >= 1, got 0", {"batch_size": 0}),
        (ValueError, "expected shard_rows as a whole number >= 1, got 0", {"shard_rows": 0}),
        (ValueError, "expected a teacher that stays as it is, got an averaged one", {"teacher": Teacher.averaged(Towers(), encode)}),
        (
            ValueError,
            "expected image or text embeddings from the teacher, got None",
            {"teacher": Teacher(Towers(), lambda m, b: Embeddings())},
        ),
        (
            ValueError,
            r"expected image embeddings of shape \(14, D\) for 14 ids",
            {"teacher": Teacher(Towers(), lambda m, b: Embeddings(image=m.image(b["image"])[:3]))},
        ),
    ],
)
def test_bad_input(tmp_path, error, message, options):
    data = options.get("data") or Pairs() if not isinstance(options.get("data"), Pairs) else options["data"]
    teacher = options.get("teacher") or Teacher(Towers(), encode)
    rest = {key: value for key, value in options.items() if key not in ("data", "teacher")}
    with pytest.raises(error, match=message):
        EmbeddingCache.build(teacher, data, tmp_path / "cache", progress=False, **rest)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_unreadable_samples_are_left_out_and_counted(tmp_path):
    def readable(samples):
        kept = [one for one in samples if not str(one["id"]).endswith("3")]
        return torch.utils.data.default_collate(kept) if kept else {"id": []}

    teacher, data = Teacher(Towers(), encode), Pairs()
    with pytest.warns(UserWarning, match="5 of 53 samples could not be read and have no row"):
        cache = built(tmp_path, data, teacher, collate_fn=readable, batch_size=1)
    assert len(cache) == 48
    assert "sample 13" not in cache
    good = [row for row in range(ROWS) if row % 10 != 3]
    assert torch.allclose(cache([f"sample {row}" for row in good]).text, teacher(batch_of(data, good)).text, atol=1e-6)
    with pytest.raises(ValueError, match="expected samples that can be read, got none"):
        built(tmp_path / "none", data, teacher, collate_fn=lambda samples: {"id": []})


# several processes ----------------------------------------------------------------------------------------------------


def test_repaired_samples_get_their_rows(tmp_path):
    """Where the ids are known: only the shards concerned are made anew."""

    class Some(Pairs):
        broken = (13, 14, 40)

        def __getitem__(self, row):
            return {"id": self.name(row), "broken": "x"} if row in self.broken else super().__getitem__(row)

    def readable(samples):
        kept = [one for one in samples if "broken" not in one]
        return torch.utils.data.default_collate(kept) if kept else {"id": []}

    model = Towers()
    data, teacher = Some(ids=[f"sample {row}" for row in range(ROWS)]), Teacher(model, encode)
    with pytest.warns(UserWarning, match="3 of 53 samples"):
        built(tmp_path, data, teacher, collate_fn=readable)
    before = state(tmp_path)
    built(tmp_path, data, teacher, collate_fn=readable)
    assert state(tmp_path) == before
    data.broken = (40,)
    model.seen.update(image=0)
    with pytest.warns(UserWarning, match="1 of 53 samples"):
        cache = built(tmp_path, data, teacher, collate_fn=readable)
    assert model.seen["image"] <= SHARD + LOOK
    assert "sample 13" in cache
    assert "sample 40" not in cache
    data.broken = ()
    equal(built(tmp_path, data, teacher, collate_fn=readable), data, teacher)


def test_leftovers_of_a_kill_go_away(tmp_path, monkeypatch):
    built(tmp_path)
    monkeypatch.setattr(cache_build.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    other = Teacher(Towers(1), encode)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, teacher=other)
    monkeypatch.undo()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4
    (tmp_path / ".cache.json.123.tmp").write_text("")
    equal(built(tmp_path, teacher=other), Pairs(), other)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["cache.json", "image", "text"]


def test_what_is_not_ours_stays(tmp_path):
    """A cache may be built beside data whose names look like its own."""
    for name in ("image-net", "text-0123456789", ".image-old.partial", "image-0123456789ab.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("mine")
    (tmp_path / ".notes.tmp").write_text("mine")
    for seed in (0, 1):
        built(tmp_path, teacher=Teacher(Towers(seed), encode))
    assert sorted(path.parent.name for path in tmp_path.glob("*/data")) == sorted(
        ["image-net", "text-0123456789", ".image-old.partial", "image-0123456789ab.backup"]
    )
    assert (tmp_path / ".notes.tmp").read_text() == "mine"
    assert len(list(tmp_path.glob("*/table.json"))) == 2


def test_an_error_of_the_encoder_costs_no_shard(tmp_path, monkeypatch):
    """Out of memory is a RuntimeError too."""
    monkeypatch.setattr(cache_build, "write_index", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        built(tmp_path)
    monkeypatch.undo()
    shards_there = sorted(path.name for path in tmp_path.rglob("0*.safetensors"))

    def full(model, batch):
        if len(batch["id"]) == 1:  # the look at a shard
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(model, batch)

    with pytest.raises(torch.OutOfMemoryError):
        built(tmp_path, teacher=Teacher(Towers(), full))
    assert sorted(path.name for path in tmp_path.rglob("0*.safetensors")) == shards_there


def test_finished_caches_in_folders_that_cannot_be_written(tmp_path, monkeypatch):
    teacher = Teacher(Towers(), encode)
    built(tmp_path, teacher=teacher)
    real = open

    def read_only(file, mode="r", *arguments, **options):
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", read_only)
    equal(built(tmp_path, teacher=teacher), Pairs(), teacher)
    with pytest.raises(OSError, match=r"expected a folder that can be written, got .*: image is to be built anew"):
        built(tmp_path, teacher=Teacher(Towers(1), encode))


def test_copies_of_a_cache_that_was_built_anew(tmp_path):
    cache = built(tmp_path)
    content = pickle.dumps(cache)
    built(tmp_path, teacher=Teacher(Towers(1), encode))
    with pytest.raises(RuntimeError, match=r"expected the tables .*: it was built anew"):
        pickle.loads(content)


def test_other_modalities_and_shapes(tmp_path):
    cache = built(tmp_path, Pairs(name=int), Teacher(Towers(), encode_texts))
    with pytest.raises(ValueError, match="expected modalities among text, got 'image'"):
        cache([1], ("image",))
    for bad in ("1", torch.tensor(1)):
        with pytest.raises(TypeError, match="expected a list of sample ids"):
            cache(bad)


@given(st.floats(0, 0.2), st.integers(0, 7))
@settings(max_examples=60)
@pytest.mark.slow
def test_flipped_bits_in_an_unfinished_build(pristine, place, bit):
    """The shard is made anew, or was not changed where it matters."""
    path = pristine.parent / "unfinished"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(pristine, path)
    (path / "cache.json").unlink()
    file = next(path.glob("image-*")) / shards.shard_name(1)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(bytes(content))
    teacher = Teacher(Towers(), encode)
    cache = built(path, teacher=teacher)
    equal(cache, Pairs(), teacher)
    assert cache.ids() == range_of(Pairs())


class Slow(Pairs):
    """Whose samples take process 1 long."""

    def __getitem__(self, row):
        if dist.is_initialized() and dist.get_rank() == 1 and row >= 3 * SHARD:
            time.sleep(0.2)
        return super().__getitem__(row)


def build_slowly_on_rank(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        built(folder / "cache", Slow())
    except RuntimeError as error:
        (folder / f"error {rank}").write_text(str(error))
        os._exit(0)  # the group cannot be ended in order


@pytest.mark.slow
def test_a_process_that_was_killed_ends_the_others(tmp_path):
    """Within seconds, in one line; and the build can be started again."""
    context = mp.get_context("spawn")
    both = [context.Process(target=build_slowly_on_rank, args=(rank, tmp_path)) for rank in range(2)]
    for one in both:
        one.start()
    try:
        until = time.monotonic() + 100
        while not list((tmp_path / "cache").glob(".image-*.partial/000004.safetensors")):  # the last of process 0, which then waits
            assert time.monotonic() < until
            time.sleep(0.05)
        both[1].kill()
        killed = time.monotonic()
        both[0].join(30)
        assert both[0].exitcode == 0
        assert time.monotonic() < killed + 20
    finally:
        for one in both:
            one.kill()
    message = (tmp_path / "error 0").read_text()
    assert message.startswith("EmbeddingCache.build: expected all processes to go on, got none any more on rank 1")
    teacher = Teacher(Towers(), encode)
    equal(built(tmp_path / "cache", teacher=teacher), Pairs(), teacher)
    assert not list((tmp_path / "cache").glob(".*"))


def build_on_rank(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model = Towers()
        cache = built(folder / "cache", teacher=Teacher(model, encode))
        teacher = Teacher(Towers(), encode)
        equal(cache, Pairs(), teacher)
        (folder / f"seen {rank}").write_text(str(model.seen["image"]))

        class Spoilt(Pairs):
            def __getitem__(self, row):
                sample = super().__getitem__(row)
                return sample | ({"image": sample["image"] * float("nan")} if row == 13 else {})  # of rank 1, and not looked at before

        others = {
            "error": {"data": Spoilt()},
            "weights": {"teacher": Teacher(Towers(rank), encode)},
            "dtype": {"dtype": (torch.float32, torch.float16)[rank]},
            "length": {"data": Pairs(ROWS + rank)},
            "early": {"data": [{"image": torch.ones(4)}] if rank else Pairs()},
        }
        for name, options in others.items():
            try:
                built(folder / name, **options)
            except Exception as error:
                (folder / f"{name} {rank}").write_text(str(error))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_the_errors(tmp_path):
    mp.spawn(build_on_rank, (tmp_path,), nprocs=2)
    seen = [int((tmp_path / f"seen {rank}").read_text()) - 2 * 14 for rank in range(2)]
    assert sum(seen) == ROWS
    assert min(seen) > 20
    errors = [(tmp_path / f"error {rank}").read_text() for rank in range(2)]
    assert errors[1].startswith("EmbeddingCache.build: expected finite image embeddings, got NaN or infinity for 'sample 13'")
    assert errors[0].startswith("EmbeddingCache.build: expected all processes to go on, got an error on rank 1: EmbeddingCache.build")
    for name, part in (
        ("weights", "weights '"),
        ("dtype", "dtype 'float32' on rank 0 and 'float16' on rank 1"),
        ("length", "data set '53 samples' on"),
    ):
        for rank in range(2):
            message = (tmp_path / f"{name} {rank}").read_text()
            assert message.startswith(f"EmbeddingCache.build: expected all processes to build the same, got {part}")
    assert (tmp_path / "early 1").read_text().startswith("EmbeddingCache.build: expected samples as dicts")
    assert "got an error on rank 1: EmbeddingCache.build: expected samples as dicts" in (tmp_path / "early 0").read_text()
    for name in ("error", "weights", "dtype", "length", "early"):
        with pytest.raises(FileNotFoundError):
            EmbeddingCache.open(tmp_path / name)

"""Packed strings: as a list has them, in the memory of their bytes; repeats and fingerprints."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomreg.integrations.recipes.data import strings
from geomreg.integrations.recipes.data.strings import Strings, chunks, fingerprint, repeats, rows_of

TEXTS = ["", "dog", "Größe", "犬\n🐕", "\udce9 no UTF-8", "dog", "\0"]


@given(st.lists(st.text()), st.lists(st.text()))
def test_packed_strings_are_a_sequence(one, two):
    packed = Strings.concatenate([Strings.pack(one), Strings.pack(two)])
    texts = one + two
    assert list(packed) == texts
    assert len(packed) == len(texts)
    assert [packed[i] for i in range(-len(texts), len(texts))] == texts + texts
    assert list(packed[1:-1]) == texts[1:-1]
    assert list(packed[::-2]) == texts[::-2]
    assert packed.lengths.tolist() == [len(text.encode()) for text in texts]
    with pytest.raises(IndexError):
        packed[len(texts)]


def test_packed_strings_of_file_names_and_pickles():
    packed = Strings.pack(TEXTS)
    assert list(packed) == TEXTS
    assert list(pickle.loads(pickle.dumps(packed))) == TEXTS
    assert packed[np.int64(1)] == "dog"


def test_long_iteration_crosses_chunks():
    texts = list(map(str, range(1000)))
    assert list(Strings.concatenate(map(Strings.pack, chunks(texts)))) == texts
    assert [len(chunk) for chunk in chunks(texts)] == [256, 256, 256, 232]
    assert list(chunks([])) == []


@given(st.lists(st.sampled_from(["a", "b", "c", "d"])))
def test_repeats_equal_a_loop(texts):
    expected = [(i, texts.index(text), texts[:i].count(text)) for i, text in enumerate(texts) if text in texts[:i]]
    assert list(repeats(Strings.pack(texts))) == expected


def test_repeats_with_equal_hashes():
    texts = ["a", "b", "a"]

    class Colliding(list):
        def __iter__(self):
            return (0 for _ in texts)  # what is hashed: always the same

    assert list(repeats(Colliding(texts))) == [(2, 0, 1)]


def test_fingerprint_tells_order_borders_and_columns_apart():
    variants = [(["ab", "c"],), (["a", "bc"],), (["c", "ab"],), (["ab"], ["c"]), (["ab", "c"], []), (["ab", "c", ""],), ([],), ()]
    assert len({fingerprint(*columns) for columns in variants}) == len(variants)
    assert fingerprint(TEXTS) == fingerprint(Strings.pack(TEXTS)) == fingerprint(tuple(TEXTS))
    packed = b"".join(number.to_bytes(8, "little") for number in (2, 7, 3)) + "a photo犬".encode()
    assert fingerprint(["a photo", "犬"]) == hashlib.blake2b(packed, digest_size=16).hexdigest()


def test_rows_of_texts():
    among = ["b", "a", "ü", "b", ""]
    for kind in (list, Strings.pack):
        assert rows_of(kind(["a", "", "x", "b", "a"]), kind(among)).tolist() == [1, 4, -1, 0, 1]
    assert rows_of([], among).tolist() == []
    assert rows_of(["a"], []).tolist() == [-1]


def test_rows_of_texts_whose_hashes_collide(monkeypatch):
    monkeypatch.setattr(strings, "hash", len, raising=False)
    assert rows_of(["bb", "cc", "c", "dd"], ["aa", "c", "bb", "cc"]).tolist() == [2, 3, 1, -1]

"""The same text has the same hash whatever batch it is drawn in, and another text another one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from geomreg import EmbeddingCache, Embeddings, Teacher, shards
from geomreg.views import Padding, most_padded, padding_between, text_views, told_padding

ROWS = 40
LONGEST = 9


class Texts:
    """Texts of 2 to 9 tokens that end with the token 2, their padding not yet there."""

    def __init__(self, end=2):
        self.end = end
        self.ids = [f"text {k}" for k in range(ROWS)]

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        tokens = torch.randint(10, 50, (1 + (5 * row) % (LONGEST - 1),), generator=torch.Generator().manual_seed(row))
        return {"id": self.ids[row], "text": torch.cat([tokens, torch.tensor([self.end])])}


class Padded:
    """Pads to the longest text of a batch, or to a fixed length."""

    def __init__(self, token, left=False, to=None):
        self.token, self.left, self.to = token, left, to

    def __call__(self, samples):
        length = self.to or max(len(one["text"]) for one in samples)
        rows = [(one["text"], torch.full((length - len(one["text"]),), self.token)) for one in samples]
        return {"id": [one["id"] for one in samples], "text": torch.stack([torch.cat(row[:: -1 if self.left else 1]) for row in rows])}


def mean_of(padding, end):
    """A tower to which padding is nothing."""

    def encode(model, batch):
        known = (batch["text"] != padding) | (batch["text"] == end)
        return Embeddings(text=(model(batch["text"]) * known[..., None]).sum(1) / known.sum(1, keepdim=True))

    return encode


def built(path, collate, end=2):
    torch.manual_seed(0)
    teacher = Teacher(nn.Embedding(60, 6), mean_of(collate.token if collate.token != end else None, end))
    return EmbeddingCache.build(teacher, Texts(end), path, collate_fn=collate, shard_rows=16, batch_size=5, progress=False)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("token", [0, 1, 59])
@pytest.mark.parametrize("to", [None, 12])
def test_a_text_is_known_in_every_batch(tmp_path, token, left, to):
    """Alone, among longer ones, in a batch that is longer than all; and edited it is found out, by one token too many at either end."""
    cache, data = built(tmp_path, Padded(token, left, to)), Texts()
    teacher = Teacher.cached(cache)
    for rows in ([3], [0, 8], list(range(ROWS)), [7, 6, 5]):
        for length in (None, 20) if to is None else (to,):
            teacher(Padded(token, left, length)([data[row] for row in rows]))
    for edit in (lambda text: text[1:], lambda text: text[:-2], lambda text: torch.cat([text, torch.tensor([11])]), lambda text: text + 1):
        sample = dict(data[14])
        sample["text"] = edit(sample["text"])
        with pytest.raises(ValueError, match="got another for 1 of 2 samples: 'text 14'"):
            teacher(Padded(token, left, to)([data[3], sample]))


def test_padding_that_is_the_end_of_text(tmp_path):
    """As CLIP's tokenizer of transformers pads."""
    cache, data = built(tmp_path, Padded(2)), Texts()
    for rows in ([3], [0, 8, 14]):
        Teacher.cached(cache)(Padded(2)([data[row] for row in rows]))


def test_a_build_that_goes_on_pads_alike(tmp_path):
    """Shards whose texts were hashed by another rule, or not at all, are made anew."""
    cache = built(tmp_path, Padded(1))
    (table,) = tmp_path.glob("text-*")
    for padding in (Padding(), None):
        wrong = shards.Shard(table, 0)
        batch = Padded(1)([Texts()[row] for row in range(16)])
        views = None if padding is None else text_views(batch, 16, padding)
        rows = np.empty((16, 6), np.float32)
        wrong.read(np.arange(16), rows, np.arange(16))
        shards.write_shard(table, 0, wrong.ids(), rows, views)
        (table / "table.json").unlink()  # as after a kill
        cache = built(tmp_path, Padded(1))
        (table,) = tmp_path.glob("text-*")
        Teacher.cached(cache)(Padded(1)([Texts()[row] for row in range(ROWS)]))


def test_what_padding_is():
    batch = {"text": torch.tensor([[5, 6, 7, 2], [5, 2, 1, 1]])}
    assert padding_between(batch, 1, {"text": torch.tensor([[5, 2]])}) == Padding(1)
    assert padding_between(batch, 0, {"text": torch.tensor([[5, 6, 7, 2]])}) is None
    assert padding_between(batch, 1, {"text": torch.tensor([[5, 3]])}) is None
    assert padding_between({"text": torch.tensor([[0, 0, 5, 0]])}, 0, {"text": torch.tensor([[5, 0]])}) == Padding(0, left=True)
    assert padding_between({"text": torch.rand(2, 3)}, 0, {"text": torch.rand(1, 2)}) is None
    assert 1 in most_padded(batch)
    assert most_padded({"text": ["a", "b"]}) == []
    assert text_views({"text": torch.rand(2, 3)}, 2) is None
    assert text_views({"text": torch.ones(2, 3, dtype=torch.bool)}, 2) is None
    plain = SimpleNamespace(pad_token_id=None)
    assert told_padding(plain) == told_padding(None) == Padding()
    assert told_padding(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=1, padding_side="left"))) == Padding(1, left=True)


def test_token_ids_as_transformers_gives_them():
    ids = torch.tensor([[5, 6, 0], [7, 0, 0]])
    expected = text_views({"text": ids}, 2).tolist()
    for batch in ({"input_ids": ids}, {"text": {"input_ids": ids}}, {"text": ids[:, None]}):
        assert text_views(batch, 2).tolist() == expected
    assert text_views({"text": ["five", "six"]}, 2) is None

"""Batches depend on seed and step alone: not on processes, workers or where a run began."""

import itertools
import weakref

import numpy as np
import pytest
import torch

from geomreg.integrations.recipes.data.draws import Drawn, Draws, loader


class Numbers:
    """Samples with a random part, some of them broken."""

    def __init__(self, rows=23, broken=()):
        self.rows, self.broken = rows, broken

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row in self.broken:
            return {"id": str(row), "broken": f"{row}.jpg: no image"}
        return {"id": str(row), "image": torch.rand(2) + row, "label": row % 3}


def taken(draws, count):
    return list(itertools.islice(draws, count))


def test_an_epoch_has_every_row_once():
    batches = taken(Draws(23, 4, seed=0), 10)
    for epoch in (0, 1):
        rows = [row for batch in batches[5 * epoch : 5 * epoch + 5] for e, row in batch if e == epoch]
        assert len(rows) == len(set(rows)) == 20
    assert batches[:5] != [[(0, row) for _, row in batch] for batch in batches[5:]]
    assert taken(Draws(23, 4, seed=1), 10) != batches
    assert Draws(20, 4, seed=0).batches_an_epoch == 5


@pytest.mark.parametrize("start", [0, 1, 4, 5, 17])
def test_starts_anywhere(start):
    assert taken(Draws(23, 4, seed=3, start=start), 7) == taken(Draws(23, 4, seed=3), start + 7)[start:]


def test_processes_share_the_batches_of_one():
    whole = taken(Draws(23, 6, seed=3), 9)
    parts = [taken(Draws(23, 2, seed=3, rank=rank, ranks=3), 9) for rank in range(3)]
    for k, batch in enumerate(whole):
        assert sorted(batch) == sorted(row for part in parts for row in part[k])
        assert batch == [part[k][j] for j in range(2) for part in parts]


def test_groups_are_read_one_after_the_other():
    groups = np.repeat(np.arange(40), 5)
    draws = Draws(200, 10, seed=0, groups=groups)
    first, second = draws.order(0), draws.order(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(200))
    assert not torch.equal(first, second)
    for window in first.split(40):  # eight groups of five
        assert len(set(groups[window.numpy()])) == 8
        assert not torch.equal(window, window.sort().values)
    assert set(groups[first[:40].numpy()]) != set(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_row(workers):
    def batches(workers, start=0, seed=5):
        return taken(loader(Drawn(Numbers(), seed=seed), Draws(23, 4, seed=1, start=start), workers=workers), 8 - start)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    expected, found = batches(0), batches(workers)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(expected, found, strict=True):
        assert one["id"] == other["id"]
        assert torch.equal(one["image"], other["image"])
    again = batches(workers, start=3)
    assert torch.equal(again[0]["image"], expected[3]["image"])
    assert not torch.equal(batches(0, seed=6)[0]["image"], expected[0]["image"])
    of_row = {(b["id"][k], b["image"][k, 0].item()) for b in expected for k in range(4)}
    assert len(of_row) == 32  # the second epoch's are others


def test_augmentation_leaves_other_devices_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    assert torch.equal(Drawn(Numbers(), seed=0)[0, 1]["image"], Drawn(Numbers(), seed=0)[0, 1]["image"])


def test_a_batch_is_made_sample_by_sample():
    """Only the last sample is still there when the next is made."""
    alive = []

    class Watched(Numbers):
        def __getitem__(self, row):
            assert sum(one() is not None for one in alive) <= 1
            sample = super().__getitem__(row)
            alive.append(weakref.ref(sample["image"]))
            return sample

    batch = next(loader(Drawn(Watched(), seed=0), Draws(23, 8, seed=0)))
    assert len(alive) == len(batch["id"]) == 8


def test_broken_samples_are_replaced_and_named():
    batches = taken(loader(Drawn(Numbers(6, broken=(2, 3)), seed=0), Draws(6, 3, seed=0)), 2)
    ids = [one for batch in batches for one in batch["id"]]
    assert sorted(ids) == ["0", "1", "4", "4", "4", "5"]
    assert sorted(message for batch in batches for message in batch["broken"]) == ["2.jpg: no image", "3.jpg: no image"]
    with pytest.raises(ValueError, match=r"got 100 broken ones in a row, the first 1.jpg: no image"):
        Drawn(Numbers(3, broken=(0, 1, 2)), seed=0)[0, 1]


def test_labelled_samples_get_random_templates():
    texts = torch.arange(4 * 3 * 5).view(4, 3, 5)
    dataset = Drawn(Numbers(), seed=0, texts=texts)
    seen = set()
    for row in range(23):
        template = int(dataset[0, row]["text"][0]) // 15
        assert torch.equal(dataset[0, row]["text"], texts[template, row % 3])
        seen.add(template)
    assert seen == {0, 1, 2, 3}


def test_too_few_samples():
    with pytest.raises(ValueError, match="expected at least 24 samples for a batch of 8 in 3 processes, got 23"):
        Draws(23, 8, seed=0, ranks=3)
    with pytest.raises(ValueError, match="expected batch_size as a whole number >= 1, got 0"):
        Draws(23, 0, seed=0)

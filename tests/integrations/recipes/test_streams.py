"""What is broken in a stream is counted as it was drawn, and listed once."""

import itertools

import pytest
import torch

from geomreg.integrations.recipes import streams
from geomreg.integrations.recipes.config import DataConfig
from geomreg.integrations.recipes.streams import Stream


class Pictures:
    """Samples of which some are broken."""

    def __init__(self, rows, broken):
        self.rows, self.broken = rows, broken

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        return {"id": str(row), "broken": f"{row}.jpg: no image"} if row in self.broken else {"id": str(row), "image": torch.zeros(1)}


@pytest.fixture
def stream(monkeypatch):
    def made(rows, broken, *, size=20, seed=0, workers=0):
        monkeypatch.setattr(streams, "read", lambda *_, **__: Pictures(rows, broken))
        options = {"size": size, "seed": seed, "transform": None, "modalities": ("image",), "workers": workers}
        return Stream(DataConfig("csv", "pairs.csv"), None, None, **options)

    return made


def run(one, folder, *, first=0, steps):
    for batch in itertools.islice(one.batches(first), steps):
        assert len(batch["id"]) == 20
        one.check_broken(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_neighbours_in_a_row_of_broken_ones_are_not_counted(stream, tmp_path, workers):
    """15 of 2000 are 0.75 %: the first of them used to count fifteen."""
    one = stream(2000, range(100, 115), workers=workers)
    run(one, tmp_path, steps=300)  # three epochs
    assert len(one.broken) == 45
    listed = (tmp_path / "broken.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"{row}.jpg: no image" for row in range(100, 115))


def test_listed_once_by_several_streams_and_after_a_resume(stream, tmp_path):
    broken = range(100, 115)
    one, other = stream(2000, broken), stream(2000, broken, seed=1)
    run(one, tmp_path, steps=50)
    run(other, tmp_path, steps=60)
    run(stream(2000, broken), tmp_path, first=40, steps=60)  # made again from step 40
    listed = (tmp_path / "broken.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"{row}.jpg: no image" for row in broken)


def test_too_many_drawn_ones_stop_a_run(stream, tmp_path):
    one = stream(2000, range(0, 2000, 20))
    with pytest.raises(
        RuntimeError, match=r"expected at most 1% of the samples to be broken, got 1\d of (2[2-9]0|3\d\d), the first \d+0\.jpg"
    ):
        run(one, tmp_path, steps=100)
    assert len(set((tmp_path / "broken.txt").read_text().splitlines())) == len(one.broken)

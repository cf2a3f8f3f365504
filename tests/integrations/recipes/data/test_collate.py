"""Batches: stacked tensors, ids, and broken samples apart."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import collate

BROKEN = {"id": "b", "broken": "b.jpg: empty file"}


def sample(name, size=2, **more):
    return {"id": name, "image": torch.full((3, size, size), ord(name)), "label": 3} | more


def test_whole_batch():
    batch = collate([sample("a"), sample("c")])
    assert batch.keys() == {"id", "image", "label", "broken"}
    assert batch["id"] == ["a", "c"]
    assert torch.equal(batch["image"], torch.tensor([97, 99])[:, None, None, None].expand(2, 3, 2, 2))
    assert torch.equal(batch["label"], torch.tensor([3, 3]))
    assert batch["broken"] == []


def test_broken_samples_are_moved_apart():
    batch = collate([BROKEN, sample("a"), BROKEN])
    assert batch["id"] == ["a"]
    assert batch["image"].shape == (1, 3, 2, 2)
    assert batch["broken"] == ["b.jpg: empty file"] * 2


def test_only_broken_samples():
    assert collate([BROKEN]) == {"id": [], "broken": ["b.jpg: empty file"]}


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (
            sample("c", 3),
            ValueError,
            r"image of one shape and type, got int64 tensor of shape \(3, 2, 2\) in 'a' and .*\(3, 3, 3\) in 'c'\. Resize",
        ),
        (sample("c") | {"image": torch.zeros(3, 2, 2)}, ValueError, r"image of one shape and type, got int64 .* and float32"),
        (
            sample("c", text=torch.zeros(2)),
            ValueError,
            r"samples with the same keys, got id, image, label in 'a' and id, image, label, text in 'c'\.",
        ),
    ],
)
def test_samples_that_do_not_go_together(other, error, message):
    with pytest.raises(error, match=f"^collate: expected {message}"):
        collate([sample("a"), other])


def test_values_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"^collate: expected image as a tensor, got Image in sample 'a'\. End the transform with ToTensor"):
        collate([sample("a", image=Image.new("RGB", (2, 2)))])


def test_samples_are_copied_before_the_next_is_made():
    def samples():
        reused = torch.empty(3, 2, 2)
        for k in range(4):
            yield {"id": str(k), "image": reused.fill_(k)}

    for batch in (collate(samples(), 4), collate(samples(), 9)):
        assert batch["id"] == list("0123")
        assert batch["image"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert len(batch["image"]) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int64, torch.bool])
def test_kinds_of_numbers(workers, dtype):
    data = [{"id": str(k), "image": torch.tensor([[k % 2, 1]], dtype=dtype), "label": k, "flag": k > 2} for k in range(5)]
    first, last = DataLoader([*data, BROKEN], batch_size=3, num_workers=workers, collate_fn=collate)
    assert first["image"].dtype == last["image"].dtype == dtype
    assert torch.equal(torch.cat([first["image"], last["image"]]), torch.stack([one["image"] for one in data]))
    assert torch.equal(torch.cat([first["label"], last["label"]]), torch.arange(5))
    assert torch.equal(torch.cat([first["flag"], last["flag"]]), torch.arange(5) > 2)
    assert last["broken"] == [BROKEN["broken"]]


def shared(samples):
    return [value.is_shared() for value in collate(samples).values() if isinstance(value, torch.Tensor)]


def test_workers_write_into_shared_memory():
    for workers in (0, 1):
        (found,) = DataLoader([sample("a"), sample("c")], batch_size=2, num_workers=workers, collate_fn=shared)
        assert found == [bool(workers)] * 2

"""Batches: stacked tensors, ids, and broken samples apart."""

import pytest
import torch
from PIL import Image

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

"""What had to be converted in the images of a data set, counted."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from geomreg.integrations.recipes.data.rgb import KINDS, ImageConfig, Preprocessing

__all__ = ["Counted", "conversions"]

_SEEN = 1 << len(KINDS)


class Counted(Dataset[dict[str, Any]]):
    """A data set that notes of each of its samples what was converted in its image, however often and in whatever process it is loaded.

    Samples lose ``"converted"``. Attributes that are not listed are the data set's. The notes take a byte for each sample, in memory
    that loading processes share with the process that made them.

    Args:
        dataset: one of the readers, or a data set of their samples.

    Attributes:
        dataset: as given.
        notes: ``(N,)`` uint8, a bit for each of :data:`~geomreg.integrations.recipes.data.rgb.KINDS`, and one for samples with an image.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.notes = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        sample = dict(self.dataset[index])
        kinds = sample.pop("converted", ())
        if "image" in sample:
            self.notes[index] = _SEEN | sum(1 << KINDS.index(kind) for kind in kinds)
        return sample


def conversions(dataset: Any, others: list[NDArray[np.uint8]] | None = None) -> str:
    """In words what was converted in a :class:`Counted` data set's images, each counted once; empty if nothing was.

    Args:
        dataset: any; of one that is not counted nothing is said.
        others: notes of other processes on the same data.
    """
    if not isinstance(dataset, Counted):
        return ""
    notes = np.bitwise_or.reduce([dataset.notes.numpy(), *(others or [])])
    seen, transform = int((notes & _SEEN > 0).sum()), getattr(dataset, "transform", None)
    images = transform.images if isinstance(transform, Preprocessing) else ImageConfig()
    words = {
        "blended": f"had transparency and were blended on {images.background}",
        "oriented": "were turned upright by their orientation in EXIF",
        "scaled": "had more than 8 bits of grey and were scaled to 8",
        "cmyk": "were in CMYK and became RGB",
    }
    counts = {kind: int((notes >> KINDS.index(kind) & 1).sum()) for kind in words}
    parts = [f"{count:,} {words[kind]}" for kind, count in counts.items() if count]
    if not parts:
        return ""
    first, _, rest = parts[0].partition(" ")
    return ", ".join([f"{first} of {seen:,} pictures {rest}", *parts[1:]])

"""Batches of samples, some of which may be broken."""

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from geomreg.checks import describe

__all__ = ["collate"]


def collate(samples: Iterable[dict[str, Any]], rows: int | None = None) -> dict[str, Any]:
    """One batch, as ``collate_fn`` of a ``DataLoader``.

    Each sample is copied into the batch before the next is asked for, so that a batch whose samples are made on the way is in memory
    once.

    Args:
        samples: dicts with ``"id"`` and either ``"broken"`` or tensors of one shape for each key (and integers, say labels).
        rows: how many there are at most; by default the length of ``samples``.

    Returns:
        dict: ``"id"``, the list of the B ids of samples that are not broken; for each of their keys a tensor ``(B, ...)``, none
        if all are broken; ``"broken"``, the list of the other samples' messages, empty as a rule. What readers say at
            ``"converted"`` of an image is left out: :class:`~geomreg.integrations.recipes.data.counted.Counted` counts it.

    Raises:
        ValueError: samples with different keys or shapes.
        TypeError: a value that is neither tensor nor integer.
    """
    if rows is None:
        rows = len(samples) if isinstance(samples, Sized) else len(samples := list(samples))
    ids: list[Any] = []
    broken: list[str] = []
    first: dict[str, str] = {}
    stacks: dict[str, Tensor] = {}
    for sample in samples:
        if "broken" in sample:
            broken.append(sample["broken"])
            continue
        described = {key: describe(value) for key, value in sample.items() if key not in ("id", "converted")}
        if not ids:
            first = described
            stacks = {key: _room(key, sample, rows) for key in first}
        elif described != first:
            raise _unlike(first, ids[0], described, sample["id"])
        for key, stack in stacks.items():
            stack[len(ids)] = sample[key]
        ids.append(sample["id"])
    return {"id": ids, "broken": broken, **{key: stack[: len(ids)] for key, stack in stacks.items()}}


def _room(key: str, sample: dict[str, Any], rows: int) -> Tensor:
    """For ``rows`` such values; in a loading process in memory that it shares with the main process, which then copies nothing."""
    value = sample[key]
    if not isinstance(value, (Tensor, int)):
        raise TypeError(
            f"collate: expected {key} as a tensor, got {describe(value)} in sample {sample['id']!r}. End the transform with ToTensor()."
        )
    value = torch.as_tensor(value)
    if get_worker_info() is None or value.device.type != "cpu":
        return value.new_empty(rows, *value.shape)
    storage = value._typed_storage()._new_shared(rows * value.numel(), device=value.device)  # as torch's default_collate
    return value.new(storage).resize_(rows, *value.shape)


def _unlike(first: dict[str, str], first_id: object, other: dict[str, str], other_id: object) -> ValueError:
    if first.keys() != other.keys():
        return ValueError(
            f"collate: expected samples with the same keys, got {', '.join(['id', *first])} in {first_id!r} and "
            f"{', '.join(['id', *other])} in {other_id!r}. Batch samples of one data set."
        )
    key = next(key for key in first if first[key] != other[key])
    return ValueError(
        f"collate: expected {key} of one shape and type, got {first[key]} in {first_id!r} and {other[key]} in {other_id!r}. "
        "Resize or pad in the transform."
    )

"""Batches of samples, some of which may be broken."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from geomreg.checks import describe

__all__ = ["collate"]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch, as ``collate_fn`` of a ``DataLoader``.

    Args:
        samples: dicts with ``"id"`` and either ``"broken"`` or tensors of one shape for each key (and integers, say labels).

    Returns:
        dict: ``"id"``, the list of the B ids of samples that are not broken; for each of their keys a tensor ``(B, ...)``, none
        if all are broken; ``"broken"``, the list of the other samples' messages, empty as a rule.

    Raises:
        ValueError: samples with different keys or shapes.
        TypeError: a value that is neither tensor nor integer.
    """
    whole = [sample for sample in samples if "broken" not in sample]
    batch: dict[str, Any] = {"id": [sample["id"] for sample in whole], "broken": [s["broken"] for s in samples if "broken" in s]}
    for sample in whole[1:]:
        _check_alike(whole[0], sample)
    for key in whole[0] if whole else ():
        if key != "id":
            if not isinstance(whole[0][key], (Tensor, int)):
                raise TypeError(
                    f"collate: expected {key} as a tensor, got {describe(whole[0][key])} in sample {whole[0]['id']!r}. "
                    "End the transform with ToTensor()."
                )
            batch[key] = default_collate([sample[key] for sample in whole])
    return batch


def _check_alike(first: dict[str, Any], other: dict[str, Any]) -> None:
    if first.keys() != other.keys():
        raise ValueError(
            f"collate: expected samples with the same keys, got {', '.join(first)} in {first['id']!r} and {', '.join(other)} in "
            f"{other['id']!r}. Batch samples of one data set."
        )
    for key in first:
        if key != "id" and describe(first[key]) != describe(other[key]):
            raise ValueError(
                f"collate: expected {key} of one shape and type, got {describe(first[key])} in {first['id']!r} and "
                f"{describe(other[key])} in {other['id']!r}. Resize or pad in the transform."
            )

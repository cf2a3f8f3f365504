"""What several regularizers do with their inputs: unit vectors, one modality after the other, rows of all processes."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from geomreg.checks import check_embeddings, check_paired_embeddings, check_pairs_present, check_student
from geomreg.precision import at_least_fp32, full_precision
from geomreg.types import Embeddings

__all__ = ["chosen", "nothing", "pairs", "sized", "summed", "unit", "unit_along", "unit_rows"]


def unit_rows(value: Tensor) -> Tensor:
    """Each row divided by its L2 norm, in fp32 or wider; a zero row stays zero, and its gradient is zero."""
    with full_precision(value):
        return unit_along(at_least_fp32(value), -1)


def nothing(size: Tensor) -> Tensor:
    """Where a largest absolute value is that of a vector without direction: 0, or so small that its inverse overflows."""
    return size < 4 * torch.finfo(size.dtype).tiny


def _largest_power(dtype: torch.dtype) -> int:
    """Of two, whose inverse is a normal number."""
    return int(math.log2(torch.finfo(dtype).max)) - 2


def unit_along(value: Tensor, axis: int, eps: float = 0.0) -> Tensor:
    """``value / (norm + eps)`` with norms along an axis, of any size: squares neither overflow nor vanish.

    Where the norm is 0 (not NaN), or so small that 1 / norm overflows, value and gradient are zero, not of size 1 / eps.
    """
    size = torch.linalg.vector_norm(value.detach(), ord=math.inf, dim=axis, keepdim=True)
    there = ~nothing(size)  # true of NaN
    power = torch.log2(torch.where(there & size.isfinite(), size, 1.0)).floor().clamp(max=_largest_power(value.dtype))
    scale = there * torch.exp2(-power)  # by a power of two nothing is rounded; by 0 where there is no direction
    scaled = scale * value
    norm: Tensor = torch.linalg.vector_norm(torch.where(there, scaled, 1.0), dim=axis, keepdim=True)
    return scaled / (norm + eps * scale)


def sized(value: Tensor) -> Tensor:
    """All rows times one power of two, so that the largest entry is about 1 and squares neither overflow nor vanish."""
    largest = value.detach().abs().max()
    there = ~nothing(largest) & largest.isfinite()
    power = torch.log2(torch.where(there, largest, 1.0)).floor().clamp(max=_largest_power(value.dtype))
    scaled: Tensor = value * torch.exp2(-power)
    return scaled


def unit(embeddings: Embeddings) -> Embeddings:
    """:func:`unit_rows` of each modality that is there."""
    return Embeddings(*(None if value is None else unit_rows(value) for value in embeddings))


def chosen(
    name: str,
    modalities: tuple[str, ...] | None,
    normalize: bool,
    student: Embeddings,
    *references: Embeddings | None,
    labels: tuple[str, ...] = ("teacher",),
) -> list[tuple[Tensor, ...]]:
    """Student and references of each chosen modality, checked against each other; unit vectors if ``normalize``. Messages call the
    references by ``labels``.

    ``modalities=None`` takes those that are given.
    """

    def reduced(value: Embeddings | None) -> Embeddings | None:
        if modalities is None or not isinstance(value, Embeddings):
            return value  # check_embeddings refuses what is no Embeddings
        return Embeddings(*(one if field in modalities else None for field, one in zip(Embeddings._fields, value, strict=True)))

    kept = reduced(student)
    checked = [
        check_embeddings(name, kept, reduced(one), required=modalities or (), other=label)  # type: ignore[arg-type]
        for one, label in zip(references, labels, strict=True)
    ]
    scaled = [unit(one) if normalize else one for one in (kept, *checked) if one is not None]
    return [tuple(row) for row in zip(*scaled, strict=True) if row[0] is not None]


def pairs(name: str, student: Embeddings, normalize: bool) -> tuple[Tensor, Tensor]:
    """Images and texts of a term that looks at the student alone."""
    image, text = check_pairs_present(name, check_student(name, student))
    check_paired_embeddings(name, image, text)
    return (unit_rows(image), unit_rows(text)) if normalize else (image, text)


def summed(values: Iterable[Tensor]) -> Tensor:
    """Sum of at least one value."""
    first, *others = values
    for value in others:
        first = first + value
    return first

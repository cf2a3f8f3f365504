"""The frozen model that a student is compared with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.checks import describe
from geomreg.types import Embeddings

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """Frozen copy of a model, as it is now: evaluation mode, no gradient, buffers copied too.

    The copy stays frozen under ``.train()`` and ``.requires_grad_()``, follows ``.to(...)``, and as a part of another
    module adds nothing to that module's ``parameters()`` or ``state_dict()``: checkpoints do not grow and no optimizer
    moves it. Its embeddings are ordinary tensors without graph (``no_grad``, not ``inference_mode``, whose tensors
    cannot enter a loss).

    Args:
        model: any ``nn.Module``; copied, never changed.
        encode: ``encode(model, batch) -> Embeddings``, the same function and the same view of the batch as for the student.

    Raises:
        TypeError: ``model`` is no module, ``encode`` is not callable or does not return :class:`Embeddings`.
        ValueError: the copy shares storage with ``model``, so training the student would move the teacher.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings, Teacher
        >>> student = torch.nn.Linear(4, 2)
        >>> teacher = Teacher(student, lambda model, batch: Embeddings(image=model(batch)))
        >>> teacher(torch.ones(3, 4)).image.shape, len(list(teacher.parameters()))
        (torch.Size([3, 2]), 0)
    """

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, Any], Embeddings]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Teacher: expected model as an nn.Module, got {describe(model)}. Pass the student itself; it is copied.")
        if not callable(encode):
            raise TypeError(f"Teacher: expected encode as a function of (model, batch), got {describe(encode)}. Pass the student's.")
        frozen = copy.deepcopy(model)
        _check_independent(model, frozen)
        self.encode = encode
        self._held = (frozen.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not register it
        super().train(False)

    @property
    def model(self) -> nn.Module:
        """The frozen copy."""
        return self._held[0]

    def forward(self, batch: Any) -> Embeddings:
        with torch.no_grad():
            embeddings = self.encode(self.model, batch)
        if not isinstance(embeddings, Embeddings):
            raise TypeError(f"Teacher: expected encode to return geomreg.Embeddings, got {describe(embeddings)}. Wrap its result.")
        return embeddings

    def train(self, mode: bool = True) -> "Teacher":
        """Changes nothing: a teacher stays in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.model._apply(fn)  # type: ignore[no-untyped-call]
        return self


def _check_independent(model: nn.Module, frozen: nn.Module) -> None:
    storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model) if tensor.numel()}
    for name, tensor in list(frozen.named_parameters()) + list(frozen.named_buffers()):
        if tensor.numel() and tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() in storages:
            raise ValueError(
                f"Teacher: expected a copy with storage of its own, got one that shares {name!r} with the model. "
                "The model's __deepcopy__ keeps it; pass a second, separately built model."
            )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]

"""The few types that every room of the library shares."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Embeddings", "Regularizer", "Terms", "have_values"]


class Embeddings(NamedTuple):
    """Image and text embeddings of one batch; either may be None where a term does not need it.

    Attributes:
        image: ``(B, D)`` image embeddings.
        text: ``(B, D)`` text embeddings; row j belongs to image j where a term needs pairs.
    """

    image: Tensor | None = None
    text: Tensor | None = None


def have_values(embeddings: Embeddings) -> bool:
    """Not those of a dry run: meta tensors and fake ones have shapes alone, so nothing can be said of their values."""
    return not any(value is not None and (value.is_meta or isinstance(value, FakeTensor)) for value in embeddings)


class Terms(NamedTuple):
    """Value of a weighted sum with its parts.

    Attributes:
        total: 0-d tensor with graph, the weighted sum.
        parts: name to detached, *unweighted* value, for logging.
    """

    total: Tensor
    parts: dict[str, Tensor]


@runtime_checkable
class Regularizer(Protocol):
    """What a training loop may rely on; any ``nn.Module`` of this shape is a regularizer.

    One that compares with a teacher is at its least where both embed a batch alike. A student in training mode with dropout, or that sees
    another view, does not, whatever its weights: embed the batch of the terms with ``student.eval()``, in the teacher's view.

    A term that takes more than embeddings names it in a class attribute ``inputs`` (needed) or ``optional_inputs``: ``logit_scale``,
    ``logit_bias``, ``labels``, ``texts`` (a bank of constant embeddings), ``previous`` (a second teacher), ``feature_maps`` and
    ``teacher_feature_maps``; they are keyword arguments of the call. One whose value is a mean over samples may say so in an attribute
    ``separable``: :func:`geomreg.backward` then needs one pass instead of two.
    """

    def __call__(self, student: Embeddings, teacher: Embeddings | None, **inputs: Any) -> Tensor:
        """0-d value in fp32 or wider."""

    def step(self) -> None:
        """Commit what the forwards since the last call collected; once after each optimizer step."""

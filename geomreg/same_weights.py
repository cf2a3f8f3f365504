"""While a student has its teacher's weights their embeddings are the same; where they are not, the cause is named once.

Dropout in the student, another view of the batch, other preprocessing or another precision make every term start far from 0 and fit
noise. A :class:`geomreg.Teacher` knows the model that it was made from, so it marks the embeddings of its first calls; the first term
that compares them with embeddings of that very model says what it finds. No forward pass, no random number and no collective is added.

What is seen: whole batches, chunks of ``backward(separable=True)`` whose teacher's rows are those of the chunk, other chunked steps at the
teacher's next call, and cached teachers whose cache was opened or built with a teacher that was made from the student. What is not seen,
and never said wrongly: other rows of a teacher's embeddings, a cache that was opened without its teacher, weights that are sharded over
processes (FSDP2), running statistics that a batch of the task has moved, compiled terms, and the terms on a target batch in a run of the
recipes, which is in training mode on purpose.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geomreg.chunks import current_pass
from geomreg.statistics import STATISTICS
from geomreg.types import Embeddings, have_values

__all__ = ["Agreement", "Origin", "compare", "same_parameters", "uncompared"]

ROUNDING = 3e-3  # relative distance of embeddings that other kernels or TF32 leave
HALF_ROUNDING = 3e-2  # of bf16 and fp16
RATES = (  # attributes in which modules keep the rate of their noise
    "p", "prob", "dropout", "dropout_p", "drop_prob", "drop_rate", "drop_path", "attn_dropout", "attn_drop", "attention_dropout",
    "activation_dropout", "hidden_dropout", "layerdrop",
)  # fmt: skip
Mark = tuple["weakref.ref[Tensor]", "weakref.ref[Agreement]", str]

_marks: list[Mark] = []  # of the teachers' embeddings that are still to be compared
_UNCOMPARED: ContextVar[bool] = ContextVar("geomreg_uncompared", default=False)


class Agreement:
    """What a teacher knows of the student that it was made from, until both have been compared once or the student has moved.

    Args:
        student: held weakly.
        equal: a method of the teacher, held weakly too: ``equal(student)``, both give the same embeddings by their weights.
        rounding: relative distance of embeddings that is none.
    """

    def __init__(self, student: nn.Module, equal: Callable[[nn.Module], bool], rounding: float = ROUNDING) -> None:
        self._student: Callable[[], nn.Module | None] = weakref.ref(student)
        self._equal: Callable[[], Callable[[nn.Module], bool] | None] = weakref.WeakMethod(equal)
        self._open, self._rounding = True, rounding
        self._version: int | None = None
        self._compared = False
        self._pending: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or one that is read from a file, knows no student."""
        state = {"_student": _nothing, "_equal": _nothing, "_open": False, "_rounding": self._rounding}
        return {**state, "_version": None, "_compared": True, "_pending": None}

    def origin(self) -> "Origin | None":
        """The student as it is now, if it still has the teacher's weights."""
        student = self._student()
        return None if student is None or not self._still_equal(student) else Origin(student)

    def mark(self, embeddings: Embeddings) -> None:
        """Of the teacher, as they are made: to be compared, if the student still has its weights."""
        if not self._open or _UNCOMPARED.get() or torch.compiler.is_compiling() or not have_values(embeddings):
            return
        student = self._student()
        moved = student is None or self._version not in (None, _version(student))
        if self._pending is not None and student is not None and moved:  # what was compared was trained since: it was the student
            _warn(self._pending)
        waiting = self._pending is not None and not moved
        if waiting:
            return
        if student is None or moved or self._compared or not (self._version is not None or self._still_equal(student)):
            self.close()
            return
        self._version = _version(student)
        _forget(self)
        _marks.extend(
            (weakref.ref(value), weakref.ref(self), field) for field, value in embeddings._asdict().items() if isinstance(value, Tensor)
        )

    def close(self) -> None:
        """Compare no more."""
        self._open, self._pending = False, None
        _forget(self)

    def _statistics_moved(self, student: nn.Module) -> bool:
        """Running statistics of batch normalisations are no longer the teacher's."""
        teacher = getattr(getattr(self._equal(), "__self__", None), "model", None)
        held = {} if teacher is None else dict(teacher.named_buffers())
        pairs = ((value, held.get(name)) for name, value in student.named_buffers() if name.rpartition(".")[2] in STATISTICS)
        return any(other is not None and not torch.equal(value, other.to(value)) for value, other in pairs)

    def _still_equal(self, student: nn.Module) -> bool:
        equal = self._equal()
        return equal is not None and equal(student)

    def found(self, field: str, student: Tensor, teacher: Tensor) -> None:
        """Embeddings of the same samples that should agree, if they come from the student in training."""
        model = self._student()
        if not self._open or model is None or not student.requires_grad or student.shape != teacher.shape:
            return
        if student.grad_fn is not None and not _reaches(student, model):
            self.close()  # another model than the teacher's is trained: it may differ
            return
        self._compared = True
        with torch.no_grad():
            apart = float((student.float() - teacher.float()).norm() / teacher.float().norm())
        half = any(value.dtype in (torch.bfloat16, torch.float16) for value in (student, teacher, *model.parameters()))
        tolerance = HALF_ROUNDING if half or torch.is_autocast_enabled(student.device.type) else self._rounding
        if not apart > tolerance or not self._still_equal(model):
            return
        if not _noise(model) and self._statistics_moved(model):  # by a batch of the task, as they should
            self.close()
            return
        message = _message(field, apart, model)
        if student.grad_fn is None:  # a leaf of a chunked step does not say whose it is
            self._pending = self._pending or message
            return
        self.close()
        _warn(message)


def compare(student: Tensor, teacher: Tensor) -> None:
    """Called by the checks of every term; does something where ``teacher`` is marked, once."""
    if torch.compiler.is_compiling() or not _marks:
        return
    for mark in list(_marks):
        known, agreement = mark[0](), mark[1]()
        if agreement is not None and known is not None and (known is teacher or _of_chunk(known, teacher)):
            agreement.found(mark[2], student, teacher)
            if student.requires_grad:
                _marks[:] = [other for other in _marks if other is not mark]
            return


class Origin:
    """A model, held weakly, whose weights were seen to be those of some embeddings."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._version = _version(model) + _counted(model)

    def unmoved(self, model: nn.Module) -> bool:
        """It is this one, with the weights and running statistics that it had."""
        return self.model() is model and _version(model) + _counted(model) == self._version


@contextmanager
def uncompared() -> Iterator[None]:
    """Within, teachers mark nothing: the student is in training mode on purpose."""
    token = _UNCOMPARED.set(True)
    try:
        yield
    finally:
        _UNCOMPARED.reset(token)


def _of_chunk(known: Tensor, teacher: Tensor) -> bool:
    """Whether a loss that is called for a chunk has taken the rows of this chunk from the embeddings of the batch."""
    current = current_pass()
    if current is None or current.trial or len(known) != current.rows or (known.dtype, known.device) != (teacher.dtype, teacher.device):
        return False
    rows = known[current.held]
    return rows.shape == teacher.shape and torch.equal(rows, teacher)


def same_parameters(one: nn.Module, two: nn.Module) -> bool:
    """All parameters of ``one`` are those of ``two``; False also where that cannot be seen on this process alone, as of sharded ones."""
    others = dict(two.named_parameters())
    for name, value in one.named_parameters():
        other = others.get(name)
        if other is None or any(hasattr(both, "to_local") or both.is_meta or nn.parameter.is_lazy(both) for both in (value, other)):
            return False
        if value.shape != other.shape or not torch.equal(value.detach(), other.detach().to(value)):
            return False
    return True


def _nothing() -> None:
    return None


def _forget(agreement: Agreement) -> None:
    _marks[:] = [mark for mark in _marks if mark[1]() not in (agreement, None) and mark[0]() is not None]


def _version(model: nn.Module) -> int:
    """Rises with every change in place."""
    return sum(value._version for value in model.parameters() if not value.is_inference())


def _counted(model: nn.Module) -> int:
    """Rises with every batch that a batch normalisation counts."""
    counts = (value for name, value in model.named_buffers() if name.rpartition(".")[2] == "num_batches_tracked")
    return sum(value._version for value in counts if not value.is_inference())


def _reaches(value: Tensor, model: nn.Module) -> bool:
    """Whether a gradient of ``value`` would arrive at a parameter of the model."""
    known = {id(parameter) for parameter in model.parameters()}
    queue, seen = [value.grad_fn], set()
    while queue:
        node: Any = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in known:
            return True
        queue += [following for following, _ in node.next_functions]
    return False


def _message(field: str, apart: float, model: nn.Module) -> str:
    noise = _noise(model)
    shown = ", ".join(noise[:3]) + (f" and {len(noise) - 3} more" if len(noise) > 3 else "")
    cause = (
        f"The student runs in training mode with {shown}, which the terms would fit: embed the batch of the terms with "
        "student.eval(), or set these to 0"
        if noise
        else "Give both the same view and preprocessing of the batch, and compute both in one precision"
        + ("; the student is in training mode, so try student.eval() too" if model.training else "")
    )
    return (
        f"Teacher: expected student and teacher of the same weights to embed a batch alike, got {field} embeddings {100 * apart:.2g} % "
        f"apart. {cause}."
    )


def _noise(model: nn.Module) -> list[str]:
    """Modules in training mode that draw random numbers or look at the other samples of the batch."""
    found = []
    for name, module in model.named_modules():
        rates = [vars(module).get(rate) for rate in RATES]
        if module.training and (isinstance(module, _BatchNorm) or any(isinstance(rate, float) and 0 < rate <= 1 for rate in rates)):
            found.append(f"{type(module).__name__} at {name!r}")
    return found


def _warn(message: str) -> None:
    """For the line that is neither of this library nor of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("geomreg", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

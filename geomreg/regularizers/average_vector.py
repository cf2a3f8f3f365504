"""Average vector loss of DiVE: every difference vector should equal one running mean (arXiv 2511.09973)."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.checks import check_embeddings, check_fraction, check_mean, check_option, check_width
from geomreg.chunks import current_pass
from geomreg.distributed import all_reduce_max, all_reduce_sum, wait_for_step, weighted_by_rows, world_size
from geomreg.precision import apply_keeping_fp32, at_least_fp32, full_precision
from geomreg.regularizers.common import unit
from geomreg.types import Embeddings

__all__ = ["AverageVectorLoss", "average_vector_loss"]

_FORGOTTEN = 100  # training forwards without step() before the warning


def average_vector_loss(
    student_image: Tensor | None,
    student_text: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    *,
    mean: Tensor,
) -> Tensor:
    r"""Mean squared distance of the difference vectors to a given mean vector.

    .. math:: \frac1B \sum_j \lVert u_j - m \rVert^2 + \frac1B \sum_j \lVert v_j - m \rVert^2, \quad
              u = f_{student} - f_{teacher} \text{ (images)},\; v \text{ likewise (texts)}

    Args:
        student_image: ``(B, D)`` embeddings of the model in training, as they come (not normalised here);
            receives gradient. None together with ``teacher_image`` for texts only.
        student_text: ``(B, D)``, receives gradient; None together with ``teacher_text`` for images only.
            Images and texts need not be pairs, and their numbers may differ.
        teacher_image: ``(B, D)`` embeddings of the same inputs by the frozen model; constant.
        teacher_text: ``(B, D)``, constant.
        mean: ``(D,)`` vector m shared by both modalities, or a 0-d tensor (zero: plain distillation); constant.

    Returns:
        0-d tensor, fp32 or wider.

    Scale:
        Embedding units squared: summed over D, averaged over B, added over modalities. Independent of B; for unit
        vectors at most ``2 * (2 + |m|)**2``. DiVE's weight of 1000 fits unit vectors; raw CLIP features of norm r
        need about ``1000 / r**2``.

    Invariances:
        Permutation of samples, each modality by itself; one orthogonal map applied to student, teacher and mean; a
        translation of one modality's student and teacher together; a translation of all students if ``mean`` moves along.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices differ, a modality is given on one side only or on neither, a teacher or the
            mean requires grad.

    Deviations:
        None known; the paper has no public code and leaves normalisation and the order of update and loss open.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> average_vector_loss(student, None, teacher, None, mean=torch.tensor([0.5, 0.0]))
        tensor(0.2500)

    Reference:
        Suzuki et al., Difference Vector Equalization, AAAI 2026, arXiv 2511.09973, average vector loss.
    """
    name = "average_vector_loss"
    student = Embeddings(student_image, student_text)
    teacher = check_embeddings(name, student, Embeddings(teacher_image, teacher_text))
    check_mean(name, mean, check_width(name, student))
    total: Tensor | None = None
    for one, other in zip(student, teacher, strict=True):
        if one is None or other is None:
            continue
        with full_precision(one):
            shift = at_least_fp32(one) - at_least_fp32(other)  # (B, D)
            term = (shift - mean.to(shift)).square().sum(dim=1).mean()
        total = term if total is None else total + term
    if total is None:  # excluded by check_embeddings
        raise ValueError(name)
    return total


class AverageVectorLoss(nn.Module):
    """Module form of :func:`average_vector_loss`; owns the running mean of all difference vectors.

    ``m <- decay * m + (1 - decay) * (mean of all difference vectors of both modalities and all processes)``, from
    zero, without bias correction or gradient. In training mode ``forward`` only collects the sum and number of
    difference vectors; :meth:`step`, called once after each optimizer step that was not skipped, commits them.
    In evaluation mode nothing is collected.

    Embed the student's batch without dropout, ``student.eval()``, and in the teacher's view: with equal weights the value is then 0, and
    with dropout of 0.1 it can be 0.1 (118 at a weight of 1000), noise that the student would learn to fit.

    Args:
        decay: weight of the old mean; 0.99 in the paper. 1.0 freezes the mean at zero, which makes the loss plain
            distillation on both encoders: the control.
        update: ``"after"`` uses the mean of earlier steps (exact under gradient accumulation, chunking and DDP);
            ``"before"`` first moves the mean by this batch, which must therefore be whole: a second forward before
            :meth:`step` raises. The paper does not say which it uses.
        normalize: divide embeddings by their L2 norm first. The paper does not say; its weight fits unit vectors.

    Attributes:
        mean: the running mean, fp32 whatever ``.to(dtype)`` does; 0-d zero until the first commit, then ``(D,)``.
    """

    mean: Tensor

    def __init__(self, *, decay: float = 0.99, update: str = "after", normalize: bool = True) -> None:
        super().__init__()
        check_fraction(self._name, "decay", decay)
        check_option(self._name, "update", update, ("after", "before"))
        self.decay, self.update, self.normalize = decay, update, normalize
        self.register_buffer("mean", torch.zeros(()))
        self.pending_sum, self.pending_count = torch.zeros(()), torch.zeros(())  # no buffers: DDP copies those of rank 0 to the others
        self._forwards, self._warned = 0, False

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def separable(self) -> bool:
        """Whether the value is a mean over samples: not if this batch moves the mean first."""
        return self.update == "after"

    def forward(self, student: Embeddings, teacher: Embeddings | None) -> Tensor:
        student, teacher = self._checked(student, teacher)
        mean = self._collect(student, teacher) if self.training else self.mean
        parts = [
            (average_vector_loss(one, None, other, None, mean=mean), len(one))
            for one, other in zip(student, teacher, strict=True)
            if one is not None and other is not None
        ]
        return weighted_by_rows(parts, self.training)

    def _checked(self, student: Embeddings, teacher: Embeddings | None) -> tuple[Embeddings, Embeddings]:
        """Everything that can be refused is refused here, before statistics are collected; embeddings scaled to unit norm."""
        teacher = check_embeddings(self._name, student, teacher)
        width = check_width(self._name, student)
        for known in (self.mean, self.pending_sum):
            check_mean(self._name, known, width)
        return (unit(student), unit(teacher)) if self.normalize else (student, teacher)

    @torch.no_grad()
    def _collect(self, student: Embeddings, teacher: Embeddings) -> Tensor:
        """Add this batch to the pending statistics; returns the mean that the loss uses."""
        one_pass = current_pass()
        if one_pass is not None and one_pass.trial:
            return self.mean
        if self.update == "before" and self.pending_sum.ndim:  # not _forwards: torch.compile sees this too
            raise RuntimeError(
                f'{self._name}: expected step() between two training forwards with update="before", got a second forward. '
                'Call step() after each optimizer step (discard() after a skipped one), or use update="after" with accumulation.'
            )
        for one, other in zip(student, teacher, strict=True):
            if one is None or other is None:
                continue
            for key in ("mean", "pending_sum", "pending_count"):  # a module that was not moved follows its embeddings
                setattr(self, key, getattr(self, key).to(one.device))
            with full_precision(one):
                self.pending_sum = self.pending_sum + (one.float() - other.float()).sum(dim=0)
            self.pending_count = self.pending_count + one.shape[0]
        if not torch.compiler.is_compiling():
            self._forwards += 1
            if self._forwards > _FORGOTTEN and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._name}: {_FORGOTTEN} training forwards without step(); the running mean stands still. "
                    "Call step() after each optimizer step.",
                    stacklevel=6,  # past no_grad, forward() and two frames of nn.Module to the caller
                )
        return self._moved() if self.update == "before" else self.mean

    def _moved(self) -> Tensor:
        """The mean after the pending statistics of all processes; as it is where these are empty or not finite."""
        if self.update == "before" and self.pending_sum.ndim == 0 and world_size() > 1:  # the others reduced in their forward
            raise RuntimeError(
                f'{self._name}: expected a training forward on every process with update="before", got none on this one. '
                'Give every process a batch, or use update="after".'
            )
        known = self.mean if self.mean.ndim else self.pending_sum
        width = known.numel() if known.ndim else 0
        if self.mean.ndim == 0:  # first commit: a process without a forward learns the width from the others
            width = all_reduce_max(width, self.mean.device)
        if width == 0:
            return self.mean
        pending = self.pending_sum if self.pending_sum.ndim else self.mean.new_zeros(width)
        statistics = all_reduce_sum(torch.cat([pending, self.pending_count[None]]))
        batch_mean = statistics[:-1] / statistics[-1]
        moved = self.decay * self.mean + (1 - self.decay) * batch_mean
        return torch.where(batch_mean.isfinite().all(), moved, self.mean)

    @torch.no_grad()
    def step(self) -> None:
        """Commit the pending statistics to the running mean; if they are not finite, all since the last call are dropped.

        Collective: with several processes every one calls it, with or without a forward before.
        """
        if self.update == "after":  # with "before" every process had as many forwards
            wait_for_step(self.mean.device)
        self.mean = self._moved()
        self.discard()

    def discard(self) -> None:
        """Drop the pending statistics: instead of :meth:`step` after an optimizer step that was skipped."""
        self.pending_sum, self.pending_count = self.mean.new_zeros(()), self.mean.new_zeros(())
        self._forwards = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AverageVectorLoss":
        apply_keeping_fp32(self, partial(super()._apply, fn, recurse))
        self.pending_sum, self.pending_count = (value.to(self.mean.device) for value in (self.pending_sum, self.pending_count))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(prefix + "mean")
        if isinstance(saved, Tensor) and saved.ndim <= 1:  # 0-d before the first commit, (D,) after it
            self.mean = torch.zeros(saved.shape, device=self.mean.device)
            self.discard()
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.mean = self.mean.float()  # assign=True takes the tensor as it was saved

    def extra_repr(self) -> str:
        return f"decay={self.decay}, update={self.update!r}, normalize={self.normalize}"

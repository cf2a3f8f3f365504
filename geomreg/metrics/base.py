"""What the metric classes have in common: how they collect, over batches and processes."""

import copy
import difflib
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from geomreg.checks import (
    check_max_samples,
    check_modality,
    check_next_widths,
    check_option,
    check_same_ids,
    check_same_samples,
    check_updated,
)
from geomreg.metrics.moments import Moments, collected
from geomreg.metrics.results import Results
from geomreg.types import Embeddings

__all__ = ["EmbeddingMetric", "MomentsMetric", "PairedMetric"]


class EmbeddingMetric(Metric):
    """A metric whose states are lists of flat fp64 vectors.

    Flat and fp64, because a process without samples offers an empty vector where the others have rows of a width that it does not know.
    They stay fp64 under ``set_dtype`` and ``to``, which move a metric to another device alone: records hold counts, widths and ids, which
    narrower numbers would spoil. A subclass says ``higher_is_better``, and names its :class:`~geomreg.metrics.results.Results` if its
    ``compute`` returns several numbers.

    Args:
        states: their names.
        options: what the states depend on beside class and samples. It is a state of its own: MetricCollection takes metrics for one whose
            states are equal after the first batch, be it by chance.
    """

    is_differentiable = False
    full_state_update = False
    results: type[Results] | None = None
    options: Tensor
    _in_call = False

    def __init__(self, states: Sequence[str], options: Sequence[str] = (), **kwargs: Any) -> None:
        own = inspect.signature(type(self)).parameters
        for key in kwargs:  # of torchmetrics, or misspelled
            if near := difflib.get_close_matches(key, own, n=1):
                raise TypeError(f"{type(self).__name__}: expected options that it has, got {key}. Did you mean {near[0]}?")
        try:
            super().__init__(**kwargs)
        except ValueError as error:
            if not str(error).startswith("Unexpected keyword"):
                raise
            raise TypeError(
                f"{type(self).__name__}: expected options that it or torchmetrics' Metric has, got {', '.join(kwargs)}. "
                f"It has {', '.join(name for name in own if name != 'kwargs') or 'none of its own'}."
            ) from error
        super().set_dtype(torch.float64)  # of the empty states of a process without samples
        for state in states:
            self.add_state(state, default=[], dist_reduce_fx="cat")
        letters = torch.tensor(list("/".join((type(self).__name__, *options)).encode()), dtype=torch.float64)
        self.add_state("options", default=letters, dist_reduce_fx="max")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The value of this batch alone, which is added to those before. It is NaN where so few samples have none, as in a last batch of
        one row; ``compute`` raises if all that was collected has none. What raises here adds nothing and loses nothing."""
        before, count = {name: copy.copy(getattr(self, name)) for name in self._defaults}, self._update_count
        on_cpu = self.compute_on_cpu
        self._in_call = True
        try:
            return super().forward(*args, **kwargs)
        except BaseException:  # Ctrl-C too
            for name, value in before.items():
                setattr(self, name, value)
            self._update_count, self._computed, self._enable_grad, self.compute_on_cpu = count, None, False, on_cpu
            self._is_synced, self._should_unsync, self._to_sync = False, True, self.sync_on_compute
            raise
        finally:
            self._in_call = False

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What torchmetrics makes of a class's ``compute``; in a call NaN instead of an error, and states of its own after an error."""

        @functools.wraps(compute)
        def defined(*args: Any, **kwargs: Any) -> Any:
            try:
                return compute(*args, **kwargs)
            except ValueError:
                if not self._in_call:
                    raise
                return self._undefined()

        wrapped = super()._wrap_compute(defined)

        @functools.wraps(compute)
        def restored(*args: Any, **kwargs: Any) -> Any:
            synced = self._is_synced
            try:
                return wrapped(*args, **kwargs)
            except BaseException:
                if self._is_synced and not synced:
                    self.unsync()
                raise

        return restored

    def _undefined(self) -> Tensor | Results:
        if self.results is not None:
            return self.results.undefined(self.device)
        return torch.full((), torch.nan, dtype=torch.float64, device=self.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a result, or a list of results as a series; of ``compute()`` without one. Returns matplotlib's figure and axes."""
        return self._plot(val, ax)

    def reset(self) -> None:
        """Forget all samples; in lists of its own, since torchmetrics' ``Running`` still holds those of before."""
        for state, default in self._defaults.items():
            if isinstance(default, list):
                setattr(self, state, [])
        super().reset()

    def set_dtype(self, dst_type: str | torch.dtype) -> "EmbeddingMetric":
        """Changes nothing: states and results are fp64."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        places: list[dict[str, Any]] = [self.__dict__, self._defaults, self._buffers]
        names = [tuple(self._defaults), tuple(self._defaults), tuple(self._buffers)]
        exact = [{name: place[name] for name in some} for place, some in zip(places, names, strict=True)]
        super()._apply(fn, exclude_state)
        for place, values in zip(places, exact, strict=True):
            place.update({name: _moved_alone(value, place[name]) for name, value in values.items()})
        self._dtype, self._computed = torch.float64, None
        return self

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same options collected."""
        super().merge_state(incoming_state)
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        options = incoming_state.get("options", self.options)
        if options.shape != self.options.shape or not bool((options == self.options.to(options)).all()):
            raise ValueError(f"{type(self).__name__}: expected the state of a metric with the same options, got another's. Build it alike.")
        super()._reduce_states(incoming_state)  # of torchmetrics: puts list states one behind the other
        self._computed = None
        self._merge()

    def _merge(self) -> None:
        """Make one record of several, where a state is sums over samples: it stays as small as it was."""

    def _keep(self, **rows: Tensor) -> None:
        """Add ``(N, D)`` rows to the states of these names; raises if they have another width than those before."""
        widths = [int(getattr(self, state)[0][1]) for state in rows if getattr(self, state)]
        if widths:
            check_next_widths(type(self).__name__, widths, [value.shape[1] for value in rows.values()], list(rows))
        for state, value in rows.items():
            getattr(self, state).append(_packed(value))

    def _kept(self, *states: str, minimum: int, max_samples: int, parts: int = 1) -> tuple[Tensor, ...]:
        """All rows of these states, of this or of all processes; ``parts``: how many of ``max_samples`` each of them is."""
        found = []
        for state in states:
            rows = list(_unpacked(self._joined(state, minimum)))
            for some in rows:
                check_next_widths(type(self).__name__, rows[0].shape[1:], some.shape[1:])
            found.append(torch.cat(rows))
        check_max_samples(type(self).__name__, parts * max(len(rows) for rows in found), max_samples)
        return tuple(found)

    def _joined(self, state: str, minimum: int) -> Tensor:
        """A list state, of this or of all processes, as one vector; raises if nothing was collected."""
        records = getattr(self, state)
        if not len(records):
            check_updated(type(self).__name__, 0, minimum)
        return records if isinstance(records, Tensor) else torch.cat(records)


class PairedMetric(EmbeddingMetric):
    """A metric of student and teacher on the same samples.

    Args:
        modality: what of the embeddings is compared.
        states: names.
        options: what the states depend on beside samples and modality.
    """

    same_width: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "stacked")
    ids: list[Tensor]

    def __init__(self, modality: str, states: Sequence[str], options: Sequence[str] = (), **kwargs: Any) -> None:
        check_option(type(self).__name__, "modality", modality, self.modalities)
        super().__init__((*states, "ids"), (modality, *options), **kwargs)
        self.modality, self._states = modality, tuple(states)

    @property
    def _parts(self) -> int:
        """Rows of a sample."""
        return 2 if self.modality in ("stacked", "cross-modal") else 1

    def update(
        self,
        student: Embeddings,
        teacher: Embeddings,
        ids: Tensor | Sequence[int] | None = None,
        teacher_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Add one batch; raises before anything is stored.

        Args:
            student: embeddings of both modalities, or of the one that is compared.
            teacher: those of the same samples in the same order.
            ids: integer id of each sample. With ids in every update, the same sample twice (a distributed sampler pads) is an error in
                ``compute``.
            teacher_ids: of the teacher's rows; another order than that of ``ids`` is an error.
        """
        name = type(self).__name__
        one, two = (check_modality(name, value, self.modality) for value in (student, teacher))
        self._check(one, two)
        known = check_same_ids(name, ids, teacher_ids, len(one) // self._parts)
        if any(getattr(self, state) for state in self._states) and bool(self.ids) != (known is not None):
            raise ValueError(f"{name}: expected ids in every update or in none, got a mixture. Pass ids each time.")
        self._add(one.detach(), two.detach())
        if known is not None:
            self.ids.append(known.to(one.device).view(torch.float64))  # their bits, as every state

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        """Of one batch alone."""
        labels = ("student", "teacher")
        check_same_samples(type(self).__name__, labels, (student, teacher), minimum=1, same_width=self.same_width)

    @abstractmethod
    def _add(self, student: Tensor, teacher: Tensor) -> None:
        """Store rows; raises before, if their widths are not those of the rows before."""

    def _check_ids(self) -> None:
        if not len(self.ids):
            return
        ids = self._joined("ids", 1).view(torch.int64)
        if torch.unique(ids).numel() != ids.numel():
            raise ValueError(
                f"{type(self).__name__}: expected every sample once, got repeated ids. Switch off the sampler's padding or drop repeats."
            )


class MomentsMetric(PairedMetric):
    """A paired metric that is a function of :class:`~geomreg.metrics.moments.Moments`: O(D^2) numbers of state, whatever comes.

    Args:
        modality: what of the embeddings is compared.
        states: names of further ones.
    """

    moments: list[Tensor]

    def __init__(self, modality: str, states: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(modality, ("moments", *states), **kwargs)

    @abstractmethod
    def _moments(self, student: Tensor, teacher: Tensor) -> Moments:
        """Of one batch."""

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        self.moments = [self._collected(self._moments(student, teacher)).record()]

    def _merge(self) -> None:
        if self.moments:
            self.moments = [self._collected().record()]

    def _collected(self, *more: Moments, minimum: int = 1) -> Moments:
        """Of all batches, of this or of all processes."""
        state = [*self.moments, *(one.record() for one in more)] if isinstance(self.moments, list) else self.moments
        return collected(type(self).__name__, state, minimum)


def _moved_alone(before: Any, after: Any) -> Any:
    """Numbers as they were, on the device where they are now."""
    if isinstance(before, list):
        return [_moved_alone(one, two) for one, two in zip(before, after, strict=True)]
    return after if not isinstance(before, Tensor) or before.dtype == after.dtype else before.to(after.device)


def _packed(rows: Tensor) -> Tensor:
    """``(N, D)`` rows as one flat fp64 record, which begins with N and D; records stand one behind the other."""
    return torch.cat([rows.new_tensor(rows.shape, dtype=torch.float64), rows.detach().double().flatten()])


def _unpacked(records: Tensor) -> Iterator[Tensor]:
    while records.numel():
        count, width = int(records[0]), int(records[1])
        yield records[2 : 2 + count * width].reshape(count, width)
        records = records[2 + count * width :]

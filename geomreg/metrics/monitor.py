"""A watch on drift during training, for any loop: what was forgotten on a small probe, and how far the geometry moved."""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomreg.checks import (
    check_bank,
    check_callable,
    check_class_numbers,
    check_count,
    check_finite,
    check_labels,
    check_matrix,
    check_number,
    check_pair,
    check_positive,
    check_student,
    check_teacher,
    check_weight,
    describe,
)
from geomreg.gradients import GradientNorms
from geomreg.metrics.distortion import distortion_bound
from geomreg.metrics.drift import drift
from geomreg.precision import common_precision, full_precision
from geomreg.types import Embeddings

__all__ = ["Alarm", "DriftMonitor"]

FEWEST = 3  # samples for distances that can be compared


class Alarm(NamedTuple):
    """A limit that was passed.

    Attributes:
        name: of the number in the report.
        value: of it; NaN where it is not defined, as for collapsed embeddings.
        limit: that it passed.
        report: all numbers.
    """

    name: str
    value: float
    limit: float
    report: dict[str, float]

    def __str__(self) -> str:
        return f"{self.name} is {self.value:.4g}, beyond the limit {self.limit:.4g}"


class DriftMonitor:
    """Measures now and then how far a student has moved from its teacher, and raises an alarm at limits of yours.

    Cheap: :meth:`update` keeps references to the newest embeddings, which a regularized step has anyway; :meth:`compute`, every 400 steps
    by default, runs the probe and compares some hundred samples.

    Args:
        probe: ``probe() -> (image (N, D), classes (C, D))``, embeddings by the student as it is now of N labelled images and of C classes,
            in evaluation mode; run without gradient. Its first result, now, is the start that later ones are compared with: construct the
            monitor before training. None: no probe.
        labels: ``(N,)`` classes of the probe's images, rows of its class embeddings.
        every: steps between measurements, for :meth:`due`.
        max_samples: of :meth:`update`, the newest; time grows with its square.
        max_zero_shot_drop: limit on the fall of the probe's zero-shot accuracy since the start, in points.
        min_rsa: limit on every RSA (Pearson, Euclidean).
        max_mean_shift: limit on the norm of every mean difference vector.
        on_alarm: called with an :class:`Alarm` for each limit passed; if it returns true, ``stopped`` becomes true. None: a warning.
            An exception that it raises comes out of :meth:`compute`, when all that was collected is used up.

    Attributes:
        stopped: an alarm's callback asked for it.
        norms: :class:`~geomreg.gradients.GradientNorms`; what passes through ``norms.watch`` adds ``gradient_ratio`` to the report.

    Raises:
        TypeError, ValueError: a probe without labels, with others than it has images or classes, that returns something else, embeddings of
            two widths or, at the start, NaN or infinity; bad limits.

    Example:
        >>> import torch
        >>> from geomreg import Embeddings
        >>> teacher = torch.nn.functional.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=1)
        >>> monitor = DriftMonitor(max_mean_shift=0.5, on_alarm=lambda alarm: True)
        >>> monitor.update(Embeddings(image=teacher + 1), Embeddings(image=teacher))
        >>> report = monitor.compute()
        >>> round(report["image/rsa"], 6), round(report["image/mean_shift"], 3), monitor.stopped  # a shift changes no distance
        (1.0, 2.828, True)
    """

    def __init__(
        self,
        *,
        probe: Callable[[], tuple[Tensor, Tensor]] | None = None,
        labels: Tensor | None = None,
        every: int = 400,
        max_samples: int = 512,
        max_zero_shot_drop: float | None = None,
        min_rsa: float | None = None,
        max_mean_shift: float | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
    ) -> None:
        name = "DriftMonitor"
        check_count(name, "every", every, 1)
        check_count(name, "max_samples", max_samples, FEWEST)
        if max_zero_shot_drop is not None:
            check_weight(name, "max_zero_shot_drop", max_zero_shot_drop)
        if max_mean_shift is not None:
            check_positive(name, "max_mean_shift", max_mean_shift)
        if min_rsa is not None:
            check_number(name, "min_rsa", min_rsa)
            if not -1 <= min_rsa <= 1:
                raise ValueError(f"{name}: expected min_rsa between -1 and 1, got {min_rsa!r}. Pass 0.9, say.")
        if on_alarm is not None:
            check_callable(name, "on_alarm", on_alarm, "of an Alarm")
        if probe is not None:
            check_callable(name, "probe", probe, "that returns (image, classes)")
        if (probe is None) != (labels is None):
            raise ValueError(f"{name}: expected probe and labels together, got one without the other. Pass both or none.")
        if max_zero_shot_drop is not None and probe is None:
            raise ValueError(f"{name}: expected a probe for max_zero_shot_drop, got none. Pass probe and labels.")
        self.probe, self.labels, self.every, self.max_samples = probe, labels, every, max_samples
        self.limits = {"zero_shot_drop": max_zero_shot_drop, "rsa": min_rsa, "mean_shift": max_mean_shift}
        self.on_alarm, self.stopped, self.norms = on_alarm, False, GradientNorms()
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {"image": [], "text": []}
        self._start: tuple[Tensor, Tensor] | None = None
        if (found := self._probed()) is not None:
            self._begin(*found)

    def due(self, step: int) -> bool:
        """Whether :meth:`compute` should be called after this step, counted from 1."""
        return step % self.every == 0

    def update(self, student: Embeddings, teacher: Embeddings) -> None:
        """Add a batch, as a regularizer sees it: row i of both belongs to one sample. Modalities that one of them lacks are left out.

        Raises:
            TypeError, ValueError: not Embeddings of the same samples, or of another width than before; nothing is stored then.
        """
        name = "DriftMonitor"
        check_student(name, student)
        check_teacher(name, teacher)
        batch: dict[str, tuple[Tensor, Tensor]] = {}
        for field, seen, known in zip(Embeddings._fields, student, teacher, strict=True):
            if seen is None or known is None:
                continue
            one, two = (
                check_matrix(name, f"{field} {label}", value, real=False).detach()
                for label, value in (("student", seen), ("teacher", known))
            )
            for kept, _ in self._rows[field][-1:]:
                if (kept.shape[1], kept.device) != (one.shape[1], one.device):
                    raise ValueError(
                        f"{name}: expected {field} embeddings of width {kept.shape[1]} on {kept.device} as before, got {describe(one)} on "
                        f"{one.device}. Call compute() between models."
                    )
            check_pair(name, one, two, field)
            batch[field] = one, two
        if not batch:
            raise ValueError(f"{name}: expected image or text embeddings from both models, got none of one kind. Embed the same with both.")
        for field, pair in batch.items():
            self._rows[field].append(pair)
            while sum(len(kept) for kept, _ in self._rows[field][1:]) >= self.max_samples:
                self._rows[field].pop(0)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The report on what was collected since the last call, and on the probe; raises the alarms.

        Returns:
            dict: for ``image`` and ``text`` of :meth:`update`, ``stacked`` of both, and ``probe``, its images: ``<which>/rsa``,
            ``/rsa_bound`` (lower bound that the difference vectors prove, -1 where it says nothing; see
            :func:`~geomreg.metrics.distortion_bound`), ``/mean_shift`` and ``/dispersion`` (:func:`~geomreg.metrics.drift`); with a
            probe ``probe/zero_shot`` and ``probe/zero_shot_start`` in per cent, ``probe/zero_shot_drop`` in points; ``gradient_ratio``
            if the losses pass through ``norms``. NaN where a number is not defined (collapsed embeddings, NaN in them), which counts as
            beyond every limit. Fewer than 3 samples of a kind: nothing is said of it.
        """
        report: dict[str, float] = {}
        pairs = {field: self._newest(rows) for field, rows in self._rows.items() if rows}
        if len(pairs) == 2 and pairs["image"][0].shape == pairs["text"][0].shape:
            pairs["stacked"] = tuple(torch.cat(both) for both in zip(*pairs.values(), strict=True))  # type: ignore[assignment]
        if self._start is not None and (found := self._probed()) is not None:
            pairs["probe"] = (found[0], self._start[0].to(found[0].device))
            start, now = (self._right(*one) for one in (self._start, found))
            counts = {"probe/zero_shot": now, "probe/zero_shot_start": start, "probe/zero_shot_drop": start - now}
            report |= {key: 100 * count / len(found[0]) for key, count in counts.items()}  # the limit itself is not beyond it
        for name, (student, teacher) in pairs.items():
            if len(student) >= FEWEST:
                report |= {f"{name}/{key}": value for key, value in _geometry(student, teacher).items()}
        if not math.isnan(ratio := self.norms.ratio()):
            report["gradient_ratio"] = ratio
        self.norms.reset()
        self._rows = {"image": [], "text": []}
        self._raise_alarms(report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """The probe's embeddings at the start, what was collected since the last :meth:`compute`, and whether an alarm has stopped the
        run: one that goes on from it gives the same reports."""
        rows = {field: [list(pair) for pair in pairs] for field, pairs in self._rows.items()}
        return {**self._probe_state(), "rows": rows, "squares": dict(self.norms.squares), "stopped": self.stopped}

    def _probe_state(self) -> dict[str, Any]:
        return {} if self._start is None else {"image": self._start[0], "classes": self._start[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the start of an earlier run, and go on with what it had collected; a state without that, of an earlier geomreg,
        is taken too."""
        collected = ("rows", "squares", "stopped")
        state, more = ({key: value for key, value in state.items() if (key in collected) == part} for part in (False, True))
        if state.keys() != (known := self._probe_state()).keys():
            raise ValueError(
                f"DriftMonitor: expected the state of a monitor with the same probe, with entries {list(known)}, got {list(state)}. "
                "Construct it alike."
            )
        if self._start is not None:
            for label, value in (("probe image", state["image"]), ("probe class", state["classes"])):
                check_matrix("DriftMonitor", label, value, real=False)
            self._check_like_start(state["image"], state["classes"])
            self._begin(state["image"].to(self._start[0].device), state["classes"].to(self._start[1].device))
        rows = more.get("rows", {})
        self._rows = {field: [(student, teacher) for student, teacher in rows.get(field, ())] for field in self._rows}
        self.norms.reset()
        self.norms.squares.update(more.get("squares", {}))
        self.stopped = bool(more.get("stopped", False))

    def _newest(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        student, teacher = (torch.cat(side)[-self.max_samples :] for side in zip(*rows, strict=True))
        return student, teacher

    @torch.no_grad()
    def _probed(self) -> tuple[Tensor, Tensor] | None:
        if self.probe is None:
            return None
        name, found = "DriftMonitor", self.probe()
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            got = f"{len(found)} values" if isinstance(found, (tuple, list)) else describe(found)
            raise TypeError(f"{name}: expected (image (N, D), classes (C, D)) from probe, got {got}. Return two tensors.")
        image, classes = (
            check_matrix(name, label, value, real=False) for label, value in zip(("probe image", "probe class"), found, strict=True)
        )
        check_bank(name, "probe class", classes, image)
        check_labels(name, self.labels, len(image))  # there are some: see the constructor
        check_class_numbers(name, self.labels, len(classes))
        self._check_like_start(image, classes)
        return image.detach(), classes.detach()

    def _begin(self, image: Tensor, classes: Tensor) -> None:
        """Compare with these from now on."""
        for label, value in (("image", image), ("class", classes)):
            check_finite("DriftMonitor", f"probe {label} embeddings at the start", value)
        self._start = image, classes

    def _check_like_start(self, image: Tensor, classes: Tensor) -> None:
        if self._start is not None and (image.shape, classes.shape) != (self._start[0].shape, self._start[1].shape):
            before, now = (f"{tuple(one.shape)} and {tuple(two.shape)}" for one, two in (self._start, (image, classes)))
            raise ValueError(
                f"DriftMonitor: expected probe image and class embeddings of shapes {before} as at the start, got {now}. "
                "Embed the same images and classes."
            )

    def _right(self, image: Tensor, classes: Tensor) -> float:
        """Number of images whose nearest class is theirs; NaN if an embedding has NaN or infinity, which reaches its scores."""
        with full_precision(image):
            image, classes = common_precision(image, classes)
            scores = image @ classes.T
        if not bool(scores.isfinite().all()):
            return math.nan
        return float((scores.argmax(dim=1).cpu() == torch.as_tensor(self.labels, device="cpu")).sum())

    def _raise_alarms(self, report: dict[str, float]) -> None:
        for name, value in report.items():
            kind = name.rpartition("/")[2]
            limit = self.limits.get(kind)
            if limit is None or (value >= limit if kind == "rsa" else value <= limit):
                continue
            alarm = Alarm(name, value, limit, report)
            if self.on_alarm is None:
                warnings.warn(f"DriftMonitor: {alarm}.", stacklevel=3)
            elif self.on_alarm(alarm):
                self.stopped = True


def _geometry(student: Tensor, teacher: Tensor) -> dict[str, float]:
    found = dict.fromkeys(("rsa", "rsa_bound", "mean_shift", "dispersion"), math.nan)
    with suppress(ValueError):  # NaN in the embeddings
        moved = drift(student, teacher)
        found |= {"mean_shift": float(moved.mean_shift), "dispersion": float(moved.dispersion)}
    with suppress(ValueError):  # or equal distances alone: they have no correlation
        bound = distortion_bound(student, teacher)
        found |= {"rsa": float(bound.rsa), "rsa_bound": float(bound.aligned_rsa_bound)}
    return found

"""The one training loop: a target loss, and optionally regularizers on target and reference data, on accelerate."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from geomreg.checks import check_count
from geomreg.compose import WeightedSum
from geomreg.gradients import GradientNorms
from geomreg.integrations.open_clip import embed, unwrap
from geomreg.integrations.recipes import checkpoint, head
from geomreg.integrations.recipes.losses import Contrastive, TargetLoss
from geomreg.integrations.recipes.passes import ON_PARAMETERS, Batch, Passes
from geomreg.integrations.recipes.shard import Sharded, check_launch, like
from geomreg.integrations.recipes.waiting import alone
from geomreg.precision import at_least_fp32
from geomreg.same_weights import uncompared
from geomreg.statistics import moving_statistics, recompute_statistics
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["OF_STATISTICS", "Batch", "Batches", "Checkpoints", "NotFiniteError", "RunStoppedError", "Settings", "encode", "finetune"]

Batches = Callable[[int], Iterator[Batch]]  # endless batches from the one with this number on
Banks = Callable[[int], Iterator[Tensor]]  # (M, D) constant text embeddings for each step from the one with this number on
RECORDED = ("step", "loss", "regularizer", "logit_scale", "learning_rate", "gradient_ratio", "stop", "task_square", "regularizer_square")
"""Names in the records of a step that no term may have."""
OF_STATISTICS = 100
"""Batches that running statistics of batch normalisations are collected from."""
_OUTSIDE = ("logit_scale", "logit_bias", f"{head.NAME}.")  # parameters that losses use outside of the model's forward


@dataclass(frozen=True)
class Settings:
    """Optimisation of FLYP (arXiv 2212.00638): AdamW, linear warm-up, cosine to zero, every parameter in one group.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak of the schedule.
        weight_decay: on every parameter, as FLYP's code has it.
        warmup_steps: linear warm-up; FLYP's 500 belong to runs of tens of thousands of steps.
        betas: of AdamW.
        clip_norm: largest gradient norm; None (FLYP) for no clipping.
        chunk_size: samples whose activations are held at a time; None for whole batches. The gradient is the same; what is not a mean
            over samples (the contrastive loss) is encoded once more.
        unique_texts: encode each different caption of a target batch once. The same gradient (but for dropout in the text tower), for
            less work where captions repeat.
        regularize_every: the regularizer on every so many steps, with so many times its weight. Keeps the mean of its gradient only:
            the spikes inflate Adam's second moment, and a running mean moves as seldom (take its decay to this power). A smaller reference
            batch at every step saves as much and is the better way.
        average_every: end with the mean of the weights at the start and after each so many steps (ZSCL: 100); None: with the last.
            Running statistics of batch normalisations are those of the mean over the first hundred target batches.
    """

    steps: int
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 500
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    chunk_size: int | None = None
    unique_texts: bool = False
    regularize_every: int = 1
    average_every: int | None = None

    def __post_init__(self) -> None:
        for option in ("chunk_size", "average_every"):
            if getattr(self, option) is not None:
                check_count("Settings", option, getattr(self, option), 1)
        check_count("Settings", "regularize_every", self.regularize_every, 1)
        if self.average_every is not None and self.average_every > self.steps:
            raise ValueError(
                f"Settings: expected average_every of at most {self.steps} steps, got {self.average_every}: the mean would be the start. "
                "Lower it."
            )

    def rate(self, step: int) -> float:
        """Factor on the learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)))


@dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, and goes on from.

    Attributes:
        folder: of the run.
        every: optimizer steps between checkpoints; the last step is always saved.
        keep: the newest so many stay; None for all.
    """

    folder: Path
    every: int
    keep: int | None = 1

    def __post_init__(self) -> None:
        check_count("Checkpoints", "every", self.every, 1)
        if self.keep is not None:
            check_count("Checkpoints", "keep", self.keep, 1)


class RunStoppedError(RuntimeError):
    """The run was asked to stop; it was saved if it has checkpoints.

    Attributes:
        step: after which it stopped.
    """

    status = 143  # of the command: SIGTERM asks

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class NotFiniteError(RuntimeError):
    """The loss is NaN or infinite; what was saved before is as it was."""


def encode(model: nn.Module, batch: Batch) -> Embeddings:
    """Unit embeddings of a batch of images, texts or pairs; the same function for student and teacher."""
    return embed(model, batch.get("image"), batch.get("text"))


def finetune(
    model: nn.Module,
    target: Batches,
    settings: Settings,
    *,
    regularizer: WeightedSum | None = None,
    reference: Batches | None = None,
    teacher: Teacher | None = None,
    target_regularizer: WeightedSum | None = None,
    loss: TargetLoss | None = None,
    texts: Banks | None = None,
    accelerator: Accelerator | None = None,
    sharded: Sharded | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_reference: Callable[[Embeddings, Embeddings], None] | None = None,
    after_update: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    until: int | Callable[[int], int | None] | None = None,
    also: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fine-tune an open_clip model in place; returns it, unwrapped, in evaluation mode.

    Each step runs the target loss on a target batch and, given a regularizer, its value on a reference batch; the two
    backward passes follow one another (:func:`geomreg.backward`), so the activations of the two batches never coexist.

    Args:
        model: open_clip model, trained in place.
        target: ``target(k)`` gives endless batches from number k on: image-text pairs, or what ``loss`` takes.
        settings: optimisation.
        regularizer: terms on the reference batch; needs ``reference``, and ``teacher`` if some term does.
        reference: likewise of generic pairs, or of images or texts alone where the terms need no more.
        teacher: the frozen model; sees the reference batches, and the target batches if there are terms on them that need it.
        target_regularizer: terms on the target batch, beside its loss; needs a teacher that is not cached if one of them does.
        loss: on the target batch; by default :class:`~geomreg.integrations.recipes.losses.Contrastive`.
        texts: banks for the terms that take ``texts=``.
        accelerator: by default a new one: device, precision and processes as launched.
        sharded: of ``model``, ``accelerator`` and the regularizers: train with FSDP2 instead of DDP. The model then has the trained weights
            at the end; before, after :meth:`~geomreg.integrations.recipes.shard.Sharded.gather`.
        checkpoints: save everything that the run needs, and go on from the newest checkpoint if there is one: on a CPU the losses and
            weights are then bitwise those of a run that was never interrupted.
        on_step: called after each step with ``step``; ``loss`` of the target with its terms; ``regularizer``, the weighted sum on the
            reference; for each term its value under its name, times its weight as ``<term>/weighted``, and the norm of its running mean,
            if it has one, as ``<term>/mean_norm``; ``gradient_ratio``, the norm of the terms' gradient with respect to the embeddings
            of the samples by that of the target loss (as :class:`~geomreg.schedules.BalancedWeight` measures it), unless all terms are
            on weights; ``logit_scale``; and ``learning_rate``. Losses and terms are means over the processes.
        on_reference: called with the student's and the teacher's embeddings of the reference samples of this process, those of a chunk
            at a time.
        after_update: called right after each optimizer step that was not skipped: to keep a parameter in bounds, say.
        until: end after so many steps, with the schedule of the whole run; a function is given the number of steps that are done already.
        also: other things that have a state, by name, with ``state_dict`` and ``load_state_dict``: saved and read by each process with
            its checkpoints, so that a run that goes on finds them as they were.
        should_stop: asked after each step; if true in some process, the run is saved and :class:`RunStoppedError` raised.

    Raises:
        ValueError: some of ``regularizer``, ``reference`` and ``teacher`` without the others; gradient accumulation, which
            would change the contrastive loss; a checkpoint of other settings.
        RunStoppedError: ``should_stop`` said so.
        NotFiniteError: the loss is not finite on some process; the model is left as it was before that step.
        RuntimeError: no checkpoint is whole.
    """
    _check_together(regularizer, target_regularizer, reference, teacher)
    accelerator = accelerator or Accelerator()
    _check_accelerator(accelerator)
    run = _Training(
        model, settings, accelerator, sharded, loss, regularizer=regularizer, target_regularizer=target_regularizer, teacher=teacher
    )  # fmt: skip
    saved = None if checkpoints is None else checkpoint.latest(checkpoints.folder)
    also = also or {}
    start = 0 if saved is None else run.resume(saved, also)
    end = until(start) if callable(until) else until
    last_step = settings.steps if end is None else min(end, settings.steps)
    target_batches = target(start)
    reference_batches = None if reference is None else reference(-(-start // settings.regularize_every))
    banks = None if texts is None else texts(start)
    for step in range(start, last_step):
        bank = None if banks is None else next(banks)
        record = run.gradients(step, target_batches, reference_batches, bank, on_reference)
        entry, stopping = run.entry(step, record, should_stop(), checkpoints)
        run.update(after_update)
        done = step + 1
        run.add_to_mean(done, target, last=done == last_step)
        if on_step is not None:
            on_step(entry)
        if checkpoints is not None and (stopping or done % checkpoints.every == 0 or done == settings.steps):
            _save(checkpoints, done, settings, accelerator, run.state(), also)
        if stopping and done < settings.steps:
            raise RunStoppedError(f"finetune: stopped after step {done} of {settings.steps}.", done)
    return run.finish()


def _check_together(
    regularizer: WeightedSum | None, target_regularizer: WeightedSum | None, reference: Batches | None, teacher: Teacher | None
) -> None:
    needed: dict[str, object] = {"regularizer": regularizer, "reference": reference}
    if regularizer is None or regularizer.needs_teacher:
        needed["teacher"] = teacher if regularizer is not None or target_regularizer is None else None  # or it is the target's
    if len({value is None for value in needed.values()}) > 1:
        lacking = ", ".join(name for name, value in needed.items() if value is None)
        raise ValueError(f"finetune: expected regularizer, reference and teacher together, got None for {lacking}. Pass all three or none.")


def _check_accelerator(accelerator: Accelerator) -> None:
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"finetune: expected gradient_accumulation_steps=1, got {accelerator.gradient_accumulation_steps}. The contrastive loss "
            "needs its whole batch at once; lower the batch size instead."
        )
    check_launch(accelerator)


class _Training:
    """What a run of :func:`finetune` changes from step to step: model, optimizer, terms, teacher; and the parts of a step."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        accelerator: Accelerator,
        sharded: Sharded | None,
        loss: TargetLoss | None,
        *,
        regularizer: WeightedSum | None,
        target_regularizer: WeightedSum | None,
        teacher: Teacher | None,
    ) -> None:
        self.settings, self.accelerator, self.sharded = settings, accelerator, sharded
        self.regularizer, self.target_regularizer, self.teacher = regularizer, target_regularizer, teacher
        trained: Any = model.parameters() if sharded is None else sharded.groups()
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
        if sharded is None:
            self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
            declared = [value for value in self.wrapped.parameters() if value.requires_grad]
        else:
            sharded.serve(teacher)
            self.wrapped, self.optimizer, declared = sharded.model, accelerator.prepare(optimizer), sharded.declared()
        self.model = unwrap(self.wrapped)
        self.loss = loss or Contrastive(self.model, accelerator)
        for part in (*self._terms(), teacher):
            if part is not None:
                part.to(accelerator.device)
                part.train()
        self.wrapped.train()
        self.mean = None if settings.average_every is None else _WeightMean(self.model)
        outside = [value for name, value in self.model.named_parameters() if value.requires_grad and name.startswith(_OUTSIDE)]
        scale: Callable[[Tensor], Tensor] = accelerator.scaler.scale if accelerator.scaler is not None else lambda loss: loss
        options = {"chunk_size": settings.chunk_size or sys.maxsize, "model": self.wrapped, "scale": scale}
        self.passes = Passes(self._encoded, self.model, declared, outside, options, GradientNorms(), bank=None)

    def _terms(self) -> Iterator[WeightedSum]:
        return (part for part in (self.regularizer, self.target_regularizer) if part is not None)

    def _encoded(self, batch: Batch) -> Embeddings:
        with self.accelerator.autocast():
            return encode(self.wrapped, batch)

    def _frozen(self, batch: Batch, regularizer: WeightedSum | None) -> Embeddings | None:
        """The teacher's embeddings, for terms that need them."""
        if self.teacher is None or regularizer is None or not regularizer.needs_teacher:
            return None
        with self.accelerator.autocast():
            return self.teacher(batch)

    def gradients(
        self,
        step: int,
        target: Iterator[Batch],
        reference: Iterator[Batch] | None,
        bank: Tensor | None,
        on_reference: Callable[[Embeddings, Embeddings], None] | None,
    ) -> dict[str, Tensor]:
        """The two backward passes; what is to be recorded of them."""
        norms = GradientNorms()
        regularized = self.regularizer is not None and step % self.settings.regularize_every == 0
        passes = dataclasses.replace(self.passes, norms=norms, bank=bank)
        self.optimizer.zero_grad()
        batch = _moved(next(target), self.accelerator.device)
        with uncompared():  # the target batch is embedded in training mode, as its loss needs it
            frozen = self._frozen(batch, self.target_regularizer)
        terms, of_target = passes.on_target(
            batch, frozen, self.loss, self.target_regularizer,
            step=step, unique_texts=self.settings.unique_texts, sync=not regularized,
        )  # fmt: skip
        self._follow(batch)
        del batch, frozen
        value = torch.zeros((), device=self.accelerator.device)
        # Last, with the target batch gone: the least memory. DDP synchronises in this pass, which therefore names what that one used.
        if regularized and self.regularizer is not None and reference is not None:
            batch = _moved(next(reference), self.accelerator.device)
            of_reference, value = passes.on_reference(
                batch, self._frozen(batch, self.regularizer), self.regularizer,
                factor=self.settings.regularize_every, see=on_reference,
            )  # fmt: skip
            terms |= of_reference
        record = {**terms, "loss": of_target, "regularizer": value, "logit_scale": self.model.logit_scale.exp()}
        return record | {f"{role}_square": norms.square(role, self.accelerator.device) for role in ("task", "regularizer")}

    def _follow(self, batch: Batch) -> None:
        """Statistics of an averaged teacher, from the target batch: images alone where only their tower has some."""
        if self.teacher is not None and (names := moving_statistics(self.model)):
            images = getattr(self.teacher, "encode", None) is encode and all(name.startswith("visual.") for name in names)
            with self.accelerator.autocast():
                self.teacher.follow({"image": batch["image"]} if images else batch, self.model)

    def entry(self, step: int, record: dict[str, Tensor], stop: bool, checkpoints: Checkpoints | None) -> tuple[dict[str, float], bool]:
        """What is known of a step before its update, over all processes; and whether one of them was asked to stop."""
        means = {f"{name}/mean_norm": mean.norm() for name, mean in self._running_means()}
        record = {**record, **means, "stop": torch.tensor(float(stop))}
        entry = {"step": step + 1, **_numbers(record, self.accelerator), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        stopping = entry.pop("stop") > 0
        of_terms, of_loss = entry.pop("regularizer_square"), entry.pop("task_square")
        if any(not isinstance(term, ON_PARAMETERS) for part in self._terms() for term in part.regularizers.values()):
            entry["gradient_ratio"] = math.sqrt(of_terms / of_loss) if of_loss > 0 else math.nan
        if not math.isfinite(entry["loss"] + entry["regularizer"]):  # on all processes, or none
            raise NotFiniteError(
                f"finetune: expected a finite loss, got {entry['loss']} + {entry['regularizer']} at step {step + 1}. "
                f"Lower the learning rate or the weight{'' if checkpoints is None else _afresh(checkpoints)}."
            )
        weights = {name: weight for part in self._terms() for name, weight in part.weights.items() if name in entry}
        entry |= {f"{name}/weighted": weight * entry[name] for name, weight in weights.items()}
        return entry, stopping

    def _running_means(self) -> Iterator[tuple[str, Tensor]]:
        for part in self._terms():
            for name, term in part.regularizers.items():
                if isinstance(mean := getattr(term, "mean", None), Tensor):
                    yield name, mean

    def update(self, after_update: Callable[[], None]) -> None:
        """The optimizer's step, and those of all that moves with it."""
        if self.sharded is not None:
            self.sharded.finish_gradients(self.settings.clip_norm)
        elif self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        if self.sharded is not None:
            self.sharded.after_step()
        if self.accelerator.optimizer_step_was_skipped:
            for part in self._terms():
                part.discard()
            return
        after_update()
        self.schedule.step()
        for part in (*self._terms(), self.teacher):
            if part is not None:
                part.step()

    def add_to_mean(self, done: int, target: Batches, *, last: bool) -> None:
        """After a step; the mean of the weights takes their place after the last, with running statistics of its own."""
        if self.mean is None or self.settings.average_every is None:
            return
        if done % self.settings.average_every == 0:
            self.mean.add()
        if last:  # before it is looked at
            self.mean.put()
            if names := moving_statistics(self.model):
                batches = (_moved(batch, self.accelerator.device) for batch in itertools.islice(target(0), min(done, OF_STATISTICS)))
                recompute_statistics(self.model, batches, self._forward, names=names)

    def _forward(self, model: nn.Module, batch: Batch) -> Embeddings:
        with self.accelerator.autocast():
            return encode(model, batch)

    def _stateful(self) -> dict[str, Any]:
        """What else has a state to be saved, under its name; None where the run has none."""
        parts = {"schedule": self.schedule, "scaler": self.accelerator.scaler, "teacher": self.teacher, "average": self.mean}
        return {**parts, "regularizer": self.regularizer, "target_regularizer": self.target_regularizer}

    def state(self) -> dict[str, Any]:
        """Everything that the run needs beside the random numbers of each process."""
        found = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        found |= {name: {} if part is None else part.state_dict() for name, part in self._stateful().items()}
        return found if self.sharded is None else self.sharded.gathered(found)

    def resume(self, saved: Path, also: Mapping[str, Any]) -> int:
        """Go on from a checkpoint, if it is one of this run: returns how many steps it has behind it."""
        start = _go_on(saved, self.settings, self.accelerator, also)
        of_model, of_optimizer = (checkpoint.read(saved, name) for name in ("model", "optimizer"))
        if self.sharded is not None:
            of_model, of_optimizer = self.sharded.scattered(of_model, of_optimizer)
        self.model.load_state_dict(of_model)
        self.optimizer.load_state_dict(of_optimizer)
        for name, part in self._stateful().items():
            if part is not None:
                part.load_state_dict(checkpoint.read(saved, name))
        return start

    def finish(self) -> nn.Module:
        """The model, unwrapped, in evaluation mode."""
        if self.mean is not None:
            self.mean.put()  # again where no step was left to do
        whole = self.sharded is None
        model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False) if whole else self.sharded.finish()
        self.optimizer.zero_grad()
        self.accelerator.free_memory()  # accelerate keeps every model and optimizer it prepared
        return model.eval()


def _save(
    checkpoints: Checkpoints, step: int, settings: Settings, accelerator: Accelerator, state: dict[str, Any], also: Mapping[str, Any]
) -> None:
    partial = checkpoint.begin(checkpoints.folder, step)
    checkpoint.write(
        partial,
        f"process-{accelerator.process_index}",
        {"random": checkpoint.random_state(), "also": {name: part.state_dict() for name, part in also.items()}},
    )
    with alone(accelerator) as main:
        if main:
            for name, value in state.items():
                checkpoint.write(partial, name, value)
            checkpoint.write(partial, "run", {"step": step, "settings": asdict(settings), "processes": accelerator.num_processes})
    accelerator.wait_for_everyone()  # all have written theirs
    with alone(accelerator) as main:
        if main:
            checkpoint.publish(partial, keep=checkpoints.keep)


def _afresh(checkpoints: Checkpoints) -> str:
    """What can be done with the folder of a run that has a loss that is not finite."""
    folder, saved = checkpoints.folder.parent, checkpoint.latest(checkpoints.folder)
    begin = f", which is another run: give it another output folder, or delete {folder} to begin again there"
    return begin if saved is None else f"{begin}; {saved} is the run as it was at its last checkpoint"


def _go_on(saved: Path, settings: Settings, accelerator: Accelerator, also: Mapping[str, Any]) -> int:
    """The number of steps that a checkpoint has behind it, if it is one of this run; random numbers go on from there."""
    run = checkpoint.read(saved, "run")
    now = {**asdict(settings), "betas": list(settings.betas), "processes": accelerator.num_processes}
    before = {**run["settings"], "processes": run["processes"]}
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"finetune: expected the run in {saved.parent} to go on with {name} {before.get(name)!r}, got {value!r}. Use the same "
                "settings, or another folder."
            )
    own = checkpoint.read(saved, f"process-{accelerator.process_index}")
    if own["also"].keys() != also.keys():
        raise ValueError(
            f"finetune: expected the run in {saved.parent} to go on with the states of {', '.join(own['also']) or 'nothing'}, got "
            f"{', '.join(also) or 'nothing'}. Use the same command, or another folder."
        )
    for name, part in also.items():
        part.load_state_dict(own["also"][name])
    checkpoint.set_random_state(own["random"])
    return int(run["step"])


def _numbers(record: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Means over the processes, on the host."""
    values = torch.stack([value.detach().reshape(()).to(accelerator.device, torch.float64) for value in record.values()])
    return dict(zip(record, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


class _WeightMean:
    """Mean of the weights at the start and each time that :meth:`add` is called, in fp32 or wider."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 1
        self.sums = {name: at_least_fp32(value.detach()).clone() for name, value in self._live()}

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)

    @torch.no_grad()
    def add(self) -> None:
        self.count += 1
        for name, value in self._live():
            self.sums[name] += value.to(self.sums[name].dtype)

    @torch.no_grad()
    def put(self) -> None:
        """The mean in the place of the model's weights."""
        for name, value in self._live():
            value.copy_(self.sums[name] / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.sums = {name: like(value, self.sums[name]) for name, value in state["sums"].items()}


def _moved(batch: Batch, device: Any) -> Batch:
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}

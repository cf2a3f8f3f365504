"""The one training loop: a target loss, and optionally regularizers on target and reference data, on accelerate."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
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
from geomreg.integrations.recipes.shard import Sharded, check_launch, like
from geomreg.precision import at_least_fp32
from geomreg.regularizers import ProjectionOrthogonality, WeightAnchor
from geomreg.step import backward
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["Batch", "Batches", "Checkpoints", "RunStoppedError", "Settings", "encode", "finetune"]

Batch = dict[str, Any]  # "image" (B, 3, H, W), "text" token ids (B, L), or one of them; "label" (B,); for a cached teacher "id", B of them
Batches = Callable[[int], Iterator[Batch]]  # endless batches from the one with this number on
Banks = Callable[[int], Iterator[Tensor]]  # (M, D) constant text embeddings for each step from the one with this number on


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
    """The run was asked to stop; it was saved if it has checkpoints."""

    status = 143  # of the command: SIGTERM asks


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
    until: int | None = None,
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
            of the samples by that of the target loss (as :class:`~geomreg.schedules.BalancedWeight` measures it); ``logit_scale``; and
            ``learning_rate``. Losses and terms are means over the processes.
        on_reference: called with the student's and the teacher's embeddings of the reference samples of this process, those of a chunk
            at a time.
        after_update: called right after each optimizer step that was not skipped: to keep a parameter in bounds, say.
        until: end after so many steps, with the schedule of the whole run.
        should_stop: asked after each step; if true in some process, the run is saved and :class:`RunStoppedError` raised.

    Raises:
        ValueError: some of ``regularizer``, ``reference`` and ``teacher`` without the others; gradient accumulation, which
            would change the contrastive loss; a checkpoint of other settings.
        RunStoppedError: ``should_stop`` said so.
        RuntimeError: the loss is not finite on some process; the model is left as it was before that step.
    """
    needed = {"regularizer": regularizer, "reference": reference}
    if regularizer is None or regularizer.needs_teacher:
        needed["teacher"] = teacher if regularizer is not None or target_regularizer is None else None  # or it is the target's
    if len({value is None for value in needed.values()}) > 1:
        lacking = ", ".join(name for name, value in needed.items() if value is None)
        raise ValueError(f"finetune: expected regularizer, reference and teacher together, got None for {lacking}. Pass all three or none.")
    accelerator = accelerator or Accelerator()
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"finetune: expected gradient_accumulation_steps=1, got {accelerator.gradient_accumulation_steps}. The contrastive loss "
            "needs its whole batch at once; lower the batch size instead."
        )
    check_launch(accelerator)
    trained: Any = model.parameters() if sharded is None else sharded.groups()
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    if sharded is None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        declared = [value for value in wrapped.parameters() if value.requires_grad]
    else:
        sharded.serve(teacher)
        wrapped, optimizer, declared = sharded.model, accelerator.prepare(optimizer), sharded.declared()
    loss = loss or Contrastive(unwrap(wrapped), accelerator)
    for part in (regularizer, target_regularizer, teacher):
        if part is not None:
            part.to(accelerator.device)
            part.train()
    wrapped.train()
    scale: Callable[[Tensor], Tensor] = accelerator.scaler.scale if accelerator.scaler is not None else lambda loss: loss
    options: dict[str, Any] = {
        "chunk_size": settings.chunk_size or sys.maxsize,
        "model": wrapped,
        "parameters": [value for name, value in unwrap(wrapped).named_parameters() if value.requires_grad and name.startswith(_OUTSIDE)],
        "scale": scale,
    }
    average = None if settings.average_every is None else _WeightMean(unwrap(wrapped))

    def encoded(batch: Batch) -> Embeddings:
        with accelerator.autocast():
            return encode(wrapped, batch)

    def state() -> dict[str, Any]:
        found = {
            "model": unwrap(wrapped).state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": {} if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "regularizer": {} if regularizer is None else regularizer.state_dict(),
            "target_regularizer": {} if target_regularizer is None else target_regularizer.state_dict(),
            "teacher": {} if teacher is None else teacher.state_dict(),
            "average": {} if average is None else average.state_dict(),
        }
        return found if sharded is None else sharded.gathered(found)

    start = 0
    if checkpoints is not None and (saved := checkpoint.latest(checkpoints.folder)) is not None:
        start = _go_on(saved, settings, accelerator)
        of_model, of_optimizer = (checkpoint.read(saved, name) for name in ("model", "optimizer"))
        if sharded is not None:
            of_model, of_optimizer = sharded.scattered(of_model, of_optimizer)
        unwrap(wrapped).load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        for name, part in (("schedule", schedule), ("scaler", accelerator.scaler)):
            if part is not None:
                part.load_state_dict(checkpoint.read(saved, name))
        parts = {"regularizer": regularizer, "target_regularizer": target_regularizer, "teacher": teacher, "average": average}
        for name, stateful in parts.items():
            if stateful is not None:
                stateful.load_state_dict(checkpoint.read(saved, name))
    target_batches = target(start)
    reference_batches = None if reference is None else reference(-(-start // settings.regularize_every))
    banks = None if texts is None else texts(start)
    last_step = settings.steps if until is None else min(until, settings.steps)
    for step in range(start, last_step):
        optimizer.zero_grad()
        value = torch.zeros((), device=accelerator.device)
        regularized = regularizer is not None and step % settings.regularize_every == 0
        bank = None if banks is None else next(banks)
        norms = GradientNorms()
        batch = _moved(next(target_batches), accelerator.device)
        frozen = None
        if teacher is not None and target_regularizer is not None and target_regularizer.needs_teacher:
            with accelerator.autocast():
                frozen = teacher(batch)
        passes = _Pass(encoded, norms, bank, options, declared)
        first = dataclasses.replace(passes, options={**options, "sync": not regularized})
        terms, of_target = _targeted(first, batch, frozen, loss, target_regularizer, step=step, unique_texts=settings.unique_texts)
        del batch, frozen
        # Last, with the target batch gone: the least memory. DDP synchronises in this pass, which therefore names what that one used.
        if regularized and regularizer is not None and reference_batches is not None:
            batch, frozen = _moved(next(reference_batches), accelerator.device), None
            if teacher is not None and regularizer.needs_teacher:
                with accelerator.autocast():
                    frozen = teacher(batch)
            of_reference, value = _regularized(
                passes, batch, frozen, regularizer, factor=settings.regularize_every, on_reference=on_reference
            )
            terms |= of_reference
            del batch, frozen
        record = {**terms, "loss": of_target, "regularizer": value, "logit_scale": unwrap(wrapped).logit_scale.exp()}
        record |= {f"{role}_square": norms.square(role, accelerator.device) for role in ("task", "regularizer")}
        record |= {f"{name}/mean_norm": mean.norm() for name, mean in _running_means(regularizer, target_regularizer)}
        record["stop"] = torch.tensor(float(should_stop()))
        entry = {"step": step + 1, **_numbers(record, accelerator), "learning_rate": optimizer.param_groups[0]["lr"]}
        stopping = entry.pop("stop") > 0
        of_terms, of_loss = entry.pop("regularizer_square"), entry.pop("task_square")
        if regularizer is not None or target_regularizer is not None:
            entry["gradient_ratio"] = math.sqrt(of_terms / of_loss) if of_loss > 0 else math.nan
        if not math.isfinite(entry["loss"] + entry["regularizer"]):  # on all processes, or none
            raise RuntimeError(
                f"finetune: expected a finite loss, got {entry['loss']} + {entry['regularizer']} at step {step + 1}. "
                "Lower the learning rate or the weight."
            )
        for part in (regularizer, target_regularizer):
            for name, weight in (part.weights if part is not None else {}).items():
                if name in entry:
                    entry[f"{name}/weighted"] = weight * entry[name]
        if sharded is not None:
            sharded.finish_gradients(settings.clip_norm)
        elif settings.clip_norm is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_norm)
        optimizer.step()
        if sharded is not None:
            sharded.after_step()
        if not accelerator.optimizer_step_was_skipped:
            after_update()
            schedule.step()
            for part in (regularizer, target_regularizer, teacher):
                if part is not None:
                    part.step()
        else:
            for part in (regularizer, target_regularizer):
                if part is not None:
                    part.discard()
        done = step + 1
        if average is not None and settings.average_every is not None:
            if done % settings.average_every == 0:
                average.add()
            if done == last_step:  # before it is looked at
                average.put()
        if on_step is not None:
            on_step(entry)
        if checkpoints is not None and (stopping or done % checkpoints.every == 0 or done == settings.steps):
            _save(checkpoints, done, settings, accelerator, state())
        if stopping and done < settings.steps:
            raise RunStoppedError(f"finetune: stopped after step {done} of {settings.steps}.")
    if average is not None:
        average.put()  # again where no step was left to do
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False) if sharded is None else sharded.finish()
    optimizer.zero_grad()
    accelerator.free_memory()  # accelerate keeps every model and optimizer it prepared
    return model.eval()


def _save(checkpoints: Checkpoints, step: int, settings: Settings, accelerator: Accelerator, state: dict[str, Any]) -> None:
    partial = checkpoint.begin(checkpoints.folder, step)
    checkpoint.write(partial, f"process-{accelerator.process_index}", {"random": checkpoint.random_state()})
    if accelerator.is_main_process:
        for name, value in state.items():
            checkpoint.write(partial, name, value)
        checkpoint.write(partial, "run", {"step": step, "settings": asdict(settings), "processes": accelerator.num_processes})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.publish(partial, keep=checkpoints.keep)
    accelerator.wait_for_everyone()


def _go_on(saved: Path, settings: Settings, accelerator: Accelerator) -> int:
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
    checkpoint.set_random_state(checkpoint.read(saved, f"process-{accelerator.process_index}")["random"])
    return int(run["step"])


@dataclass(frozen=True)
class _Pass:
    """What the two backward passes of a step share.

    Attributes:
        encoded: batch to embeddings of the student.
        norms: of the gradients at the embeddings.
        bank: of texts, for terms that take one.
        options: of :func:`geomreg.backward`.
        declared: every parameter that is trained.
    """

    encoded: Callable[[Batch], Embeddings]
    norms: GradientNorms
    bank: Tensor | None
    options: dict[str, Any]
    declared: list[Tensor]

    def inputs(self, regularizer: WeightedSum) -> dict[str, Tensor]:
        """What the terms take beside embeddings: live logit scale and bias, a bank of texts."""
        model = unwrap(self.options["model"])
        found = {"logit_scale": model.logit_scale.exp(), "logit_bias": getattr(model, "logit_bias", None), "texts": self.bank}
        return {key: value for key, value in found.items() if key in regularizer.inputs and value is not None}

    def backward(self, encode: Any, batch: Batch | None, loss_fn: Callable[..., Tensor], *, everything: bool, **more: Any) -> Tensor:
        """Add the gradient; ``everything`` declares each parameter, not only those that losses use outside of the encoder."""
        options = {**self.options, "parameters": self.declared} if everything else self.options
        return backward(encode, batch, loss_fn, **options, **more)


def _regularized(
    passes: _Pass,
    batch: Batch,
    frozen: Embeddings | None,
    regularizer: WeightedSum,
    *,
    factor: int,
    on_reference: Callable[[Embeddings, Embeddings], None] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Unweighted terms and weighted sum on a reference batch; adds the gradient of ``factor`` times the sum."""
    parts: dict[str, Tensor] = {}

    def of(embeddings: Embeddings, teacher: Embeddings | None, share: float) -> Tensor:
        if on_reference is not None and teacher is not None:
            on_reference(embeddings, teacher)
        terms = regularizer.terms(passes.norms.watch(embeddings, "regularizer"), teacher, **passes.inputs(regularizer))
        for name, part in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + share * part
        return factor * terms.total

    inputs = {key: batch[key] for key in ("image", "text") if key in batch}
    rows = len(next(iter(inputs.values())))
    everything = len(inputs) == 1 or _on_parameters(regularizer)  # DDP waits for every parameter, those of the other tower too

    def loss_fn(e: Embeddings, index: Tensor) -> Tensor:
        return of(e, _rows(frozen, index), len(index) / rows)

    if regularizer.separable:
        total = passes.backward(passes.encoded, inputs, loss_fn, everything=everything, separable=True)
    else:
        total = passes.backward(passes.encoded, inputs, lambda e: of(e, frozen, 1.0), everything=everything)
    return parts, total / factor


def _targeted(
    passes: _Pass,
    batch: Batch,
    frozen: Embeddings | None,
    loss: TargetLoss,
    regularizer: WeightedSum | None,
    *,
    step: int,
    unique_texts: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Unweighted terms on a target batch, and its loss with their weighted sum; adds the gradient."""
    parts: dict[str, Tensor] = {}
    images, norms = len(batch["image"]), passes.norms
    everything = regularizer is not None and _on_parameters(regularizer)

    def total(image: Tensor, text: Tensor | None, teacher: Embeddings | None, batch: Batch) -> Tensor:
        paired = loss.paired(text, batch)
        task = norms.watch(Embeddings(image, None if paired is None else text), "task")  # texts of classes are in every process
        value = loss(task.image, text if paired is None else task.text, batch)
        if regularizer is None:
            return value
        seen = norms.watch(Embeddings(image, paired), "regularizer")
        terms = regularizer.terms(seen, teacher, **passes.inputs(regularizer))
        for name, part in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + len(image) / images * part
        return value + terms.total

    def of_rows(e: Embeddings, index: Tensor) -> Tensor:
        rows = {key: value[index] if isinstance(value, Tensor) else value for key, value in batch.items()}
        return total(e.image, None, _rows(frozen, index), rows)

    texts, alone = loss.texts(batch, step), {"image": batch["image"]}
    if texts is None:
        if loss.separable and (regularizer is None or regularizer.separable):
            return parts, passes.backward(passes.encoded, alone, of_rows, everything=everything, separable=True)
        return parts, passes.backward(passes.encoded, alone, lambda e: total(e.image, None, frozen, batch), everything=everything)
    if len(texts) == images and not unique_texts:
        inputs = {**alone, "text": texts}
        return parts, passes.backward(passes.encoded, inputs, lambda e: total(*e, frozen, batch), everything=everything)
    row = torch.arange(len(texts), device=texts.device)
    if unique_texts:
        texts, row = texts.unique(dim=0, return_inverse=True)
    towers = [(passes.encoded, alone), (passes.encoded, {"text": texts})]
    return parts, passes.backward(towers, None, lambda e: total(e.image, e.text[row], frozen, batch), everything=everything)


_OUTSIDE = ("logit_scale", "logit_bias", f"{head.NAME}.")  # parameters that losses use outside of the model's forward


def _on_parameters(regularizer: WeightedSum) -> bool:
    return any(isinstance(term, (WeightAnchor, ProjectionOrthogonality)) for term in regularizer.regularizers.values())


def _running_means(*regularizers: WeightedSum | None) -> Iterator[tuple[str, Tensor]]:
    for regularizer in regularizers:
        for name, term in regularizer.regularizers.items() if regularizer is not None else ():
            if isinstance(mean := getattr(term, "mean", None), Tensor):
                yield name, mean


def _rows(embeddings: Embeddings | None, index: Tensor) -> Embeddings | None:
    return None if embeddings is None else Embeddings(*(None if value is None else value[index] for value in embeddings))


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

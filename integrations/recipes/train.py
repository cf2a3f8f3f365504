"""The one training loop: a target loss, and optionally a regularizer on reference data, on accelerate."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from geomreg.checks import check_count
from geomreg.compose import WeightedSum
from geomreg.integrations.open_clip import embed, unwrap
from geomreg.integrations.recipes import checkpoint
from geomreg.regularizers import ProjectionOrthogonality, WeightAnchor
from geomreg.step import backward
from geomreg.teacher import Teacher
from geomreg.types import Embeddings, Terms

__all__ = ["Batch", "Batches", "Checkpoints", "RunStoppedError", "Settings", "contrastive", "encode", "finetune"]

Batch = dict[str, Any]  # "image" (B, 3, H, W), "text" token ids (B, L); for a cached teacher also "id", B of them
Batches = Callable[[int], Iterator[Batch]]  # endless batches from the one with this number on


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

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count("Settings", "chunk_size", self.chunk_size, 1)
        check_count("Settings", "regularize_every", self.regularize_every, 1)

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


def encode(model: nn.Module, batch: Batch) -> Embeddings:
    """Unit embeddings of a batch of images, texts or pairs; the same function for student and teacher."""
    return embed(model, batch.get("image"), batch.get("text"))


def contrastive(accelerator: Accelerator) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FLYP's symmetric contrastive loss over the batches of all processes, by open_clip."""
    several = accelerator.num_processes > 1
    return ClipLoss(local_loss=several, gather_with_grad=several, rank=accelerator.process_index, world_size=accelerator.num_processes)


def finetune(
    model: nn.Module,
    target: Batches,
    settings: Settings,
    *,
    regularizer: WeightedSum | None = None,
    reference: Batches | None = None,
    teacher: Teacher | None = None,
    target_regularizer: WeightedSum | None = None,
    accelerator: Accelerator | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Fine-tune an open_clip model in place; returns it, unwrapped, in evaluation mode.

    Each step runs the contrastive loss on a target batch and, given a regularizer, its value on a reference batch; the two
    backward passes follow one another (:func:`geomreg.backward`), so the activations of the two batches never coexist.

    Args:
        model: open_clip model, trained in place.
        target: ``target(k)`` gives endless batches of image-text pairs from number k on.
        settings: optimisation.
        regularizer: terms on the reference batch; needs ``reference``, and ``teacher`` if some term does.
        reference: likewise of generic pairs.
        teacher: the frozen model; sees the reference batches, and the target batches if there are terms on them that need it.
        target_regularizer: terms on the target batch, beside its loss; needs a teacher that is not cached if one of them does.
        accelerator: by default a new one: device, precision and processes as launched.
        checkpoints: save everything that the run needs, and go on from the newest checkpoint if there is one: on a CPU the losses and
            weights are then bitwise those of a run that was never interrupted.
        on_step: called after each step with ``step``, ``loss``, ``regularizer`` (weighted) and one entry per term, means over the
            processes.
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    contrast = contrastive(accelerator)
    for part in (regularizer, target_regularizer, teacher):
        if part is not None:
            part.to(accelerator.device)
            part.train()
    wrapped.train()
    scale: Callable[[Tensor], Tensor] = accelerator.scaler.scale if accelerator.scaler is not None else lambda loss: loss
    logit_scale = unwrap(wrapped).logit_scale
    options: dict[str, Any] = {
        "chunk_size": settings.chunk_size or sys.maxsize,
        "model": wrapped,
        "parameters": [logit_scale] if logit_scale.requires_grad else [],
        "scale": scale,
    }

    def encoded(batch: Batch) -> Embeddings:
        with accelerator.autocast():
            return encode(wrapped, batch)

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        return contrast(image, text, logit_scale.exp())

    def state() -> dict[str, Any]:
        return {
            "model": unwrap(wrapped).state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": {} if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "regularizer": {} if regularizer is None else regularizer.state_dict(),
            "target_regularizer": {} if target_regularizer is None else target_regularizer.state_dict(),
            "teacher": {} if teacher is None else teacher.state_dict(),
        }

    start = 0
    if checkpoints is not None and (saved := checkpoint.latest(checkpoints.folder)) is not None:
        start = _go_on(saved, settings, accelerator)
        unwrap(wrapped).load_state_dict(checkpoint.read(saved, "model"))
        for name, part in (("optimizer", optimizer), ("schedule", schedule), ("scaler", accelerator.scaler)):
            if part is not None:
                part.load_state_dict(checkpoint.read(saved, name))
        for name, stateful in (("regularizer", regularizer), ("target_regularizer", target_regularizer), ("teacher", teacher)):
            if stateful is not None:
                stateful.load_state_dict(checkpoint.read(saved, name))
    target_batches = target(start)
    reference_batches = None if reference is None else reference(-(-start // settings.regularize_every))
    for step in range(start, settings.steps):
        optimizer.zero_grad()
        value = torch.zeros((), device=accelerator.device)
        regularized = regularizer is not None and step % settings.regularize_every == 0
        batch = _moved(next(target_batches), accelerator.device)
        frozen = None
        if teacher is not None and target_regularizer is not None and target_regularizer.needs_teacher:
            with accelerator.autocast():
                frozen = teacher(batch)
        terms, loss = _contrasted(encoded, batch, frozen, loss_fn, target_regularizer, settings, {**options, "sync": not regularized})
        del batch, frozen
        # Last, with the target batch gone: the least memory. DDP synchronises in this pass, which therefore names the logit scale.
        if regularized and regularizer is not None and reference_batches is not None:
            batch, frozen = _moved(next(reference_batches), accelerator.device), None
            if teacher is not None and regularizer.needs_teacher:
                with accelerator.autocast():
                    frozen = teacher(batch)
            of_reference, value = _regularized(encoded, batch, frozen, regularizer, settings.regularize_every, options)
            terms |= of_reference
            del batch, frozen
        record = {**terms, "loss": loss, "regularizer": value, "stop": torch.tensor(float(should_stop()), device=loss.device)}
        means = accelerator.reduce(torch.stack([one.to(loss.dtype) for one in record.values()]), reduction="mean").tolist()
        entry: dict[str, float] = {"step": step + 1, **dict(zip(record, means, strict=True))}
        stopping = entry.pop("stop") > 0
        if not math.isfinite(entry["loss"] + entry["regularizer"]):  # on all processes, or none
            raise RuntimeError(
                f"finetune: expected a finite loss, got {entry['loss']} + {entry['regularizer']} at step {step + 1}. "
                "Lower the learning rate or the weight."
            )
        if settings.clip_norm is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_norm)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
            for part in (regularizer, target_regularizer, teacher):
                if part is not None:
                    part.step()
        else:
            for part in (regularizer, target_regularizer):
                if part is not None:
                    part.discard()
        if on_step is not None:
            on_step(entry)
        done = step + 1
        if checkpoints is not None and (stopping or done % checkpoints.every == 0 or done == settings.steps):
            _save(checkpoints, done, settings, accelerator, state())
        if stopping and done < settings.steps:
            raise RunStoppedError(f"finetune: stopped after step {done} of {settings.steps}.")
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
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


def _regularized(
    encoded: Callable[[Batch], Embeddings],
    batch: Batch,
    frozen: Embeddings | None,
    regularizer: WeightedSum,
    factor: int,
    options: dict[str, Any],
) -> tuple[dict[str, Tensor], Tensor]:
    """Unweighted terms and weighted sum on a reference batch; adds the gradient of ``factor`` times the sum."""
    parts: dict[str, Tensor] = {}
    given = partial(_inputs, regularizer, options["model"])

    def of(terms: Terms, share: float) -> Tensor:
        for name, part in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + share * part
        return factor * terms.total

    inputs = {key: batch[key] for key in ("image", "text") if key in batch}
    rows = len(next(iter(inputs.values())))
    if len(inputs) == 1:  # DDP waits for every parameter, those of the other tower too
        options = {**options, "parameters": [value for value in options["model"].parameters() if value.requires_grad]}
    if regularizer.separable:

        def loss_fn(embeddings: Embeddings, index: Tensor) -> Tensor:
            rows_of_teacher = None if frozen is None else Embeddings(*(None if value is None else value[index] for value in frozen))
            return of(regularizer.terms(embeddings, rows_of_teacher, **given()), len(index) / rows)

        total = backward(encoded, inputs, loss_fn, separable=True, **options)
    else:
        total = backward(encoded, inputs, lambda embeddings: of(regularizer.terms(embeddings, frozen, **given()), 1.0), **options)
    return parts, total / factor


def _contrasted(
    encoded: Callable[[Batch], Embeddings],
    batch: Batch,
    frozen: Embeddings | None,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    regularizer: WeightedSum | None,
    settings: Settings,
    options: dict[str, Any],
) -> tuple[dict[str, Tensor], Tensor]:
    """Unweighted terms on a target batch, and its contrastive loss with their weighted sum; adds the gradient."""
    parts: dict[str, Tensor] = {}
    if regularizer is not None and any(isinstance(term, _ON_PARAMETERS) for term in regularizer.regularizers.values()):
        options = {**options, "parameters": [value for value in options["model"].parameters() if value.requires_grad]}

    def total(image: Tensor, text: Tensor) -> Tensor:
        loss = loss_fn(image, text)
        if regularizer is None:
            return loss
        terms = regularizer.terms(Embeddings(image, text), frozen, **_inputs(regularizer, options["model"]))
        parts.update(terms.parts)
        return loss + terms.total

    inputs = {key: batch[key] for key in ("image", "text")}
    if not settings.unique_texts:
        loss = backward(encoded, inputs, lambda e: total(*e), **options)
    else:
        texts, row = inputs["text"].unique(dim=0, return_inverse=True)
        towers = [(encoded, {"image": inputs["image"]}), (encoded, {"text": texts})]
        loss = backward(towers, None, lambda e: total(e.image, e.text[row]), **options)
    return parts, loss


_ON_PARAMETERS = (WeightAnchor, ProjectionOrthogonality)


def _inputs(regularizer: WeightedSum, model: nn.Module) -> dict[str, Tensor]:
    """The live logit scale, for terms that take it."""
    return {"logit_scale": unwrap(model).logit_scale.exp()} if "logit_scale" in regularizer.inputs else {}


def _moved(batch: Batch, device: Any) -> Batch:
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}

"""The one training loop: a target loss, and optionally a regularizer on reference data, on accelerate."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from geomreg.checks import check_count
from geomreg.compose import WeightedSum
from geomreg.integrations.open_clip import embed, unwrap
from geomreg.step import backward
from geomreg.teacher import Teacher
from geomreg.types import Embeddings, Terms

__all__ = ["Batch", "Settings", "contrastive", "encode", "finetune"]

Batch = dict[str, Any]  # "image" (B, 3, H, W), "text" token ids (B, L); for a cached teacher also "id", B of them


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


def encode(model: nn.Module, batch: Batch) -> Embeddings:
    """Unit embeddings of a batch of images, texts or pairs; the same function for student and teacher."""
    return embed(model, batch.get("image"), batch.get("text"))


def contrastive(accelerator: Accelerator) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FLYP's symmetric contrastive loss over the batches of all processes, by open_clip."""
    several = accelerator.num_processes > 1
    return ClipLoss(local_loss=several, gather_with_grad=several, rank=accelerator.process_index, world_size=accelerator.num_processes)


def finetune(
    model: nn.Module,
    target: Iterator[Batch],
    settings: Settings,
    *,
    regularizer: WeightedSum | None = None,
    reference: Iterator[Batch] | None = None,
    teacher: Teacher | None = None,
    accelerator: Accelerator | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> nn.Module:
    """Fine-tune an open_clip model in place; returns it, unwrapped, in evaluation mode.

    Each step runs the contrastive loss on a target batch and, given a regularizer, its value on a reference batch; the two
    backward passes follow one another (:func:`geomreg.backward`), so the activations of the two batches never coexist.

    Args:
        model: open_clip model, trained in place.
        target: endless batches of image-text pairs.
        settings: optimisation.
        regularizer: terms on the reference batch; needs ``reference`` and ``teacher``.
        reference: endless batches of generic pairs.
        teacher: the frozen model.
        accelerator: by default a new one: device, precision and processes as launched.
        on_step: called after each step with ``step``, ``loss``, ``regularizer`` (weighted) and one entry per term.

    Raises:
        ValueError: some of ``regularizer``, ``reference`` and ``teacher`` without the others; gradient accumulation, which
            would change the contrastive loss.
        RuntimeError: the loss is not finite on some process; the model is left as it was before that step.
    """
    given = {"regularizer": regularizer, "reference": reference, "teacher": teacher}
    if len({value is None for value in given.values()}) > 1:
        lacking = ", ".join(name for name, value in given.items() if value is None)
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
    for part in (regularizer, teacher):
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

    for step in range(settings.steps):
        optimizer.zero_grad()
        value = torch.zeros((), device=accelerator.device)
        entry: dict[str, float] = {"step": step + 1}
        regularized = regularizer is not None and step % settings.regularize_every == 0
        loss = _contrasted(encoded, _moved(next(target), accelerator.device), loss_fn, settings, {**options, "sync": not regularized})
        # Last, with the target batch gone: the least memory. DDP synchronises in this pass, which therefore names the logit scale.
        if regularized and regularizer is not None and reference is not None and teacher is not None:
            batch = _moved(next(reference), accelerator.device)
            with accelerator.autocast():
                frozen = teacher(batch)
            terms, value = _regularized(encoded, batch, frozen, regularizer, settings.regularize_every, options)
            del batch, frozen
            entry |= {name: part.item() for name, part in terms.items()}
        entry |= {"loss": loss.item(), "regularizer": value.item()}
        finite = torch.isfinite(loss.detach() + value).float()
        if accelerator.reduce(finite, reduction="sum").item() < accelerator.num_processes:  # all stop, or none
            raise RuntimeError(
                f"finetune: expected a finite loss, got {entry['loss']} + {entry['regularizer']} at step {step + 1}. "
                "Lower the learning rate or the weight."
            )
        if settings.clip_norm is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_norm)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
            if regularizer is not None:
                regularizer.step()
        elif regularizer is not None:
            regularizer.discard()
        if on_step is not None:
            on_step(entry)
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    optimizer.zero_grad()
    accelerator.free_memory()  # accelerate keeps every model and optimizer it prepared
    return model.eval()


def _regularized(
    encoded: Callable[[Batch], Embeddings],
    batch: Batch,
    frozen: Embeddings,
    regularizer: WeightedSum,
    factor: int,
    options: dict[str, Any],
) -> tuple[dict[str, Tensor], Tensor]:
    """Unweighted terms and weighted sum on a reference batch; adds the gradient of ``factor`` times the sum."""
    parts: dict[str, Tensor] = {}

    def of(terms: Terms, share: float) -> Tensor:
        for name, part in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + share * part
        return factor * terms.total

    inputs = {key: batch[key] for key in ("image", "text") if key in batch}
    rows = len(next(iter(inputs.values())))
    if regularizer.separable:

        def loss_fn(embeddings: Embeddings, index: Tensor) -> Tensor:
            rows_of_teacher = Embeddings(*(None if value is None else value[index] for value in frozen))
            return of(regularizer.terms(embeddings, rows_of_teacher), len(index) / rows)

        total = backward(encoded, inputs, loss_fn, separable=True, **options)
    else:
        total = backward(encoded, inputs, lambda embeddings: of(regularizer.terms(embeddings, frozen), 1.0), **options)
    return parts, total / factor


def _contrasted(
    encoded: Callable[[Batch], Embeddings],
    batch: Batch,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    settings: Settings,
    options: dict[str, Any],
) -> Tensor:
    """Contrastive loss of a target batch; adds its gradient."""
    inputs = {key: batch[key] for key in ("image", "text")}
    if not settings.unique_texts:
        return backward(encoded, inputs, lambda e: loss_fn(*e), **options)
    texts, row = inputs["text"].unique(dim=0, return_inverse=True)
    parts = [(encoded, {"image": inputs["image"]}), (encoded, {"text": texts})]
    return backward(parts, None, lambda e: loss_fn(e.image, e.text[row]), **options)


def _moved(batch: Batch, device: Any) -> Batch:
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}

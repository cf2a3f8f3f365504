"""The one training loop: a target loss, and optionally a regularizer on reference data, on accelerate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from geomreg.compose import WeightedSum
from geomreg.integrations.open_clip import embed, unwrap
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["Batch", "Settings", "contrastive", "encode", "finetune"]

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), token ids (B, L)


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
    """

    steps: int
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 500
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None

    def rate(self, step: int) -> float:
        """Factor on the learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)))


def encode(model: nn.Module, batch: Batch) -> Embeddings:
    """Unit embeddings of a batch of pairs; the same function for student and teacher."""
    return embed(model, *batch)


def contrastive(accelerator: Accelerator) -> Callable[[Embeddings, Tensor], Tensor]:
    """FLYP's symmetric contrastive loss over the batches of all processes, by open_clip."""
    several = accelerator.num_processes > 1
    loss = ClipLoss(local_loss=several, gather_with_grad=several, rank=accelerator.process_index, world_size=accelerator.num_processes)
    return lambda embeddings, scale: loss(embeddings.image, embeddings.text, scale)


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

    Each step runs the contrastive loss on a target batch and, given a regularizer, its value on a reference batch;
    the two backward passes follow one another, so the activations of the two batches never coexist.

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
    loss_fn = contrastive(accelerator)
    for part in (regularizer, teacher):
        if part is not None:
            part.to(accelerator.device)
            part.train()
    wrapped.train()
    for step in range(settings.steps):
        optimizer.zero_grad()
        value = torch.zeros((), device=accelerator.device)
        entry: dict[str, float] = {"step": step + 1}
        # The target loss comes last: it alone uses every parameter, so DDP synchronises all gradients in its backward pass.
        if regularizer is not None and reference is not None and teacher is not None:
            batch = _moved(next(reference), accelerator.device)
            with accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    terms = regularizer.terms(encode(wrapped, batch), teacher(batch))
                accelerator.backward(terms.total)
            value = terms.total.detach()
            entry |= {name: part.item() for name, part in terms.parts.items()}
        with accelerator.autocast():
            embeddings = encode(wrapped, _moved(next(target), accelerator.device))
        loss = loss_fn(embeddings, unwrap(wrapped).logit_scale.exp())
        accelerator.backward(loss)
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


def _moved(batch: Batch, device: Any) -> Batch:
    images, texts = batch
    return images.to(device, non_blocking=True), texts.to(device, non_blocking=True)

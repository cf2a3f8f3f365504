"""The ways to do one optimizer step of FLYP + DiVE that the benchmarks of this folder compare.

A step is FLYP's contrastive loss on a target batch and, in most variants, DiVE on a reference batch against a frozen teacher. The objects are
those that a user runs: :func:`geomreg.backward`, :class:`geomreg.Teacher`, :class:`geomreg.DiVE`, open_clip's model and loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from geomreg import DiVE, Embeddings, Teacher, WeightedSum, backward
from geomreg.integrations.open_clip import embed

__all__ = ["CAPTIONS", "UNIQUE", "VARIANTS", "Training", "Variant"]

CAPTIONS, BATCH = 364, 512  # iWildCam: 182 classes, 2 templates; FLYP's batch
UNIQUE = CAPTIONS * (1 - (1 - 1 / CAPTIONS) ** BATCH) / BATCH  # expected share of distinct ones among uniform draws
CHUNK = 1 / 8  # of a batch


@dataclass(frozen=True)
class Variant:
    """One way to do the step; the defaults are FLYP.

    Attributes:
        teacher: whence the teacher's embeddings come: None (no regularizer), ``"graph"`` (a copy run with graph), ``"online"`` (a
            :class:`Teacher`), ``"cached"``, ``"adapters off"``.
        chunk: share of the batch that the regularizer takes at a time in :func:`geomreg.backward`; None: one backward pass for both losses.
        update: of :class:`DiVE`; ``"after"`` is separable.
        target_chunk: share of the batch that the target loss takes at a time in :func:`geomreg.backward`; None: a plain backward pass.
        reference: pairs in the reference batch, as a share of the target batch.
        every: the regularizer on every so many steps.
        unique_texts: each distinct caption of the target batch is encoded once.
        regularizer_first: the regularizer's backward pass before the target's.
        both_batches: both batches are on the device during the whole step.
    """

    teacher: str | None = None
    chunk: float | None = None
    update: str = "after"
    target_chunk: float | None = None
    reference: float = 1.0
    every: int = 1
    unique_texts: bool = False
    lora: bool = False
    checkpointing: bool = False
    regularizer_first: bool = False
    both_batches: bool = False

    @property
    def counterpart(self) -> "Variant":
        """FLYP with the same model and the same target batch."""
        return Variant(unique_texts=self.unique_texts, lora=self.lora, checkpointing=self.checkpointing)


_LEAN = Variant("cached", chunk=CHUNK)
VARIANTS = {
    "FLYP": Variant(),
    "naive, teacher's graph kept": Variant("graph"),
    "naive": Variant("online"),
    "cached, joint": Variant("cached"),
    "online, lean": Variant("online", chunk=CHUNK),
    "cached, lean": _LEAN,
    "cached, lean, one chunk": replace(_LEAN, chunk=1.0),
    "cached, lean, regularizer first": replace(_LEAN, regularizer_first=True),
    "cached, lean, both batches on the device": replace(_LEAN, both_batches=True),
    "cached, before, one chunk": replace(_LEAN, chunk=1.0, update="before"),
    "cached, before, lean": replace(_LEAN, update="before"),
    "cached, lean, contrastive chunked": replace(_LEAN, target_chunk=CHUNK),
    "FLYP, unique texts": Variant(unique_texts=True),
    "cached, lean, unique texts": replace(_LEAN, unique_texts=True),
    "cached, lean, contrastive chunked, unique texts": replace(_LEAN, target_chunk=CHUNK, unique_texts=True),
    "FLYP, LoRA": Variant(lora=True),
    "adapters off, lean, LoRA": Variant("adapters off", chunk=CHUNK, lora=True),
    "naive, R = B/2": Variant("online", reference=1 / 2),
    "naive, R = B/4": Variant("online", reference=1 / 4),
    "cached, lean, R = B/2": replace(_LEAN, reference=1 / 2),
    "cached, lean, R = B/4": replace(_LEAN, reference=1 / 4),
    "cached, lean, every 4th step": replace(_LEAN, every=4),
    "FLYP, checkpointing": Variant(checkpointing=True),
    "naive, checkpointing": Variant("online", checkpointing=True),
    "cached, lean, checkpointing": replace(_LEAN, checkpointing=True),
}


class Training:
    """Model, optimizer and data of a variant, and its steps; real or fake by the mode that it is built in."""

    def __init__(
        self, build: Callable[[], nn.Module], variant: Variant, *, batch: int, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.variant, self.batch, self.precision, self.device, self.loss = variant, batch, precision, device, ClipLoss()
        self.model = build().to(device).train()
        self.width = self.model.text_projection.shape[1]  # of the embeddings
        self.model.set_grad_checkpointing(variant.checkpointing)
        if variant.lora:
            self.model = peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=["c_fc", "c_proj", "fc1", "fc2"]), self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.unique = round(UNIQUE * batch) if variant.unique_texts else batch
        self.caption = torch.arange(batch, device=device) % self.unique if variant.unique_texts else None  # of each image
        self.keep = WeightedSum(dive=(1000.0, DiVE(update=variant.update, normalize=variant.teacher != "graph"))).to(device)
        self.reference = round(variant.reference * batch)
        self.cached = self.teacher = None
        if variant.teacher == "cached":
            self.cached = Embeddings(*(torch.rand(self.reference, self.width, device=device) for _ in range(2)))
        elif variant.teacher == "graph":
            self.teacher = build().to(device)
        elif variant.teacher == "online":
            self.teacher = Teacher(self.model, self.encode)
        elif variant.teacher == "adapters off":
            self.teacher = Teacher.adapters_off(self.model, self.encode)

    def pairs(self, images: int, texts: int) -> tuple[Tensor, Tensor]:
        """A batch, on the device for as long as it is held."""
        image = torch.rand(images, 3, *self.model.visual.image_size, device=self.device)
        return image, torch.zeros(texts, self.model.context_length, dtype=torch.long, device=self.device)

    def encode(self, model: nn.Module, batch: tuple[Tensor | None, Tensor | None]) -> Embeddings:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            return embed(model, *batch)

    def parts(self) -> list[Any]:
        """What is on the device before the first step."""
        held = [self.teacher.model if isinstance(self.teacher, Teacher) else self.teacher, self.caption]
        return [self.model, self.keep, *(one for one in [*held, *(self.cached or ())] if one is not None)]

    def step(self, number: int = 0) -> None:
        """Step ``number`` of a training."""
        variant = self.variant
        self.optimizer.zero_grad()
        if variant.teacher is None or number % variant.every:
            self.fit(self.pairs(self.batch, self.unique))
        elif variant.chunk is None:
            target, reference = self.pairs(self.batch, self.unique), self.pairs(self.reference, self.reference)
            (self.joint_regularizer(reference) + self.target_loss(self.encode(self.model, target))).backward()
        elif variant.both_batches:
            target, reference = self.pairs(self.batch, self.unique), self.pairs(self.reference, self.reference)
            self.fit(target)
            self.regularize(reference)
        else:
            halves = [
                lambda: self.fit(self.pairs(self.batch, self.unique)),
                lambda: self.regularize(self.pairs(self.reference, self.reference)),
            ]
            for half in reversed(halves) if variant.regularizer_first else halves:
                half()
        self.optimizer.step()
        self.keep.step()

    def target_loss(self, embeddings: Embeddings) -> Tensor:
        image, text = embeddings
        return self.loss(image, text if self.caption is None else text[self.caption], self.model.logit_scale.exp())

    def fit(self, target: tuple[Tensor, Tensor]) -> None:
        """The target's backward pass."""
        share = self.variant.target_chunk
        if share is None:
            self.target_loss(self.encode(self.model, target)).backward()
            return
        options = {"chunk_size": round(share * self.batch), "model": self.model, "parameters": self.used_by_the_loss()}
        if self.caption is None:
            backward(partial(self.encode, self.model), target, self.target_loss, **options)
            return
        images, texts = target
        parts = [
            (lambda chunk: self.encode(self.model, (chunk, None)), images),
            (lambda chunk: self.encode(self.model, (None, chunk)), texts),
        ]
        backward(parts, None, self.target_loss, **options)

    def used_by_the_loss(self) -> list[Tensor]:
        return [self.model.logit_scale] if self.model.logit_scale.requires_grad else []

    def regularize(self, reference: tuple[Tensor, Tensor]) -> None:
        """The regularizer's backward pass, apart from the target's."""
        known = self.cached or self.teacher(reference)
        options = {"chunk_size": round(self.variant.chunk * self.batch), "model": self.model, "parameters": self.used_by_the_loss()}
        student = partial(self.encode, self.model)
        if self.keep.separable:
            backward(
                student, reference, lambda e, index: self.keep(e, Embeddings(*(one[index] for one in known))), separable=True, **options
            )
        else:
            backward(student, reference, lambda e: self.keep(e, known), **options)

    def joint_regularizer(self, reference: tuple[Tensor, Tensor]) -> Tensor:
        if self.variant.teacher == "graph":
            known = self.encode(self.teacher, reference)
            embeddings = self.encode(self.model, reference)
            # DiVE refuses a teacher with graph, but on what is not normalised it depends on differences alone: give it these
            shifts = Embeddings(*(one - other for one, other in zip(embeddings, known, strict=True)))
            return self.keep(shifts, Embeddings(*(torch.zeros_like(one) for one in shifts)))
        known = self.cached or self.teacher(reference)  # first: its activations would come on top of the student's
        return self.keep(self.encode(self.model, reference), known)

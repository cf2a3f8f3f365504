"""The two backward passes of a training step: the target's loss with its terms, and the regularizer on the reference."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomreg.compose import WeightedSum
from geomreg.gradients import GradientNorms
from geomreg.integrations.recipes.losses import TargetLoss
from geomreg.regularizers import ProjectionOrthogonality, WeightAnchor
from geomreg.step import backward
from geomreg.types import Embeddings

__all__ = ["ON_PARAMETERS", "Batch", "Passes", "evaluating"]

Batch = dict[str, Any]  # "image" (B, 3, H, W), "text" token ids (B, L), or one of them; "label" (B,); for a cached teacher "id", B of them
ON_PARAMETERS = (WeightAnchor, ProjectionOrthogonality)  # terms that look at no embeddings


@dataclass(frozen=True)
class Passes:
    """The backward passes of one step, and what they share.

    Attributes:
        encode: batch to embeddings of the student.
        model: the student itself, not wrapped.
        parameters: every parameter that is trained.
        outside: those of them that losses use outside of ``encode``.
        options: of :func:`geomreg.backward`.
        norms: of the gradients at the embeddings of the samples.
        bank: of texts, for terms that take one.
    """

    encode: Callable[[Batch], Embeddings]
    model: nn.Module
    parameters: list[Tensor]
    outside: list[Tensor]
    options: dict[str, Any]
    norms: GradientNorms
    bank: Tensor | None

    def on_target(
        self,
        batch: Batch,
        frozen: Embeddings | None,
        loss: TargetLoss,
        regularizer: WeightedSum | None,
        *,
        step: int,
        unique_texts: bool,
        sync: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Unweighted terms on a target batch, and its loss with their weighted sum; adds the gradient."""
        parts: dict[str, Tensor] = {}
        images = len(batch["image"])
        options = {"everything": regularizer is not None and _on_parameters(regularizer), "sync": sync}

        def total(image: Tensor, text: Tensor | None, teacher: Embeddings | None, batch: Batch) -> Tensor:
            paired = loss.paired(text, batch)
            task = self.norms.watch(Embeddings(image, None if paired is None else text), "task")  # texts of classes are in every process
            value = loss(task.image, text if paired is None else task.text, batch)
            if regularizer is None:
                return value
            return value + self._terms(regularizer, Embeddings(image, paired), teacher, len(image) / images, parts)

        def of_rows(e: Embeddings, index: Tensor) -> Tensor:
            rows = {key: value[index] if isinstance(value, Tensor) else value for key, value in batch.items()}
            return total(e.image, None, _rows(frozen, index), rows)

        texts, alone = loss.texts(batch, step), {"image": batch["image"]}
        if texts is None:
            if loss.separable and (regularizer is None or regularizer.separable):
                return parts, self._backward(self.encode, alone, of_rows, separable="unchecked", **options)
            return parts, self._backward(self.encode, alone, lambda e: total(e.image, None, frozen, batch), **options)
        if len(texts) == images and not unique_texts:
            inputs = {**alone, "text": texts}
            return parts, self._backward(self.encode, inputs, lambda e: total(*e, frozen, batch), **options)
        row = torch.arange(len(texts), device=texts.device)
        if unique_texts:
            texts, row = texts.unique(dim=0, return_inverse=True)
        towers = [(self.encode, alone), (self.encode, {"text": texts})]
        return parts, self._backward(towers, None, lambda e: total(e.image, e.text[row], frozen, batch), **options)

    def on_reference(
        self,
        batch: Batch,
        frozen: Embeddings | None,
        regularizer: WeightedSum,
        *,
        factor: int,
        see: Callable[[Embeddings, Embeddings], None] | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Unweighted terms and weighted sum on a reference batch; adds the gradient of ``factor`` times the sum.

        With a teacher the student is in evaluation mode meanwhile, as the teacher is: dropout, drop path and patch dropout would make it
        differ from the teacher where their weights are equal. Batch normalisation uses, and leaves, its running statistics; these are
        part of the model and moved with the target batch of this very step, so that terms of a ResNet are not 0 at the first step.
        The target batch, terms on it included, is embedded once, in training mode, as its loss needs it. A Hugging Face tower
        checkpoints no activations in evaluation mode.

        ``see`` is called with the student's and the teacher's embeddings, those of a chunk at a time.
        """
        parts: dict[str, Tensor] = {}

        def of(embeddings: Embeddings, teacher: Embeddings | None, share: float) -> Tensor:
            if see is not None and teacher is not None:
                see(embeddings, teacher)
            return factor * self._terms(regularizer, embeddings, teacher, share, parts)

        inputs = {key: batch[key] for key in ("image", "text") if key in batch}
        rows = len(next(iter(inputs.values())))
        everything = len(inputs) == 1 or _on_parameters(regularizer)  # DDP waits for every parameter, those of the other tower too

        def of_rows(e: Embeddings, index: Tensor) -> Tensor:
            return of(e, _rows(frozen, index), len(index) / rows)

        with contextlib.nullcontext() if frozen is None else evaluating(self.model):
            if regularizer.separable:
                total = self._backward(self.encode, inputs, of_rows, everything=everything, separable="unchecked")
            else:
                total = self._backward(self.encode, inputs, lambda e: of(e, frozen, 1.0), everything=everything)
        return parts, total / factor

    def _terms(
        self, regularizer: WeightedSum, seen: Embeddings, teacher: Embeddings | None, share: float, parts: dict[str, Tensor]
    ) -> Tensor:
        """The weighted sum; its terms, times the share of the batch that is seen, are added to ``parts``."""
        scale, bias = self.model.logit_scale.exp(), getattr(self.model, "logit_bias", None)  # live
        inputs = {"logit_scale": scale, "logit_bias": bias, "texts": self.bank}
        taken = {key: value for key, value in inputs.items() if key in regularizer.inputs and value is not None}
        terms = regularizer.terms(self.norms.watch(seen, "regularizer"), teacher, **taken)
        for name, part in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + share * part
        return terms.total

    def _backward(self, encode: Any, batch: Batch | None, loss_fn: Callable[..., Tensor], *, everything: bool, **options: Any) -> Tensor:
        """Add the gradient; ``everything`` declares each parameter, not only those that losses use outside of the encoder."""
        parameters = self.parameters if everything else self.outside
        return backward(encode, batch, loss_fn, parameters=parameters, **self.options, **options)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; then every submodule's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _on_parameters(regularizer: WeightedSum) -> bool:
    return any(isinstance(term, ON_PARAMETERS) for term in regularizer.regularizers.values())


def _rows(embeddings: Embeddings | None, index: Tensor) -> Embeddings | None:
    return None if embeddings is None else Embeddings(*(None if value is None else value[index] for value in embeddings))

"""What a target batch teaches: the contrastive losses of pairs, and cross-entropy over classes."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from geomreg.checks import check_fraction, check_weight
from geomreg.distributed import weighted_by_rows
from geomreg.regularizers import ContrastiveReplay
from geomreg.types import Embeddings

__all__ = ["Contrastive", "HeadClassification", "TargetLoss", "TextClassification"]


class TargetLoss(Protocol):
    """A loss on a target batch, in the three parts that the training loop needs.

    Attributes:
        separable: the loss is a mean over the images, so that chunks of them weighted by their share give it.
    """

    separable: bool

    def texts(self, batch: dict[str, Any], step: int) -> Tensor | None:
        """``(T, L)`` token ids to encode beside the batch's images; None: images alone."""

    def paired(self, text: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        """``(B, D)`` embeddings among those of :meth:`texts` that belong to the images, for terms on the target; None: there are none."""

    def __call__(self, image: Tensor, text: Tensor | None, batch: dict[str, Any]) -> Tensor:
        """0-d, of ``(B, D)`` unit embeddings of the images and ``(T, D)`` of the texts."""


class Contrastive:
    """CLIP's symmetric contrastive loss as FLYP fine-tunes with it (arXiv 2212.00638), by open_clip; for a model with a logit bias
    SigLIP's (arXiv 2303.15343). Over the batches of all processes.

    Args:
        model: open_clip model, whose logit scale and bias are live.
        accelerator: of the run.
        caption_weight: of the same loss between the images and their ``batch["caption"]``, generated captions (ARF, arXiv 2404.06244);
            0: no captions are needed.
    """

    separable = False

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, caption_weight: float = 0.0) -> None:
        check_weight("Contrastive", "caption_weight", caption_weight)
        self.model, self.caption_weight = model, caption_weight
        several = accelerator.num_processes > 1
        self.softmax = ClipLoss(
            local_loss=several, gather_with_grad=several, rank=accelerator.process_index, world_size=accelerator.num_processes
        )
        self.sigmoid = ContrastiveReplay(form="sigmoid", normalize=False)

    def texts(self, batch: dict[str, Any], step: int) -> Tensor | None:
        return torch.cat([batch["text"], batch["caption"]]) if self.caption_weight else batch["text"]

    def paired(self, text: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        return None if text is None else text[: len(batch["text"])]

    def __call__(self, image: Tensor, text: Tensor | None, batch: dict[str, Any]) -> Tensor:
        assert text is not None
        rows = len(image)
        loss = self._of(image, text[:rows])
        return loss + self.caption_weight * self._of(image, text[rows:]) if self.caption_weight else loss

    def _of(self, image: Tensor, text: Tensor) -> Tensor:
        scale, bias = self.model.logit_scale.exp(), getattr(self.model, "logit_bias", None)
        if bias is None:
            return self.softmax(image, text, scale)
        return self.sigmoid(Embeddings(image, text), logit_scale=scale, logit_bias=bias)


class HeadClassification:
    """Cross-entropy of a linear head on unit image embeddings: plain fine-tuning, LP-FT (arXiv 2202.10054), Lipsum-FT and CAR-FT.

    Args:
        head: ``(B, D) -> (B, C)`` logits; see :mod:`geomreg.integrations.recipes.head`.
        label_smoothing: share of the target spread over all classes.
    """

    separable = True

    def __init__(self, head: Callable[[Tensor], Tensor], *, label_smoothing: float = 0.0) -> None:
        check_fraction("HeadClassification", "label_smoothing", label_smoothing)
        self.head, self.label_smoothing = head, label_smoothing

    def texts(self, batch: dict[str, Any], step: int) -> Tensor | None:
        return None

    def paired(self, text: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        return None

    def __call__(self, image: Tensor, text: Tensor | None, batch: dict[str, Any]) -> Tensor:
        value = F.cross_entropy(self.head(image), batch["label"], label_smoothing=self.label_smoothing)
        return weighted_by_rows([(value, len(image))])


class TextClassification:
    """Cross-entropy of the images over the texts of all classes, encoded by the live text tower in every step: ZSCL (arXiv 2303.06628),
    and FLYP's ablation of its contrastive loss.

    Args:
        model: open_clip model, whose logit scale is live.
        tokens: ``(T, C, L)`` token ids of C classes in T templates, of which each step takes one after the other.
        label_smoothing: share of the target spread over all classes; 0.2 in ZSCL.
    """

    separable = False

    def __init__(self, model: nn.Module, tokens: Tensor, *, label_smoothing: float = 0.0) -> None:
        check_fraction("TextClassification", "label_smoothing", label_smoothing)
        self.model, self.tokens, self.label_smoothing = model, tokens, label_smoothing

    def texts(self, batch: dict[str, Any], step: int) -> Tensor | None:
        return self.tokens[step % len(self.tokens)].to(batch["image"].device)

    def paired(self, text: Tensor | None, batch: dict[str, Any]) -> Tensor | None:
        return None

    def __call__(self, image: Tensor, text: Tensor | None, batch: dict[str, Any]) -> Tensor:
        assert text is not None
        logits = self.model.logit_scale.exp() * image @ text.T
        value = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        return weighted_by_rows([(value, len(image))])

"""Zero-shot evaluation of an open_clip model: class heads from templates, and which samples are right."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomreg.integrations.open_clip import embed

__all__ = ["accuracy", "correct", "embed_images", "zero_shot_head"]


@torch.no_grad()
def zero_shot_head(model: nn.Module, tokens: Tensor) -> Tensor:
    """``(C, D)`` class embeddings: unit text embeddings, mean over templates, unit again (METHODS of CLIP and FLYP)."""
    device = next(model.parameters()).device
    texts = [embed(model, texts=one.to(device)).text for one in tokens]
    return F.normalize(torch.stack([text for text in texts if text is not None]).mean(dim=0), dim=-1)


@torch.no_grad()
def embed_images(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """``(N, D)`` unit embeddings."""
    device = next(model.parameters()).device
    parts = [embed(model, images=part.to(device)).image for part in images.split(batch_size)]
    return torch.cat([part for part in parts if part is not None])


def correct(model: nn.Module, images: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """``(N,)`` bool: the nearest class of ``head`` by cosine is the right one."""
    return (embed_images(model, images) @ head.T).argmax(dim=1).cpu() == labels


def accuracy(right: Sequence[bool] | Tensor) -> float:
    """Share of true values in per cent."""
    return 100.0 * torch.as_tensor(right).double().mean().item()

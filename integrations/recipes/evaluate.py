"""Zero-shot evaluation of an open_clip model: class heads from templates, and which samples are right."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from geomreg.integrations.open_clip import embed
from geomreg.integrations.recipes.data import collate

__all__ = ["accuracy", "correct", "embed_images", "evaluate", "interval", "zero_shot_head"]


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


def interval(found: int, count: int) -> tuple[float, float]:
    """Between which shares the true one lies with 95 % confidence, when ``found`` of ``count`` were seen (Wilson, 1927)."""
    share, z = found / count, 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    tokenizer: Callable[..., Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
    head: Callable[[Tensor], Tensor] | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """Accuracy on a labelled data set, zero-shot or of a head, in evaluation mode; the model's mode is restored.

    Args:
        model: open_clip model.
        dataset: with ``class_texts(template)``, ``templates``, samples of ``image`` and ``label``, and maybe ``groups``.
        tokenizer: the model's.
        batch_size: images at a time.
        workers: loading processes.
        head: unit embeddings ``(B, D)`` to logits ``(B, C)``; None: zero-shot.
        limit: look at a random part of so many samples, always the same; None: at all.

    Returns:
        In per cent ``accuracy``, ``class_average``, the mean of the classes' accuracies, ``macro_f1``, the mean of the F1 scores of the
        classes that there are (iWildCam's measure in WILDS), and with groups ``worst_group``, the least accuracy of one (FMoW's, of
        the five regions); ``samples``, the number of those that were looked at; and ``broken``, of those left out.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        if head is None:
            texts = zero_shot_head(model, torch.stack([tokenizer(dataset.class_texts(template)) for template in dataset.templates]))
            head = partial(torch.matmul, other=texts.T)
        guesses, labels, groups, broken = [], [], [], 0
        chosen = list(range(len(dataset)))
        if limit is not None and limit < len(dataset):
            chosen = sorted(np.random.default_rng(0).choice(len(dataset), limit, replace=False).tolist())
        rows = [chosen[k : k + batch_size] for k in range(0, len(chosen), batch_size)]
        for batch in DataLoader(dataset, batch_sampler=rows, num_workers=workers, collate_fn=collate, generator=torch.Generator()):
            broken += len(batch["broken"])
            if batch["id"]:
                image = embed(model, images=batch["image"].to(device)).image
                guesses.append(head(image).argmax(dim=1).cpu())
                labels.append(batch["label"])
                groups.append(batch.get("group", torch.zeros(len(batch["label"]), dtype=torch.long)))
    finally:
        model.train(training)
    if not guesses:
        raise RuntimeError(f"evaluate: expected samples that can be read, got {broken} broken ones. Look at the data set.")
    guess, label, group = (torch.cat(values).numpy() for values in (guesses, labels, groups))
    score = (guess == label).astype(float)
    found = {
        "accuracy": 100 * score.mean(),
        "class_average": 100 * np.mean(_means(score, label)),
        "macro_f1": 100 * np.mean([_f1(guess == one, label == one) for one in np.unique(label)]),
        "samples": float(len(score)),
        "broken": float(broken),
    }
    if getattr(dataset, "groups", None) is not None:
        counted = group != getattr(dataset, "unscored_group", None)
        found["worst_group"] = 100 * min(_means(score[counted], group[counted]), default=np.nan)
    return {key: float(value) for key, value in found.items()}


def _means(score: Any, of: Any) -> list[float]:
    """Mean score for each value of ``of``."""
    return [score[of == one].mean() for one in np.unique(of)]


def _f1(guessed: Any, there: Any) -> float:
    """Of one class that is there."""
    return float(2 * (guessed & there).sum() / (guessed.sum() + there.sum()))

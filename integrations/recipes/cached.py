"""Before a run: what a cached teacher holds belongs to what the run will show."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from geomreg.cache_build import largest_difference
from geomreg.integrations.recipes.data import RandomTexts, Subset, collate
from geomreg.integrations.recipes.data.counted import Counted
from geomreg.integrations.recipes.passes import evaluating
from geomreg.integrations.recipes.train import encode
from geomreg.older_tables import LOADING, said_of_loading
from geomreg.shards import id_hashes
from geomreg.teacher import Teacher

__all__ = ["check_cached"]

SAMPLES, BATCH = 64, 16  # embedded anew and compared
TOLERANCE = 2e-2  # relative to the norm: above the difference of fp32 and bf16 autocast, in which a cache may have been built


def check_cached(teacher: Teacher, dataset: Any, model: nn.Module) -> None:
    """Compare a cache with the data of a run: their digests, and some samples that the model, still as it came, embeds anew.

    Args:
        teacher: a cached one, whose weights are the model's.
        dataset: the reference data, whose samples always look the same.
        model: the student before its first step.

    Raises:
        ValueError: texts that are drawn anew at each step; other captions, class names, templates or image paths behind the same ids;
            samples that the cache lacks; embeddings that are not the model's.
    """
    if isinstance(dataset, RandomTexts):
        raise ValueError("finetune: expected texts that stay as they are for a cached teacher, got random_texts. Use teacher=frozen.")
    read = teacher.modalities or tuple(teacher.cache.fingerprint)
    shown = [modality for modality in dataset.modalities if modality in read]
    _check_digests(teacher, dataset, shown)
    _check_samples(teacher, dataset, model, shown)


def _check_digests(teacher: Any, dataset: Any, modalities: list[str]) -> None:
    """Of a subset those of the whole. A cache of other ids, say of more samples, is left to the comparison of samples."""
    while isinstance(dataset, (Counted, Subset)):
        dataset = dataset.dataset
    if "image" in modalities:
        _check_loading(teacher.cache, getattr(dataset, LOADING, None))
    ids = hashlib.sha256(id_hashes("finetune", dataset.ids).tobytes()).hexdigest()[:16]
    for modality in modalities:
        parts = dict(part.split(" ", 1) for part in teacher.cache.fingerprint[modality]["data set"].split(", ")[1:])
        now = dataset.fingerprint[modality]
        if parts.get("ids") == ids and (there := parts.get("content", now)) != now and not _same_files(dataset, modality, there):
            what = {"image": "images", "text": "texts (captions, class names or templates)"}[modality]
            raise ValueError(
                f"finetune: expected reference data with the {what} that {teacher.cache.path} was built from, got others under the same "
                f"ids (digest {now}, there {parts['content']}). Run geomreg embed on these data with the options of this run."
            )


def _same_files(dataset: Any, modality: str, digest: str) -> bool:
    """Whether only the image paths are written otherwise: absolute, or relative to another folder."""
    return modality == "image" and hasattr(dataset, "same_files") and bool(dataset.same_files(digest))


def _check_loading(cache: Any, now: str | None) -> None:
    then = cache.fingerprint["image"].get(LOADING)
    if not said_of_loading(cache.path, then, now):
        raise ValueError(
            f"finetune: expected images that are read as for {cache.path} ({then}), got {now}. Run geomreg embed on these data with the "
            "options of this run."
        )


def _check_samples(teacher: Any, dataset: Any, model: nn.Module, modalities: list[str]) -> None:
    rows = sorted(set(np.linspace(0, len(dataset) - 1, SAMPLES, dtype=int).tolist()))
    device = next(model.parameters()).device
    for start in range(0, len(rows), BATCH):
        batch = collate([dataset[row] for row in rows[start : start + BATCH]])
        if not batch["id"]:  # all broken
            continue
        stored = teacher(batch)
        with torch.no_grad(), evaluating(model):
            now = encode(model, {key: batch[key].to(device) for key in modalities})
        for modality in modalities:
            difference, worst = largest_difference(getattr(stored, modality), getattr(now, modality).float().cpu())
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"finetune: expected the {modality} embedding of {batch['id'][worst]!r} in {teacher.cache.path} within {TOLERANCE:g} "
                    f"of the model's, got one {difference:.2g} away: the cache is of another {modality}. Run geomreg embed on these data."
                )

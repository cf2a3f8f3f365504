"""What shows before a run that its numbers are out of range: its options, and the few steps of a dry run that are thrown away."""

import dataclasses
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from geomreg.integrations.recipes.config import Config
from geomreg.integrations.recipes.evaluate import interval
from geomreg.units import duration_text, size_text

__all__ = ["LIMIT", "advice", "base_lines", "check_batches", "check_learning_rate", "take_steps", "unusual_weights"]

LIMIT = 1_000  # samples of an evaluation of the base model
_STEPS = 4
_LONGEST = 8  # regularize_every up to which a regularized step beside the first is waited for
LOW, HIGH = 0.01, 25.0  # gradient ratio at the full learning rate: the terms do nothing, nothing else does anything
_RISE = 1.5  # times the first loss
_FAR_OFF = 10.0  # times the usual weight of a term, or the usual by it
_METHODS = Path(__file__).parent / "configs" / "method"
_FAR = 3.0  # times the highest usual learning rate of a model, or the lowest by it


def take_steps(run: Any) -> list[str]:
    """Train for a few steps at the full learning rate, and say what the run needs and whether its numbers look right."""
    entries: list[dict[str, float]] = []
    ends: list[float] = []

    def on_step(entry: dict[str, float]) -> None:
        entries.append(entry)
        ends.append(time.perf_counter())

    settings, every = run.settings, run.settings.regularize_every
    steps = max(_STEPS, every + 1 if every <= _LONGEST else 0)
    tried = dataclasses.replace(settings, steps=max(steps, settings.steps), warmup_steps=0, average_every=None)
    run.train(tried, until=steps, on_step=on_step)
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    lines = [f"{settings.steps:,} steps of {duration_text(seconds)}: {duration_text(settings.steps * seconds)} without evaluation"]
    lines.append(f"peak memory so far {size_text(_peak(run.accelerator))} of {run.accelerator.device}")
    told = f"loss {entries[0]['loss']:.3g} -> {entries[-1]['loss']:.3g}"
    if (ratio := _ratio(entries, every)) is not None:
        told += f", gradient ratio {ratio:.2g}"
    lines.append(f"first {steps} steps, at the full learning rate: {told}")
    lines += advice(entries, every, trains=run.config.train.learning_rate) + unusual_weights(run.config)
    if not run.config.evaluation and run.config.probe is None:
        lines.append("! no evaluation and no probe: nothing will say what is learned and what is forgotten")
    return lines


def advice(entries: Sequence[Mapping[str, float]], every: int, *, trains: float) -> list[str]:
    """What to do where the first steps show that a learning rate or weight is out of range.

    Args:
        entries: records of the first steps.
        every: of how many steps one has the regularizer.
        trains: the learning rate.
    """
    lines = []
    highest = max(entry["loss"] for entry in entries)
    if highest > _RISE * entries[0]["loss"] + 0.1:
        lines.append(f"! the loss rose to {highest:.3g} within {len(entries)} steps: lower train.learning_rate, which is {trains:g}")
    ratio = _ratio(entries, every)
    if ratio is not None and ratio < LOW:
        lines.append(
            f"! the gradient ratio of {ratio:.2g} is near 0, so that the method's terms do next to nothing: raise their weights, or the "
            f"learning rate, which is {trains:g}"
        )
    if ratio is not None and ratio > HIGH:
        lines.append(
            f"! the gradient ratio of {ratio:.2g} is far above 1, so that next to nothing is learned of the target: lower the weights of "
            f"the method's terms, or the learning rate, which is {trains:g}"
        )
    return lines


def _ratio(entries: Sequence[Mapping[str, float]], every: int) -> float | None:
    """The gradient ratio of the last regularized step, a mean over all steps; None where that is the first alone, or not defined."""
    known = [entry["gradient_ratio"] / every for entry in entries[every::every] if "gradient_ratio" in entry]
    return known[-1] if known and known[-1] == known[-1] else None


def unusual_weights(config: Config) -> list[str]:
    """What to do where a term weighs far more or less than in the methods that come with geomreg.

    A term whose weight is too low shows it late: the gradient of most is 0 where student and teacher are equal.
    """
    usual: dict[str, list[float]] = {}
    for file in sorted(_METHODS.glob("*.yaml")):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["method"].get("terms", {}).values():
            usual.setdefault(entry["term"], []).append(float(entry["weight"]))
    lines = []
    for name, term in {**config.method.terms, **config.method.target_terms}.items():
        known = usual.get(term.term, [])
        if known and term.weight and term.options.get("normalize", True):
            told = " to ".join(f"{value:g}" for value in sorted({min(known), max(known)}))
            if term.weight * _FAR_OFF <= min(known):
                lines.append(
                    f"! the weight {term.weight:g} of {name} is far below what is usual for {term.term}, {told}: little will be kept"
                )
            if term.weight >= _FAR_OFF * max(known):
                lines.append(
                    f"! the weight {term.weight:g} of {name} is far above what is usual for {term.term}, {told}: little will be learned"
                )
    return lines


def base_lines(scores: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> list[str]:
    """The base model's accuracy on each evaluation, with its number of samples and a 95 % interval.

    Args:
        scores: what :func:`~geomreg.integrations.recipes.evaluate.evaluate` returns, by the evaluation's name.
        sizes: samples of each evaluation.
    """
    lines = []
    for name, found in scores.items():
        count = int(found["samples"])
        low, high = interval(round(count * found["accuracy"] / 100), count)
        of = f"{count:,} samples" if count + found["broken"] >= sizes[name] else f"a random {count:,} of {sizes[name]:,} samples"
        told = f"{name}: {found['accuracy']:.1f} % of {of} ({100 * low:.1f} to {100 * high:.1f} % with 95 % confidence)"
        lines.append(told + (f", {found['broken']:,.0f} broken" if found["broken"] else ""))
    return lines


def check_learning_rate(config: Config) -> None:
    """Warn of one that is far from what is usual for the model."""
    usual, rate = config.model.learning_rates, config.train.learning_rate
    if usual is not None and rate < usual[0] / _FAR:
        warnings.warn(
            f"finetune: the learning rate {rate:g} is far below what is usual for {config.model.name}, {usual[0]:g} to {usual[1]:g}. "
            "Expect little to be learned; raise train.learning_rate.",
            stacklevel=4,
        )
    if usual is not None and rate > _FAR * usual[1]:
        warnings.warn(
            f"finetune: the learning rate {rate:g} is far above what is usual for {config.model.name}, {usual[0]:g} to {usual[1]:g}. "
            "CLIP models forget fast: expect a loss of zero-shot accuracy that no regularizer mends.",
            stacklevel=4,
        )


def check_batches(config: Config) -> None:
    """Warn where a contrastive loss, which compares the pairs of a batch with each other, has one pair."""
    sizes = {"train.batch_size": config.train.batch_size} if config.method.loss == "contrastive" else {}
    if any(term.term == "ContrastiveReplay" for term in config.method.terms.values()):
        sizes["train.reference_batch_size"] = config.train.reference_batch_size or config.train.batch_size
    for option, size in sizes.items():
        if size == 1:
            warnings.warn(
                f"finetune: a contrastive loss of one pair compares it with no other: it is 0 whatever the model does, or without a "
                f"negative. Raise {option}, which is 1.",
                stacklevel=4,
            )


def _peak(accelerator: Any) -> float:
    """Bytes of a GPU, or of this process."""
    if accelerator.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))

"""What a run is: a tree of typed values, from YAML files and dotted options."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geomreg.checks import check_count, check_weight
from geomreg.integrations.recipes.data import CocoCaptions, CsvPairs, Flickr8k, FMoW, IWildCam, LabelledFolder, TarPairs
from geomreg.integrations.recipes.models import ModelConfig

__all__ = ["READERS", "Config", "DataConfig", "MethodConfig", "TermConfig", "TrainConfig", "check_options"]

READERS: dict[str, type[Any]] = {
    "csv": CsvPairs,
    "folder": LabelledFolder,
    "tar": TarPairs,
    "coco": CocoCaptions,
    "flickr8k": Flickr8k,
    "iwildcam": IWildCam,
    "fmow": FMoW,
}
_OURS = ("transform", "tokenizer", "modalities")  # what a run decides itself


@dataclass(frozen=True)
class DataConfig:
    """A data set on the disk.

    Attributes:
        kind: of files: ``csv`` (CSV or TSV of pairs), ``folder`` (a folder for each class), ``tar`` (WebDataset shards), ``coco``,
            ``flickr8k``, ``iwildcam``, ``fmow`` (WILDS).
        path: of the file or folder, or a pattern of shards.
        options: of the reader, by name; see its class in :mod:`geomreg.integrations.recipes.data`.
    """

    kind: Literal["csv", "folder", "tar", "coco", "flickr8k", "iwildcam", "fmow"]
    path: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(f"options of {self.kind}", self.options, READERS[self.kind], _OURS)


@dataclass(frozen=True)
class TermConfig:
    """One regularizer.

    Attributes:
        term: name of its class in :mod:`geomreg`.
        weight: in the sum.
        options: of its constructor.
    """

    term: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weight(self.term, "weight", self.weight)


@dataclass(frozen=True)
class MethodConfig:
    """What is kept, and how.

    Attributes:
        name: of the method, for the records.
        terms: on the reference pairs; none: no reference data are needed.
        target_terms: on the target pairs, beside their contrastive loss.
        teacher: ``frozen`` copy of the model, ``adapters_off`` (with LoRA), ``averaged``, or ``cached`` (needs ``cache``).
        teacher_decay: of an averaged teacher.
        cache: folder of a cache of the reference data, by ``geomreg embed``.
    """

    name: str = "flyp"
    terms: dict[str, TermConfig] = field(default_factory=dict)
    target_terms: dict[str, TermConfig] = field(default_factory=dict)
    teacher: Literal["frozen", "adapters_off", "averaged", "cached"] = "frozen"
    teacher_decay: float = 0.999
    cache: Path | None = None

    def __post_init__(self) -> None:
        if both := self.terms.keys() & self.target_terms.keys():
            raise ValueError(
                f"MethodConfig: expected terms and target_terms of different names, got {sorted(both)[0]!r} twice. Rename one."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation; the defaults are FLYP's on ImageNet (arXiv 2212.00638).

    Attributes:
        epochs: over the target data; or give ``steps``.
        steps: optimizer steps, instead of ``epochs``.
        batch_size: target pairs a step, of all processes together.
        reference_batch_size: reference pairs a step, of all processes together; None: as many.
        learning_rate: peak.
        weight_decay: on every parameter.
        warmup_steps: linear.
        betas: of AdamW.
        clip_norm: largest gradient norm.
        chunk_size: samples of a process whose activations are held at a time; None: all.
        unique_texts: encode each different caption of a target batch once.
        regularize_every: the regularizer on every so many steps, with so many times its weight.
        precision: ``no`` (fp32), ``bf16`` or ``fp16`` autocast.
        crop: scale of the random crops of target images; reference images are seen by the evaluation transform.
        seed: of order, crops, templates and dropout.
        workers: processes that load samples, for each of the two data sets.
        save_every: optimizer steps between checkpoints.
        evaluate_every: optimizer steps between evaluations; None: at the end alone.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 512
    reference_batch_size: int | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 500
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    chunk_size: int | None = None
    unique_texts: bool = False
    regularize_every: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    crop: tuple[float, float] = (0.9, 1.0)
    seed: int = 0
    workers: int = 4
    save_every: int = 500
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            got = "neither" if self.epochs is None else "both"
            raise ValueError(f"TrainConfig: expected epochs or steps, got {got}. Set one of train.epochs and train.steps.")
        for option in ("epochs", "steps", "reference_batch_size", "evaluate_every"):
            if getattr(self, option) is not None:
                check_count("TrainConfig", option, getattr(self, option), 1)
        for option, least in (("batch_size", 1), ("save_every", 1), ("seed", 0), ("workers", 0)):
            check_count("TrainConfig", option, getattr(self, option), least)


@dataclass(frozen=True)
class Config:
    """A run of ``geomreg finetune``.

    Attributes:
        model: what is trained.
        target: labelled images or image-text pairs to learn.
        train: optimisation.
        output: folder of the run; one that is there goes on.
        method: what is kept.
        reference: generic pairs whose geometry should stay, if the method has terms.
        evaluation: labelled data sets by name, whose zero-shot accuracy is written to evaluation.jsonl.
        best: the one of them by which the best model so far is kept in the folder ``best``.
        device: ``auto`` takes a GPU if there is one; or ``cpu``.
        dry_run: load everything and take a few steps, write nothing.
    """

    model: ModelConfig
    target: DataConfig
    train: TrainConfig
    output: Path
    method: MethodConfig = field(default_factory=MethodConfig)
    reference: DataConfig | None = None
    evaluation: dict[str, DataConfig] = field(default_factory=dict)
    best: str | None = None
    device: Literal["auto", "cpu"] = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if bool(self.method.terms) != (self.reference is not None):
            got = "terms without reference data" if self.method.terms else "reference data without terms"
            raise ValueError(f"Config: expected reference data for the method's terms, got {got} ({self.method.name}). Set both or none.")
        if (self.method.teacher == "cached") != (self.method.cache is not None):
            raise ValueError("Config: expected method.cache with method.teacher=cached, got one without the other. Set both or none.")
        for name, data in self.evaluation.items():
            if "templates" not in inspect.signature(READERS[data.kind]).parameters:
                raise ValueError(
                    f"Config: expected labelled data for the evaluation {name}, got {data.kind}. Use folder, iwildcam or fmow."
                )
        if self.best is not None and self.best not in self.evaluation:
            known = ", ".join(self.evaluation) or "none"
            raise ValueError(f"Config: expected best as the name of an evaluation, got {self.best!r}. There are {known}.")
        if self.method.teacher == "adapters_off" and self.model.lora is None:
            raise ValueError("Config: expected model.lora with method.teacher=adapters_off, got none. Set it, or use teacher=frozen.")


def check_options(name: str, options: Mapping[str, Any], owner: type[Any], reserved: tuple[str, ...] = ()) -> None:
    """Names of keyword arguments that the constructor has, and that are not the caller's own."""
    known = [key for key in inspect.signature(owner).parameters if key not in reserved]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known[1:])}."
            raise ValueError(f"{name}: expected options of {owner.__name__}, got {key!r}. {hint}")

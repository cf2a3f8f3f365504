"""What a run is: a tree of typed values, from YAML files and dotted options."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geomreg.checks import check_count, check_fraction, check_positive, check_weight
from geomreg.integrations.recipes.data import (
    CocoCaptions,
    CsvPairs,
    Flickr8k,
    FMoW,
    ImageNet,
    IWildCam,
    LabelledFolder,
    RandomTexts,
    TarPairs,
)
from geomreg.integrations.recipes.data.rgb import ImageConfig
from geomreg.integrations.recipes.models import ModelConfig
from geomreg.integrations.recipes.option_types import check_names, typed
from geomreg.integrations.recipes.train import RECORDED

__all__ = ["READERS", "Config", "DataConfig", "MethodConfig", "MonitorConfig", "TermConfig", "TrainConfig", "check_options"]

READERS: dict[str, type[Any]] = {
    "csv": CsvPairs,
    "folder": LabelledFolder,
    "imagenet": ImageNet,
    "tar": TarPairs,
    "coco": CocoCaptions,
    "flickr8k": Flickr8k,
    "iwildcam": IWildCam,
    "fmow": FMoW,
}
LABELLED = tuple(kind for kind, reader in READERS.items() if "templates" in inspect.signature(reader).parameters)
_OURS = ("transform", "tokenizer", "modalities")  # what a run decides itself


@dataclass(frozen=True)
class DataConfig:
    """A data set on the disk.

    Attributes:
        kind: of files: ``csv`` (CSV or TSV of pairs), ``folder`` (a folder for each class), ``imagenet`` (the same, with its class
            names and templates), ``tar`` (WebDataset shards), ``coco``, ``flickr8k``, ``iwildcam``, ``fmow`` (WILDS). Without files:
            ``target``, the target's own images and texts as reference, and ``random_texts``, random tokens.
        path: of the file or folder, or a pattern of shards. Image paths in files of pairs are taken as written and may lead out of their
            folder, see the readers; members of shards may not.
        options: of the reader, by name; see its class in :mod:`geomreg.integrations.recipes.data`.
        modalities: of reference data: ``[image]`` or ``[text]`` alone where the method's terms need no more; by default all there are.
        subset: file of ids, one a line, by ``geomreg retrieve`` say: only these samples.
        captions: CSV or TSV file with a generated caption for each target image, for a method with ``caption_weight``.
    """

    kind: Literal["csv", "folder", "imagenet", "tar", "coco", "flickr8k", "iwildcam", "fmow", "target", "random_texts"]
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[Literal["image", "text"], ...] | None = None
    subset: Path | None = None
    captions: Path | None = None

    def __post_init__(self) -> None:
        if (self.kind in READERS) != bool(self.path):
            raise ValueError(f"DataConfig: expected a path for files and none without, got {self.path!r} for {self.kind}. Mend one.")
        if self.kind == "target" and (self.options or self.subset or self.captions):
            raise ValueError("DataConfig: expected kind target with its modalities alone, got more. The rest is the target's.")
        if self.kind == "random_texts" and self.modalities not in (None, ("text",)):
            raise ValueError(f"DataConfig: expected random_texts with modalities [text], got {list(self.modalities or ())}.")
        reader = READERS.get(self.kind, RandomTexts)
        name, reserved = f"options of {self.kind}", (next(iter(inspect.signature(reader).parameters)), *_OURS)
        object.__setattr__(self, "options", check_options(name, self.options, reader, reserved))


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
    """What is learned from the target, and what is kept, and how.

    Attributes:
        name: of the method, for the records.
        terms: on the reference data; none: no reference data are needed.
        target_terms: on the target batch, beside its loss, which is embedded in training mode; with ``classification`` on its images alone.
        loss: on the target: ``contrastive`` of images and texts (FLYP; SigLIP's for a model with a logit bias), or ``classification``.
        head: of a classification: ``zero_shot``, linear, trained, from the class texts' embeddings; ``linear_probe``, likewise, but
            from a logistic regression on the frozen model (LP-FT); ``text_encoder``, the texts of all classes, encoded in every step
            (ZSCL). The first two train neither text tower nor logit scale.
        label_smoothing: of a classification.
        caption_weight: of the contrastive loss between target images and their generated captions (ARF; needs ``target.captions``).
        bank: of texts, for terms that take one: ``texts``, other captions at each step, or ``contexts``, each of the target's templates
            averaged over its classes (CAR-FT); if it has only one, five of CLIP's.
        bank_size: texts of a bank; None: as many as reference samples.
        teacher: ``frozen`` copy of the model, ``adapters_off`` (with LoRA), ``averaged``, or ``cached`` (needs ``cache``).
        teacher_decay: of an averaged teacher.
        cache: folder of a cache of the reference data, by ``geomreg embed``, of the same samples, templates and captions. With it each
            labelled reference sample keeps one text, that of the cache, where other teachers see a random template at each draw.
    """

    name: str = "flyp"
    terms: dict[str, TermConfig] = field(default_factory=dict)
    target_terms: dict[str, TermConfig] = field(default_factory=dict)
    loss: Literal["contrastive", "classification"] = "contrastive"
    head: Literal["zero_shot", "linear_probe", "text_encoder"] = "zero_shot"
    label_smoothing: float = 0.0
    caption_weight: float = 0.0
    bank: Literal["texts", "contexts"] = "texts"
    bank_size: int | None = None
    teacher: Literal["frozen", "adapters_off", "averaged", "cached"] = "frozen"
    teacher_decay: float = 0.999
    cache: Path | None = None

    def __post_init__(self) -> None:
        check_names("a term", (*self.terms, *self.target_terms))
        if both := self.terms.keys() & self.target_terms.keys():
            raise ValueError(
                f"MethodConfig: expected terms and target_terms of different names, got {sorted(both)[0]!r} twice. Rename one."
            )
        for name in (*self.terms, *self.target_terms):
            if name in RECORDED or not name.isidentifier():
                raise ValueError(
                    f"MethodConfig: expected a name for a term that is an identifier and none of the records' own ({', '.join(RECORDED)}), "
                    f"got {name!r}. Rename it."
                )
        check_fraction("MethodConfig", "label_smoothing", self.label_smoothing)
        check_weight("MethodConfig", "caption_weight", self.caption_weight)
        if self.bank_size is not None:
            check_count("MethodConfig", "bank_size", self.bank_size, 1)
        for option, beside, acts in (
            ("teacher_decay", "teacher", self.teacher == "averaged"),
            ("bank_size", "bank", self.bank == "texts"),
            ("head", "loss", self.loss == "classification"),
        ):
            if not acts and (value := getattr(self, option)) != getattr(MethodConfig, option):
                raise ValueError(f"MethodConfig: expected no {option} with {beside}={getattr(self, beside)}, got {value}. Leave it out.")
        other = {"contrastive": ("label_smoothing",), "classification": ("caption_weight",)}[self.loss]
        for option in other:
            if getattr(self, option):
                raise ValueError(f"MethodConfig: expected no {option} with loss={self.loss}, got {getattr(self, option)}. Leave it out.")

    @property
    def trains_head(self) -> bool:
        """Whether there is a linear head, and no text in the target loss."""
        return self.loss == "classification" and self.head != "text_encoder"


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
        average_every: end with the mean of the weights at the start and after each so many steps (ZSCL); None: with the last.
        compile: the towers' blocks by ``torch.compile``.
        precision: ``no`` (fp32), ``bf16`` or ``fp16`` autocast.
        shard: several processes share weights, gradients and optimizer state (FSDP2) instead of each holding all (DDP); not for fp16.
        crop: scale of the random crops of target images; reference images are seen by the evaluation transform.
        seed: of order, crops, templates and dropout.
        workers: processes that load samples, for each of the two data sets.
        save_every: optimizer steps between checkpoints.
        evaluate_every: optimizer steps between evaluations; None: at the start and the end alone.
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
    average_every: int | None = None
    compile: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    shard: bool = False
    crop: tuple[float, float] = (0.9, 1.0)
    seed: int = 0
    workers: int = 4
    save_every: int = 500
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            got, hint = "both", "Set one to null; beside a file with epochs: --train.epochs null"
            if self.epochs is None:
                got, hint = "neither", "Set one of train.epochs and train.steps"
            raise ValueError(f"TrainConfig: expected epochs or steps, got {got}. {hint}.")
        for option in ("epochs", "steps", "reference_batch_size", "evaluate_every"):
            if getattr(self, option) is not None:
                check_count("TrainConfig", option, getattr(self, option), 1)
        for option, least in (("batch_size", 1), ("warmup_steps", 0), ("save_every", 1), ("seed", 0), ("workers", 0)):
            check_count("TrainConfig", option, getattr(self, option), least)
        for option in ("learning_rate", "weight_decay"):
            check_weight("TrainConfig", option, getattr(self, option))
        if self.clip_norm is not None:
            check_positive("TrainConfig", "clip_norm", self.clip_norm)
        for value in self.betas:
            check_fraction("TrainConfig", "betas", value, below_one=True)
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"TrainConfig: expected crop as two shares of the area in (0, 1], ascending, got {list(self.crop)}. Mend it.")


@dataclass(frozen=True)
class MonitorConfig:
    """How a run is watched.

    Attributes:
        samples: of the probe, at most.
        every: optimizer steps between measurements.
        max_zero_shot_drop: points of zero-shot accuracy on the probe below that of the start.
        min_rsa: least RSA of the probe's images, and of the reference's.
        stop: end the run after the step that follows an alarm; otherwise it is only said.
    """

    samples: int = 512
    every: int = 400
    max_zero_shot_drop: float | None = None
    min_rsa: float | None = None
    stop: bool = True

    def __post_init__(self) -> None:
        check_count("MonitorConfig", "samples", self.samples, 3)
        check_count("MonitorConfig", "every", self.every, 1)


@dataclass(frozen=True)
class Config:
    """A run of ``geomreg finetune``.

    Attributes:
        model: what is trained.
        target: labelled images or image-text pairs to learn; for a classification, each different caption of a CSV file is a class.
        train: optimisation.
        output: folder of the run; one that is there goes on.
        method: what is kept.
        reference: generic pairs whose geometry should stay, if the method has terms.
        texts: captions for a bank of texts, if a term takes one; by default those of the reference data.
        evaluation: labelled data sets by name, whose accuracy is written to evaluation.jsonl: zero-shot, but by a trained head where all
            classes are among the target's, by their names; with a head, ``by`` says which.
        best: the one of them by which the best model so far is kept in the folder ``best``: validation data of the target.
        best_by: number of that evaluation.
        ensemble: share of the trained weights in a mixture with those at the start, kept in the folder ``ensemble`` (WiSE-FT); None: none.
            Its batch normalisations have running statistics of its own, from the target batches of the first hundred steps.
        transformers: write the final model in the folder ``transformers`` too, with processor and tokenizer; CLIP with a plain ViT alone.
        probe: labelled data that have nothing to do with the target, to watch what is forgotten while the run goes on (drift.jsonl).
        monitor: how, and when to stop.
        trackers: further logs beside metrics.jsonl.
        images: how the image files of all these data are read: orientation, transparency, more than 8 bits.
        strict: a broken sample, one whose image cannot be loaded or whose caption is empty, is an error, instead of being replaced by
            another, counted and listed.
        device: ``auto`` takes a GPU if there is one; or ``cpu``.
        dry_run: load everything, look at the data, evaluate the base model and take a few steps, write nothing.
    """

    model: ModelConfig
    target: DataConfig
    train: TrainConfig
    output: Path
    method: MethodConfig = field(default_factory=MethodConfig)
    reference: DataConfig | None = None
    texts: DataConfig | None = None
    evaluation: dict[str, DataConfig] = field(default_factory=dict)
    best: str | None = None
    best_by: Literal["accuracy", "class_average", "macro_f1", "worst_group"] = "accuracy"
    ensemble: float | None = 0.5
    transformers: bool = False
    probe: DataConfig | None = None
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    images: ImageConfig = field(default_factory=ImageConfig)
    strict: bool = False
    device: Literal["auto", "cpu"] = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if bool(self.method.terms) != (self.reference is not None):
            got = "terms without reference data" if self.method.terms else "reference data without terms"
            raise ValueError(f"Config: expected reference data for the method's terms, got {got} ({self.method.name}). Set both or none.")
        if (self.method.teacher == "cached") != (self.method.cache is not None):
            raise ValueError("Config: expected method.cache with method.teacher=cached, got one without the other. Set both or none.")
        check_names("an evaluation", self.evaluation)
        uses = {f"the evaluation {name}": data for name, data in self.evaluation.items()}
        if self.probe is not None:
            uses["the probe"] = self.probe
        for name, data in uses.items():
            if data.kind not in LABELLED:
                raise ValueError(f"Config: expected labelled data for {name}, got {data.kind}. Use {', '.join(LABELLED)}.")
        if self.method.loss == "classification" and self.target.kind not in (known := (*LABELLED, "csv")):
            raise ValueError(f"Config: expected classes as target of {self.method.name}, got {self.target.kind}. Use {', '.join(known)}.")
        _check_unused(self)
        if self.target.kind not in READERS:
            raise ValueError(f"Config: expected files as target, got {self.target.kind}. Use one of {', '.join(READERS)}.")
        if bool(self.method.caption_weight) != (self.target.captions is not None):
            raise ValueError("Config: expected target.captions with method.caption_weight, got one without the other. Set both or none.")
        if self.probe is None and self.monitor != MonitorConfig():
            raise ValueError("Config: expected a probe for the options of monitor, got none. Set probe, or leave them out.")
        if self.ensemble is not None:
            check_fraction("Config", "ensemble", self.ensemble)
        if self.best is not None and self.best not in self.evaluation:
            known = ", ".join(self.evaluation) or "none"
            raise ValueError(f"Config: expected best as the name of an evaluation, got {self.best!r}. There are {known}.")
        if self.method.teacher == "adapters_off" and self.model.lora is None:
            raise ValueError("Config: expected model.lora with method.teacher=adapters_off, got none. Set it, or use teacher=frozen.")
        if self.method.teacher == "adapters_off" and self.model.logit_scale == "trained" and not self.method.trains_head:
            raise ValueError("Config: expected model.logit_scale=frozen with method.teacher=adapters_off, got trained. Set it.")


def _check_unused(config: Config) -> None:
    """No option that nothing would look at."""
    method, references = config.method, config.reference is not None
    banks = config.texts is not None and method.bank_size is None  # have the size of a reference batch
    for option, needed, acts in (
        ("train.reference_batch_size", "reference data", references or banks),
        ("train.regularize_every", "terms on reference data", references),
        ("train.unique_texts", "a target loss with texts", not method.trains_head),
        ("model.max_logit_scale", "a trained logit scale", not method.trains_head),
    ):
        part, _, name = option.partition(".")
        owner = getattr(config, part)
        if not acts and (value := getattr(owner, name)) != getattr(type(owner), name):
            raise ValueError(f"Config: expected {needed} for {option}={value}, got none in {method.name}. Set it to its default.")
    if config.texts is not None and method.bank == "contexts":
        raise ValueError("Config: expected no texts with method.bank=contexts, which come from the target, got some. Leave them out.")
    others = {"reference": config.reference, "texts": config.texts, "probe": config.probe}
    others |= {f"evaluation.{name}": data for name, data in config.evaluation.items()}
    for name, data in {"target": config.target, **others}.items():
        if data is not None and data.modalities is not None and name not in ("reference", "texts"):
            raise ValueError(f"Config: expected modalities of reference data alone, got {name}.modalities. Leave it out.")
        if data is not None and data.captions is not None and name != "target":
            raise ValueError(f"Config: expected captions of the target alone, got {name}.captions. Leave it out.")


def check_options(name: str, options: Mapping[str, Any], owner: type[Any], reserved: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keyword arguments that the constructor has, of the types that it takes, all that it needs, and none that are the caller's own."""
    known = {key: parameter for key, parameter in inspect.signature(owner).parameters.items() if key not in reserved}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known) or 'none'}."
            raise ValueError(f"{name}: expected options of {owner.__name__}, got {key!r}. {hint}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(
                f"{name}: expected the option {key} of {owner.__name__}, got none. Set options.{key} (--target.options.{key} for a target)."
            )
    return typed(name, options, owner)

"""``geomreg finetune``: a run from its configuration to an exported model."""

import copy
import dataclasses
import difflib
import inspect
import math
import os
import signal
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn

import geomreg
from geomreg.cache import EmbeddingCache
from geomreg.compose import WeightedSum
from geomreg.integrations.recipes import checkpoint
from geomreg.integrations.recipes.cached import check_cached
from geomreg.integrations.recipes.config import LABELLED, READERS, Config, DataConfig, MethodConfig, TermConfig, check_options
from geomreg.integrations.recipes.ensemble import EnsembleOptions, collect_statistics, ensemble
from geomreg.integrations.recipes.evaluate import evaluate
from geomreg.integrations.recipes.export import check_plain, to_open_clip, to_transformers
from geomreg.integrations.recipes.facts import check_broken, facts_of, print_table, table_of
from geomreg.integrations.recipes.head import NAME, attach_head, linear_probe, load_head, take_head, zero_shot_classifier
from geomreg.integrations.recipes.identity import Identity, digest_of_weights
from geomreg.integrations.recipes.losses import Contrastive, HeadClassification, TargetLoss, TextClassification
from geomreg.integrations.recipes.models import Model, clamp_logit_scale, compile_blocks, freeze, freeze_unreached, load, merge_adapters
from geomreg.integrations.recipes.monitor import RunMonitor
from geomreg.integrations.recipes.passes import ON_PARAMETERS
from geomreg.integrations.recipes.records import NOT_FINITE, Log, as_json, check_folder, check_trackers, claim, described, release
from geomreg.integrations.recipes.shard import Sharded, check_launch
from geomreg.integrations.recipes.streams import (
    CONTEXTS,
    Stream,
    bank_of_contexts,
    bank_of_texts,
    class_tokens,
    data_of,
    drawn_by_all,
    print_conversions,
    read,
)
from geomreg.integrations.recipes.train import (
    OF_STATISTICS,
    Banks,
    Checkpoints,
    NotFiniteError,
    RunStoppedError,
    Settings,
    encode,
    finetune,
)
from geomreg.integrations.recipes.trial import LIMIT, base_lines, check_batches, check_learning_rate, take_steps
from geomreg.integrations.recipes.waiting import alone, together
from geomreg.shards import write_file
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["check_needs", "finetune_from", "regularizer_of"]

# Of a collective. Where one process works alone the others do not wait in one (waiting.alone), and who is gone ends all (waiting.together):
# it is left for processes that load models and data, or make the slowest of steps, at different speeds, and for one that hangs alive.
WAIT = timedelta(minutes=30)
ADVICE = "Start the same command again on all: it goes on from the last checkpoint."  # where a process was killed
_SIZES = {"target": "train.batch_size", "reference": "train.reference_batch_size", "texts": "method.bank_size"}  # of batches


def finetune_from(config: Config) -> Path:
    """Fine-tune a CLIP model as configured; an interrupted run with the same configuration goes on. Returns the exported model's folder.

    A dry run loads everything, evaluates the base model, takes a few steps, says what it found in the data, how long the run will be and
    what it needs, and writes nothing. Where so many samples are broken that the run would be stopped, it raises as the run does.

    The run's folder holds config.json (resolved), environment.json, data.json (digests of the data), metrics.jsonl, evaluation.jsonl,
    checkpoints, drift.jsonl if there is a probe, broken.txt if samples could not be read, and in open_clip's layout, adapters merged, the
    final model in ``model``, the best in ``best`` and the mixture with the model at the start in ``ensemble``; a trained head is beside the
    weights, in head.safetensors and classes.json, and checksums of all files in checksums.json. If asked for, ``transformers`` holds the
    final model for its CLIPModel. In the .jsonl files null stands for a number that is not finite.

    Of several processes one that fails or is killed ends the others within seconds, by an error with what happened; one that is in a
    collective which it cannot leave, of NCCL say, is ended by :func:`os._exit`.

    Raises:
        ValueError: a configuration that does not fit together or another one than that of the run in this folder.
        RuntimeError: a loss that is not finite; too many broken samples; another command at work in the folder; another process of
            this run failed or was killed.
        OSError: no space to write to.
    """
    try:
        check_trackers(config.trackers)
        accelerator = _accelerator(config)
        with together(accelerator, "finetune", ADVICE):
            return _finetune_from(config, accelerator)
    finally:
        release()


def _accelerator(config: Config) -> Accelerator:
    return Accelerator(
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),  # accelerate joins processes on a CPU only when told so
        mixed_precision=config.train.precision,
        log_with=list(config.trackers) if config.trackers and not config.dry_run else None,
        project_dir=str(config.output),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )


def _finetune_from(config: Config, accelerator: Accelerator) -> Path:
    check_launch(accelerator)
    if not config.dry_run:
        check_folder(config)  # before the costly parts
    set_seed(config.train.seed)  # adapters start at random
    run = _Run(config, accelerator)
    evaluation = _Evaluation(run)
    monitor = _monitor(run)
    watched = _watched(evaluation, monitor)
    data = {**{name: stream.dataset for name, stream in run.streams.items()}, **watched}
    if config.dry_run:
        _try(run, evaluation, monitor)
        print_conversions(data, accelerator)
        return config.output
    run.try_samples()
    facts = facts_of(run.streams, watched, run.loaded.tokenizer, load=False)
    check_broken(facts, run.streams, run.settings.steps)
    claim(config, accelerator, data)
    log = Log(config, run.settings.steps, accelerator)
    kept = Checkpoints(run.checkpoints, config.train.save_every)
    identity = Identity(config.output, {**run.made_of, **{f"data set {name}": one for name, one in described(data).items()}})
    also = {"identity": identity, "log": log, "evaluation": evaluation, **run.streams} | ({} if monitor is None else {"monitor": monitor})

    def on_step(entry: dict[str, float]) -> None:
        log.add(entry)
        if monitor is not None:
            monitor.after(entry)
        evaluation.after(int(entry["step"]))
        for stream in run.streams.values():
            stream.check_broken(config.output)

    with _asked_to_stop() as stop:
        try:
            evaluation.before()
            run.train(
                run.settings,
                checkpoints=kept,
                also=also,
                on_step=on_step,
                on_reference=None if monitor is None else monitor.monitor.update,
                should_stop=lambda: stop.is_set() or (monitor is not None and monitor.stopped),
                until=lambda done: None if monitor is None or monitor.last_step is None or done < monitor.last_step else done,
            )
        except RunStoppedError as error:
            if monitor is None or monitor.last_step is None or error.step < monitor.last_step:  # the same on every process
                raise
            run.train(run.settings, checkpoints=kept, also=also, until=monitor.last_step)
        except NotFiniteError as error:
            if accelerator.is_main_process:
                write_file(config.output / NOT_FINITE, f"{error}\n".encode())
            raise
        finally:
            log.end()
    if monitor is not None and (ended := monitor.last_step) is not None and ended < run.settings.steps:
        evaluation.after(ended, last=True)  # also where the run was killed before it
    drawn = drawn_by_all(run.streams, accelerator)
    with alone(accelerator) as main:
        if main:
            run.export(config.output / "model")
            if config.transformers:
                tuned = merge_adapters(copy.deepcopy(run.model))
                to_transformers(tuned, run.loaded.config, config.output / "transformers", tokenizer=run.loaded.tokenizer)
            mixture = None
            if config.ensemble is not None:
                folders = (config.output / "model", config.output / "ensemble")
                options = EnsembleOptions(config.model.name, *folders, config.model.pretrained, (config.ensemble,), overwrite=True)
                (mixture,) = ensemble(options, run.collect_statistics)
            print_table(table_of(facts, drawn))
            evaluation.report(mixture)
    print_conversions(data, accelerator)
    if accelerator.is_main_process:
        print(config.output / "model")
    accelerator.wait_for_everyone()
    return config.output / "model"


class _Run:
    """Everything that a configuration says, built. The order matters: the teacher is a copy of the model as it comes; terms look at what
    is frozen and adapted; a head is no part of teacher and terms; shards are cut when all parameters are there."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.checkpoints = config.output / "checkpoints"
        check_learning_rate(config)
        check_batches(config)
        given = config.model
        self.loaded = load(given.name, given.pretrained, crop=config.train.crop, images=config.images, preprocess=given.preprocess)
        self.model = self.loaded.model
        self.made_of: dict[str, Any] = {"weights": digest_of_weights(self.model), "configuration of the model": self.loaded.config}
        if config.transformers:
            check_plain(self.model, self.loaded.config, self.loaded.tokenizer)
        self._build_teacher_and_terms()
        self._build_streams()
        self._build_bank()
        self.settings = self._settings()
        self.loss, self.start = self._loss(config.method)
        self.sharded = None
        if config.train.shard and accelerator.num_processes > 1:
            self.model.cpu()  # the whole model stays there beside the shards
            self.sharded = Sharded(self.model, accelerator, (self.regularizer, self.target_regularizer))
        if config.train.compile:
            compile_blocks(self.model if self.sharded is None else self.sharded.model)
            if self.teacher is not None and config.method.teacher == "frozen":
                compile_blocks(self.teacher.model)

    def _build_teacher_and_terms(self) -> None:
        """Also freezes, and adds adapters."""
        config, method, model = self.config, self.config.method, self.model
        described = (method.terms, method.target_terms)
        teacher = Teacher(model, encode) if any(described) and method.teacher == "frozen" else None
        if method.trains_head:
            freeze(model, dataclasses.replace(config.model, frozen=(*config.model.frozen, "text"), logit_scale="frozen"))
        else:
            freeze(model, config.model)
        if names := freeze_unreached(self.loaded):
            towers = ", ".join(dict.fromkeys(name.rpartition(".")[0].split(".resblocks")[0] or name for name in names))
            warnings.warn(f"finetune: {len(names)} parameters on which no embedding depends are not trained ({towers}).", stacklevel=4)
        if any(described) and teacher is None:
            teacher = _teacher(config, self.loaded)
        self.regularizer, self.target_regularizer = (regularizer_of(terms, model) if terms else None for terms in described)
        both = [one for one in (self.regularizer, self.target_regularizer) if one is not None]
        self.banked = any("texts" in one.inputs for one in both)
        on_target = self.target_regularizer is not None and self.target_regularizer.needs_teacher
        if method.teacher == "cached" and (self.banked or on_target):
            what = "embeds a bank of texts" if self.banked else "sees the augmented target pairs"
            raise ValueError(f"finetune: expected a teacher that {what}, got a cached one. Use teacher=frozen.")
        if isinstance(cache := getattr(teacher, "cache", None), EmbeddingCache):
            self.made_of["cache of the teacher"] = cache.fingerprint
        self.teacher = teacher if self.banked or any(one.needs_teacher for one in both) else None
        if method.teacher != "frozen" and self.teacher is None:
            raise ValueError(
                f"finetune: expected a term that needs a teacher with teacher={method.teacher}, got none in {method.name}. Leave it out."
            )
        if not self.banked and (method.bank != "texts" or method.bank_size is not None):
            raise ValueError(
                f"finetune: expected a term that takes a bank with method.bank or bank_size, got none in {method.name}. Leave both out."
            )

    def _stream(
        self, role: str, data: DataConfig, size: int, modalities: tuple[str, ...], *, shared: bool = True, **options: Any
    ) -> Stream:
        train = self.config.train
        options = {"transform": self.loaded.transform, "strict": self.config.strict, "workers": train.workers, **options}
        among, seed = self.accelerator if shared else None, train.seed + list(_SIZES).index(role)
        try:
            return Stream(data, self.loaded, among, size=size, seed=seed, modalities=modalities, **options)
        except ValueError as error:
            if not (message := str(error)).startswith("Draws: "):
                raise
            told = message.removeprefix("Draws: ").removesuffix(". Lower the batch size.")
            raise ValueError(f"finetune: {told} of the {role}. Lower {_SIZES[role]}.") from error

    def _build_streams(self) -> None:
        """Of target and reference, when the terms are known to find in them what they need."""
        config, train, pairs = self.config, self.config.train, ("image", "text")
        labelled = config.method.loss == "classification"
        of_target, found = ("image",) if labelled else pairs, data_of(config, config.reference)
        self.references = train.reference_batch_size or train.batch_size
        if found is not None:
            of_reference = ("text",) if found.kind == "random_texts" else found.modalities or pairs
            check_needs("reference", self.regularizer, of_reference, self.model)
        check_needs("target", self.target_regularizer, of_target, self.model)
        options = {"transform": self.loaded.train_transform, "labelled": labelled}
        self.streams = {"target": self._stream("target", config.target, train.batch_size, of_target, **options)}
        if found is not None:
            cached = config.method.teacher == "cached" and self.teacher is not None
            self.streams["reference"] = self._stream("reference", found, self.references, of_reference, fixed=cached)
            if cached and self.teacher is not None:
                check_cached(self.teacher, self.streams["reference"].dataset, self.model.to(self.accelerator.device))
        target, known = self.streams["target"].dataset, labelled or config.target.kind in LABELLED
        self.tokens = class_tokens(target, self.loaded) if known else None
        self.classes = tuple(target.classes) if known else ()

    def try_samples(self) -> None:
        """A sample of each data set can be read."""
        for stream in self.streams.values():
            stream.drawn[0, 0]

    def _build_bank(self) -> None:
        """Of texts, for terms that take one."""
        config, method, found = self.config, self.config.method, data_of(self.config, self.config.reference)
        self.texts: Banks | None = None
        if config.texts is not None and not self.banked:
            raise ValueError(f"finetune: expected texts for a term that takes a bank of them, got none in {method.name}. Leave them out.")
        if not self.banked or self.teacher is None:
            return
        if method.bank == "contexts":
            if self.tokens is None:
                raise ValueError(f"finetune: expected labelled target data for bank=contexts, got {config.target.kind}. Use bank=texts.")
            tokens = self.tokens
            if len(tokens) < 2:  # over one context nothing can change
                tokens = class_tokens(self.streams["target"].dataset, self.loaded, CONTEXTS)
            self.texts = bank_of_contexts(tokens, self.teacher, self.accelerator)
            return
        data = found if config.texts is None else data_of(config, config.texts)
        if data is None or (data.kind in READERS and data.modalities == ("image",)):
            raise ValueError("finetune: expected captions for the terms' bank of texts, got none. Set texts, say to kind random_texts.")
        self.streams["texts"] = self._stream("texts", data, method.bank_size or self.references, ("text",), shared=False)
        self.texts = bank_of_texts(self.streams["texts"], self.teacher, self.accelerator)

    def _settings(self) -> Settings:
        train = self.config.train
        shared = {field.name for field in dataclasses.fields(Settings)} & {field.name for field in dataclasses.fields(train)}
        values = {name: getattr(train, name) for name in shared - {"steps"}}
        settings = Settings(steps=train.steps or (train.epochs or 0) * self.streams["target"].batches_an_epoch, **values)
        if settings.warmup_steps > settings.steps:
            warnings.warn(
                f"finetune: the warm-up of {settings.warmup_steps} steps does not end in the {settings.steps} steps of the run, "
                f"whose learning rate stays below {train.learning_rate:g}. Lower train.warmup_steps.",
                stacklevel=4,
            )
        return settings

    def _loss(self, method: MethodConfig) -> tuple[TargetLoss, nn.Linear | None]:
        """The target's loss, and where its head started."""
        tokens = self.tokens
        if tokens is None or method.loss == "contrastive":
            return Contrastive(self.model, self.accelerator, caption_weight=method.caption_weight), None
        if len(self.classes) < 2:
            raise ValueError(f"finetune: expected at least 2 classes to tell apart, got {', '.join(self.classes)} alone.")
        if not method.trains_head:
            return TextClassification(self.model, tokens, label_smoothing=method.label_smoothing), None
        self.model.to(self.accelerator.device)  # ImageNet's templates are 80,000 texts
        start = zero_shot_classifier(self.model, tokens)
        found = copy.deepcopy(start)
        if method.head == "linear_probe" and checkpoint.latest(self.checkpoints) is None:  # it is in the checkpoints
            options = {"transform": self.loaded.transform, "modalities": ("image",), "strict": self.config.strict}
            dataset = read(self.config.target, self.loaded, labelled=True, **options)
            limit = 256 if self.config.dry_run else None
            found = linear_probe(self.model, dataset, start, self.accelerator, workers=self.config.train.workers, limit=limit)
        attach_head(self.model, found)
        return HeadClassification(getattr(self.model, NAME), label_smoothing=method.label_smoothing), start

    def train(self, settings: Settings, **options: Any) -> None:
        """See :func:`~geomreg.integrations.recipes.train.finetune`."""
        reference = self.streams.get("reference")
        finetune(
            self.model,
            self.streams["target"].batches,
            settings,
            regularizer=self.regularizer,
            target_regularizer=self.target_regularizer,
            reference=None if reference is None else reference.batches,
            teacher=self.teacher,
            loss=self.loss,
            texts=self.texts,
            accelerator=self.accelerator,
            sharded=self.sharded,
            after_update=lambda: clamp_logit_scale(self.model, self.config.model.max_logit_scale),
            **options,
        )

    def collect_statistics(self, model: nn.Module, names: Collection[str]) -> None:
        """Of a mixture of weights, from the target batches of the first steps that this process saw."""
        batches = self.streams["target"].again(min(self.settings.steps, OF_STATISTICS))
        with self.accelerator.autocast():
            collect_statistics(model, names, batches, self.accelerator.device)

    def current(self) -> nn.Module:
        """The model as it is now, whole, on the device of the main process; to be called on all."""
        if self.sharded is None:
            return self.model
        self.sharded.gather()
        if not self.accelerator.is_main_process:
            return self.model
        return copy.deepcopy(self.model).to(self.accelerator.device)  # only what losses use is on the device

    def export(self, folder: Path) -> None:
        """The model as it is, adapters merged and with its head, in open_clip's layout."""
        model = merge_adapters(copy.deepcopy(self.model))
        head = take_head(model)
        trained = None if head is None or self.start is None else (head, self.start, self.classes)
        to_open_clip(model, self.loaded.config, folder, head=trained, tokenizer=self.loaded.tokenizer)


def _monitor(run: _Run) -> RunMonitor | None:
    """Made before training: what it sees first is the start."""
    config, loaded = run.config, run.loaded
    if config.probe is None:
        return None
    dataset = read(config.probe, loaded, transform=loaded.transform, modalities=("image",), strict=config.strict)
    if config.monitor.every > run.settings.steps:
        warnings.warn(
            f"finetune: expected monitor.every to be at most the run's {run.settings.steps} steps, got {config.monitor.every}, so that the "
            "probe is never looked at. Lower --monitor.every.",
            stacklevel=1,
        )
    if run.sharded is None:
        run.model.to(run.accelerator.device)
    tokens = class_tokens(dataset, loaded)
    options = (config.monitor, config.output, run.accelerator)
    return RunMonitor(run.current, dataset, tokens, *options, workers=config.train.workers)


def _teacher(config: Config, loaded: Model) -> Teacher:
    """One that is not a frozen copy; made when parts are frozen and adapters there."""
    if config.method.teacher == "adapters_off":
        return Teacher.adapters_off(loaded.model, encode)
    if config.method.teacher == "averaged":
        return Teacher.averaged(loaded.model, encode, decay=config.method.teacher_decay)
    assert config.method.cache is not None
    cache = EmbeddingCache.open(config.method.cache, teacher=Teacher(loaded.model, encode))
    found = data_of(config, config.reference)
    modalities = None if found is None else found.modalities
    return Teacher.cached(cache, preprocessing=loaded.transform, tokenizer=loaded.tokenizer, modalities=modalities)


def _try(run: _Run, evaluation: "_Evaluation", monitor: RunMonitor | None) -> None:
    """What a dry run says: of the data, of the base model, and of a few steps that are thrown away."""
    facts = facts_of(run.streams, _watched(evaluation, monitor), run.loaded.tokenizer, load=True)
    base = evaluation.of_base()
    steps = take_steps(run)
    if run.accelerator.is_main_process:
        print_table({**table_of(facts), **({"base model": base} if base else {}), "run": steps})
    check_broken(facts, run.streams, run.settings.steps)


def _watched(evaluation: "_Evaluation", monitor: RunMonitor | None) -> dict[str, Any]:
    """Data sets that are looked at and not trained on, by name."""
    found = {f"evaluation.{name}": dataset for name, dataset in evaluation.data.items()}
    return found if monitor is None else {**found, "probe": monitor.dataset}


def regularizer_of(terms: Mapping[str, TermConfig], model: nn.Module) -> WeightedSum:
    """The weighted sum of the configured terms; those on parameters get the model's.

    Raises:
        ValueError: no regularizer of this name; options that it does not have; inputs that a run cannot give.
    """
    built = {}
    for name, config in terms.items():
        owner = getattr(geomreg.regularizers, config.term, None)
        if not _is_term(owner):
            known = [key for key in geomreg.regularizers.__all__ if _is_term(getattr(geomreg.regularizers, key))]
            folded = {key.casefold(): key for key in known}
            near = difflib.get_close_matches(config.term.casefold(), folded, n=1)
            hint = f"Did you mean {folded[near[0]]!r}?" if near else f"There are {', '.join(known)}."
            raise ValueError(f"{name}: expected the name of a regularizer, got {config.term!r}. {hint}")
        given: tuple[Any, ...] = ()
        if config.term == "WeightAnchor":
            given = (model,)
        elif config.term == "ProjectionOrthogonality":
            given = (getattr(model.visual, "proj", None), getattr(model, "text_projection", None))
            if not all(isinstance(one, nn.Parameter) for one in given):
                raise ValueError(f"{name}: expected a CLIP with linear projections, got {type(model).__name__}. Use another term.")
        taken = check_options(name, config.options, owner, tuple(list(inspect.signature(owner).parameters)[: len(given)]))
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in taken.items()}
        if config.term == "ContrastiveReplay" and getattr(model, "logit_bias", None) is not None:
            options = {"form": "sigmoid", **options}  # as the model was trained
        term = owner(*given, **options)
        if lacking := set(getattr(term, "inputs", ())) - {"logit_scale", "logit_bias", "texts"}:
            raise ValueError(f"{name}: expected a term of what a run has, got one that also needs {', '.join(sorted(lacking))}.")
        built[name] = (config.weight, term)
    return WeightedSum(**built)


def _is_term(owner: object) -> bool:
    return inspect.isclass(owner) and issubclass(owner, nn.Module)


def check_needs(role: str, regularizer: WeightedSum | None, modalities: tuple[str, ...], model: nn.Module) -> None:
    """Every term can be computed from batches of these modalities, and moves what is trained: each is tried on a few random vectors.

    Raises:
        ValueError: what a term lacks.
    """
    if regularizer is None:
        return
    vectors = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    names = [name for name, value in model.named_parameters() if value.requires_grad and not name.startswith("logit_")]
    trained = {"image": any(name.startswith("visual.") for name in names), "text": any(not name.startswith("visual.") for name in names)}
    student = Embeddings(**{modality: vectors.clone().requires_grad_(trained[modality]) for modality in modalities})
    frozen = Embeddings(**dict.fromkeys(modalities, vectors))
    if role == "reference" and all(isinstance(term, ON_PARAMETERS) for term in regularizer.regularizers.values()):
        names = ", ".join(regularizer.regularizers)
        raise ValueError(f"finetune: expected terms on reference data, got only such on weights ({names}). Make them method.target_terms.")
    inputs = {"logit_scale": torch.tensor(10.0), "logit_bias": getattr(model, "logit_bias", None), "texts": vectors}
    for name, term in regularizer.regularizers.items():
        if isinstance(term, ON_PARAMETERS):
            continue
        training, needed = term.training, getattr(term, "inputs", ())
        if "logit_bias" in needed and inputs["logit_bias"] is None:
            raise ValueError(f"{name}: expected a model with a logit bias for form=sigmoid, got one without. Use form=softmax.")
        try:
            value = term.eval()(student, frozen, **{key: inputs[key] for key in needed})  # in evaluation mode nothing is collected
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"finetune: expected {role} data that the term {name} can use, got {' and '.join(modalities)} alone ({error})"
            ) from error
        finally:
            term.train(training)
        if not value.requires_grad:
            still = [modality for modality in modalities if not trained[modality]]
            raise ValueError(
                f"finetune: expected {role} data through which the term {name} moves what is trained, got {' and '.join(still)} of "
                f"{'frozen towers' if len(still) > 1 else 'a frozen tower'}. Use other data, or train it."
            )


class _Evaluation:
    """Accuracy on the configured data sets at the start, now and then, and at the end; and the best model; by the main process."""

    def __init__(self, run: _Run) -> None:
        self.run, self.config, self.steps = run, run.config, run.settings.steps
        self.every = self.config.train.evaluate_every or self.steps
        self.file = self.config.output / "evaluation.jsonl"
        self.entries: list[dict[str, Any]] = []  # what the file has: it is written from here and from checkpoints, and never read
        self.data = {
            name: read(data, run.loaded, transform=run.loaded.transform, modalities=("image",), strict=self.config.strict)
            for name, data in self.config.evaluation.items()
        }
        best, by = self.config.best, self.config.best_by
        if best is not None and by == "worst_group" and getattr(self.data[best], "groups", None) is None:
            raise ValueError(
                f"finetune: expected an evaluation with groups for best_by=worst_group, got {best} without. Use another best_by."
            )

    def before(self) -> None:
        """The model as it comes, step 0, unless that was done before."""
        if self.data and checkpoint.latest(self.run.checkpoints) is None:
            if self.run.sharded is None:
                self.run.model.to(self.run.accelerator.device)
            self._evaluate(0)

    def of_base(self) -> list[str]:
        """What a dry run says of the base model, on a part of the data where they are many."""
        if not self.data:
            return []
        if self.run.sharded is None:
            self.run.model.to(self.run.accelerator.device)
        model = self.run.current()
        with alone(self.run.accelerator) as main:
            sizes = {name: len(data) for name, data in self.data.items()}
            return base_lines(self._measured(model, self.run.start, LIMIT), sizes) if main else []

    def after(self, step: int, *, last: bool = False) -> None:
        """Evaluate, if it is time."""
        if self.data and (last or step % self.every == 0 or step == self.steps):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        model = self.run.current()
        with alone(self.run.accelerator) as main:
            if main:
                self._evaluate_alone(model, step)

    def _evaluate_alone(self, model: nn.Module, step: int) -> None:
        found = self._measured(model, getattr(model, NAME, None) if step else self.run.start)
        if not step and self.config.method.head == "linear_probe":  # which is learned already: no part of the base model
            for name, scores in self._measured(model, getattr(model, NAME, None)).items():
                if scores["by"] == "head":
                    found[name]["linear_probe"] = scores["accuracy"]
        before = [entry for entry in self.entries if entry["step"] < step]
        trained = [entry for entry in before if entry["step"]]
        name, by = self.config.best, self.config.best_by
        if step and name is not None and _is_highest(found[name][by], [entry[name][by] for entry in trained]):
            self.run.export(self.config.output / "best")
        self._write([*before, {"step": step, **found}])

    def report(self, mixture: Path | None) -> None:
        """Print what was learned and what was lost, and evaluate the mixture with the model at the start, if there is one."""
        if not self.data:
            return
        entries, mixed = [entry for entry in self.entries if "ensemble" not in entry], {}
        if mixture is not None:
            head, device = load_head(mixture), self.run.accelerator.device
            mixed = self._measured(load(str(mixture)).model.to(device), None if head is None else head[0].to(device))
            self._write([*entries, {"step": entries[-1]["step"], "ensemble": self.config.ensemble, **mixed}])
        for name in self.data:
            start, end = (entry[name]["accuracy"] for entry in (entries[0], entries[-1]))
            more = f"; ensemble {mixed[name]['accuracy']:.1f} %" if mixed else ""
            more += {None: "", "head": "; by the head", "zero_shot": "; zero-shot"}[entries[-1][name].get("by")]
            more += f"; linear probe {entries[0][name]['linear_probe']:.1f} %" if "linear_probe" in entries[0][name] else ""
            more += f"; n = {entries[-1][name]['samples']:,.0f}" if "samples" in entries[-1][name] else ""
            print(f"{name}: {start:.1f} % -> {end:.1f} % ({end - start:+.1f}){more}")

    def _measured(self, model: nn.Module, head: nn.Module | None, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """By the head where it knows all classes, which is said."""
        workers, tokenizer = self.config.train.workers, self.run.loaded.tokenizer
        found: dict[str, dict[str, Any]] = {}
        for name, data in self.data.items():
            columns = None if head is None else _columns(data.classes, self.run.classes)
            among = None if head is None or columns is None else lambda image, head=head, columns=columns: head(image)[:, columns]
            scores: dict[str, Any] = evaluate(model, data, tokenizer, workers=workers, head=among, limit=limit)
            found[name] = scores if head is None else {**scores, "by": "zero_shot" if among is None else "head"}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as after a checkpoint; later lines of evaluation.jsonl are made again, and damaged ones too."""
        if state["entries"]:
            self._write(list(state["entries"]))
        best = self.config.output / "best"
        if self.config.best is not None and len(state["entries"]) > 1 and not best.is_dir():
            warnings.warn(
                f"finetune: expected the best model so far in {best}, got none. It is lost; a later one may be better.", stacklevel=1
            )

    def _write(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        write_file(self.file, "".join(f"{as_json(entry)}\n" for entry in entries).encode())


def _columns(classes: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Where each class is among the known ones, those of one name (ImageNet has two such pairs) in their order; None: not all are."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(known):
        places.setdefault(name, []).append(place)
    found = [places[name].pop(0) if places.get(name) else None for name in classes]
    return None if None in found else found  # type: ignore[return-value]


def _is_highest(value: float, before: list[float | None]) -> bool:
    """One that is not finite, None in a file, is never the highest, and in no other's way."""
    return math.isfinite(value) and all(value > one for one in before if one is not None and math.isfinite(one))


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the run is then saved and ends."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)

"""``geomreg finetune``: a run from its configuration to an exported model."""

import copy
import dataclasses
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

import geomreg
from geomreg.cache import EmbeddingCache
from geomreg.compose import WeightedSum
from geomreg.integrations.recipes.config import READERS, Config, DataConfig, TermConfig, check_options
from geomreg.integrations.recipes.data import TarPairs
from geomreg.integrations.recipes.data.draws import Drawn, Draws, loader
from geomreg.integrations.recipes.evaluate import evaluate
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.models import Model, clamp_logit_scale, freeze, load, merge_adapters
from geomreg.integrations.recipes.train import Batches, Checkpoints, Settings, encode, finetune
from geomreg.shards import write_file
from geomreg.teacher import Teacher

__all__ = ["finetune_from", "regularizer_of"]

BROKEN_SHARE, BROKEN_LEAST = 0.01, 10  # more broken samples than this stop a run


def finetune_from(config: Config) -> Path:
    """Fine-tune a CLIP model as configured; an interrupted run with the same configuration goes on. Returns the exported model's folder.

    A dry run loads everything, takes a few steps, says how long the run will be and what it needs, and writes nothing.

    The run's folder holds config.json (resolved), environment.json, metrics.jsonl, evaluation.jsonl, checkpoints, broken.txt if samples
    could not be read, and in open_clip's layout, adapters merged, the final model in ``model`` and the best in ``best``.

    Raises:
        ValueError: a configuration that does not fit together or another one than that of the run in this folder.
        RuntimeError: a loss that is not finite; too many broken samples.
    """
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.train.precision)
    set_seed(config.train.seed)  # adapters start at random
    loaded = load(config.model.name, config.model.pretrained, crop=config.train.crop)
    model = loaded.model
    described = [config.method.terms, config.method.target_terms]
    kind = config.method.teacher if any(described) else None
    teacher = _teacher(config, loaded) if kind in ("frozen", "cached") else None
    freeze(model, config.model)
    if kind == "adapters_off":
        teacher = Teacher.adapters_off(model, encode)
    elif kind == "averaged":
        teacher = Teacher.averaged(model, encode, decay=config.method.teacher_decay)
    regularizer, target_regularizer = (regularizer_of(terms, model) if terms else None for terms in described)
    if not any(one is not None and one.needs_teacher for one in (regularizer, target_regularizer)):
        teacher = None
    elif kind == "cached" and target_regularizer is not None and target_regularizer.needs_teacher:
        raise ValueError("finetune: expected a teacher that sees the augmented target pairs, got a cached one. Use teacher=frozen.")
    reference = None if config.reference is None else _Stream(config.reference, loaded, config, accelerator, augment=False)
    target = _Stream(config.target, loaded, config, accelerator, augment=True)
    settings = _settings(config, target)
    evaluation = _Evaluation(config, loaded, settings.steps, accelerator)

    def run(settings: Settings, **options: Any) -> None:
        finetune(
            model,
            target.batches,
            settings,
            regularizer=regularizer,
            target_regularizer=target_regularizer,
            reference=None if reference is None else reference.batches,
            teacher=teacher,
            accelerator=accelerator,
            **options,
        )

    if config.dry_run:
        _try(run, settings, target, reference, accelerator)
        return config.output
    _claim(config, accelerator)
    log = _Log(config.output, settings.steps, accelerator)

    def on_step(entry: dict[str, float]) -> None:
        clamp_logit_scale(model, config.model.max_logit_scale)
        log.add(entry)
        evaluation.after(int(entry["step"]))
        for stream in (target, reference):
            if stream is not None:
                stream.check_broken(config.output)

    with _asked_to_stop() as stop:
        run(
            settings,
            checkpoints=Checkpoints(config.output / "checkpoints", config.train.save_every),
            on_step=on_step,
            should_stop=stop.is_set,
        )
    if accelerator.is_main_process:
        to_open_clip(merge_adapters(model), loaded.config, config.output / "model")
    accelerator.wait_for_everyone()
    return config.output / "model"


def _try(run: Callable[..., None], settings: Settings, target: "_Stream", reference: "_Stream | None", accelerator: Accelerator) -> None:
    """A few steps that are thrown away, and what they say of the whole run."""
    ends: list[float] = []
    run(dataclasses.replace(settings, steps=4), on_step=lambda entry: ends.append(time.perf_counter()))
    if not accelerator.is_main_process:
        return
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for name, stream in (("target", target), ("reference", reference)):
        if stream is not None:
            print(f"{name}: {len(stream.dataset)} samples, {stream.batches_an_epoch} batches an epoch")
    hours = settings.steps * seconds / 3600
    memory = f"peak memory so far {peak / 1e9:.1f} GB of {accelerator.device}"
    print(f"{settings.steps} steps of {seconds:.2f} s: {hours:.1f} h without evaluation; {memory}")


def regularizer_of(terms: Mapping[str, TermConfig], model: nn.Module) -> WeightedSum:
    """The weighted sum of the configured terms; those on parameters get the model's.

    Raises:
        ValueError: no regularizer of this name; options that it does not have; inputs that a run cannot give.
    """
    built = {}
    for name, config in terms.items():
        owner = getattr(geomreg.regularizers, config.term, None)
        if not (inspect.isclass(owner) and issubclass(owner, nn.Module)):
            known = [key for key in geomreg.regularizers.__all__ if inspect.isclass(getattr(geomreg.regularizers, key))]
            raise ValueError(f"{name}: expected the name of a regularizer, got {config.term!r}. There are {', '.join(known)}.")
        given: tuple[Any, ...] = ()
        if config.term == "WeightAnchor":
            given = (model,)
        elif config.term == "ProjectionOrthogonality":
            given = (model.visual.proj, model.text_projection)
        check_options(name, config.options, owner, tuple(list(inspect.signature(owner).parameters)[: len(given)]))
        term = owner(*given, **{key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()})
        if lacking := set(getattr(term, "inputs", ())) - {"logit_scale"}:
            raise ValueError(f"{name}: expected a term of embeddings and logit scale, got one that needs {', '.join(sorted(lacking))}.")
        built[name] = (config.weight, term)
    return WeightedSum(**built)


class _Stream:
    """One of the two data sets: its batches, and what was broken in it."""

    def __init__(self, config: DataConfig, loaded: Model, run: Config, accelerator: Accelerator, *, augment: bool) -> None:
        reader, train = READERS[config.kind], run.train
        transform = loaded.train_transform if augment else loaded.transform
        options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
        self.labelled = "templates" in inspect.signature(reader).parameters
        self.dataset = reader(
            config.path,
            transform=transform,
            tokenizer=loaded.tokenizer,
            modalities=("image",) if self.labelled else ("image", "text"),
            **options,
        )
        size = train.batch_size if augment else train.reference_batch_size or train.batch_size
        if size % accelerator.num_processes:
            raise ValueError(
                f"finetune: expected a batch that {accelerator.num_processes} processes can share, got {size}. Choose a multiple of it."
            )
        texts = None
        if self.labelled:
            texts = torch.stack([loaded.tokenizer(self.dataset.class_texts(template)) for template in self.dataset.templates])
        self.drawn = Drawn(self.dataset, seed=train.seed + (0 if augment else 1), texts=texts)
        self.workers = train.workers
        self.draws: Callable[[int], Draws] = lambda start: Draws(
            len(self.dataset),
            size // accelerator.num_processes,
            seed=train.seed + (0 if augment else 1),
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            start=start,
            groups=self.dataset.groups if isinstance(self.dataset, TarPairs) else None,
        )
        self.batches_an_epoch = self.draws(0).batches_an_epoch
        self.seen, self.broken, self.listed = 0, [], 0

    @property
    def batches(self) -> Batches:
        def from_number(start: int) -> Iterator[dict[str, Any]]:
            for batch in loader(self.drawn, self.draws(start), workers=self.workers):
                self.seen += len(batch["id"])
                self.broken += batch.pop("broken")
                yield batch

        return from_number

    def check_broken(self, folder: Path) -> None:
        """List new ones; raise when there are too many."""
        if len(self.broken) > self.listed:
            with open(folder / "broken.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(f"{message}\n" for message in self.broken[self.listed :])
            self.listed = len(self.broken)
        if len(self.broken) > max(BROKEN_LEAST, BROKEN_SHARE * self.seen):
            raise RuntimeError(
                f"finetune: expected at most {BROKEN_SHARE:.0%} of the samples to be broken, got {len(self.broken)} of {self.seen}, the "
                f"first {self.broken[0]}. See {folder / 'broken.txt'}."
            )


def _teacher(config: Config, loaded: Model) -> Teacher:
    """Made before anything is frozen or adapted."""
    if config.method.cache is not None:
        cache = EmbeddingCache.open(config.method.cache, teacher=Teacher(loaded.model, encode))
        return Teacher.cached(cache, preprocessing=loaded.transform, tokenizer=loaded.tokenizer)
    return Teacher(loaded.model, encode)


def _settings(config: Config, target: _Stream) -> Settings:
    shared = {field.name for field in dataclasses.fields(Settings)} & {field.name for field in dataclasses.fields(config.train)}
    values = {name: getattr(config.train, name) for name in shared - {"steps"}}
    return Settings(steps=config.train.steps or (config.train.epochs or 0) * target.batches_an_epoch, **values)


def _claim(config: Config, accelerator: Accelerator) -> None:
    """The run's folder, for this configuration alone."""
    resolved = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del resolved["dry_run"]
    file = config.output / "config.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if differing := _differing(before, resolved):
            name, old, new = differing
            raise ValueError(
                f"finetune: expected the run in {config.output} to go on with {name} {old!r}, got {new!r}. Use the same configuration, or "
                "another output folder."
            )
        return
    accelerator.wait_for_everyone()  # no process writes before all have looked
    if accelerator.is_main_process:
        config.output.mkdir(parents=True, exist_ok=True)
        write_file(config.output / "environment.json", (json.dumps(_environment(), indent=1) + "\n").encode())
        write_file(file, (json.dumps(resolved, indent=1) + "\n").encode())
    accelerator.wait_for_everyone()


def _differing(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first value, by its dotted name, in which two configurations differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _differing(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return None
    return None if before == now else (name, before, now)


def _environment() -> dict[str, Any]:
    """Versions of packages and of the code."""
    packages = ("geomreg", "torch", "open_clip_torch", "accelerate", "torchvision", "peft")
    installed = {name: metadata.version(name) for name in packages if _is_installed(name)}
    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "describe", "--always", "--dirty"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent, check=False)
        commit = answer.stdout.strip() or None
    return {"python": platform.python_version(), "packages": installed, "git": commit}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class _Evaluation:
    """Zero-shot accuracy on the configured data sets now and then, and the best model; by the main process."""

    def __init__(self, config: Config, loaded: Model, steps: int, accelerator: Accelerator) -> None:
        self.config, self.loaded, self.steps, self.accelerator = config, loaded, steps, accelerator
        self.every = config.train.evaluate_every or steps
        self.file = config.output / "evaluation.jsonl"
        self.data = {}
        for name, data in config.evaluation.items():
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in data.options.items()}
            self.data[name] = READERS[data.kind](data.path, transform=loaded.transform, modalities=("image",), **options)

    def after(self, step: int) -> None:
        """Evaluate, if it is time."""
        if not self.data or (step % self.every and step != self.steps):
            return
        if self.accelerator.is_main_process:
            workers = self.config.train.workers
            found = {name: evaluate(self.loaded.model, data, self.loaded.tokenizer, workers=workers) for name, data in self.data.items()}
            before = [entry for entry in map(json.loads, _whole_lines(self.file)) if entry["step"] < step]
            if (name := self.config.best) is not None and all(found[name]["accuracy"] > entry[name]["accuracy"] for entry in before):
                to_open_clip(merge_adapters(copy.deepcopy(self.loaded.model)), self.loaded.config, self.config.output / "best")
            lines = [json.dumps(entry) for entry in [*before, {"step": step, **found}]]
            write_file(self.file, "".join(f"{line}\n" for line in lines).encode())
        self.accelerator.wait_for_everyone()


class _Log:
    """metrics.jsonl and a progress bar, by the main process."""

    def __init__(self, folder: Path, steps: int, accelerator: Accelerator) -> None:
        self.file, self.main = folder / "metrics.jsonl", accelerator.is_main_process
        self.bar = tqdm(total=steps, unit="steps", disable=not self.main)
        self.started = False

    def add(self, entry: dict[str, float]) -> None:
        if not self.main:
            return
        if not self.started:
            self.started = True
            kept = [line for line in _whole_lines(self.file) if json.loads(line)["step"] < entry["step"]]  # later ones are made again
            write_file(self.file, "".join(f"{line}\n" for line in kept).encode())
            self.bar.update(int(entry["step"]) - 1)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.bar.update(1)
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in entry.items() if key != "step"}, refresh=False)


def _whole_lines(file: Path) -> list[str]:
    """Of a text file that may not be there: a kill may have cut the last."""
    content = file.read_text(encoding="utf-8") if file.is_file() else ""
    return content[: content.rfind("\n") + 1].splitlines()


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

"""The data of a run: endless batches of its target and reference, and banks of texts."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from geomreg.integrations.recipes.config import LABELLED, READERS, Config, DataConfig
from geomreg.integrations.recipes.data import Captioned, LabelledPairs, RandomTexts, Subset
from geomreg.integrations.recipes.data.counted import Counted, conversions
from geomreg.integrations.recipes.data.draws import Drawn, Draws, loader
from geomreg.integrations.recipes.models import Model
from geomreg.integrations.recipes.train import Banks, Batches
from geomreg.regularizers.text_guided import context_embeddings
from geomreg.shards import write_file
from geomreg.teacher import Teacher

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["CONTEXTS", "Stream", "bank_of_contexts", "bank_of_texts", "class_tokens", "data_of", "print_conversions", "read"]

CONTEXTS = ("a photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a drawing of a {}.", "a close-up photo of a {}.")
"""Of CLIP's 80 templates, the choice is ours: contexts where a target has one template alone."""
BROKEN_SHARE, BROKEN_LEAST = 0.01, 10  # more broken samples than this stop a run


def read(
    config: DataConfig,
    loaded: Model,
    *,
    transform: Callable[..., Any] | None,
    modalities: tuple[str, ...],
    labelled: bool = False,
    strict: bool = False,
) -> Any:
    """The configured data set, with ``modalities`` in its samples; ``labelled`` makes classes of the captions of pairs.

    With images it is one whose conversions are counted.
    """
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    if config.kind == "random_texts":
        return RandomTexts(loaded.tokenizer, **options)
    options.setdefault("strict", strict)
    reader = LabelledPairs if labelled and config.kind == "csv" else READERS[config.kind]
    dataset = reader(config.path, transform=transform, tokenizer=loaded.tokenizer, modalities=modalities, **options)
    if config.captions is not None:
        dataset = Captioned(dataset, config.captions, tokenizer=loaded.tokenizer)
    if config.subset is not None:
        dataset = Subset(dataset, config.subset)
    return Counted(dataset) if "image" in modalities else dataset


def class_tokens(dataset: Any, loaded: Model, templates: Sequence[str] = ()) -> Tensor:
    """``(T, C, L)`` token ids of the C classes of a labelled data set in T templates, by default its own."""
    return torch.stack([loaded.tokenizer(dataset.class_texts(template)) for template in templates or dataset.templates])


def data_of(config: Config, data: DataConfig | None) -> DataConfig | None:
    """Where reference data or texts are: ``target`` means the target's own, without what belongs to its loss alone."""
    if data is not None and data.kind == "target":
        return DataConfig(config.target.kind, config.target.path, config.target.options, data.modalities, config.target.subset)
    return data


def print_conversions(data: Mapping[str, Any], accelerator: Accelerator) -> None:
    """By the main process a line for each data set in whose images something was converted; all processes must call it."""
    for name, dataset in data.items():
        others = gather_object([dataset.notes.numpy()]) if accelerator.num_processes > 1 and isinstance(dataset, Counted) else []
        if accelerator.is_main_process and (said := conversions(dataset, others)):
            print(f"{name}: {said}")


def drawn_by_all(streams: Mapping[str, "Stream"], accelerator: Accelerator) -> dict[str, tuple[int, int]]:
    """How many samples all processes have drawn of each stream, and how many of them were broken; all must call it."""
    own = torch.tensor([[stream.seen, len(stream.broken)] for stream in streams.values()], device=accelerator.device)
    return dict(zip(streams, map(tuple, accelerator.reduce(own, reduction="sum").tolist()), strict=True))


class Stream:
    """Endless batches of one data set, and what was broken in it.

    Args:
        config: of the data.
        loaded: the model's tokenizer.
        accelerator: its processes share each batch; None: each of them sees the same one.
        size: of a batch, of all processes together.
        seed: of order and augmentation.
        transform: of images.
        modalities: ``("image", "text")``, or one of them. The text of a labelled sample is in a random one of its templates.
        workers: loading processes.
        labelled: make classes of the captions of pairs.
        strict: raise on a broken sample instead of drawing another.
        fixed: each sample always has the same text, the reader's own, as a cache of teacher embeddings holds it.

    Raises:
        ValueError: a batch that the processes cannot share, or that is larger than the data set.
    """

    def __init__(
        self,
        config: DataConfig,
        loaded: Model,
        accelerator: Accelerator | None,
        *,
        size: int,
        seed: int,
        transform: Callable[..., Any] | None,
        modalities: tuple[str, ...],
        workers: int,
        labelled: bool = False,
        strict: bool = False,
        fixed: bool = False,
    ) -> None:
        rank, ranks = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        if size % ranks:
            raise ValueError(f"finetune: expected a batch that {ranks} processes can share, got {size}. Choose a multiple of it.")
        templated = config.kind in LABELLED and modalities == ("image", "text") and not fixed
        modalities = ("image",) if templated else modalities
        self.dataset = read(config, loaded, transform=transform, modalities=modalities, labelled=labelled, strict=strict)
        self.drawn = Drawn(self.dataset, seed=seed, texts=class_tokens(self.dataset, loaded) if templated else None)
        self.size, self.workers = size, workers
        self.draws: Callable[[int], Draws] = lambda start: Draws(
            len(self.dataset),
            size // ranks,
            seed=seed,
            rank=rank,
            ranks=ranks,
            start=start,
            groups=self.dataset.groups if config.kind == "tar" else None,
        )
        self.batches_an_epoch = self.draws(0).batches_an_epoch
        self.seen, self.broken, self.looked_at = 0, [], 0
        self.listed: set[str] = set()

    @property
    def batches(self) -> Batches:
        """For :func:`~geomreg.integrations.recipes.train.finetune`."""

        def from_number(start: int) -> Iterator[dict[str, Any]]:
            for batch in loader(self.drawn, self.draws(start), workers=self.workers):
                self.seen += len(batch["id"])
                self.broken += batch.pop("broken")
                yield batch

        return from_number

    def again(self, count: int) -> Iterator[dict[str, Any]]:
        """The first batches once more; what is broken in them is not counted."""
        for batch in itertools.islice(loader(self.drawn, self.draws(0), workers=self.workers), count):
            batch.pop("broken")
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "broken": self.broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as after a checkpoint; what was broken before is listed again where it is not."""
        self.seen, self.broken, self.looked_at = int(state["seen"]), list(state["broken"]), 0
        self.listed.clear()

    def check_broken(self, folder: Path) -> None:
        """List new ones, each once; raise when too many of the drawn samples were broken."""
        new = [message for message in dict.fromkeys(self.broken[self.looked_at :]) if message not in self.listed]
        self.looked_at = len(self.broken)
        self.listed.update(new)
        if new:
            _list(folder / "broken.txt", new)
        if len(self.broken) > max(BROKEN_LEAST, BROKEN_SHARE * self.seen):
            raise RuntimeError(
                f"finetune: expected at most {BROKEN_SHARE:.0%} of the samples to be broken, got {len(self.broken)} of {self.seen}, the "
                f"first {self.broken[0]}. See {folder / 'broken.txt'}."
            )


def _list(file: Path, messages: Sequence[str]) -> None:
    """Add messages to a sorted file, whole or not at all, to which other streams and processes add too."""
    codec: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    with _alone(file.parent):
        there = file.read_text(**codec).splitlines() if file.is_file() else []
        lines = sorted({*there, *(" ".join(message.splitlines()) for message in messages)})
        write_file(file, "".join(f"{line}\n" for line in lines).encode(codec["encoding"], codec["errors"]))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other processes wait meanwhile, where the file system has locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def bank_of_texts(stream: Stream, teacher: Teacher, accelerator: Accelerator) -> Banks:
    """Other texts at each step, the same on all processes, embedded by the teacher."""

    def from_number(start: int) -> Iterator[Tensor]:
        for batch in stream.batches(start):
            with accelerator.autocast():
                yield teacher({"text": batch["text"].to(accelerator.device)}).text

    return from_number


def bank_of_contexts(tokens: Tensor, teacher: Teacher, accelerator: Accelerator) -> Banks:
    """At each step the K contexts of ``(K, C, L)`` token ids, embedded by the teacher: once, if it stays (CAR-FT, arXiv 2211.16175)."""

    def contexts() -> Tensor:
        with accelerator.autocast():
            return context_embeddings(torch.stack([teacher({"text": one.to(accelerator.device)}).text for one in tokens]))

    def from_number(start: int) -> Iterator[Tensor]:
        while teacher.state_dict():  # an average, which moves: a resumed run would see others than those of its start
            yield contexts()
        yield from itertools.repeat(contexts())

    return from_number

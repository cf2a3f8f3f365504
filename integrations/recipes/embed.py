"""``geomreg embed``: a teacher's embeddings of a data set, once and for all."""

import contextlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from geomreg.cache import EmbeddingCache
from geomreg.integrations.recipes.config import DataConfig
from geomreg.integrations.recipes.data import CsvPairs, LabelledFolder, collate
from geomreg.integrations.recipes.data.counted import Counted, conversions
from geomreg.integrations.recipes.data.rgb import ImageConfig
from geomreg.integrations.recipes.models import Model, load
from geomreg.integrations.recipes.preprocess import Preprocess
from geomreg.integrations.recipes.streams import read
from geomreg.integrations.recipes.train import Batch, encode
from geomreg.integrations.recipes.waiting import alone, together
from geomreg.shards import write_file
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["Options", "embed_data"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SKIPPED = "skipped.txt"
_OF_PAIRS = ("image_key", "caption_key", "id_key", "separator", "root")
_OF_FOLDERS = ("class_names", "templates")


@dataclass(frozen=True)
class Options:
    """Options of ``geomreg embed``.

    Args:
        model: name of an open_clip model, or a folder with open_clip_config.json and weights.
        data: CSV or TSV file of image-text pairs, a folder of class folders, or with ``kind`` what that reader takes.
        output: folder of the cache; an interrupted build goes on there.
        pretrained: tag or file of the weights; not for a folder.
        modality: what to embed; "text" after captions or tokenizer have changed keeps the images.
        dtype: of the stored numbers, float32 or float16.
        precision: of the model, fp32, bf16 or fp16 (autocast; the last projection stays in fp32).
        batch_size: samples at a time.
        workers: processes that load samples.
        device: "auto" takes a GPU if there is one; or "cpu", "cuda".
        kind: of other data: ``tar``, ``coco``, ``flickr8k``, ``imagenet``, ``iwildcam``, ``fmow``, ``csv``, ``folder``, as for ``geomreg
            finetune``; by default a folder of class folders or a CSV file.
        options: of the reader of this kind, by name; the options below are for the default.
        image_key: column of the image paths (CSV).
        caption_key: column of the captions (CSV).
        id_key: column of the ids (CSV).
        separator: of the columns (CSV).
        root: folder of relative image paths (CSV).
        class_names: JSON or CSV file from folder to class name (folders).
        templates: texts with {} for the class name (folders).
        images: how image files are read: orientation, transparency, more than 8 bits. The cache is for runs with the same options.
        strict: stop at an image that cannot be read, instead of leaving it out.
        check: samples that are embedded again at the end and compared; 0 for none. Files that were replaced under the same name
            are found among these only.
        preprocess: how images become tensors, for weights from a file whose preprocessing open_clip does not know.
    """

    model: str
    data: Path
    output: Path
    pretrained: str | None = None
    modality: Literal["both", "image", "text"] = "both"
    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 256
    workers: int = 4
    device: str = "auto"
    kind: Literal["csv", "folder", "imagenet", "tar", "coco", "flickr8k", "iwildcam", "fmow"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    image_key: str | None = None
    caption_key: str | None = None
    id_key: str | None = None
    separator: str | None = None
    root: Path | None = None
    class_names: Path | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)
    images: ImageConfig = field(default_factory=ImageConfig)
    strict: bool = False
    check: int = 64
    preprocess: Preprocess | None = None

    def __post_init__(self) -> None:
        if self.options and self.kind is None:
            raise ValueError(f"embed: expected kind with options, got options {', '.join(self.options)} alone. Say of which reader.")
        if self.kind is not None:
            DataConfig(self.kind, str(self.data), self.options)  # refuses options that it does not have
        what, others = ("a folder", _OF_PAIRS) if self.data.is_dir() else ("a CSV file", _OF_FOLDERS)
        if self.kind is not None:
            what, others = f"kind {self.kind}, which takes options", (*_OF_PAIRS, *_OF_FOLDERS)
        for option in others:
            if (value := getattr(self, option)) != getattr(Options, option):
                raise ValueError(f"embed: expected no {option} for {what}, got {value}. Leave it out, or put it in options beside a kind.")


def embed_data(options: Options) -> EmbeddingCache:
    """Embed every pair of a data set with an open_clip model; see :meth:`geomreg.EmbeddingCache.build`.

    Under ``torchrun`` or ``accelerate launch`` the processes share the work, and one that fails or is killed ends the others within
    seconds. Images that cannot be read are listed in skipped.txt.
    """
    state = PartialState(cpu=options.device == "cpu" or not torch.accelerator.is_available())  # on a CPU accelerate must be told
    with together(state, "embed", "Start the same command again on all: what is finished is kept."):
        return _embedded(options, state)


def _embedded(options: Options, state: PartialState) -> EmbeddingCache:
    device = state.device if options.device == "auto" else torch.device(options.device)
    if device.type != state.device.type:
        raise RuntimeError(f'embed: expected to run on {options.device}, got {state.device} from accelerate. Use "auto" or "cpu".')
    loaded = load(options.model, options.pretrained, images=options.images, preprocess=options.preprocess)
    modalities = ("image", "text") if options.modality == "both" else (options.modality,)
    dataset = _data(options, loaded, modalities)
    precision = _PRECISIONS[options.precision]

    def encode_in_precision(model: nn.Module, batch: Batch) -> Embeddings:
        with contextlib.nullcontext() if precision is None else torch.autocast(device.type, precision):
            return encode(model, batch)

    teacher = Teacher(loaded.model, encode_in_precision).to(device)
    loading: dict[str, Any] = {
        "tokenizer": loaded.tokenizer,
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "collate_fn": collate,
    }
    shard_rows = min(max(len(dataset) // 64, 256), 16_384)  # what Ctrl-C can cost
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EmbeddingCache.build: .* could not be read")  # said below, with their names
        cache = EmbeddingCache.build(teacher, dataset, options.output, dtype=_DTYPES[options.dtype], shard_rows=shard_rows, **loading)
    with alone(state) as main:
        if main:
            if "image" in modalities:
                _list_skipped(cache, dataset, options.output / SKIPPED)
            if options.check:
                cache.verify(teacher, dataset, options.check, tolerance=1e-3 if precision is None else 2e-2, **loading)
            print(cache)
    _say_converted(dataset, state)
    state.wait_for_everyone()
    return cache


def _data(options: Options, loaded: Model, modalities: tuple[str, ...]) -> Any:
    transform, tokenizer = loaded.transform, loaded.tokenizer
    if options.kind is not None:
        found = DataConfig(options.kind, str(options.data), options.options)
        return read(found, loaded, transform=transform, modalities=modalities, strict=options.strict)
    if options.data.is_dir():
        folder = LabelledFolder(
            options.data,
            transform=transform,
            tokenizer=tokenizer,
            class_names=options.class_names,
            templates=options.templates,
            strict=options.strict,
            modalities=modalities,
        )
        return Counted(folder)
    keys = {key: getattr(options, key) for key in (*_OF_PAIRS, "strict")}
    return Counted(CsvPairs(options.data, transform=transform, tokenizer=tokenizer, modalities=modalities, **keys))


def _say_converted(dataset: Any, state: PartialState) -> None:
    """What was converted in the images that were read now, by all processes."""
    others = gather_object([dataset.notes.numpy()]) if state.num_processes > 1 and isinstance(dataset, Counted) else []
    if state.is_main_process and (said := conversions(dataset, others)):
        print(said)


def _list_skipped(cache: EmbeddingCache, dataset: Any, path: Path) -> None:
    """What has no row and why, in a file; and on one line how many."""
    embedded = set(cache.ids("image"))
    lines = [f"{sample}\t{dataset[row].get('broken', 'left out')}" for row, sample in enumerate(dataset.ids) if sample not in embedded]
    path.unlink(missing_ok=True)
    if lines:
        write_file(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
        print(f"{len(lines)} of {len(dataset)} samples could not be read: see {path}. Train without them.")

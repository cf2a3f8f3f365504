"""``geomreg ensemble``: weights between a model and its fine-tuned self (WiSE-FT)."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from geomreg.checks import check_count, check_fraction
from geomreg.ensemble import interpolate
from geomreg.integrations.recipes.config import DataConfig
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.head import load_head
from geomreg.integrations.recipes.models import Model, load
from geomreg.integrations.recipes.preprocess import FIELDS, Preprocess
from geomreg.integrations.recipes.streams import Stream
from geomreg.integrations.recipes.train import OF_STATISTICS, Batch, encode
from geomreg.statistics import mixed_statistics, recompute_statistics

__all__ = ["EnsembleOptions", "collect_statistics", "ensemble"]


@dataclass(frozen=True)
class EnsembleOptions:
    """Options of ``geomreg ensemble``.

    Args:
        base: name of the open_clip model that was fine-tuned, or its folder.
        finetuned: folder of the fine-tuned model, as ``geomreg finetune`` writes it.
        output: folder of the ensembles; each becomes ``alpha-0.50``, say, or ``alpha-0.125``, in open_clip's layout.
        pretrained: tag or file of the base model's weights; not for a folder.
        alpha: shares of the fine-tuned weights, or one.
        overwrite: replace models that are in ``output`` already.
        data: of training, as for ``geomreg finetune`` (``kind``, ``path``, ``options``): running statistics of batch normalisations, which
            mixed weights have none of, are collected from them. Needed for models whose statistics were trained.
        batch_size: of these data; a hundred batches are taken, or one pass if there are fewer.
        workers: processes that load them.
        device: to collect them on: "auto" takes a GPU if there is one; or "cpu", "cuda".
    """

    base: str
    finetuned: Path
    output: Path
    pretrained: str | None = None
    alpha: float | tuple[float, ...] = (0.5,)
    overwrite: bool = False
    data: DataConfig | None = None
    batch_size: int = 64
    workers: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, tuple):
            object.__setattr__(self, "alpha", (self.alpha,))
        for value in self.alpha:
            check_fraction("ensemble", "alpha", value)
        check_count("ensemble", "batch_size", self.batch_size, 1)
        check_count("ensemble", "workers", self.workers, 0)
        if self.data is not None and self.data.kind in ("target", "random_texts"):
            raise ValueError(f"ensemble: expected data as files, got kind {self.data.kind}. Pass the training data.")


def ensemble(options: EnsembleOptions, collect: Callable[[nn.Module, Collection[str]], object] | None = None) -> list[Path]:
    """Write (1 - alpha) * base + alpha * fine-tuned for each alpha (arXiv 2109.01903), heads likewise; returns the folders.

    Args:
        options: what to mix.
        collect: given a mixed model and the names of its batch normalisations whose running statistics belong to neither model,
            collects them anew; by default from ``options.data``.

    Raises:
        ValueError: such statistics, and no data to collect them from.
        FileExistsError: models that would be overwritten.
    """
    exported = options.finetuned / "model"
    if (exported / "open_clip_config.json").is_file() and not (options.finetuned / "open_clip_config.json").is_file():
        raise ValueError(f"ensemble: expected the folder of a model, got that of a run, {options.finetuned}. Pass {exported}.")
    _check_new(options)
    finetuned = load(str(options.finetuned))
    same = {key: finetuned.config["preprocess_cfg"][key] for key in FIELDS}  # no image is read: the base's own need not be known
    base = load(options.base, options.pretrained, preprocess=Preprocess(**same))
    start, end = ({key: value.clone() for key, value in one.model.state_dict().items()} for one in (base, finetuned))
    between = any(0 < alpha < 1 for alpha in options.alpha)  # type: ignore[union-attr]
    names = {key.rpartition(".")[0]: key for key in mixed_statistics(start, end)} if between else {}
    if names and collect is None:
        if options.data is None:
            more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
            raise ValueError(
                "ensemble: expected data to collect running statistics of batch normalisations from, which mixed weights have none of, got "
                f"none for {next(iter(names.values()))!r}{more}. Pass --data.kind and --data.path of training data."
            )
        collect = _collector(options, options.data, finetuned, names)
    trained = load_head(options.finetuned)
    folders = []
    for alpha in options.alpha:
        finetuned.model.load_state_dict(_mixed(start, end, alpha))
        if names and collect is not None and 0 < alpha < 1:
            collect(finetuned.model, names)
        head = None
        if trained is not None:
            after, before, classes = trained
            mixed = copy.deepcopy(after)
            mixed.load_state_dict(interpolate(before.state_dict(), after.state_dict(), alpha))
            head = (mixed, before, classes)
        folders.append(
            to_open_clip(finetuned.model, finetuned.config, options.output / _name(alpha), head=head, tokenizer=finetuned.tokenizer)
        )
        print(folders[-1])
    return folders


def _mixed(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "interpolate: expected equal running statistics")  # they are collected
        return interpolate(start, end, alpha)


def _collector(
    options: EnsembleOptions, data: DataConfig, loaded: Model, names: Iterable[str]
) -> Callable[[nn.Module, Collection[str]], object]:
    """From the configured data, as the model sees them in evaluation; images alone where only their tower has statistics."""
    images = data.modalities == ("image",) or all(name.startswith("visual.") for name in names)
    modalities = ("image",) if images else ("image", "text")
    try:
        given = {"transform": loaded.transform, "modalities": modalities, "workers": options.workers}
        stream = Stream(data, loaded, None, size=options.batch_size, seed=0, **given)
    except ValueError as error:
        if not str(error).startswith("Draws: "):
            raise
        raise ValueError(f"ensemble: expected at least {options.batch_size} samples of data, got fewer. Lower --batch_size.") from error
    device = torch.device("cpu")
    if options.device != "auto" or torch.accelerator.is_available():
        device = torch.device(options.device) if options.device != "auto" else torch.accelerator.current_accelerator() or device
    count = min(OF_STATISTICS, stream.batches_an_epoch)
    return lambda model, names: collect_statistics(model, names, stream.again(count), device)


def collect_statistics(model: nn.Module, names: Collection[str], batches: Iterable[Batch], device: torch.device) -> None:
    """Running statistics of the named batch normalisations from batches of this process; the model is on the CPU before and after."""
    moved = ({key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)} for batch in batches)
    recompute_statistics(model.to(device), moved, encode, names=names, alone=True)
    model.cpu()


def _check_new(options: EnsembleOptions) -> None:
    """No model is lost unless that is asked for; before anything is loaded."""
    for alpha in options.alpha:
        folder = options.output / _name(alpha)
        if folder.exists() and not options.overwrite and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"ensemble: expected no model in {folder}, got one. Pass --overwrite true to replace it, or another output."
            )


def _name(alpha: float) -> str:
    """Two decimals, or all that there are."""
    return f"alpha-{alpha:.2f}" if float(f"{alpha:.2f}") == alpha else f"alpha-{alpha}"

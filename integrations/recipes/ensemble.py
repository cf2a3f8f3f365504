"""``geomreg ensemble``: weights between a model and its fine-tuned self (WiSE-FT)."""

import copy
from dataclasses import dataclass
from pathlib import Path

from geomreg.checks import check_fraction
from geomreg.ensemble import interpolate
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.head import load_head
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.preprocess import FIELDS, Preprocess

__all__ = ["EnsembleOptions", "ensemble"]


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
    """

    base: str
    finetuned: Path
    output: Path
    pretrained: str | None = None
    alpha: float | tuple[float, ...] = (0.5,)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, tuple):
            object.__setattr__(self, "alpha", (self.alpha,))
        for value in self.alpha:
            check_fraction("ensemble", "alpha", value)


def ensemble(options: EnsembleOptions) -> list[Path]:
    """Write (1 - alpha) * base + alpha * fine-tuned for each alpha (arXiv 2109.01903), heads likewise; returns the folders."""
    exported = options.finetuned / "model"
    if (exported / "open_clip_config.json").is_file() and not (options.finetuned / "open_clip_config.json").is_file():
        raise ValueError(f"ensemble: expected the folder of a model, got that of a run, {options.finetuned}. Pass {exported}.")
    _check_new(options)
    finetuned = load(str(options.finetuned))
    same = {key: finetuned.config["preprocess_cfg"][key] for key in FIELDS}  # no image is read: the base's own need not be known
    base = load(options.base, options.pretrained, preprocess=Preprocess(**same))
    start, end = ({key: value.clone() for key, value in one.model.state_dict().items()} for one in (base, finetuned))
    trained = load_head(options.finetuned)
    folders = []
    for alpha in options.alpha:
        finetuned.model.load_state_dict(interpolate(start, end, alpha))
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

"""Which preprocessing the weights of a model were trained with: of a file open_clip does not know it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from geomreg.checks import check_positive

__all__ = ["FIELDS", "Preprocess", "check_written", "preprocess_of_file"]

FIELDS = ("mean", "std", "interpolation", "resize_mode", "fill_color")  # the image size is the model's
_CHOICES = {"mode": ("RGB",), "interpolation": ("bicubic", "bilinear", "random"), "resize_mode": ("shortest", "longest", "squash")}
_EXAMPLES = {"mean": "'[0.5,0.5,0.5]'", "std": "'[0.5,0.5,0.5]'", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": "0"}


@dataclass(frozen=True)
class Preprocess:
    """How images become tensors, where open_clip does not know it or should do otherwise; None leaves a field to open_clip.

    Attributes:
        mean: of the three channels, subtracted from values in [0, 1].
        std: of the three channels, divided by.
        interpolation: of the resized image.
        resize_mode: ``shortest`` resizes the shorter side and crops, ``longest`` resizes the longer side and pads, ``squash`` changes the
            aspect ratio.
        fill_color: of the pixels that ``longest`` pads with, 0 to 255.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    fill_color: int | None = None

    def __post_init__(self) -> None:
        for value in self.std or ():
            check_positive("Preprocess", "std", value)
        if self.fill_color is not None and not 0 <= self.fill_color <= 255:
            raise ValueError(f"Preprocess: expected fill_color from 0 to 255, got {self.fill_color}. Black is 0, white is 255.")

    def stated(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def preprocess_of_file(name: str, file: str, stated: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing for weights from a file: what is stated, and else what all of open_clip's pre-trained tags of the model agree on.

    Args:
        name: of a model of open_clip.
        file: of the weights, for the message.
        stated: fields by name.

    Returns:
        A value for each of ``FIELDS``.

    Raises:
        ValueError: tags that disagree, or a model without tags, and fields that are not stated.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [merge_preprocess_dict(asdict(PreprocessCfg()), open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    if not known:  # a colour acts on padded images alone, and is black unless somebody says otherwise
        stated = {"fill_color": PreprocessCfg.fill_color, **stated}
    found = dict(stated)
    unclear = {}
    for field in FIELDS:
        values = {tuple(one[field]) if isinstance(one[field], (list, tuple)) else one[field] for one in known}
        if field in stated:
            continue
        if len(values) == 1:
            (found[field],) = values
        else:
            unclear[field] = values
    if unclear:
        differ = ", ".join(f"{field} ({' or '.join(sorted(map(str, values)))})" for field, values in unclear.items())
        reason = f"whose pre-trained weights differ in {differ}" if known else "which has no pre-trained weights in open_clip"
        options = " ".join(f"--model.preprocess.{field} {_EXAMPLES[field]}" for field in unclear)
        raise ValueError(
            f"load: expected the preprocessing that the weights in {file} were trained with, got none for {name}, {reason}. State it in "
            f"model.preprocess, say {options} (in geomreg embed --preprocess.{next(iter(unclear))} and so on). CLIP's own mean and std are "
            f"{list(open_clip.OPENAI_DATASET_MEAN)} and {list(open_clip.OPENAI_DATASET_STD)}."
        )
    return found


def check_written(file: Path, part: str, written: Mapping[str, Any]) -> None:
    """What the configuration of a model's folder says of images are values that open_clip takes; fields may be lacking, or null.

    Args:
        file: the configuration.
        part: its ``preprocess_cfg`` or ``vision_cfg``.
        written: what stands there.

    Raises:
        ValueError: names the file and the first field that does not.
    """
    for field, value in written.items():
        if value is not None and not _is_possible(field, value):
            raise ValueError(
                f"load: expected {part} with values that open_clip takes in {file}, got {field} {value!r:.200}. Mend the file, or "
                "export the model anew."
            )


def _is_possible(field: str, value: Any) -> bool:
    if field in ("mean", "std"):
        return isinstance(value, list) and len(value) == 3 and all(_is_number(one) and (field == "mean" or one > 0) for one in value)
    if field in ("size", "image_size", "fill_color"):
        numbers = value if isinstance(value, list) and value else [value]
        return all(isinstance(one, int) and _is_number(one) and one >= (field != "fill_color") for one in numbers)
    return field not in _CHOICES or value in _CHOICES[field]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6

"""ImageNet-1k and the test sets with its classes, by WordNet id or by number."""

import difflib
import os
from collections.abc import Callable, Sequence

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from geomreg.integrations.recipes.data.folder import LabelledFolder, class_folders
from geomreg.integrations.recipes.data.texts import Tokenizer

__all__ = ["IMAGENET_TEMPLATES", "ImageNet"]

IMAGENET_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
"""The 80 of CLIP and FLYP (``openai_imagenet_template``), from open_clip."""


class ImageNet(LabelledFolder):
    """ImageNet-1k and the sets that share its classes or some of them: ImageNet-V2, -R, -A, -Sketch.

    Samples, ids, labels and options as of :class:`LabelledFolder`; class names and templates are open_clip's: CLIP's curated names and
    its 80 templates. For other names use :class:`LabelledFolder`.

    **Files.** A folder for each class, named by its WordNet id (``n01440764``) or, as ImageNet-V2's are, by its number in the order of
    these (``0`` to ``999``, ``0000``, ...; ``n01440764``, the tench, is 0). There may be fewer than 1000: labels and ``classes`` are
    those of the folders present, so that ImageNet-R and -A are classified among their own 200 classes, as their authors do.
    The official archive of the validation images has no class folders: its images have to be sorted into them first.

    **Two pairs of classes share a name** in the list: *missile* (657 and 744) and *sunglasses* (836 and 837). Their texts, and so
    their logits, are equal: a zero-shot head can be right on one of each pair only (0.2 points of ImageNet's accuracy), and as captions
    of a contrastive loss they are negatives of each other. FLYP's list (datacreation_scripts/imagenet_csv_creator.py) has these pairs too.

    Args:
        path: folder of class folders: ``train`` or ``val``, ``imagenet-r``, ``imagenetv2-matched-frequency-format-val``.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64.
        templates: texts with ``{}`` in the place of the class name.
        strict: raise on a broken image.
        modalities: what samples hold beside the label; by default images and, given a tokenizer, texts.

    Attributes:
        classes: names of the C classes that there are, sorted by folder.
        labels, ids, transform, tokenizer, templates, modalities: as of :class:`LabelledFolder`.

    Raises:
        FileNotFoundError: no such folder, no class folders, no images.
        ValueError: folders of no class of ImageNet-1k, or two of one; and as :class:`LabelledFolder`.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None = None,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        strict: bool = False,
        modalities: tuple[str, ...] | None = None,
    ) -> None:
        path = os.path.abspath(path)
        super().__init__(
            path,
            transform=transform,
            tokenizer=tokenizer,
            class_names=_names(path, class_folders("ImageNet", path)),
            templates=templates,
            strict=strict,
            modalities=modalities,
        )


def _names(path: str, folders: list[str]) -> dict[str, str]:
    """Class name of each folder."""
    synsets = ImageNetInfo().label_names()
    numbers = {synset: number for number, synset in enumerate(synsets)}
    names: dict[str, str] = {}
    of: dict[int, str] = {}
    for folder in folders:
        number = numbers.get(folder, int(folder) if folder.isascii() and folder.isdecimal() else -1)
        if not 0 <= number < len(synsets):
            near = difflib.get_close_matches(folder, synsets, n=1, cutoff=0.8)
            hint = f"Did you mean {near[0]}?" if near else "Pass the folder that holds the class folders, train or val say."
            raise ValueError(
                f"ImageNet: expected class folders named by WordNet id (n01440764) or number (0 to 999) in {path}, got {folder!r}. {hint}"
            )
        if number in of:
            raise ValueError(f"ImageNet: expected one folder for each class in {path}, got {of[number]} and {folder}. Merge or remove one.")
        of[number], names[folder] = folder, IMAGENET_CLASSNAMES[number]
    return names

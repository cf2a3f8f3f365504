"""Image files as samples: pixels as torchvision loads them, or the reason why there are none."""

import os
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = ["image_sample", "load_rgb"]


def image_sample(
    name: str, sample_id: str, path: str, transform: Callable[[Image.Image], Tensor], *, strict: bool, where: str = ""
) -> dict[str, Any]:
    """``{"id", "image"}``, or ``{"id", "broken": "<path>: <reason>"}``; if ``strict`` a ValueError instead of the latter.

    Exceptions of ``transform`` are not caught: they are mistakes in the program, not in the data.
    """
    image = load_rgb(path)
    if not isinstance(image, str):
        return {"id": sample_id, "image": transform(image)}
    if strict:
        raise ValueError(
            f"{name}: expected an image, got {path}: {image}{where}. Repair it, or pass strict=False to leave such samples out."
        )
    return {"id": sample_id, "broken": f"{path}: {image}"}


def load_rgb(path: str) -> Image.Image | str:
    """The image as open_clip and torchvision load it, or in a few words why it cannot be loaded.

    That is PIL's ``convert("RGB")``: transparency is dropped, not blended, and EXIF orientation is not applied. PIL's limit
    against decompression bombs stays as it is set.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not an image that PIL knows" if os.path.getsize(path) else "empty file"
    except Exception as error:  # PIL raises many kinds on damaged files, SyntaxError among them
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return " ".join(reason.split())

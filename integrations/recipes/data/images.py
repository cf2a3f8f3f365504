"""Image files as samples: pixels as torchvision loads them, or the reason why there are none."""

import io
import os
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = ["broken_sample", "image_sample", "load_rgb", "reason"]


def image_sample(
    name: str,
    sample_id: str,
    path: str,
    transform: Callable[[Image.Image], Tensor],
    *,
    strict: bool,
    where: str = "",
    data: bytes | None = None,
) -> dict[str, Any]:
    """``{"id", "image"}``, or ``{"id", "broken": "<path>: <reason>"}``; if ``strict`` a ValueError instead of the latter.

    Exceptions of ``transform`` are not caught: they are mistakes in the program, not in the data.
    """
    image = load_rgb(path, data)
    if not isinstance(image, str):
        return {"id": sample_id, "image": transform(image)}
    return broken_sample(name, sample_id, path, image, strict=strict, where=where)


def broken_sample(
    name: str, sample_id: str, path: str, reason: str, *, strict: bool, where: str = "", what: str = "an image"
) -> dict[str, Any]:
    """``{"id", "broken": "<path>: <reason>"}``; if ``strict`` a ValueError."""
    if strict:
        raise ValueError(
            f"{name}: expected {what}, got {path}: {reason}{where}. Repair it, or pass strict=False to leave such samples out."
        )
    return {"id": sample_id, "broken": f"{path}: {reason}"}


def load_rgb(path: str, data: bytes | None = None) -> Image.Image | str:
    """The image in a file, or in its content ``data``, as open_clip and torchvision load it; or in a few words why it cannot be loaded.

    That is PIL's ``convert("RGB")``: transparency is dropped, not blended, and EXIF orientation is not applied. PIL's limit
    against decompression bombs stays as it is set.
    """
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            return Image.open(file).convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not an image that PIL knows" if (os.path.getsize(path) if data is None else data) else "empty file"
    except Exception as error:  # PIL raises many kinds on damaged files, SyntaxError among them
        return reason(error)


def reason(error: Exception) -> str:
    """The error in one line, without the path that an OSError names."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())

"""Image files as samples: pixels in RGB, or the reason why there are none."""

import io
import os
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from geomreg.integrations.recipes.data.rgb import ImageConfig, Preprocessing, to_rgb

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

    The image is read as the ``images`` of a :class:`~geomreg.integrations.recipes.data.rgb.Preprocessing` say, and for any other
    transform by the defaults. Where that changed something, ``"converted"`` names it, some of
    :data:`~geomreg.integrations.recipes.data.rgb.KINDS`.

    Exceptions of ``transform`` are not caught: they are mistakes in the program, not in the data.
    """
    images = ImageConfig()
    if isinstance(transform, Preprocessing):
        transform, images = transform.transform, transform.images
    found = _loaded(path, data, images)
    if isinstance(found, str):
        return broken_sample(name, sample_id, path, found, strict=strict, where=where)
    image, kinds = found
    sample = {"id": sample_id, "image": transform(image)}
    return {**sample, "converted": kinds} if kinds else sample


def broken_sample(
    name: str, sample_id: str, path: str, reason: str, *, strict: bool, where: str = "", what: str = "an image"
) -> dict[str, Any]:
    """``{"id", "broken": "<path>: <reason>"}``; if ``strict`` a ValueError."""
    if strict:
        raise ValueError(
            f"{name}: expected {what}, got {path}: {reason}{where}. Repair it, or pass strict=False to leave such samples out."
        )
    return {"id": sample_id, "broken": f"{path}: {reason}"}


def load_rgb(path: str, data: bytes | None = None, images: ImageConfig | None = None) -> Image.Image | str:
    """The image in a file, or in its content ``data``, in RGB; or in a few words why it cannot be loaded.

    It is read as ``images`` say, by default upright, blended on white and scaled from more than 8 bits: see
    :class:`~geomreg.integrations.recipes.data.rgb.ImageConfig`, also for where that differs from open_clip's and torchvision's
    ``convert("RGB")``. PIL's limit against decompression bombs stays as it is set.
    """
    found = _loaded(path, data, images or ImageConfig())
    return found if isinstance(found, str) else found[0]


def _loaded(path: str, data: bytes | None, images: ImageConfig) -> tuple[Image.Image, tuple[str, ...]] | str:
    """The image and what was converted, or why there is none."""
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            return to_rgb(Image.open(file), images)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not an image that PIL knows" if (os.path.getsize(path) if data is None else data) else "empty file"
    except Exception as error:  # PIL raises many kinds on damaged files, SyntaxError among them
        return reason(error)


def reason(error: Exception) -> str:
    """The error in one line, without the path that an OSError names."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())

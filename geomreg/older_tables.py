"""What tables of older versions do not say of their samples: they stay readable, and each such gap is named once, in one line."""

import warnings
from pathlib import Path

import torch.distributed as dist

__all__ = ["LOADING", "said_of_loading", "warn_of_texts"]

LOADING = "loading"  # the part of an image fingerprint that says how files become pixels; older tables and most data sets have none


def warn_of_texts(folder: Path) -> None:
    """Of a table that is read with token ids at hand and does not know which texts it embedded; by the first process alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            f"EmbeddingCache: expected {folder} to know which texts it embedded, got a table of an older version: another text under the "
            "same id (a template, an edited caption) goes unnoticed. Build it again over the same folder (geomreg embed, or "
            "EmbeddingCache.build), which replaces it.",
            stacklevel=1,
        )


def said_of_loading(path: Path, found: str | None, expected: str | None) -> bool:
    """Whether a table and the data set say alike how image files become pixels; one that does not say passes, with a warning.

    Args:
        path: of the cache.
        found: what the table says.
        expected: what the data set says.
    """
    if expected is not None and found is None and (not dist.is_initialized() or dist.get_rank() == 0):
        warnings.warn(
            f"EmbeddingCache: expected the images of {path} to say how their files were read, got a table of an older version: a few "
            "samples that are embedded anew decide alone. If other files may have transparency, an EXIF orientation or more than 8 bits, "
            "delete the cache and build it again.",
            stacklevel=1,
        )
    return expected is None or found in (None, expected)

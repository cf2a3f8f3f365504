"""What a sample looked like when it was embedded, in 64 bits, so that a stored embedding is never taken for that of another text."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["text_views"]


def text_views(batch: Mapping[str, Any], rows: int) -> NDArray[np.uint64] | None:
    """``(B,)`` hashes of the token ids at ``batch["text"]``, whatever their integer type and however many zeros follow them.

    Args:
        batch: with token ids ``(B, L)`` at ``"text"``.
        rows: B.

    Returns:
        None where there is no integer tensor of that shape: such texts cannot be told apart.
    """
    text = batch.get("text")
    if not isinstance(text, Tensor) or text.ndim != 2 or len(text) != rows or text.is_floating_point() or text.is_complex():
        return None
    tokens = text.detach().cpu().numpy().astype("<i8")
    digests = (hashlib.blake2b(np.trim_zeros(row, "b").tobytes(), digest_size=8).digest() for row in tokens)
    return np.frombuffer(b"".join(digests), dtype="<u8")

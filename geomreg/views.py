"""What a sample looked like when it was embedded, in 64 bits, so that a stored embedding is never taken for that of another text."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Padding", "most_padded", "padding_between", "text_views", "told_padding"]


class Padding(NamedTuple):
    """What fills texts up to the length of a batch, and does not count.

    Attributes:
        token: its id.
        left: it stands before the text; else after it.
    """

    token: int = 0
    left: bool = False


def text_views(batch: Mapping[str, Any], rows: int, padding: Padding | None = None) -> NDArray[np.uint64] | None:
    """``(B,)`` hashes of the token ids at ``batch["text"]``, whatever their integer type and however much padding they have.

    Args:
        batch: with token ids ``(B, L)`` at ``"text"`` or ``"input_ids"``, or in a mapping there.
        rows: B.
        padding: by default zeros at the end.

    Returns:
        None where there is no integer tensor of that shape: such texts cannot be told apart.
    """
    tokens = _tokens(batch)
    if tokens is None or len(tokens) != rows:
        return None
    padding = padding or Padding()
    runs = _runs(tokens, padding).tolist()
    texts = (row[run:] if padding.left else row[: len(row) - run] for row, run in zip(tokens, runs, strict=True))
    return np.frombuffer(b"".join(hashlib.blake2b(text.tobytes(), digest_size=8).digest() for text in texts), dtype="<u8")


def _tokens(batch: Mapping[str, Any]) -> NDArray[np.int64] | None:
    text = batch.get("text", batch.get("input_ids"))
    if isinstance(text, Mapping):  # as tokenizers of transformers give it
        text = text.get("input_ids")
    if isinstance(text, Tensor) and text.ndim > 2 and text.numel():
        text = text.flatten(1)
    if not isinstance(text, Tensor) or text.ndim != 2 or text.dtype == torch.bool or text.is_floating_point() or text.is_complex():
        return None
    return text.detach().cpu().numpy().astype("<i8")


def _runs(tokens: NDArray[np.int64], padding: Padding) -> NDArray[np.int64]:
    """How often the padding is repeated in each row."""
    others = (tokens if padding.left else tokens[:, ::-1]) != padding.token
    return np.where(others.any(axis=1), others.argmax(axis=1) if tokens.shape[1] else 0, tokens.shape[1])


def most_padded(batch: Mapping[str, Any]) -> list[int]:
    """Rows of the longest repetition at the end, and at the beginning; one or two of them, none without token ids."""
    tokens = _tokens(batch)
    if tokens is None or not tokens.size:
        return []
    ends = [[int(_runs(row[None], Padding(int(row[0 if left else -1]), left))[0]) for row in tokens] for left in (False, True)]
    return sorted({int(np.argmax(lengths)) for lengths in ends})


def padding_between(batch: Mapping[str, Any], row: int, alone: Mapping[str, Any]) -> Padding | None:
    """The padding that row ``row`` of a batch has and the same sample ``alone`` in a batch lacks; None if there is none to see."""
    among, single = _tokens(batch), _tokens(alone)
    if among is None or single is None or len(single) != 1 or single.shape[1] >= among.shape[1]:
        return None
    long, short = among[row], single[0]
    for left in (False, True):
        text, rest = (long[-len(short) :], long[: -len(short)]) if left else (long[: len(short)], long[len(short) :])
        if np.array_equal(text, short) and len(set(rest.tolist())) == 1:
            return Padding(int(rest[0]), left)
    return None


def told_padding(tokenizer: object) -> Padding:
    """What a tokenizer of transformers, or one around it, says of its padding; else zeros at the end."""
    for owner in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        token = getattr(owner, "pad_token_id", None)
        if isinstance(token, int):
            return Padding(token, getattr(owner, "padding_side", "right") == "left")
    return Padding()

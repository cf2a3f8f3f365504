"""Token ids of one text."""

from collections.abc import Callable

import torch
from torch import Tensor

from geomreg.checks import describe

__all__ = ["Tokenizer", "tokenize"]

Tokenizer = Callable[[list[str]], Tensor]  # as open_clip's: N texts to (N, L) int64


def tokenize(name: str, tokenizer: Tokenizer, text: str) -> Tensor:
    """``(L,)`` int64 token ids."""
    tokens = tokenizer([text])
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) != 1:
        raise TypeError(
            f"{name}: expected tokenizer to give an int64 tensor of shape (1, L) for one text, got {describe(tokens)}. "
            "Use open_clip.get_tokenizer, or wrap yours."
        )
    return tokens[0]

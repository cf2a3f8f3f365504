"""Texts of random tokens: a bank, or a reference, that needs no data."""

from typing import Any

import torch
from torch.utils.data import Dataset

from geomreg.checks import check_count, describe

__all__ = ["RandomTexts"]


class RandomTexts(Dataset[dict[str, Any]]):
    """Random token ids between start and end of text, as Lipsum-FT (arXiv 2404.00860) draws them; zeros behind.

    Sample i is ``{"id": str, "text": (L,) int64}``; drawn anew, from torch's random numbers, each time that it is asked for.

    Args:
        tokenizer: open_clip's ``SimpleTokenizer``: ids from 0, then start and end of text.
        length: random tokens of a text; Lipsum-FT's 8.
        size: N, what counts as an epoch.

    Raises:
        TypeError: another tokenizer, whose special tokens are not known.
        ValueError: ``length`` or ``size`` < 1, more tokens than the tokenizer's context holds.
    """

    modalities = ("text",)

    def __init__(self, tokenizer: Any, *, length: int = 8, size: int = 1_000_000) -> None:
        if not all(hasattr(tokenizer, name) for name in ("sot_token_id", "eot_token_id", "context_length")):
            raise TypeError(f"RandomTexts: expected open_clip's SimpleTokenizer, got {describe(tokenizer)}. Use captions for this model.")
        check_count("RandomTexts", "length", length, 1)
        check_count("RandomTexts", "size", size, 1)
        self.start, self.end, self.context = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length
        if length + 2 > self.context:
            raise ValueError(f"RandomTexts: expected length of at most {self.context - 2}, got {length}. The context ends there.")
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.size)[index]
        text = torch.zeros(self.context, dtype=torch.int64)
        text[0], text[self.length + 1] = self.start, self.end
        text[1 : self.length + 1] = torch.randint(min(self.start, self.end), (self.length,))
        return {"id": str(index), "text": text}

"""Texts: class names in templates, and token ids of one text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from geomreg.checks import describe

__all__ = ["Tokenizer", "check_templates", "fill", "tokenize"]

Tokenizer = Callable[[list[str]], Tensor]  # as open_clip's: N texts to (N, L) int64


def check_templates(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """At least one text with a place for the class name."""
    if isinstance(templates, str) or not templates or not all(isinstance(text, str) and fill(text, "") != text for text in templates):
        raise ValueError(
            f"{name}: expected templates as a tuple of texts with {{}} for the class name, got {templates!r}. "
            "Pass ('a photo of a {}.',), say."
        )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """The template with the class name for ``{}``, and for ``{a}`` with spaces for its underscores after "a" or "an"."""
    if "{a}" in template:
        words = class_name.replace("_", " ")
        template = template.replace("{a}", f"an {words}" if words[:1].lower() in tuple("aeiou") else f"a {words}")
    return template.replace("{}", class_name)


def tokenize(name: str, tokenizer: Tokenizer, text: str) -> Tensor:
    """``(L,)`` int64 token ids."""
    tokens = tokenizer([text])
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) != 1:
        raise TypeError(
            f"{name}: expected tokenizer to give an int64 tensor of shape (1, L) for one text, got {describe(tokens)}. "
            "Use open_clip.get_tokenizer, or wrap yours."
        )
    return tokens[0]

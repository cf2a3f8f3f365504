"""Tokenizers of open_clip models: found when a model is loaded, and written beside its weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

__all__ = ["SAMPLES", "check_tokenizer", "load_tokenizer", "write_clip_tokenizer", "write_tokenizer"]

SAMPLES = ("a photo of a red fox", "two boats on a lake, seen from the shore", "Portrait of an old woman; 1953", "it's 7 o'clock")
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")


def load_tokenizer(name: str, config: dict[str, Any]) -> Callable[..., Any]:
    """The tokenizer of a model, as ``open_clip.get_tokenizer`` finds it.

    Args:
        name: of a model of open_clip, ``hf-hub:...`` or ``local-dir:...``.
        config: its ``model_cfg``.

    Raises:
        ValueError: files of a Hugging Face tokenizer that are not to be had, or one that does not fit the model's vocabulary.
    """
    wanted = config.get("text_cfg", {}).get("hf_tokenizer_name")
    try:
        if wanted and name.startswith("local-dir:"):
            _check_files(Path(name.removeprefix("local-dir:")))
        tokenizer: Callable[..., Any] = open_clip.get_tokenizer(name)
        if wanted:
            check_tokenizer(tokenizer, config)
    except Exception as error:  # transformers raises errors of a dozen types for files that are missing, damaged or out of reach
        if not wanted:
            raise
        got = " ".join(str(error).split())[:200] or type(error).__name__
        if name.startswith("local-dir:"):
            advice = f"Put them there with transformers.AutoTokenizer.from_pretrained({wanted!r}).save_pretrained(...)"
        else:
            advice = f"Fetch them once with a network: transformers.AutoTokenizer.from_pretrained({wanted!r})"
        raise ValueError(
            f"load: expected the files of the tokenizer {wanted} for {name}, got none that can be used ({got}). {advice}."
        ) from error
    return tokenizer


def _check_files(folder: Path) -> None:
    """There is a vocabulary: without one transformers makes some tokenizers of two entries, and says nothing."""
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise ValueError(f"none of {', '.join(_VOCABULARIES)} in the folder")


def check_tokenizer(tokenizer: Callable[..., Any], config: dict[str, Any]) -> None:
    """It tells texts apart, in ids that the model has.

    Raises:
        ValueError: it does not.
    """
    ids = tokenizer(list(SAMPLES))
    size = config["text_cfg"].get("vocab_size")
    if torch.unique(ids, dim=0).shape[0] == 1:
        raise ValueError("a tokenizer for which all texts are equal")
    if size is not None and "hf_model_name" not in config["text_cfg"] and int(ids.max()) >= size:
        raise ValueError(f"a tokenizer with the id {int(ids.max())} for a vocabulary of {size}")


def write_tokenizer(tokenizer: Callable[..., Any] | None, config: dict[str, Any], folder: Path) -> None:
    """The files with which ``open_clip.get_tokenizer("local-dir:...")`` finds the same tokenizer; open_clip's own has none.

    Raises:
        ValueError: a model with a Hugging Face tokenizer, and none is given; or one that the layout does not have.
    """
    wanted = config.get("text_cfg", {}).get("hf_tokenizer_name")
    if wanted and not isinstance(tokenizer, HFTokenizer):
        got = "none" if tokenizer is None else type(tokenizer).__name__
        raise ValueError(f"to_open_clip: expected the tokenizer {wanted} of the model, got {got}. Pass that of the loaded model.")
    if isinstance(tokenizer, HFTokenizer):
        if not wanted:
            raise ValueError(
                "to_open_clip: expected hf_tokenizer_name in the model's text_cfg for a Hugging Face tokenizer, got none. Name it there."
            )
        tokenizer.save_pretrained(folder)


def write_clip_tokenizer(tokenizer: SimpleTokenizer, length: int, folder: Path) -> None:
    """open_clip's own tokenizer as transformers' CLIPTokenizer: vocabulary, merges and the names of the special tokens.

    Args:
        tokenizer: to write.
        length: tokens of a text at most, with those of its start and end.
        folder: where.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"  # transformers' names for the same ids
    vocabulary = {_renamed(token, start, end): number for token, number in tokenizer.encoder.items()}
    merges: Sequence[tuple[str, str]] = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    described = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "errors": "replace", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")


def _renamed(token: str, start: str, end: str) -> str:
    return {"<start_of_text>": start, "<end_of_text>": end}.get(token, token)

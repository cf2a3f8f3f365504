"""What can be known of a run's data before it trains: rows, files, captions, and what would be left out."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from geomreg.integrations.recipes.evaluate import interval
from geomreg.integrations.recipes.streams import BROKEN_LEAST, BROKEN_SHARE

__all__ = [
    "DataFacts",
    "caption_facts",
    "check_broken",
    "data_facts",
    "facts_of",
    "file_facts",
    "numbers_cut",
    "print_table",
    "sample_facts",
    "table_of",
]

FILES = 20_000  # image files that are looked for; of more a random part
SAMPLES = 256  # samples that a dry run loads
CAPTIONS = 10_000  # captions that are looked at
IN_SHARDS = 2_000  # the same where each has to be read from a shard
_AT_ONCE = 1024  # texts that are tokenized
_MARKS = 8  # tokens around a text, or that a tokenizer puts before it, at most


@dataclass
class DataFacts:
    """What was found in one data set.

    Attributes:
        name: of the data set in the run.
        rows: samples in it.
        lines: what is to be said of it, the first its size.
        broken: of how many samples that were looked at how many are broken, each time they were looked at; and the first message.
    """

    name: str
    rows: int
    lines: list[str]
    broken: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of broken samples; of a part of the data the least that is likely."""
        shares = (found / looked if looked == self.rows else interval(found, looked)[0] for found, looked, _ in self.broken if looked)
        return max(shares, default=0.0)


def data_facts(name: str, dataset: Any, tokenizer: Callable[..., Any] | None, *, of_texts: bool, load: bool, more: str = "") -> DataFacts:
    """Look at a data set.

    Args:
        name: of it in the run.
        dataset: one of the readers, whole or in part.
        tokenizer: the model's, to see which texts are cut.
        of_texts: whether texts are of use.
        load: load a few samples too, which takes seconds.
        more: what to say beside the number of samples.
    """
    facts = DataFacts(name, len(dataset), [f"{len(dataset):,} samples{more}"])
    whole = dataset
    while hasattr(whole, "dataset"):  # of a subset
        whole = whole.dataset
    if "image" in getattr(dataset, "modalities", ()) and hasattr(whole, "image_file"):
        _add(facts, *file_facts(dataset))
    if load and hasattr(dataset, "ids"):
        _add(facts, *sample_facts(dataset))
    if passed := getattr(dataset, "passed_over", None):
        facts.lines.append("passed over: " + ", ".join(f"{count:,} {what} ({first})" for what, (count, first) in passed.items()))
    if hasattr(whole, "lacking") and len(whole) == len(dataset) and any(lacking := whole.lacking().values()):
        facts.lines.append("shards: " + ", ".join(f"{count:,} samples without {what}" for what, count in whole.lacking().items() if count))
        facts.broken.append((max(lacking), len(whole), "a sample of a shard without image or caption"))
    if of_texts and hasattr(dataset, "class_texts") and not hasattr(whole, "caption"):
        facts.lines.append(_class_facts(dataset, tokenizer))
    elif of_texts and hasattr(whole, "caption"):
        _add(facts, *caption_facts(dataset, tokenizer, IN_SHARDS if hasattr(whole, "passed_over") else CAPTIONS))
    return facts


def file_facts(dataset: Any) -> tuple[str, tuple[int, int, str]]:
    """Which image files are there, of all or of a random part."""
    rows = _some(len(dataset), FILES)
    missing = [path for path in map(dataset.image_file, rows) if not os.path.exists(path)]
    told = f"files, {_part(rows, dataset)}: "
    if not missing:
        return f"{told}none missing", (0, len(rows), "")
    told += f"{len(missing):,} missing ({100 * len(missing) / len(rows):.1f} %), the first {missing[0]}"
    return told, (len(missing), len(rows), f"{missing[0]}: no such file")


def sample_facts(dataset: Any) -> tuple[str, tuple[int, int, str]]:
    """Which samples can be loaded, of a random part."""
    rows = _some(len(dataset), SAMPLES)
    with torch.random.fork_rng(devices=[]):  # crops
        broken = [sample["broken"] for sample in map(dataset.__getitem__, rows) if "broken" in sample]
    told = f"samples, {_part(rows, dataset)}: "
    if not broken:
        return f"{told}none that cannot be loaded", (0, len(rows), "")
    told += f"{len(broken):,} cannot be loaded, the first {broken[0]}"
    return told, (len(broken), len(rows), broken[0])


def caption_facts(dataset: Any, tokenizer: Callable[..., Any] | None, most: int = CAPTIONS) -> tuple[str, tuple[int, int, str]]:
    """Empty, repeated and cut captions, of all or of a random part."""
    rows = _some(len(dataset), most)
    found = [(row, text) for row, text in _captions(dataset, rows)]
    texts = [text for _, text in found if text.strip()]
    empty = next((row for row, text in found if not text.strip()), None)
    counts = Counter(texts)
    repeated = sum(count for count in counts.values() if count > 1)
    told = f"captions, {_part(rows, dataset)}: {_number(len(found) - len(texts))} empty, {_number(repeated)} repeated"
    told += "" if len(rows) == len(dataset) else " within these"  # in the whole there may be more
    told += _cut(list(counts), tokenizer, counts)
    return told, (len(found) - len(texts), len(rows), "" if empty is None else f"{dataset.ids[empty]}: empty caption")


def _captions(dataset: Any, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Those that there are; a sample without one is broken, and counted as such where samples are loaded."""
    for row in rows:
        try:
            yield row, dataset.caption(row)
        except (ValueError, OSError):
            continue


def _class_facts(dataset: Any, tokenizer: Callable[..., Any] | None) -> str:
    """The texts of classes, of all or of a random part."""
    classes, templates = len(dataset.classes), len(dataset.templates)
    counts = Counter(text for template in dataset.templates for text in dataset.class_texts(template))
    some = [list(counts)[k] for k in _some(len(counts), CAPTIONS)]
    repeated = len(set(dataset.classes))
    told = f"class texts: {classes:,} classes in {templates} template{'s' * (templates > 1)}"
    told += f", {classes - repeated} of them named as another" if repeated < classes else ""
    return told + _cut(some, tokenizer, counts)


def _cut(texts: list[str], tokenizer: Callable[..., Any] | None, counts: Mapping[str, int]) -> str:
    """How many texts, each as often as it is there, are longer than the model's context."""
    if tokenizer is None or not texts:
        return ""
    cut, context = numbers_cut(texts, tokenizer)
    return "" if cut is None else f", {_number(sum(counts[texts[k]] for k in cut))} cut at {context} tokens"


def numbers_cut(texts: Sequence[str], tokenizer: Callable[..., Any]) -> tuple[list[int] | None, int]:
    """Numbers of the texts that lose tokens at the end of the tokenizer's context, and its length; None if that cannot be known.

    A text was cut if twice the context holds more of it: padding, which may be the token of the end, does not count. Texts of fewer bytes
    than the context has places are not asked for: a token stands for a byte at least.
    """
    short = tokenizer([""])
    context, padding = short.shape[1], short[0, -1]
    found: list[int] = []
    long = [k for k, text in enumerate(texts) if len(text.encode("utf-8", "surrogateescape")) + _MARKS > context]
    for start in range(0, len(long), _AT_ONCE):
        numbers = long[start : start + _AT_ONCE]
        part = [texts[k] for k in numbers]
        try:
            longer = tokenizer(part, context_length=2 * context)
        except TypeError:  # a tokenizer of one's own
            return None, context
        lost = (longer != padding).sum(dim=1) > (tokenizer(part) != padding).sum(dim=1)
        found += [numbers[k] for k in lost.nonzero().flatten().tolist()]
    return found, context


def check_broken(facts: Sequence[DataFacts], streams: Mapping[str, Any], steps: int) -> None:
    """Refuse a run that its broken samples would stop.

    Args:
        facts: of the data, those that are drawn among them.
        streams: what draws them, by name.
        steps: of the run.

    Raises:
        RuntimeError: more of the samples are broken than a run takes.
    """
    for one in facts:
        drawn = steps * streams[one.name].size if one.name in streams else 0
        if one.share * drawn > max(BROKEN_LEAST, BROKEN_SHARE * drawn):
            found, looked, first = max(one.broken, key=lambda entry: entry[0] / max(1, entry[1]))
            raise RuntimeError(
                f"finetune: expected at most {BROKEN_SHARE:.0%} of the samples of {one.name} to be broken, got {found:,} of {looked:,}, "
                f"the first {first}. Restore them, or leave them out."
            )


def facts_of(streams: Mapping[str, Any], watched: Mapping[str, Any], tokenizer: Callable[..., Any], *, load: bool) -> list[DataFacts]:
    """Of the data that are drawn, and of those that are only watched; the same on all processes."""
    found = []
    for name, stream in streams.items():
        of_texts = "text" in stream.dataset.modalities or hasattr(stream.dataset, "class_texts")
        more = f", {stream.batches_an_epoch:,} batches an epoch"
        found.append(data_facts(name, stream.dataset, tokenizer, of_texts=of_texts, load=load, more=more))
    return found + [data_facts(name, data, tokenizer, of_texts=True, load=load) for name, data in watched.items()]


def table_of(facts: Sequence[DataFacts], drawn: Mapping[str, tuple[int, int]] | None = None) -> dict[str, list[str]]:
    """What is said of the data, by name; of streams also how many samples were drawn, and how many of them were broken."""
    table = {one.name: list(one.lines) for one in facts}
    for name, (seen, broken) in (drawn or {}).items():
        if seen:
            table[name].append(f"drawn: {seen:,} samples, {_number(broken)} of them broken and replaced")
    return table


def print_table(parts: Mapping[str, Sequence[str]]) -> None:
    """Lines beside the name of what they are about."""
    width = max(map(len, parts), default=0)
    for name, lines in parts.items():
        for number, line in enumerate(lines):
            print(f"{'' if number else name:<{width}}  {line}")


def _add(facts: DataFacts, line: str, broken: tuple[int, int, str]) -> None:
    facts.lines.append(line)
    facts.broken.append(broken)


def _number(count: int) -> str:
    return f"{count:,}" if count else "none"


def _some(rows: int, most: int) -> list[int]:
    """All rows, or a random part, always the same, in order."""
    return list(range(rows)) if rows <= most else np.sort(np.random.default_rng(0).choice(rows, most, replace=False)).tolist()


def _part(rows: Sequence[int], dataset: Any) -> str:
    return f"all {len(rows):,}" if len(rows) == len(dataset) else f"a random {len(rows):,} of {len(dataset):,}"

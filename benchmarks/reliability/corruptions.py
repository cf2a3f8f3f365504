"""Damaged files: each must be refused in one line that names it, be made anew, or change nothing.

    python benchmarks/reliability/corruptions.py   # results/corruptions.json

For each kind of file that the library reads (``KINDS`` in tests/files_read.py, with the reader that a command uses) and each of its files,
mutations from a seed: a flipped bit anywhere, or near the beginning, a cut end, an inserted byte, another file's content, nothing, zeros
from some place on, no file; in JSON also a renamed or lost key and a value of another type; in tables and other lines a damaged one. The
file is then read as a command reads it, and what was read is compared with what is read of the whole file.

``refused``: an error of one line with the name of the file or its folder, and what to do. ``refused, naming the option``: the same with the
name of an option in the place of the file's, for configurations, whose options may come from several files. ``made anew``: the same
content, after the file was written again or was passed over with a warning. ``harmless``: the same content without. ``warned``: other
content, after a warning with the name of the file. ``other data``: other content, of a file that has no place for a checksum, because
users or other programs write it. These must not be: ``silent``, other content of a file that has one; ``refused without advice``, ``refused
without the file's name``; ``traceback``, an exception of a kind that the command does not turn into a line.
"""

import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from damaging import Damaged, damages
from files_read import KINDS

FILE = Path(__file__).parent / "results" / "corruptions.json"
EACH = 8  # mutations of each file by each damage
MUST_NOT_BE = ("silent", "traceback", "refused without advice", "refused without the file's name")


def named(kind: str, file: Path, folder: Path) -> str:
    """Files of a cache have random names; only what they are is said."""
    if "cache" not in kind or file.name == "manifest.json":
        return file.relative_to(folder).as_posix()
    return "shard" if file.stem.isdigit() else file.name


def measured(kind: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Counts of outcomes for each file of a kind, and what must not be."""
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    generator = random.Random(kind)
    with tempfile.TemporaryDirectory() as temporary:
        files = Damaged(KINDS[kind], folder := Path(temporary))
        for file in files.kind.files:
            others = [files.kept[one] for one in files.kind.files if files.kept[one] != files.kept[file]] or [b"{}"]
            count = counts.setdefault(named(kind, file, folder), Counter())
            for damage in damages(file):
                for _ in range(EACH):
                    content = files.damaged(file, damage, generator, generator.choice(others))
                    outcome, said = files.outcome(file, content)
                    count[outcome] += 1
                    if outcome in MUST_NOT_BE:
                        wrong.append(f"{kind}, {file.name}, {damage}: {outcome}: {said.replace(temporary, '')[:200]}")
    return {name: dict(sorted(count.items())) for name, count in counts.items()}, wrong


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.ERROR)
    kinds: dict[str, Any] = {}
    of_kinds: dict[str, dict[str, int]] = {}
    wrong: list[str] = []
    for kind in KINDS:
        kinds[kind], found = measured(kind)
        of_kinds[kind] = dict(sorted(sum((Counter(one) for one in kinds[kind].values()), Counter()).items()))
        wrong += found
        print(kind, json.dumps(of_kinds[kind]), *found, sep="\n  ", flush=True)
    totals: Counter[str] = sum((Counter(one) for one in of_kinds.values()), Counter())
    of = {"torch": version("torch"), "open_clip": version("open_clip_torch"), "geomreg": version("geomreg")}
    record = {
        "environment": of,
        "mutations": totals.total(),
        "totals": dict(totals),
        "must_not_be": wrong,
        "kinds": of_kinds,
        "files": kinds,
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(totals)


if __name__ == "__main__":
    main()

"""Damaged files: each must be refused in one line that names it, be made anew, or change nothing.

    python benchmarks/reliability/corruptions.py   # results/corruptions.json

For each kind of file that the library reads, mutations from a seed: a flipped bit, a cut end, an inserted byte, another file's content, no
file; in JSON also a renamed key and a value of another type. The file is then read as a command reads it, and what was read is compared
with what is read of the whole file. ``refused``: an error of one line with the name of the file or its folder. ``refused, unnamed``: an
error without it. ``equal``: the same content, be it that the damage does not count or that the file was made anew. ``warned``: other
content, after a warning with the name of the file. ``silent``: other content without one. ``traceback``: an exception of a kind that the command does not turn into a line. Exports for other programs (``open_clip_config.
json``, weights, heads) have no place for a checksum, and say so in the table by their silent ones.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.integrations.recipes import checkpoint, records
from geomreg.integrations.recipes.config import Config, DataConfig, ModelConfig, TrainConfig
from geomreg.integrations.recipes.data import TarPairs
from geomreg.integrations.recipes.head import load_head, write_head
from geomreg.integrations.recipes.models import load, model_folder
from geomreg.integrations.recipes.records import Log

FILE = Path(__file__).parent / "results" / "corruptions.json"
EACH = 80  # mutations of each file; of a model, which takes long to read, a twentieth
ERRORS = (ValueError, TypeError, RuntimeError, OSError)  # that the command says in one line


def digest(value: Any) -> str:
    """Of nested values and tensors."""
    if isinstance(value, torch.Tensor):
        value = [str(value.dtype), list(value.shape), value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    if isinstance(value, dict):
        value = [[str(key), digest(one)] for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        value = [digest(one) for one in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


# what is read: folder to write to -> files to damage, function that reads --------------------------------------------------------------


def of_checkpoint(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    """Two with the same content: falling back to the first counts as made anew."""
    torch.manual_seed(0)
    content = {"weight": torch.randn(8, 8), "step": 3, "names": ["a", None, 1.5]}
    for step in (1, 2):
        partial = checkpoint.begin(folder, step)
        for name in ("model", "optimizer"):
            checkpoint.write(partial, name, {**content, "of": name})
        checkpoint.publish(partial)
    second = folder / "step-000000002"

    def read() -> Any:
        found = checkpoint.latest(folder)
        assert found is not None
        return [checkpoint.read(found, name) for name in ("model", "optimizer")]

    return sorted(second.iterdir()), read


def of_run(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    """Configuration and data of a run that goes on."""
    data = [DataConfig("csv", "pairs.csv"), TrainConfig(steps=4)]
    one = Config(ModelConfig("emojiclip"), data[0], data[1], folder)  # type: ignore[arg-type]
    dataset = {"target": type("Data", (list,), {"fingerprint": {"image": "1a2b", "text": "3c4d"}})(range(5))}
    records._claim(one, dataset)
    records.release()

    def read() -> Any:
        records._claim(one, dataset)
        records.release()
        return json.loads((folder / "data.json").read_text())

    return [folder / "config.json", folder / "data.json"], read


def of_metrics(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    accelerator = SimpleNamespace(is_main_process=True)

    def make() -> Log:
        return Log(SimpleNamespace(output=folder, trackers=()), 9, accelerator)  # type: ignore[arg-type]

    log = make()
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        for step in range(1, 6):
            log.add({"step": step, "loss": 1 / step})
    state = log.state_dict()

    def read() -> Any:
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            make().load_state_dict(state)
        return (folder / "metrics.jsonl").read_text()

    return [folder / "metrics.jsonl"], read


def of_index(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    """Of tar files."""
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    (folder / "0.txt").write_text("a picture")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for row in range(5):
            for end in ("png", "txt"):
                tar.add(folder / f"0.{end}", f"{row}.{end}")

    def read() -> Any:
        found = TarPairs(folder / "0.tar", transform=None, tokenizer=lambda texts: torch.zeros(len(texts), 3), modalities=("text",),
                         index=folder / "index.safetensors")  # fmt: skip
        return [list(found.ids), found._members.tolist()]

    read()
    return [folder / "index.safetensors"], read


def of_cache(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    model = torch.nn.Linear(4, 4)
    dataset = [{"id": row, "image": torch.randn(4, generator=torch.Generator().manual_seed(row))} for row in range(40)]
    teacher = Teacher(model, lambda model, batch: Embeddings(image=torch.nn.functional.normalize(model(batch["image"]), dim=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EmbeddingCache.build(teacher, dataset, folder / "cache", progress=False)  # type: ignore[arg-type]

    def read() -> Any:
        return EmbeddingCache.open(folder / "cache")(list(range(40))).image

    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file() and path.stat().st_size), read


def of_head(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    torch.manual_seed(0)
    write_head(folder, torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), ["a", "b", "c"])

    def read() -> Any:
        found = load_head(folder)
        return None if found is None else [found[0].state_dict(), found[1].state_dict(), found[2]]

    return [folder / "head.safetensors", folder / "classes.json"], read


def of_model(folder: Path) -> tuple[list[Path], Callable[[], Any]]:
    shutil.copytree(model_folder(), folder / "model")

    def read() -> Any:
        found = load(str(folder / "model"))
        return [found.model.state_dict(), str(found.transform)]

    return sorted(path for path in (folder / "model").iterdir() if path.suffix in (".json", ".safetensors")), read


KINDS = {
    "checkpoint": of_checkpoint, "run": of_run, "metrics": of_metrics, "tar index": of_index, "cache": of_cache,
    "exported head": of_head, "exported model": of_model,
}  # fmt: skip


# mutations ------------------------------------------------------------------------------------------------------------------------------


def mutated(content: bytes, others: list[bytes], is_json: bool, generator: random.Random) -> tuple[str, bytes | None]:
    kinds = ["bit", "bit", "cut", "insert", "swap", "gone", *(["key", "type"] if is_json else [])]
    kind, place = generator.choice(kinds), generator.randrange(len(content))
    if kind == "bit":
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        return kind, bytes(changed)
    if kind == "insert":
        return kind, content[:place] + bytes([generator.randrange(256)]) + content[place:]
    if kind == "swap":
        return kind, generator.choice(others or [b"{}"])
    if kind in ("key", "type"):
        return kind, json.dumps(_altered(json.loads(content), kind, generator), indent=1).encode()
    return kind, content[:place] if kind == "cut" else None


def _altered(value: Any, kind: str, generator: random.Random) -> Any:
    """A copy with one key renamed, or one value of another type, at a random depth."""
    if isinstance(value, dict) and value:
        key = generator.choice(list(value))
        if isinstance(value[key], (dict, list)) and value[key] and generator.random() < 0.7:
            return {**value, key: _altered(value[key], kind, generator)}
        if kind == "key":
            return {(one + "x" if one == key else one): entry for one, entry in value.items()}
        return {**value, key: generator.choice([one for one in (None, -1, "text", [], {}, 1e308) if one != value[key]])}
    if isinstance(value, list) and value:
        place = generator.randrange(len(value))
        return [_altered(one, kind, generator) if row == place else one for row, one in enumerate(value)]
    return None if value is not None else 0


def outcome(read: Callable[[], Any], file: Path, expected: str) -> str:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if digest(read()) == expected:
                return "equal"
            return "warned" if any(file.name in str(one.message) for one in caught) else "silent"
    except ERRORS as error:
        line = " ".join(str(error).split())
        return "refused" if file.name in line or str(file.parent) in line else f"refused, unnamed: {line[:120]}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for kind, make in KINDS.items():
        counts: dict[str, Counter[str]] = {}
        with tempfile.TemporaryDirectory() as temporary:
            (folder := Path(temporary) / "it").mkdir()
            files, read = make(folder)
            kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            expected, generator = digest(read()), random.Random(kind)
            for file in files:
                # Files of a cache have random names; only what they are is said.
                name = file.name if kind != "cache" else f"{file.suffix.removeprefix('.')} file"
                for _ in range(EACH // 20 if kind == "exported model" else EACH):
                    others = [kept[one] for one in files if one != file and kept[one] != kept[file]]
                    damage, content = mutated(kept[file], others, file.suffix == ".json", generator)
                    file.unlink() if content is None else file.write_bytes(content)
                    same = content == kept[file]
                    result = "equal" if same else outcome(read, file, expected)
                    counts.setdefault(name, Counter())[result if result != "silent" else f"silent: {damage}"] += 1
                    for path, before in kept.items():
                        if not path.is_file() or path.read_bytes() != before:
                            path.parent.mkdir(parents=True, exist_ok=True)
                            path.write_bytes(before)
                            os.utime(path)
        found[kind] = {name: dict(sorted(count.items())) for name, count in counts.items()}
        print(kind, json.dumps(found[kind], indent=1), flush=True)
    totals: Counter[str] = Counter()
    for counts_of in found.values():
        for one in counts_of.values():
            for result, count in one.items():
                totals[result.partition(":")[0]] += count
    of = {"torch": version("torch"), "open_clip": version("open_clip_torch"), "geomreg": version("geomreg")}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"environment": of, "mutations": totals.total(), "totals": dict(totals), "kinds": found}, indent=1) + "\n")
    print(totals)


if __name__ == "__main__":
    main()

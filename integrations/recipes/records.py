"""The records of a run in its folder: configuration, environment, metrics."""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from geomreg.integrations.recipes.config import Config
from geomreg.integrations.recipes.data.rgb import ImageConfig
from geomreg.integrations.recipes.data.strings import fingerprint
from geomreg.integrations.recipes.files import read_json, writing
from geomreg.locking import Lock
from geomreg.shards import write_file

__all__ = ["Log", "as_json", "check_folder", "check_trackers", "claim", "release", "whole_lines"]

_ADVICE = "Restore it, or use another output folder."
_CHANGES_NOTHING = re.compile(
    r"output|device|trackers|transformers|ensemble|train\.(workers|save_every)|model\.learning_rates"
    r"|(target|reference|texts|probe|evaluation\..+)\.(path|subset|captions|options\.root)"  # the data themselves are compared
)
_IMAGES_BEFORE = dataclasses.asdict(ImageConfig(loader="open_clip"))  # of runs of versions that had no options for them
_LOCKS: list[Lock] = []  # of the folder that this process has claimed


def check_folder(config: Config) -> None:
    """The run's folder is new, or of a run of this configuration; what changes no result may differ, and it may have been moved.

    Where data are may differ too: :func:`claim` looks at themselves.

    Raises:
        FileExistsError: it is a file.
        ValueError: a run of another configuration, or a damaged one.
    """
    if config.output.exists() and not config.output.is_dir():
        raise FileExistsError(f"finetune: expected output as a folder, got the file {config.output}. Choose another.")
    file = config.output / "config.json"
    if file.is_file():
        before = {"images": _IMAGES_BEFORE, **read_json("finetune", file, dict, "the configuration of a run", _ADVICE)}
        if differing := _differing(before, _resolved(config)):
            name, old, new = differing
            raise ValueError(
                f"finetune: expected the run in {config.output} to go on with {name} {old!r}, got {new!r}. Use the same configuration, or "
                "another output folder."
            )


def claim(config: Config, accelerator: Accelerator, data: Mapping[str, Any]) -> None:
    """Keep other commands out of the run's folder, and write what the run is into it, if it is new; all have called :func:`check_folder`.

    Args:
        config: of the run.
        accelerator: its main process does all that; what it finds wrong is raised on all.
        data: the run's data sets by name; in a run that goes on they must be those that it began with.

    Raises:
        RuntimeError: another process has the folder.
        ValueError: as :func:`check_folder`; other data.
    """
    accelerator.wait_for_everyone()  # no process writes before all have looked
    wrong: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            _claim(config, data)
        except (ValueError, RuntimeError, OSError) as error:
            release()
            wrong = [error]
    broadcast_object_list(wrong)  # so that all say the same, and none waits
    if wrong[0] is not None:
        raise wrong[0]


def _claim(config: Config, data: Mapping[str, Any]) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    _lock(config.output)
    check_folder(config)  # again: a moment ago others could write
    described = {name: _described(dataset) for name, dataset in data.items()}
    if (config.output / "config.json").is_file():
        _check_data(config.output, described)
        return
    files = {"environment.json": _environment(), "data.json": described, "config.json": _resolved(config)}
    for name, content in files.items():
        write_file(config.output / name, (json.dumps(content, indent=1) + "\n").encode())


def release() -> None:
    """Let other commands use the folder that this process has claimed."""
    while _LOCKS:
        _LOCKS.pop().release()


def _lock(folder: Path) -> None:
    """Until :func:`release`, the next run of this process, or its end."""
    release()
    lock = Lock.take(folder / ".lock")
    if lock is None:
        raise RuntimeError(
            f"finetune: expected {folder} for this command alone, got another one that is at work there. Wait for its end, or use "
            "another output folder."
        )
    _LOCKS.append(lock)


def _described(dataset: Any) -> dict[str, Any]:
    """Number of samples, and digests of what can be known of them without reading images."""
    found = {"samples": len(dataset), **getattr(dataset, "fingerprint", {})}
    if (labels := getattr(dataset, "labels", None)) is not None:
        found["classes"] = fingerprint(list(map(str, labels)), dataset.classes, dataset.templates)
    return found


def _check_data(folder: Path, now: dict[str, dict[str, Any]]) -> None:
    """The data are those that the run began with."""
    file = folder / "data.json"
    before = read_json("finetune", file, dict, "digests of a run's data", _ADVICE) if file.is_file() else {}
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if parts := [part for part in new if old.get(part) != new[part]]:
            got = new["samples"] if "samples" in parts else f"as many of other ids or texts ({', '.join(parts)})"
            raise ValueError(
                f"finetune: expected the run in {folder} to go on with the {old['samples']} samples of {name} that it began with, got "
                f"{got}. Restore them, or use another output folder."
            )


def _resolved(config: Config) -> dict[str, Any]:
    """As it is written."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del found["dry_run"]
    return found


def _differing(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first value, by its dotted name, in which two configurations differ; but for what changes no result."""
    if _CHANGES_NOTHING.fullmatch(name) or _place(before) == _place(now):
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        found = (_differing(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in {**before, **now})
        return next(filter(None, found), None)
    return name, before, now


def _place(value: Any) -> Any:
    """One spelling for each path of a file that there is."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _environment() -> dict[str, Any]:
    """Versions of packages and of the code."""
    packages = ("geomreg", "torch", "open_clip_torch", "accelerate", "torchvision", "peft")
    installed = {name: metadata.version(name) for name in packages if _is_installed(name)}
    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "describe", "--always", "--dirty"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent, check=False)
        commit = answer.stdout.strip() or None
    return {"run": uuid.uuid4().hex[:8], "python": platform.python_version(), "packages": installed, "git": commit}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_trackers(trackers: tuple[str, ...]) -> None:
    """The trackers are installed; accelerate would go on without."""
    for name in trackers:
        if find_spec(name) is None:
            raise ValueError(f"finetune: expected {name} to be installed for its tracker, got none. Run pip install {name}.")


class Log:
    """metrics.jsonl, null where a number is not finite, a progress bar, and the configured trackers; by the main process."""

    def __init__(self, config: Config, steps: int, accelerator: Accelerator) -> None:
        self.file, self.main, self.accelerator = config.output / "metrics.jsonl", accelerator.is_main_process, accelerator
        self.bar = tqdm(total=steps, unit="steps", disable=not self.main)
        self.started, self.tracked = False, bool(config.trackers)
        if self.tracked:
            environment = json.loads((config.output / "environment.json").read_text(encoding="utf-8"))
            wandb = {"id": environment["run"], "name": config.output.name, "dir": str(config.output), "resume": "allow"}
            try:
                accelerator.init_trackers("geomreg", dict(_flat(dataclasses.asdict(config))), {"wandb": wandb})
            except Exception as error:  # wandb has its own kinds, for no login say
                self.bar.close()
                names = ", ".join(config.trackers)
                raise RuntimeError(f"finetune: expected {names} to start, got {error} Mend that, or leave the tracker out.") from error

    def add(self, entry: dict[str, float]) -> None:
        """One step's numbers."""
        if self.tracked:
            self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=int(entry["step"]))
        if not self.main:
            return
        if not self.started:
            self.started = True
            kept = [line for line in whole_lines(self.file) if json.loads(line)["step"] < entry["step"]]  # later ones are made again
            write_file(self.file, "".join(f"{line}\n" for line in kept).encode())
            self.bar.update(int(entry["step"]) - 1)
        with writing("finetune", self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(as_json(entry) + "\n")
        self.bar.update(1)
        shown = {key: f"{value:.3g}" for key, value in entry.items() if "/" not in key and key not in _NOT_SHOWN}
        self.bar.set_postfix(shown, refresh=False)

    def end(self) -> None:
        """Close the bar and the trackers."""
        self.bar.close()
        if self.tracked:
            self.accelerator.end_training()


_NOT_SHOWN = ("step", "learning_rate", "logit_scale", "gradient_ratio")  # in the progress bar


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and plain values of a tree, as trackers take them."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}".lstrip("."))
    else:
        yield name, value if isinstance(value, (bool, int, float, str)) else str(value)


def as_json(entry: dict[str, Any]) -> str:
    """One line, null for each number that is NaN or infinite: JSON has no other word for it."""
    return json.dumps(_or_none(entry), allow_nan=False)


def _or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _or_none(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_lines(file: Path) -> list[str]:
    """Of a text file that may not be there: a kill may have cut the last."""
    content = file.read_text(encoding="utf-8") if file.is_file() else ""
    return content[: content.rfind("\n") + 1].splitlines()

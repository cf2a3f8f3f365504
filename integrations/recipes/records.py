"""The records of a run in its folder: configuration, environment, metrics."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from geomreg.integrations.recipes.checksums import check_export, checksum
from geomreg.integrations.recipes.config import Config
from geomreg.integrations.recipes.data.rgb import ImageConfig
from geomreg.integrations.recipes.data.strings import fingerprint
from geomreg.integrations.recipes.files import read_json, writing
from geomreg.integrations.recipes.waiting import alone
from geomreg.locking import Lock
from geomreg.shards import write_file

__all__ = ["Log", "as_json", "check_folder", "check_trackers", "claim", "described", "release"]

NOT_FINITE = "not-finite.txt"  # in the folder of a run that ended so: what was said
_LOCK = ".lock"
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
    if (best := config.output / "best").is_dir():
        check_export("finetune", best)  # which is not made anew
    if file.is_file():
        before = {"images": _IMAGES_BEFORE, **read_json("finetune", file, dict, "the configuration of a run", _ADVICE)}
        if differing := _differing(before, _resolved(config)):
            name, old, new = differing
            advice = "Use the same configuration, or another output folder."
            if (config.output / NOT_FINITE).is_file():
                advice = f"That run ended with a loss that is not finite: delete {config.output} to begin afresh, or use another folder."
            raise ValueError(f"finetune: expected the run in {config.output} to go on with {name} {old!r}, got {new!r}. {advice}")


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
    with alone(accelerator) as main:
        if main:
            try:
                _claim(config, data)
            except (ValueError, RuntimeError, OSError) as error:
                release()
                wrong = [error]
    broadcast_object_list(wrong)  # so that all say the same, and none waits
    if wrong[0] is not None:
        raise wrong[0]


def _claim(config: Config, data: Mapping[str, Any]) -> None:
    with writing("finetune", config.output / _LOCK):
        config.output.mkdir(parents=True, exist_ok=True)
        _lock(config.output)
    check_folder(config)  # again: a moment ago others could write
    found = described(data)
    if (config.output / "config.json").is_file():
        _check_data(config.output, found)
        if (config.output / NOT_FINITE).is_file():
            warnings.warn(
                f"finetune: the run in {config.output} ended with a loss that is not finite, and goes on from its last checkpoint, most "
                "likely to the same end. Delete the folder to begin afresh with a lower learning rate or weight, or use another folder.",
                stacklevel=4,
            )
        return
    _write(config.output / "environment.json", _environment())
    _write(config.output / "data.json", found)
    _write(config.output / "config.json", _resolved(config))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_file(file, (json.dumps(content, indent=1) + "\n").encode())


def release() -> None:
    """Let other commands use the folder that this process has claimed."""
    while _LOCKS:
        _LOCKS.pop().release()


def _lock(folder: Path) -> None:
    """Until :func:`release`, the next run of this process, or its end."""
    release()
    lock = Lock.take(folder / _LOCK)
    if lock is None:
        raise RuntimeError(
            f"finetune: expected {folder} for this command alone, got another one that is at work there. Wait for its end, or use "
            "another output folder."
        )
    _LOCKS.append(lock)


def described(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each data set by its name, what data.json says of it."""
    return {name: _described(dataset) for name, dataset in data.items()}


def _described(dataset: Any) -> dict[str, Any]:
    """Number of samples, and digests of what can be known of them without reading images."""
    found = {"samples": len(dataset), **getattr(dataset, "fingerprint", {})}
    if (labels := getattr(dataset, "labels", None)) is not None:
        found["classes"] = fingerprint(list(map(str, labels)), dataset.classes, dataset.templates)
    return found


def _check_data(folder: Path, now: dict[str, dict[str, Any]]) -> None:
    """The data are those that the run began with; checkpoints compare them too, so that a damaged file is written anew."""
    file = folder / "data.json"
    try:
        before = read_json("finetune", file, dict, "digests of a run's data", "They are written anew.")
        if before.keys() != now.keys() or not all(isinstance(one, dict) and "samples" in one for one in before.values()):
            raise ValueError(
                f"finetune: expected digests of {', '.join(now)} in {file}, got {', '.join(before)}, or others in them. They are written "
                "anew."
            )
    except ValueError as error:
        warnings.warn(str(error), stacklevel=5)
        _write(file, now)
        return
    for name in now:
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
    found = {"run": uuid.uuid4().hex[:8], "python": platform.python_version(), "packages": installed, "git": commit}
    return {**found, "checksum": checksum(found)}


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
    """metrics.jsonl, null where a number is not finite, a progress bar, and the configured trackers; by the main process.

    A checkpoint knows length and digest of the file: a run that goes on cuts off what follows, and finds damage in what stays.
    """

    def __init__(self, config: Config, steps: int, accelerator: Accelerator) -> None:
        self.file, self.main, self.accelerator = config.output / "metrics.jsonl", accelerator.is_main_process, accelerator
        self.bar = tqdm(total=steps, unit="steps", disable=not self.main)
        self.started, self.tracked = False, bool(config.trackers)
        self.written, self.digest = 0, hashlib.blake2b(digest_size=16)
        if self.tracked:
            file = config.output / "environment.json"
            environment = read_json("finetune", file, dict, "the environment of a run", _ADVICE)
            known = environment.pop("checksum", None)  # older versions wrote none
            if not isinstance(environment.get("run"), str) or known not in (None, checksum(environment)):
                raise ValueError(
                    f"finetune: expected the name of the run, for its trackers, in {file}, got none, or another than was written. {_ADVICE}"
                )
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
            if not self.written:  # no checkpoint: all is made again
                write_file(self.file, b"")
            self.bar.update(int(entry["step"]) - 1)
        line = (as_json(entry) + "\n").encode()
        with writing("finetune", self.file), open(self.file, "ab") as file:
            file.write(line)
        self.written += len(line)
        self.digest.update(line)
        self.bar.update(1)
        shown = {key: f"{value:.3g}" for key, value in entry.items() if "/" not in key and key not in _NOT_SHOWN}
        self.bar.set_postfix(shown, refresh=False)

    def state_dict(self) -> dict[str, Any]:
        return {"bytes": self.written, "digest": self.digest.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as after a checkpoint: cut off the lines of later steps.

        Raises:
            ValueError: the lines before are not those that were written.
        """
        if not self.main:
            return
        content = self.file.read_bytes()[: state["bytes"]] if self.file.is_file() else b""
        digest = hashlib.blake2b(content, digest_size=16)
        if digest.hexdigest() != state["digest"]:
            if self.file.exists():
                raise ValueError(
                    f"finetune: expected the first {state['bytes']} bytes of {self.file} as they were written, got others. Restore it, or "
                    "delete it: the run goes on without the lines of its earlier steps."
                )
            warnings.warn(f"finetune: expected {self.file}, got none. The lines of earlier steps are lost.", stacklevel=2)
        write_file(self.file, content)
        self.written, self.digest, self.started = len(content), digest, False

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

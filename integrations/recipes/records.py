"""The records of a run in its folder: configuration, environment, metrics."""

import dataclasses
import json
import math
import platform
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from geomreg.integrations.recipes.config import Config
from geomreg.shards import write_file

__all__ = ["Log", "as_json", "check_folder", "check_trackers", "claim", "whole_lines"]


def check_folder(config: Config) -> None:
    """The run's folder is new, or of a run of this configuration; what changes no result may differ, and it may have been moved.

    Raises:
        FileExistsError: it is a file.
        ValueError: a run of another configuration.
    """
    if config.output.exists() and not config.output.is_dir():
        raise FileExistsError(f"finetune: expected output as a folder, got the file {config.output}. Choose another.")
    file = config.output / "config.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if differing := _differing(_that_matters(before), _that_matters(_resolved(config))):
            name, old, new = differing
            raise ValueError(
                f"finetune: expected the run in {config.output} to go on with {name} {old!r}, got {new!r}. Use the same configuration, or "
                "another output folder."
            )


def claim(config: Config, accelerator: Accelerator) -> None:
    """Write what the run is into its folder, if it is new; all processes have called :func:`check_folder`."""
    file = config.output / "config.json"
    if file.is_file():
        return
    accelerator.wait_for_everyone()  # no process writes before all have looked
    if accelerator.is_main_process:
        config.output.mkdir(parents=True, exist_ok=True)
        write_file(config.output / "environment.json", (json.dumps(_environment(), indent=1) + "\n").encode())
        write_file(file, (json.dumps(_resolved(config), indent=1) + "\n").encode())
    accelerator.wait_for_everyone()


def _resolved(config: Config) -> dict[str, Any]:
    """As it is written."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del found["dry_run"]
    return found


def _that_matters(resolved: dict[str, Any]) -> dict[str, Any]:
    """Without what changes no result."""
    kept = {key: value for key, value in resolved.items() if key not in ("output", "device", "trackers")}
    return {**kept, "train": {key: value for key, value in resolved["train"].items() if key not in ("workers", "save_every")}}


def _differing(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first value, by its dotted name, in which two configurations differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _differing(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return None
    return None if before == now else (name, before, now)


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
        with open(self.file, "a", encoding="utf-8") as file:
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

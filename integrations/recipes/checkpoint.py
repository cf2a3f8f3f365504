"""Everything that a run needs to go on, in safetensors and JSON; whole or not at all, and with a checksum of every file."""

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geomreg.integrations.recipes.checksums import CHECKSUMS, difference, write_checksums
from geomreg.integrations.recipes.files import put_in_place, writing

__all__ = ["begin", "checkpoints", "latest", "publish", "random_state", "read", "set_random_state", "write"]

_NAME = re.compile(r"step-(\d{9})")
_WARNED: set[tuple[Path, str]] = set()  # of damaged checkpoints, each once in a process
_TENSOR, _ITEMS = "tensor", "items"  # what stands in the JSON for a tensor, and for a dict whose keys are not all strings


def begin(run: Path, step: int) -> Path:
    """A hidden folder of the run for the checkpoint after ``step`` optimizer steps; every process may write to it."""
    partial = run / f".step-{step:09d}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def write(folder: Path, name: str, value: Any) -> None:
    """``name.json`` and, if there are tensors in it, ``name.safetensors``, on the disk.

    Args:
        folder: from :func:`begin`.
        name: what :func:`read` asks for; processes use different ones.
        value: nested dicts, lists and tuples of tensors, numbers, strings and None; tuples come back as lists.

    Raises:
        TypeError: something else in it.
        OSError: no space, say.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _packed(value, name, tensors)
    if tensors:
        with writing("finetune", file := folder / f"{name}.safetensors"):
            save_file(tensors, file)
            file.chmod(folder.stat().st_mode & 0o666)  # the umask's, as the folder has it: safetensors writes for the owner alone
            _to_disk(file)
    with writing("finetune", file := folder / f"{name}.json"):
        file.write_text(json.dumps(skeleton), encoding="utf-8")
        _to_disk(file)


def publish(partial: Path, *, keep: int | None = None) -> Path:
    """Give a checkpoint its checksums and its name, when all processes have written; then remove all but the ``keep`` newest."""
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    for path in partial.iterdir():  # what a killed process was writing with
        if path.suffix not in (".json", ".safetensors"):
            path.unlink()
    with writing("finetune", partial / CHECKSUMS):
        _to_disk(write_checksums(partial))
    put_in_place(partial, final)  # maybe the same step again, after a resume that went back
    _to_disk(final.parent)
    there = checkpoints(final.parent)
    older = there[: there.index(final) + 1]
    for old in (*older[: -keep if keep else 0], *there[len(older) :]):  # later ones are damaged: the run went on from before them
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in final.parent.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def read(folder: Path, name: str) -> Any:
    """What :func:`write` was given, tensors on the CPU.

    Raises:
        RuntimeError: a missing or damaged file.
    """
    path = folder / f"{name}.json"
    try:
        skeleton = json.loads(path.read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        if path.with_suffix(".safetensors").exists():
            with safe_open(path.with_suffix(".safetensors"), "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _unpacked(skeleton, tensors)
    except FileNotFoundError as error:
        advice = "Remove it: the run goes on from the one before, or from the start"
        if name.startswith("process-"):
            advice = "Resume with as many processes"
        raise RuntimeError(f"finetune: expected {path.name} in the checkpoint {folder}, got none. {advice}.") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RuntimeError(
            f"finetune: expected a whole checkpoint in {folder}, got a damaged {path.stem} ({error}). Use another."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run whose files are as they were written; a damaged one is passed over with a warning.

    Raises:
        RuntimeError: there are checkpoints, and all are damaged or without checksums.
    """
    wrong: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        if (reason := difference(path)) is None:
            return path
        wrong.append((path, reason))
        if (path, reason) not in _WARNED:
            _WARNED.add((path, reason))
            warnings.warn(
                f"finetune: expected the checkpoint {path} as it was written, got {reason}. The run makes its steps again.",
                stacklevel=2,
            )
    if wrong:
        path, reason = wrong[0]
        raise RuntimeError(
            f"finetune: expected a whole checkpoint in {folder}, got {path.name} with {reason}. Restore the file from a copy, or delete "
            f"the folder {folder}: the run then begins again with its first step."
        )
    return None


def random_state() -> dict[str, Any]:
    """Of torch on the CPU and every GPU, numpy and Python."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on as when :func:`random_state` was called."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _packed(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors apart, each a copy of its own."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: key}
    if isinstance(value, Mapping):
        items = [[name, _packed(one, f"{key}.{name}", tensors)] for name, one in value.items()]
        return {_ITEMS: items}
    if isinstance(value, (list, tuple)):
        return [_packed(one, f"{key}.{k}", tensors) for k, one in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"finetune: expected numbers, strings and tensors in a checkpoint, got {type(value).__name__} at {key}.")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(one, tensors) for one in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpacked(one, tensors) for key, one in value[_ITEMS]}
    return value


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

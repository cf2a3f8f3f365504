"""``geomreg quickstart``: fine-tune a real CLIP on real pictures and show what it forgets, with and without DiVE."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from geomreg.checks import check_weight
from geomreg.integrations.quickstart.experiment import (
    METHODS,
    Pool,
    load_model,
    openmoji_experiment,
    run_method,
    settings_record,
    units_of_work,
)
from geomreg.integrations.quickstart.report import picture, table
from geomreg.integrations.recipes.train import Settings

__all__ = ["Options", "quickstart"]

LEARNING_RATE, WARMUP_SHARE = 4e-4, 0.1  # rate and weight: benchmarks/emojishift/results/quickstart_tuning.json, "chosen"


@dataclass(frozen=True)
class Options:
    """Options of ``geomreg quickstart``.

    Args:
        seed: of the training batches; evaluation views never change.
        steps: optimizer steps of each run.
        output: folder of results.json, table.md and quickstart.png.
        device: "auto" takes a GPU if there is one; or "cpu", "cuda", "cuda:1", "mps".
        weight: of the regularizer (the paper's lambda, whose natural size grows with the squared logit scale).
    """

    seed: int = 0
    steps: int = 150
    output: Path = Path("geomreg-quickstart")
    device: str = "auto"
    weight: float = 300.0


def quickstart(options: Options) -> dict[str, Any]:
    """Fine-tune EmojiCLIP on OpenMoji's animals with and without DiVE, and show what it learned and what it forgot.

    Writes results.json, table.md and quickstart.png when all runs are done, and returns the content of the first.

    Raises:
        ValueError: an option out of range.
        RuntimeError: absent device, damaged checkpoint.
        OSError: cache or output cannot be written.
    """
    if options.steps < 1 or not 0 <= options.seed < 2**32:
        raise ValueError(
            f"quickstart: expected steps >= 1 and 0 <= seed < 2**32, got {options.steps} and {options.seed}. Choose such numbers."
        )
    check_weight("quickstart", "weight", options.weight)
    output = _writable(Path(options.output))
    device = _device(options.device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if accelerator.device.type != device.type:
        raise RuntimeError(f'quickstart: expected to run on {device}, got {accelerator.device} from accelerate. Use "auto" or "cpu".')
    load_model()  # damaged files are found before minutes are spent
    pool = Pool(openmoji_experiment(progress=True))
    settings = Settings(steps=options.steps, learning_rate=LEARNING_RATE, warmup_steps=max(1, round(WARMUP_SHARE * options.steps)))
    rows = []
    with tqdm(total=units_of_work(options.steps), bar_format="{l_bar}{bar}| {elapsed}, {remaining} left") as progress:
        for method in METHODS:
            progress.set_description(method)
            rows.append(
                run_method(
                    method,
                    pool,
                    seed=options.seed,
                    settings=settings,
                    weight=options.weight,
                    accelerator=accelerator,
                    on_progress=progress.update,
                )
            )
    results = {
        "seed": options.seed,
        "settings": settings_record(settings, weight=options.weight, device=str(accelerator.device)),
        "concepts": {
            "target": list(pool.experiment.target.codes),
            **{name: list(drawings.codes) for name, drawings in pool.experiment.zero_shot.items()},
        },
        "rows": rows,
    }
    text = table(rows)
    _publish(output, results, text)
    print(f"\n{text}\nWritten to {output}: results.json, table.md, quickstart.png")
    return results


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"no {device.type} support")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise RuntimeError(f'quickstart: expected an available device, got "{name}". Use "cpu" or "auto".') from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"quickstart: expected an output folder that can be written, got {folder} ({error.strerror}). Choose another --output."
        ) from error
    return folder.resolve()


def _publish(output: Path, results: dict[str, Any], text: str) -> None:
    """Write everything beside the target, then rename file by file; Ctrl-C waits until all three are of one run."""
    temporary = Path(tempfile.mkdtemp(dir=output, prefix=".partial-"))
    try:
        (temporary / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (temporary / "table.md").write_text(text, encoding="utf-8")
        picture(results["rows"], temporary / "quickstart.png")
        with _interrupts_wait():
            for path in sorted(temporary.iterdir()):
                os.replace(path, output / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Within, Ctrl-C is noted; it takes effect at the end."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C goes to the main thread, and only it may set handlers
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt

"""Time and peak memory of real optimizer steps, variant by variant, as ratios to FLYP in one run.

    python benchmarks/step/measured.py            # results/measured_cpu.json, or measured_cuda.json where there is a GPU
    python benchmarks/step/measured.py --summary  # the tables, from the JSON alone

On a CPU every variant runs in a process of its own, one thread: resident memory is the highest that the system saw (VmHWM) less that
before the model was built. On a GPU it is ``max_memory_allocated``. Variants take turns for several rounds, so that a machine that slows
down does so for all of them; a round's time is the mean over some steps, after a warm-up, and the median over rounds counts. Data are random
and on the device: loading and augmenting are no part of it. The optimizer's step is.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import nn
from variants import VARIANTS, Training

from geomreg.integrations.quickstart.experiment import model_folder

RESULTS = Path(__file__).parent / "results"
LEFT_OUT = ("graph kept", "both batches", "regularizer first", "checkpointing", "naive, R = B/2", "contrastive chunked, unique")
NAMES = [name for name in VARIANTS if not any(part in name for part in LEFT_OUT)]  # their memory is modelled


class Setting(NamedTuple):
    """Model, batch, and how often it is measured."""

    build: Callable[[], nn.Module]
    batch: int
    rounds: int = 5
    steps: int = 4


def emojiclip() -> nn.Module:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{model_folder()}", output_dict=True)
    return model


def random_clip(name: str) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**open_clip.get_model_config(name), output_dict=True)


CPU_MODELS = {"EmojiCLIP": Setting(emojiclip, 64), "ViT-B-32": Setting(partial(random_clip, "ViT-B-32"), 8, rounds=3, steps=2)}
GPU_MODELS = {
    "EmojiCLIP": Setting(emojiclip, 512),
    "ViT-B-32": Setting(partial(random_clip, "ViT-B-32"), 512),
    "ViT-B-16": Setting(partial(random_clip, "ViT-B-16"), 256),
}


def on_cpu(model: str, name: str) -> dict[str, Any]:
    """One round, in a new process."""
    torch.set_num_threads(1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    seconds = timed(CPU_MODELS[model], name, "fp32", "cpu")
    return {"seconds": seconds, "bytes": resident("VmHWM") - before}


def on_gpu(model: str, name: str, precision: str) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = timed(GPU_MODELS[model], name, precision, "cuda")
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() - before}


def timed(setting: Setting, name: str, precision: str, device: str) -> float:
    """Mean seconds of a step."""
    training = Training(setting.build, VARIANTS[name], batch=setting.batch, precision=precision, device=device)
    steps = max(setting.steps, VARIANTS[name].every)
    training.step()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(steps):
        training.step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024 * int(fields[field].split()[0])


def header(device: str) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = {"torch": "torch", "open_clip": "open_clip_torch", "peft": "peft"}
    return {
        "kind": "measured",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, 1 thread",
        "versions": {"python": platform.python_version()} | {key: version(name) for key, name in packages.items()},
    }


def run(device: str) -> None:
    file = RESULTS / f"measured_{device}.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**header(device), "groups": []}
    if differing := [key for key, value in header(device).items() if content[key] != value]:
        raise SystemExit(f"{file.name} was recorded with another {', '.join(differing)}. Move it away to start anew.")
    models = CPU_MODELS if device == "cpu" else GPU_MODELS
    for model, setting in models.items():
        for precision in ("fp32",) if device == "cpu" else ("fp32", "bf16"):
            if (model, precision) in [(group["model"], group["precision"]) for group in content["groups"]]:
                continue
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
            for turn in range(setting.rounds):
                for name in NAMES if turn % 2 == 0 else reversed(NAMES):
                    found[name].append(in_a_process(model, name) if device == "cpu" else on_gpu(model, name, precision))
                print(model, precision, f"round {turn + 1} of {setting.rounds}", flush=True)
            described = {"model": model, "precision": precision, "batch": setting.batch, "rounds": setting.rounds, "steps": setting.steps}
            content["groups"].append({**described, "rows": rows_of(found)})
            save(file, content)


def in_a_process(model: str, name: str) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(on_cpu, (model, name))


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians, and the median of the ratios to FLYP of the same round, with the least and the largest."""
    rows = []
    for name, rounds in found.items():
        ratios = [one["seconds"] / flyp["seconds"] for one, flyp in zip(rounds, found["FLYP"], strict=True)]
        peak = statistics.median(one["bytes"] for one in rounds)
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(one["seconds"] for one in rounds),
                "bytes": peak,
                "time_x_flyp": statistics.median(ratios),
                "time_x_flyp_range": [min(ratios), max(ratios)],
                "memory_x_flyp": peak / statistics.median(one["bytes"] for one in found["FLYP"]),
            }
        )
    return rows


def save(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def summary() -> None:
    for file in sorted(RESULTS.glob("measured_*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for group in content["groups"]:
            print(f"\n{content['device']}: {group['model']}, {group['precision']}, batch {group['batch']}\n")
            print("| step | ms | x FLYP (range) | peak MB | x FLYP |\n|---|---|---|---|---|")
            for row in group["rows"]:
                low, high = row["time_x_flyp_range"]
                time_cell = f"{row['time_x_flyp']:.2f} ({low:.2f}-{high:.2f})"
                print(
                    f"| {row['name']} | {1e3 * row['seconds']:.0f} | {time_cell} | {row['bytes'] / 1e6:.0f} | {row['memory_x_flyp']:.2f} |"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    if parser.parse_args().summary:
        summary()
    else:
        run("cuda" if torch.cuda.is_available() else "cpu")

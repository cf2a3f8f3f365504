"""What the drift monitor costs at its default rate, as a share of the training step.

    python benchmarks/monitor/monitor.py            # results/monitor.json
    python benchmarks/monitor/monitor.py --summary  # the table, from the JSON alone

A step is FLYP's loss and DiVE's against a frozen teacher, one after the other, and the optimizer's, on random data that are there already.
The monitor sees the reference embeddings of every step (``update``), and every 400th embeds a probe of 512 images and 64 class texts and
compares (``compute``). Both are timed by themselves in the same process and taking turns with the steps: their sum is below the noise of
a comparison of runs. share = (update + compute / 400) / step. One thread.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch

from geomreg import DiVE, Embeddings, Teacher, WeightedSum, backward
from geomreg.functional import contrastive_loss
from geomreg.integrations.recipes.evaluate import embed_images, zero_shot_head
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.train import encode
from geomreg.metrics import DriftMonitor

FILE = Path(__file__).parent / "results" / "monitor.json"
PROBE, CLASSES, ROUNDS = 512, 64, 5
SETTINGS = [("EmojiCLIP", 16), ("EmojiCLIP", 64), ("EmojiCLIP", 128), ("ViT-B-32", 16)]


def measured(name: str, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = load("emojiclip").model if name == "EmojiCLIP" else open_clip.CLIP(**open_clip.get_model_config(name), output_dict=True)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    context = model.context_length

    def pairs(count: int) -> dict[str, torch.Tensor]:
        texts = torch.randint(1, 49_000, (count, context))
        texts[:, -1] = 49_407
        return {"image": torch.randn(count, 3, side, side), "text": texts}

    teacher, keep = Teacher(model, encode), WeightedSum(dive=(1000.0, DiVE()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    target, reference, probe = pairs(batch), pairs(batch), pairs(PROBE)
    tokens, labels = probe["text"][:CLASSES][None], torch.arange(PROBE) % CLASSES
    last: dict[str, Embeddings] = {}

    def step() -> None:
        optimizer.zero_grad()
        scale = [model.logit_scale]
        options: dict[str, Any] = {"chunk_size": batch, "parameters": scale}
        backward(lambda one: encode(model, one), target, lambda e: contrastive_loss(*e, logit_scale=model.logit_scale.exp()), **options)
        known = teacher(reference)

        def kept(e: Embeddings, index: torch.Tensor) -> torch.Tensor:
            last.update(student=Embeddings(*(value.detach() for value in e)), teacher=known)
            return keep(e, known)

        backward(lambda one: encode(model, one), reference, kept, separable=True, **options)
        optimizer.step()
        keep.step()

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        model.eval()
        found = embed_images(model, probe["image"]), zero_shot_head(model, tokens)
        model.train()
        return found

    model.train()
    monitor = DriftMonitor(probe=seen, labels=labels)
    step()
    found: dict[str, list[float]] = {"step": [], "update": [], "compute": []}
    for _ in range(ROUNDS):
        found["step"].append(timed(step))
        found["update"].append(timed(lambda: monitor.update(last["student"], last["teacher"]), repeat=20) / 20)
        found["compute"].append(timed(monitor.compute))
    seconds = {key: statistics.median(values) for key, values in found.items()}
    shares = [(u + c / monitor.every) / s for s, u, c in zip(found["step"], found["update"], found["compute"], strict=True)]
    return {
        "model": name,
        "batch": batch,
        "every": monitor.every,
        "probe": {"images": PROBE, "classes": CLASSES},
        "seconds": seconds,
        "share_of_step": statistics.median(shares),
        "share_of_step_range": [min(shares), max(shares)],
        "load_average": os.getloadavg()[0],
    }


def timed(work: Callable[[], Any], repeat: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return time.perf_counter() - start


def summary() -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    print(f"{content['device']}\n\n| model | batch | step | update | compute | share of step (range) |\n|---|---|---|---|---|---|")
    for row in content["rows"]:
        s, (low, high) = row["seconds"], row["share_of_step_range"]
        times = f"{s['step']:.2f} s | {1e3 * s['update']:.2f} ms | {s['compute']:.2f} s"
        print(f"| {row['model']} | {row['batch']} | {times} | {row['share_of_step']:.2%} ({low:.2%}-{high:.2%}) |")


def run() -> None:
    torch.set_num_threads(1)
    packages = {"torch": "torch", "open_clip": "open_clip_torch"}
    content: dict[str, Any] = {
        "kind": "measured",
        "device": f"{platform.machine()} CPU, 1 thread, other processes beside it",
        "versions": {"python": platform.python_version()} | {key: version(name) for key, name in packages.items()},
        "rows": [],
    }
    FILE.parent.mkdir(exist_ok=True)
    for setting in SETTINGS:
        content["rows"].append(measured(*setting))
        FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    summary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    if parser.parse_args().summary:
        summary()
    else:
        run()

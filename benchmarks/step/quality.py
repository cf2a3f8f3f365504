"""What a cheaper regularizer costs in accuracy: smaller reference batches, and the regularizer on every fourth step.

    python benchmarks/step/quality.py            # results/quality.json, run by run; a second call resumes
    python benchmarks/step/quality.py --summary  # the table, from the JSON alone

The quickstart's experiment with its settings and weight (benchmarks/emojishift/quickstart.py says how they were found: with the full
reference batch, and not again for the others), seeds 0-4. Encoder work per step is counted in passes of the target batch: forward and
backward of it are 1, of a reference batch of R pairs R / 64, the teacher's forward a third of that (none with cached embeddings).
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from geomreg import DiVE, Teacher, WeightedSum
from geomreg.integrations.quickstart.experiment import (
    BATCH,
    Pool,
    average,
    geometry,
    load_model,
    measure,
    openmoji_experiment,
    probe_embeddings,
)
from geomreg.integrations.quickstart.run import LEARNING_RATE, WARMUP_SHARE, Options
from geomreg.integrations.recipes.train import Settings, encode, finetune

RESULT = Path(__file__).parent / "results" / "quality.json"
SEEDS = (0, 1, 2, 3, 4)
FIGURES = ("id", "ood", "corrupted", "zero_shot", "rsa")


def variants() -> dict[str, dict[str, Any] | None]:
    """Reference batch, interval and decay of the running mean of each; None for plain FLYP."""
    decay = DiVE().decay
    return {
        "FLYP": None,
        "DiVE, reference batch B": {"reference_batch": BATCH, "every": 1, "decay": decay},
        "DiVE, B/2": {"reference_batch": BATCH // 2, "every": 1, "decay": decay},
        "DiVE, B/4": {"reference_batch": BATCH // 4, "every": 1, "decay": decay},
        "DiVE, B every 4th step, weight x 4": {"reference_batch": BATCH, "every": 4, "decay": decay**4},
    }


def run(options: dict[str, Any] | None, pool: Pool, seed: int) -> dict[str, Any]:
    """Train and measure one variant."""
    torch.manual_seed(seed)
    base, model, steps = load_model(), load_model(), Options().steps
    settings = Settings(
        steps=steps,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, round(WARMUP_SHARE * steps)),
        regularize_every=options["every"] if options else 1,
    )
    regularized: dict[str, Any] = {}
    if options:
        regularized = {
            "regularizer": WeightedSum(dive=(Options().weight, DiVE(decay=options["decay"]))),
            "reference": partial(pool.batches, pool.experiment.reference, seed + 1_000_003, batch_size=options["reference_batch"]),
            "teacher": Teacher(base, encode),
        }
    began = time.perf_counter()
    finetune(model, partial(pool.batches, pool.experiment.target, seed), settings, accelerator=Accelerator(cpu=True), **regularized)
    seconds = time.perf_counter() - began
    measured = measure(model, pool) | geometry(probe_embeddings(model, pool), probe_embeddings(base, pool))
    figures = {"id": measured["id"], "rsa": measured["rsa"]["stacked"]}
    figures |= {name: average(measured[name]) for name in ("ood", "corrupted", "zero_shot")}
    return {"seed": seed, "seconds": seconds, **figures}


def work(options: dict[str, Any] | None, *, cached: bool) -> float:
    """Encoder work of a step over FLYP's."""
    return 1.0 if options is None else 1 + options["reference_batch"] / BATCH / options["every"] * (1 if cached else 4 / 3)


def main() -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    header = {"steps": Options().steps, "learning_rate": LEARNING_RATE, "weight": Options().weight, "batch": BATCH, **versions}
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {**header, "variants": {}}
    if differing := [key for key, value in header.items() if content[key] != value]:
        raise SystemExit(f"{RESULT} was recorded with another {', '.join(differing)}. Move it away to start anew.")
    pool = Pool(openmoji_experiment())
    base = measure(load_model(), pool)
    content["base"] = {"id": base["id"], "rsa": 1.0, **{name: average(base[name]) for name in ("ood", "corrupted", "zero_shot")}}
    for seed in SEEDS:
        for name, options in variants().items():
            entry = content["variants"].setdefault(name, {"options": options, "runs": []})
            if seed in [one["seed"] for one in entry["runs"]]:
                continue
            entry["runs"].append(run(options, pool, seed))
            print(name, entry["runs"][-1], flush=True)
            save(content)


def save(content: dict[str, Any]) -> None:
    """The record as a whole, or the one before."""
    RESULT.parent.mkdir(exist_ok=True)
    temporary = RESULT.with_name(f".{RESULT.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULT)


def summary() -> str:
    """Means over seeds as a Markdown table, with the standard deviation over seeds in brackets."""
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        "| | encoder work, teacher cached (online) | ID | OOD | corrupted | zero-shot | RSA | seeds |",
        "|---|---|---|---|---|---|---|---|",
        "| base model | - | " + " | ".join(f"{content['base'][figure]:.{3 if figure == 'rsa' else 1}f}" for figure in FIGURES) + " | - |",
    ]
    for name, entry in content["variants"].items():
        cells = []
        for figure in FIGURES:
            values = torch.tensor([one[figure] for one in entry["runs"]], dtype=torch.float64)
            digits = 3 if figure == "rsa" else 1
            cells.append(f"{values.mean():.{digits}f} ({values.std():.{digits}f})")
        cost = [f"{work(entry['options'], cached=cached):.2f}" for cached in (True, False)]
        lines.append(f"| {name} | {cost[0]} ({cost[1]}) | " + " | ".join(cells) + f" | {len(entry['runs'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="print the table of the recorded runs")
    if parser.parse_args().summary:
        print(summary())
    else:
        main()

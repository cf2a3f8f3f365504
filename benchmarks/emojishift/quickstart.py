"""The quickstart's hyper-parameters and its evidence.

    python benchmarks/emojishift/quickstart.py tune     # grid on the tuning task -> results/quickstart_tuning.json
    python benchmarks/emojishift/quickstart.py seeds    # seeds 0-4 of the quickstart -> results/quickstart_seeds.json
    python benchmarks/emojishift/quickstart.py rates    # plain FLYP at lower rates, same seeds -> results/quickstart_rates.json
    python benchmarks/emojishift/quickstart.py summary  # means, bootstrap intervals, signs -> results/quickstart_summary.json

Tuning task: OpenMoji food as the target, objects by OpenMoji and by Twemoji as the zero-shot tasks; neither is the reported target, and
the reported zero-shot average is also given without food and objects. A first grid had Twemoji's objects alone, by which plain
FLYP loses nothing at 1e-4 and 1.2 points at 2e-4, the rule's own tolerance; it chose 2e-4 and weight 100, which kept 71 per cent of what
FLYP loses on seed 0 of the target. The tuning task was revised after that was seen. Rule: the setting of best target accuracy (of equal ones
the best zero-shot, then the best OOD average) among those that keep zero-shot within a point of the base model. Every run is written as soon as it is done; a second call resumes.
Runs go side by side, so their seconds and memory are no measurement of the quickstart.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from artists import artist_drawings

from geomreg.integrations.quickstart.data import Drawings, openmoji_drawings
from geomreg.integrations.quickstart.experiment import (
    METHODS,
    REFERENCE,
    Experiment,
    Pool,
    model_folder,
    openmoji_experiment,
    run_method,
    subset,
)
from geomreg.integrations.quickstart.run import LEARNING_RATE, WARMUP_SHARE, Options
from geomreg.integrations.recipes.train import Settings

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
REGULARIZED_RATES, WEIGHTS = (2e-4, 4e-4, 8e-4), (100.0, 300.0, 1000.0)
TUNED = ("food", "objects")  # concepts that the tuning saw, as target and as zero-shot task
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
STEPS = Options().steps


def tuning_experiment() -> Experiment:
    color, line = openmoji_drawings("color"), openmoji_drawings("line")
    target = subset(color, ("Food & Drink",))
    return Experiment(
        target=target,
        shifts={
            "line": Drawings(target.codes, line.select(target.codes)),
            "artist": Drawings(target.codes, artist_drawings("twemoji").select(target.codes)),
        },
        zero_shot={
            "objects": subset(color, ("Objects",)),
            "objects (twemoji)": subset(artist_drawings("twemoji"), ("Objects",)),
        },
        reference=subset(color, REFERENCE),
    )


def settings(learning_rate: float) -> Settings:
    return Settings(steps=STEPS, learning_rate=learning_rate, warmup_steps=max(1, round(WARMUP_SHARE * STEPS)))


def load(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(name: str, content: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{name}"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS / name)


def machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "checkpoint": hashlib.sha256((model_folder() / "open_clip_model.safetensors").read_bytes()).hexdigest(),
    }


def resumed(name: str, header: dict[str, Any]) -> dict[str, Any]:
    """The recorded runs, if they were made with the same settings and checkpoint; a new record if there is none."""
    content = load(name)
    differing = [key for key, value in header.items() if content and content.get(key) != value]
    if differing:
        raise SystemExit(f"{RESULTS / name} was recorded with another {', '.join(differing)}. Move it away to start anew.")
    return content or {**header, "runs": {}}


def brief(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("method", "id", "ood", "corrupted", "zero_shot", "rsa", "distortion")}
    return kept | {"weight": row.get("weight"), "final": {key: values[-1] for key, values in row.get("training", {}).items()}}


_pool: Pool | None = None  # of this process


def _start(experiment: Callable[[], Experiment]) -> None:
    global _pool
    torch.set_num_threads(1)
    _pool = Pool(experiment())


def _run(key: str, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return key, run_method(pool=_pool, accelerator=Accelerator(cpu=True), **job)


def run_all(
    name: str, content: dict[str, Any], experiment: Callable[[], Experiment], jobs: dict[str, dict[str, Any]], more: tuple[str, ...] = ()
) -> None:
    """Run what ``content`` lacks, on ``content["processes"]`` processes of one thread; written as soon as it is done."""
    todo = {key: job for key, job in jobs.items() if key not in content["runs"]}
    executor = ProcessPoolExecutor(content["processes"], multiprocessing.get_context("spawn"), _start, (experiment,))
    with executor:
        for future in as_completed([executor.submit(_run, key, job) for key, job in todo.items()]):
            key, row = future.result()
            described = {"seed": jobs[key]["seed"], "learning_rate": jobs[key]["settings"].learning_rate}
            content["runs"][key] = described | brief(row) | {field: row.get(field) for field in more}
            save(name, content)
            line = f"id {row['id']:.1f} ood {mean(row['ood']):.1f} zs {mean(row['zero_shot']):.1f} rsa {row['rsa']['stacked']:.3f}"
            print(key, line, f"{row['seconds']:.0f} s", flush=True)


def tune(processes: int) -> None:
    """FLYP at each learning rate, DiVE at each weight and learning rate, its control at each weight at the rate chosen."""
    name = "quickstart_tuning.json"
    content = resumed(name, {"seed": TUNING_SEED, "steps": STEPS, "processes": processes, **machine()})

    def run(todo: list[tuple[str, float, float]]) -> None:
        jobs = {
            f"{method} lr={rate:g} weight={weight:g}": {
                "method": method,
                "seed": TUNING_SEED,
                "settings": settings(rate),
                "weight": weight,
                "alphas": (),
            }
            for method, rate, weight in todo
        }
        run_all(name, content, tuning_experiment, jobs)

    run([("base", 0.0, 0.0)] + [("flyp", rate, 0.0) for rate in LEARNING_RATES])
    run([("flyp+dive", rate, weight) for rate in reversed(REGULARIZED_RATES) for weight in WEIGHTS])
    floor = mean(content["runs"]["base lr=0 weight=0"]["zero_shot"]) - 1
    allowed = {k: run for k, run in content["runs"].items() if run["method"] == "flyp+dive" and mean(run["zero_shot"]) >= floor}

    def merit(key: str) -> tuple[float, ...]:
        return allowed[key]["id"], mean(allowed[key]["zero_shot"]), mean(allowed[key]["ood"])

    content["chosen"] = max(allowed, key=merit) if allowed else None
    save(name, content)
    print("chosen:", content["chosen"], flush=True)
    if content["chosen"]:
        run([("flyp+control", content["runs"][content["chosen"]]["learning_rate"], weight) for weight in WEIGHTS])


def seeds(processes: int) -> None:
    """The quickstart's own runs, seed by seed."""
    name = "quickstart_seeds.json"
    header = {"steps": STEPS, "learning_rate": LEARNING_RATE, "weight": Options().weight, "processes": processes, **machine()}
    content = resumed(name, header)
    one = openmoji_experiment()
    content["concepts"] = {"target": list(one.target.codes), **{task: list(d.codes) for task, d in one.zero_shot.items()}}
    jobs = {
        f"{method} seed={seed}": {"method": method, "seed": seed, "settings": settings(LEARNING_RATE), "weight": content["weight"]}
        for seed in SEEDS
        for method in METHODS
    }
    run_all(name, content, openmoji_experiment, jobs, more=("wise", "correct"))


def rates(processes: int) -> None:
    """Plain FLYP on the quickstart's task at the grid's lower learning rates: what the choice of the rate does to the baseline."""
    name = "quickstart_rates.json"
    content = resumed(name, {"steps": STEPS, "processes": processes, **machine()})
    jobs = {
        f"flyp lr={rate:g} seed={seed}": {"method": "flyp", "seed": seed, "settings": settings(rate), "weight": 0.0, "alphas": ()}
        for rate in LEARNING_RATES
        if rate < LEARNING_RATE
        for seed in SEEDS
    }
    run_all(name, content, openmoji_experiment, jobs)


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def by_concept(right: str, concepts: int) -> torch.Tensor:
    """Share right of each concept, over copies."""
    return torch.tensor([int(one) for one in right], dtype=torch.float64).view(-1, concepts).mean(dim=0)


def figures(rows: dict[str, dict[str, Any]], draw: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, float]:
    """The claims' figures from one seed's rows, on the drawn concepts."""
    value: dict[str, dict[str, float]] = {}
    for method, row in rows.items():
        scores = {}
        for task, right in row["correct"].items():
            concepts = task.removeprefix("zero_shot/") if task.startswith("zero_shot/") else "target"
            scores[task] = 100 * by_concept(right, sizes[concepts])[draw[concepts]].mean().item()
        ood, corrupted, zero = ([v for k, v in scores.items() if k.startswith(prefix)] for prefix in ("ood/", "corrupted/", "zero_shot/"))
        untuned = [v for k, v in scores.items() if k.startswith("zero_shot/") and k.removeprefix("zero_shot/") not in TUNED]
        value[method] = {
            "id": scores["id"],
            "ood": sum(ood) / len(ood),
            "ood_line": scores["ood/line"],
            "ood_artist": scores["ood/artist"],
            "all_shifts": (sum(ood) + sum(corrupted)) / (len(ood) + len(corrupted)),
            "corrupted": sum(corrupted) / len(corrupted),
            "zero_shot": sum(zero) / len(zero),
            "zero_shot_untuned": sum(untuned) / len(untuned),
        }
    result = {}
    for method in rows:
        for key, score in value[method].items():
            result[f"{method} {key}"] = score
            result[f"{method} {key} change"] = score - value["base"][key]
    for method in ("flyp+dive", "flyp+control"):
        result[f"{method} share of FLYP's ID gain"] = result[f"{method} id change"] / result["flyp id change"]
        for key in ("zero_shot", "zero_shot_untuned"):
            result[f"{method} share of FLYP's {key} loss"] = result[f"{method} {key} change"] / result[f"flyp {key} change"]
        for key in ("ood", "ood_line", "ood_artist", "corrupted", "all_shifts"):
            result[f"{method} {key} over FLYP"] = value[method][key] - value["flyp"][key]
    return result


def summary(resamples: int = 2000) -> None:
    """Means over seeds, intervals by resampling concepts (the same draw for every run), signs seed by seed."""
    content = load("quickstart_seeds.json")
    sizes = {name: len(codes) for name, codes in content["concepts"].items()}
    done = sorted({run["seed"] for run in content["runs"].values()})
    rows = {seed: {run["method"]: run for run in content["runs"].values() if run["seed"] == seed} for seed in done}
    whole = {name: torch.arange(size) for name, size in sizes.items()}
    per_seed = {seed: figures(rows[seed], whole, sizes) for seed in done}
    for seed in done:
        for method in ("flyp", "flyp+dive", "flyp+control"):
            for kind in ("image", "text", "stacked"):
                per_seed[seed][f"{method} RSA {kind}"] = rows[seed][method]["rsa"][kind]
    generator = torch.Generator().manual_seed(0)
    draws = [{name: torch.randint(size, (size,), generator=generator) for name, size in sizes.items()} for _ in range(resamples)]
    resampled = [[figures(rows[seed], draw, sizes) for seed in done] for draw in draws]
    report = {}
    for key in per_seed[done[0]]:
        values = [per_seed[seed][key] for seed in done]
        report[key] = {"mean": sum(values) / len(values), "seeds": values}
        if key in resampled[0][0]:
            means = torch.tensor([sum(one[key] for one in several) / len(done) for several in resampled])
            report[key]["interval"] = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    claims = {
        "FLYP gains ID": [v > 0 for v in report["flyp id change"]["seeds"]],
        "FLYP loses zero-shot": [v < 0 for v in report["flyp zero_shot change"]["seeds"]],
        "FLYP loses RSA": [v < 1 for v in report["flyp RSA stacked"]["seeds"]],
        "DiVE keeps at least 80 % of the ID gain": [v >= 0.8 for v in report["flyp+dive share of FLYP's ID gain"]["seeds"]],
        "DiVE loses at most a quarter of zero-shot": [v <= 0.25 for v in report["flyp+dive share of FLYP's zero_shot loss"]["seeds"]],
        "DiVE has the higher OOD average": [v > 0 for v in report["flyp+dive ood over FLYP"]["seeds"]],
        "DiVE has the higher RSA": [per_seed[s]["flyp+dive RSA stacked"] > per_seed[s]["flyp RSA stacked"] for s in done],
    }
    save(
        "quickstart_summary.json",
        {"seeds": done, "resamples": resamples, "claims": claims, "figures": report, "checkpoint": content["checkpoint"]},
    )
    for key, entry in report.items():
        low, high = entry.get("interval", (float("nan"),) * 2)
        print(f"{key:55s} {entry['mean']:8.3f}  [{low:8.3f}, {high:8.3f}]")
    for claim, holds in claims.items():
        print(f"{claim:45s} {sum(holds)} of {len(holds)} seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["tune", "seeds", "rates", "summary"])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if arguments.what == "summary":
        summary()
    else:
        {"tune": tune, "seeds": seeds, "rates": rates}[arguments.what](arguments.processes)

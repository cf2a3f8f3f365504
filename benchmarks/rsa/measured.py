"""RSA against scipy's pdist with pearsonr and spearmanr in one run, and a million samples streamed from embedding caches on disk.

    python benchmarks/rsa/measured.py            # results/rsa_cpu.json; 15 minutes, 4 GB under --folder for some minutes
    python benchmarks/rsa/measured.py --small    # 300 samples and 5,000 in caches, printed and not recorded
    python benchmarks/rsa/measured.py --summary  # the tables, from the JSON alone

Every contestant runs in a process of its own, one thread, after a warm-up on 64 samples: resident memory is the highest that the system saw
(VmHWM) less that before the call, when the input is there (fp32; fp64 for scipy, which would convert it). Contestants take turns for
three rounds, those without a goal for one; the median counts. Where other work shares the machine, the processor's time
(cpu_seconds) says more than the clock's. Width 512, a student that bends and rotates the teacher and adds noise.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from geomreg import EmbeddingCache, Embeddings, Teacher
from geomreg.metrics import bounded_rsa, rsa, rsa_interval, rsa_of_caches

RESULT = Path(__file__).parent / "results" / "rsa_cpu.json"
WIDTH, SAMPLES, MILLION = 512, (1000, 4000, 10_000), 1_000_000
ROUNDS = 3
DISSIMILARITIES = ("cosine", "sqeuclidean", "correlation", "euclidean")


def by_scipy(correlation: str, dissimilarity: str) -> Callable[[Any, Any], dict[str, float]]:
    compare = pearsonr if correlation == "pearson" else spearmanr
    return lambda one, two: {"value": float(compare(pdist(one, dissimilarity), pdist(two, dissimilarity)).statistic)}


def by_rsa(**options: str) -> Callable[[Tensor, Tensor], dict[str, float]]:
    return lambda one, two: {"value": float(rsa(one, two, **options))}


def by_histogram(one: Tensor, two: Tensor) -> dict[str, float]:
    value, bound = bounded_rsa(one, two, dissimilarity="cosine")
    return {"value": float(value), "bound": float(bound)}


def by_bootstrap(correlation: str) -> Callable[[Tensor, Tensor], dict[str, float]]:
    def interval(one: Tensor, two: Tensor) -> dict[str, float]:
        value, low, high = rsa_interval(one, two, dissimilarity="cosine", correlation=correlation)
        return {"value": float(value), "low": float(low), "high": float(high)}

    return interval


CONTESTANTS: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    **{f"scipy pearson {one}": by_scipy("pearson", one) for one in DISSIMILARITIES},
    **{f"rsa pearson {one}": by_rsa(dissimilarity=one) for one in DISSIMILARITIES},
    "rsa pearson cosine exact": by_rsa(dissimilarity="cosine", method="exact"),
    "scipy spearman cosine": by_scipy("spearman", "cosine"),
    "rsa spearman cosine": by_rsa(dissimilarity="cosine", correlation="spearman"),
    "rsa spearman cosine exact": by_rsa(dissimilarity="cosine", correlation="spearman", method="exact"),
    "rsa spearman cosine histogram": by_histogram,
    "rsa_interval pearson cosine": by_bootstrap("pearson"),
    "rsa_interval spearman cosine": by_bootstrap("spearman"),
}
GOALS = {"rsa pearson cosine": 30, "rsa spearman cosine": 10}  # x scipy at 10,000 samples
INTERVALS = {"rsa_interval pearson cosine": 4000, "rsa_interval spearman cosine": 1000}  # most samples


def data(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    teacher = randn(samples, 64) @ randn(64, WIDTH) / 8 + 0.5 * randn(samples, WIDTH)
    return torch.tanh(teacher @ randn(WIDTH, WIDTH) / WIDTH**0.5) + 0.3 * randn(samples, WIDTH), teacher


def measured(name: str, samples: int) -> dict[str, Any]:
    """One call, in a new process."""
    torch.set_num_threads(1)
    inputs: Any = data(samples)
    if name.startswith("scipy"):
        inputs = tuple(value.double().numpy() for value in inputs)
    CONTESTANTS[name](*(value[:64] for value in inputs))
    return timed(lambda: CONTESTANTS[name](*inputs))


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    ctypes.CDLL(None).malloc_trim(0)  # what the making of the data has freed would else be taken again, and not be seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    began, worked = time.perf_counter(), time.process_time()
    found = work()
    times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    return {**times, "bytes": resident("VmHWM") - before, **found}


def resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024 * int(fields[field].split()[0])


def in_a_process(work: Callable[..., Any], *given: Any) -> Any:
    context = multiprocessing.get_context("forkserver")  # which has imported once for all of them
    context.set_forkserver_preload(["torch", "scipy.stats", "scipy.spatial.distance", "geomreg.metrics"])
    with context.Pool(1) as pool:
        return pool.apply(work, given)


def group(samples: int) -> dict[str, Any]:
    names = [name for name in CONTESTANTS if samples <= INTERVALS.get(name, samples)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    loads = []
    for turn in range(ROUNDS):
        for name in names if turn % 2 == 0 else reversed(names):
            if turn == 0 or name in GOALS or name.replace("scipy", "rsa") in GOALS:
                found[name].append(in_a_process(measured, name, samples))
        loads.append(os.getloadavg()[0])
        print(f"{samples} samples, round {turn + 1} of {ROUNDS}", flush=True)
    rows = []
    for name, rounds in found.items():
        row: dict[str, Any] = {"name": name, "rounds": len(rounds), "seconds": statistics.median(one["seconds"] for one in rounds)}
        row["cpu_seconds"] = statistics.median(one["cpu_seconds"] for one in rounds)
        row["seconds_range"] = [min(one["seconds"] for one in rounds), max(one["seconds"] for one in rounds)]
        row["bytes"] = statistics.median(one["bytes"] for one in rounds)
        row |= {key: rounds[0][key] for key in ("value", "bound", "low", "high") if key in rounds[0]}
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        base = by_name.get(" ".join(["scipy", *row["name"].split()[1:3]]))
        if row["name"].startswith("rsa") and base:
            row["difference_from_scipy"] = row["value"] - base["value"]
        if row["name"].startswith("rsa ") and base:
            row["times_faster_than_scipy"] = base["seconds"] / row["seconds"]
            row["times_less_cpu_than_scipy"] = base["cpu_seconds"] / row["cpu_seconds"]
            row["times_less_memory_than_scipy"] = base["bytes"] / row["bytes"]
    return {"samples": samples, "load_average": loads, "rows": rows}


# a million samples ----------------------------------------------------------------------------------------------------


class Numbers:
    """Samples that are their number."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        return {"id": row, "image": torch.tensor([row], dtype=torch.float64)}


class Waves(torch.nn.Module):
    """64 latent numbers and noise for each sample number; the student bends and rotates what the teacher says."""

    def __init__(self, student: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = student
        self.latent, self.noise, self.drift = (torch.nn.Parameter(1e3 * torch.rand(size).double()) for size in (64, WIDTH, WIDTH))
        self.mix, self.turn = torch.nn.Parameter(torch.randn(64, WIDTH) / 8), torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)


def encode(model: Waves, batch: dict[str, Tensor]) -> Embeddings:
    def wave(frequencies: Tensor) -> Tensor:
        return (batch["image"] * frequencies).cos().float() * 2**0.5

    value = wave(model.latent) @ model.mix + 0.5 * wave(model.noise)
    return Embeddings(image=torch.tanh(value @ model.turn) + 0.3 * wave(model.drift) if model.student else value)


def streamed(student: Path, teacher: Path, samples: int, dissimilarity: str) -> dict[str, Any]:
    """In a new process."""
    torch.set_num_threads(1)
    caches = EmbeddingCache.open(student), EmbeddingCache.open(teacher)
    rsa_of_caches(*caches, ids=range(64), dissimilarity=dissimilarity)
    return timed(lambda: {"value": float(rsa_of_caches(*caches, ids=range(samples), dissimilarity=dissimilarity))})


def of_scipy(student: Path, teacher: Path, samples: int) -> float:
    one, two = (EmbeddingCache.open(folder)(range(samples)).image.numpy() for folder in (student, teacher))
    return by_scipy("pearson", "cosine")(one, two)["value"]


def million(folder: Path, samples: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=folder, prefix="rsa-benchmark-"))
    paths = {name: folder / name for name in ("student", "teacher")}
    try:
        began = time.perf_counter()
        for name, path in paths.items():
            EmbeddingCache.build(Teacher(Waves(name == "student"), encode), Numbers(samples), path, batch_size=1024, progress=False)
        building = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        few = min(samples, 4000)
        found = in_a_process(streamed, *paths.values(), few, "cosine")["value"]
        return {
            "samples": samples,
            "gigabytes_on_disk": size / 1e9,
            "seconds_to_build_both_caches": building,
            "load_average": os.getloadavg()[0],
            **{name: in_a_process(streamed, *paths.values(), samples, name) for name in ("cosine", "sqeuclidean")},
            f"difference_from_scipy_of_the_first_{few}": found - in_a_process(of_scipy, *paths.values(), few),
        }
    finally:
        shutil.rmtree(folder)


def header() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "kind": "measured",
        "device": f"{cpu}, 1 thread of {os.cpu_count()}",
        "shared": "other processes ran on the machine: load_average is over all of them, this one included",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "scipy", "numpy", "torchmetrics")},
        "width": WIDTH,
    }


def run(folder: Path, small: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    samples, many = ((300,), 5000) if small else (SAMPLES, MILLION)
    content = {**header(), "groups": [group(one) for one in samples], "streamed": million(folder, many)}
    if small:
        summary(content)
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(content: dict[str, Any]) -> None:
    print(f"{content['device']}, width {content['width']}; other processes ran: load {[one['load_average'] for one in content['groups']]}")
    for one in content["groups"]:
        print(
            f"\n{one['samples']} samples\n\n| | s (range) | MB | cpu s | x scipy | x cpu | x memory | minus scipy | bound |\n|---|---|---|---|---|---|---|---|---|"
        )
        for row in one["rows"]:
            low, high = row["seconds_range"]
            more = [("cpu_seconds", ".2f")] + [(f"times_{what}_than_scipy", ".1f") for what in ("faster", "less_cpu", "less_memory")]
            more += [("difference_from_scipy", ".0e"), ("bound", ".0e")]
            cells = [format(row[key], style) if key in row else "" for key, style in more]
            print(f"| {row['name']} | {row['seconds']:.2f} ({low:.2f}-{high:.2f}) | {row['bytes'] / 1e6:.0f} | {' | '.join(cells)} |")
    print(f"\n{json.dumps(content['streamed'], indent=1)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--small", action="store_true", help="try it; record nothing")
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    if options.summary:
        summary(json.loads(RESULT.read_text(encoding="utf-8")))
    else:
        run(options.folder, options.small)

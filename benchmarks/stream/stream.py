"""Streaming of training data: how fast the loader is beside a bare decoder, and what it keeps in memory.

    python benchmarks/stream/stream.py                     # results/stream.json; writes about 4 GB under --folder and removes them
    python benchmarks/stream/stream.py --samples 5120      # other numbers of samples are printed and not recorded

A CSV file of 100,000 rows (400 different JPEG files of about 400 pixels, each 250 times) and 50 tar shards of 2,000 samples are streamed by
the loader of ``geomreg finetune``: FLYP's crops to 224 pixels, CLIP's tokenizer, batches of 256, ``workers=0`` and ``workers=1``. All files
are in the page cache. For each of the four:

*Speed.* The decoder is a loop of Pillow and the same crops over the same files, which does nothing else: no captions, no order, and each
tensor is dropped before the next. The stacking decoder makes batches of its tensors besides, as any loader has to, in memory that is new
for each batch (154 MB). Without a worker the three take turns, a batch each; with one, the decoders run alone while the worker waits with its
queue full. Ratios are those of neighbours, so that others who use the machine slow down both.

*Memory*, in a process without decoders: the sum of the proportional set sizes (PSS: shared pages count once) of the process and its
workers, after the first batch and after each tenth of ``--samples``, when no batch is being made.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from geomreg.integrations.recipes.data import CsvPairs, TarPairs
from geomreg.integrations.recipes.data.draws import Drawn, Draws, loader

RESULT = Path(__file__).parent / "results" / "stream.json"
ROWS, SHARDS, PICTURES, BATCH = 100_000, 50, 400, 256
TURNS, SAMPLES = 12, 20_480
WORDS = "a photo of the old red house near water with two small dogs people walking street market night green hill child boat".split()  # noqa: SIM905


def picture(number: int) -> bytes:
    """A JPEG with structure at all scales, as photographs have: some 30 KB at quality 90."""
    generator = np.random.default_rng(number)
    size = (int(generator.integers(340, 460)), int(generator.integers(340, 460)))
    mixed = np.full((size[1], size[0], 3), 127.0)
    for cells, height in ((4, 160.0), (16, 70.0), (64, 25.0)):
        coarse = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        mixed += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) - 127.0) * height / 127.0
    buffer = io.BytesIO()
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption(row: int) -> str:
    generator = np.random.default_rng(row)
    return " ".join(generator.choice(WORDS, int(generator.integers(6, 16)))) + f" {row}"


def write(folder: Path) -> None:
    """The CSV file with its images, and the shards."""
    pictures = [picture(number) for number in range(PICTURES)]
    (folder / "images").mkdir()
    for number, content in enumerate(pictures):
        (folder / "images" / f"{number:03d}.jpg").write_bytes(content)
    lines = ["filepath\ttitle", *(f"images/{row % PICTURES:03d}.jpg\t{caption(row)}" for row in range(ROWS))]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS):
                for extension, content in (("jpg", pictures[row % PICTURES]), ("txt", caption(row).encode())):
                    member = tarfile.TarInfo(f"{row:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def proportional() -> int:
    """Bytes of this process and its children, shared pages counted once."""
    total = 0
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended, or belongs to someone else
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            if int(process) == os.getpid() or f"PPid:\t{os.getpid()}\n" in status:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def rate(work: Callable[[], int]) -> float:
    """Samples a second of one piece of work."""
    began = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - began)


def spread(rates: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(rates, n=5)
    return {"median": statistics.median(rates), "p20": cuts[0], "p80": cuts[3], "pieces": len(rates)}


def settled() -> float:
    """Megabytes when they have stopped to change: the worker has filled its queue."""
    last, now = -1.0, proportional() / 1e6
    while abs(now - last) > 1.0:
        time.sleep(1.0)
        last, now = now, proportional() / 1e6
    return now


def opened(folder: Path, kind: str, workers: int) -> tuple[float, Callable[..., torch.Tensor], Iterator[dict[str, Any]]]:
    """Seconds to open the data set, its transform, its batches."""
    transform = open_clip.image_transform(224, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    began = time.perf_counter()
    data: CsvPairs | TarPairs
    if kind == "csv":
        data = CsvPairs(folder / "pairs.tsv", transform=transform, tokenizer=tokenizer)
    else:
        data = TarPairs(str(folder / "*.tar"), transform=transform, tokenizer=tokenizer)
    seconds = time.perf_counter() - began
    draws = Draws(len(data), BATCH, seed=0, groups=data.groups if isinstance(data, TarPairs) else None)
    return seconds, transform, loader(Drawn(data, seed=0), draws, workers=workers)


def memory(folder: Path, kind: str, workers: int, samples: int) -> dict[str, Any]:
    """What streaming keeps, tenth by tenth."""
    seconds, _, batches = opened(folder, kind, workers)
    count = samples // BATCH
    next(batches)
    kept = [settled()]
    for k in range(10):
        for _ in range(count * k // 10, count * (k + 1) // 10):
            next(batches)
        kept.append(settled())
    return {"open_seconds": seconds, "samples": count * BATCH, "memory_mb": kept, "growth_after_a_tenth_mb": kept[-1] - kept[1]}


def speed(folder: Path, kind: str, workers: int) -> dict[str, Any]:
    """The loader's beside the decoders'."""
    _, transform, batches = opened(folder, kind, workers)
    paths = itertools.cycle([str(path) for path in sorted((folder / "images").iterdir())])

    def decoded() -> Iterator[torch.Tensor]:
        for path in itertools.islice(paths, BATCH):
            with open(path, "rb") as file:
                yield transform(Image.open(file).convert("RGB"))

    def decode() -> int:
        return sum(1 for _ in decoded())

    def stack() -> int:
        return len(torch.stack(list(decoded())))

    def load() -> int:
        return len(next(batches)["id"])

    rates: dict[str, list[float]] = {"decoder": [], "stacking_decoder": [], "loader": []}
    for turn in range(TURNS + 1):
        if workers:
            settled()
        found = {"decoder": rate(decode), "stacking_decoder": rate(stack)}
        if workers:  # what it has ready is not timed
            for _ in range(3):
                load()
        found["loader"] = rate(lambda: sum(load() for _ in range(4 if workers else 1)))
        if turn:  # the first fills caches
            for name, value in found.items():
                rates[name].append(value)

    def over(name: str) -> dict[str, float]:
        return spread([ours / other for ours, other in zip(rates["loader"], rates[name], strict=True)])

    return {
        "samples_per_second": {name: spread(values) for name, values in rates.items()},
        "loader_over_decoder": over("decoder"),
        "loader_over_stacking_decoder": over("stacking_decoder"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="streamed in each of the four runs of memory")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", nargs=4, metavar=("WHAT", "FOLDER", "KIND", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        what, given, kind, count = options.measure
        more = (options.samples,) if what == "memory" else ()
        print(json.dumps({"memory": memory, "speed": speed}[what](Path(given), kind, int(count), *more)))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="stream-benchmark-"))
    record: dict[str, Any] = {
        "rows": ROWS,
        "shards": SHARDS,
        "batch": BATCH,
        "threads": 1,
        "processes_that_decode": "one, with workers=1 the worker: rates are per process",
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "pillow", "open_clip_torch")},
        "runs": [],
    }
    try:
        write(folder)
        record["bytes_a_picture"] = statistics.mean(path.stat().st_size for path in (folder / "images").iterdir())
        for kind, workers in itertools.product(("csv", "tar"), (0, 1)):
            run: dict[str, Any] = {"kind": kind, "workers": workers}
            for what in ("speed", "memory"):
                before = os.getloadavg()[0]
                command = [sys.executable, __file__, "--measure", what, str(folder), kind, str(workers), "--samples", str(options.samples)]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                run |= {**json.loads(answer.stdout.splitlines()[-1]), f"load_average_before_{what}": before}
            record["runs"].append(run)
            print(json.dumps(record["runs"][-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(record, indent=1))
    if options.samples == SAMPLES:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

"""The embedding cache at the size of CC3M: how long it takes to open, what it keeps in memory, how fast it serves.

    python benchmarks/step/cache.py                  # results/cache.json; builds 12 GB under --folder and removes them
    python benchmarks/step/cache.py --pairs 100000   # smaller, printed and not recorded

3 million pairs of width 512 in fp32, made by :meth:`EmbeddingCache.build` from a teacher of one linear layer, so that what is timed in
the building is everything but the encoder and the decoding. Serving is timed in a fresh process, with the files' pages dropped from the
page cache as far as the system lets a process do that (cold) and again on the same rows (warm), against Pillow decoding as many JPEGs of
natural-image size, and against the same rows through a memory map, which is what the cache does not use.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from geomreg import EmbeddingCache, Embeddings, Teacher

RESULT = Path(__file__).parent / "results" / "cache.json"
WIDTH, BATCH, BATCHES = 512, 512, 50


class Vectors:
    """Pairs of short vectors that their number determines."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        value = torch.tensor([row % 1009, row % 997, row % 991, 1.0])
        return {"id": f"{row:09d}", "image": value, "text": -value}


class Linear(torch.nn.Module):
    """One layer for both towers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, WIDTH)


def encode(model: torch.nn.Module, batch: dict[str, Any]) -> Embeddings:
    return Embeddings(*(torch.nn.functional.normalize(model.layer(batch[name]), dim=1) for name in ("image", "text")))


def resident() -> int:
    """Resident memory of this process in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def drop_pages(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Any, rounds: list[Any]) -> dict[str, float]:
    """Milliseconds a batch: median, 20th and 80th percentile."""
    taken = []
    for one in rounds:
        began = time.perf_counter()
        work(one)
        taken.append(1e3 * (time.perf_counter() - began))
    cuts = statistics.quantiles(taken, n=5)
    return {"median_ms": statistics.median(taken), "p20_ms": cuts[0], "p80_ms": cuts[3]}


def serve(folder: Path) -> dict[str, Any]:
    """Open and read, in this process."""
    torch.set_num_threads(1)
    drop_pages(folder)
    before = resident()
    began = time.perf_counter()
    cache = EmbeddingCache.open(folder)
    opened = {"seconds": time.perf_counter() - began, "resident_mb": (resident() - before) / 1e6}
    generator = torch.Generator().manual_seed(0)
    rounds = [[f"{row:09d}" for row in torch.randint(len(cache), (BATCH,), generator=generator).tolist()] for _ in range(BATCHES)]
    asked = 2 * BATCH * BATCHES * WIDTH * 4 / 1e6
    before = resident()
    cold = timed(cache, rounds)
    kept = (resident() - before) / 1e6
    warm = timed(cache, rounds)
    return {
        "open": opened,
        "cold": cold,
        "warm": warm,
        "rows_asked_mb": asked,
        "resident_after_mb": kept,
        "mapped": mapped(folder, len(cache)),
    }


def mapped(folder: Path, pairs: int) -> dict[str, Any]:
    """The same amount of random rows through memory maps of the shards, pages in the page cache."""
    maps = []
    for path in sorted(folder.glob("image-*/[0-9]*.safetensors")):
        header = path.read_bytes()[:65536]
        length = int.from_bytes(header[:8], "little")
        entry = json.loads(header[8 : 8 + length])["embeddings"]
        maps.append(np.memmap(path, np.float32, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])))
    rows_a_shard = len(maps[0])
    generator = np.random.default_rng(1)
    rounds = [generator.integers(pairs, size=BATCH) for _ in range(BATCHES)]

    def read(rows: Any) -> None:
        for row in rows:
            np.array(maps[row // rows_a_shard][row % rows_a_shard])

    for path in folder.glob("image-*/[0-9]*.safetensors"):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    before = resident()
    speed = timed(read, rounds)
    return {**speed, "rows_asked_mb": BATCH * BATCHES * WIDTH * 4 / 1e6, "resident_after_mb": (resident() - before) / 1e6}


def decode() -> dict[str, Any]:
    """Pillow on as many JPEGs of 500 x 375, quality 90, to RGB arrays (no resizing)."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (25, 33, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()

    def work(_: int) -> None:
        for _ in range(BATCH):
            np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    return {**timed(work, list(range(5))), "bytes": len(content)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(json.dumps(serve(options.serve)))
        return
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="cache-benchmark-"))
    try:
        began = time.perf_counter()
        cache = EmbeddingCache.build(Teacher(Linear(), encode), Vectors(options.pairs), folder)
        seconds = time.perf_counter() - began
        assert torch.allclose(
            cache(["000000007"]).image, encode(Linear(), {k: v[None] for k, v in Vectors(8)[7].items() if k != "id"}).image
        )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        record: dict[str, Any] = {
            "pairs": options.pairs,
            "width": WIDTH,
            "dtype": "float32",
            "gigabytes": size / 1e9,
            "batch": BATCH,
            "threads": 1,
            "machine": {"cpu": cpu(), "python": platform.python_version(), "torch": torch.__version__},
            "build": {"seconds": seconds, "pairs_per_second": options.pairs / seconds},
        }
        answer = subprocess.run([sys.executable, __file__, "--serve", str(folder)], check=True, capture_output=True, text=True)
        record |= json.loads(answer.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    record["decode_jpeg"] = decode()
    record["decoding_over_cold_reading"] = record["decode_jpeg"]["median_ms"] / record["cold"]["median_ms"]
    print(json.dumps(record, indent=1))
    if options.pairs == 3_000_000:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

"""Runs that are killed (SIGKILL) at random moments and given again: every file must be that of a run that was left alone.

    python benchmarks/reliability/kills.py --kills 25   # of each configuration; results/kills.json, written after each round

Four configurations on EmojiCLIP and random pictures, in one thread: image-text pairs with DiVE; class folders with a head, evaluations and
the best model; a drift monitor whose alarm ends the run; two processes, of which one is killed and the other must end by itself. A round is
a run that is killed until it gets through. Then every file in its folder is compared byte by byte with those of a whole run, but for the
random name of the run in environment.json. A call adds rounds to those that are recorded, up to the number of kills.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "kills.json"
NAMES = ("pairs", "head", "early stop", "two processes")
PATIENCE = 120  # seconds


def write_data(folder: Path) -> None:
    """Twenty-four pictures of two classes, and their captions; one of them cannot be read."""
    import numpy as np
    from PIL import Image

    generator, lines = np.random.default_rng(0), ["filepath\ttitle"]
    for row in range(24):
        path = folder / "classes" / ("owl", "fox")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path.relative_to(folder)}\tpicture number {row}")
    path.write_bytes(b"x")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")


def configured(name: str, data: Path, output: Path) -> Any:
    from geomreg.integrations.recipes.config import Config, DataConfig, MethodConfig, ModelConfig, MonitorConfig, TermConfig, TrainConfig

    pairs, classes = DataConfig("csv", str(data / "pairs.tsv")), DataConfig("folder", str(data / "classes"))
    dive = MethodConfig("dive", {"dive": TermConfig("DiVE", 300.0)})
    train = {"steps": 8, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "workers": 0, "save_every": 2}
    more: dict[str, Any] = {"reference": pairs, "method": dive}
    if name == "head":
        more = {"method": MethodConfig("m", loss="classification", head="zero_shot"), "evaluation": {"id": classes}, "best": "id"}
        train |= {"evaluate_every": 3}
    elif name == "early stop":
        more |= {"probe": classes, "monitor": MonitorConfig(every=3, samples=8, min_rsa=0.99999)}
    return Config(ModelConfig("emojiclip"), classes if name == "head" else pairs, TrainConfig(**train), output, device="cpu", **more)


def work(ready: Any, name: str, data: Path, output: Path, rank: int, ranks: int, port: int) -> None:
    import torch

    from geomreg.integrations.recipes.finetune import finetune_from

    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    ready.set()
    finetune_from(configured(name, data, output))


def attempt(name: str, data: Path, output: Path, limit: float | None) -> bool:
    """One command; killed after ``limit`` seconds, unless it is through. Whether it was."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "geomreg.integrations.recipes.finetune"])
    ranks = 2 if name == "two processes" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    events = [context.Event() for _ in range(ranks)]
    processes = [context.Process(target=work, args=(event, name, data, output, rank, ranks, port)) for rank, event in enumerate(events)]
    for process in processes:
        process.start()
    for event in events:
        event.wait(120)
    end = time.monotonic() + (600 if limit is None else limit)
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    through = all(process.exitcode is not None for process in processes)
    if through and any(codes := [process.exitcode for process in processes]):
        raise RuntimeError(f"kills: expected a run of {name} to get through or be killed, got exit codes {codes}.")
    victim = random.randrange(ranks)
    processes[victim].kill()
    for process in processes:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise RuntimeError(f"kills: expected process {1 - victim} to end within {PATIENCE} s of the other's death, got one that waits.")
    return through


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, without the run's random name."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    environment = json.loads(found["environment.json"])
    for name in ("run", "checksum"):
        del environment[name]
    return {**found, "environment.json": json.dumps(environment).encode()}


def rounds(name: str, data: Path, folder: Path, kills: int, record: dict[str, Any], save: Any) -> None:
    """Add rounds to the record until it has so many kills."""
    output, generator = folder / "run", random.Random(f"{name} {record['rounds']}")
    attempt(name, data, output, None)  # warms the caches
    shutil.rmtree(output)
    start = time.monotonic()
    attempt(name, data, output, None)
    seconds = time.monotonic() - start
    whole = contents(output)
    while record["kills"] < kills:
        shutil.rmtree(output)
        killed = 0
        while not attempt(name, data, output, generator.uniform(0.05, 0.8) * seconds):
            killed += 1
        found = contents(output)
        differing = sorted(key for key in {**whole, **found} if whole.get(key) != found.get(key))
        record["kills"] += killed
        record["rounds"] += 1
        record["files"] = len(whole)
        record["differing"] = sorted({*record["differing"], *differing})
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each configuration")
    options = parser.parse_args()
    empty = {name: {"kills": 0, "rounds": 0, "files": 0, "differing": []} for name in NAMES}
    found = json.loads(FILE.read_text())["configurations"] if FILE.is_file() else empty

    def save() -> None:
        of = {"python": platform.python_version(), "torch": version("torch"), "geomreg": version("geomreg"), "cpus": os.cpu_count()}
        total = sum(one["kills"] for one in found.values())
        FILE.write_text(json.dumps({"environment": of, "kills": total, "configurations": found}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        write_data(data := Path(temporary) / "data")
        for step in range(5, options.kills + 5, 5):  # in turns, so that a call that is ended early has all of them
            for number, name in enumerate(NAMES):
                folder = Path(temporary) / str(number)
                folder.mkdir(exist_ok=True)
                if found[name]["kills"] < min(step, options.kills):
                    rounds(name, data, folder, min(step, options.kills), found[name], save)
                    shutil.rmtree(folder)
    print(FILE.read_text())


if __name__ == "__main__":
    main()

"""Peak memory and FLOPs of one optimizer step of CLIP fine-tuning at the paper's scale, modelled without a GPU.

    python benchmarks/step/modelled.py                                   # all that results/modelled.json lacks
    python benchmarks/step/modelled.py --model ViT-B-16 --rows FLYP naive
    python benchmarks/step/modelled.py --summary                         # markdown tables, from the JSON alone

A step is FLYP's contrastive loss on a target batch and, in most rows, DiVE on a reference batch against a frozen teacher. The objects are
those that a user runs, on fake tensors: shapes and lifetimes are real, numbers are not computed. Every row is written as soon as it is
done; a second call resumes. ``validation`` holds the same steps on real tensors, at a small batch, and PyTorch's own tracker.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker
from variants import CAPTIONS, UNIQUE, VARIANTS, Training, Variant

FILE = Path(__file__).parent / "results" / "modelled.json"
MODELS, PRECISIONS = ("ViT-B-16", "ViT-L-14"), ("fp32", "bf16")
BATCH = 512  # FLYP's
METHOD = (
    "FakeTensorMode on the CPU; a TorchDispatchMode adds every new storage (rounded up to 512 bytes) and a finalizer takes it off again. "
    "The first step allocates Adam's state; the peak of the second is recorded, and as static_bytes what stays after it, gradients "
    "included. FLOPs by FlopCounterMode in a third step of their own: matrix products, convolutions and attention (causal attention in full), "
    "no elementwise operations, norms or optimizer."
)
ASSUMPTIONS = [
    "One device. AdamW on every parameter that requires grad; fp32 weights, gradients and Adam state; zero_grad(set_to_none=True).",
    "Images lie on the device in fp32, each batch for its own half of the step (both where there is one backward pass, or the row says so). "
    "Cached teacher embeddings are tensors that are there already.",
    "bf16 is torch.autocast('cpu', bfloat16) around the encoders, whose lists of operators differ from CUDA's (layer norms keep bf16 inputs): "
    "approximate for a GPU.",
    "Not modelled: fragmentation of the allocator, workspaces of cuBLAS and attention kernels, temporaries of a foreach AdamW, "
    "communication buffers.",
    "Attention by torch's scaled_dot_product_attention (flash); GELU as in open_clip's configs, not the QuickGELU of OpenAI's weights.",
    f"Unique texts: captions of the target batch drawn uniformly from {CAPTIONS} (182 classes of iWildCam, FLYP's 2 templates); the "
    f"expected number of distinct ones in {BATCH} draws is {round(UNIQUE * BATCH)}.",
    "LoRA: rank 16 on c_fc and c_proj of both towers, all else frozen, the logit scale too.",
    "Chunks are an eighth of the batch. The target's backward pass comes first and the regularizer's last, as in the training loop, unless "
    "the row says otherwise; in a joint pass the teacher runs before the student.",
]


VALIDATED = ("FLYP", "naive", "cached, joint", "cached, lean", "cached, before, lean", "cached, lean, contrastive chunked")
VALIDATION_BATCH = 8


@contextmanager
def fake_tensors() -> Iterator[None]:
    """FakeTensorMode, and what it lacks for Teacher and PEFT: a copy of a fake model stays in this mode (deepcopy would copy the mode too);
    storages are told apart by identity (the addresses are all 0); PEFT's move of an adapter to where it is does nothing (fake parameters
    cannot be swapped)."""
    with (
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
        mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
        mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
        FakeTensorMode(),
    ):
        yield


class PeakTracker(TorchDispatchMode):
    """Bytes in live storages, now and at most; unlike MemTracker it allows several forwards of a module in a step."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for part in parts:
            for tensor in [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else [part]:
                self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = math.ceil(storage.nbytes() / 512) * 512
            weakref.finalize(storage, self.forget, key)
            self.now += self.live[key]
            self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.see(value)
        return out


def tracked(training: Training) -> tuple[int, int]:
    """Peak bytes of the steps after the first, and bytes that stay after them."""
    with PeakTracker(training.parts()) as tracker:
        training.step()
        tracker.peak = tracker.now
        for number in range(training.variant.every):
            training.step(number)
        return tracker.peak, tracker.now


def flops(training: Training) -> int:
    """Mean over the steps of a period."""

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    on_cpu = {  # which FlopCounterMode does not know
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    # totals need no hooks on modules, which fail in the autograd.grad of geomreg.backward where the loss is a module
    with mock.patch.object(ModuleTracker, "__enter__"), mock.patch.object(ModuleTracker, "__exit__"), counter:
        for number in range(training.variant.every):
            training.step(number)
    return counter.get_total_flops() // training.variant.every


def training_of(model: str, variant: Variant, precision: str, batch: int) -> Training:
    return Training(lambda: CLIP(**get_model_config(model)), variant, batch=batch, precision=precision)


def measure(model: str, precision: str, variant: Variant) -> dict[str, int]:
    with fake_tensors():
        training = training_of(model, variant, precision, BATCH)
        peak, static = tracked(training)
        return {"peak_bytes": peak, "static_bytes": static, "flops": flops(training)}


def peak_of(mode: Callable[[], AbstractContextManager[Any]], model: str, variant: Variant, batch: int) -> dict[str, int]:
    """In a process of its own: the tracked peak, and by how much the process grew above what its imports need."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mode():
        peak, _ = tracked(training_of(model, variant, "fp32", batch))
    return {"peak_bytes": peak, "process_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def on_real_tensors(model: str, name: str) -> dict[str, Any]:
    """The same small step on fake and on real tensors."""
    small = {key: 1 / 4 for key in ("chunk", "target_chunk") if getattr(VARIANTS[name], key)}
    found = {}
    for key, mode in (("fake", fake_tensors), ("real", nullcontext)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[key] = pool.apply(peak_of, (mode, model, replace(VARIANTS[name], **small), VALIDATION_BATCH))
    fake, real = found["fake"]["peak_bytes"], found["real"]["peak_bytes"]
    return {
        "check": "real tensors",
        "model": model,
        "precision": "fp32",
        "name": name,
        "settings": {"batch": VALIDATION_BATCH, **small},
        "fake_peak_bytes": fake,
        "real_peak_bytes": real,
        "fake_to_real": fake / real,
        "real_process_growth_bytes": found["real"]["process_bytes"],
    }


def by_mem_tracker(model: str, precision: str) -> dict[str, Any]:
    """FLYP's peak by PyTorch's own tracker, which cannot follow a module that is called twice in a step."""
    with fake_tensors():
        training = training_of(model, VARIANTS["FLYP"], precision, BATCH)
        with MemTracker() as tracker:
            tracker.track_external(training.model, training.optimizer)
            for _ in range(2):
                training.step()
                tracker.reset_mod_stats()
            snapshot = tracker.get_tracker_snapshot("peak")
    return {
        "check": "MemTracker",
        "model": model,
        "precision": precision,
        "name": "FLYP",
        "settings": {"batch": BATCH},
        "mem_tracker_peak_bytes": sum(device["Total"] for device in snapshot.values()),
    }


def header() -> dict[str, Any]:
    packages = {"torch": "torch", "open_clip": "open_clip_torch", "peft": "peft"}
    return {
        "kind": "modelled",
        "method": METHOD,
        "assumptions": ASSUMPTIONS,
        "versions": {"python": platform.python_version()} | {key: version(name) for key, name in packages.items()},
    }


def load() -> dict[str, Any]:
    """The recorded rows, if they were made in the same way; a new record if there is none."""
    content = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"rows": [], "validation": []}
    differing = [key for key, value in header().items() if content["rows"] and content[key] != value]
    if differing:
        raise SystemExit(f"{FILE.name} was recorded with another {', '.join(differing)}. Move it away to start anew.")
    return content


def save(content: dict[str, Any]) -> None:
    order = {key: i for i, key in enumerate((m, p, name) for m in MODELS for p in PRECISIONS for name in VARIANTS)}
    content["rows"].sort(key=lambda row: order[row["model"], row["precision"], row["name"]])
    with_ratios(content)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown")
    described = {"generated": time.strftime("%Y-%m-%d"), "machine": {"cpu": cpu, "cores": os.cpu_count()}, **header()}
    FILE.parent.mkdir(exist_ok=True)
    temporary = FILE.with_name(f".{FILE.name}")
    temporary.write_text(json.dumps(described | {key: content[key] for key in ("rows", "validation")}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, FILE)


def with_ratios(content: dict[str, Any]) -> None:
    """Each row against FLYP and, where FLYP has the same option, against that."""
    names = {variant: name for name, variant in VARIANTS.items()}
    known = {(row["model"], row["precision"], row["name"]): row for row in content["rows"]}
    for row in content["rows"]:
        own = names[VARIANTS[row["name"]].counterpart]
        for label, name in {"flyp": "FLYP", **({} if own == "FLYP" else {"counterpart": own})}.items():
            base = known.get((row["model"], row["precision"], name))
            for key in ("peak_bytes", "flops") if base else ():
                row[f"{key.removesuffix('_bytes')}_x_{label}"] = row[key] / base[key]
    for check in content["validation"]:
        base = known.get((check["model"], check["precision"], check["name"]))
        if "mem_tracker_peak_bytes" in check and base:
            check["tracker_to_mem_tracker"] = base["peak_bytes"] / check["mem_tracker_peak_bytes"]


def run(models: list[str], names: list[str], validate: bool) -> None:
    content = load()
    rows, checks, started = content["rows"], content["validation"], time.monotonic()

    def add(kept: list[dict[str, Any]], entry: dict[str, Any]) -> None:
        kept.append(entry)
        save(content)
        print(
            *(entry[key] for key in ("model", "precision", "name")),
            entry.get("check", ""),
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )

    for model in models:
        for precision in PRECISIONS:
            for name in names:
                settings = {"batch": BATCH, **asdict(VARIANTS[name])}
                described = {"model": model, "precision": precision, "name": name, "settings": settings}
                if not any(row.items() >= described.items() for row in rows):
                    rows[:] = [row for row in rows if (row["model"], row["precision"], row["name"]) != (model, precision, name)]
                    add(rows, described | measure(model, precision, VARIANTS[name]))
    if validate:
        done = {(check["check"], check["model"], check["precision"], check["name"]) for check in checks}
        for model in models:
            for precision in PRECISIONS:
                if ("MemTracker", model, precision, "FLYP") not in done:
                    add(checks, by_mem_tracker(model, precision))
        for name in VALIDATED if MODELS[0] in models else ():
            if ("real tensors", MODELS[0], "fp32", name) not in done:
                add(checks, on_real_tensors(MODELS[0], name))


def summary() -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    for model in MODELS:
        for precision in PRECISIONS:
            print(f"\n{model}, {precision}\n")
            print("| step | peak GiB | x FLYP | resident after GiB | TFLOP | x FLYP | x FLYP with the same option: memory, FLOP |")
            print("|---|---|---|---|---|---|---|")
            for row in content["rows"]:
                if (row["model"], row["precision"]) == (model, precision):
                    own = [f"{row[key]:.3f}" for key in ("peak_x_counterpart", "flops_x_counterpart") if key in row]
                    ratios = [f"{row.get(key, math.nan):.3f}" for key in ("peak_x_flyp", "flops_x_flyp")]
                    cells = [row["name"], f"{row['peak_bytes'] / 2**30:.2f}", ratios[0], f"{row['static_bytes'] / 2**30:.2f}"]
                    cells += [f"{row['flops'] / 1e12:.1f}", ratios[1], ", ".join(own)]
                    print(f"| {' | '.join(cells)} |")
    print("\nvalidation\n")
    print("| check | model | precision | step | by the tracker / by the check |\n|---|---|---|---|---|")
    for check in content["validation"]:
        ratio = check["fake_to_real" if "fake_to_real" in check else "tracker_to_mem_tracker"]
        print(f"| {check['check']} | {check['model']} | {check['precision']} | {check['name']} | {ratio:.5f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="this one only")
    parser.add_argument("--rows", nargs="+", choices=VARIANTS, metavar="NAME", help="these steps only, without validation")
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    arguments = parser.parse_args()
    if arguments.summary:
        summary()
    else:
        torch.set_num_threads(1)
        run([arguments.model] if arguments.model else list(MODELS), arguments.rows or list(VARIANTS), validate=not arguments.rows)

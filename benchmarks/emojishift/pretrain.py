"""Pre-train EmojiCLIP from scratch on the pre-training artists' drawings.

    python benchmarks/emojishift/pretrain.py --run RUN_FOLDER

Checkpoints after every epoch and resumes from ``RUN_FOLDER``; writes the model (open_clip layout, fp16) and its
record (settings, curve) there when the last epoch is done. Contrastive loss with label-aware targets over two
drawings a concept, between images and texts and between artists; and images and texts are classified among one learned
prototype for each concept, which only training uses: the batch is too small to tell 1,600 concepts apart.
"""

import argparse
import copy
import json
import math
import os
import platform
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from artists import MONOCHROME, PRETRAINING, artist_drawings
from augment import augment
from safetensors.torch import save_file
from torch import Tensor

from geomreg.integrations.quickstart.data import Drawings, concepts, openmoji_drawings

CONFIG = Path(__file__).resolve().parents[2] / "integrations" / "quickstart" / "model" / "open_clip_config.json"
TEMPLATES = (
    "{}", "{}.", "a {}", "a {}.", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "an icon of a {}.",
    "an emoji of a {}.", "a symbol of a {}.", "an image of {}.", "a {} icon", "a {} emoji", "this is a {}.", "the {}",
    "a small {}.", "a clean picture of {}", "a bad drawing of a {}.", "a cartoon {}.", "{} on a plain background.",
)  # fmt: skip
RESTYLED = {  # our renderings of an artist's paths
    "noto": ("line", "wire", "outline"), "noto-v1": ("line", "outline"), "fluent-emoji-flat": ("line", "wire", "outline"),
    "emojione": ("line", "wire", "outline"), "fxemoji": ("line", "wire", "outline"), "streamline-emojis": ("line",),
}  # fmt: skip
TASKS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Smileys & Emotion")
SETTINGS = {
    "seed": 0, "epochs": 220, "batch": 128, "learning_rate": 1e-3, "warmup_steps": 100, "weight_decay": 0.05,
    "betas": [0.9, 0.98], "clip_norm": 1.0, "restyle_probability": 0.45, "ema_decay": 0.998, "max_logit_scale": 100.0,
    "layer_scale": 0.5, "artist_weight": 0.5, "prototype_weight": 0.5, "plain_until_epoch": 10, "plain_share": 0.1,
}  # fmt: skip


class Data:
    """All pre-training drawings in memory; ``color`` holds one row per artist and concept."""

    def __init__(self) -> None:
        self.names = {code: concept.name for code, concept in concepts().items()}
        self.codes = list(self.names)
        row = {code: i for i, code in enumerate(self.codes)}
        images, labels, mono, restyled, is_line = [], [], [], [], []
        self.choices: list[list[int]] = []  # for each row of color, the rows of restyled that show the same drawing
        offset = 0
        for artist in PRETRAINING:
            drawings = artist_drawings(artist)
            count, styles = len(drawings.codes), RESTYLED.get(artist, ())
            images.append(drawings.images)
            labels += [row[code] for code in drawings.codes]
            mono += [artist in MONOCHROME] * count
            self.choices += [[offset + k * count + i for k in range(len(styles))] for i in range(count)]
            for style in styles:
                restyled.append(artist_drawings(artist, style).images)
                is_line += [style != "outline"] * count
                offset += count
        self.color, self.restyled = torch.cat(images), torch.cat(restyled)
        self.labels, self.mono, self.is_line = torch.tensor(labels), torch.tensor(mono), torch.tensor(is_line)

    def pairs(self, generator: torch.Generator) -> Tensor:
        """``(P, 2)`` rows of ``color``: two drawings a concept, by different artists where there are two; every row once or more."""
        order = torch.randperm(len(self.labels), generator=generator)
        order = order[self.labels[order].argsort(stable=True)]
        found = []
        for rows in order.split(torch.bincount(self.labels[order])[torch.unique(self.labels)].tolist()):
            found += [rows[i : i + 2] if i + 1 < len(rows) else rows[[i, 0]] for i in range(0, len(rows), 2)]
        pairs = torch.stack(found)
        return pairs[torch.randperm(len(pairs), generator=generator)]

    def batch(self, rows: Tensor, generator: torch.Generator, restyle_probability: float) -> tuple[Tensor, Tensor, Tensor]:
        """Drawings, whether they are line art, and their concepts."""
        images, line_art = self.color[rows], self.mono[rows].clone()
        draws = torch.rand(len(rows), 2, generator=generator)
        for i, row in enumerate(rows.tolist()):
            choices = self.choices[row]
            if choices and draws[i, 0] < restyle_probability:
                chosen = choices[int(draws[i, 1] * len(choices))]
                images[i], line_art[i] = self.restyled[chosen], self.is_line[chosen]
        return images, line_art, self.labels[rows]


class Captions:
    """Token ids of every (template, concept), mapped to the compact vocabulary of the tokens that occur."""

    def __init__(self, names: list[str], context_length: int) -> None:
        tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
        texts = [template.format(name) for template in TEMPLATES for name in names]
        tokens = tokenizer(texts)
        self.vocabulary = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), tokens.flatten()]))  # sorted: EOT stays last
        compact = torch.searchsorted(self.vocabulary, tokens)
        self.tokens = compact.view(len(TEMPLATES), len(names), context_length)


def build_model(vocabulary: int) -> tuple[open_clip.CLIP, dict]:
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    model_config = copy.deepcopy(config["model_cfg"])
    model_config["text_cfg"]["vocab_size"] = vocabulary
    return open_clip.CLIP(**model_config, output_dict=True), config


def soft_cross_entropy(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Every column of a row's concept is a positive, with equal shares."""
    same = (rows[:, None] == columns[None, :]).float()
    return -(same / same.sum(dim=1, keepdim=True) * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def loss_fn(image: Tensor, text: Tensor, labels: Tensor, others: Tensor, scale: Tensor, prototypes: Tensor) -> Tensor:
    """Contrastive loss of two drawings a concept, their captions, and captions of other concepts; and classification.

    Args:
        image: ``(2 P, D)``; row P + j shows the concept of row j.
        text: ``(P + M, D)``; captions of the P concepts, then of M others that have no image here.
        labels: ``(P,)`` concepts.
        others: ``(M,)`` concepts of the further captions.
        scale: exponentiated logit scale.
        prototypes: ``(C, D)`` one learned vector for each concept, of any length.
    """
    of_image, of_text, pairs = labels.repeat(2), torch.cat([labels, others]), len(labels)
    to_text = soft_cross_entropy(scale * image @ text.T, of_image, of_text)
    to_image = soft_cross_entropy(scale * text[:pairs] @ image.T, labels, of_image)
    between = scale * image[:pairs] @ image[pairs:].T
    artists = (soft_cross_entropy(between, labels, labels) + soft_cross_entropy(between.T, labels, labels)) / 2
    classes = F.normalize(prototypes, dim=1).T
    classified = F.cross_entropy(scale * image @ classes, of_image) + F.cross_entropy(scale * text @ classes, of_text)
    return (to_text + to_image) / 2 + SETTINGS["artist_weight"] * artists + SETTINGS["prototype_weight"] * classified


@torch.no_grad()
def initialize(model: open_clip.CLIP, data: "Data", captions: "Captions", size: int, generator: torch.Generator) -> None:
    """Start both towers with spread-out embeddings: projections that whiten the pooled features, as in LSUV.

    At the usual initialisation all texts, and all images, point the same way (cosine near 1). Layer scales start at a
    half, not at timm's 1e-6, which needs far longer schedules.
    """
    width = model.text_projection.shape[1]

    def whitening(features: Tensor, skip: int) -> Tensor:
        values, vectors = torch.linalg.eigh(features.T @ features / len(features))
        values, vectors = values.flip(0)[skip : skip + width], vectors.flip(1)[:, skip : skip + width]
        return vectors / (width * (values + 0.01 * values.mean())).sqrt()

    for name, parameter in model.visual.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(SETTINGS["layer_scale"])
    tokens = captions.tokens[:6].flatten(0, 1)
    outputs: list[Tensor] = []
    handle = model.ln_final.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.encode_text(tokens)
    handle.remove()
    pooled = outputs[0][torch.arange(len(tokens)), tokens.argmax(dim=-1)]
    model.ln_final.bias.sub_(pooled.mean(dim=0))
    model.text_projection.copy_(whitening(pooled - pooled.mean(dim=0), skip=0))
    rows = torch.randint(len(data.color), (1024,), generator=generator)
    features = model.visual.trunk(plain(data.batch(rows, generator, SETTINGS["restyle_probability"])[0], size) * 2 - 1)
    model.visual.head.proj.weight.copy_(whitening(features, skip=1).T)  # the first direction is the mean


def plain(drawings: Tensor, size: int) -> Tensor:
    """Premultiplied RGBA drawings on white, ``(B, 3, size, size)`` in [0, 1]."""
    x = drawings.float() / 255
    return F.interpolate(x[:, :3] + 1 - x[:, 3:], size=size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def evaluate(model: open_clip.CLIP, data: Data, captions: Captions, sets: dict[str, Drawings], size: int) -> dict[str, float]:
    """Top-1 in per cent, concepts of each group among themselves, one plain view on white."""
    model.eval()
    result: dict[str, float] = {}
    text = F.normalize(sum(model.encode_text(captions.tokens[t], normalize=True) for t in range(0, len(TEMPLATES), 4)), dim=-1)
    row = {code: i for i, code in enumerate(data.codes)}
    for name, drawings in sets.items():
        accuracies = []
        for group in TASKS:
            codes = [code for code in drawings.codes if concepts()[code].group == group]
            x = plain(drawings.select(codes), size) * 2 - 1
            features = torch.cat([model.encode_image(part, normalize=True) for part in x.split(256)])
            logits = features @ text[[row[code] for code in codes]].T
            accuracies.append(100 * (logits.argmax(dim=1) == torch.arange(len(codes))).float().mean().item())
            result[f"{name}/{group}"] = round(accuracies[-1], 2)
        result[name] = round(sum(accuracies) / len(accuracies), 2)
    return result


def export(model: open_clip.CLIP, config: dict, vocabulary: Tensor, folder: Path) -> None:
    """The whole vocabulary again (rows never trained are zero), fp16, in open_clip's own layout."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tokens = torch.zeros(config["model_cfg"]["text_cfg"]["vocab_size"], state["token_embedding.weight"].shape[1])
    tokens[vocabulary] = state["token_embedding.weight"]
    tokens[0] = 0  # padding: behind the end of text, where causal attention never looks
    state["token_embedding.weight"] = tokens
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary = folder / ".open_clip_model.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, temporary)
    os.replace(temporary, folder / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, record and exported model")
    for name in ("epochs", "seed"):
        parser.add_argument(f"--{name}", type=int, default=SETTINGS[name])
    parser.add_argument("--max_steps_per_epoch", type=int, default=None, help="for trying it out")
    arguments = parser.parse_args()
    settings = {**SETTINGS, "epochs": arguments.epochs, "seed": arguments.seed}
    arguments.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings["seed"])

    data = Data()
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    captions = Captions(list(data.names.values()), config["model_cfg"]["text_cfg"]["context_length"])
    model, config = build_model(len(captions.vocabulary))
    size = model.visual.image_size[0]
    initialize(model, data, captions, size, torch.Generator().manual_seed(settings["seed"]))
    average = copy.deepcopy(model).requires_grad_(False)
    prototypes = torch.nn.Parameter(0.1 * torch.randn(len(data.codes), config["model_cfg"]["embed_dim"]))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1] + [prototypes]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        lr=settings["learning_rate"], betas=tuple(settings["betas"]),
    )  # fmt: skip
    seen = torch.zeros(len(data.codes), dtype=torch.bool)
    pairs_a_batch = settings["batch"] // 2
    steps = len(data.pairs(torch.Generator().manual_seed(0))) // pairs_a_batch
    known = torch.unique(data.labels)
    total, start, curve, seconds = steps * settings["epochs"], 0, [], 0.0

    checkpoint = arguments.run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"pretrain: {checkpoint} was made with other settings. Use another --run folder.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        prototypes.data.copy_(state["prototypes"])
        seen, start, curve, seconds = state["seen"], state["epoch"], state["curve"], state["seconds"]
        print(f"resumed at epoch {start}", flush=True)
    tests = {"openmoji": openmoji_drawings("color"), "openmoji-line": openmoji_drawings("line"), "twemoji": artist_drawings("twemoji")}
    tests["noto"] = artist_drawings("noto")  # seen

    for epoch in range(start, settings["epochs"]):
        began, running = time.time(), 0.0
        generator = torch.Generator().manual_seed(settings["seed"] * 100_003 + epoch)
        order = data.pairs(generator)
        model.train()
        for step in range(min(steps, arguments.max_steps_per_epoch or steps)):
            done = epoch * steps + step
            rate = min((done + 1) / settings["warmup_steps"], 0.5 * (1 + math.cos(math.pi * done / total))) * settings["learning_rate"]
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = order[step * pairs_a_batch : (step + 1) * pairs_a_batch].T.flatten()
            drawings, line_art, labels = data.batch(rows, generator, settings["restyle_probability"])
            labels = labels[:pairs_a_batch]
            others = known[torch.randint(len(known), (pairs_a_batch,), generator=generator)]
            captioned = torch.cat([labels, others])
            views = augment(drawings, line_art, size=size, generator=generator)
            share = max(settings["plain_share"], 1 - epoch / settings["plain_until_epoch"])  # easy pictures first
            easy = torch.rand(len(rows), generator=generator) < share
            views = torch.where(easy[:, None, None, None], plain(drawings, size), views) * 2 - 1
            template = torch.randint(len(TEMPLATES), (len(rows),), generator=generator)
            image = model.encode_image(views.contiguous(memory_format=torch.channels_last), normalize=True)
            text = model.encode_text(captions.tokens[template, captioned], normalize=True)
            loss = loss_fn(image, text, labels, others, model.logit_scale.exp(), prototypes)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(settings["max_logit_scale"]))
                keep = min(settings["ema_decay"], (done + 1) / (done + 10))
                for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(value, 1 - keep)
            seen[captioned] = True
            running += loss.item()
        seconds += time.time() - began
        entry = {
            "epoch": epoch + 1,
            "loss": round(running / (step + 1), 4),
            "scale": round(model.logit_scale.exp().item(), 2),
            "seconds": round(seconds),
        }
        if (epoch + 1) % 10 == 0 or epoch + 1 == settings["epochs"]:
            entry["top1"] = evaluate(average, data, captions, tests, size)
        curve.append(entry)
        print(json.dumps(entry), flush=True)
        state = {"settings": settings, "model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                 "prototypes": prototypes.detach(), "seen": seen, "epoch": epoch + 1, "curve": curve, "seconds": seconds}  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    export(average, config, captions.vocabulary, arguments.run / "model")
    record = {
        "settings": settings, "templates": TEMPLATES, "artists": PRETRAINING, "restyled": RESTYLED, "drawings": len(data.color), "concepts": int(seen.sum()),
        "torch": torch.__version__, "open_clip": open_clip.__version__, "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "seconds": round(seconds), "curve": curve,
    }  # fmt: skip
    (arguments.run / "model" / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

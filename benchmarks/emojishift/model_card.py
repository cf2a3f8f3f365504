"""Measure the shipped EmojiCLIP and write its card (README.md and card.json beside the checkpoint).

python benchmarks/emojishift/model_card.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from artists import PRETRAINING, artist_drawings
from pretrain import RESTYLED
from torch import Tensor

from geomreg.integrations.open_clip import embed
from geomreg.integrations.quickstart.data import Drawings, openmoji_drawings
from geomreg.integrations.quickstart.experiment import TARGET, ZERO_SHOT, Experiment, Pool, load_model, model_folder, subset
from geomreg.integrations.recipes.evaluate import accuracy, correct, embed_images, zero_shot_head

GROUPS = {"animals": TARGET, **ZERO_SHOT}
# Liang et al., Mind the gap, NeurIPS 2022 (arXiv 2203.02053): distance of the modality means on COCO, CLIP ViT-B/32.
CLIP = {"logit_scale": 100.0, "modality_gap": 0.82}


def styles() -> dict[str, tuple[bool, Drawings]]:
    """Name of each style, whether pre-training saw it, and its drawings."""
    seen = {artist: (True, artist_drawings(artist)) for artist in PRETRAINING}
    seen["noto, our line rendering"] = (True, artist_drawings("noto", "line"))
    unseen = {"twemoji": artist_drawings("twemoji"), "openmoji": openmoji_drawings("color"), "openmoji line art": openmoji_drawings("line")}
    return seen | {name: (False, drawings) for name, drawings in unseen.items()}


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the covariance spectrum (Roy and Vetterli, 2007)."""
    share = torch.linalg.eigvalsh(torch.cov(x.double().T)).clamp(min=0)
    share = share / share.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()


@torch.no_grad()
def measure() -> dict[str, Any]:
    model = load_model()
    top1: dict[str, dict[str, float]] = {}
    for style, (_, drawings) in styles().items():
        top1[style] = {}
        for name, group in GROUPS.items():
            part = subset(drawings, (group,))
            pool = Pool(Experiment(target=part, shifts={}, zero_shot={"same": part}, reference=part))
            head = zero_shot_head(model, pool.classes["target"])
            top1[style][name] = accuracy(correct(model, pool.images["zero_shot/same"], torch.arange(len(part.codes)), head))
    part = subset(artist_drawings("noto"), tuple(GROUPS.values()))
    pool = Pool(Experiment(target=part, shifts={}, zero_shot={"all": part}, reference=part))
    images, texts = pool.probe["image"], pool.probe["text"]
    raw = embed(model, images, texts, normalize=False)
    image, text = embed_images(model, images), embed(model, texts=texts).text
    if raw.image is None or raw.text is None or text is None:
        raise RuntimeError("model card: the model gave no embeddings")
    return {
        "top1": top1,
        "seen": {style: seen for style, (seen, _) in styles().items()},
        "concepts": {name: len(subset(openmoji_drawings("color"), (group,)).codes) for name, group in GROUPS.items()},
        "logit_scale": model.logit_scale.exp().item(),
        "modality_gap": torch.linalg.vector_norm(image.mean(dim=0) - text.mean(dim=0)).item(),
        "norm_image": raw.image.norm(dim=1).mean().item(),
        "norm_text": raw.text.norm(dim=1).mean().item(),
        "effective_rank_image": effective_rank(image),
        "effective_rank_text": effective_rank(text),
        "width": image.shape[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "probe": f"{len(images)} drawings of noto with captions, one fixed view each",
    }


def card(m: dict[str, Any], record: dict[str, Any]) -> str:
    settings = record["settings"]
    lines = [
        "# EmojiCLIP",
        "",
        "A small open_clip `CLIP`, trained from scratch by `benchmarks/emojishift/pretrain.py` on emoji drawings by "
        f"{len(record['artists'])} sets ({', '.join(record['artists'])}) and our own outlined and line renderings of {len(RESTYLED)} of them. It exists to show, in "
        "minutes on a CPU, what fine-tuning does to a pre-trained embedding space; it is no use for photographs.",
        "",
        f"ConvNeXt (zepto) at 48 px, text transformer of 3 layers and width 128, embeddings of width {m['width']}, "
        f"{m['parameters'] / 1e6:.1f} M parameters (6.3 M of them the standard CLIP vocabulary, rows never trained are zero), fp16. "
        f"{record['drawings']} drawings of {record['concepts']} concepts, {settings['epochs']} epochs of batch {settings['batch']}, "
        f"{record['seconds'] / 3600:.1f} h on {record['threads']} threads. Settings and curve: `pretrain.json`; these measurements: `card.json`.",
        "",
        "## Zero-shot accuracy, per cent",
        "One fixed view of each drawing, concepts of a group among themselves, two templates. "
        + ", ".join(f"{name} {count}" for name, count in m["concepts"].items())
        + " classes where an artist drew all.",
        "",
        "| style | seen | " + " | ".join(GROUPS) + " | mean |",
        "|---|---|" + "---|" * (len(GROUPS) + 1),
    ]
    for style, values in m["top1"].items():
        mean = sum(values.values()) / len(values)
        cells = " | ".join(f"{value:.1f}" for value in values.values())
        lines.append(f"| {style} | {'yes' if m['seen'][style] else 'no'} | {cells} | {mean:.1f} |")
    lines += [
        "",
        "## Geometry, beside CLIP's",
        "| | EmojiCLIP | CLIP ViT-B/32 |",
        "|---|---|---|",
        f"| logit scale | {m['logit_scale']:.1f} | {CLIP['logit_scale']:.0f} |",
        f"| modality gap (distance of the means of unit embeddings) | {m['modality_gap']:.2f} | {CLIP['modality_gap']:.2f} (arXiv 2203.02053) |",
        f"| mean norm before normalisation, images / texts | {m['norm_image']:.1f} / {m['norm_text']:.1f} | not measured here |",
        f"| effective rank, images / texts, of {m['width']} | {m['effective_rank_image']:.0f} / {m['effective_rank_text']:.0f} | not measured here |",
        "",
        f"Probe: {m['probe']}. The regularizers' natural weight grows with the square of the logit scale; the paper's 1000 belongs to 100.",
        "",
        "Concepts are those of the zero-shot tasks: what is unseen is the artist's style, not the names. One drawing per concept and artist. "
        "The unseen styles were looked at while the recipe was made (every tenth epoch of the curve), so they are held out, not blind.",
        "Licences of the drawings: see NOTICE. The weights are under Apache-2.0.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = model_folder()
    measured = measure()
    record = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
    Path(folder / "card.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    Path(folder / "README.md").write_text(card(measured, record), encoding="utf-8")
    print(card(measured, record))


if __name__ == "__main__":
    main()

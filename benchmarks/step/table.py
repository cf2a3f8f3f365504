"""The table of costs in docs/cost.md, from the recorded JSON alone.

python benchmarks/step/table.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROWS = {
    "FLYP": "FLYP",
    "naive": "DiVE, one backward pass",
    "cached, joint": "+ cached teacher",
    "cached, lean, one chunk": "+ the two losses one after the other",
    "cached, before, one chunk": 'the same with `update="before"`',
    "cached, lean": "the same in chunks of B/8",
    "cached, lean, R = B/2": "the same with R = B/2",
    "cached, lean, R = B/4": "the same with R = B/4",
    "cached, lean, every 4th step": "every 4th step instead",
    "cached, lean, contrastive chunked": "FLYP's loss in chunks of B/8 too",
    "FLYP, unique texts": "FLYP, each caption once",
    "cached, lean, unique texts": "DiVE, each caption once",
    "FLYP, LoRA": "FLYP on LoRA",
    "adapters off, lean, LoRA": "DiVE on LoRA, adapters off as teacher",
}


def table() -> str:
    """Markdown."""
    modelled = json.loads((RESULTS / "modelled.json").read_text(encoding="utf-8"))
    measured = json.loads((RESULTS / "measured_cpu.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["precision"], row["name"]): row for row in modelled["rows"]}
    groups = {group["model"]: {row["name"]: row for row in group["rows"]} for group in measured["groups"]}
    lines = [
        "| step, times FLYP | memory, modelled: fp32 / bf16 | FLOPs, modelled | time, measured: ViT-B-32 / EmojiCLIP | memory, measured |",
        "|---|---|---|---|---|",
        "| DiVE as published (its own measurement) | 2.74 | | 1.64 | |",
    ]
    for name, label in ROWS.items():
        fp32, bf16 = (rows["ViT-B-16", precision, name] for precision in ("fp32", "bf16"))
        real = [groups[model].get(name) for model in ("ViT-B-32", "EmojiCLIP")]
        cells = [
            label,
            f"{fp32['peak_x_flyp']:.3f} / {bf16['peak_x_flyp']:.3f}",
            f"{fp32['flops_x_flyp']:.2f}",
            " / ".join("–" if row is None else f"{row['time_x_flyp']:.2f}" for row in real),
            " / ".join("–" if row is None else f"{row['memory_x_flyp']:.2f}" for row in real),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""Table and picture of the quickstart's results."""

from pathlib import Path
from typing import Any

__all__ = ["picture", "table"]

LABELS = {"base": "base model", "flyp": "FLYP", "flyp+dive": "FLYP + DiVE", "flyp+control": "FLYP + both-encoder distillation (control)"}
STYLES = {  # distinct in grey and for colour-blind readers (Okabe-Ito), markers and hatches beside the colours
    "base": {"color": "#000000", "marker": "*", "hatch": ""},
    "flyp": {"color": "#D55E00", "marker": "o", "hatch": "//"},
    "flyp+dive": {"color": "#0072B2", "marker": "s", "hatch": ""},
    "flyp+control": {"color": "#56B4E9", "marker": "^", "hatch": ".."},
}


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _blocks(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Columns of the tables, by table."""
    distortion = row["distortion"]
    return {
        "Target classes, %": {
            "ID": row["id"],
            **{f"OOD {name}": value for name, value in row["ood"].items()},
            "OOD average": _mean(row["ood"]),
            **row["corrupted"],
            "corrupted average": _mean(row["corrupted"]),
        },
        "Zero-shot, %": {**row["zero_shot"], "average": _mean(row["zero_shot"])},
        "Geometry of the zero-shot pairs against the base model, and cost": {
            **{f"RSA {name}": value for name, value in row["rsa"].items()},
            "RSA at least": distortion["aligned_rsa_bound"],
            "distance change": distortion["distance_change"],
            "at most": distortion["distance_bound"],
            "seconds of training": row["training_seconds"],
            "peak memory, MB": row["peak_memory_mb"],
        },
    }


def _cell(title: str, key: str, value: float | None, base: float | None) -> str:
    if value is None or (key == "RSA at least" and value < 0):  # not measured; the bound says nothing
        return "–"
    if title.endswith("%"):
        return f"{value:.1f}" if base is None else f"{value:.1f} ({value - base:+.1f})"
    return f"{value:.0f}" if key in ("seconds of training", "peak memory, MB") else f"{value:.3f}"


def _markdown(title: str, header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables whose rows are the runs; changes of accuracies against the base model (the first row) in brackets."""
    blocks = [_blocks(row) for row in rows]
    names = [LABELS.get(row["method"], row["method"]) for row in rows]
    parts = []
    for title, first in blocks[0].items():
        lines = [
            [name, *(_cell(title, key, block[title][key], None if block is blocks[0] else first[key]) for key in first)]
            for name, block in zip(names, blocks, strict=True)
        ]
        parts.append(_markdown(title, ["", *first], lines))
    sweep = [
        [name, f"{point['alpha']:g}", *(f"{point[key]:.1f}" for key in ("id", "ood", "zero_shot"))]
        for name, row in zip(names, rows, strict=True)
        for point in row.get("wise", ())
    ]
    if sweep:
        header = ["", "alpha", "ID", "OOD average", "zero-shot average"]
        parts.append(_markdown("Weight ensembles with the base model (WiSE-FT), %", header, sweep))
    return "\n".join(parts)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """ID against zero-shot accuracy with the weight-ensemble curves, and how far each zero-shot task fell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    base = rows[0]
    for row in rows:
        method, style = row["method"], STYLES.get(row["method"], STYLES["base"])
        if row.get("wise"):
            inner = [(point["id"], point["zero_shot"]) for point in row["wise"]]
            curve = [(base["id"], _mean(base["zero_shot"])), *inner, (row["id"], _mean(row["zero_shot"]))]
            left.plot(*zip(*curve, strict=True), color=style["color"], linewidth=1.2, marker=".", markersize=5)
        size = 220 if method == "base" else 90
        left.scatter(
            row["id"],
            _mean(row["zero_shot"]),
            color=style["color"],
            marker=style["marker"],
            s=size,
            label=LABELS.get(method, method),
            zorder=3,
        )
    left.axhline(_mean(base["zero_shot"]), color="0.6", linewidth=0.8, linestyle="--")
    left.set(
        xlabel="target accuracy (ID), %",
        ylabel="zero-shot accuracy, mean of the tasks, %",
        title="What is learned against what is forgotten",
    )

    tasks = list(base["zero_shot"])
    tuned = [row for row in rows if row["method"] != "base"]
    width = 0.8 / max(1, len(tuned))
    for k, row in enumerate(tuned):
        style = STYLES.get(row["method"], STYLES["base"])
        changes = [row["zero_shot"][task] - base["zero_shot"][task] for task in tasks]
        positions = [i + (k - (len(tuned) - 1) / 2) * width for i in range(len(tasks))]
        right.bar(
            positions,
            changes,
            width,
            color=style["color"],
            hatch=style["hatch"],
            edgecolor="white",
            label=LABELS.get(row["method"], row["method"]),
        )
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(tasks)), tasks)
    right.set(ylabel="change of zero-shot accuracy, points", title="Forgetting by task")
    handles, labels = left.get_legend_handles_labels()
    title = "Curves on the left: weight ensembles with the base model (WiSE-FT)"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rows), fontsize=9, title=title, title_fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

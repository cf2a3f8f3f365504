"""The README's loops run as they stand, its commands are real, its size is bounded; tables and numbers of docs/ are what was recorded."""

import importlib.util
import json
import re
from pathlib import Path

import contract
import open_clip
import torch
import torch.nn.functional as F

from geomreg import Embeddings, regularizers
from geomreg.integrations.open_clip import embed

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_loop_runs_and_moves_model_and_mean():
    code, *_ = blocks("python")
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, output_dict=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def loader():
        return [(torch.randn(4, 3, 16, 16), torch.randint(1, 63, (4, 8))) for _ in range(3)]

    def task_loss(model, batch):
        output = model(*batch)
        logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
        return F.cross_entropy(logits, torch.arange(4))

    names = {
        "model": model,
        "task_loss": task_loss,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "target_loader": loader(),
        "reference_loader": loader(),
    }
    exec(compile(code, str(README), "exec"), names)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, value in names["teacher"].model.state_dict().items():
        assert torch.equal(value, before[key])
    assert names["keep"].regularizers["dive"].mean.shape == (24,)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_lean_loop_is_the_plain_one(tmp_path, monkeypatch):
    """The weights after the README's cheap loop are those of its first loop."""
    monkeypatch.chdir(tmp_path)
    ends = []
    for number in (0, 2):
        torch.manual_seed(0)
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
        model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, output_dict=True)
        generator = torch.Generator().manual_seed(1)
        data = [
            {"id": k, "image": torch.randn(3, 16, 16, generator=generator), "text": torch.randint(1, 63, (8,), generator=generator)}
            for k in range(200)
        ]

        def encode(model, batch):
            return embed(model, batch["image"], batch["text"])

        def task_loss(model, batch):
            image, text = encode(model, batch)
            return F.cross_entropy(10 * image @ text.T, torch.arange(len(image)))

        names = {
            "model": model,
            "encode": encode,
            "task_loss": task_loss,
            "reference_data": data[100:],
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "target_loader": torch.utils.data.DataLoader(data[:100], batch_size=20),
            "reference_loader": torch.utils.data.DataLoader(data[100:], batch_size=70),
        }
        code = blocks("python")[number]
        if number == 0:
            code = code.split("\n\n\n")[0] + "\n" + code[code.index("teacher = ") :]  # with this encode
        exec(compile(code, str(README), "exec"), names)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_monitored_loop_stops_when_the_probe_falls():
    drift, embedded = [], []

    def embed_probe():
        image = torch.eye(4, 8)[torch.arange(40) % 4]
        image[: len(drift) // 400] = torch.eye(4, 8)[3]  # one more is wrong after each 400 steps
        return image, torch.eye(4, 8)

    def train_step(target, reference):
        drift.append(target)
        embedded.append(Embeddings(F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)))
        return embedded[-1], Embeddings(*(value + 0.01 for value in embedded[-1]))

    names = {"embed_probe": embed_probe, "labels": torch.arange(40) % 4, "train_step": train_step}
    names |= {"target_loader": range(1000), "reference_loader": range(1000), "print": lambda report: reports.append(report)}
    reports = []
    exec(compile(blocks("python")[1], str(README), "exec"), names)
    assert len(drift) == 400  # 2.5 points in 40
    assert reports[0]["probe/zero_shot_drop"] == 2.5
    assert {"image/rsa", "image/rsa_bound", "image/mean_shift"} <= reports[0].keys()


def test_table_of_costs_is_what_was_recorded():
    folder = README.parent / "benchmarks" / "step"
    spec = importlib.util.spec_from_file_location("table", folder / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in (DOCS / "cost.md").read_text(encoding="utf-8")
    short = [line for line in README.read_text(encoding="utf-8").splitlines() if line.count("|") == 6]
    assert len(short) > 4
    assert set(short) <= set(module.table().splitlines())
    quality = json.loads((folder / "results" / "quality.json").read_text(encoding="utf-8"))["variants"]
    means = {figure: [sum(run[figure] for run in one["runs"]) / 5 for one in list(quality.values())[1:]] for figure in ("id", "zero_shot")}
    text = " ".join((DOCS / "cost.md").read_text(encoding="utf-8").split())
    one, two, four, skipped = (f"{value:.1f}" for value in means["id"])
    assert f"ID is {one} with R = B, {two} with B/2, {four} with B/4 and {skipped} with every fourth step" in text
    assert "zero-shot {}, {}, {} and {}.".format(*(f"{value:.1f}" for value in means["zero_shot"])) in text
    cache = json.loads((folder / "results" / "cache.json").read_text(encoding="utf-8"))
    times = [f"{cache[key]['median_ms']:.0f} ms" for key in ("warm", "cold", "decode_jpeg")]
    assert f"opens in {cache['open']['seconds']:.2f} s. 512 random pairs take {times[0]}, and {times[1]} when" in text
    assert f"a decoder takes {times[2]} for as many JPEGs" in text


def test_speeds_are_what_was_recorded():
    folder = README.parent / "benchmarks"
    found = json.loads((folder / "rsa" / "results" / "rsa_cpu.json").read_text(encoding="utf-8"))["groups"][-1]
    assert found["samples"] == 10_000
    times = {row["name"]: row["times_less_cpu_than_scipy"] for row in found["rows"] if "times_less_cpu_than_scipy" in row}
    text = " ".join((DOCS / "cost.md").read_text(encoding="utf-8").split())
    cosine, euclidean = (f"{times[f'rsa pearson {name}']:.2g}" for name in ("cosine", "euclidean"))
    by_default, exact = (f"{times[f'rsa spearman cosine{name}']:.2g}" for name in ("", " exact"))
    assert f"{cosine} times for Pearson over cosine distances, {euclidean} times over Euclidean ones" in text
    assert f"{by_default} times for Spearman, and {exact} times for Spearman by sorting" in text
    rows = json.loads((folder / "monitor" / "results" / "monitor.json").read_text(encoding="utf-8"))["rows"]
    shares = {(row["model"], row["batch"]): f"{row['share_of_step']:.2%}".replace("%", " %") for row in rows}
    ours = [shares["EmojiCLIP", batch] for batch in (64, 128, 16)]
    assert f"{ours[0]} of a small CLIP's step of 64 pairs, {ours[1]} of 128, {ours[2]} of 16," in text
    assert f"{shares['ViT-B-32', 16]} of ViT-B-32's of 16" in text


def test_commands_are_the_ones_that_ci_runs():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands == ["pip install -e '.[quickstart]' && geomreg quickstart", "pip install -e '.[dev]' && pytest"]
    assert commands[1] in (README.parent / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_regularizer_has_a_row_that_says_what_its_declaration_says():
    rows = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (DOCS / "regularizers.md").read_text("utf-8").splitlines()
        if line.startswith("| `")
    }
    for name, term in contract.TERMS.items():
        assert rows[name][3] == contract.what_it_keeps(term), name
    for name, other in contract.OTHERS.items():
        assert rows[name][3] == other.compares, name
    public = {name for name in regularizers.__all__ if hasattr(getattr(regularizers, name), "forward")}
    assert public <= set(rows)


def test_size():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_links_lead_to_files():
    for page in (README, *DOCS.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"

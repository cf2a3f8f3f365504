"""The README's loop runs as it stands, its commands are real, and its size is bounded."""

import re
from pathlib import Path

import contract
import open_clip
import torch
import torch.nn.functional as F

from geomreg import regularizers

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_loop_runs_and_moves_model_and_mean():
    (code,) = blocks("python")
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


def test_commands_are_the_ones_that_ci_runs():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands == ["pip install -e '.[quickstart]' && geomreg quickstart", "pip install -e '.[dev]' && pytest"]
    assert commands[1] in (README.parent / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_regularizer_has_a_row_that_says_what_its_declaration_says():
    rows = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]]
        for line in README.read_text("utf-8").splitlines()
        if line.startswith("| `")
    }
    for name, term in contract.TERMS.items():
        assert rows[name][3] == contract.what_it_keeps(term), name
    for name, other in contract.OTHERS.items():
        assert rows[name][3] == other.compares, name
    public = {name for name in regularizers.__all__ if hasattr(getattr(regularizers, name), "forward")}
    assert public <= set(rows)


def test_size():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250

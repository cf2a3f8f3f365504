"""``geomreg ensemble``: the weights are those between, and open_clip loads them."""

import open_clip
import pytest
import torch

from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.models import load


@pytest.fixture
def finetuned(tmp_path):
    """EmojiCLIP with every weight moved by one."""
    loaded = load(str(model_folder()))
    with torch.no_grad():
        for value in loaded.model.parameters():
            value.add_(1.0)
    return to_open_clip(loaded.model, loaded.config, tmp_path / "finetuned")


def parameters(folder):
    return dict(open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].named_parameters())


def test_weights_between(finetuned, tmp_path, capsys):
    arguments = ["--base", str(model_folder()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    assert main(["ensemble", *arguments, "--alpha", "[0.25, 0.75, 1.0]"]) == 0
    start = parameters(model_folder())
    for alpha in (0.25, 0.75, 1.0):
        for key, value in parameters(tmp_path / "out" / f"alpha-{alpha:.2f}").items():
            torch.testing.assert_close(value, start[key] + alpha, rtol=1e-5, atol=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_mistakes(finetuned, tmp_path, capsys):
    arguments = ["--base", str(model_folder()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    assert main(["ensemble", *arguments, "--alpha", "[1.5]"]) == 2
    assert "expected alpha between 0 and 1, got 1.5" in capsys.readouterr().err
    assert main(["ensemble", *arguments[:2], "--finetuned", str(tmp_path / "absent"), *arguments[4:]]) == 2
    assert not (tmp_path / "out").exists()

"""``geomreg ensemble``: the weights are those between, and open_clip loads them."""

import re
import shutil

import open_clip
import pytest
import torch
from small import small_clip

from geomreg.integrations.recipes import ensemble as module
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.models import load


@pytest.fixture
def finetuned(tmp_path):
    """EmojiCLIP with every weight moved by one."""
    loaded = load(str(small_clip()))
    with torch.no_grad():
        for value in loaded.model.parameters():
            value.add_(1.0)
    return to_open_clip(loaded.model, loaded.config, tmp_path / "finetuned")


def parameters(folder):
    return dict(open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].named_parameters())


def test_weights_between(finetuned, tmp_path, capsys):
    arguments = ["--base", str(small_clip()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    assert main(["ensemble", *arguments, "--alpha", "[0.25, 0.75, 1.0]"]) == 0
    start = parameters(small_clip())
    for alpha in (0.25, 0.75, 1.0):
        for key, value in parameters(tmp_path / "out" / f"alpha-{alpha:.2f}").items():
            torch.testing.assert_close(value, start[key] + alpha, rtol=1e-5, atol=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_mistakes(finetuned, tmp_path, capsys):
    arguments = ["--base", str(small_clip()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    assert main(["ensemble", *arguments, "--alpha", "[1.5]"]) == 2
    assert "expected alpha between 0 and 1, got 1.5" in capsys.readouterr().err
    assert main(["ensemble", *arguments[:2], "--finetuned", str(tmp_path / "absent"), *arguments[4:]]) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "run").mkdir()
    shutil.copytree(finetuned, tmp_path / "run" / "model")
    assert main(["ensemble", *arguments[:2], "--finetuned", str(tmp_path / "run"), *arguments[4:]]) == 2
    assert f"expected the folder of a model, got that of a run, {tmp_path}/run. Pass {tmp_path}/run/model." in capsys.readouterr().err


def test_folders_of_different_shares_differ(finetuned, tmp_path):
    arguments = ["--base", str(small_clip()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    for alpha in ("[0.001,0.002,0.125]", "0.5", "1"):
        assert main(["ensemble", *arguments, "--alpha", alpha]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"alpha-0.001", "alpha-0.002", "alpha-0.125", "alpha-0.50", "alpha-1.00"}


def test_a_damaged_head_is_one_line(finetuned, tmp_path, capsys):
    (finetuned / "head.safetensors").write_bytes(b"half")
    arguments = ["--base", str(small_clip()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    assert main(["ensemble", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"geomreg: load_head: expected a head in \S*/head\.safetensors, got a damaged file \(.*\n", error)


def test_no_model_is_lost_without_asking(finetuned, tmp_path, capsys, monkeypatch):
    """It refuses before anything is loaded, and writes none of several shares of which one is there."""
    arguments = ["ensemble", "--base", str(small_clip()), "--finetuned", str(finetuned), "--output", str(tmp_path / "out")]
    (tmp_path / "out" / "alpha-0.25").mkdir(parents=True)  # empty: nothing to lose
    assert main([*arguments, "--alpha", "0.25"]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for alpha in ("0.25", "[0.75, 0.25]"):
        with monkeypatch.context() as patched:
            patched.setattr(module, "load", None)
            assert main([*arguments, "--alpha", alpha]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"geomreg: ensemble: expected no model in {tmp_path}/out/alpha-0.25, got one. Pass --overwrite true to replace it, or another "
            "output."
        )
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    with torch.no_grad():
        loaded = load(str(finetuned))
        for value in loaded.model.parameters():
            value.add_(1.0)
    to_open_clip(loaded.model, loaded.config, finetuned)
    assert main([*arguments, "--alpha", "0.25", "--overwrite", "true"]) == 0
    assert (tmp_path / "out" / "alpha-0.25" / "open_clip_model.safetensors").read_bytes() not in files.values()

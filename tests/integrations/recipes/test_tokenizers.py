"""Tokenizers of Hugging Face travel with the model, and are missed when a model is loaded, not after training."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_export import KINDS, TEXTS, folder_of

from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.ensemble import EnsembleOptions, ensemble
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.tokenizers import load_tokenizer


def test_missing_files_are_missed_at_the_start(tmp_path, capsys):
    folder = folder_of(tmp_path / "model", KINDS["siglip"])
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected the files of the tokenizer somebody/words for local-dir:.*got none.*save_pretrained"):
        load(str(folder))
    run = ["finetune", "--model.name", str(folder), "--target.kind", "csv", "--target.path", "pairs.csv", "--train.steps", "1"]
    assert main([*run, "--output", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_files(tmp_path):
    folder = folder_of(tmp_path / "model", KINDS["siglip"])
    file = folder / "tokenizer.json"
    content = file.read_text()
    file.write_text(content[:100])
    with pytest.raises(ValueError, match="expected the files of the tokenizer somebody/words"):
        load(str(folder))
    foreign = json.loads(content)
    foreign["model"]["vocab"] |= {"photo": 1_000}
    file.write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=r"a tokenizer with the id 1000 for a vocabulary of \d+"):
        load(str(folder))


def test_a_tokenizer_out_of_reach(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://somewhere'\nto load the files")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"tokenizer timm/ViT-B-16-SigLIP for ViT-B-16-SigLIP, got none .*Fetch them once") as caught:
        load_tokenizer("ViT-B-16-SigLIP", {"text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["siglip", "hf_text"])
def test_ensembles_have_their_tokenizer(tmp_path, kind):
    folder = folder_of(tmp_path / "model", KINDS[kind])
    (mixture,) = ensemble(EnsembleOptions(str(folder), folder, tmp_path / "ensembles"))
    found, expected = load(str(mixture)), load(str(folder))
    assert found.tokenizer(TEXTS).tolist() == expected.tokenizer(TEXTS).tolist()
    assert found.config == {**expected.config, "preprocess_cfg": found.config["preprocess_cfg"]}
    assert (Path(mixture) / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_keeps_the_tokenizer(tmp_path):
    """From its configuration to the mixture with the model at the start."""
    folder = folder_of(tmp_path / "model", KINDS["siglip"])
    rows = ["filepath,title"]
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'a photo of a red fox' if number % 2 else 'two boats on a lake'}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    run = ["finetune", "--model.name", str(folder), "--target.kind", "csv", "--target.path", str(tmp_path / "pairs.csv")]
    train = ["--train.steps", "2", "--train.batch_size", "4", "--train.warmup_steps", "1", "--train.workers", "0", "--device", "cpu"]
    assert main([*run, *train, "--output", str(tmp_path / "run")]) == 0
    expected = load(str(folder))
    for name in ("model", "ensemble/alpha-0.50"):
        found = load(str(tmp_path / "run" / name))
        assert found.tokenizer(TEXTS).tolist() == expected.tokenizer(TEXTS).tolist()
        assert found.config["preprocess_cfg"] == expected.config["preprocess_cfg"]


@pytest.mark.slow
def test_what_transformers_lacks_is_refused_before_a_run(tmp_path, capsys):
    folder = folder_of(tmp_path / "model", KINDS["rectangular"])
    (tmp_path / "pairs.csv").write_text("filepath,title\n0.png,a red fox\n")
    run = ["finetune", "--model.name", str(folder), "--target.kind", "csv", "--target.path", str(tmp_path / "pairs.csv")]
    options = ["--train.steps", "1", "--train.warmup_steps", "0", "--device", "cpu", "--transformers", "true"]
    assert main([*run, *options, "--output", str(tmp_path / "run")]) == 2
    assert "got images of 32 x 48 pixels, which CLIPModel does not take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Weights from a file are preprocessed as they were trained with, or the file is refused; TorchScript and impossible configurations too."""

import json

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image

from geomreg.integrations.recipes import models
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.preprocess import FIELDS, Preprocess, preprocess_of_file

CLIP = list(open_clip.OPENAI_DATASET_MEAN)
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 1}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TINY = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
KNOWN = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize("name", [name for name in open_clip.list_models() if open_clip.list_pretrained_tags_by_model(name)])
def test_what_all_tags_agree_on_is_taken(name):
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    values = {key: [tag.get(key) or getattr(PreprocessCfg(), key) for tag in tags] for key in FIELDS}
    agreed = {key for key, found in values.items() if all(one == found[0] for one in found)}
    if agreed == set(FIELDS):
        assert preprocess_of_file(name, "w.pt", {}) == {key: found[0] for key, found in values.items()}
        return
    differing = [key for key in FIELDS if key not in agreed]
    with pytest.raises(
        ValueError, match=rf"for {name}, whose pre-trained weights differ in {differing[0]} .*--model.preprocess.{differing[0]}"
    ):
        preprocess_of_file(name, "w.pt", {})
    stated = {key: values[key][-1] for key in differing}
    assert preprocess_of_file(name, "w.pt", stated) == {key: values[key][-1] for key in FIELDS}


def test_tags_disagree_somewhere():
    for name, field in (("ViT-L-14", "mean"), ("ViT-H-14", "resize_mode")):
        with pytest.raises(ValueError, match=field):
            preprocess_of_file(name, "w.pt", {})


def test_a_model_without_tags():
    with pytest.raises(ValueError, match=r"for ViT-S-32, which has no pre-trained .* --model.preprocess.mean '\[0.5,0.5,0.5\]'") as caught:
        preprocess_of_file("ViT-S-32", "w.pt", {})
    assert str(CLIP) in str(caught.value)
    assert "fill_color" not in str(caught.value)
    stated = Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), interpolation="bicubic", resize_mode="squash").stated()
    assert preprocess_of_file("ViT-S-32", "w.pt", stated) == {**stated, "fill_color": 0}


@pytest.mark.parametrize("stated", [None, Preprocess(mean=(0.1, 0.2, 0.3), resize_mode="longest", fill_color=255)])
def test_load_uses_it(tmp_path, monkeypatch, stated):
    """Of a small model under the name of another, whose weights have mean 0."""
    name = "MobileCLIP-S1"
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**TINY).state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda _: json.loads(json.dumps(TINY)))
    found = load(name, str(tmp_path / "weights.pt"), preprocess=stated)
    expected = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "resize_mode": "shortest", "fill_color": 0}
    expected |= {} if stated is None else stated.stated()
    for key, value in expected.items():
        assert found.config["preprocess_cfg"][key] == value
    for transform in (found.transform, found.train_transform):
        assert f"Normalize(mean={expected['mean']}, std=(1.0, 1.0, 1.0))" in repr(transform)
    padded = found.transform(Image.new("RGB", (32, 8)))  # black
    assert (padded[0, 0, 0] > padded[0, 16, 16]) == (stated is not None)
    assert "bilinear" in repr(found.transform).lower()


def test_options_of_the_commands(tmp_path, capsys, monkeypatch):
    seen = []

    def noted(*_, preprocess=None, **__):
        seen.append(preprocess)
        raise ValueError("seen")

    monkeypatch.setattr("geomreg.integrations.recipes.embed.load", noted)
    monkeypatch.setattr("geomreg.integrations.recipes.finetune.load", noted)
    (tmp_path / "pairs.csv").write_text("filepath,title\n")
    given = ("mean", "[0.5,0.5,0.5]")
    common = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["embed", "--model", "m", "--data", str(tmp_path / "pairs.csv"), f"--preprocess.{given[0]}", given[1], *common]) == 2
    run = ["finetune", "--model.name", "m", "--target.kind", "csv", "--target.path", str(tmp_path / "pairs.csv"), "--train.steps", "1"]
    assert main([*run, f"--model.preprocess.{given[0]}", given[1], "--train.warmup_steps", "0", *common]) == 2
    assert capsys.readouterr().err == "geomreg: seen\n" * 2
    assert seen == [Preprocess(mean=(0.5, 0.5, 0.5))] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"std": (0.5, 0.0, 0.5)}, "std"), ({"fill_color": 256}, "expected fill_color from 0 to 255, got 256")],
)
def test_impossible_preprocessing(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


# files and folders that cannot be loaded


def test_torchscript(tmp_path):
    file = tmp_path / "clip.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    with pytest.raises(ValueError, match=r"got the TorchScript archive .*clip.pt. Convert it: state = (.*); torch.save\(.*\)\.$") as caught:
        load("ViT-B-32", str(file))
    line = str(caught.value).partition("Convert it: ")[2].removesuffix(".").replace("weights.pt", str(tmp_path / "weights.pt"))
    exec(line, {"torch": torch})
    assert torch.load(tmp_path / "weights.pt").keys() == {"weight", "bias"}
    models._refuse_torchscript(tmp_path / "weights.pt")  # as all files of torch.save a zip archive


def written(folder, content, state=None):
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**TINY).state_dict() if state is None else state, folder / "open_clip_pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1, 2]", "with model_cfg in .*, got "),
        ({"model_cfg": {**TINY, "vision_cfg": 3}, "preprocess_cfg": KNOWN}, "got int where a mapping should be"),
        ({"model_cfg": {"embed_dim": 3}, "preprocess_cfg": KNOWN}, "got no 'vision_cfg'"),
        ({"model_cfg": {**TINY, "embed_dim": "many"}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": {**TINY, "embed_dim": -3}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": {**TINY, "embed_dim": 8}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": {**TINY, "surprise": 8}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": {**TINY, "vision_cfg": {**VISION, "patch_size": 0}}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": {**TINY, "text_cfg": {**TEXT, "heads": 3}}, "preprocess_cfg": KNOWN}, "a model that open_clip can build"),
        ({"model_cfg": TINY}, "with mean and std in .*, got no mean and no std.*--model.preprocess.mean"),
        ({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3}}, "got no std"),
    ],
)
def test_impossible_configurations(tmp_path, config, message):
    with pytest.raises(ValueError, match=rf"(?s)^load: expected .*{message}") as caught:
        load(written(tmp_path / "model", config))
    assert "open_clip_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_preprocessing_and_a_stated_one(tmp_path):
    stated = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    found = load(written(tmp_path / "model", {"model_cfg": TINY}), preprocess=stated)
    assert found.config["preprocess_cfg"]["mean"] == (0.1, 0.2, 0.3)


def test_weights_of_another_model(tmp_path, monkeypatch):
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda _: json.loads(json.dumps(TINY)))
    file = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2)}, file)
    with pytest.raises(
        RuntimeError, match=r"load: expected weights that fit RN50 in .*weights.pt, got RuntimeError .*copy the file"
    ) as caught:
        load("RN50", str(file))
    assert "\n" not in str(caught.value)
    file.write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match=r"load: expected whole weights of .*weights.pt, got a damaged file"):
        load("RN50", str(file))

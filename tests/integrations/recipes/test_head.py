"""A trained head: how its file is used without geomreg, as its module says."""

import re
import textwrap

import numpy as np
import torch
from PIL import Image

from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes import head as module
from geomreg.integrations.recipes.export import to_open_clip
from geomreg.integrations.recipes.head import load_head, zero_shot_classifier
from geomreg.integrations.recipes.models import load


def test_the_example_of_the_module(tmp_path, monkeypatch, capsys):
    """Against the class that the head itself gives a picture."""
    loaded = load(str(model_folder()))
    classes = ["owl", "größe", "fox"]
    start = zero_shot_classifier(loaded.model, loaded.tokenizer(classes)[None])
    trained = torch.nn.Linear(start.in_features, 3)
    to_open_clip(loaded.model, loaded.config, tmp_path / "runs" / "mine" / "model", head=(trained, start, classes))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    example = re.search(r"::\n\n((?:    .*\n|\n)+)", module.__doc__)[1]
    exec(textwrap.dedent(example), {})
    head, before, names = load_head(tmp_path / "runs" / "mine" / "model")
    with torch.no_grad():
        image = loaded.model.encode_image(loaded.transform(Image.open("picture.png"))[None], normalize=True)
        assert capsys.readouterr().out == f"{classes[head(image).argmax()]}\n"
    assert torch.equal(head.weight, trained.weight)
    assert torch.equal(before.weight, start.weight)
    assert names == classes

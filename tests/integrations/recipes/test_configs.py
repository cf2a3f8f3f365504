"""The configurations that come with geomreg: every data, model and method file composes, and runs at full size on fake tensors."""

import dataclasses
import itertools
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from open_clip.model import CLIP
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from geomreg.integrations.recipes import finetune as finetune_module
from geomreg.integrations.recipes import streams, train
from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.config import READERS
from geomreg.integrations.recipes.data import Captioned
from geomreg.integrations.recipes.finetune import _Run
from geomreg.integrations.recipes.models import Model

CONFIGS = Path(finetune_module.__file__).parent / "configs"
DATA, MODELS, METHODS = (sorted(path.stem for path in (CONFIGS / kind).iterdir()) for kind in ("data", "model", "method"))
ROWS = 600  # more than a batch


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The data sets' own layouts under ``data/``, images empty: nothing reads them."""
    root = tmp_path_factory.mktemp("disk") / "data"

    def images(folder, names):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()

    for part, wnid in itertools.product(("train", "val"), ("n01440764", "n01443537")):
        images(root / "imagenet" / part / wnid, [f"{row}.JPEG" for row in range(ROWS // 2)])
    for part, name in itertools.product(("train", "val"), ("owl", "red_fox")):
        images(root / "your-images" / part / name, [f"{row}.png" for row in range(ROWS // 2)])
    splits = ("train", "id_val", "id_test", "test")
    images(root / "iwildcam_v2.0" / "train", [f"{split}0.jpg" for split in splits])
    lines = [f"{split},{split}{row}.jpg,{row % 2},{row % 3}" for split in splits for row in range(ROWS)]
    (root / "iwildcam_v2.0" / "metadata.csv").write_text("\n".join(["split,filename,y,location_remapped", *lines]))
    (root / "iwildcam_v2.0" / "categories.csv").write_text("y,category_id,name\n0,1,empty\n1,2,panthera onca\n")
    years = [("train", 2010), ("val", 2010), ("test", 2010), ("test", 2017)]
    lines = [f"{split},zoo,USA,{year}-01-31T12:00:00Z" for split, year in years for _ in range(ROWS)]
    images(root / "fmow_v1.1" / "images", [f"rgb_img_{ROWS * k}.png" for k in range(4)])
    (root / "fmow_v1.1" / "rgb_metadata.csv").write_text("\n".join(["split,category,country_code,timestamp", *lines]))
    (root / "fmow_v1.1" / "country_code_mapping.csv").write_text("alpha-3,region\nUSA,Americas\n")
    images(root, ["0.png"])
    lines = [f"{row}.png\ta photo of number {row % 4}" for row in range(ROWS)]
    (root / "pairs.csv").write_text("\n".join(["filepath\ttitle", *lines]))
    for data in DATA:
        described = yaml.safe_load((CONFIGS / "data" / f"{data}.yaml").read_text())["target"]
        reader, options = READERS[described["kind"]], described.get("options", {})
        found = reader(
            root.parent / described["path"], transform=None, tokenizer=open_clip.get_tokenizer("ViT-B-16"), modalities=("text",), **options
        )
        (root / f"captions-{data}.csv").write_text("\n".join(["id\tcaption", *(f"{one}\tit is {one}" for one in found.ids)]))
    return root


@pytest.fixture
def compose(disk, monkeypatch):
    """The configuration that the command makes of three files, with what a method needs beside its file."""
    monkeypatch.chdir(disk.parent)
    captured = []

    def capture(config):
        """Instead of a run."""
        captured.append(config)

    monkeypatch.setattr(finetune_module, "finetune_from", capture)

    def composed(data, model, method, *further):
        described = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())["method"]
        arguments = [part for name in (f"data/{data}", f"model/{model}", f"method/{method}") for part in ("--config", name)]
        if described.get("terms"):
            arguments += ["--reference.kind", "csv", "--reference.path", "data/pairs.csv"]
        if described.get("caption_weight"):
            arguments += ["--target.captions", f"data/captions-{data}.csv"]
        arguments += ["--output", "run", "--device", "cpu", "--train.workers", "0", *further]
        assert main(["finetune", *arguments]) == 0
        return captured.pop()

    return composed


FEW = [(data, "zscl") for data in DATA] + [("imagenet", method) for method in METHODS]
REST = [pair for pair in itertools.product(DATA, METHODS) if pair not in FEW]


@pytest.mark.parametrize(("data", "method"), [*dict.fromkeys(FEW), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_every_composition(compose, data, method):
    """The files' values arrive, the method's where both have one."""
    for model in MODELS:
        config = compose(data, model, method)
        files = [
            yaml.safe_load((CONFIGS / kind).with_suffix(".yaml").read_text())
            for kind in (f"data/{data}", f"model/{model}", f"method/{method}")
        ]
        expected = {key: value for file in files for key, value in file.get("train", {}).items()}
        assert expected
        for key, value in expected.items():
            assert getattr(config.train, key) == value
        assert config.model.name == files[1]["model"]["name"]
        assert config.method.name == method


@contextmanager
def fake_tensors():
    """FakeTensorMode, and what it lacks for Teacher and accelerate: a copy of a fake model stays in this mode; storages are told apart by
    identity (the addresses are all 0)."""
    with (
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
        mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
        mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
        FakeTensorMode(),
    ):
        yield


def fake_model(name, pretrained, **_):
    """The architecture without its weights."""
    return Model(CLIP(**open_clip.get_model_config(name), output_dict=True).eval(), {}, repr, repr, open_clip.get_tokenizer(name))


def fake_batches(drawn, draws, *, workers):
    """Batches of the shapes that the loader would give."""
    dataset = drawn.dataset
    while True:
        batch = {"id": ["x"] * draws.batch_size, "broken": []}
        if "image" in dataset.modalities:
            batch["image"] = torch.zeros(draws.batch_size, 3, 224, 224)
        if "text" in dataset.modalities or drawn.texts is not None:
            batch["text"] = torch.zeros(draws.batch_size, 77, dtype=torch.long)
        if hasattr(dataset, "labels"):
            batch["label"] = torch.zeros(draws.batch_size, dtype=torch.long)
        if isinstance(getattr(dataset, "dataset", dataset), Captioned):
            batch["caption"] = torch.zeros(draws.batch_size, 77, dtype=torch.long)
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_every_composition_runs_at_full_size(compose, monkeypatch, data, method):
    """A step of every data and method file at ViT-B-16's size and the file's own batch, on fake tensors."""
    config = compose(data, "vit-b-16", method, "--train.epochs", "200")  # of the few samples here; a mean of weights needs some steps
    monkeypatch.setattr(finetune_module, "load", fake_model)
    monkeypatch.setattr(finetune_module, "digest_of_weights", lambda model: "no numbers")
    monkeypatch.setattr(finetune_module, "freeze_unreached", lambda loaded: [])
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda self: self)
    monkeypatch.setattr(finetune_module, "linear_probe", lambda model, dataset, start, *args, **options: start)
    monkeypatch.setattr(streams, "loader", fake_batches)
    monkeypatch.setattr(train, "_numbers", lambda record, accelerator: dict.fromkeys(record, 1.0))
    entries = []
    with fake_tensors():
        run = _Run(config, Accelerator(cpu=True))
        run.train(dataclasses.replace(run.settings, steps=1, average_every=None), on_step=entries.append)
    assert entries[0].keys() >= {"loss", *config.method.terms, *config.method.target_terms}

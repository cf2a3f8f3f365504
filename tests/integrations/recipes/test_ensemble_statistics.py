"""Mixed weights have running statistics of their own: those of a pass over training data with the mixture, as one computes them by hand."""

import dataclasses
import shutil
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_first_step import _new_accelerate_state, data_of_kind, model_of, run_of  # noqa: F401

from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.config import TrainConfig
from geomreg.integrations.recipes.data import collate
from geomreg.integrations.recipes.finetune import finetune_from
from geomreg.integrations.recipes.models import load
from geomreg.integrations.recipes.streams import Stream, read

WEIGHTS = "open_clip_model.safetensors"


def by_hand(folder, batches):
    """The statistics of a direct pass over the batches, the means of each batch's."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for batch in batches:
            model.encode_image(batch["image"])
    return model.state_dict()


def is_statistic(key):
    return "running" in key


def assert_mixture(folder, ends, alpha, batches):
    found, expected = load_file(folder / WEIGHTS), by_hand(folder, batches)
    assert any(map(is_statistic, found))
    for key, value in found.items():
        mean = torch.lerp(ends[0][key].double(), ends[1][key].double(), alpha)
        if is_statistic(key):
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
        elif value.is_floating_point():
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6, msg=key)
    far = [
        key for key in found if is_statistic(key) and not torch.allclose(found[key], torch.lerp(ends[0][key], ends[1][key], alpha), 0.05)
    ]
    assert far  # their mean would be another model's


@pytest.mark.parametrize("average_every", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_at_the_end_of_a_run(tmp_path, average_every):
    config = run_of(tmp_path, "csv", "batch_norm", "frozen")
    train = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=1, workers=0, average_every=average_every)
    config = dataclasses.replace(config, train=train, ensemble=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*running statistics")
        finetune_from(config)
    loaded = load(config.model.name)
    options = {"size": 4, "seed": train.seed, "transform": loaded.train_transform, "modalities": ("image", "text"), "workers": 0}
    batches = [batch for batch, _ in zip(Stream(config.target, loaded, None, **options).batches(0), range(4), strict=False)]
    ends = [load_file(folder / WEIGHTS) for folder in (tmp_path / "base", tmp_path / "run" / "model")]
    assert_mixture(tmp_path / "run" / "ensemble" / "alpha-0.50", ends, 0.5, batches)


@pytest.fixture
def moved(tmp_path):
    """A small ResNet and another with other weights and statistics."""
    base = model_of(tmp_path / "base", "batch_norm")
    content = load_file(base / WEIGHTS)
    torch.manual_seed(0)
    other = {key: value.abs() + 1 for key, value in content.items() if is_statistic(key)}
    for key, value in content.items():
        if value.is_floating_point() and key not in other:
            other[key] = value + 0.1 * value.abs().mean() * torch.randn(value.shape)
    shutil.copytree(base, tmp_path / "tuned")
    save_file({**content, **other}, tmp_path / "tuned" / WEIGHTS)
    return base, tmp_path / "tuned"


def arguments(moved, out, *more):
    return ["ensemble", "--base", str(moved[0]), "--finetuned", str(moved[1]), "--output", str(out), "--device", "cpu", *more]


@pytest.mark.parametrize("kind", ["csv", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "tar"))])
def test_of_the_command(moved, tmp_path, kind, capsys):
    data = data_of_kind(tmp_path / "data", kind)
    given = ["--data.kind", kind, "--data.path", data.path, "--batch_size", "8", "--workers", "0", "--alpha", "[0.25, 0.5, 1.0]"]
    assert main(arguments(moved, tmp_path / "out", *given)) == 0
    assert not capsys.readouterr().err
    ends = [load_file(folder / WEIGHTS) for folder in moved]
    loaded = load(str(moved[1]))
    dataset = read(data, loaded, transform=loaded.transform, modalities=("image",))
    batches = [collate([dataset[row] for row in range(8)])]
    for alpha in (0.25, 0.5):
        assert_mixture(tmp_path / "out" / f"alpha-{alpha:.2f}", ends, alpha, batches)
    whole = load_file(tmp_path / "out" / "alpha-1.00" / WEIGHTS)
    assert all(torch.equal(value, whole[key]) for key, value in ends[1].items())


def test_without_data_it_is_refused(moved, tmp_path, capsys):
    assert main(arguments(moved, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "geomreg: ensemble: expected data to collect running statistics of batch normalisations from, which mixed weights"
    )
    assert "got none for 'visual.bn1.running_" in line
    assert "Pass --data.kind and --data.path of training data." in line
    assert not (tmp_path / "out").exists()
    assert main(arguments(moved, tmp_path / "out", "--data.kind", "random_texts")) == 2
    assert "expected data as files, got kind random_texts" in capsys.readouterr().err
    assert main(arguments(moved, tmp_path / "out", "--alpha", "[0.0, 1.0]")) == 0
    ends = [load_file(folder / WEIGHTS) for folder in moved]
    ends[1] |= {key: value for key, value in ends[0].items() if is_statistic(key)}
    save_file(ends[1], moved[1] / WEIGHTS)  # frozen in training: both models' own
    assert main(arguments(moved, tmp_path / "same")) == 0
    mixed = load_file(tmp_path / "same" / "alpha-0.50" / WEIGHTS)
    assert all(torch.equal(mixed[key], ends[0][key]) for key in mixed if is_statistic(key))

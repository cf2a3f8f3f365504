"""Cut-outs, lying photographs and 16-bit pictures in whole runs: seen alike everywhere, counted, recorded, and compared."""

import dataclasses
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from small import small_clip

from geomreg.integrations.recipes.cli import main
from geomreg.integrations.recipes.config import Config, DataConfig, MethodConfig, MonitorConfig, TermConfig, TrainConfig
from geomreg.integrations.recipes.data import ImageConfig
from geomreg.integrations.recipes.data.images import load_rgb
from geomreg.integrations.recipes.embed import Options, embed_data
from geomreg.integrations.recipes.finetune import finetune_from
from geomreg.integrations.recipes.models import ModelConfig, load
from geomreg.integrations.recipes.records import check_folder

DIVE = MethodConfig("dive", {"dive": TermConfig("DiVE", 300.0)})
PROBE = MethodConfig("lp-ft", loss="classification", head="linear_probe")
OPEN_CLIP = ImageConfig(loader="open_clip")
ROWS = 24
SAID = (
    "6 of 24 pictures had transparency and were blended on white, 4 were turned upright by their orientation in EXIF, "
    "2 had more than 8 bits of grey and were scaled to 8"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A shop's folder of pictures, and the same pictures as plain files, by name and by class."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for row in range(ROWS):
        file = folder / "shop" / ("owl", "red_fox")[row % 2] / f"{row:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values, turned = generator.integers(0, 256, (60, 50, 3), dtype=np.uint8), Image.Exif()
        if row < 6:
            alpha = np.full((60, 50, 1), 255, np.uint8)
            alpha[:20], values[:20] = 0, 0
            values = np.concatenate([values, alpha], axis=2)
        elif row < 10:
            turned[0x112] = 3 + row % 6
        elif row < 12:
            values = values[..., 0].astype(np.uint16) * 200
        Image.fromarray(values).save(file, exif=turned)
        plain = folder / "plain" / file.parent.name / file.name
        plain.parent.mkdir(parents=True, exist_ok=True)
        load_rgb(str(file)).save(plain)
    for kind in ("shop", "plain"):
        paths = sorted((folder / kind).rglob("*.png"))
        lines = ["filepath,title", *(f"{path.relative_to(folder / kind)},picture {row}" for row, path in enumerate(paths))]
        (folder / kind / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    """accelerate keeps one state, and its precision, for the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def config(folder, output, *, method=DIVE, images=None, probe=False, workers=0, steps=6, **others):
    train = TrainConfig(steps=steps, batch_size=8, learning_rate=1e-4, warmup_steps=1, workers=workers, save_every=3)
    pairs, classes = DataConfig("csv", str(folder / "pairs.csv")), DataConfig("folder", str(folder))
    more = {"probe": classes, "monitor": MonitorConfig(every=3)} if probe else {}
    images = {} if images is None else {"images": images}
    target, reference = (pairs, pairs) if method.terms else (classes, None)
    return Config(ModelConfig(str(small_clip())), target, train, output, method, reference, device="cpu", **{**more, **images, **others})


def weights(folder):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


@pytest.mark.slow
@pytest.mark.parametrize("method", [DIVE, PROBE], ids=["pairs", "probe"])
def test_every_part_of_a_run_sees_what_a_viewer_shows(data, tmp_path, capsys, method):
    """A run on such files is, number for number, that on plain files with the pixels that a viewer shows."""
    outputs = {}
    for kind in ("shop", "plain"):
        evaluation = {"evaluation": {"animals": DataConfig("folder", str(data / kind))}}
        out = finetune_from(config(data / kind, tmp_path / kind, method=method, probe=True, **evaluation))
        logs = [(tmp_path / kind / name).read_text() for name in ("metrics.jsonl", "evaluation.jsonl", "drift.jsonl")]
        logs[0] = re.sub(r'"(seconds|[a-z_]*per_second|time)": [^,}]*', "", logs[0])
        outputs[kind] = (weights(out), logs, capsys.readouterr().out)
    (one, logs, said), (other, expected, silent) = outputs["shop"], outputs["plain"]
    assert torch.equal(one, other)
    assert logs[1:] == expected[1:]
    for name in ("target", "evaluation.animals", "probe", *(["reference"] if method.terms else [])):
        assert f"{name}: {SAID}\n" in said
    assert "pictures" not in silent


@pytest.mark.slow
def test_open_clips_loader_sees_otherwise(data, tmp_path, capsys):
    out = [finetune_from(config(data / "shop", tmp_path / str(k), images=images)) for k, images in enumerate((None, OPEN_CLIP))]
    assert not torch.equal(*map(weights, out))
    assert capsys.readouterr().out.count("pictures had") == 2  # of target and reference, in the first


@pytest.mark.slow
def test_exports_say_how_images_were_read(data, tmp_path, capsys):
    method = MethodConfig("head", loss="classification")
    finetune_from(config(data / "shop", tmp_path / "run", method=method, images=ImageConfig(background="#102030"), steps=3, ensemble=0.5))
    assert f"target: {SAID.replace('white', '#102030')}\n" in capsys.readouterr().out
    for folder in ("model", "ensemble/alpha-0.50"):
        exported = tmp_path / "run" / folder
        assert json.loads((exported / "open_clip_config.json").read_text())["images"]["background"] == "#102030"
        assert load(str(exported)).transform.images == ImageConfig(background="#102030")
        weights(exported)  # open_clip loads it


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_dry_run(data, tmp_path, capsys, workers):
    evaluation = {"animals": DataConfig("folder", str(data / "shop"))}
    finetune_from(config(data / "shop", tmp_path / "run", dry_run=True, evaluation=evaluation, workers=workers))
    said = capsys.readouterr().out
    for name in ("target", "reference", "evaluation.animals"):
        assert f"{name}: {SAID}\n" in said
    assert not (tmp_path / "run").exists()


def embedded(data, output, **others):
    options = {"model": str(small_clip()), "data": data / "shop" / "pairs.csv", "device": "cpu", "workers": 0, "check": 0}
    embed_data(Options(output=output, **options, **others))
    return dataclasses.replace(DIVE, teacher="cached", cache=output)


def test_a_cache_of_other_options_is_refused(data, tmp_path, capsys):
    method = embedded(data, tmp_path / "cache")
    assert f"{SAID}\n" in capsys.readouterr().out
    for images in (OPEN_CLIP, ImageConfig(background="black")):
        with pytest.raises(ValueError, match=r"expected the image table of .* to be built with preprocessing"):
            finetune_from(config(data / "shop", tmp_path / "refused", method=method, images=images))
        assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", [ImageConfig(), OPEN_CLIP], ids=["geomreg", "open_clip"])
def test_a_cached_teacher_sees_what_the_student_sees(data, tmp_path, images):
    method = embedded(data, tmp_path / "cache", images=images)
    finetune_from(config(data / "shop", tmp_path / "run", method=method, images=images))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["dive"] < 1e-6


def test_a_run_goes_on_with_its_options_alone(data, tmp_path):
    before, file = config(data / "shop", tmp_path), tmp_path / "config.json"
    written = json.loads(json.dumps(dataclasses.asdict(before), default=str))
    del written["dry_run"]
    file.write_text(json.dumps(written))
    check_folder(before)
    with pytest.raises(ValueError, match=r"to go on with images\.background 'white', got 'black'"):
        check_folder(dataclasses.replace(before, images=ImageConfig(background="black")))
    del written["images"]  # as versions without these options left it, which read as open_clip does
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"to go on with images\.loader 'open_clip', got 'geomreg'"):
        check_folder(before)
    check_folder(dataclasses.replace(before, images=OPEN_CLIP))


def test_the_models_own_color(data, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in small_clip().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    written = json.loads((model / "open_clip_config.json").read_text())
    written["preprocess_cfg"]["fill_color"] = 127
    (model / "open_clip_config.json").write_text(json.dumps(written))
    arguments = ["--model", str(model), "--data", str(data / "shop"), "--output", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(["embed", *arguments, "--workers", "0", "--images.background", "model"]) == 0
    assert "6 of 24 pictures had transparency and were blended on #7f7f7f" in capsys.readouterr().out


def test_mistakes_are_one_line(data, tmp_path, capsys):
    arguments = ["--model", "emojiclip", "--data", str(data / "shop"), "--output", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(["embed", *arguments, "--images.background", "whit"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected background as a colour" in error

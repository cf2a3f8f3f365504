"""Where student and teacher are equal, at the first step, every separable term is 0: whatever data, model and teacher; or it is refused."""

import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from geomreg.integrations.recipes.config import READERS, Config, DataConfig, MethodConfig, TermConfig, TrainConfig
from geomreg.integrations.recipes.embed import Options, embed_data
from geomreg.integrations.recipes.finetune import finetune_from
from geomreg.integrations.recipes.models import Lora, ModelConfig

VISION = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
DROP_PATH = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear"}
MODELS = {
    "plain": {},
    "custom_text": {"custom_text": True},
    "logit_bias": {"init_logit_bias": -10.0, "custom_text": True},
    "patch_dropout": {"vision_cfg": {**VISION, "patch_dropout": 0.5}},
    "drop_path": {"vision_cfg": {**DROP_PATH, "image_size": 224, "timm_drop_path": 0.5}},
    "batch_norm": {"vision_cfg": RESNET},
}
TEACHERS = ("frozen", "adapters_off", "averaged", "cached")
TWO = ("a photo of a {}.", "an old drawing of many {}, seen from far away.")
TERMS = {  # distances of a student from its teacher
    "dive": TermConfig("DiVE", 1.0),
    "avl": TermConfig("AverageVectorLoss", 1.0),
    "distillation": TermConfig("FeatureDistillation", 1.0),
}
TEXT_TERMS = {"pvl": TermConfig("FeatureDistillation", 1.0)}
ROWS = 8


@pytest.fixture(autouse=True)
def _new_accelerate_state():
    """accelerate keeps one state for the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def model_of(folder, name):
    folder.mkdir()
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    described = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text, **MODELS[name]}
    seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": seen}))
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def picture(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(row).integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return path


def data_of_kind(folder, kind):
    """Eight pictures, as each reader takes them."""
    options = {}
    if kind in ("folder", "imagenet"):
        names = ("owl", "red_fox") if kind == "folder" else ("n01440764", "n01443537")
        for row in range(ROWS):
            picture(folder / names[row % 2] / f"{row}.png", row)
        return DataConfig(kind, str(folder), {"templates": TWO})
    if kind == "tar":
        (folder / "caption").parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for row in range(ROWS):
                (folder / "caption").write_text(f"picture number {row}")
                tar.add(picture(folder / "one.png", row), f"{row:04d}.png")
                tar.add(folder / "caption", f"{row:04d}.txt")
        return DataConfig(kind, str(folder / "*.tar"))
    if kind == "iwildcam":
        lines = [f"train,{row}.png,{row % 2},{row}" for row in range(ROWS)]
        [picture(folder / "train" / f"{row}.png", row) for row in range(ROWS)]
        (folder / "metadata.csv").write_text("\n".join(["split,filename,y,location_remapped", *lines]))
        (folder / "categories.csv").write_text("y,name\n0,owl\n1,fox\n")
        return DataConfig(kind, str(folder), {"split": "train"})
    if kind == "fmow":
        [picture(folder / "images" / f"rgb_img_{row}.png", row) for row in range(ROWS)]
        lines = [f"train,{('airport', 'zoo')[row % 2]},FRA,2010-01-01T00:00:00Z" for row in range(ROWS)]
        (folder / "rgb_metadata.csv").write_text("\n".join(["split,category,country_code,timestamp", *lines]))
        (folder / "country_code_mapping.csv").write_text("alpha-3,region\nFRA,Europe\n")
        return DataConfig(kind, str(folder), {"split": "train"})
    [picture(folder / f"{row}.png", row) for row in range(ROWS)]
    if kind == "coco":
        images = [{"id": row, "file_name": f"{row}.png"} for row in range(ROWS)]
        captions = [{"id": row, "image_id": row, "caption": f"picture number {row}"} for row in range(ROWS)]
        (folder / "pairs.json").write_text(json.dumps({"images": images, "annotations": captions}))
        return DataConfig(kind, str(folder / "pairs.json"), {"root": str(folder)})
    if kind == "flickr8k":
        (folder / "tokens.txt").write_text("".join(f"{row}.png#0\tpicture number {row}\n" for row in range(ROWS)))
        return DataConfig(kind, str(folder / "tokens.txt"), {"root": str(folder)})
    lines = [f"{row}.png,{row},picture number {row}" for row in range(ROWS)]
    (folder / "pairs.csv").write_text("\n".join(["filepath,id,title", *lines]))
    return DataConfig("csv", str(folder / "pairs.csv"), options)


def run_of(folder, kind="csv", model="plain", teacher="frozen", *, built=None):
    """The configuration of a run; its cache is of ``built``, by default of the reference itself."""
    loaded = model_of(folder / "base", model)
    target = data_of_kind(folder / "target", "folder" if kind == "target" else "csv")
    own = kind in ("target", "random_texts")
    reference = DataConfig(kind) if own else data_of_kind(folder / "reference", kind)
    cache = None
    if teacher == "cached":
        cache, source = folder / "cache", built or (target if own else reference)
        made = Options(str(loaded), Path(source.path), cache, kind=source.kind, options=source.options, workers=0, device="cpu")
        embed_data(made)
    method = MethodConfig("m", TEXT_TERMS if kind == "random_texts" else TERMS, teacher=teacher, cache=cache)
    lora = (
        {"lora": Lora(rank=2, layers=("c_fc", "fc1") if model == "drop_path" else ("c_fc",)), "logit_scale": "frozen"}
        if teacher == "adapters_off"
        else {}
    )
    train = TrainConfig(steps=1, batch_size=4, learning_rate=1e-9, warmup_steps=1, workers=0)
    return Config(
        ModelConfig(str(loaded), **lora), target, train, folder / "run", method, reference, device="cpu", ensemble=None
    )  # fmt: skip


def assert_starts_at_zero(config):
    finetune_from(config)
    first = json.loads((config.output / "metrics.jsonl").read_text().splitlines()[0])
    for name in config.method.terms:
        assert abs(first[name]) < 1e-7, (name, first[name])


def assert_refused(config, message):
    with pytest.raises(ValueError, match=message):
        finetune_from(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("kind", "model", "teacher"),
    [("folder", "plain", "cached"), ("target", "plain", "cached"), ("csv", "patch_dropout", "frozen")],
)
def test_terms_start_at_zero(tmp_path, kind, model, teacher):
    assert_starts_at_zero(run_of(tmp_path, kind, model, teacher))


def test_batch_normalisation_gathers_of_the_target_alone(tmp_path):
    finetune_from(run_of(tmp_path, "csv", "batch_norm"))
    counted = {int(value) for name, value in load_file(tmp_path / "run/model/open_clip_model.safetensors").items() if "num_batches" in name}
    assert counted == {1}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("model", [name for name in MODELS if name != "batch_norm"])
@pytest.mark.parametrize("kind", [*READERS, "target", "random_texts"])
def test_terms_start_at_zero_everywhere(tmp_path, kind, model, teacher):
    config = run_of(tmp_path, kind, model, teacher)
    if teacher == "cached" and kind == "random_texts":
        assert_refused(config, "expected texts that stay as they are for a cached teacher")
    else:
        assert_starts_at_zero(config)


def other_captions():
    lines = [f"{row}.png,{row},another thing {row}" for row in range(ROWS)]
    return "csv", lines, r"expected reference data with the texts .* that .* was built from, got others under the same ids"


def other_images():
    lines = [f"{(row + 1) % ROWS}.png,{row},picture number {row}" for row in range(ROWS)]
    return "csv", lines, "expected reference data with the images that .* was built from, got others under the same ids"


def of_more_samples():
    """Other captions in a cache whose ids are others too: its digest tells nothing, its rows do."""
    return "csv", [*other_captions()[1], "0.png,new,one more"], "expected the texts that .* was built from"


@pytest.mark.parametrize("difference", [other_captions, other_images, of_more_samples])
def test_caches_of_other_data_are_refused(tmp_path, difference):
    data_of_kind(tmp_path / "reference", "csv")
    kind, lines, message = difference()
    (tmp_path / "reference" / "other.csv").write_text("\n".join(["filepath,id,title", *lines]))
    assert_refused(run_of(tmp_path, "csv", "plain", "cached", built=DataConfig(kind, str(tmp_path / "reference" / "other.csv"))), message)


def test_caches_of_other_templates_are_refused(tmp_path):
    data_of_kind(tmp_path / "reference", "folder")
    built = DataConfig("folder", str(tmp_path / "reference"), {"templates": TWO[::-1]})
    assert_refused(run_of(tmp_path, "folder", "plain", "cached", built=built), "expected reference data with the texts")


def test_random_texts_have_no_cache(tmp_path):
    assert_refused(run_of(tmp_path, "random_texts", "plain", "cached"), "expected texts that stay as they are for a cached teacher")

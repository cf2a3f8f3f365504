"""Models as they are configured, and exports that others load."""

import copy
import dataclasses
import math
from pathlib import Path

import open_clip
import pytest
import torch

from geomreg import Teacher
from geomreg.integrations.open_clip import embed
from geomreg.integrations.quickstart.experiment import model_folder
from geomreg.integrations.recipes.data import ImageConfig
from geomreg.integrations.recipes.export import to_open_clip, to_transformers
from geomreg.integrations.recipes.models import Lora, Model, ModelConfig, clamp_logit_scale, freeze, freeze_unreached, load, merge_adapters
from geomreg.integrations.recipes.train import encode

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 12, "layers": 2},
        "text_cfg": {"context_length": 10, "vocab_size": 300, "width": 32, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
BATCH = {"image": torch.randn(4, 3, 32, 32), "text": torch.randint(1, 298, (4, 10))}
BATCH["text"][:, 6] = 299  # the end of each text
BATCH["text"][:, 7:] = 0


def model(**changes):
    torch.manual_seed(0)
    found = open_clip.CLIP(**{**CONFIG["model_cfg"], **changes}, output_dict=True)
    for value in found.parameters():
        torch.nn.init.normal_(value, std=0.1) if value.ndim else value.data.fill_(3.0)
    return found.eval()


def trained(found):
    return {name for name, value in found.named_parameters() if value.requires_grad}


# loading


def test_load_from_a_folder(tmp_path):
    one = model()
    to_open_clip(one, CONFIG, tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    assert not loaded.model.training
    assert loaded.config["images"] == dataclasses.asdict(ImageConfig())
    assert loaded.config["model_cfg"] == CONFIG["model_cfg"]
    known = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.config["preprocess_cfg"].items()} == {
        **known,
        "size": (32, 32),
        "mode": "RGB",
        "fill_color": 0,
    }
    for found, expected in zip(encode(loaded.model, BATCH), encode(one, BATCH), strict=True):
        assert torch.equal(found, expected)
    assert loaded.tokenizer(["a text"]).shape == (1, 10)
    with pytest.raises(ValueError, match="expected no pretrained weights beside the folder"):
        load(str(tmp_path / "model"), "openai")
    (tmp_path / "model" / "checksums.json").unlink()  # as in exports of older versions
    file = tmp_path / "model" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"load: expected whole weights of local-dir:.*, got a damaged file"):
        load(str(tmp_path / "model"))
    (tmp_path / "model" / "open_clip_config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"load: expected a configuration with model_cfg in .*open_clip_config.json, got a file .*Expecting"
    ):
        load(str(tmp_path / "model"))


@pytest.mark.slow
def test_load_by_name_and_file(tmp_path):
    torch.manual_seed(0)
    name = "ViT-B-32"
    state = open_clip.create_model(name).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    loaded = load(name, str(tmp_path / "weights.pt"))
    assert torch.equal(loaded.model.state_dict()["visual.proj"], state["visual.proj"])
    assert loaded.config["model_cfg"] == open_clip.get_model_config(name)
    assert "RandomResizedCrop" in repr(loaded.train_transform)
    assert "scale=(0.9, 1.0)" in repr(loaded.train_transform)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", "openai", "got 'ViT-B-61'. Did you mean 'ViT-B-16'"),
        ("ViT-B-16", None, r"expected pretrained weights for ViT-B-16 \(a file, or of: openai"),
        (".", None, "expected open_clip_config.json in the model's folder"),
    ],
)
def test_what_cannot_be_loaded(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        load(name, pretrained)


# freezing


def test_freezing():
    everything = trained(model())
    found = {
        part: trained(freeze(model(), ModelConfig("m", frozen=part)))
        for part in (("image",), ("text",), ("visual.conv1", "transformer.resblocks.0"))
    }
    assert found["image",] == {name for name in everything if not name.startswith("visual.")}
    assert found["text",] == {name for name in everything if name.startswith("visual.")} | {"logit_scale"}
    gone = everything - found["visual.conv1", "transformer.resblocks.0"]
    assert gone == {name for name in everything if name.startswith(("visual.conv1.", "transformer.resblocks.0."))}
    assert "transformer.resblocks.0.ln_1.weight" in gone
    assert trained(freeze(model(), ModelConfig("m", logit_scale="frozen"))) == everything - {"logit_scale"}
    with pytest.raises(ValueError, match=r'expected "image", "text" or a prefix of parameter names, got \'visual.conv\'. They begin with'):
        freeze(model(), ModelConfig("m", frozen=("visual.conv",)))
    with pytest.raises(ValueError, match="expected something to train, got frozen image, text"):
        freeze(model(), ModelConfig("m", frozen=("image", "text")))


def test_adapters():
    plain = model()
    student = freeze(copy.deepcopy(plain), ModelConfig("m", lora=Lora(rank=2)))
    names = trained(student)
    assert names - {"logit_scale"} == {name for name in names if "lora_" in name}
    teacher = Teacher.adapters_off
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.5)
    for found, expected in zip(encode(student, BATCH), encode(plain, BATCH), strict=True):
        assert (found - expected).norm() > 0.01
    student.logit_scale.requires_grad_(False)
    for found, expected in zip(teacher(student, encode)(BATCH), encode(plain, BATCH), strict=True):
        assert torch.equal(found, expected)
    before = encode(student, BATCH)
    merged = merge_adapters(student)
    assert set(merged.state_dict()) == set(plain.state_dict())
    for found, expected in zip(encode(merged, BATCH), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert merge_adapters(plain) is plain
    for layers, message in ((("out_proj",), "expected adapters on layers where they are exact"), (("fc9",), "expected layers named fc9")):
        with pytest.raises(ValueError, match=message):
            freeze(model(), ModelConfig("m", lora=Lora(layers=layers)))
    one_tower = Lora(rank=2, layers=("conv1",))
    with pytest.raises(ValueError, match="expected layers for adapters in both towers, got none named conv1 in the text tower"):
        freeze(model(), ModelConfig("m", lora=one_tower))
    names = trained(freeze(model(), ModelConfig("m", lora=one_tower, frozen=("text",), logit_scale="frozen")))
    assert {name.partition(".lora_")[0] for name in names} == {"visual.conv1"}


def test_adapters_in_towers_of_timm():
    loaded = load("emojiclip")
    batch = {"image": torch.randn(4, 3, *loaded.model.visual.image_size), "text": loaded.tokenizer(["an owl", "a fox", "a cat", "a hat"])}
    plain = encode(loaded.model, batch)
    student = freeze(loaded.model, ModelConfig("m", lora=Lora(rank=2), logit_scale="frozen"))
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.5)
    for found, expected in zip(encode(student, batch), plain, strict=True):
        assert (found - expected).norm() > 0.01
    for found, expected in zip(Teacher.adapters_off(student, encode)(batch), plain, strict=True):
        assert torch.equal(found, expected)
    before = encode(student, batch)
    for found, expected in zip(encode(merge_adapters(student), batch), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_clamping():
    one = model()
    clamp_logit_scale(one, None)
    assert one.logit_scale.item() == 3.0
    clamp_logit_scale(one, 10.0)
    assert one.logit_scale.item() == pytest.approx(math.log(10))
    one.logit_scale.data.fill_(-2.0)
    clamp_logit_scale(one, 10.0)
    assert one.logit_scale.item() == 0
    with pytest.raises(ValueError, match=r"expected max_logit_scale of at least 1, got 0\.5"):
        ModelConfig("m", max_logit_scale=0.5)


# exports


def test_open_clip_loads_the_export(tmp_path):
    one = model()
    one.logit_scale = torch.nn.Parameter(one.logit_scale.detach().reshape(1))  # as FSDP2 needs it
    for _ in range(2):  # an export that is there is replaced
        to_open_clip(one, CONFIG, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    found, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}", output_dict=True)
    assert all(torch.equal(value.reshape(-1), one.state_dict()[key].reshape(-1)) for key, value in found.state_dict().items())
    assert found.logit_scale.shape == ()
    assert "Normalize(mean=[0.5, 0.5, 0.5]" in repr(transform)


def test_emojiclip_round_trip(tmp_path):
    loaded = load(str(model_folder()))
    again = load(str(to_open_clip(loaded.model, loaded.config, tmp_path / "out")))
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in loaded.model.state_dict().items())
    with pytest.raises(ValueError, match="expected CLIP with a plain ViT and text transformer, got CLIP with TimmModel"):
        to_transformers(loaded.model, loaded.config, tmp_path / "transformers")
    assert not (tmp_path / "transformers").exists()


def test_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    one = model()
    folder = to_open_clip(one, CONFIG, tmp_path / "out")
    before = (folder / "open_clip_model.safetensors").read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        to_open_clip(model(embed_dim=8), CONFIG, folder)
    assert (folder / "open_clip_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_others_are_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"expected a new folder or an earlier export, got .*mine with other files"):
        to_open_clip(model(), CONFIG, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_a_folder_without_weights_is_refused(tmp_path):
    """open_clip would take random ones; a trained head is no weights of a model."""
    (tmp_path / "open_clip_config.json").write_text((model_folder() / "open_clip_config.json").read_text())
    (tmp_path / "head.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^load: expected weights in the model.s folder .*, got none"):
        load(str(tmp_path))


# what no embedding depends on


def with_what_it_needs(found):
    size = open_clip.image_transform(16, is_train=False)
    return Model(found, {}, size, size, lambda texts: torch.randint(1, 60, (len(texts), 8)))


def coca(**vision):
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tower = {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "head_width": 16,
        "layers": 1,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    }
    tower |= {"output_tokens": True, **vision}
    return open_clip.coca_model.CoCa(
        embed_dim=32, vision_cfg=tower, text_cfg=text | {"embed_cls": True, "output_tokens": True}, multimodal_cfg=text
    ).eval()


@pytest.mark.parametrize("pool", [True, "parallel", "cascade"])
def test_a_caption_decoder_is_frozen(pool):
    found = coca(attentional_pool=pool)
    names = freeze_unreached(with_what_it_needs(found))
    assert {name for name in names if name.startswith("text_decoder.")} == {
        name for name, _ in found.named_parameters() if name.startswith("text_decoder.")
    }
    assert trained(found) == {name for name, _ in found.named_parameters()} - set(names)
    sum(one.sum() for one in embed(found, torch.randn(2, 3, 16, 16), torch.randint(1, 60, (2, 8)))).backward()
    reached = {name for name, value in found.named_parameters() if value.grad is not None}
    assert reached == {name for name in trained(found) if not name.startswith("logit_")}
    assert freeze_unreached(with_what_it_needs(found)) == []


def test_nothing_else_is_frozen():
    found = model()
    loaded = with_what_it_needs(found)
    transform = open_clip.image_transform(32, is_train=False)
    loaded = Model(found, {}, transform, transform, lambda texts: BATCH["text"][: len(texts)])
    before = trained(found)
    assert freeze_unreached(loaded) == []
    assert trained(found) == before
